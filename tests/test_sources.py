"""Sources in several files: columns that come and go, types and names that differ, files that were cut short."""

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Row, job, nested, rows_of, write
from test_stage import corpus, given_as, job_of, joined, jsonl, queries, run_rows, trec

from batch_rerank.errors import BatchRerankError, InputError
from batch_rerank.input import sources, text_files
from batch_rerank.input.stage import describe_stage, plan_stage
from batch_rerank.input.text_files import line_blocks
from batch_rerank.job.run import run
from batch_rerank.job.staging import stage as stage_input
from batch_rerank.store.filesystem import locate


def staged(given: dict[str, Any], folder: Path, **keys: Any) -> list[Row]:
    """The rows of the staged shards."""
    place = Path(stage_input(job_of(given, folder / "out", **keys), local=True).place)
    return [row for part in sorted(place.glob("part-*")) for row in pq.read_table(part).to_pylist()]


def texts_of(rows: list[Row]) -> dict[str, str]:
    return {one["doc_id"]: one["text"] for row in rows for one in row["candidates"]}


def documents() -> list[Row]:
    return [{"doc_id": row["_id"], "text": row["text"], "title": row["title"]} for row in corpus()]


def without(rows: list[Row], name: str) -> list[Row]:
    return [{key: value for key, value in row.items() if key != name} for row in rows]


@pytest.mark.parametrize("first", ["without", "null", "with"])
def test_a_title_that_only_some_corpus_files_have_is_kept(first: str, tmp_path: Path, logged: list[str]) -> None:
    given = given_as("run of JSONL", tmp_path / "in")
    rows = documents()
    bare = without(rows[:15], "title") if first != "null" else [{**row, "title": None} for row in rows[:15]]
    parts = [bare, rows[15:]] if first != "with" else [rows[15:], bare]
    for number, part in enumerate(parts):
        write(tmp_path / "c" / f"{number}.parquet", part, row_group_size=4)
    found = texts_of(staged({**given, "corpus": str(tmp_path / "c")}, tmp_path))
    assert found == {
        row["doc_id"]: f"{row['title']} {row['text']}".strip() if i >= 15 and row["title"] else row["text"]
        for i, row in enumerate(rows)
        if row["doc_id"] in found
    }
    said = any("1 files of the corpus without a title" in message for message in logged)
    assert said == (first != "null")


def test_an_instruction_that_only_some_query_files_have_is_kept(tmp_path: Path) -> None:
    given = given_as("run of JSONL", tmp_path / "in")
    rows = [{"query_id": row["_id"], "query": row["text"], "instruction": f"do {row['_id']}"} for row in queries()]
    write(tmp_path / "q" / "0.parquet", without(rows[:5], "instruction"))
    write(tmp_path / "q" / "1.parquet", rows[5:])
    config = job_of({**given, "queries": str(tmp_path / "q")}, tmp_path / "out")
    assert "1 files of queries without an instruction" in describe_stage(plan_stage(config)[1])
    found = {row["query_id"]: row["instruction"] for row in staged({**given, "queries": str(tmp_path / "q")}, tmp_path)}
    assert found == {row["query_id"]: row["instruction"] if i >= 5 else None for i, row in enumerate(rows)}


def test_keys_of_a_jsonl_corpus_come_and_go(tmp_path: Path) -> None:
    given = given_as("run of JSONL", tmp_path / "in")
    rows = [row if i % 4 == 3 else without([row], "title")[0] for i, row in enumerate(corpus())]
    jsonl(tmp_path / "c" / "0.jsonl", rows[:11])
    jsonl(tmp_path / "c" / "1.jsonl", rows[11:])
    found = texts_of(staged({**given, "corpus": str(tmp_path / "c" / "*.jsonl")}, tmp_path))
    assert found == {
        row["_id"]: f"{row['title']} {row['text']}".strip() if row.get("title") else row["text"]
        for row in rows
        if row["_id"] in found
    }


SPACED = "  def f(x):\n    return x\n"


