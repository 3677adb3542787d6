"""A scored unit to the distribution that its receipt keeps: how scores, lengths and places lie, in some 100 ns a pair.

Places are those of the scored candidates of a query among themselves, so an error row moves nobody. A pair's place by
score is where it is sorted to; one sort of 64-bit numbers (query, score, place in the first stage) does a whole unit.
"""

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.engine.packing import Float32
from batch_rerank.engine.scorer import relevance
from batch_rerank.score.steps import ScoredUnit
from batch_rerank.store.shapes import (
    PLACES,
    RBO_BINS,
    RELEVANCE_BINS,
    SCORES,
    TOKENS,
    Counts,
    Mover,
    Shape,
    equal_bins,
)

Int64 = npt.NDArray[np.int64]

P = 0.9
"""Of rank-biased overlap."""

DEPTH = 10
NAMED = 5
"""Queries of a unit of which the candidate that has moved most is named, in each direction."""

TAU_QUERIES, TAU_CANDIDATES = 4, 256
"""Of a unit whose Kendall's tau is counted, and of each of them: pairs of candidates grow with the square."""


def shape_of(unit: ScoredUnit, model: ModelSpec) -> str:
    """The shape of a unit, as text; empty where nothing was scored."""
    scores = unit.scores
    if not len(scores):
        return ""
    rows = np.flatnonzero(pc.is_null(unit.rows["error"]).to_numpy()) if len(unit.rows) > len(scores) else None
    query, rank = (_taken(unit.rows[name], rows) for name in ("query_index", "first_stage_rank"))
    relevant = relevance(model, scores)
    wide = scores.astype(np.float64)
    shape = Shape(
        scores=_counts(SCORES.of(scores)),
        relevance={} if relevant is None else _counts(equal_bins(relevant, RELEVANCE_BINS)),
        tokens=_counts(TOKENS.of(unit.n_tokens)),
        count=len(scores),
        total=float(wide.sum()),
        squares=float(np.square(wide).sum()),  # not a dot product: its threads would wait for others
        least=float(scores.min()),
        most=float(scores.max()),
    )
    _add_places(shape, query, rank, scores, rows)
    return shape.to_text()


def _taken(column: pa.ChunkedArray, rows: Int64 | None) -> Int64:
    values: Int64 = column.to_numpy().astype(np.int64)
    return values if rows is None else values[rows]


def _counts(bins: Int64) -> Counts:
    first = int(bins.min())
    counts = np.bincount(bins - first)
    found = np.flatnonzero(counts)
    return dict(zip((found + first).tolist(), counts[found].tolist(), strict=True))


def _add_places(shape: Shape, query: Int64, rank: Int64, scores: Float32, rows: Int64 | None) -> None:
    new = query[1:] != query[:-1]
    starts = np.concatenate([[0], np.flatnonzero(new) + 1])
    lengths = np.diff(starts, append=len(query))
    first = np.repeat(starts, lengths)
    place = np.arange(len(query)) - first  # of the sorted: queries stay where they are
    row, before = None, place
    if not (new | (rank[1:] > rank[:-1])).all():  # the rows are not in the first stage's order
        row = np.lexsort((np.arange(len(query)), rank, query))
        before = np.empty_like(place)
        before[row] = place
    was = _by_score(query, scores, before, int(lengths.max()))
    gained = was - place
    shape.places = _counts(PLACES.of(gained))
    shape.up = _movers(gained, starts, lengths, was, place, row, first, scores, rows)
    shape.down = _movers(-gained, starts, lengths, was, place, row, first, scores, rows)
    deep = lengths > DEPTH
    if deep.any():
        common = np.add.reduceat((was < DEPTH) & (place < DEPTH), starts, dtype=np.int64)[deep] / DEPTH
        shape.overlap_total = float(common.sum())
        shape.overlap = _counts(np.rint(common * DEPTH).astype(np.int64))
    several = lengths > 1
    if several.any():
        # RBO_EXT of two orders of the same n documents: their overlap at depth d has those with max(was, place) <= d
        weights = _weights(int(lengths.max()))
        reached = np.add.reduceat(weights[np.maximum(was, place)], starts)[several]
        n = lengths[several]
        rbo = np.minimum((1 - P) / P * (n * weights[n] - reached) + P**n, 1.0)
        shape.rbo, shape.rbo_total = _counts(equal_bins(rbo, RBO_BINS)), float(rbo.sum())
        chosen = np.flatnonzero(several)
        chosen = chosen[:: -(-len(chosen) // TAU_QUERIES)]
        for start, length in zip(starts[chosen].tolist(), lengths[chosen].tolist(), strict=True):
            shape.taus += 1
            shape.tau_total += _tau(was[start : start + length])


def _by_score(query: Int64, scores: Float32, before: Int64, longest: int) -> Int64:
    """int64[n]: of the best candidate of the first query, and so on, its place in the first stage."""
    bits = (scores + np.float32(0)).view(np.uint32)  # -0 ties with 0
    rising = np.where(bits >> 31, ~bits, bits | np.uint32(2**31))
    width = max(1, (longest - 1).bit_length())
    if int(query[-1]).bit_length() + 32 + width > 63:
        return before[np.lexsort((before, ~rising, query))]
    key = (query << (32 + width)) | ((~rising).astype(np.int64) << width) | before
    key.sort()
    return key & ((1 << width) - 1)


def _movers(
    moved: Int64,
    starts: Int64,
    lengths: Int64,
    was: Int64,
    place: Int64,
    row: Int64 | None,
    first: Int64,
    scores: Float32,
    rows: Int64 | None,
) -> tuple[Mover, ...]:
    """Of the queries with the largest moves the candidate that has moved most, the largest first."""
    largest = np.maximum.reduceat(moved, starts)
    found = []
    for query in np.argsort(-largest, kind="stable")[:NAMED].tolist():
        if largest[query] <= 0:
            break
        at = int(starts[query]) + int(moved[starts[query] : starts[query] + lengths[query]].argmax())
        one = int(first[at] + was[at])
        one = one if row is None else int(row[one])
        of_unit = one if rows is None else int(rows[one])
        found.append(Mover(of_unit, int(was[at]) + 1, int(place[at]) + 1, float(scores[one])))
    return tuple(found)


def _tau(was: Int64) -> float:
    """Kendall's tau of the places of one query, of candidates at even distances where there are many."""
    if len(was) > TAU_CANDIDATES:
        was = was[np.linspace(0, len(was) - 1, TAU_CANDIDATES).astype(np.int64)]
    small = was.astype(np.uint16) if was.max() < 2**16 else was
    n = len(small)
    wrong = np.count_nonzero((small[:, None] > small) & _later(n))
    return 1 - 4 * wrong / (n * (n - 1))


@lru_cache(maxsize=64)
def _later(n: int) -> npt.NDArray[np.bool_]:
    return np.triu(np.ones((n, n), np.bool_), 1)


@lru_cache(maxsize=4)
def _cumulated(size: int) -> npt.NDArray[np.float64]:
    depth = np.arange(1, size + 1, dtype=np.float64)
    return np.concatenate([[0.0], np.cumsum(P**depth / depth)])


def _weights(longest: int) -> npt.NDArray[np.float64]:
    """float64[m], m > longest: the sum of P^d / d up to each depth."""
    return _cumulated(1 << max(8, longest.bit_length()))
