"""Sums of receipts' shapes as what is drawn: bins of equal, round width over the range where nearly all values lie."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from batch_rerank.report.svg import ceiling, ticks
from batch_rerank.store.shapes import PLACES, RELEVANCE_BINS, SCORES, TOKENS, Counts, Scale, Shape

BINS = 48
"""At most, of scores."""

OUTSIDE = 0.0005
"""Share of the scores at either end that may lie beyond what is drawn; they are counted in the outermost bins."""

Json = dict[str, Any]


def scores_of(shape: Shape, earlier: Shape | None) -> Json | None:
    """Scores tonight, and those of an earlier output in the same bins."""
    if not shape.count:
        return None
    shapes = [shape] + ([earlier] if earlier is not None and earlier.count else [])
    low, high = _range(shapes)
    width = ceiling((high - low) / BINS) if high > low else max(abs(low) / 16, 1e-6)
    first = math.floor(low / width + 1e-9)
    number = max(1, math.ceil(high / width - 1e-9) - first)
    made: Json = {"low": first * width, "width": width, "counts": _linear(shape.scores, first * width, width, number)}
    if len(shapes) > 1:
        made["earlier"] = _linear(shapes[1].scores, first * width, width, number)
    return {**made, **moments(shape)}


def moments(shape: Shape) -> Json:
    """What is known of the scores exactly, and their quartiles as near as the bins tell them."""
    if not shape.count:
        return {"count": 0}
    mean = shape.total / shape.count
    return {
        "count": shape.count,
        "mean": mean,
        "deviation": math.sqrt(max(0.0, shape.squares / shape.count - mean**2)),
        "least": shape.least,
        "most": shape.most,
        **{name: _quantile(shape, SCORES, part) for name, part in (("lower", 0.25), ("median", 0.5), ("upper", 0.75))},
    }


def _range(shapes: Sequence[Shape]) -> tuple[float, float]:
    lows = [max(shape.least, _quantile(shape, SCORES, OUTSIDE)) for shape in shapes]
    highs = [min(shape.most, _quantile(shape, SCORES, 1 - OUTSIDE)) for shape in shapes]
    return min(lows), max(highs)


def _quantile(shape: Shape, scale: Scale, part: float) -> float:
    counts = sorted(shape.scores.items())
    wanted, seen = part * sum(count for _, count in counts), 0.0
    for bin_, count in counts:
        if seen + count >= wanted:
            low, high = scale.edges(bin_)
            at = low + (high - low) * max(0.0, (wanted - seen) / count)
            return min(max(at, shape.least), shape.most)
        seen += count
    return shape.most


def _linear(counts: Counts, low: float, width: float, number: int) -> list[float]:
    """Counts in `number` bins of one width; a bin of a receipt is spread over those that it touches."""
    made = [0.0] * number
    for bin_, count in counts.items():
        start, stop = SCORES.edges(bin_)
        left, right = (start - low) / width, (stop - low) / width
        if right <= 1 or number == 1:
            made[0] += count
            continue
        if left >= number - 1:
            made[-1] += count
            continue
        for place in range(max(0, math.floor(left)), min(number, math.ceil(right))):
            covered = min(right, place + 1) - max(left, place)
            made[place] += count * covered / (right - left)
        beyond = max(0.0, -left) + max(0.0, right - number)
        if beyond:
            made[0 if left < 0 else -1] += count * beyond / (right - left)
    return [round(value, 2) for value in made]


def relevance_of(shape: Shape) -> list[int] | None:
    """Twenty bins from 0 to 1; None where the model has no such map."""
    return [shape.relevance.get(bin_, 0) for bin_ in range(RELEVANCE_BINS)] if shape.relevance else None


def tokens_of(shape: Shape) -> list[list[int]] | None:
    """From, to (included) and how many pairs, bin by bin without a gap."""
    if not shape.tokens:
        return None
    made: dict[tuple[int, int], int] = {}
    for bin_ in range(max(0, min(shape.tokens)), max(shape.tokens) + 1):
        low, high = (0.0, 0.0) if bin_ == 0 else TOKENS.edges(bin_)
        first, last = math.ceil(low), math.ceil(high) - 1
        if last >= first or bin_ == 0:
            made[first, max(first, last)] = shape.tokens.get(bin_, 0)
    return [[first, last, count] for (first, last), count in made.items()]


def places_of(shape: Shape) -> list[list[int]] | None:
    """From, to and how many candidates, of places lost (negative) to places gained."""
    if not shape.places:
        return None
    far = max(abs(bin_) for bin_ in shape.places)
    made = []
    for bin_ in range(-far, far + 1):
        if bin_ == 0:
            made.append([0, 0, shape.places.get(0, 0)])
            continue
        low, high = PLACES.edges(abs(bin_))
        first, last = math.ceil(low), math.ceil(high) - 1
        if last >= first >= 1:
            near, further = (first, last) if bin_ > 0 else (-last, -first)
            made.append([near, further, shape.places.get(bin_, 0)])
    return made


def agreement_of(shape: Shape) -> Json:
    """Means over queries of how far the new order agrees with the first stage's, and their distribution."""
    overlaps, rbos = (sum(counts.values()) for counts in (shape.overlap, shape.rbo))
    return {
        "overlap_at_10": shape.overlap_total / overlaps if overlaps else None,
        "overlap_queries": overlaps,
        "overlap_counts": [shape.overlap.get(bin_, 0) for bin_ in range(11)] if overlaps else None,
        "rbo": shape.rbo_total / rbos if rbos else None,
        "rbo_queries": rbos,
        "tau": shape.tau_total / shape.taus if shape.taus else None,
        "tau_queries": shape.taus,
    }


def score_ticks(scores: Mapping[str, Any]) -> list[float]:
    """Where an axis under a histogram of scores has numbers."""
    low = float(scores["low"])
    return ticks(low, low + float(scores["width"]) * len(scores["counts"]))
