"""Publishing: an output is a function of the scores, readers meet whole parts or nothing, and nobody scores twice."""

import json
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import yaml
from checkpoints import bert_reranker
from conftest import Killed, candidate_rows, job, rows_of, scored_only, write

import batch_rerank.job.finish as finish
import batch_rerank.job.republish as republishing
import batch_rerank.publish.keep as keep
import batch_rerank.store.rolls as rolls
from batch_rerank.config import JobConfig
from batch_rerank.job.run import run
from batch_rerank.judge.evaluate import evaluate
from batch_rerank.publish.nested import flat
from batch_rerank.publish.output import Place
from batch_rerank.publish.verify import verify
from batch_rerank.store.filesystem import Location

Cli = Callable[..., tuple[int, str, str]]


def job_file(tmp_path: Path, config: JobConfig) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(exclude={"limit"})))
    return path


def plain(output: Path) -> pa.Table:
    """An output's rows, flat, without what names its job."""
    return flat(rows_of(output)).replace_schema_metadata()


@pytest.mark.parametrize(
    "change",
    [
        {"top_k": 3},
        {"layout": "nested"},
        {"include_text": True, "passthrough": ["lang", "query"]},
        {"layout": "nested", "top_k": 7, "include_text": True, "file_bytes": 1},
        {"trec_run": True, "top_k": 2},
    ],
)
def test_what_is_published_again_is_what_a_run_of_its_own_writes(
    change: dict[str, Any], flat_shards: Path, tmp_path: Path, cli: Cli
) -> None:
    run(job(flat_shards, tmp_path / "out", output__passthrough=["lang"]), local=True)
    keys = {f"output__{name}": value for name, value in {"passthrough": ["lang"], **change}.items()}
    run(job(flat_shards, tmp_path / "own", **keys), local=True)
    file = job_file(tmp_path, job(flat_shards, tmp_path / "out", **keys))
    code, out, _ = cli("publish", file, "--local", "--json")
    assert code == 0 and json.loads(out)["again"] is True
    assert plain(tmp_path / "out") == plain(tmp_path / "own")
    assert [p.name for p in (tmp_path / "out").glob("*.parquet")] == [
        p.name for p in (tmp_path / "own").glob("*.parquet")
    ]
    if "trec_run" in change:
        assert (tmp_path / "out/_run.trec").read_bytes() == (tmp_path / "own/_run.trec").read_bytes()
    assert verify(str(tmp_path / "out")).problems == []
    assert run(job(flat_shards, tmp_path / "out", **keys), local=True).units == 0
    code, out, _ = cli("publish", file, "--local", "--json")
    assert code == 0 and json.loads(out)["again"] is False


def test_another_top_k_needs_neither_the_model_nor_the_input(flat_shards: Path, tmp_path: Path, cli: Cli) -> None:
    model = bert_reranker(tmp_path / "model")
    keys = {"model__name": str(model), "model__kind": "auto", "model__max_length": 128}
    file = job_file(tmp_path, job(flat_shards, tmp_path / "out", **keys))
    assert cli("run", file, "--local")[0] == 0
    whole = plain(tmp_path / "out")
    shutil.rmtree(model)
    shutil.rmtree(flat_shards)
    assert cli("publish", file, "--local", "--set", "output.top_k=2")[0] == 0
    assert plain(tmp_path / "out") == whole.filter(pa.compute.less_equal(whole["rank"], 2))
    # by its path: as it was published last
    assert cli("publish", tmp_path / "out", "--local")[0] == 0
    assert len(plain(tmp_path / "out")) == 24


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"model__max_length": 99}, "model.max_length: there None, here 99"),
        ({"scoring__long_documents": "chunk"}, "scoring.long_documents: there 'truncate', here 'chunk'"),
        ({"input__path": "elsewhere"}, "input.path"),
    ],
)
def test_the_scores_of_another_job_are_not_published(
    keys: dict[str, Any], told: str, flat_shards: Path, tmp_path: Path, cli: Cli
) -> None:
    run(job(flat_shards, tmp_path / "out"), local=True)
    code, _, error = cli("publish", job_file(tmp_path, job(flat_shards, tmp_path / "out", **keys)), "--local")
    assert code == 4 and told in error
    assert (tmp_path / "out/_SUCCESS").exists()


