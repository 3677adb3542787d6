"""Which row of a corpus, or of a scattered flat input, goes to which staged shard.

Ids only: no text passes here but the queries' own. Candidates lie in temporary files (spill.py), documents are known by
their fingerprints (known.py): the driver holds 20 bytes a document of the corpus and the queries with their ids. Ids
are large strings: together they may be more than 2 GiB.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batch_rerank.errors import InputError
from batch_rerank.input import candidates
from batch_rerank.input.candidates import Int32, Int64, Run, ids_of, order_of, positions, read_all, read_run
from batch_rerank.input.join_checks import (
    Twice,
    files_of,
    refuse_missing,
    refuse_padded_documents,
    refuse_repeated,
    refuse_repeated_ids,
    refuse_repeated_rows,
    refuse_spaces,
    refuse_unranked,
)
from batch_rerank.input.known import Fingerprints, Repeated, know
from batch_rerank.input.sources import Piece, Source, pieces
from batch_rerank.input.spill import Column, Records, Sorted, Spill
from batch_rerank.input.units import cut_units
from batch_rerank.store.filesystem import Options
from batch_rerank.store.plans import Unit

log = logging.getLogger("batch_rerank")
SHARD_PAIRS = 50_000
"""Candidates of a staged shard: some 50 MB of text, which one task holds, and three or four read tasks of a job."""


@dataclass(frozen=True)
class Ranked:
    """The candidates of one staged shard.

    Its queries' rows, how many candidates each has, and of every candidate the
    number of its document's row in the corpus, its first-stage score and its rank."""

    queries: pa.Table
    pairs: Int64
    documents: Int32
    scores: npt.NDArray[np.float32] | None
    ranks: Int32


@dataclass(frozen=True)
class Join:
    """How the rows of `pieces` are spread over shards. Rows are numbered through all; `starts` int64[pieces + 1].

    needed: int64[pieces], how many pairs of a row and a shard a piece has; wanted: the rows of one piece that are
    needed, counted from its first, and where, ascending; units: the shards; details: what a shard's task needs besides;
    missing: what the run names and the sources lack. `wanted` and `details` read the files of the join's Spill.
    """

    pieces: list[Piece]
    starts: Int64
    needed: Int64
    wanted: Callable[[int], tuple[Int32, Int32]]
    units: list[Unit]
    details: Callable[[Unit], Ranked | pa.Array]
    counts: dict[str, int]
    missing: dict[str, list[str]] = field(default_factory=dict)


