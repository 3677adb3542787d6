"""The join against a naive one of Python lists, on random runs; what is refused, and what the disk may do."""

import errno
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import Row, write

from batch_rerank.errors import InputError, StorageError
from batch_rerank.input import candidates, join, known, spill
from batch_rerank.input.known import Fingerprints, Repeated, know
from batch_rerank.input.sources import find_source

STRANGE = ("größe", "北京", "a" * 3000, "", "\0", "\0\0", "a\0", "ab", "ba", "1", "01", "🂡", "e\u0301", "é")


def names(kind: str, count: int, random: np.random.Generator) -> list[Any]:
    """Distinct ids of one kind."""
    if kind == "integers":
        return [int(one) for one in random.choice(10**6, count, replace=False)]
    if kind == "strange":
        return [*STRANGE, *(f"{'x' * int(random.integers(0, 40))}-{i}" for i in range(count))][:count]
    return [f"id-{i}" for i in random.permutation(count)]


def inputs(seed: int, kind: str) -> tuple[list[Row], list[Any], list[Any], int | None]:
    """A run's rows, the queries' and the corpus's ids, and a depth. Some ids are in the run alone, or not in it."""
    random = np.random.default_rng(seed)
    queries, documents = names(kind, 23, random), names(kind, 90, random)
    columns = [("score", "rank"), ("score",), ("rank",), ()][seed % 4]
    rows: list[Row] = []
    for query in queries[:20]:
        for document in random.choice(len(documents), int(random.integers(1, 30)), replace=False):
            row: Row = {"query_id": query, "doc_id": documents[document]}
            if "score" in columns:
                row["score"] = float(random.choice([1.5, 1.5 + 1e-12, -2.0, 0.0, -0.0, 3.25, np.inf]))
            if "rank" in columns:
                row["rank"] = int(random.integers(-2, 6))
                if "score" in columns and random.random() < 0.2:
                    row["score"] = float("nan")
            rows.append(row)
    if seed % 3:
        rows = [rows[i] for i in random.permutation(len(rows))]
    lost = 0 if seed % 5 == 0 else 6
    return rows, queries[lost // 3 :], documents[lost:], [None, 4][seed % 2]


def place(row: Row) -> tuple[float, ...]:
    """By rank, of one rank by falling score; NaN is last."""
    score = row.get("score", 0.0)
    unknown = bool(np.isnan(score))
    return row.get("rank", 0), unknown, 0.0 if unknown else -score


def naive(rows: list[Row], queries: list[Any], documents: list[Any], depth: int | None) -> dict[str, Any]:
    """By query id in order of first appearance: rows of documents, scores and ranks; and the counts."""
    of_query: dict[Any, list[Row]] = {}
    for row in rows:
        of_query.setdefault(row["query_id"], []).append(row)
    found, cut, lost, missing = {}, 0, 0, {"queries": set[Any](), "documents": set[Any]()}
    for query, given in of_query.items():
        given = sorted(given, key=place)
        if len({row.get("rank", i) for i, row in enumerate(given)}) < len(given):
            given = [{**row, "rank": i + 1} for i, row in enumerate(given)]
        found[query] = given
        cut += len(given) - len(given[:depth])
        kept = []
        for row in given[:depth]:
            missing["queries"] |= {query} - set(queries)
            missing["documents"] |= {row["doc_id"]} - set(documents)
            if query in queries and row["doc_id"] in documents:
                kept.append(row)
            else:
                lost += 1
        found[query] = kept
    return {"rows": {q: kept for q, kept in found.items() if kept}, "cut": cut, "lost": lost, "missing": missing}


@pytest.fixture(params=[7, 10_000], ids=["small", "large"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "BUCKET", request.param)
    monkeypatch.setattr(spill, "CHUNK", request.param)
    monkeypatch.setattr(known, "BYTES", request.param)
    monkeypatch.setattr(join, "SHARD_PAIRS", 40)


@pytest.mark.parametrize("kind", ["strings", "integers", "strange"])
@pytest.mark.parametrize("seed", range(8))
def test_the_join_equals_a_naive_one(seed: int, kind: str, tmp_path: Path, chunks: None) -> None:
    rows, queries, documents, depth = inputs(seed, kind)
    cut = len(rows) // 3
    write(tmp_path / "run" / "0.parquet", rows[:cut], row_group_size=11)
    write(tmp_path / "run" / "1.parquet", rows[cut:])
    write(tmp_path / "q.parquet", [{"query_id": one, "query": f"what is {one}"} for one in queries])
    write(tmp_path / "c" / "0.parquet", [{"doc_id": one, "text": "t"} for one in documents[:31]], row_group_size=7)
    write(tmp_path / "c" / "1.parquet", [{"doc_id": one, "text": "t"} for one in documents[31:]])
    given = {"run": "run", "queries": "q.parquet", "corpus": "c"}
    found = [find_source(kind, [str(tmp_path / path)], {}, {}) for kind, path in given.items()]
    expected = naive(rows, queries, documents, depth)
    with spill.Spill() as disk:
        made = join.join_run(found[0], found[1], found[2], depth, 1.0, {}, disk)
        details = [made.details(unit) for unit in made.units]
        wanted = [made.wanted(piece) for piece in range(len(made.pieces))]
    ids = [query for one in details for query in one.queries["query_id"].to_pylist()]
    assert ids == [str(query) for query in expected["rows"]]
    assert [int(pairs) for one in details for pairs in one.pairs] == [len(kept) for kept in expected["rows"].values()]
    in_order = [row for kept in expected["rows"].values() for row in kept]
    row_of = {document: number for number, document in enumerate(documents)}
    assert [int(row) for one in details for row in one.documents] == [row_of[row["doc_id"]] for row in in_order]
    ranks = [row.get("rank", i + 1) for kept in expected["rows"].values() for i, row in enumerate(kept)]
    assert [int(rank) for one in details for rank in one.ranks] == ranks
    if "score" in rows[0]:
        assert all(one.scores is not None and one.scores.dtype == np.float32 for one in details)
        scores = np.concatenate([one.scores for one in details if one.scores is not None])
        assert np.array_equal(scores, np.array([row["score"] for row in in_order], np.float32), equal_nan=True)
    else:
        assert all(one.scores is None for one in details)
    needs = {(int(row), number) for number, one in enumerate(details) for row in one.documents}
    told = [
        (int(start + row), int(shard))
        for start, (some, shards) in zip(made.starts, wanted, strict=False)
        for row, shard in zip(some, shards, strict=True)
    ]
    assert told == sorted(needs)
    assert made.needed.tolist() == [len(some) for some, _ in wanted]
    assert made.counts["candidates_cut"] == expected["cut"]
    assert made.counts["missing_candidates"] == expected["lost"]
    assert made.counts["documents"] == len({row["doc_id"] for row in in_order})
    assert {name: set(ids) for name, ids in made.missing.items()} == {
        name: {str(one) for one in ids} for name, ids in expected["missing"].items()
    }
    first = {str(row["doc_id"]): None for row in rows}
    assert made.missing["documents"] == [one for one in first if one in made.missing["documents"]]


@pytest.mark.parametrize("seed", range(6))
def test_repeated_candidates_are_counted_and_placed(seed: int, tmp_path: Path, chunks: None) -> None:
    """In a run, with a document that the corpus has or lacks, and in a flat input."""
    rows, queries, documents, _ = inputs(seed, "strings")
    random = np.random.default_rng(seed)
    for number in random.choice(len(rows), 3, replace=False):
        rows.insert(int(random.integers(0, len(rows))), rows[number])
    seen = Counter((row["query_id"], row["doc_id"]) for row in rows)
    order = {query: number for number, query in enumerate(dict.fromkeys(row["query_id"] for row in rows))}
    places: dict[Any, list[int]] = {}
    for number, row in enumerate(rows):
        places.setdefault((row["query_id"], row["doc_id"]), []).append(number)
    query, document = min((one for one in seen if seen[one] > 1), key=lambda one: (order[one[0]], places[one][0]))
    first, second = places[query, document][:2]
    many = sum(seen.values()) - len(seen)
    message = rf"'{query}' has doc_id '{document}' twice.*: \S+ row {first} and \S+ row {second} \({many} such rows\)"
    full = [{"query": "q", "text": "t", **row} for row in rows]
    write(tmp_path / "f.parquet", full, row_group_size=13)
    write(tmp_path / "q.parquet", [{"query_id": one, "query": "q"} for one in queries])
    write(tmp_path / "c.parquet", [{"doc_id": one, "text": "t"} for one in documents])
    run = find_source("run", [str(tmp_path / "f.parquet")], {}, {})
    others = [find_source(kind, [str(tmp_path / f"{kind[0]}.parquet")], {}, {}) for kind in ("queries", "corpus")]
    with spill.Spill() as disk, pytest.raises(InputError, match=message):
        join.join_run(run, others[0], others[1], 2, 1.0, {}, disk)
    with spill.Spill() as disk, pytest.raises(InputError, match=message):
        join.join_flat(run, {}, disk)


def test_fingerprints_tell_ids_apart_and_find_them() -> None:
    ids = [*STRANGE, *(f"document-{i}" for i in range(5000)), "\0" * 3]
    prints = Fingerprints()
    found = know([pa.array(ids[:7], pa.large_string()), pa.array(["-", *ids[7:]], pa.large_string())[1:]], prints)
    assert isinstance(found, known.Known)
    asked = [*reversed(ids), "document-5000", "\0" * 4, " "]
    rows = found.rows_of(prints.of(pa.array(asked, pa.large_string())))
    assert rows.tolist() == [*reversed(range(len(ids))), -1, -1, -1]
    assert found.first.to_pylist() == ids[:4]
    assert know([], prints).rows_of(prints.of(pa.array(["a"], pa.large_string()))).tolist() == [-1]  # type: ignore[union-attr]
    twice = know([pa.array(["a", "b", "c", "b", "a", "b"], pa.large_string())], prints)
    assert twice == Repeated(2, (0, 4))


def test_ids_of_one_half_fingerprint_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first sums are made alike; the second ones still tell."""
    real = Fingerprints.of

    def alike(self: Fingerprints, ids: pa.Array) -> known.UInt64:
        high, low = real(self, ids)
        return np.array([high % np.uint64(3), low])

    monkeypatch.setattr(Fingerprints, "of", alike)
    prints, ids = Fingerprints(), pa.array([f"d{i}" for i in range(100)], pa.large_string())
    found = know([ids], prints)
    assert isinstance(found, known.Known) and found.alike > 20
    assert found.rows_of(prints.of(ids)).tolist() == list(range(100))


def test_temporary_files_are_counted_and_have_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    """So nothing is left of them, however the process ends."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with spill.Spill() as disk:
        column = disk.column(np.int64)
        column.append(np.arange(10))
        column.append(np.arange(5))
        assert (len(column), column.read(8, 12).tolist()) == (15, [8, 9, 0, 1])
        disk.say()
        assert any(f"120 bytes to temporary files in {tmp_path}" in message for message in logged)
        assert not list(tmp_path.iterdir())
        seen = os.fstat(column._file.fileno())
        assert (seen.st_nlink, seen.st_dev, seen.st_size) == (0, tmp_path.stat().st_dev, 120)
    assert column._file.closed


def test_a_full_disk_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Linux has a file on which every write finds the disk full."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with spill.Spill() as disk:
        column = disk.column(np.int64)
        with open("/dev/full", "wb", buffering=0) as full:
            monkeypatch.setattr(column, "_file", full)
            with pytest.raises(StorageError, match=r"No space left on device.*60 bytes a candidate.*set TMPDIR"):
                column.append(np.arange(3))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with spill.Spill() as disk, pytest.raises(StorageError, match=rf"{os.strerror(errno.ENOENT)}.*set TMPDIR"):
        disk.column(np.int64)
