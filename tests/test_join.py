"""The driver's join in numbers: order, codes, ids of more than 2 GiB together."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_stage import given_as, job_of, run_rows

from batch_rerank.errors import InputError
from batch_rerank.input import candidates, join, join_checks, known, sources
from batch_rerank.input.exchange import Spread, _read
from batch_rerank.input.known import Fingerprints, know
from batch_rerank.input.sources import Source, pieces, read_piece
from batch_rerank.input.spill import Spill
from batch_rerank.input.stage_sources import find_sources
from batch_rerank.store.filesystem import File

SOURCE = Source("corpus", "parquet", [("c.parquet", File("c.parquet", 1, ""))], {})


def ids_of_more_than_2_gib() -> pa.ChunkedArray:
    """33 chunks of one buffer of 64 MiB; the last one begins with a space."""
    size = 2**26
    data = pa.py_buffer(b" " + b"a" * (size - 1))
    offsets = [np.array([1, size], np.int64)] * 32 + [np.array([0, size], np.int64)]
    chunks = [pa.LargeStringArray.from_buffers(1, pa.py_buffer(one), data) for one in offsets]
    return pa.chunked_array(chunks)


def test_ids_of_more_than_2_gib_are_joined() -> None:
    known = ids_of_more_than_2_gib()
    assert known.nbytes > 2**31
    ids = pa.array(["b", known[0].as_py()], pa.large_string())
    assert join._rows_of(ids, known).tolist() == [-1, 31]
    with pytest.raises(InputError, match="only by space around it"):
        join_checks.refuse_spaces("doc_id", ids, known, SOURCE, SOURCE)
    join_checks.refuse_spaces("doc_id", ids, known.slice(0, 32), SOURCE, SOURCE)


@pytest.mark.parametrize("layout", ["run of Parquet", "run of JSONL", "beir", "scattered flat"])
def test_every_id_and_text_that_is_put_together_has_large_offsets(layout: str, tmp_path: Path) -> None:
    """Chunks of strings with small offsets cannot be concatenated beyond 2 GiB."""
    config = job_of(given_as(layout, tmp_path / "in"), tmp_path / "out")
    found = find_sources(config)
    large = {"query_id", "query", "doc_id", "text", "title", "instruction"}
    for source in found:
        for piece in pieces(source):
            for table in read_piece(source, piece, list(large), {}):
                assert {field.name: field.type for field in table.schema if field.name in large} == dict.fromkeys(
                    set(table.column_names) & large, pa.large_string()
                )
    piece = pieces(found[-1])[0]
    for table in _read(Spread(0, found[-1], piece, 0, np.empty(0, np.int32), np.empty(0, np.int32)), config):
        assert {field.type for field in table.schema if field.name in large} == {pa.large_string()}
    if layout != "scattered flat":
        assert {ids.type for ids in candidates.ids_of(found[-1], pieces(found[-1]), "doc_id", {})} == {
            pa.large_string()
        }
        with Spill() as spill:
            run = candidates.read_run(found[0], {}, spill, know([], Fingerprints()))
        assert {run.queries.type, run.lost.type} == {pa.large_string()}
        assert len(run.lost) == len({row["doc_id"] for row in run_rows()})


@pytest.mark.parametrize("merge", [1, 7, 10_000])
def test_codes_are_in_the_order_of_first_appearance(merge: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "MERGE_VALUES", merge)
    random = np.random.default_rng(0)
    values = [str(one) for one in random.integers(0, 60, 500)]
    codes = candidates.Codes()
    cuts = [0, *sorted(random.integers(0, 500, 30).tolist()), 500]
    for start, stop in pairwise(cuts):
        codes.add(pa.array(values[start:stop], pa.large_string()).dictionary_encode())
    distinct, found = codes.result()
    assert distinct.to_pylist() == list(dict.fromkeys(values))
    assert [distinct[int(code)].as_py() for code in found] == values
    assert found.dtype == np.int32


@pytest.mark.parametrize("ranked", [True, False])
@pytest.mark.parametrize("scored", [True, False])
@pytest.mark.parametrize("ordered", [True, False])
def test_candidates_are_ordered_by_query_rank_and_score(ranked: bool, scored: bool, ordered: bool) -> None:
    """Against three keys; ranks and scores tie, scores are of either sign, zero, infinite, and alike as float32."""
    random = np.random.default_rng(1)
    for size in range(40):
        query = np.sort(random.integers(0, 5, size)).astype(np.int32)
        rank = random.integers(-3, 9, size).astype(np.int32) if ranked else None
        pool = np.array([1.5, 1.5 + 1e-12, -2.5, 0.0, -0.0, 3e38, -1e39, 1e-45, -1e-50, np.inf, -np.inf])
        score = random.choice(pool, size) if scored else None
        keys = (
            np.zeros(size) if score is None else -score,
            np.zeros(size) if rank is None else rank,
            query,
        )
        if ordered:
            first = np.lexsort(keys)
            rank, score = (None if one is None else one[first] for one in (rank, score))
        else:
            query = random.permutation(query)
        keys = (np.zeros(size) if score is None else -score, np.zeros(size) if rank is None else rank, query)
        expected = np.lexsort(keys)
        found = candidates.order_of(query, score, rank)
        assert (np.arange(size) if found is None else found).tolist() == expected.tolist()


def test_what_a_piece_is_asked_for_is_what_its_rows_are_needed_for() -> None:
    random = np.random.default_rng(2)
    shard = np.sort(random.integers(0, 6, 400)).astype(np.int32)
    row = random.integers(0, 50, 400).astype(np.int32)
    starts = np.array([0, 13, 13, 50], np.int64)
    some = [(row[shard // 2 == two], shard[shard // 2 == two]) for two in range(3)]
    with Spill() as spill:
        needs = join._needs(iter(some), starts, 6, spill)
        found = [divmod(int(key), 6) for piece in range(3) for key in np.sort(needs.read(piece))]
        counts = needs.counts.tolist()
    expected = sorted(set(zip(row.tolist(), shard.tolist(), strict=True)))
    assert found == expected
    assert counts == [sum(r < 13 for r, _ in expected), 0, sum(r >= 13 for r, _ in expected)]


def test_a_corpus_of_more_rows_than_their_numbers_go_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [pa.array(["a", "b"], pa.large_string()), pa.array(["c"], pa.large_string())]
    monkeypatch.setattr(known, "MOST_ROWS", 3)
    assert len(know(ids, Fingerprints()).rows) == 3
    monkeypatch.setattr(known, "MOST_ROWS", 2)
    with pytest.raises(InputError, match="more than 2 documents"):
        know(ids, Fingerprints())


def test_a_corpus_of_two_files_has_one_numbering(tmp_path: Path) -> None:
    for number in range(2):
        table = pa.table({"doc_id": [f"d{number}-{i}" for i in range(5)], "text": ["x"] * 5})
        pq.write_table(table, tmp_path / f"{number}.parquet", row_group_size=2)
    source = Source(
        "corpus",
        "parquet",
        [
            (str(path), File(str(path), path.stat().st_size, f"mtime:{path.stat().st_mtime}"))
            for path in sorted(tmp_path.iterdir())
        ],
        {"doc_id": "doc_id", "text": "text"},
        groups=[[sources.PIECE_BYTES] * 3] * 2,
    )
    starts = np.zeros(7, np.int64)
    ids = pa.chunked_array(candidates.ids_of(source, pieces(source), "doc_id", {}, starts))
    assert ids.to_pylist() == [f"d{number}-{i}" for number in range(2) for i in range(5)]
    assert starts.tolist() == [0, 2, 4, 5, 7, 9, 10]