def join_run(
    run: Source, queries: Source, corpus: Source, depth: int | None, max_missing: float, options: Options, spill: Spill
) -> Join:
    """Join a run with its queries and its corpus, by id. Queries are in the order of their first candidate, candidates
    by rank: the run's, else that of their scores, else their order.

    Raises InputError: an empty run, no queries, a candidate twice, ids that differ by space only, more than
    `max_missing` of the candidates without a document or a query. Raises StorageError where the temporary directory is
    full.
    """
    read = read_all(queries, ("query_id", "query", "instruction"), options)
    if not any(len(table) for table in read):
        raise InputError(
            f"input.queries: {files_of(queries)} has no queries; expected at least one; check what wrote the file"
        )
    asked = pa.concat_tables(read).combine_chunks()
    corpus_pieces = pieces(corpus)
    starts = np.zeros(len(corpus_pieces) + 1, np.int64)
    known = know(ids_of(corpus, corpus_pieces, "doc_id", options, starts), Fingerprints())
    refuse_repeated_ids(asked["query_id"], queries, options)
    if isinstance(known, Repeated):
        refuse_repeated_rows(known, corpus, options)
    found = read_run(run, options, spill, known)
    if not len(found.column):
        raise InputError(f"input.run: {files_of(run)} has no candidates; expected at least one; check the first stage")
    refuse_spaces("query_id", found.queries, asked["query_id"], run, queries)
    refuse_padded_documents(found, known, run, corpus, options)

    query_row = _rows_of(found.queries, asked["query_id"])
    ranked = _rank(found, query_row, depth, len(known), spill)
    if ranked.twice.count:
        refuse_repeated(found, ranked.twice, run, options)
    refuse_unranked(found, run, options)
    missing = {
        "queries": found.queries.take(pa.array(np.flatnonzero(ranked.lost_queries))),
        "documents": found.lost.take(pa.array(np.flatnonzero(ranked.lost_documents))),
    }
    every = {"queries": found.queries, "documents": found.lost if not found.used.any() else None}
    first = {"queries": asked["query_id"], "documents": known.first}
    lost, total = ranked.lost, int(found.pairs.sum()) - ranked.cut
    refuse_missing(lost, total, missing, max_missing, every, first, (queries, corpus))

    present = np.flatnonzero(ranked.pairs)
    pairs = ranked.pairs[present]
    units, borders = _shards(pairs)
    ends = np.concatenate([[0], np.cumsum(pairs)])
    if "instruction" in asked.column_names and asked["instruction"].null_count == len(asked):
        asked = asked.drop_columns("instruction")  # a JSONL file is read as if it might have one
    column = ranked.column
    needs = _needs(_by_shard(column, ends[borders]), starts, len(units), spill)
    spill.say()

    def details(unit: Unit) -> Ranked:
        records = column.read(int(ends[unit.start]), int(ends[unit.stop]))
        counts = pairs[unit.start : unit.stop]
        numbers = {name: np.ascontiguousarray(records[name]) for name in records.dtype.names or ()}
        return Ranked(
            asked.take(pa.array(query_row[present[unit.start : unit.stop]])),
            counts,
            numbers["document"],
            numbers.get("score"),
            numbers["rank"] if "rank" in numbers else positions(counts),
        )

    def wanted(piece: int) -> tuple[Int32, Int32]:
        keys = np.sort(needs.read(piece))
        rows, shards = np.divmod(keys, max(1, len(units)))
        return (rows - starts[piece]).astype(np.int32), shards.astype(np.int32)

    return Join(
        pieces=corpus_pieces,
        starts=starts,
        needed=needs.counts,
        wanted=wanted,
        units=units,
        details=details,
        counts={
            "queries": len(present),
            "candidates": len(column),
            "documents": ranked.documents,
            "corpus": len(known),
            "candidates_cut": ranked.cut,
            "queries_without_candidates": len(asked) - len(present),
            "missing_candidates": lost,
            "missing_documents": len(missing["documents"]),
            "missing_queries": len(missing["queries"]),
        },
        missing={name: ids.to_pylist() for name, ids in missing.items()},
    )


def join_flat(source: Source, options: Options, spill: Spill) -> Join:
    """Group a flat input by query_id. Queries are in the order of their first row, rows keep their order.

    Raises InputError for a candidate that is there twice, StorageError where the temporary directory is full.
    """
    found = read_run(source, options, spill)
    if not len(found.column):
        raise InputError(f"input.path: {files_of(source)} has no rows; there is nothing to stage")
    twice = Twice()
    for records in found.buckets(spill):
        twice.look(found, records)
    if twice.count:
        refuse_repeated(found, twice, source, options)
    units, borders = _shards(found.pairs)
    shard_of_query = np.repeat(np.arange(len(units), dtype=np.int32), np.diff(borders))
    spill.say()

    def wanted(piece: int) -> tuple[Int32, Int32]:
        start, stop = found.starts[piece : piece + 2].tolist()
        return np.arange(stop - start, dtype=np.int32), shard_of_query[found.column.read(start, stop)["query"]]

    return Join(
        pieces=found.pieces,
        starts=found.starts,
        needed=np.diff(found.starts),
        wanted=wanted,
        units=units,
        details=lambda unit: found.queries[unit.start : unit.stop],
        counts={"queries": len(found.queries), "candidates": len(found.column)},
    )


@dataclass
class _Candidates:
    """What is left of a run, in the order of the stage: document int32, the row in the corpus, score and rank where the
    run has them. pairs: int64[queries]; cut, lost: how many candidates are not there; lost_queries, lost_documents:
    bool, which ids the sources lack; documents: how many distinct ones are left; twice: candidates that repeat."""

    column: Column
    pairs: Int64
    cut: int
    lost: int
    lost_queries: npt.NDArray[np.bool_]
    lost_documents: npt.NDArray[np.bool_]
    documents: int
    twice: Twice


