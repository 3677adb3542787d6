"""Staging: the same data in every layout gives the same rows, sources that do not fit are refused, and it resumes."""

import gzip
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ir_measures
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import Row, job, nested, rows_of, write
from test_resume import start, wait_for, wait_for_silence

from batch_rerank.config import Input, JobConfig, parse_config
from batch_rerank.errors import BatchRerankError, ConfigError, ConflictError, InputError
from batch_rerank.input import candidates, exchange, join, passes, sources, spill, text_files
from batch_rerank.job.ahead import plan_job
from batch_rerank.job.run import run
from batch_rerank.job.staging import stage as stage_input
from batch_rerank.publish.trec import falling
from batch_rerank.publish.verify import verify
from batch_rerank.store.filesystem import File, Location, locate
from batch_rerank.store.lease import hold

QUERIES, DOCUMENTS, DEPTH = 12, 40, 9
TEXTS = ("größe  ", "北京 ", "def f(x):\n    return x", "", "שלום", 'quote " and \\ slash', "tab\there")


def corpus() -> list[Row]:
    return [
        {"_id": f"d{i}", "title": f"Title {i}" if i % 3 else "", "text": f"{TEXTS[i % len(TEXTS)]}{i}" * (1 + i % 5)}
        for i in range(DOCUMENTS)
    ]


def queries() -> list[Row]:
    return [{"_id": f"q{i}", "text": f"what is {TEXTS[i % len(TEXTS)]} {i}"} for i in range(QUERIES)]


