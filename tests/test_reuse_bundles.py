"""Reuse of many files, and of a unit that fails beside others."""

from pathlib import Path
from typing import Any

import pytest
from conftest import candidate_rows, job, write

import batch_rerank.score.earlier as earlier
from batch_rerank.job.run import run
from batch_rerank.score.reuse import KeptFile
from batch_rerank.store.kept import QUERY


def test_an_index_of_many_files_names_the_right_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import numpy as np

    from batch_rerank.store.filesystem import locate
    from batch_rerank.store.manifest import Manifest

    entry = np.zeros(1, QUERY)
    made = []
    for number in range(65_537):
        one = entry.copy()
        one["query_hash"] = number
        made.append((KeptFile("out", str(number), 128), one))
    monkeypatch.setattr(earlier, "_kept", lambda manifest, plan: made)
    index, _ = earlier._index([(Manifest(locate(str(tmp_path))), None)], {})  # type: ignore[list-item]
    assert index.files[int(index.file[-1])].name == "65536"


def test_one_unit_that_fails_takes_no_others_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import batch_rerank.job.run_local as local
    from batch_rerank.errors import UnfinishedError

    rows = [{**row, "text": row["text"].strip()} for row in candidate_rows(48, 10, 0)]
    write(tmp_path / "in" / "0.parquet", rows)
    run(job(tmp_path / "in", tmp_path / "one"), local=True)
    changed = [{**row, "text": row["text"] + (" new" if i % 40 == 0 else "")} for i, row in enumerate(rows)]
    write(tmp_path / "in2" / "0.parquet", changed)
    real = local.score_unit

    def broken(unit: Any, *rest: Any) -> Any:
        if unit.units[0].id == bad or any(one.id == bad for one in unit.units):
            raise RuntimeError("a crash that this unit causes")
        return real(unit, *rest)

    config = job(tmp_path / "in2", tmp_path / "two", reuse__from=str(tmp_path / "one"), reuse__audit=0.0)
    from batch_rerank.job.ahead import ready, settled

    bad = ready(settled(config, local=True), local=True)[1].units[3].id
    monkeypatch.setattr(local, "score_unit", broken)
    with pytest.raises(UnfinishedError):
        run(config, local=True)
    failures = [path.name for path in (tmp_path / "two/_manifest/failures").iterdir()]
    assert len(failures) == 1, failures
