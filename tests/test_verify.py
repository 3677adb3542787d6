"""`verify` finds every difference and names the unit; each case breaks an output in one way."""

import hashlib
import json
import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from conftest import candidate_rows, job, write

import batch_rerank.cli_outputs as cli_outputs
from batch_rerank.calls import in_turn
from batch_rerank.errors import ConflictError, StorageError
from batch_rerank.job.run import run
from batch_rerank.publish.output import Place
from batch_rerank.publish.verify import verify
from batch_rerank.store.filesystem import locate
from batch_rerank.store.lease import hold

UNIT, PART = "00001-00001", "part-00003.parquet"
"""A unit, and the part that has it alone."""


@pytest.fixture
def output(flat_shards: Path, tmp_path: Path) -> Path:
    run(job(flat_shards, tmp_path / "out", output__file_bytes=1), local=True)
    return tmp_path / "out"


def test_a_good_output_is_verified_with_its_numbers(output: Path) -> None:
    verdict = verify(str(output))
    assert (verdict.units, verdict.rows, verdict.candidates, verdict.problems) == (6, 300, 300, [])


def test_one_flipped_bit(output: Path) -> None:
    part = output / PART
    data = bytearray(part.read_bytes())
    data[100] ^= 1
    part.write_bytes(data)
    assert verify(str(output)).problems[0].startswith(f"{PART}: ")


def test_a_part_cut_short(output: Path) -> None:
    part = output / PART
    part.write_bytes(part.read_bytes()[:-50])
    assert [problem[: len(PART)] for problem in verify(str(output)).problems] == [PART]


@pytest.mark.parametrize(
    ("file", "named"),
    [
        (PART, f"{PART}: its file is missing"),
        ("_manifest/parts/00003.json", f"{PART}: its receipt is missing"),
        (f"_manifest/receipts/{UNIT}.json", f"unit {UNIT}: its receipt is missing"),
        ("_manifest/publication.json", "_SUCCESS is of another publication"),
    ],
)
def test_a_deleted_file(file: str, named: str, output: Path) -> None:
    (output / file).unlink()
    assert named in verify(str(output)).problems[0]


def test_a_foreign_file_that_a_glob_would_read(output: Path) -> None:
    write(output / "part-extra.parquet", candidate_rows(1, 1))
    assert "part-extra.parquet: a Parquet file that the plan does not have" in verify(str(output)).problems[0]


def test_an_unfinished_output(output: Path) -> None:
    (output / "_SUCCESS").unlink()
    assert verify(str(output)).problems == ["no _SUCCESS, the job has not finished; run it again to the end"]


def test_an_input_that_changed(output: Path, flat_shards: Path) -> None:
    write(flat_shards / "1.parquet", candidate_rows(4, 25, first=4))
    assert any("1.parquet: changed since the plan" in problem for problem in verify(str(output)).problems)