@pytest.mark.parametrize("title", [None, "", "T"])
@pytest.mark.parametrize("layout", ["JSONL", "Parquet", "flat", "scattered", "nested"])
def test_a_document_has_the_same_text_in_every_format(layout: str, title: str | None, tmp_path: Path) -> None:
    """Whether its format brings a column of titles along or not; a text is trimmed only behind a title."""
    documents = [{"doc_id": "d1", "text": SPACED, "title": title}, {"doc_id": "d2", "text": SPACED, "title": "A"}]
    rows = [
        {"query_id": query, "query": "q", **document, "rank": rank}
        for rank, document in enumerate(documents, 1)
        for query in ("q1", "q2")
    ]
    if layout == "scattered":
        given = {"layout": "flat", "path": str(write(tmp_path / "f.parquet", rows))}
    elif layout == "flat":
        given = {
            "layout": "flat",
            "path": str(write(tmp_path / "f.parquet", sorted(rows, key=lambda row: row["query_id"]))),
        }
    elif layout == "nested":
        given = {"layout": "nested", "path": str(write(tmp_path / "n.parquet", nested(rows)))}
    else:
        given = {"layout": "run", "run": str(write(tmp_path / "r.parquet", without(without(rows, "text"), "title")))}
        given["queries"] = str(write(tmp_path / "q.parquet", [{"query_id": f"q{i}", "query": "q"} for i in (1, 2)]))
        if layout == "JSONL":
            given["corpus"] = str(jsonl(tmp_path / "c.jsonl", [{"_id": row["doc_id"], **row} for row in documents]))
        else:
            given["corpus"] = str(write(tmp_path / "c.parquet", documents))
    run(job_of(given, tmp_path / "out", output__include_text=True), local=True)
    found = {row["doc_id"]: row["text"] for row in rows_of(tmp_path / "out").to_pylist()}
    assert found == {"d1": f"T {SPACED}".strip() if title else SPACED, "d2": f"A {SPACED}".strip()}


def test_a_title_that_the_first_line_of_a_jsonl_corpus_lacks_is_said(tmp_path: Path, logged: list[str]) -> None:
    given = given_as("run of JSONL", tmp_path / "in") | {"columns": {"title": "headline"}}
    staged(given, tmp_path)
    assert any("line 1 has no 'headline', which is to be the title" in message for message in logged)


def two(folder: Path, first: list[Row], second: list[Row]) -> str:
    write(folder / "0.parquet", first)
    write(folder / "1.parquet", second)
    return str(folder)


RUN = [{key: row[key] for key in ("query_id", "doc_id", "rank", "score")} for row in run_rows()]
NO_SCORE = {"query_id": "q5", "doc_id": "dx", "score": None}
UNEVEN: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "scores in the second file only": (
        lambda folder: {"run": two(folder / "r", without(RUN[:50], "score"), RUN[50:])},
        r"0\.parquet: no column 'score', which .*1\.parquet has; expected it in all files or in none",
    ),
    "ranks in the first file only": (
        lambda folder: {"run": two(folder / "r", RUN[:50], without(RUN[50:], "rank"))},
        r"1\.parquet: no column 'rank', which .*0\.parquet has",
    ),
    "an id of two names": (
        lambda folder: {
            "corpus": two(
                folder / "c",
                documents()[:9],
                [{"_id": row["doc_id"], "text": row["text"]} for row in documents()[9:]],
            )
        },
        r"1\.parquet: doc_id is column '_id', but 'doc_id' in .*0\.parquet; expected one name",
    ),
    "a text in the first file only": (
        lambda folder: {"corpus": two(folder / "c", documents()[:9], without(documents()[9:], "text"))},
        r"1\.parquet: found \['doc_id', 'title'\], expected 'text'",
    ),
    "a title of numbers in the second file": (
        lambda folder: {"corpus": two(folder / "c", documents()[:9], [{**row, "title": 7} for row in documents()[9:]])},
        r"1\.parquet: column 'title' is int64, expected a string",
    ),
    "scores that are words in the second file": (
        lambda folder: {"run": two(folder / "r", RUN[:50], [{**row, "score": "high"} for row in RUN[50:]])},
        r"1\.parquet: column 'score' is string, expected a number",
    ),
    "a title named in the job that no file has": (
        lambda folder: {"corpus": two(folder / "c", documents()[:9], documents()[9:]), "columns": {"title": "head"}},
        r"input\.columns: no file of input\.corpus has 'head', e\.g\. .*found \['doc_id', 'text', 'title'\]",
    ),
    "a text named in the job that no file has": (
        lambda folder: {"corpus": two(folder / "c", documents()[:9], documents()[9:]), "columns": {"text": "body"}},
        r"0\.parquet: found \['doc_id', 'text', 'title'\], expected 'body'",
    ),
    "TREC files of 6 and of 3 fields": (
        lambda folder: {
            "run": [
                str(trec(folder / "a.trec", run_rows()[:50])),
                str(trec(folder / "b.trec", run_rows()[50:], fields=3)),
            ]
        },
        r"b\.trec: line 1: found 3 fields in .*, expected 6",
    ),
    "no score, no rank, in Parquet": (
        lambda folder: {"run": two(folder / "r", without(RUN[:50], "rank"), without([*RUN[50:], NO_SCORE], "rank"))},
        r"query_id 'q5' has doc_id 'dx' .*1\.parquet row 58.* without a score, and the run has no rank",
    ),
}


