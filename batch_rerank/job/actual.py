"""Planned against actual: what a run took beside what was expected of it, what made the difference, and the rate that
the next plan goes by. `_manifest/actual.json` has it."""

import math
import platform
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.estimate.forecast import duration
from batch_rerank.estimate.rates import Rate, shape_of
from batch_rerank.job.estimate import Estimate
from batch_rerank.store.receipts import Receipt

WORTH_SAYING = 0.02
"""Of the planned time, from which on a difference is named."""


@dataclass
class Course:
    """How a run goes, noted as it goes. Seconds are of time.monotonic(). published_rows: of all runs of the job;
    by_flop: whether work is FLOP, or tokens."""

    started: float = field(default_factory=lambda: time.monotonic())
    actors: int = 1
    matched: float | None = None
    first: float | None = None
    last: float | None = None
    published: float | None = None
    published_rows: int = 0
    by_flop: bool = True
    load: float = 0.0
    busy: float = 0.0
    work: float = 0.0
    pairs: int = 0
    tokens: int = 0
    truncated: int = 0
    reused: int = 0
    computed_tokens: int = 0
    retries: int = 0
    _rates: tuple[int, float, float] = (0, 0.0, 0.0)

    def begin(self, actors: int) -> None:
        """So many actors are asked for now."""
        self.actors = actors

    def add(self, receipt: Receipt) -> None:
        """A unit is committed."""
        now = time.monotonic()
        if self.first is None and not receipt.scorer:
            self.matched = now
        elif self.first is None:
            self.first = max(self.matched or self.started, now - receipt.seconds - receipt.write_seconds)
        self.last = now
        work = receipt.flop if self.by_flop and receipt.flop else float(receipt.computed_tokens)
        self.pairs += receipt.rows_in
        self.tokens += receipt.tokens
        self.truncated += receipt.truncated
        self.reused += receipt.reused
        self.computed_tokens += receipt.computed_tokens
        self.retries += receipt.storage_retries
        self.busy += receipt.seconds
        self.work += work
        if receipt.seconds and work:  # Welford's sums of the rates of units
            n, mean, squares = self._rates
            rate = work / receipt.seconds
            away = rate - mean
            self._rates = (n + 1, mean + away / (n + 1), squares + away * (rate - mean - away / (n + 1)))

    @property
    def startup(self) -> float:
        """Seconds until an actor begins with a unit, from the last one that needed none."""
        return 0.0 if self.first is None else self.first - (self.matched or self.started)

    @property
    def utilisation(self) -> float:
        """Share of the actors' time in which they score, from the first unit's beginning to the last one's commit."""
        if self.first is None or self.last is None or self.last <= self.first:
            return 1.0
        return min(1.0, self.busy / (self.actors * (self.last - self.first)))

    @property
    def publishing(self) -> float:
        """Seconds after the last unit."""
        return 0.0 if self.published is None or self.last is None else self.published - self.last

    @property
    def seconds(self) -> float:
        """From the beginning of the run, its plan and estimate apart."""
        return (self.published or time.monotonic()) - self.started

    @property
    def spread(self) -> float:
        """Relative standard deviation of the units' rates."""
        n, mean, squares = self._rates
        return math.sqrt(squares / (n - 1)) / mean if n > 1 and mean else 0.0


