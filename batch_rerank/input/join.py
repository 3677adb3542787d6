"""Which row of a corpus, or of a scattered flat input, goes to which staged shard.

Ids only: no text passes here but the queries' own. At its peak the driver holds some 40 bytes a candidate, the distinct
ids of the run and all ids of the corpus. Ids are large strings: together they may be more than 2 GiB.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batch_rerank.errors import InputError
from batch_rerank.input.candidates import Int32, Int64, ids_of, positions, rank_candidates, read_all, read_run
from batch_rerank.input.join_checks import (
    files_of,
    refuse_missing,
    refuse_repeated,
    refuse_repeated_ids,
    refuse_spaces,
    refuse_unranked,
)
from batch_rerank.input.sources import Piece, Source, pieces
from batch_rerank.input.units import cut_units
from batch_rerank.store.filesystem import Options
from batch_rerank.store.plans import Unit

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

    needs int64[n]: row * len(units) + shard for each row and a shard that needs it, ascending; units: the shards;
    details: what a shard's task needs besides; missing: what the run names and the sources lack.
    """

    pieces: list[Piece]
    starts: Int64
    needs: Int64
    units: list[Unit]
    details: Callable[[Unit], Ranked | pa.Array]
    counts: dict[str, int]
    missing: dict[str, list[str]] = field(default_factory=dict)

    @property
    def needed(self) -> Int64:
        """int64[pieces]: how many rows go to how many shards."""
        return np.diff(np.searchsorted(self.needs, self.starts * len(self.units)))

    def wanted(self, piece: int) -> tuple[Int32, Int32]:
        """The rows of one piece that are needed, counted from its first, and where."""
        first, last = np.searchsorted(self.needs, self.starts[piece : piece + 2] * len(self.units))
        rows, shards = np.divmod(self.needs[first:last], max(1, len(self.units)))
        return (rows - self.starts[piece]).astype(np.int32), shards.astype(np.int32)


def join_run(
    run: Source, queries: Source, corpus: Source, depth: int | None, max_missing: float, options: Options
) -> Join:
    """Join a run with its queries and its corpus, by id. Queries are in the order of their first candidate, candidates
    by rank: the run's, else that of their scores, else their order.

    Raises InputError: an empty run, a candidate twice, ids that differ by space only, more than `max_missing` of the
    candidates without a document or a query.
    """
    found = read_run(run, options)
    if not len(found.query):
        raise InputError(f"input.run: {files_of(run)} has no candidates; expected at least one; check the first stage")
    known = pa.concat_tables(read_all(queries, ("query_id", "query", "instruction"), options)).combine_chunks()
    corpus_pieces = pieces(corpus)
    ids, starts = ids_of(corpus, corpus_pieces, "doc_id", options)
    refuse_repeated_ids(known["query_id"], queries)
    refuse_repeated_ids(ids, corpus)
    refuse_spaces("query_id", found.queries, known["query_id"], run, queries)
    refuse_spaces("doc_id", found.documents, ids, run, corpus)
    refuse_repeated(found, run)
    refuse_unranked(found, run)

    query_row, document_row = _rows_of(found.queries, known["query_id"]), _rows_of(found.documents, ids)
    total = len(found.query)
    rank_candidates(found, depth)
    cut = total - len(found.query)
    lost = (query_row < 0)[found.query] | (document_row < 0)[found.document]
    missing = {
        "queries": found.queries.take(_used(found.query, query_row < 0)).to_pylist(),
        "documents": found.documents.take(_used(found.document, document_row < 0)).to_pylist(),
    }
    refuse_missing(int(lost.sum()), len(lost), missing, max_missing, (found, known["query_id"], ids), (queries, corpus))
    if lost.any():
        found.keep(~lost)

    pairs = np.bincount(found.query, minlength=len(found.queries)).astype(np.int64)
    present = np.flatnonzero(pairs)
    pairs = pairs[present]
    row = document_row[found.document]
    scores, ranks = found.score, found.rank
    del found  # of every candidate its row, score and rank are left
    units, borders = _shards(pairs)
    ends = np.concatenate([[0], np.cumsum(pairs)])
    if "instruction" in known.column_names and known["instruction"].null_count == len(known):
        known = known.drop_columns("instruction")  # a JSONL file is read as if it might have one

    def details(unit: Unit) -> Ranked:
        here = slice(int(ends[unit.start]), int(ends[unit.stop]))
        counts = pairs[unit.start : unit.stop]
        return Ranked(
            known.take(query_row[present[unit.start : unit.stop]]),
            counts,
            row[here],
            None if scores is None else scores[here],
            positions(counts) if ranks is None else ranks[here],
        )

    return Join(
        pieces=corpus_pieces,
        starts=starts,
        needs=_needs(row, np.repeat(np.arange(len(units), dtype=np.int32), np.diff(ends[borders])), len(units)),
        units=units,
        details=details,
        counts={
            "queries": len(present),
            "candidates": len(row),
            "documents": len(_used(row, np.ones(len(ids), np.bool_))),
            "corpus": len(ids),
            "candidates_cut": cut,
            "queries_without_candidates": len(known) - len(present),
            "missing_candidates": int(lost.sum()),
            "missing_documents": len(missing["documents"]),
            "missing_queries": len(missing["queries"]),
        },
        missing=missing,
    )


def join_flat(source: Source, options: Options) -> Join:
    """Group a flat input by query_id. Queries are in the order of their first row, rows keep their order.

    Raises InputError for a candidate that is there twice.
    """
    found = read_run(source, options)
    if not len(found.query):
        raise InputError(f"input.path: {files_of(source)} has no rows; there is nothing to stage")
    refuse_repeated(found, source)
    pairs = np.bincount(found.query, minlength=len(found.queries)).astype(np.int64)
    units, borders = _shards(pairs)
    shard_of_query = np.repeat(np.arange(len(units), dtype=np.int32), np.diff(borders))
    return Join(
        pieces=found.pieces,
        starts=found.starts,
        needs=np.arange(len(found.query), dtype=np.int64) * len(units) + shard_of_query[found.query],
        units=units,
        details=lambda unit: found.queries[unit.start : unit.stop],
        counts={"queries": len(found.queries), "candidates": len(found.query)},
    )


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


def _used(codes: Int32, among: npt.NDArray[np.bool_]) -> Int64:
    """The distinct codes, of those that `among` has, ascending."""
    used = np.zeros(len(among), np.bool_)
    used[codes] = True
    return np.flatnonzero(used & among)


def _needs(row: Int32, shard: Int32, shards: int) -> Int64:
    """Distinct row * shards + shard, ascending. Not np.unique: in numpy 2.4 it takes 100 times a sort."""
    keys = row.astype(np.int64)
    keys *= shards
    keys += shard
    keys.sort()
    return keys[np.concatenate([[True], keys[1:] != keys[:-1]])] if len(keys) else keys


def _shards(pairs: Int64) -> tuple[list[Unit], Int64]:
    """Whole queries in shards of about SHARD_PAIRS, as units whose rows are queries; and the borders between them."""
    borders = np.array(cut_units(pairs, np.arange(len(pairs) + 1), [], SHARD_PAIRS), np.int64)
    units = [
        Unit(f"{index:05d}", 0, int(first), int(last), int(last - first), int(pairs[first:last].sum()))
        for index, (first, last) in enumerate(pairwise(borders.tolist()))
    ]
    return units, borders