@pytest.mark.parametrize("case", UNEVEN)
def test_files_of_one_source_that_differ_are_refused_before_anything_is_written(case: str, tmp_path: Path) -> None:
    make, message = UNEVEN[case]
    given = {**given_as("run of JSONL", tmp_path / "in"), **make(tmp_path)}
    with pytest.raises(InputError, match=message):
        run(job_of(given, tmp_path / "out"), local=True)
    assert not (tmp_path / "out-stage").exists()


def test_ids_are_integers_in_one_file_and_strings_in_another(tmp_path: Path) -> None:
    number = lambda id: int(id[1:])  # noqa: E731
    rows = [{**row, "query_id": str(number(row["query_id"])), "doc_id": number(row["doc_id"])} for row in RUN]
    as_text = [{**row, "doc_id": str(row["doc_id"])} for row in rows]
    numbered = [{**row, "doc_id": number(row["doc_id"])} for row in documents()]
    given = {
        "layout": "run",
        "run": two(tmp_path / "r", rows[:30], as_text[30:]),
        "queries": str(jsonl(tmp_path / "q.jsonl", [{**row, "_id": number(row["_id"])} for row in queries()])),
        "corpus": two(tmp_path / "c", numbered[:9], [{**row, "doc_id": str(row["doc_id"])} for row in numbered[9:]]),
    }
    found = staged(given, tmp_path)
    assert [row["query_id"] for row in found] == [row["_id"][1:] for row in queries()]
    plain = staged(given_as("run of JSONL", tmp_path / "in"), tmp_path / "plain")
    assert {f"d{id}": text for id, text in texts_of(found).items()} == texts_of(plain)


def test_shards_of_a_scattered_input_may_differ_in_types_and_texts(tmp_path: Path) -> None:
    """Titles and instructions in some; a dictionary, large strings; scores that are integers."""
    rows = sorted(joined(), key=lambda row: (row["rank"], int(row["query_id"][1:])))
    for row in rows[:40]:
        del row["title"]
    for row in rows[70:]:
        row["instruction"] = f"do {row['query_id']}"
    tables = [pa.Table.from_pylist(part) for part in (rows[:40], rows[40:70], rows[70:])]
    tables[0] = tables[0].set_column(
        tables[0].column_names.index("text"), "text", tables[0]["text"].dictionary_encode()
    )
    tables[1] = tables[1].set_column(
        tables[1].column_names.index("score"), "score", tables[1]["score"].cast(pa.int64())
    )
    tables[2] = tables[2].cast(
        pa.schema([(f.name, pa.large_string() if f.type == pa.string() else f.type) for f in tables[2].schema])
    )
    (tmp_path / "s").mkdir()
    for number, table in enumerate(tables):
        pq.write_table(table, tmp_path / "s" / f"{number}.parquet", row_group_size=11)
    by_query = sorted(rows, key=lambda row: int(row["query_id"][1:]))
    write(tmp_path / "f" / "0.parquet", [{"title": None, "instruction": None, **row} for row in by_query])
    outputs = []
    for name in ("s", "f"):
        run(job_of({"layout": "flat", "path": str(tmp_path / name)}, tmp_path / f"out-{name}"), local=True)
        outputs.append(rows_of(tmp_path / f"out-{name}"))
    assert outputs[0].equals(outputs[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: without([row], "rank")[0], "rank is missing, but there in .*0.parquet"),
        (lambda row: without([row], "score")[0], "score is missing, but there in .*0.parquet"),
        (lambda row: {**row, "lang": 7}, "lang is int64, but string in .*0.parquet: it is passed through"),
        (lambda row: {**row, "doc_id": int(row["doc_id"][1:])}, "doc_id is an integer, but a string in"),
    ],
)
def test_shards_of_a_scattered_input_that_differ_are_refused(
    change: Callable[[Row], Row], message: str, tmp_path: Path
) -> None:
    rows = [{**row, "lang": "en"} for row in sorted(joined(), key=lambda row: row["rank"])]
    path = two(tmp_path / "in", rows[:60], [change(row) for row in rows[60:]])
    config = job_of({"layout": "flat", "path": path}, tmp_path / "out", output__passthrough=["lang"])
    with pytest.raises(InputError, match=message):
        stage_input(config, local=True)
    assert not (tmp_path / "out-stage").exists()