def test_what_cannot_be_published_leaves_what_is(flat_shards: Path, tmp_path: Path, cli: Cli) -> None:
    unfinished = scored_only(job(flat_shards, tmp_path / "scored"))
    (unfinished / "_work/00001-00000.parquet").unlink()
    code, _, error = cli("publish", unfinished, "--local")
    assert code == 1 and "the scores of 1 of 6 units are not there, e.g. of 00001-00000" in error
    run(job(flat_shards, tmp_path / "out", output__keep_scores=False), local=True)
    before = rows_of(tmp_path / "out")
    file = job_file(tmp_path, job(flat_shards, tmp_path / "out", output__top_k=1))
    code, _, error = cli("publish", file, "--local")
    assert code == 1 and "the scores of 6 of 6 units are not there" in error
    run(job(flat_shards, tmp_path / "kept"), local=True)
    shutil.move(flat_shards / "1.parquet", tmp_path / "away.parquet")
    file = job_file(tmp_path, job(flat_shards, tmp_path / "kept", output__include_text=True))
    code, _, error = cli("publish", file, "--local")
    assert code == 3 and "1.parquet: not found" in error
    for output in (tmp_path / "out", tmp_path / "kept"):
        assert (output / "_SUCCESS").exists()
        assert rows_of(output).replace_schema_metadata() == before.replace_schema_metadata()


def test_columns_that_only_some_units_were_scored_with_are_read_for_the_others(
    flat_shards: Path, tmp_path: Path
) -> None:
    """A job that is resumed with `include_text` and another `passthrough`: one unit has them, its neighbour has not."""
    keys = {"output__include_text": True, "output__passthrough": ["query", "lang"]}
    run(job(flat_shards, tmp_path / "own", **keys), local=True)
    out = scored_only(job(flat_shards, tmp_path / "out", output__passthrough=["lang"]))
    (out / "_work/00001-00000.parquet").unlink()
    assert run(job(flat_shards, out, **keys), local=True).units == 1
    assert plain(out) == plain(tmp_path / "own")


