"""How far the job is: a bar on a terminal, plain log lines elsewhere."""

import logging
import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from batch_rerank.store.receipts import Receipt, Totals

log = logging.getLogger("batch_rerank")
LINE_SECONDS = 10.0


class Meter:
    """Rates of this run. They count from the first finished unit on, so that start-up and model loading stay out."""

    def __init__(self) -> None:
        self._first: tuple[float, int, int] | None = None
        self._last = (0.0, 0, 0)

    def add(self, now: float, totals: Totals) -> None:
        """A unit finished at `now` seconds, after which the totals are these."""
        self._last = (now, totals.rows_in, totals.tokens)
        self._first = self._first or self._last

    @property
    def rates(self) -> tuple[float, float] | None:
        """Pairs/s and tokens/s, None until two units have finished."""
        if self._first is None or self._last[0] <= self._first[0]:
            return None
        seconds = self._last[0] - self._first[0]
        return (self._last[1] - self._first[1]) / seconds, (self._last[2] - self._first[2]) / seconds


class Display:
    """Shows totals as they grow, on stderr."""

    def __init__(self, units: int, pairs: int, totals: Totals) -> None:
        self._units, self._pairs, self._totals = units, pairs, totals
        self._pairs_in = totals.rows_in
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
            log.info(
                "%d/%d units  %s/%s pairs  %s",
                totals.units,
                self._units,
                f"{totals.rows_in:,}",
                f"{self._pairs:,}",
                self.rates(),
            )

    def rates(self) -> str:
        """Pairs/s, tokens/s and the time that is left."""
        rates = self.meter.rates
        if rates is None:
            return "-- pairs/s"
        left = (self._pairs - self._totals.rows_in) / rates[0] if rates[0] else 0
        return f"{rates[0]:,.0f} pairs/s  {rates[1]:,.0f} tokens/s  ETA {int(left) // 60}:{int(left) % 60:02d}"
