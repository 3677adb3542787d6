"""Planning: units, the fingerprint, and what is said before anything runs."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import candidate_rows, job, nested, write

from batch_rerank.config import load_config
from batch_rerank.errors import InputError
from batch_rerank.input import shards
from batch_rerank.input.layouts import find_scattered
from batch_rerank.input.shards import read_queries
from batch_rerank.input.units import cut_units
from batch_rerank.publish.publication import publishing_fields
from batch_rerank.score.plan import make_plan
from batch_rerank.store.filesystem import locate
from batch_rerank.store.lease import Holder, hold
from batch_rerank.store.plans import Plan

Cli = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("pairs", "row_group_ends", "unit_pairs", "cuts"),
    [
        ([10, 10, 10, 10], [40], 20, [0, 2, 4]),
        ([10, 10, 10, 10], [40], 15, [0, 2, 4]),
        ([10, 10, 10], [30], 20, [0, 2, 3]),
        ([500, 1, 1, 1], [503], 20, [0, 1, 4]),
        ([1, 1, 500, 1], [503], 20, [0, 2, 3, 4]),
        ([0, 0, 5], [5], 20, [0, 3]),
        ([10, 10, 10, 10], [10, 20, 30, 40], 20, [0, 1, 2, 3, 4]),
        ([10, 10, 10, 10], [10, 20, 30, 40], 30, [0, 2, 4]),
        ([], [], 20, [0]),
    ],
)
def test_units_are_cut_at_queries(
    pairs: list[int], row_group_ends: list[int], unit_pairs: int, cuts: list[int]
) -> None:
    rows = np.concatenate([[0], np.cumsum(pairs)]).astype(np.int64)
    assert cut_units(np.array(pairs, np.int64), rows, row_group_ends, unit_pairs) == cuts


def test_long_texts_make_smaller_units(tmp_path: Path) -> None:
    rows = [{**row, "text": f"{row['doc_id']} {'x' * 20_000}"} for row in candidate_rows(10, 10)]
    path = write(tmp_path / "in.parquet", rows)
    keys: dict[str, Any] = {"input__unit_pairs": 2000}
    assert len(make_plan(job(path, tmp_path / "out", **keys))[0].units) == 1
    keys["input__unit_bytes"] = 2000
    assert len(make_plan(job(path, tmp_path / "out", **keys))[0].units) == 10


def test_a_query_with_very_many_candidates_is_one_unit_and_said(tmp_path: Path) -> None:
    path = write(tmp_path / "in.parquet", candidate_rows(1, 500))
    plan, _ = make_plan(job(path, tmp_path / "out"))
    assert [unit.pairs for unit in plan.units] == [500]
    assert "unit 00000-00000 has 500 pairs" in plan.notes[0]


def test_a_plan_survives_its_file(flat_shards: Path, tmp_path: Path) -> None:
    plan, _ = make_plan(job(flat_shards, tmp_path / "out", output__passthrough=["lang"]))
    assert Plan.from_json(plan.to_json(), "test") == plan


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model__max_length": 100}, "model.max_length"),
        ({"model__instruction": "judge"}, "model.instruction"),
        ({"input__columns": {"text": "lang"}}, "input.columns"),
    ],
)
def test_what_changes_a_score_changes_the_fingerprint(
    change: dict[str, Any], field: str, flat_shards: Path, tmp_path: Path
) -> None:
    plain, _ = make_plan(job(flat_shards, tmp_path / "out"))
    other, _ = make_plan(job(flat_shards, tmp_path / "out", **change))
    differing = {key for key, value in other.fingerprint_fields.items() if value != plain.fingerprint_fields[key]}
    assert differing == {field}
    assert other.fingerprint != plain.fingerprint


@pytest.mark.parametrize(
    "change", [{"top_k": 3}, {"include_text": True}, {"passthrough": ["lang"]}, {"layout": "nested"}]
)
def test_what_changes_no_score_changes_the_publication_alone(
    change: dict[str, Any], flat_shards: Path, tmp_path: Path
) -> None:
    one = job(flat_shards, tmp_path / "out")
    other = job(flat_shards, tmp_path / "out", **{f"output__{key}": value for key, value in change.items()})
    assert make_plan(one)[0].fingerprint == make_plan(other)[0].fingerprint
    fields = [publishing_fields(config.output) for config in (one, other)]
    assert {name for name in fields[0] if fields[0][name] != fields[1][name]} == set(change)


def test_a_rewritten_shard_changes_the_fingerprint(flat_shards: Path, tmp_path: Path) -> None:
    before, _ = make_plan(job(flat_shards, tmp_path / "out"))
    write(flat_shards / "0.parquet", candidate_rows(4, 25))
    after, _ = make_plan(job(flat_shards, tmp_path / "out"))
    assert after.fingerprint != before.fingerprint


def test_plan_writes_nothing(flat_shards: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "job.yaml").write_text(job(flat_shards, tmp_path / "out").model_dump_json(exclude={"limit"}))
    code, out, error = cli("plan", tmp_path / "job.yaml", "--json", "--set", "output.top_k=7")
    assert code == 0
    assert "3 shards, 12 queries, 300 pairs, 6 units" in error
    assert json.loads(out)["config"]["output"]["top_k"] == 7
    assert not (tmp_path / "out").exists()


def test_a_nested_shards_lists_may_be_large_lists(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(nested(candidate_rows(3, 4)))
    kind = table.schema.field("candidates").type
    table = table.set_column(2, "candidates", table["candidates"].cast(pa.large_list(kind.value_type)))
    pq.write_table(table, tmp_path / "in.parquet")
    plan, _ = make_plan(job(tmp_path / "in.parquet", tmp_path / "out", input__layout="nested"))
    assert plan.pairs == 12


def test_storage_options_are_in_no_plan(flat_shards: Path, tmp_path: Path) -> None:
    raw = job(flat_shards, tmp_path / "out").model_dump(exclude={"limit"})
    raw["output"]["storage_options"] = {"auto_mkdir": True}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(raw))
    config = load_config(tmp_path / "job.yaml")
    assert config.output.storage_options == {"auto_mkdir": True}
    assert b"auto_mkdir" not in make_plan(config)[0].to_json()


def same_as_run(cli: Cli, config: Path, *more: str) -> str:
    """What `plan` says where `run` ends with exit code 4."""
    code, _, said = cli("plan", config, *more)
    assert (code, cli("run", config, "--local", *more)[0]) == (4, 4)
    return said


def test_plan_says_what_run_would_say_of_the_output(flat_shards: Path, tmp_path: Path, cli: Cli) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(job(flat_shards, tmp_path / "out").model_dump_json(exclude={"limit"}))
    write(tmp_path / "out" / "mine.parquet", candidate_rows(1, 1))
    assert "that no plan describes, e.g. mine.parquet" in same_as_run(cli, file)
    (tmp_path / "out" / "mine.parquet").rename(tmp_path / "mine.parquet")
    assert cli("run", file, "--local")[0] == 0
    assert cli("plan", file)[0] == 0
    assert "output.top_k differ" in same_as_run(cli, file, "--set", "output.top_k=3")
    (tmp_path / "mine.parquet").rename(tmp_path / "out" / "mine.parquet")
    assert "not of this job, e.g. mine.parquet" in same_as_run(cli, file)
    (tmp_path / "out" / "mine.parquet").unlink()
    with hold(locate(str(tmp_path / "out"))):
        assert "another job is at work on this output" in same_as_run(cli, file)


def test_plan_says_that_a_lease_has_to_be_watched(flat_shards: Path, tmp_path: Path, cli: Cli) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(job(flat_shards, tmp_path / "out").model_dump_json(exclude={"limit"}))
    holder = Holder("x", "far", "another machine", 7, "1", "2026-01-01T00:00:00Z")
    (locate(str(tmp_path / "out")) / "_manifest/lease/1").write_bytes(holder.to_json())
    code, _, said = cli("plan", file)
    assert code == 0
    assert "was held by process 7 on far since 2026-01-01T00:00:00Z; a run waits up to 60 s" in said


def _shard(seed: int, nested_rows: bool) -> pa.Table:
    """Queries of 0 (nested only) to 9 candidates, some of one query far longer than a batch."""
    random = np.random.default_rng(seed)
    sizes = random.choice([1, 2, 3, 9, 20], 12)
    ids = [f"q{number}" for number in range(len(sizes))]
    documents = [[f"d{seed}-{place}" for place in range(size)] for size in sizes]
    if nested_rows:
        rows = [
            {"query_id": name, "query": "a", "candidates": [{"doc_id": one, "text": "b"} for one in found]}
            for name, found in zip(ids, documents, strict=True)
        ]
        return pa.Table.from_pylist(rows)
    flat = [{"query_id": name, "doc_id": one} for name, found in zip(ids, documents, strict=True) for one in found]
    return pa.Table.from_pylist([{**row, "query": "a", "text": "b"} for row in flat])


@pytest.mark.parametrize("layout", ["flat", "nested"])
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_ids_that_are_read_some_at_a_time_are_the_same_queries(
    layout: str, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(5):
        table = _shard(seed, layout == "nested")
        pq.write_table(table, tmp_path / "s.parquet", row_group_size=17)
        at = locate(str(tmp_path / "s.parquet"))
        _, whole, _, size, _ = read_queries(at, layout, {}, [])
        monkeypatch.setattr(shards, "ID_ROWS", rows)
        _, parts, _, again, _ = read_queries(at, layout, {}, [])
        monkeypatch.undo()
        assert parts.ids.equals(whole.ids) and parts.ids.to_pylist() == [f"q{number}" for number in range(12)]
        assert parts.rows.tolist() == whole.rows.tolist() and parts.rows[-1] == len(table)
        assert parts.pairs.tolist() == whole.pairs.tolist() and size == again


@pytest.mark.parametrize(
    ("row", "change", "message"),
    [
        (31, {"doc_id": None}, r"row 31: doc_id is null \(1 such up to row 31\)"),
        (31, {"query_id": None}, r"row 31: query_id is null"),
        (31, {"query_id": "q1", "doc_id": "d"}, "query_id 'q1' has doc_id 'd' 2 times (rows 20 and 31)"),
    ],
)
def test_what_is_wrong_with_an_id_is_found_in_whichever_batch(
    row: int, change: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A query's candidates are in many batches; rows are counted from the shard's first."""
    rows = [{"query_id": f"q{n // 20}", "doc_id": f"d{n}", "query": "a", "text": "b"} for n in range(40)]
    rows[20]["doc_id"] = "d"
    rows[row] |= change
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "s.parquet")
    monkeypatch.setattr(shards, "ID_ROWS", 3)
    with pytest.raises(InputError, match=message if "\\" in message else re.escape(message)):
        read_queries(locate(str(tmp_path / "s.parquet")), "flat", {}, [])


def test_a_query_that_comes_back_in_a_later_batch_is_scattered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"query_id": name, "doc_id": f"d{n}", "query": "a", "text": "b"} for n, name in enumerate("aaabbbaa")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "s.parquet")
    monkeypatch.setattr(shards, "ID_ROWS", 2)
    found = read_queries(locate(str(tmp_path / "s.parquet")), "flat", {}, [])[1]
    assert (found.ids.to_pylist(), found.pairs.tolist()) == (["a", "b", "a"], [3, 3, 2])
    assert [one.second for one in find_scattered([("s", found)])] == [("s", 6)]