@pytest.mark.parametrize("scattered", [False, True])
def test_a_flat_query_that_some_rows_lack_is_that_of_the_others(scattered: bool, tmp_path: Path) -> None:
    """The first row of q1 and the last of q2 lack it; q3 has none."""
    order = [(rank, query) for rank in (1, 2, 3) for query in (1, 2, 3)]
    rows = [
        {
            "query_id": f"q{query}",
            "query": None if (query, rank) in ((1, 1), (2, 3)) or query == 3 else f"what {query}",
            "doc_id": f"d{rank}",
            "text": "t",
            "rank": rank,
        }
        for rank, query in (order if scattered else sorted(order, key=lambda one: one[1]))
    ]
    given = {"layout": "flat", "path": str(write(tmp_path / "f.parquet", rows, row_group_size=2))}
    config = job_of(given, tmp_path / "out", scoring__max_failed_rows=1)
    run(config, local=True)
    found = rows_of(tmp_path / "out").to_pylist()
    assert {(row["query_id"], row["error"]) for row in found} == {("q1", None), ("q2", None), ("q3", "query is null")}
    assert len(found) == len(rows)


@pytest.mark.parametrize("blank", ["", " \t", "\r", "\n"])
def test_a_blank_line_is_refused_wherever_a_block_ends(
    blank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle; at the end of a file they are left out."""
    path = tmp_path / "r.run"
    lines = ["q1 d1 3", "q1 d2 2", "q1 d3 1"]
    location = locate(str(path))
    for block in range(1, 40):
        monkeypatch.setattr(text_files, "BLOCK_BYTES", block)
        path.write_text("\n".join([*lines, blank, blank, ""]))
        number = text_files.LineNumber(location, 0)
        tables = [text_files.parse_trec(one, 3, location, number) for one in line_blocks(location)]
        assert [one for table in tables for one in table["doc_id"].to_pylist()] == ["d1", "d2", "d3"]
        path.write_text("\n".join([lines[0], lines[1], blank, lines[2], ""]))
        number = text_files.LineNumber(location, 0)
        with pytest.raises(InputError, match="line 3: found 0 fields"):
            for one in line_blocks(location):
                number.passed += len(text_files.parse_trec(one, 3, location, number))


@pytest.mark.parametrize("codec", ["gzip", "zstd"])
def test_a_compressed_file_cut_anywhere_is_an_error(codec: str, tmp_path: Path) -> None:
    """Never fewer lines. Two members, and a cut between them is a whole file that nobody can tell from another."""
    lines = [b"".join(b"%d of %d\n" % (i, part) for i in range(40)) for part in range(2)]
    members = [gzip.compress(one) if codec == "gzip" else pa.compress(one, "zstd", asbytes=True) for one in lines]
    whole = members[0] + members[1]
    path = tmp_path / ("f.gz" if codec == "gzip" else "f.zst")
    for cut in range(1, len(whole) + 1):
        path.write_bytes(whole[:cut])
        if cut in (len(members[0]), len(whole)):
            assert b"".join(line_blocks(locate(str(path)))) == b"".join(lines[: 1 if cut < len(whole) else 2])
        else:
            with pytest.raises(InputError, match=r"f\.(gz|zst): the text cannot be read"):
                list(line_blocks(locate(str(path))))


def test_nothing_is_left_of_a_run_whose_candidates_all_lack_something(tmp_path: Path) -> None:
    given = given_as("run of JSONL", tmp_path / "in")
    rows = [
        {"query_id": "q1", "doc_id": "nowhere", "rank": 1, "score": 1.0},
        {"query_id": "nobody", "doc_id": "d1", "rank": 1, "score": 1.0},
    ]
    given["run"] = str(trec(tmp_path / "r.trec", rows))
    with pytest.raises(InputError, match=r"2 of 2 candidates name .*; nothing is left"):
        run(job_of(given, tmp_path / "out", input__max_missing=1.0), local=True)
    assert not (tmp_path / "out-stage").exists()


@pytest.mark.parametrize("asked", [True, False])
def test_a_document_twice_in_a_corpus_is_refused_whether_or_not_it_is_a_candidate(asked: bool, tmp_path: Path) -> None:
    given = given_as("run of JSONL", tmp_path / "in")
    twice = run_rows()[0]["doc_id"] if asked else "unasked"
    extra = [{"_id": twice, "text": "one"}, {"_id": twice, "text": "two"}][: 1 if asked else 2]
    jsonl(tmp_path / "in" / "corpus.jsonl", [*corpus(), *extra])
    first, second = (r"\d+", 41) if asked else (41, 42)
    places = rf"\S+/corpus\.jsonl line {first} and \S+/corpus\.jsonl line {second} "
    with pytest.raises(BatchRerankError, match=rf"input\.corpus: doc_id '{twice}' stands in {places}"):
        run(job_of(given, tmp_path / "out"), local=True)


@pytest.mark.parametrize("kind", ["queries", "corpus"])
@pytest.mark.parametrize("small", [False, True])
def test_an_id_twice_in_two_files_is_told_with_both_places(
    small: bool, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of Parquet count from 0, in each file anew, as elsewhere; also where a file is several pieces."""
    if small:
        monkeypatch.setattr(sources, "PIECE_BYTES", 1)
    given = given_as("run of JSONL", tmp_path / "in")
    name = "query_id" if kind == "queries" else "doc_id"
    rows = [{name: f"{name[0]}{i}", "query" if kind == "queries" else "text": "x"} for i in range(12)]
    write(tmp_path / kind / "0.parquet", rows[:7], row_group_size=2)
    write(tmp_path / kind / "1.parquet", [*rows[7:], rows[3]], row_group_size=2)
    given[kind] = str(tmp_path / kind)
    message = rf"input\.{kind}: {name} '{name[0]}3' stands in \S+/0\.parquet row 3 and \S+/1\.parquet row 5 \(1 such"
    with pytest.raises(InputError, match=message):
        run(job_of(given, tmp_path / "out"), local=True)


@pytest.mark.parametrize("layout", ["flat", "scattered", "nested"])
@pytest.mark.parametrize("scored", [True, False])
def test_ranks_that_repeat_are_counted_anew_in_every_layout(layout: str, scored: bool, tmp_path: Path) -> None:
    """q0 has one rank for all, q1 has one twice, q2 is as it is, with gaps."""
    ranks = {"q0": [1, 1, 1, 1], "q1": [3, 1, 3, 7], "q2": [9, 2, 4, 30]}
    scores = [0.5, 2.0, None, 1.0]
    rows: list[Row] = [
        {"query_id": query, "query": "a", "doc_id": f"d{place}", "text": "b", "rank": rank, "score": scores[place]}
        for query, found in ranks.items()
        for place, rank in enumerate(found)
    ]
    if not scored:
        rows = [{name: value for name, value in row.items() if name != "score"} for row in rows]
    ordered = sorted(rows, key=lambda row: row["doc_id"]) if layout == "scattered" else rows
    write(tmp_path / "in" / "0.parquet", nested(ordered) if layout == "nested" else ordered)
    run(job(tmp_path / "in", tmp_path / "out", input__layout="nested" if layout == "nested" else "flat"), local=True)
    found: dict[str, dict[str, int]] = {}
    for row in rows_of(tmp_path / "out").to_pylist():
        found.setdefault(row["query_id"], {})[row["doc_id"]] = row["first_stage_rank"]
    of = {query: [documents[f"d{place}"] for place in range(4)] for query, documents in found.items()}
    assert of["q2"] == ranks["q2"]
    assert of["q0"] == ([3, 1, 4, 2] if scored else [1, 2, 3, 4])
    assert of["q1"] == [2, 1, 3, 4]