def test_the_verdict_is_the_same_whoever_looks_and_whatever_ends_first(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batch_rerank.publish.verify.SMALL_BYTES", 0)
    (output / PART).unlink()
    (output / "_manifest/parts/00001.json").unlink()
    scores = next((output / "_scores").glob("*.parquet"))
    scores.write_bytes(scores.read_bytes()[:-1] + b"?")
    sizes: list[int] = []

    def elsewhere(calls: Iterable[Callable[[], Any]], shared: Any = None) -> Iterator[Any]:
        sent = [pickle.dumps(call) for call in calls]
        sizes.extend(map(len, sent))
        return (pickle.loads(call)() for call in reversed(sent))

    here = verify(str(output))
    assert len(here.damaged) == 3 and here.problems[0].startswith("part-00001")
    assert verify(str(output), on=lambda config: elsewhere) == here
    assert len(sizes) == 6 + len(list((output / "_scores").glob("*.parquet")))
    assert max(sizes) < 8000, "neither the plan nor all receipts"


@pytest.mark.parametrize("output_only", [False, True])
def test_units_that_are_not_published_are_looked_at_anywhere_too(
    output_only: bool, flat_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batch_rerank.publish.verify.SMALL_BYTES", 0)
    monkeypatch.setattr("batch_rerank.job.run.finish", lambda *given: None)
    run(job(flat_shards, tmp_path / "out"), local=True)
    next((tmp_path / "out/_work").glob("*.parquet")).write_bytes(b"PAR1")

    def elsewhere(calls: Iterable[Callable[[], Any]], shared: Any = None) -> Iterator[Any]:
        return (pickle.loads(pickle.dumps(call))() for call in reversed(list(calls)))

    here = verify(str(tmp_path / "out"), output_only=output_only)
    assert (here.units, here.candidates, len(here.problems)) == (5, 250, 2)
    assert verify(str(tmp_path / "out"), output_only=output_only, on=lambda config: elsewhere) == here


def test_no_output_at_all(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"no _manifest/plan\.json"):
        verify(str(tmp_path))


def forge(output: Path, change: Callable[[pa.Table], pa.Table]) -> list[str]:
    """Change a part's rows and give it counts and a receipt that fit: only the content is wrong."""
    part, receipt, success = output / PART, output / "_manifest" / "parts" / "00003.json", output / "_SUCCESS"
    table = pq.read_table(part)
    changed = change(table)
    pq.write_table(changed.replace_schema_metadata(table.schema.metadata), part)
    data = part.read_bytes()
    true = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "rows": len(changed)}
    receipt.write_text(json.dumps(json.loads(receipt.read_text()) | true))
    mark = json.loads(success.read_text())
    mark["parts"][3] |= true
    success.write_text(json.dumps(mark))
    return verify(str(output)).problems


def set_column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, values)


def test_a_lost_row(output: Path) -> None:
    problems = forge(output, lambda table: table.slice(0, len(table) - 1))
    assert problems[0].startswith(f"{PART}: unit {UNIT}: 1 candidates are missing, e.g. ('q7', ")


def test_a_doubled_row(output: Path) -> None:
    problems = forge(output, lambda table: pa.concat_tables([table, table.slice(49)]))
    assert f"{PART}: unit {UNIT}: 1 candidates appear twice" in problems[0]


def test_a_row_that_is_no_candidate(output: Path) -> None:
    def rename(table: pa.Table) -> pa.Table:
        return set_column(table, "doc_id", pc.replace_substring(table["doc_id"], "d13", "dx"))

    problems = forge(output, rename)
    assert any("2 rows are no input candidates" in problem for problem in problems)


def test_ranks_with_a_gap(output: Path) -> None:
    problems = forge(output, lambda table: set_column(table, "rank", pc.add(table["rank"], 1).cast(pa.int32())))
    assert problems == [f"{PART}: unit {UNIT}: ranks are not 1, 2, … within each query"]


def test_scores_that_do_not_fit_the_ranks(output: Path) -> None:
    problems = forge(output, lambda table: set_column(table, "score", pc.negate(table["score"])))
    assert problems == [f"{PART}: unit {UNIT}: ranks do not follow the scores"]


def test_a_row_with_neither_score_nor_error(output: Path) -> None:
    def lose_last_score(table: pa.Table) -> pa.Table:
        last = pc.equal(table["rank"], 25)
        return set_column(table, "score", pc.if_else(last, pa.scalar(None, pa.float32()), table["score"]))

    assert forge(output, lose_last_score) == [f"{PART}: unit {UNIT}: a row has a score and an error, or neither"]


def test_more_rows_than_top_k(flat_shards: Path, tmp_path: Path) -> None:
    run(job(flat_shards, tmp_path / "out", output__top_k=5, output__file_bytes=1), local=True)
    problems = forge(tmp_path / "out", lambda table: table.slice(1))
    assert any("queries have another number of rows than top_k keeps" in problem for problem in problems)


def test_queries_out_of_order(output: Path) -> None:
    problems = forge(output, lambda table: pa.concat_tables([table.slice(25), table.slice(0, 25)]))
    assert problems == [f"{PART}: unit {UNIT}: queries are not in input order"]


