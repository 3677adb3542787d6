"""How long a plan will take and what it will cost: its work by a rate that was measured, and what is around it."""

from dataclasses import dataclass
from math import ceil, hypot
from statistics import pstdev
from typing import Any

from batch_rerank.config import JobConfig
from batch_rerank.estimate.ranges import Range
from batch_rerank.estimate.rates import UNTRIED, Known
from batch_rerank.estimate.tally import Tally

PUBLISH_ROWS = 70_000.0
"""Rows that are published in a second where no run has found another rate (benchmarks/results/publish.json)."""

HISTORY = 8
"""Runs whose errors are looked at."""


@dataclass(frozen=True)
class Forecast:
    """Seconds of a whole run; None where no rate is known. actor_seconds: that all actors score, in sum; startup, tail,
    publishing: seconds that are within `seconds`, for nobody scores in them, or not everybody does; actors: at once;
    half_unit: seconds of half a unit, the tail of several actors."""

    actors: int
    gpus: float
    seconds: Range | None = None
    actor_seconds: Range | None = None
    startup: float = 0.0
    tail: float = 0.0
    publishing: float = 0.0
    utilisation: float = 1.0
    half_unit: float = 0.0

    @property
    def gpu_hours(self) -> Range | None:
        """Hours of GPUs that are held; publishing holds none."""
        if self.gpus == 0:
            return Range.exact(0.0)
        if self.seconds is None:
            return None
        return self.seconds.plus(-self.publishing).times(self.actors * self.gpus / 3600)

    def usd(self, price: float | None) -> Range | None:
        """At this price of a GPU hour."""
        hours = self.gpu_hours
        return None if price is None or hours is None else hours.times(price)

    def with_actors(self, actors: int) -> "Forecast":
        """With another number of them."""
        if self.actor_seconds is None:
            return Forecast(actors, self.gpus)
        return _of(
            self.actor_seconds, actors, self.gpus, self.startup, self.publishing, self.utilisation, self.half_unit
        )

    def actors_for(self, seconds: float, most: int, ninety: bool) -> int | None:
        """The fewest actors that end within so many seconds, half of the time, or 90 % of it; None where no number up
        to `most` does. Raises ValueError where nothing is known."""
        if self.actor_seconds is None:
            raise ValueError("no rate is known")
        low, high = 1, max(1, most)

        def meets(actors: int) -> bool:
            taken = self.with_actors(actors).seconds
            assert taken is not None
            return (taken.p90 if ninety else taken.p50) <= seconds

        if not meets(high):
            return None
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if meets(middle) else (middle + 1, high)
        return low

    def json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "actors": self.actors,
            "actor_seconds": None if self.actor_seconds is None else self.actor_seconds.json(),
            "startup_seconds": None if self.seconds is None else round(self.startup, 2),
            "tail_seconds": None if self.seconds is None else round(self.tail, 2),
            "publish_seconds": None if self.seconds is None else round(self.publishing, 2),
            "utilisation": None if self.seconds is None else round(self.utilisation, 4),
        }


def forecast(
    config: JobConfig, tally: Tally, rates: list[Known], actors: int, published: int | None = None
) -> Forecast:
    """By the newest of some rates; unknown without any. published: rows of the whole output, where they are more than
    what is left to score."""
    gpus = config.cluster.gpus
    if not rates:
        return Forecast(actors, gpus)
    rate = rates[0].rate
    work = tally.flop if tally.flop.high > 0 else tally.computed_tokens
    errors = [one.rate.error for one in rates if one.rate.error is not None][:HISTORY]
    # what predictions were off by; until there are some, what repeats differ by
    tried = hypot(pstdev(errors), sum(errors) / len(errors)) if len(errors) >= 3 else UNTRIED
    busy = work.times(1 / rate.work_per_second).spread(max(tried, rate.spread / max(1, tally.units) ** 0.5))
    publishing = _publishing(tally.pairs if published is None else published, rates)
    # all actors but the last one wait for it: half a unit of its time, on average
    half_unit = busy.p50 / max(1, tally.units) / 2
    startup = rate.startup_seconds if busy.p50 else 0.0
    return _of(busy, actors, gpus, startup, publishing, rate.utilisation or 1.0, half_unit)


def nothing_to_score(config: JobConfig, rates: list[Known], published: int) -> Forecast:
    """Of a job whose units are all scored, with so many rows to publish: known without any rate of scoring."""
    return _of(Range.exact(0.0), 1, config.cluster.gpus, 0.0, _publishing(published, rates), 1.0, 0.0)


def _publishing(rows: float, rates: list[Known]) -> float:
    """Seconds."""
    return rows / ((rates[0].rate.publish_rows_per_second if rates else 0.0) or PUBLISH_ROWS)


def _of(
    busy: Range, actors: int, gpus: float, startup: float, publishing: float, utilisation: float, half_unit: float
) -> Forecast:
    tail = half_unit if actors > 1 else 0.0
    seconds = busy.times(1 / (actors * min(1.0, utilisation))).plus(startup + tail + publishing)
    return Forecast(actors, gpus, seconds, busy, startup, tail, publishing, utilisation, half_unit)


def duration(seconds: float) -> str:
    """5.2 s, 12 min 30 s, 6 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    minutes = ceil(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60:02d} min"