@pytest.mark.parametrize(("small", "calls"), [(2**20, 0), (1, 2)])  # tried, then made
def test_many_scores_are_published_again_side_by_side(
    small: int, calls: int, flat_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they lie below `_scores/` too: what runs the calls of a large job is asked, and not the driver's loop."""
    run(job(flat_shards, tmp_path / "out"), local=True)
    asked: list[int] = []

    def each(work: Sequence[Callable[[], Any]]) -> Iterator[Any]:
        asked.append(len(work))
        return (call() for call in work)

    monkeypatch.setattr(finish, "SMALL_BYTES", small)
    monkeypatch.setattr(republishing, "in_turn", each)
    config = job(flat_shards, tmp_path / "out", output__top_k=2)
    assert republishing.republish(Place(config.output.path, {}, config), local=True).rows_out == 24
    assert sum(asked) == calls


# ---- what readers meet


def readers() -> Iterator[Callable[[Path], int]]:
    yield lambda out: ds.dataset(out).count_rows()
    yield lambda out: sum(pq.read_metadata(part).num_rows for part in out.glob("*.parquet"))
    yield lambda out: sum(
        pq.read_metadata(part).num_rows for part in out.rglob("[!_.]*.parquet") if "_" not in part.parts[-2]
    )


def test_readers_of_a_directory_see_nothing_before_and_all_after(flat_shards: Path, tmp_path: Path) -> None:
    out = scored_only(job(flat_shards, tmp_path / "out"))
    assert [read(out) for read in readers()] == [0, 0, 0]
    run(job(flat_shards, out, output__trec_run=True), local=True)
    assert [read(out) for read in readers()] == [300, 300, 300]
    pandas = pytest.importorskip("pandas", reason="pandas is no dependency of ours; it is not installed")
    assert len(pandas.read_parquet(out)) == 300


def test_duckdb_reads_the_directory(flat_shards: Path, tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb", reason="duckdb is no dependency of ours; it is not installed")
    run(job(flat_shards, tmp_path / "out"), local=True)
    assert duckdb.sql(f"select count(*) from '{tmp_path}/out/*.parquet'").fetchone() == (300,)


def test_success_is_a_readers_manifest(flat_shards: Path, tmp_path: Path) -> None:
    import hashlib

    out = tmp_path / "out"
    run(job(flat_shards, out, output__file_bytes=8000), local=True)
    mark = json.loads((out / "_SUCCESS").read_text())
    assert 1 < len(mark["parts"]) < 6
    assert sorted(part["name"] for part in mark["parts"]) == sorted(part.name for part in out.glob("*.parquet"))
    for part in mark["parts"]:
        data = (out / part["name"]).read_bytes()
        assert (part["size"], part["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        assert part["rows"] == pq.read_metadata(out / part["name"]).num_rows
    assert sum(part["rows"] for part in mark["parts"]) == mark["rows"] == 300
    statistics = pq.read_metadata(out / "part-00000.parquet").row_group(0).column(0).statistics
    assert (statistics.min, statistics.max) == ("q0", "q3") or statistics.has_min_max


def test_no_reader_meets_two_publications_at_once(
    flat_shards: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every removal and creation of a republication: under a mark its parts are there, and no others."""
    out = tmp_path / "out"
    run(job(flat_shards, out, output__file_bytes=1), local=True)
    looked: list[str] = []

    def look(name: str) -> None:
        looked.append(name)
        if (out / "_SUCCESS").exists():
            mark = json.loads((out / "_SUCCESS").read_text())
            there = {part.name: part.stat().st_size for part in out.glob("*.parquet")}
            assert there == {part["name"]: part["size"] for part in mark["parts"]}, name
        kinds = {pq.read_schema(part).metadata[b"batch_rerank.publication"] for part in out.glob("*.parquet")}
        assert len(kinds) <= 1, name

    for method in ("remove_seen", "create_exclusive"):
        original = getattr(Location, method)

        def watched(self: Location, given: Any, original: Any = original) -> Any:
            look(self.name)
            result = original(self, given)
            look(self.name)
            return result

        monkeypatch.setattr(Location, method, watched)
    file = job_file(tmp_path, job(flat_shards, out, output__top_k=2, output__file_bytes=200))
    assert cli("publish", file, "--local")[0] == 0
    assert {"_SUCCESS", "publication.json", "part-00000.parquet"} <= set(looked)


def test_a_part_that_a_paused_publisher_wrote_late_is_replaced(
    flat_shards: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run(job(flat_shards, out), local=True)
    late = (out / "part-00000.parquet").read_bytes()
    create = Location.create_exclusive
    written: list[str] = []

    def write_late(self: Location, data: bytes) -> bool:
        if self.name == "part-00000.parquet" and not written:
            written.append(self.name)
            Path(self.path).write_bytes(late)
        return create(self, data)

    monkeypatch.setattr(Location, "create_exclusive", write_late)
    assert cli("publish", job_file(tmp_path, job(flat_shards, out, output__top_k=2)), "--local")[0] == 0
    assert len(rows_of(out)) == 24
    assert verify(str(out)).problems == []


# ---- latest


def test_latest_is_moved_last_and_not_by_a_sample(
    flat_shards: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    latest = tmp_path / "LATEST.json"
    first = job(flat_shards, tmp_path / "first", output__latest=str(latest))
    run(first, local=True)
    told = json.loads(latest.read_text())
    assert told["path"] == str(tmp_path / "first") and told["rows"] == 300
    second = job(flat_shards, tmp_path / "second", output__latest=str(latest))
    assert cli("run", job_file(tmp_path, second), "--local", "--limit", "2")[0] == 0
    assert json.loads(latest.read_text()) == told
    seen = []
    write_bytes = Location.write_bytes

    def watch(self: Location, data: bytes) -> None:
        if self.path == str(latest):
            seen.append((tmp_path / "second/_SUCCESS").exists())
        write_bytes(self, data)

    monkeypatch.setattr(Location, "write_bytes", watch)
    run(second, local=True)
    assert seen == [True] and json.loads(latest.read_text())["path"] == str(tmp_path / "second")


# ---- layouts


def test_a_nested_output_is_the_input_of_another_job(flat_shards: Path, tmp_path: Path) -> None:
    keys = {"output__layout": "nested", "output__include_text": True, "output__top_k": 5}
    run(job(flat_shards, tmp_path / "first", output__passthrough=["query"], **keys), local=True)
    table = rows_of(tmp_path / "first")
    assert table.column_names == ["query_id", "candidates"] and len(table) == 12
    assert [len(row) for row in table["candidates"].to_pylist()] == [5] * 12
    assert table["candidates"].to_pylist()[0][0]["query"] == "what is alpha 0"


def test_an_empty_and_a_single_row(tmp_path: Path) -> None:
    for count in (1, 2):
        write(tmp_path / f"in{count}" / "a.parquet", candidate_rows(1, count))
        for layout in ("flat", "nested"):
            out = tmp_path / f"out-{layout}-{count}"
            run(job(tmp_path / f"in{count}", out, output__layout=layout), local=True)
            assert len(plain(out)) == count
            assert verify(str(out)).problems == []


@pytest.mark.parametrize("layout", ["flat", "nested"])
def test_either_layout_is_evaluated_alike(layout: str, flat_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "qrels").write_text("".join(f"q{query} 0 d{query} 1\n" for query in range(12)))
    run(job(flat_shards, tmp_path / "flat-out"), local=True)
    run(job(flat_shards, tmp_path / "out", output__layout=layout, output__file_bytes=1), local=True)
    results = [evaluate(str(tmp_path / name), str(tmp_path / "qrels")).after for name in ("flat-out", "out")]
    assert results[0] == results[1] and results[0]["nDCG@10"] > 0


# ---- many units


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Receipts are rolled up in twos."""
    monkeypatch.setattr(rolls, "ROLLED", 2)
    monkeypatch.setattr(rolls, "FEW", 0)


def test_receipts_are_rolled_up_and_count_as_before(few: None, flat_shards: Path, tmp_path: Path, cli: Cli) -> None:
    out, config = tmp_path / "out", job(flat_shards, tmp_path / "out")
    run(config, local=True)
    receipts = sorted(path.name for path in (out / "_manifest/receipts").iterdir())
    assert receipts == [f"rolled-0000{number}.jsonl" for number in range(3)]
    assert run(config, local=True).resumed_units == 6
    assert verify(str(out)).problems == []
    code, shown, _ = cli("status", out, "--json")
    assert code == 0 and json.loads(shown)["units_done"] == 6
    # an unknown field of another version stays where receipts are rolled up again
    roll = out / "_manifest/receipts/rolled-00001.jsonl"
    lines = [{**json.loads(line), "invented": 7} for line in roll.read_text().splitlines()]
    roll.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert cli("publish", job_file(tmp_path, job(flat_shards, out, output__top_k=1)), "--local")[0] == 0
    assert '"invented": 7' in roll.read_text()


def test_a_unit_of_a_roll_is_made_again_alone(few: None, flat_shards: Path, tmp_path: Path) -> None:
    run(job(flat_shards, tmp_path / "undisturbed"), local=True)
    out = scored_only(job(flat_shards, tmp_path / "out"))
    lost = json.loads((out / "_manifest/receipts/rolled-00001.jsonl").read_text().splitlines()[0])["unit"]
    (out / f"_work/{lost}.parquet").unlink()
    again = run(job(flat_shards, out), local=True)
    assert (again.units, again.resumed_units) == (1, 5)
    assert rows_of(out) == rows_of(tmp_path / "undisturbed")
    assert verify(str(out)).problems == []


def test_a_roll_with_a_line_that_is_no_receipt_costs_that_unit_alone(
    few: None, flat_shards: Path, tmp_path: Path
) -> None:
    out = scored_only(job(flat_shards, tmp_path / "out"))
    roll = out / "_manifest/receipts/rolled-00000.jsonl"
    roll.write_bytes(b"\x00{\n" + roll.read_bytes().splitlines()[1] + b"\n")
    assert run(job(flat_shards, out), local=True).units == 1


@pytest.mark.parametrize("step", ["scores written", "receipt written", "some removed"])
def test_killed_while_scores_are_gathered_loses_none(
    step: str, flat_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    out, config = tmp_path / "out", job(flat_shards, tmp_path / "out", output__file_bytes=1500)
    with monkeypatch.context() as patch:
        method, match = {
            "scores written": ("write_bytes", "/_manifest/scores/"),
            "receipt written": ("remove_seen", "/_work/"),
            "some removed": ("remove_seen", "/_work/00001-00001"),
        }[step]
        original = getattr(Location, method)

        def killed(self: Location, given: Any) -> Any:
            if match in self.path:
                raise Killed
            return original(self, given)

        patch.setattr(Location, method, killed)
        with pytest.raises(Killed):
            run(config, local=True)
    assert (out / "_SUCCESS").exists() and list((out / "_work").glob("*"))
    before = rows_of(out)
    assert run(config, local=True).units == 0
    assert not list((out / "_work").glob("*"))
    for name in sorted((out / "_scores").glob("[0-9]*[0-9].parquet")):
        assert (out / f"_manifest/scores/{name.stem}.json").exists()
    assert verify(str(out)).problems == []
    assert cli("publish", job_file(tmp_path, job(flat_shards, out, output__layout="nested")), "--local")[0] == 0
    assert plain(out) == before.replace_schema_metadata()


def test_the_index_leads_to_every_query(flat_shards: Path, tmp_path: Path) -> None:
    work = scored_only(job(flat_shards, tmp_path / "scored")) / "_work"
    units = pa.concat_tables([pq.read_table(name) for name in sorted(work.iterdir())])
    run(job(flat_shards, tmp_path / "out"), local=True)
    index, pairs = (np.load(tmp_path / f"out/_scores/00000.{name}.npy") for name in ("queries", "pairs"))
    assert index["query_hash"].tolist() == sorted(set(units["query_hash"].to_pylist()))
    for query, first, count, crc in index.tolist():
        rows = units.filter(pa.compute.equal(units["query_hash"], pa.scalar(query, pa.uint64())))
        found = pairs[first : first + count]
        for column in ("text_hash", "score", "n_tokens", "truncated"):
            assert found[column].tolist() == rows[column].to_pylist()
        assert crc == zlib.crc32(found.tobytes()) and set(found["chunk_offset"].tolist()) == {-1}


def test_what_is_kept_of_a_damaged_file_is_a_problem_and_costs_no_score(flat_shards: Path, tmp_path: Path) -> None:
    run(job(flat_shards, tmp_path / "out"), local=True)
    kept = tmp_path / "out/_scores/00000.pairs.npy"
    kept.write_bytes(kept.read_bytes()[:-1] + b"?")
    found = verify(str(tmp_path / "out"))
    assert "delete it" in found.problems[0] and found.damaged == []
    kept.unlink()
    assert verify(str(tmp_path / "out")).problems == []


def test_scores_that_changed_on_the_way_are_not_gathered(flat_shards: Path, tmp_path: Path) -> None:
    from batch_rerank.errors import StorageError

    out = scored_only(job(flat_shards, tmp_path / "out"))
    config = job(flat_shards, out)
    with pytest.raises(StorageError, match=r"00000-00000\.parquet: not what its receipt says"):
        keep.gather_scores(0, [("00000-00000", "0" * 64)], config, "x")


def test_late_parts_of_a_withdrawn_publication_are_removed(flat_shards: Path, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "out"
    run(job(flat_shards, out, output__file_bytes=1), local=True)
    late = (out / "part-00005.parquet").read_bytes()
    file = job_file(tmp_path, job(flat_shards, out))
    assert cli("publish", file, "--local")[0] == 0
    for command in ("publish", "run"):
        (out / "part-00005.parquet").write_bytes(late)
        (out / "_SUCCESS").unlink()
        assert cli(command, file, "--local")[0] == 0
        assert [part.name for part in out.glob("*.parquet")] == ["part-00000.parquet"]
    write(out / "part-00005.parquet", candidate_rows(1, 1))
    assert cli("run", file, "--local")[0] == 4, "one that is not ours stays"


def test_a_finished_output_drops_its_scores_when_told(flat_shards: Path, tmp_path: Path) -> None:
    run(job(flat_shards, tmp_path / "out"), local=True)
    before = rows_of(tmp_path / "out")
    config = job(flat_shards, tmp_path / "out", output__keep_scores=False)
    assert run(config, local=True).units == 0
    assert not list((tmp_path / "out/_scores").iterdir()) and rows_of(tmp_path / "out") == before
    assert run(config, local=True).units == 0
    assert verify(str(tmp_path / "out")).problems == []


def test_a_job_file_of_another_input_than_was_staged_publishes_nothing(tmp_path: Path, cli: Cli) -> None:
    from test_stage import given_as, job_of

    config = job_of(given_as("beir", tmp_path / "in"), tmp_path / "out")
    run(config, local=True)
    assert cli("publish", job_file(tmp_path, config), "--local", "--set", "output.top_k=1")[0] == 0
    other = job_of(given_as("beir", tmp_path / "in2"), tmp_path / "out")
    code, _, error = cli("publish", job_file(tmp_path, other), "--local")
    assert code == 4 and "is not what was staged" in error
