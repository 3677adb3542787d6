"""When each actor scored, out of the times in receipts: how fast the job was, who waited, and where nothing happened.

A receipt says when its unit was committed, to the second, and how long it was scored, so a unit's pairs are spread over
that time before its commit. A long time in which nobody scored, as between a crash and a resume, takes a sliver of the
axis and is named.
"""

import calendar
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from batch_rerank.store.receipts import Receipt

SLICES = 96
"""Of the time at most: none is shorter than the second to which receipts know it."""
MOST_ACTORS = 32
"""That are shown one by one."""

LEAST_GAP, GAP_SHARE = 30.0, 0.1
"""Seconds, and share of all other time, from which on nothing is called a gap."""

BREAK = 0.015
"""Of the axis, for a gap."""

Json = dict[str, Any]


@dataclass
class _Actor:
    name: str
    starts: list[float]
    stops: list[float]
    pairs: list[int]
    tokens: int = 0

    @property
    def busy(self) -> float:
        return sum(stop - start for start, stop in zip(self.starts, self.stops, strict=True))


def epoch(at: str) -> float | None:
    """Seconds since 1970 of a time in a record; None where it is none."""
    try:
        return float(calendar.timegm(time.strptime(at, "%Y-%m-%dT%H:%M:%SZ")))
    except ValueError:
        return None


def utc(seconds: float) -> str:
    """The reverse."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def timeline(receipts: Sequence[Receipt]) -> Json | None:
    """Pairs a second over time and every actor's busy share; None where receipts have no times."""
    actors: dict[str, _Actor] = {}
    unscored, of_none = 0, 0
    for receipt in receipts:
        stop = epoch(receipt.at)
        if stop is None:
            continue
        if not receipt.scorer:
            unscored, of_none = unscored + receipt.rows_in, of_none + 1
            continue
        actor = actors.setdefault(receipt.scorer, _Actor(_named(receipt), [], [], []))
        actor.starts.append(stop - max(receipt.seconds, 1e-3))
        actor.stops.append(stop)
        actor.pairs.append(receipt.scored - receipt.reused + receipt.audited)
        actor.tokens += receipt.tokens
    if not actors:
        return None
    ordered = sorted(actors.values(), key=lambda one: (one.name, min(one.starts)))
    spans, gaps = _spans([pair for one in ordered for pair in zip(one.starts, one.stops, strict=True)])
    axis = _Axis(spans)
    shown = sorted(ordered, key=lambda one: -sum(one.pairs))[:MOST_ACTORS]
    every = ([value for one in ordered for value in getattr(one, name)] for name in ("starts", "stops", "pairs"))
    rate = axis.spread(*every)
    seconds = axis.seconds_of_slices()
    return {
        "start": utc(spans[0][0]),
        "stop": utc(spans[-1][1]),
        "seconds": round(axis.seconds, 1),
        "edges": [round(edge, 5) for edge in axis.edges],
        "rate": [
            round(float(value), 2) for value in np.divide(rate, seconds, where=seconds > 0, out=np.zeros(axis.slices))
        ],
        "gaps": [{"at": utc(start), "seconds": round(stop - start)} for start, stop in gaps[:20]],
        "gap_marks": [round(mark, 5) for mark in axis.breaks[:20]],
        "actors": [_told(one, axis, seconds) for one in ordered if one in shown],
        "others": len(ordered) - len(shown),
        "reused_units": of_none,
        "reused_pairs": unscored,
    }


def _named(receipt: Receipt) -> str:
    return " · ".join(filter(None, (receipt.scorer.split(" ")[0], receipt.device)))


def _told(one: _Actor, axis: "_Axis", seconds: Any) -> Json:
    busy = axis.spread(one.starts, one.stops, [stop - start for start, stop in zip(one.starts, one.stops, strict=True)])
    share = np.divide(busy, seconds, where=seconds > 0, out=np.zeros(axis.slices))
    there = max(one.stops) - min(one.starts) - axis.gap_seconds(min(one.starts), max(one.stops))
    return {
        "name": one.name,
        "units": len(one.stops),
        "pairs": sum(one.pairs),
        "tokens": one.tokens,
        "busy_seconds": round(one.busy, 2),
        "seconds": round(there, 2),
        "idle_share": round(max(0.0, 1 - one.busy / there), 4) if there > 0 else None,
        "busy": [round(min(1.0, float(value)), 2) for value in share],
    }


def _spans(times: Sequence[tuple[float, float]]) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Stretches of time in which somebody scored, joined over what is no gap; and the gaps."""
    joined: list[list[float]] = []
    for start, stop in sorted(times):
        if joined and start <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], stop)
        else:
            joined.append([start, stop])
    scored = sum(stop - start for start, stop in joined)
    least = max(LEAST_GAP, GAP_SHARE * scored)
    spans = [joined[0]]
    for start, stop in joined[1:]:
        if start - spans[-1][1] >= least:
            spans.append([start, stop])
        else:
            spans[-1][1] = stop
    gaps = [(before[1], after[0]) for before, after in pairwise(spans)]
    return [(start, stop) for start, stop in spans], gaps


class _Axis:
    """Slices of time: those of each stretch are of one width, and a gap is a break between them."""

    def __init__(self, spans: Sequence[tuple[float, float]]) -> None:
        seconds = sum(stop - start for start, stop in spans)
        self.slices = int(min(SLICES, max(1, seconds)))
        if len(spans) > max(1, self.slices // 4):  # a job that was resumed very often: its gaps are time like any other
            spans = [(spans[0][0], spans[-1][1])]
        self._spans = spans
        self.seconds = sum(stop - start for start, stop in spans)
        room = 1 - BREAK * (len(spans) - 1)
        counts = [max(1, round(self.slices * (stop - start) / self.seconds)) for start, stop in spans]
        while sum(counts) != self.slices:
            largest = counts.index(max(counts))
            counts[largest] += 1 if sum(counts) < self.slices else -1
        self._times: list[tuple[float, float]] = []
        self.edges: list[float] = []
        self.breaks: list[float] = []
        at = 0.0
        for number, ((start, stop), count) in enumerate(zip(spans, counts, strict=True)):
            if number:
                self.breaks.append(at + BREAK / 2)
                at += BREAK
            width = room * (stop - start) / self.seconds
            for slice_ in range(count):
                self._times.append(tuple(start + (stop - start) * (slice_ + more) / count for more in (0, 1)))  # type: ignore[arg-type]
                self.edges += [at + width * (slice_ + more) / count for more in (0, 1)]
            at += width
        self._lows = np.array([low for low, _ in self._times])
        self._highs = np.array([high for _, high in self._times])

    def seconds_of_slices(self) -> Any:
        """float64[slices]."""
        return self._highs - self._lows

    def spread(self, starts: Sequence[float], stops: Sequence[float], values: Sequence[float]) -> Any:
        """float64[slices]: values spread evenly from start to stop. A pass over the slices, not over the units."""
        start, stop, value = (np.asarray(one, np.float64) for one in (starts, stops, values))
        density = value / (stop - start)
        made = np.zeros(self.slices)
        for number, (low, high) in enumerate(self._times):
            covered = np.minimum(stop, high) - np.maximum(start, low)
            made[number] = (np.maximum(covered, 0) * density).sum()
        return made

    def gap_seconds(self, start: float, stop: float) -> float:
        """Of the gaps between two times."""
        gaps = pairwise(self._spans)
        return sum(max(0.0, min(stop, after[0]) - max(start, before[1])) for before, after in gaps)