def run_rows() -> list[Row]:
    """Candidates by query and falling score; documents repeat between queries, scores tie."""
    chosen = random.Random(0)
    rows = []
    for query in range(QUERIES):
        found = chosen.sample(range(DOCUMENTS), DEPTH)
        rows += [
            {"query_id": f"q{query}", "doc_id": f"d{d}", "rank": rank + 1, "score": float(20 - rank // 2)}
            for rank, d in enumerate(found)
        ]
    return rows


def joined() -> list[Row]:
    texts = {row["_id"]: row for row in corpus()}
    asked = {row["_id"]: row["text"] for row in queries()}
    return [
        {
            **row,
            "query": asked[row["query_id"]],
            "text": texts[row["doc_id"]]["text"],
            "title": texts[row["doc_id"]]["title"],
        }
        for row in run_rows()
    ]


def jsonl(path: Path, rows: list[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def trec(path: Path, rows: list[Row], fields: int = 6) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (
        f"{r['query_id']} Q0 {r['doc_id']} {r['rank']} {r['score']} bm25\n"
        if fields == 6
        else f"{r['query_id']}\t{r['doc_id']}\t{r['score']}\n"
        for r in rows
    )
    path.write_text("".join(lines))
    return path


def zst(path: Path) -> Path:
    packed = path.with_name(path.name + ".zst")
    with pa.CompressedOutputStream(str(packed), "zstd") as sink:
        sink.write(path.read_bytes())
    path.unlink()
    return packed


def gz(path: Path) -> Path:
    packed = path.with_name(path.name + ".gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return packed


def given_as(layout: str, folder: Path) -> dict[str, Any]:
    """The same data in some layout: keys of the job's input."""
    if layout == "nested":
        return {"layout": "nested", "path": str(write(folder / "n.parquet", nested(joined())))}
    if layout == "flat":
        return {"layout": "flat", "path": str(write(folder / "f.parquet", joined(), row_group_size=17))}
    if layout == "scattered flat":
        rows = joined()  # queries first appear in the order of the other layouts; their other rows are anywhere
        rest = random.Random(2).sample([row for row in rows if row["rank"] > 1], QUERIES * (DEPTH - 1))
        write(folder / "s" / "0.parquet", [row for row in rows if row["rank"] == 1] + rest[:20], row_group_size=7)
        write(folder / "s" / "1.parquet", rest[20:50], row_group_size=7)
        write(folder / "s" / "2.parquet", rest[50:])
        return {"layout": "flat", "path": str(folder / "s")}
    jsonl(folder / "corpus.jsonl", corpus())
    jsonl(folder / "queries.jsonl", queries())
    if layout == "beir":
        return {"layout": "beir", "path": str(folder), "run": str(trec(folder / "bm25.run", run_rows()))}
    if layout == "run of 3 fields, compressed":
        return {
            "layout": "run",
            "run": str(zst(trec(folder / "r.txt", run_rows(), fields=3))),
            "queries": str(gz(folder / "queries.jsonl")),
            "corpus": str(zst(folder / "corpus.jsonl")),
        }
    if layout == "run of Parquet":
        rows = run_rows()
        rest = random.Random(1).sample([row for row in rows if row["rank"] > 1], QUERIES * (DEPTH - 1))
        write(folder / "run" / "0.parquet", [row for row in rows if row["rank"] == 1], row_group_size=5)
        write(folder / "run" / "1.parquet", rest)
        documents = [{"doc_id": row["_id"], "text": row["text"], "title": row["title"]} for row in corpus()]
        write(folder / "c" / "0.parquet", documents[:23], row_group_size=4)
        write(folder / "c" / "1.parquet", documents[23:])
        write(folder / "q.parquet", [{"query_id": row["_id"], "query": row["text"]} for row in queries()])
        files = {"run": folder / "run", "queries": folder / "q.parquet", "corpus": folder / "c"}
        return {"layout": "run", **{key: str(path) for key, path in files.items()}}
    assert layout == "run of JSONL"
    return {
        "layout": "run",
        "run": str(trec(folder / "r.trec", run_rows())),
        "queries": str(folder / "queries.jsonl"),
        "corpus": str(folder / "corpus.jsonl"),
    }


LAYOUTS = (
    "flat",
    "scattered flat",
    "run of Parquet",
    "run of JSONL",
    "run of 3 fields, compressed",
    "beir",
)


def job_of(given: dict[str, Any], output: Path, **keys: Any) -> JobConfig:
    """A job of the free scorer with this input, staged at OUTPUT-stage; `keys` are section__key=value."""
    others = {key: value for key, value in keys.items() if not key.startswith("input__")}
    made = job("-", output, **others)
    given = given if given["layout"] == "nested" else {"stage": f"{output}-stage", **given}
    extra = {key.removeprefix("input__"): value for key, value in keys.items() if key not in others}
    return made.model_copy(update={"input": Input.model_validate({"unit_pairs": 40, **given, **extra})})


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    folder = tmp_path_factory.mktemp("nested")
    run(job_of(given_as("nested", folder), folder / "out"), local=True)
    return rows_of(folder / "out")


@pytest.fixture
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many pieces, many files a piece and many shards, from little data."""
    monkeypatch.setattr(sources, "PIECE_BYTES", 600)
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 150)
    monkeypatch.setattr(exchange, "FLUSH_BYTES", 300)
    monkeypatch.setattr(join, "SHARD_PAIRS", 25)
    monkeypatch.setattr(candidates, "MERGE_VALUES", 5)
    monkeypatch.setattr(candidates, "BUCKET", 30)
    monkeypatch.setattr(spill, "CHUNK", 17)


@pytest.mark.parametrize("kind", ["TREC", "Parquet"])
def test_scores_that_are_the_same_as_float32_are_told_apart(kind: str, tmp_path: Path) -> None:
    rows = [
        {"query_id": "q1", "doc_id": doc_id, "score": score}
        for doc_id, score in (("d1", 20.12345601), ("d2", 20.12345672), ("d3", 20.1))
    ]
    given = given_as("run of JSONL", tmp_path / "in")
    path = tmp_path / "in" / ("few.run" if kind == "TREC" else "few.parquet")
    given["run"] = str(trec(path, rows, fields=3) if kind == "TREC" else write(path, rows))
    run(job_of(given, tmp_path / "out", input__candidates_per_query=1), local=True)
    assert [(row["doc_id"], row["first_stage_score"]) for row in rows_of(tmp_path / "out").to_pylist()] == [
        ("d2", float(np.float32(20.12345672)))
    ]


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_are_all_the_same_are_the_order_of_the_scores(rank: int, tmp_path: Path, logged: list[str]) -> None:
    given = given_as("beir", tmp_path / "in")
    rows = sorted(run_rows(), key=lambda row: (row["score"], row["doc_id"]))
    trec(
        tmp_path / "in" / "bm25.run",
        [{**row, "rank": row["rank"] if row["query_id"] == "q1" else rank} for row in rows],
    )
    run(job_of(given, tmp_path / "out"), local=True)
    assert f"ranks repeat in {QUERIES - 1} queries of the run: ordered by rank, then score" in logged
    for query in queries():
        of_query = [row for row in rows_of(tmp_path / "out").to_pylist() if row["query_id"] == query["_id"]]
        of_query.sort(key=lambda row: row["first_stage_rank"])
        assert [row["first_stage_rank"] for row in of_query] == list(range(1, DEPTH + 1))
        scores = [row["first_stage_score"] for row in of_query]
        assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("tasks", ["large", "small"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_data_in_any_layout_gives_the_same_rows(
    layout: str, tasks: str, tmp_path: Path, expected: pa.Table, request: pytest.FixtureRequest
) -> None:
    if tasks == "small":
        request.getfixturevalue("small_tasks")
    config = job_of(given_as(layout, tmp_path / "in"), tmp_path / "out")
    run(config, local=True)
    assert rows_of(tmp_path / "out").equals(expected)
    assert verify(str(tmp_path / "out")).problems == []
    if layout != "flat":
        parts = list((tmp_path / "out-stage").glob("part-*.parquet"))
        assert len(parts) == (1 if tasks == "large" else 4)
        assert verify(str(tmp_path / "out-stage")).problems == []
        assert not (tmp_path / "out-stage" / "_manifest" / "exchange").exists() or not list(
            (tmp_path / "out-stage" / "_manifest" / "exchange").iterdir()
        )


@pytest.mark.parametrize("layout", [pytest.param("scattered flat", marks=pytest.mark.slow), "run of JSONL"])
def test_ray_stages_the_same_bytes(
    layout: str, tmp_path: Path, expected: pa.Table, small_tasks: None, local_ray: None
) -> None:
    given = given_as(layout, tmp_path / "in")
    run(job_of(given, tmp_path / "local"), local=True)
    run(job_of(given, tmp_path / "ray"))
    assert rows_of(tmp_path / "ray").equals(expected)
    staged = [
        {part.name: part.read_bytes() for part in (tmp_path / f"{name}-stage").glob("part-*")}
        for name in ("local", "ray")
    ]
    assert staged[0] == staged[1]
    assert len(staged[0]) == 4


def test_a_document_stands_once_in_a_shard(tmp_path: Path) -> None:
    """A hundred queries over ten long documents: the shard holds ten texts."""
    documents = [
        {"_id": f"d{i}", "text": f"{i} " + "".join(random.Random(i).choices("abcdefgh ", k=20_000))} for i in range(10)
    ]
    rows = [
        {"query_id": f"q{q}", "doc_id": f"d{d}", "rank": d + 1, "score": 1.0 - d} for q in range(100) for d in range(10)
    ]
    given = {
        "layout": "run",
        "run": str(trec(tmp_path / "r.trec", rows)),
        "queries": str(jsonl(tmp_path / "q.jsonl", [{"_id": f"q{q}", "text": "q"} for q in range(100)])),
        "corpus": str(jsonl(tmp_path / "c.jsonl", documents)),
    }
    found = stage_input(job_of(given, tmp_path / "out"), local=True)
    (part,) = Path(found.place).glob("part-*.parquet")
    metadata = pq.ParquetFile(part).metadata
    text = next(
        metadata.row_group(0).column(i)
        for i in range(metadata.num_columns)
        if metadata.row_group(0).column(i).path_in_schema.endswith(".text")
    )
    assert metadata.num_row_groups == 1
    assert 200_000 < text.total_uncompressed_size < 210_000
    seen = {row["doc_id"]: row["text"] for one in pq.read_table(part).to_pylist() for row in one["candidates"]}
    assert seen == {row["_id"]: row["text"] for row in documents}


def test_passed_through_columns_come_along_from_a_scattered_flat_input(tmp_path: Path) -> None:
    rows = [{**row, "lang": f"l{i % 3}", "page": i} for i, row in enumerate(joined())]
    write(tmp_path / "flat.parquet", rows)
    write(tmp_path / "scattered.parquet", sorted(rows, key=lambda row: (row["rank"], int(row["query_id"][1:]))))
    outputs = []
    for name in ("flat", "scattered"):
        given = {"layout": "flat", "path": str(tmp_path / f"{name}.parquet")}
        run(job_of(given, tmp_path / name, output__passthrough=["lang", "page"], output__include_text=True), local=True)
        outputs.append(rows_of(tmp_path / name))
    assert outputs[0].schema == outputs[1].schema
    assert outputs[0].equals(outputs[1])


def test_instructions_come_from_the_queries_file(tmp_path: Path) -> None:
    given = given_as("beir", tmp_path / "in")
    jsonl(tmp_path / "in" / "queries.jsonl", [{**row, "instruction": f"do {row['_id']}"} for row in queries()[1:]])
    with (tmp_path / "in" / "queries.jsonl").open("a") as file:
        file.write(json.dumps(queries()[0]) + "\n")
    found = stage_input(job_of(given, tmp_path / "out"), local=True)
    rows = [row for part in sorted(Path(found.place).glob("part-*")) for row in pq.read_table(part).to_pylist()]
    assert {row["query_id"]: row["instruction"] for row in rows} == {
        row["_id"]: None if row["_id"] == "q0" else f"do {row['_id']}" for row in queries()
    }


def test_the_first_stage_is_cut_at_the_depth_that_is_asked_for(tmp_path: Path) -> None:
    summary = run(
        job_of(given_as("beir", tmp_path / "in"), tmp_path / "out", input__candidates_per_query=4), local=True
    )
    assert summary.totals.rows_out == 4 * QUERIES
    kept = rows_of(tmp_path / "out")
    wanted = {(row["query_id"], row["doc_id"]) for row in run_rows() if row["rank"] <= 4}
    assert set(zip(kept["query_id"].to_pylist(), kept["doc_id"].to_pylist(), strict=True)) == wanted


def test_without_ranks_the_order_is_that_of_the_scores(tmp_path: Path) -> None:
    given = given_as("beir", tmp_path / "in")
    trec(tmp_path / "in" / "bm25.run", sorted(run_rows(), key=lambda row: (row["score"], row["rank"])), fields=3)
    run(job_of(given, tmp_path / "out"), local=True)
    rows = rows_of(tmp_path / "out").to_pylist()
    assert {row["first_stage_rank"] for row in rows if row["query_id"] == "q3"} == set(range(1, DEPTH + 1))
    by_rank = sorted((row for row in rows if row["query_id"] == "q3"), key=lambda row: row["first_stage_rank"])
    scores = [row["first_stage_score"] for row in by_rank]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("tasks", ["large", "small"])
@pytest.mark.parametrize(
    "written", ["plain", "crlf", "no last end", "byte order mark", "blanks at the end", "tabs", "gzip twice"]
)
def test_files_that_other_tools_write(
    written: str, tasks: str, tmp_path: Path, expected: pa.Table, request: pytest.FixtureRequest
) -> None:
    if tasks == "small":
        request.getfixturevalue("small_tasks")
    changes: dict[str, Callable[[bytes], bytes]] = {
        "plain": lambda data: data,
        "crlf": lambda data: data.replace(b"\n", b"\r\n"),
        "no last end": lambda data: data[:-1],
        "byte order mark": lambda data: b"\xef\xbb\xbf" + data,
        "blanks at the end": lambda data: data + b"\r\n\n \n",
        "tabs": lambda data: data.replace(b" Q0 ", b"\t\tQ0  "),
        "gzip twice": lambda data: gzip.compress(data[:999]) + gzip.compress(data[999:]),
    }
    given = given_as("run of JSONL", tmp_path / "in")
    for key in ("run", "queries", "corpus"):
        path = Path(given[key] + (".gz" if written == "gzip twice" else ""))
        path.write_bytes(changes[written](Path(given[key]).read_bytes()))
        given[key] = str(path)
    run(job_of(given, tmp_path / "out"), local=True)
    assert rows_of(tmp_path / "out").equals(expected)


def test_a_staged_input_is_used_again_until_its_sources_change(tmp_path: Path, logged: list[str]) -> None:
    given = given_as("beir", tmp_path / "in") | {"stage": str(tmp_path / "staged")}
    assert plan_job(job_of(given, tmp_path / "one")).model is None
    assert not (tmp_path / "staged").exists()
    run(job_of(given, tmp_path / "one"), local=True)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "staged").rglob("*") if "lease" not in str(path)}
    run(job_of(given, tmp_path / "two"), local=True)
    assert plan_job(job_of(given, tmp_path / "two")).model is not None
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "staged").rglob("*") if "lease" not in str(path)}
    assert before == after
    assert any(message.startswith("staged already at ") for message in logged)
    jsonl(tmp_path / "in" / "corpus.jsonl", [*corpus(), {"_id": "new", "text": "more"}])
    with pytest.raises(ConflictError, match=r"staged: belongs to another job, which differs in input\.corpus"):
        run(job_of(given, tmp_path / "three"), local=True)


@pytest.mark.parametrize("layout", ["run of Parquet", "beir", "scattered flat"])
def test_fresh_copies_of_the_sources_are_not_staged_again(layout: str, tmp_path: Path) -> None:
    """cp -r to another place, and touch."""
    given = given_as(layout, tmp_path / "in") | {"stage": str(tmp_path / "staged")}
    stage_input(job_of(given, tmp_path / "out"), local=True)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "staged").rglob("*")}
    shutil.copytree(tmp_path / "in", tmp_path / "copy")
    copied = {key: value.replace(f"{tmp_path}/in", f"{tmp_path}/copy") for key, value in given.items()}
    assert copied != given
    assert stage_input(job_of(copied, tmp_path / "out"), local=True).reused
    for path in (tmp_path / "in").rglob("*"):
        os.utime(path, (1, 1))
    assert stage_input(job_of(given, tmp_path / "out"), local=True).reused
    run(job_of(copied, tmp_path / "out"), local=True)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "staged").rglob("*")} == before


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl", "bm25.run"])
def test_a_source_with_another_letter_of_the_same_size_is_named(name: str, tmp_path: Path) -> None:
    given = given_as("beir", tmp_path / "in")
    stage_input(job_of(given, tmp_path / "out"), local=True)
    path = tmp_path / "in" / name
    data = path.read_bytes()
    at = data.rindex(b"d") if name == "bm25.run" else data.rindex(b"e")
    path.write_bytes(data[:at] + (b"D" if name == "bm25.run" else b"E") + data[at + 1 :])
    with pytest.raises(ConflictError) as caught:
        stage_input(job_of(given, tmp_path / "out"), local=True)
    assert f"{path} ({len(data):,} bytes)" in str(caught.value)
    assert "here, and not what was staged" in str(caught.value)
    assert [other for other in ("corpus.jsonl", "queries.jsonl", "bm25.run") if other in str(caught.value)] == [name]


def test_a_staged_shard_that_is_lost_is_staged_again(tmp_path: Path, small_tasks: None, logged: list[str]) -> None:
    given = given_as("beir", tmp_path / "in")
    place = Path(stage_input(job_of(given, tmp_path / "out"), local=True).place)
    before = {part.name: part.read_bytes() for part in place.glob("part-*")}
    (place / "part-00002.parquet").unlink()
    assert verify(str(place)).damaged == ["00002"]
    assert not stage_input(job_of(given, tmp_path / "out"), local=True).reused
    assert {part.name: part.read_bytes() for part in place.glob("part-*")} == before
    assert any("unit 00002: its part is missing" in message for message in logged)
    data = bytearray(before["part-00001.parquet"])
    data[len(data) // 2] ^= 1
    (place / "part-00001.parquet").write_bytes(data)
    assert verify(str(place), repair=True).damaged == ["00001"]
    stage_input(job_of(given, tmp_path / "out"), local=True)
    assert {part.name: part.read_bytes() for part in place.glob("part-*")} == before


@pytest.mark.parametrize("layout", ["scattered flat", "beir"])
@pytest.mark.parametrize("removals", [1, 3, 8])
def test_a_stage_killed_while_it_cleans_its_exchange_makes_a_lost_shard_again(
    removals: int, layout: str, tmp_path: Path, small_tasks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = job_of(given_as(layout, tmp_path / "in"), tmp_path / "out")
    place, exchange_files = tmp_path / "out-stage", tmp_path / "out-stage" / "_manifest" / "exchange"
    removed: list[str] = []
    remove_seen = Location.remove_seen

    def dies(location: Location, seen: File) -> bool:
        if "/exchange/" in location.path:
            if len(removed) == removals:
                raise KeyboardInterrupt
            removed.append(location.path)
        return remove_seen(location, seen)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Location, "remove_seen", dies)
        stage_input(config, local=True)
    assert (place / "_SUCCESS").exists()
    assert list(exchange_files.iterdir())
    before = {part.name: part.read_bytes() for part in place.glob("part-*")}
    (place / "part-00002.parquet").unlink()
    stage_input(config, local=True)
    assert {part.name: part.read_bytes() for part in place.glob("part-*")} == before
    assert not list(exchange_files.iterdir())


@pytest.mark.parametrize("harm", ["lost", "cut short", "no note", "an earlier version's", "no leftovers"])
def test_an_exchange_that_is_not_whole_is_made_again(
    harm: str, tmp_path: Path, expected: pa.Table, small_tasks: None, logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = job_of(given_as("beir", tmp_path / "in"), tmp_path / "out")
    exchange_files = tmp_path / "out-stage" / "_manifest" / "exchange"

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(passes, "gather", dies)
        run(config, local=True)
    data, note = sorted(exchange_files.glob("*.arrows"))[2], sorted(exchange_files.glob("*.note"))[3]
    if harm == "lost":
        data.unlink()
    elif harm == "cut short":
        data.write_bytes(data.read_bytes()[:-1])
    elif harm == "no note":
        note.write_text('{"files": [["00003-0000.arrows", []]], "rows": 3, "retries": 0}')
    elif harm == "an earlier version's":
        note.replace(note.with_suffix(".json"))
    run(config, local=True)
    assert rows_of(tmp_path / "out").equals(expected)
    said = "is of an earlier version" if harm == "an earlier version's" else "the exchange is not whole there"
    assert sum(said in message for message in logged) == (harm != "no leftovers")
    assert not list(exchange_files.iterdir())


def test_an_exchange_left_by_a_finished_stage_is_removed(tmp_path: Path) -> None:
    config = job_of(given_as("beir", tmp_path / "in"), tmp_path / "out")
    stage_input(config, local=True)
    left = tmp_path / "out-stage" / "_manifest" / "exchange" / "00000-0000.arrows"
    left.parent.mkdir(exist_ok=True)
    left.write_bytes(b"left")
    assert stage_input(config, local=True).reused
    assert not left.exists()


@pytest.mark.parametrize("stop_at", range(0, 10, 3))
def test_a_stage_that_dies_anywhere_goes_on_from_there(
    stop_at: int, tmp_path: Path, expected: pa.Table, small_tasks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies after every third of its tasks; what was done is not done again."""
    given = given_as("beir", tmp_path / "in")
    calls: list[str] = []
    dying = True

    def dies(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            if dying and len(calls) == stop_at:
                raise KeyboardInterrupt
            calls.append(f"{function.__name__} {getattr(arguments[0], 'index', None) or arguments[0]}"[:200])
            return function(*arguments)

        return wrapped

    monkeypatch.setattr(passes, "spread", dies(exchange.spread))
    monkeypatch.setattr(passes, "gather", dies(exchange.gather))
    with pytest.raises(KeyboardInterrupt):
        run(job_of(given, tmp_path / "out"), local=True)
    assert not (tmp_path / "out-stage" / "_SUCCESS").exists()
    dying = False
    run(job_of(given, tmp_path / "out"), local=True)
    assert len(calls) == len(set(calls)), "a finished task was done again"
    assert rows_of(tmp_path / "out").equals(expected)


def test_a_source_that_changes_while_it_is_staged_ends_the_stage(
    tmp_path: Path, small_tasks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = given_as("beir", tmp_path / "in")

    def changing(work: exchange.Spread, *rest: Any) -> Any:
        if work.index == 1:
            jsonl(tmp_path / "in" / "corpus.jsonl", corpus()[:-1])
        return exchange.spread(work, *rest)

    monkeypatch.setattr(passes, "spread", changing)
    with pytest.raises(InputError, match=r"corpus\.jsonl: changed since the plan"):
        stage_input(job_of(given, tmp_path / "out"), local=True)
    assert not (tmp_path / "out-stage" / "_SUCCESS").exists()


def test_missing_documents_and_queries_are_counted_listed_and_limited(tmp_path: Path, logged: list[str]) -> None:
    given = given_as("beir", tmp_path / "in")
    jsonl(tmp_path / "in" / "corpus.jsonl", [row for row in corpus() if row["_id"] not in ("d3", "d5")])
    jsonl(
        tmp_path / "in" / "queries.jsonl",
        [row for row in queries() if row["_id"] != "q7"] + [{"_id": "q99", "text": "x"}],
    )
    lost = [row for row in run_rows() if row["doc_id"] in ("d3", "d5") or row["query_id"] == "q7"]
    with pytest.raises(InputError) as caught:
        run(job_of(given, tmp_path / "out"), local=True)
    for part in (
        f"{len(lost)} of 108 candidates name",
        "1 queries that ",
        "2 documents",
        "input.max_missing = 0",
    ):
        assert part in str(caught.value)
    assert not (tmp_path / "out-stage" / "_manifest" / "plan.json").exists()
    summary = run(job_of(given, tmp_path / "out", input__max_missing=0.5), local=True)
    assert summary.totals.rows_out == len(run_rows()) - len(lost)
    assert summary.counts["missing_candidates"] == len(lost)
    assert any("2 documents missing from the corpus, 1 queries missing" in message for message in logged)
    listed = json.loads((tmp_path / "out-stage" / "_manifest" / "missing.json").read_text())
    assert listed == {"queries": ["q7"], "documents": ["d3", "d5"]}
    with pytest.raises(InputError, match=r"candidates lack their document or query"):
        run(job_of(given, tmp_path / "again", input__stage=str(tmp_path / "out-stage")), local=True)


def test_one_huge_query_is_a_unit_of_its_own_that_comes_first(tmp_path: Path, logged: list[str]) -> None:
    rows = [{"query_id": f"q{q}", "doc_id": f"d{d}", "rank": d + 1, "score": 1.0} for q in range(30) for d in range(5)]
    rows += [{"query_id": "huge", "doc_id": f"d{d}", "rank": d + 1, "score": 1.0} for d in range(3000)]
    given = {
        "layout": "run",
        "run": str(trec(tmp_path / "r.trec", rows)),
        "queries": str(
            jsonl(
                tmp_path / "q.jsonl",
                [{"_id": f"q{q}", "text": "q"} for q in range(30)] + [{"_id": "huge", "text": "h"}],
            )
        ),
        "corpus": str(jsonl(tmp_path / "c.jsonl", [{"_id": f"d{d}", "text": f"text {d}"} for d in range(3000)])),
    }
    summary = run(job_of(given, tmp_path / "out"), local=True)
    assert summary.totals.rows_out == 3150
    assert any("has 3,000 pairs: a query is never cut" in message for message in logged)
    from batch_rerank.publish.output import open_output
    from batch_rerank.score.read_unit import read_ranges

    ranges = read_ranges(open_output(str(tmp_path / "out"))[1], frozenset())
    assert 3000 in [unit.pairs for unit in ranges[0].units]
    assert all(unit.pairs <= 40 for one in ranges for unit in one.units if unit.pairs != 3000)


GOOD = ["q1 Q0 d1 1 2.5 tag", "q1 Q0 d2 2 1.5 tag", "q2 Q0 d1 1 3 tag"]


def bad_run(*lines: str) -> Callable[[Path], dict[str, Any]]:
    def make(folder: Path) -> dict[str, Any]:
        given = given_as("beir", folder)
        (folder / "bm25.run").write_text("".join(f"{line}\n" for line in lines))
        return given

    return make


def bad_file(name: str, content: bytes) -> Callable[[Path], dict[str, Any]]:
    def make(folder: Path) -> dict[str, Any]:
        given = given_as("beir", folder)
        (folder / name).write_bytes(content)
        return given

    return make


def cut_short(folder: Path, pack: Callable[[Path], Path], name: str) -> dict[str, Any]:
    given = given_as("beir", folder)
    packed = pack(folder / name)
    packed.write_bytes(packed.read_bytes()[: packed.stat().st_size // 2])
    return given if name != "bm25.run" else {**given, "run": str(packed)}


def of_parquet(folder: Path, name: str, rows: list[Row]) -> dict[str, Any]:
    given = given_as("run of JSONL", folder)
    return {**given, name: str(write(folder / f"{name}.parquet", rows))}


def lines(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


DOCUMENT = {"_id": "d1", "text": "x"}
BAD: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "5 fields": (
        bad_run(*GOOD, "q2 Q0 d3 4 1.0"),
        r"bm25\.run: line 4: found 5 fields in 'q2 Q0 d3 4 1\.0', expected 6",
    ),
    "5 fields first": (bad_run("q2 Q0 d3 4 1.0"), r"bm25\.run: line 1: found 5 fields .* expected 6 or 3"),
    "score is a word": (
        bad_run(*GOOD, "q2 Q0 d3 4 high tag"),
        r"line 4: the score is 'high', expected a finite number",
    ),
    "score is nan": (bad_run(*GOOD, "q2 Q0 d3 4 nan tag"), r"line 4: the score is 'nan', expected a finite number"),
    "rank is a word": (bad_run(*GOOD, "q2 Q0 d3 first 1 tag"), r"line 4: the rank is 'first', expected an integer"),
    "score is no float32": (bad_run(*GOOD, "q2 Q0 d3 4 1e39 tag"), r"line 4: the score is '1e39', expected a finite"),
    "rank is hexadecimal": (bad_run(*GOOD, "q2 Q0 d3 0x10 1 tag"), r"line 4: the rank is '0x10', expected an integer"),
    "blank line": (bad_run(GOOD[0], "", GOOD[1]), r"line 2: found 0 fields"),
    "twice, same score": (
        bad_run(*GOOD, GOOD[1]),
        r"query_id 'q1' has doc_id 'd2' twice with scores 1\.5 and 1\.5: .*bm25\.run line 2 and .*bm25\.run line 4",
    ),
    "twice, another score": (
        bad_run(*GOOD, "q2 Q0 d1 2 0.25 tag"),
        r"query_id 'q2' has doc_id 'd1' twice with scores 3 and 0\.25: .* line 3 and .* line 4",
    ),
    "empty run": (bad_run(), r"bm25\.run: the file has 0 bytes"),
    "run of blank lines": (bad_run("", " "), r"bm25\.run: line 1: found 0 fields|no candidates"),
    "not UTF-8": (bad_file("bm25.run", b"q1 Q0 d1 1 2 t\nq\xff Q0 d1 1 2 t\n"), r"bm25\.run: line 2: not UTF-8"),
    "no document matches": (
        bad_run("q1 Q0 7 1 2.5 tag", "q1 Q0 8 2 1.5 tag"),
        r'no doc_id of the run is in input\.corpus .*: the run has "7", "8", corpus has "d0", "d1", "d2", …',
    ),
    "no query matches": (
        bad_run("100 Q0 d1 1 2.5 tag"),
        r'no query_id of the run is in input\.queries .*: the run has "100", queries has "q0", "q1", "q2", …',
    ),
    "space around an id": (
        lambda folder: of_parquet(folder, "run", [{"query_id": "q1", "doc_id": " d1", "score": 1.0}]),
        r"doc_id ' d1' differs from 'd1' in input\.corpus only by space",
    ),
    "two documents but for space": (
        bad_file("corpus.jsonl", lines([DOCUMENT, {"_id": "d1 ", "text": "y"}])),
        r"doc_id 'd1 ' differs from 'd1' in input\.(run|corpus) only by space",
    ),
    "two documents but for type": (
        bad_file("corpus.jsonl", lines([{"_id": "1", "text": "x"}, {"_id": 1, "text": "y"}])),
        r"doc_id '1' stands in .*corpus\.jsonl line 1 and .*corpus\.jsonl line 2 \(1 such ids; a number and its digits",
    ),
    "document twice": (
        bad_file("corpus.jsonl", lines([DOCUMENT, {"_id": "d2", "text": "y"}, DOCUMENT])),
        r"input\.corpus: doc_id 'd1' stands in .*corpus\.jsonl line 1 and .*corpus\.jsonl line 3",
    ),
    "query twice": (
        bad_file("queries.jsonl", lines([{"_id": "q1", "text": "x"}, {"_id": "q1", "text": "y"}])),
        r"input\.queries: query_id 'q1' stands in .*queries\.jsonl line 1 and .*queries\.jsonl line 2",
    ),
    "not JSON": (
        bad_file("corpus.jsonl", lines([DOCUMENT]) + b"{broken\n"),
        r"corpus\.jsonl: line 2: not JSON \(.*\); expected one object a line",
    ),
    "not JSON first": (bad_file("corpus.jsonl", b"doc one\n"), r"corpus\.jsonl: line 1: not JSON"),
    "JSON, but a list": (
        bad_file("corpus.jsonl", lines([DOCUMENT]) + b"[1]\n"),
        r"line 2: found list, expected a JSON object",
    ),
    "two objects in a line": (
        bad_file("corpus.jsonl", b'{"_id": "d1", "text": "x"} {"_id": "d2"}\n'),
        r"line 1: not JSON",
    ),
    "text is a number": (
        bad_file("corpus.jsonl", lines([*corpus(), {"_id": "d2x", "text": 7}, DOCUMENT][:-1])),
        r"line 41: 'text' is 7, expected a string",
    ),
    "id is a fraction": (
        bad_file("corpus.jsonl", lines([DOCUMENT, {"_id": 1.5, "text": "x"}])),
        r"line 2: '_id' is 1\.5, expected a string or an integer",
    ),
    "id is missing": (bad_file("corpus.jsonl", lines([DOCUMENT, {"text": "x"}])), r"line 2: '_id' is null, expected"),
    "half a surrogate": (
        bad_file("corpus.jsonl", lines(corpus()[1:]) + b'{"_id": "d0", "text": "\\ud800"}\n'),
        r"line 40: 'text' holds half of a surrogate pair",
    ),
    "blank line in a corpus": (
        bad_file("corpus.jsonl", lines([DOCUMENT]) + b"\n" + lines([DOCUMENT])),
        r"line 2: not JSON",
    ),
    "other names": (
        bad_file("corpus.jsonl", lines([{"_id": "d1", "contents": "x"}])),
        r"found \['_id', 'contents'\], expected 'text'; set input\.columns: \{text: contents\}",
    ),
    "corpus cut short, gz": (
        lambda folder: cut_short(folder, gz, "corpus.jsonl"),
        r"corpus\.jsonl\.gz: the text cannot be read .*; expected a complete, undamaged file",
    ),
    "run cut short, zst": (
        lambda folder: cut_short(folder, zst, "bm25.run"),
        r"bm25\.run\.zst: the text cannot be read .*; expected a complete, undamaged file",
    ),
    "run cut short, gz": (
        lambda folder: cut_short(folder, gz, "bm25.run"),
        r"bm25\.run\.gz: the text cannot be read .*; expected a complete, undamaged file",
    ),
    "no corpus": (
        lambda folder: (given := given_as("beir", folder), (folder / "corpus.jsonl").unlink())[0] and given,
        r"no corpus\.jsonl there; expected a BEIR folder",
    ),
    "no run": (
        lambda folder: {**given_as("beir", folder), "run": str(folder / "none")},
        r"input\.run .*no file matches",
    ),
    "a name without a format": (
        lambda folder: {**given_as("run of JSONL", folder), "corpus": str(jsonl(folder / "corpus.txt", corpus()))},
        r"corpus\.txt: its name says no format",
    ),
    "ids of floats": (
        lambda folder: of_parquet(folder, "run", [{"query_id": 1.0, "doc_id": "d1"}]),
        r"column 'query_id' is double, expected a string or an integer",
    ),
    "null id": (
        lambda folder: of_parquet(
            folder, "run", [{"query_id": "q1", "doc_id": "d1"}, {"query_id": "q1", "doc_id": None}]
        ),
        r"row 1: doc_id is null",
    ),
    "null rank": (
        lambda folder: of_parquet(
            folder, "run", [{"query_id": "q1", "doc_id": f"d{i}", "rank": i or None} for i in (1, 0)]
        ),
        r"row 1: rank is null",
    ),
    "rank of 40 bits": (
        lambda folder: of_parquet(folder, "run", [{"query_id": "q1", "doc_id": "d1", "rank": 2**40}]),
        r"cannot be read \(Integer value 1099511627776 not in range",
    ),
    "a column twice": (
        lambda folder: {**given_as("run of JSONL", folder), "corpus": str(twice(folder / "c.parquet"))},
        r"c\.parquet: column 'text' is there more than once",
    ),
    "a corpus without rows": (
        lambda folder: {**given_as("run of JSONL", folder), "corpus": str(empty(folder / "c.parquet", "text"))},
        r"no doc_id of the run .*, corpus has none;",
    ),
    "no doc_id": (
        lambda folder: of_parquet(folder, "run", [{"query_id": "q1", "docno": "d1"}]),
        r"expected 'doc_id'; set input\.columns: \{doc_id: docno\}",
    ),
    "queries without rows": (
        lambda folder: {**given_as("run of JSONL", folder), "queries": str(empty(folder / "q.parquet", "query"))},
        r"input\.queries: .*q\.parquet has no queries; expected at least one",
    ),
    "queries without row groups": (
        lambda folder: {
            **given_as("run of JSONL", folder),
            "queries": str(empty(folder / "q.parquet", "query", False)),
        },
        r"input\.queries: .*q\.parquet has no queries; expected at least one",
    ),
    "run without row groups": (
        lambda folder: {**given_as("run of JSONL", folder), "run": str(empty(folder / "e.parquet", groups=False))},
        r"e\.parquet has no candidates",
    ),
    "Parquet run without rows": (
        lambda folder: {
            **given_as("run of JSONL", folder),
            "run": str(empty(folder / "e.parquet")),
        },
        r"e\.parquet has no candidates",
    ),
    "score is a string": (
        lambda folder: of_parquet(folder, "run", [{"query_id": "q1", "doc_id": "d1", "score": "high"}]),
        r"column 'score' is string, expected a number",
    ),
}


def twice(path: Path) -> Path:
    ids = pa.array([f"d{i}" for i in range(DOCUMENTS)])
    pq.write_table(pa.table([ids, ids, ids], names=["doc_id", "text", "text"]), path)
    return path


def empty(path: Path, other: str = "query_id", groups: bool = True) -> Path:
    schema = pa.schema([(name, pa.string()) for name in sorted({other, "query_id", "doc_id"})])
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, schema) as writer:
        if groups:
            writer.write_table(schema.empty_table())
    return path


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("tasks", ["large", "small"])
def test_sources_that_do_not_fit_are_refused(
    case: str, tasks: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if tasks == "small":
        request.getfixturevalue("small_tasks")
    make, message = BAD[case]
    config = job_of(make(tmp_path / "in"), tmp_path / "out")
    with pytest.raises(InputError, match=message):
        run(config, local=True)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out-stage" / "_SUCCESS").exists()
    if not message.startswith(IN_THE_TEXTS):  # the ids come first; nothing is written before they are right
        assert not (tmp_path / "out-stage").exists()


IN_THE_TEXTS = ("line 40", "line 41")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"layout": "run", "run": "r", "queries": "q"}, "corpus: missing; layout run requires it"),
        ({"layout": "beir", "path": "p"}, "run: missing; layout beir requires it"),
        ({"layout": "nested", "path": "p", "run": "r"}, "run: layout nested has no such key"),
        (
            {"layout": "flat", "path": "p", "candidates_per_query": 5},
            "candidates_per_query: layout flat has no such key",
        ),
        ({"layout": "nested"}, "path: missing; layout nested requires it"),
    ],
)
def test_keys_that_do_not_fit_the_layout_are_refused(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        job_of(keys, tmp_path / "out")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"output__passthrough": ["lang"]}, "passthrough: layout beir has no further columns"),
        ({"input__stage": "{out}/stage"}, "lie in each other"),
        ({"input__stage": "{in}"}, "lies in input.stage"),
    ],
)
def test_places_and_columns_that_cannot_be_staged(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    folders = {"out": str(tmp_path / "out"), "in": str(tmp_path / "in")}
    filled = {key: value.format(**folders) if isinstance(value, str) else value for key, value in keys.items()}
    with pytest.raises(ConfigError, match=message):
        run(job_of(given_as("beir", tmp_path / "in"), tmp_path / "out", **filled), local=True)


def test_a_nested_query_in_two_rows_is_still_an_error(tmp_path: Path) -> None:
    rows = nested(joined())
    write(tmp_path / "n.parquet", [rows[0], rows[1], rows[0]])
    with pytest.raises(InputError, match="expected each query in one row; give different queries different ids"):
        run(job_of({"layout": "nested", "path": str(tmp_path / "n.parquet")}, tmp_path / "out"), local=True)


def test_a_query_in_two_places_is_named_and_staged_by_the_command_line(tmp_path: Path, cli: Callable[..., Any]) -> None:
    rows = joined()
    write(tmp_path / "in" / "a.parquet", [rows[0], *rows[2:], rows[1]])
    settings = {
        "input": {"layout": "flat", "path": f"{tmp_path}/in"},
        "output": {"path": f"{tmp_path}/out"},
        "model": {"name": "none", "kind": "checksum"},
        "cluster": {"gpus_per_actor": 0},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(settings))
    for verb in ("plan", "run", "verify"):
        given = (
            [tmp_path / "out"] if verb == "verify" else [tmp_path / "job.yaml", *(["--local"] if verb == "run" else [])]
        )
        code, _, log = cli(verb, *given)
        assert code == 0, log
        if verb != "verify":
            assert "query_id 'q0' stands in two places" in log
            assert "a.parquet row 0 and" in log
            assert f"108 candidates of {QUERIES} queries in 1 shards" in log
    code, out, log = cli("stage", tmp_path / "job.yaml", "--local", "--json")
    assert (code, json.loads(out)["reused"]) == (0, True)
    assert "staged already at" in log
    code, _, log = cli("evaluate", "--run", tmp_path / "out-stage", "--qrels", tmp_path / "none")
    assert code == 3


def test_a_scattered_query_with_two_texts_is_refused(tmp_path: Path) -> None:
    rows = sorted(joined(), key=lambda row: row["rank"])
    rows[-1] = {**rows[-1], "query": "another"}
    write(tmp_path / "f.parquet", rows)
    with pytest.raises(BatchRerankError, match="has two values of query"):
        run(job_of({"layout": "flat", "path": str(tmp_path / "f.parquet")}, tmp_path / "out"), local=True)
    assert not (tmp_path / "out").exists()


def test_a_scattered_document_twice_is_refused_with_both_places(tmp_path: Path) -> None:
    rows = sorted(joined(), key=lambda row: row["rank"])
    write(tmp_path / "in" / "0.parquet", rows)
    write(tmp_path / "in" / "1.parquet", [rows[5]])
    with pytest.raises(InputError, match=r"twice: .*0\.parquet row 5 and .*1\.parquet row 0"):
        run(job_of({"layout": "flat", "path": str(tmp_path / "in")}, tmp_path / "out"), local=True)


def test_the_trec_run_is_read_as_it_was_ranked(tmp_path: Path) -> None:
    config = job_of(given_as("beir", tmp_path / "in"), tmp_path / "out")
    run(config, local=True)
    assert not (tmp_path / "out" / "_run.trec").exists()
    asked = job_of(
        given_as("beir", tmp_path / "in2") | {"run": config.input.run}, tmp_path / "out", output__trec_run=True
    )
    asked = asked.model_copy(update={"input": config.input})
    run(asked, local=True)  # all units are done: only the run is written
    rows = rows_of(tmp_path / "out").to_pylist()
    read = list(ir_measures.read_trec_run(str(tmp_path / "out" / "_run.trec")))
    assert [(one.query_id, one.doc_id) for one in read] == [(row["query_id"], row["doc_id"]) for row in rows]
    by_query: dict[str, list[float]] = {}
    for one in read:
        by_query.setdefault(one.query_id, []).append(float(np.float32(one.score)))
    assert all(scores == sorted(set(scores), reverse=True) for scores in by_query.values())
    assert verify(str(tmp_path / "out")).problems == []
    with (tmp_path / "out" / "_run.trec").open("a") as file:
        file.write("q1 Q0 dx 99 0 t\n")
    assert verify(str(tmp_path / "out")).problems == [
        "_run.trec is not what the job wrote; remove _SUCCESS and run the job again"
    ]


def test_scores_fall_by_the_smallest_step_where_they_tie() -> None:
    scores = np.array([2, 1, 1, np.nan, np.nan, 0, -0.0, -1, np.nan, np.nan, np.nan], np.float32)
    found = falling(scores, np.array([0, 5, 9]))
    down = lambda value: np.nextafter(np.float32(value), np.float32(-np.inf))  # noqa: E731
    expected = [2, 1, down(1), down(down(1)), down(down(down(1))), 0, down(0), -1, down(-1), 0, down(0)]
    assert found.tolist() == [float(value) for value in expected]


def test_ids_with_space_cannot_go_into_a_trec_run(tmp_path: Path) -> None:
    write(tmp_path / "f.parquet", [{"query_id": "q 1", "query": "x", "doc_id": "d", "text": "t"}])
    given = {"layout": "flat", "path": str(tmp_path / "f.parquet")}
    with pytest.raises(InputError, match="query_id 'q 1' is empty or has space in it"):
        run(job_of(given, tmp_path / "out", output__trec_run=True), local=True)


@pytest.mark.parametrize("local", [True, pytest.param(False, marks=pytest.mark.chaos)], ids=["local", "ray"])
def test_a_stage_that_is_killed_goes_on_from_there(local: bool, tmp_path: Path) -> None:
    """Forty pieces of a corpus, and a kill as soon as some are read, then one as soon as a shard is there."""
    given = given_as("run of JSONL", tmp_path / "in")
    for number, row in enumerate(corpus()):
        text = f"{row['text']} {random.Random(number).randbytes(1_000_000).hex()}"
        jsonl(tmp_path / "in" / "c" / f"{number:02d}.jsonl", [{**row, "text": text}])
    settings: dict[str, Any] = {
        "input": {**given, "corpus": str(tmp_path / "in" / "c" / "*.jsonl"), "stage": str(tmp_path / "staged")},
        "output": {"path": str(tmp_path / "out")},
        "model": {"name": "none", "kind": "checksum"},
        "cluster": {"gpus_per_actor": 0, "lease_seconds": 2},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(settings))
    arguments = ["stage", str(tmp_path / "job.yaml"), *(["--local"] if local else [])]
    exchange_files = tmp_path / "staged" / "_manifest" / "exchange"
    for notes in (5, 20):
        process = start(arguments, tmp_path / "log")
        wait_for(lambda notes=notes: len(list(exchange_files.glob("*.note"))) >= notes, process)  # type: ignore[misc]
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "staged" / "_SUCCESS").exists()
    wait_for_silence(exchange_files)  # Ray's workers outlive a killed driver for a moment
    kept = list(exchange_files.glob("*.note"))
    again = start(arguments, tmp_path / "log")
    assert again.wait(300) == 0, (tmp_path / "log").read_text()
    needed = len({row["doc_id"] for row in run_rows()})
    assert f"of {needed - len(kept)} pieces" in (tmp_path / "log").read_text()
    assert verify(str(tmp_path / "staged")).problems == []
    elsewhere = {**settings, "input": {**settings["input"], "stage": str(tmp_path / "other")}}
    made = stage_input(parse_config(elsewhere, "test"), local=True)
    undisturbed = {part.name: part.read_bytes() for part in Path(made.place).glob("part-*")}
    assert {part.name: part.read_bytes() for part in (tmp_path / "staged").glob("part-*")} == undisturbed


def test_a_second_stage_of_the_same_place_is_refused_while_one_is_at_work(tmp_path: Path) -> None:
    config = job_of(given_as("beir", tmp_path / "in"), tmp_path / "out")
    with hold(locate(str(tmp_path / "out-stage")), 60), pytest.raises(ConflictError, match="out-stage"):
        stage_input(config, local=True)
    assert not (tmp_path / "out-stage" / "_manifest" / "plan.json").exists()


def test_files_of_others_beside_the_exchange_stay(tmp_path: Path) -> None:
    config = job_of(given_as("beir", tmp_path / "in"), tmp_path / "out")
    theirs = tmp_path / "out-stage/_manifest/exchange/notes.txt"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("theirs")
    run(config, local=True)
    assert [path.name for path in theirs.parent.iterdir()] == ["notes.txt"]
