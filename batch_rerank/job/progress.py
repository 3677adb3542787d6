"""How far the job is: a bar on a terminal, plain log lines elsewhere."""

import logging
import math
import sys
import time
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from batch_rerank.store.receipts import Receipt, Totals

log = logging.getLogger("batch_rerank")
LINE_SECONDS = 10.0


WINDOWS = 20
"""Stretches of time whose rates say how long the rest will take, and how far that may be off."""

WINDOW_SECONDS = 1.0
"""Their least length: actors that began together end their units together."""

LEAST = 4
"""Stretches below which no interval is given."""


@dataclass(frozen=True)
class Left:
    """Seconds until the end, and the interval that has them with 95 %: up to infinity where too little is known."""

    seconds: float
    low: float
    high: float


class Meter:
    """Rates of this run. They count from the first finished unit on, so that start-up and model loading stay out."""

    def __init__(self) -> None:
        self._marks: list[tuple[float, int]] = []
        self._span = WINDOW_SECONDS
        self._first: tuple[float, int, int] | None = None
        self._last = (0.0, 0, 0)

    def add(self, now: float, totals: Totals) -> None:
        """A unit finished at `now` seconds, after which the totals are these."""
        self._last = (now, totals.rows_in, totals.tokens)
        self._first = self._first or self._last
        if not self._marks or now - self._marks[-1][0] >= self._span:
            self._marks.append(self._last[:2])
        if len(self._marks) > 2 * WINDOWS:  # from now on stretches are twice as long
            self._marks = self._marks[::-2][::-1]
            self._span = (self._marks[-1][0] - self._marks[0][0]) / (len(self._marks) - 1)

    @property
    def rates(self) -> tuple[float, float] | None:
        """Pairs/s and tokens/s, None until two units have finished."""
        if self._first is None or self._last[0] <= self._first[0]:
            return None
        seconds = self._last[0] - self._first[0]
        return (self._last[1] - self._first[1]) / seconds, (self._last[2] - self._first[2]) / seconds

    def left(self, pairs: int) -> Left | None:
        """How long so many more pairs will take, None until two units have finished.

        The pairs of a stretch of t seconds are taken to have mean r t and variance v t, one stretch independent of the
        other. Then n pairs take T = n / r, with variance v T (1 + T / S) / r^2: what is to come, and what S seconds say
        of r. The quantile is Student's, by the Cornish-Fisher expansion.
        """
        if not pairs:
            return Left(0.0, 0.0, 0.0)
        marks = np.array(self._marks[-WINDOWS - 1 :], np.float64).reshape(-1, 2)
        seconds, scored = np.diff(marks, axis=0).T
        if len(seconds) < LEAST or not scored.sum():
            return Left(pairs / self.rates[0], 0.0, math.inf) if self.rates and self.rates[0] else None
        total, freedom = seconds.sum(), len(seconds) - 1
        rate = scored.sum() / total
        left = pairs / rate
        variance = ((scored - rate * seconds) ** 2 / seconds).sum() / freedom
        quantile = 1.96 + 2.372 / freedom + 2.82 / freedom**2
        off = quantile * math.sqrt(variance * left * (1 + left / total)) / rate
        return Left(float(left), max(0.0, float(left - off)), float(left + off))


class Display:
    """Shows totals as they grow, on stderr. `usd_per_gpu_hour`: None for no price, or no GPU to pay for."""

    def __init__(self, units: int, pairs: int, totals: Totals, usd_per_gpu_hour: float | None = None) -> None:
        self._units, self._pairs, self._totals = units, pairs, totals
        self._before, self._usd_per_gpu_hour = replace(totals), usd_per_gpu_hour
        self.meter = Meter()
        self._next_line = time.monotonic() + LINE_SECONDS
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("units"),
                TimeElapsedColumn(),
            )
            self._bar = Progress(*columns, TextColumn("{task.fields[rates]}"), console=Console(stderr=True))
            self._task = self._bar.add_task("scoring", total=units, completed=totals.units, rates="starting")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, receipt: Receipt) -> None:
        """Another unit is committed; the totals count it already."""
        now = time.monotonic()
        self.meter.add(now, self._totals)
        if self._bar:
            self._bar.update(self._task, completed=self._totals.units, rates=self.rates())
        elif now >= self._next_line or self._totals.units == self._units:
            self._next_line = now + LINE_SECONDS
            totals = self._totals
            reused = f" ({totals.reused:,} reused)" if totals.reused else ""
            pairs = f"{totals.rows_in:,}/{self._pairs:,} pairs{reused}"
            log.info("%d/%d units  %s  %s", totals.units, self._units, pairs, self.rates())

    def rates(self) -> str:
        """Pairs/s, tokens/s, the share of the actors' time that computes and the time that is left: of this run, as far
        as units have come back; and the money so far, of all runs of the job."""
        rates, left = self.meter.rates, self.meter.left(self._pairs - self._totals.rows_in)
        if rates is None or left is None:
            return "-- pairs/s"
        said = [f"{rates[0]:,.0f} pairs/s", f"{rates[1]:,.0f} tokens/s"]
        wait, scoring, compute = (
            getattr(self._totals, name) - getattr(self._before, name)
            for name in ("wait_seconds", "seconds", "compute_seconds")
        )
        if scoring + wait:
            said.append(f"computing {compute / (scoring + wait):.0%} of the time")
        known = "" if left.high in (0, math.inf) else f" ({duration(left.low)} to {duration(left.high)})"
        said.append(f"ETA {duration(left.seconds)}{known}")
        if self._usd_per_gpu_hour is not None:
            said.append(f"${self._totals.gpu_seconds / 3600 * self._usd_per_gpu_hour:,.2f} so far")
        return "  ".join(said)


def duration(seconds: float) -> str:
    """12:05, or 6:00:00 from an hour on."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
