"""Several teachers: other outputs over the same candidates, brought to the rows of the exported one and combined.

Outputs of different models have units of different sizes, so which of their units hold a query is looked up in an
index of their queries: 12 bytes each.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batch_rerank.calls import Each
from batch_rerank.label_settings import Teachers
from batch_rerank.labels.choose import Float64, Int64
from batch_rerank.labels.scores import Opened, Source, read_scores
from batch_rerank.schema import TEXT_HASH

UNITS_AT_ONCE = 64
"""Whose queries one task reads."""

UInt64 = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class QueryIndex:
    """Which unit of an output has a query: uint64[n] hashes of ids, sorted, and int64[n] numbers of units."""

    hashes: UInt64
    units: Int64

    def units_with(self, hashes: UInt64) -> list[int]:
        """The units that hold any of these queries, in order."""
        return sorted(set(self.units[np.isin(self.hashes, hashes)].tolist()))

    def hashes_of(self, units: Sequence[int]) -> UInt64:
        """The queries of some units."""
        return self.hashes[np.isin(self.units, np.asarray(units, np.int64))]


def index_queries(output: Opened, each: Each) -> QueryIndex:
    """Read the ids of all queries. Raises what `read_scores` raises."""
    units = output.plan.units
    groups = [units[start : start + UNITS_AT_ONCE] for start in range(0, len(units), UNITS_AT_ONCE)]
    number = {unit.id: index for index, unit in enumerate(units)}
    found = [(np.empty(0, np.uint64), np.empty(0, np.int64))]
    for one in each([partial(_queries, output.source(group)) for group in groups]):
        for unit, data in one:
            hashes = np.frombuffer(data, "<u8").astype(np.uint64)
            found.append((hashes, np.full(len(hashes), number[unit], np.int64)))
    hashes = np.concatenate([one for one, _ in found])
    order = np.argsort(hashes, kind="stable")
    return QueryIndex(hashes[order], np.concatenate([places for _, places in found])[order])


def _queries(source: Source) -> list[tuple[str, bytes]]:
    return [(unit.id, b"".join(map(query_hash, _distinct(rows)))) for unit, rows in read_scores(source)]


def _distinct(rows: pa.Table) -> list[str]:
    found: list[str] = pc.unique(rows["query_id"]).to_pylist()
    return found


def query_hash(query_id: str) -> bytes:
    """8 bytes of blake2b."""
    return hashlib.blake2b(query_id.encode(), digest_size=8).digest()


@dataclass(frozen=True)
class Combined:
    """score float64[n], NaN where a teacher has none; disagreement float64[n]; lacking bool[n]: rows that only other
    teachers lack, or have with another text; extra: rows of theirs, of the same queries, that the exported output does
    not have."""

    score: Float64
    disagreement: Float64
    lacking: npt.NDArray[np.bool_]
    extra: int


def combine(rows: pa.Table, query: Int64, others: Sequence[Source], settings: Teachers) -> Combined:
    """The scores of all teachers as one. query int64[n]: which query each row is of, rising from 0.

    Every mean over a query is over the candidates that all teachers have a score of.
    """
    columns, extra = [rows["score"].to_numpy()], 0
    ids = pc.unique(rows["query_id"])
    for source in others:
        score, more = _aligned(rows, ids, source)
        columns.append(score)
        extra += more
    scores = np.stack(columns)
    have = ~np.isnan(scores).any(axis=0)
    weights = np.asarray(settings.weights or [1.0] * len(columns), np.float64)
    weights = weights / weights.sum()
    made = np.full(scores.shape, np.nan)
    spread = made
    if settings.combine == "rank":
        made[:, have] = 1 - np.stack([_rank_shares(one[have], query[have]) for one in scores])
    else:
        spread = np.full(scores.shape, np.nan)
        spread[:, have] = np.stack([_standardised(one[have], query[have]) for one in scores])
        made = spread if settings.combine == "zscore" else np.where(have, scores, np.nan)
    with np.errstate(invalid="ignore"):
        apart = np.std(spread, axis=0)
    return Combined(weights @ made, apart, ~have & ~np.isnan(columns[0]), extra)


def _aligned(rows: pa.Table, ids: pa.Array, source: Source) -> tuple[Float64, int]:
    """A teacher's scores at the rows, NaN where it has none or scored another text; and how many of its rows of these
    queries are no rows."""
    pieces = [table.filter(pc.is_in(table["query_id"], ids)) for _, table in read_scores(source)]
    wanted = rows.select(["query_id", "doc_id"]).append_column("row", pa.array(np.arange(len(rows))))
    wanted = wanted.append_column("wanted_hash", rows[TEXT_HASH])
    score = np.full(len(rows), np.nan)
    if not pieces:
        return score, 0
    theirs = pa.concat_tables(pieces).select(["query_id", "doc_id", "score", TEXT_HASH])
    joined = theirs.join(wanted, keys=["query_id", "doc_id"], join_type="left outer")
    matched = joined.filter(pc.is_valid(joined["row"]))
    other = pc.fill_null(pc.not_equal(matched[TEXT_HASH], matched["wanted_hash"]), False).to_numpy()
    score[matched["row"].to_numpy()] = np.where(other, np.nan, matched["score"].to_numpy())
    return score, len(joined) - len(matched)


def _standardised(scores: Float64, query: Int64) -> Float64:
    """Minus the query's mean, over its standard deviation; 0 where all of a query are equal."""
    count = np.maximum(np.bincount(query), 1)
    mean = np.bincount(query, scores) / count
    apart = scores - mean[query]
    deviation = np.sqrt(np.bincount(query, apart**2) / count)
    deviation = np.where(deviation < 1e-9 * np.maximum(1, np.abs(mean)), 0, deviation)  # a mean is rounded
    width = deviation[query]
    return np.asarray(np.where(width > 0, apart / np.where(width > 0, width, 1), 0.0), np.float64)


def _rank_shares(scores: Float64, query: Int64) -> Float64:
    """0 for a query's best, 1 for its last; equal scores have the mean of their ranks."""
    order = np.lexsort((-scores, query))
    ordered, of = scores[order], query[order]
    starts = np.flatnonzero(np.diff(of, prepend=-1))
    lengths = np.diff(np.append(starts, len(of)))
    position = np.arange(len(of)) - np.repeat(starts, lengths)
    new = np.append(True, (ordered[1:] != ordered[:-1]) | (of[1:] != of[:-1])) if len(of) else np.empty(0, np.bool_)
    group = np.cumsum(new) - 1
    mean = np.bincount(group, position) / np.maximum(np.bincount(group), 1)
    shares = np.empty(len(scores))
    shares[order] = mean[group] / np.maximum(np.repeat(lengths, lengths) - 1, 1)
    return shares


def sources_of(outputs: Sequence[Opened], indexes: Sequence[QueryIndex], hashes: UInt64) -> list[Source]:
    """Of each further teacher, the units that hold some queries."""
    return [
        output.source([output.plan.units[one] for one in index.units_with(hashes)])
        for output, index in zip(outputs, indexes, strict=True)
    ]