def flip(output: Path) -> None:
    part = output / PART
    data = bytearray(part.read_bytes())
    data[len(data) // 3] ^= 1
    part.write_bytes(data)


def flip_scores(output: Path) -> None:
    scores = output / "_scores/00003.parquet"
    data = bytearray(scores.read_bytes())
    data[len(data) // 3] ^= 1
    scores.write_bytes(data)


def edit(output: Path) -> None:
    receipt = output / f"_manifest/receipts/{UNIT}.json"
    claims = json.loads(receipt.read_text())
    receipt.write_text(json.dumps(claims | {"truncated": claims["truncated"] + 1}))


def swap(output: Path) -> None:
    """Another part under this one's name, its receipt edited to fit."""
    (output / PART).write_bytes((output / "part-00002.parquet").read_bytes())
    claims = json.loads((output / "_manifest/parts/00002.json").read_text())
    (output / "_manifest/parts/00003.json").write_text(json.dumps(claims | {"part": PART}))


@pytest.mark.parametrize(
    ("damage", "named", "scored"),
    [
        (flip, f"{PART}: ", 0),
        (lambda output: (output / PART).unlink(), f"{PART}: its file is missing", 0),
        (edit, f"unit {UNIT}: the receipt's counts are not its scores': truncated", 1),
        (swap, f"{PART}: _SUCCESS says otherwise than its receipt", 0),
        (flip_scores, "_scores/00003.parquet: not what its receipt says", 0),
        (lambda output: [flip(output), flip_scores(output)], f"{PART}: ", 1),
    ],
)
def test_repair_marks_what_is_damaged_and_the_next_run_mends_it(
    damage: Callable[[Path], None],
    named: str,
    scored: int,
    output: Path,
    flat_shards: Path,
    cli: Callable[..., tuple[int, str, str]],
) -> None:
    before = {part.name: part.read_bytes() for part in output.glob("part-*")}
    damage(output)
    code, _, shown = cli("verify", output)
    assert code == 6 and named in shown
    assert (output / "_SUCCESS").exists(), "verify alone changes nothing"
    code, _, shown = cli("verify", output, "--repair")
    assert code == 6 and "damaged file(s) are made not done: run the job again" in shown
    assert not (output / "_SUCCESS").exists()
    again = run(job(flat_shards, output, output__file_bytes=1), local=True)
    assert (again.units, again.resumed_units) == (scored, 6 - scored)
    assert {part.name: part.read_bytes() for part in output.glob("part-*")} == before
    assert cli("verify", output)[0] == 0


def test_repair_leaves_an_output_alone_that_a_job_works_on(output: Path) -> None:
    flip(output)
    with hold(locate(str(output)), 60), pytest.raises(ConflictError, match="another job is at work"):
        verify(str(output), repair=True)
    assert (output / "_SUCCESS").exists()


def test_a_resume_stops_at_a_file_that_readers_would_take_for_output(output: Path, flat_shards: Path) -> None:
    (output / "_SUCCESS").unlink()
    write(output / "part-extra.parquet", candidate_rows(1, 1))
    with pytest.raises(ConflictError, match=r"not of this job, e\.g\. part-extra\.parquet"):
        run(job(flat_shards, output, output__file_bytes=1), local=True)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"unit": "x"}', "\x00"])
def test_a_resume_scores_a_unit_again_whose_receipt_cannot_be_read(
    content: str, output: Path, flat_shards: Path, logged: list[str]
) -> None:
    (output / f"_manifest/receipts/{UNIT}.json").write_text(content)
    assert run(job(flat_shards, output, output__file_bytes=1), local=True).units == 1
    assert any(f"unit {UNIT}: its receipt cannot be read; it is made again" in message for message in logged)
    assert verify(str(output)).problems == []


def test_without_its_input_an_output_is_compared_with_its_plan(
    output: Path, flat_shards: Path, cli: Callable[..., tuple[int, str, str]]
) -> None:
    for shard in flat_shards.iterdir():
        shard.unlink()
    code, _, shown = cli("verify", output)
    assert code == 6 and "--output-only does without the input" in shown
    code, _, shown = cli("verify", output, "--output-only")
    assert code == 0 and "verified: 300 rows of 300 candidates in 6 units" in shown
    flip(output)
    assert cli("verify", output, "--output-only")[0] == 6


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.slice(1),
        lambda table: set_column(table, "score", pc.negate(table["score"])),
        lambda table: pa.concat_tables([table, table.slice(49)]),
    ],
)
def test_without_the_input_wrong_rows_are_found_too(
    change: Callable[[pa.Table], pa.Table], output: Path, flat_shards: Path
) -> None:
    forge(output, change)
    for shard in flat_shards.iterdir():
        shard.unlink()
    assert verify(str(output), output_only=True).problems