def compare(planned: Estimate, course: Course, model: ModelSpec, gpu_seconds: float, local: bool) -> dict[str, Any]:
    """What `_manifest/actual.json` says of a run: planned, actual, reasons, and the rate for the next plan."""
    took = planned.forecast.seconds
    price = planned.price
    hours = gpu_seconds / 3600
    actual = {
        "pairs": course.pairs,
        "tokens": course.tokens,
        "truncated": course.truncated,
        "computed_tokens": course.computed_tokens,
        "reused": course.reused,
        "seconds": round(course.seconds, 3),
        "actor_seconds": round(course.busy, 3),
        "startup_seconds": round(course.startup, 3),
        "publish_seconds": round(course.publishing, 3),
        "utilisation": round(course.utilisation, 4),
        "actors": course.actors,
        "gpu_hours": round(hours, 6),
        "usd": None if price is None else round(hours * price, 4),
    }
    value: dict[str, Any] = {"planned": planned.json(), "actual": actual, "reasons": _reasons(planned, course)}
    if course.busy and course.work:
        cluster = planned.config.cluster
        rate = Rate(
            shape=shape_of(model),
            dtype=model.dtype,
            device=cluster.device,
            card=processor() if cluster.device == "cpu" else cluster.accelerator_type or "",
            threads=0 if cluster.cpus_per_actor == "auto" else cluster.cpus_per_actor,
            work_per_second=course.work / course.busy,
            utilisation=course.utilisation,
            startup_seconds=course.startup,
            publish_rows_per_second=course.published_rows / course.publishing if course.publishing > 0 else 0.0,
            spread=course.spread,
            # what a gate has kept from being published is not held against a plan with publishing in it
            predicted_seconds=0.0 if took is None or course.published is None else took.p50,
            actual_seconds=course.seconds,
            source="run",
            local=local,
            at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )
        value["rate"] = asdict(rate)
    return value


def _reasons(planned: Estimate, course: Course) -> list[str]:
    """What made the difference, the largest first."""
    one, took = planned.forecast, planned.forecast.seconds
    if took is None or planned.tally is None:
        return ["no time was planned: no rate of this model on this device was known; the next plan has this run's"]
    if not planned.rates:
        return []
    found = planned.tally
    work = (found.flop if found.flop.high else found.computed_tokens).p50
    pace, use = planned.rates[0].rate.work_per_second, one.utilisation or 1.0
    actual_pace = course.work / course.busy if course.busy else pace
    shares = {
        # what the planned actors would have taken for it: more work, then the work at another pace, then with other use
        _more("work", course.work, work): (course.work - work) / pace / use / one.actors,
        f"start {duration(course.startup)}, planned {duration(one.startup)}": course.startup - one.startup,
        f"publishing {duration(course.publishing)}, planned {duration(one.publishing)}": (
            course.publishing - one.publishing
        ),
    }
    if actual_pace:
        slower = course.work / actual_pace - course.work / pace
        shares[_more("the rate of scoring", actual_pace, pace)] = slower / use / one.actors
        idle = f"actors scored {course.utilisation:.0%} of their time, planned {use:.0%}"
        shares[idle] = course.work / actual_pace * (1 / course.utilisation - 1 / use) / one.actors
    if course.actors != one.actors:
        own = course.busy / max(1e-9, course.utilisation)
        shares[f"{course.actors} actors, planned {one.actors}"] = own / course.actors - own / one.actors
    if course.matched is not None:
        shares["matching earlier scores"] = course.matched - course.started
    told = [
        f"{reason}: {seconds:+.1f} s"
        for reason, seconds in sorted(shares.items(), key=lambda item: -abs(item[1]))
        if abs(seconds) > max(0.05, WORTH_SAYING * took.p50)
    ]
    return [*told, *([f"{course.retries:,} repeated storage requests"] if course.retries else [])]


def _more(name: str, actual: float, planned: float) -> str:
    if not planned:
        return f"{name} that was not planned"
    return f"{name} {actual / planned - 1:+.1%}"


def said(value: dict[str, Any]) -> str:
    """Planned against actual in a line."""
    planned, actual = value["planned"]["seconds"], value["actual"]["seconds"]
    p50 = planned["p50"] if isinstance(planned, dict) else planned
    against = "planned: unknown" if p50 is None else f"planned {duration(p50)}"
    against += f" ({actual / p50 - 1:+.0%})" if p50 else ""
    return f"took {duration(actual)}, {against}{''.join(f'; {reason}' for reason in value['reasons'])}"


def processor() -> str:
    """The name of this machine's processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())[:200]
    except OSError:
        pass
    return platform.processor() or platform.machine()