def _rank(run: Run, query_row: Int32, depth: int | None, corpus: int, spill: Spill) -> _Candidates:
    """Order the candidates by query and rank, keep `depth` of each query, and drop those without query or document.

    Where a query's ranks repeat (trec_eval ignores them, so tools write 0 or 1 in every line) they are its places."""
    kept = [name for name in run.names if name != "query"]
    # ordered as they are, scores are written as float32
    column = spill.column([(name, np.float32 if name == "score" else run.column.kind[name]) for name in kept])
    pairs, used = np.zeros(len(run.pairs), np.int64), np.zeros(corpus, np.bool_)
    lost_queries, lost_documents = np.zeros(len(run.pairs), np.bool_), np.zeros(len(run.lost), np.bool_)
    cut = lost = repeating = 0
    twice = Twice()
    for records in run.buckets(spill):
        twice.look(run, records)
        order = order_of(records["query"], *(records[name] if name in kept else None for name in ("score", "rank")))
        if order is not None:
            records = records[order]
        query = records["query"]
        places = positions(np.diff(np.flatnonzero(np.diff(query, prepend=-1, append=-1))))
        if "rank" in kept:
            repeating += _rank_by_place(records, places)
        if depth is not None:
            chosen = places <= depth
            cut += len(chosen) - int(chosen.sum())
            records, query = records[chosen], query[chosen]
        no_query, no_document = query_row[query] < 0, records["document"] < 0
        lost_queries[query[no_query]] = True
        lost_documents[run.lacked[-1 - records["document"][no_document]]] = True
        left = ~(no_query | no_document)
        lost += len(left) - int(left.sum())
        records = records[left]
        used[records["document"]] = True
        counts = np.bincount(records["query"])
        pairs[: len(counts)] += counts
        with np.errstate(over="ignore"):
            column.append(records[kept].astype(column.kind))
    if repeating:
        then = "score" if "score" in kept else "the order of the rows"
        log.info("ranks repeat in %s queries of the run: ordered by rank, then %s", f"{repeating:,}", then)
    return _Candidates(column, pairs, cut, lost, lost_queries, lost_documents, int(used.sum()), twice)


def _rank_by_place(records: Records, places: Int32) -> int:
    """Give the candidates of those queries whose ranks repeat their places, which are in order; how many queries."""
    query, rank = records["query"], records["rank"]
    again = query[1:][(query[1:] == query[:-1]) & (rank[1:] == rank[:-1])]
    if not len(again):
        return 0
    repeating = np.zeros(int(query[-1]) + 1, np.bool_)
    repeating[again] = True
    here = repeating[query]
    rank[here] = places[here]
    return int(repeating.sum())


def _by_shard(column: Column, stops: Int64) -> Iterator[tuple[Int32, Int32]]:
    """The documents and the shards of some whole shards' candidates at a time; `stops` int64[shards + 1]."""
    first = 0
    while first < len(stops) - 1:
        last = max(first + 1, int(np.searchsorted(stops, stops[first] + candidates.BUCKET, side="right")) - 1)
        rows = column.read(int(stops[first]), int(stops[last]))["document"]
        yield rows, np.repeat(np.arange(first, last, dtype=np.int32), np.diff(stops[first : last + 1]))
        first = last


def _needs(some: Iterator[tuple[Int32, Int32]], starts: Int64, shards: int, spill: Spill) -> Sorted:
    """Distinct row * shards + shard by the pieces of `starts`. Each shard is in one of `some`."""
    needs = Sorted(spill, np.int64, starts * shards)
    for row, shard in some:
        keys = row.astype(np.int64)
        keys *= shards
        keys += shard
        keys.sort()  # not np.unique: in numpy 2.4 it takes 100 times a sort
        keys = keys[np.concatenate([[True], keys[1:] != keys[:-1]])] if len(keys) else keys
        needs.add(keys, keys)
    return needs


def _rows_of(ids: pa.Array, known: pa.ChunkedArray) -> Int32:
    """int32[n]: the row at which each id is known, -1 where it is not. The fewer ones, those of the run, are hashed."""
    rows = np.full(len(ids), -1, np.int32)
    first = 0
    for chunk in pc.index_in(known, value_set=ids).chunks:
        found = pc.fill_null(chunk, -1).to_numpy(zero_copy_only=False)
        here = np.flatnonzero(found >= 0)
        rows[found[here]] = first + here
        first += len(found)
    return rows


def _shards(pairs: Int64) -> tuple[list[Unit], Int64]:
    """Whole queries in shards of about SHARD_PAIRS, as units whose rows are queries; and the borders between them."""
    borders = np.array(cut_units(pairs, np.arange(len(pairs) + 1), [], SHARD_PAIRS), np.int64)
    units = [
        Unit(f"{index:05d}", 0, int(first), int(last), int(last - first), int(pairs[first:last].sum()))
        for index, (first, last) in enumerate(pairwise(borders.tolist()))
    ]
    return units, borders