def test_a_mark_of_another_job_or_of_other_units_is_named(output: Path) -> None:
    mark = json.loads((output / "_SUCCESS").read_text())
    (output / "_SUCCESS").write_text(json.dumps({**mark, "units": 5}))
    assert "_SUCCESS is of another job, or of 5 units where the plan has 6" in verify(str(output)).problems


@pytest.mark.parametrize("odd", ["a duplicate", "a foreign one"])
def test_a_number_of_receipts_is_no_set_of_units(
    odd: str, flat_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six receipts of six units, one of them not the one that was wanted: what Ray might hand over."""
    from dataclasses import replace

    import batch_rerank.job.reused as reused
    from batch_rerank.errors import UnfinishedError

    real = reused.run_local

    def stream(*arguments: object, **more: object) -> object:
        receipts = list(real(*arguments, **more))  # type: ignore[arg-type]
        other = receipts[0] if odd == "a duplicate" else replace(receipts[0], unit="00009-00009")
        return iter([*receipts[:-1], other])

    monkeypatch.setattr(reused, "run_local", stream)
    with pytest.raises(UnfinishedError, match="1 of 6 units did not finish: 00002-00001"):
        run(job(flat_shards, tmp_path / "out"), local=True)
    assert not (tmp_path / "out" / "_SUCCESS").exists()


def test_a_directory_with_a_trec_run_is_read_as_it_is(flat_shards: Path, tmp_path: Path) -> None:
    import pyarrow.dataset

    out = str(tmp_path / "out")
    run(job(flat_shards, out, output__trec_run=True), local=True)
    assert (tmp_path / "out" / "_run.trec").exists()
    assert pyarrow.dataset.dataset(out).count_rows() == 300
    assert len(pq.read_table(out)) == 300


def test_pandas_reads_the_directory_too(flat_shards: Path, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is no dependency of ours; it is not installed")
    run(job(flat_shards, tmp_path / "out", output__trec_run=True), local=True)
    assert len(pandas.read_parquet(tmp_path / "out")) == 300


@pytest.mark.parametrize("columns", [{"x": [1]}, {"candidates": [1], "query_id": ["a"]}, {"candidates": [[{"a": 1}]]}])
def test_a_part_with_the_columns_of_something_else_is_a_problem(
    columns: dict[str, list[Any]], flat_shards: Path, tmp_path: Path
) -> None:
    run(job(flat_shards, tmp_path / "out"), local=True)
    (part,) = (tmp_path / "out").glob("part-*.parquet")
    pq.write_table(pa.table(columns), part)
    verdict = verify(str(tmp_path / "out"))
    assert verdict.damaged == [part.name]
    assert f"{part.name}: its columns are {list(columns)}, which are not an output's" in verdict.problems


@pytest.mark.parametrize("address", ["key", "variable", None])
def test_an_output_on_a_disk_is_not_looked_for_on_the_nodes_of_a_cluster(
    address: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Ray here would be the cluster's; without an address it is this machine's, which has the disk."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address == "variable":
        monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    config = job("in", tmp_path, **({"cluster__address": "head:6379"} if address == "key" else {}))
    caplog.set_level("INFO", "batch_rerank")
    on = cli_outputs._on(Place(str(tmp_path)), local=False)
    assert on is not None and (on(config) is in_turn) == (address is not None)
    assert ("is on a disk, which the nodes of head:6379 may not have" in caplog.text) == (address is not None)
    assert cli_outputs._on(Place(str(tmp_path)), local=True) is None
    far = cli_outputs._on(Place("s3://bucket/out", {"key": "a", "secret": "b"}), local=False)
    assert far is not None and far(config) is not in_turn
