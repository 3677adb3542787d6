"""The input is its content: a copy of the same bytes is the same input, and what differs is named."""

import os
import shutil
from pathlib import Path

import pytest
from conftest import candidate_rows, job, rows_of, write

from batch_rerank.errors import ConflictError
from batch_rerank.job.run import run
from batch_rerank.publish.verify import verify
from batch_rerank.score.plan import make_plan


def test_touched_shards_are_the_same_input(flat_shards: Path, tmp_path: Path) -> None:
    run(job(flat_shards, tmp_path / "out"), local=True)
    for path in flat_shards.iterdir():
        os.utime(path, (1, 1))
    assert verify(str(tmp_path / "out")).problems == []
    assert run(job(flat_shards, tmp_path / "out"), local=True).units == 0


def test_a_job_goes_on_from_a_copy_of_its_input(flat_shards: Path, tmp_path: Path) -> None:
    run(job(flat_shards, tmp_path / "out"), local=True)
    whole = rows_of(tmp_path / "out").replace_schema_metadata()
    shutil.move(flat_shards, tmp_path / "copy")
    (tmp_path / "out/_manifest/receipts/00001-00000.json").unlink()
    summary = run(job(tmp_path / "copy", tmp_path / "out"), local=True)
    assert (summary.units, summary.resumed_units) == (1, 5)
    assert rows_of(tmp_path / "out").replace_schema_metadata() == whole


def test_a_shard_that_differs_is_named(flat_shards: Path, tmp_path: Path) -> None:
    run(job(flat_shards, tmp_path / "out"), local=True)
    write(flat_shards / "1.parquet", candidate_rows(4, 25, first=4), row_group_size=34)
    with pytest.raises(ConflictError, match=r"differs in input\.shards") as caught:
        run(job(flat_shards, tmp_path / "out"), local=True)
    assert f"1 only there, e.g. {flat_shards}/1.parquet" in str(caught.value)
    assert f"1 only here, e.g. {flat_shards}/1.parquet" in str(caught.value)
    problems = verify(str(tmp_path / "out")).problems
    assert any("1.parquet: changed since the plan" in problem for problem in problems)


def test_shards_in_another_order_are_another_input(flat_shards: Path, tmp_path: Path) -> None:
    before, _ = make_plan(job(flat_shards, tmp_path / "out"))
    (flat_shards / "0.parquet").rename(flat_shards / "3.parquet")
    after, _ = make_plan(job(flat_shards, tmp_path / "out"))
    assert before.fingerprint != after.fingerprint
