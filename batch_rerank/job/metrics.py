"""What a job on Ray tells Prometheus, by `ray.util.metrics`. `docs/metrics.md` has a line for each metric.

All of it comes from receipts, in the driver, when a unit is counted in the job's totals: each unit once, whatever was
tried, died or was adopted on the way. Ray exports it from the driver's node, as `ray_<name>`. Nothing here fails a job.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from batch_rerank.config import JobConfig
from batch_rerank.store.receipts import Receipt

log = logging.getLogger("batch_rerank")

OF_THE_JOB = ("model", "device", "output")
"""Tags that every metric has: model.name, cpu or cuda, and output.path."""

BOUNDARIES = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0]

SAMPLE_SECONDS = 1.0
"""How often it is looked what waits at the actors."""


@dataclass(frozen=True)
class Metric:
    """One metric; `tags` are those beside the job's."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    tags: tuple[str, ...] = ()

    @property
    def series(self) -> str:
        """What Prometheus finds; of a histogram there are also _sum and _count."""
        return f"ray_{self.name}{ {'counter': '_total', 'gauge': '', 'histogram': '_bucket'}[self.kind] }"


METRICS = (
    Metric("batch_rerank_units", "counter", "Units that were committed"),
    Metric("batch_rerank_pairs", "counter", "Candidates of committed units, with those that failed or were reused"),
    Metric("batch_rerank_tokens", "counter", "Tokens that the model reads for them, a repeated prefix each time"),
    Metric("batch_rerank_truncated", "counter", "Pairs that were cut at max_length"),
    Metric("batch_rerank_failed", "counter", "Candidates without a score: error rows"),
    Metric("batch_rerank_reused", "counter", "Pairs with the score of an earlier output"),
    Metric("batch_rerank_retries", "counter", "What was done again: units, storage requests", ("of",)),
    Metric("batch_rerank_set_aside", "counter", "Units that could not be scored"),
    Metric("batch_rerank_actor_seconds", "counter", "What actors' time went into", ("actor", "phase")),
    Metric("batch_rerank_token_budget", "gauge", "Tokens of one batch", ("actor",)),
    Metric("batch_rerank_units_waiting", "gauge", "Units that wait at an actor", ("actor",)),
    Metric("batch_rerank_unit_seconds", "histogram", "Seconds of a unit in one step", ("step",)),
)

COUNTS = {
    "batch_rerank_pairs": "rows_in",
    "batch_rerank_tokens": "tokens",
    "batch_rerank_truncated": "truncated",
    "batch_rerank_failed": "failed",
    "batch_rerank_reused": "reused",
}
"""Counters that are fields of a receipt."""


class Metrics:
    """The metrics of one run. `waiting`: units that wait at each actor, by its id."""

    def __init__(self, config: JobConfig, waiting: Callable[[], Mapping[str, int]]) -> None:
        job = (config.model.name, config.cluster.device, config.output.path)
        self._job = dict(zip(OF_THE_JOB, map(str, job), strict=True))
        self._waiting, self._actors = waiting, set[str]()
        self._next_sample = 0.0
        self._made: dict[str, Any] = {}
        self._off = False

    def count(self, receipt: Receipt) -> None:
        """A unit was counted in the totals."""
        self._safely(lambda: self._count(receipt))

    def set_aside(self) -> None:
        """A unit was set aside."""
        self._safely(lambda: self._add("batch_rerank_set_aside", 1))

    def end(self) -> None:
        """The run has ended: nothing waits any more."""
        self._safely(lambda: self._wait_at({}))

    def _safely(self, update: Callable[[], None]) -> None:
        if self._off:
            return
        try:
            self._made = self._made or _make()
            update()
        except Exception as error:  # whatever Ray finds wrong, the job goes on
            self._off = True
            log.warning("metrics are off for the rest of this run: %s: %s", type(error).__name__, error)

    def _count(self, receipt: Receipt) -> None:
        self._add("batch_rerank_units", 1)
        for name, field in COUNTS.items():
            self._add(name, getattr(receipt, field))
        self._add("batch_rerank_retries", receipt.retries, of="unit")
        self._add("batch_rerank_retries", receipt.moves, of="node")
        self._add("batch_rerank_retries", receipt.storage_retries, of="storage")
        steps = {"commit": receipt.write_seconds}
        if receipt.scorer:  # else all of it was reused, and no actor has met it
            steps |= {"wait": receipt.wait_seconds, "encode": receipt.encode_seconds, "score": receipt.seconds}
        for step, seconds in steps.items():
            self._made["batch_rerank_unit_seconds"].observe(seconds, self._tags(step=step))
        for phase, seconds in phases(receipt).items():
            self._add("batch_rerank_actor_seconds", seconds, actor=receipt.actor, phase=phase)
        if receipt.actor:
            self._actors.add(receipt.actor)
        if receipt.token_budget:
            self._set("batch_rerank_token_budget", receipt.token_budget, receipt.actor)
        if time.monotonic() >= self._next_sample:
            self._next_sample = time.monotonic() + SAMPLE_SECONDS
            self._wait_at(self._waiting())

    def _wait_at(self, waiting: Mapping[str, int]) -> None:
        self._actors |= waiting.keys()
        for actor in self._actors:
            self._set("batch_rerank_units_waiting", waiting.get(actor, 0), actor)

    def _add(self, name: str, value: float, **tags: str) -> None:
        if value > 0:  # Ray refuses 0
            self._made[name].inc(value, self._tags(**tags))

    def _set(self, name: str, value: float, actor: str) -> None:
        self._made[name].set(value, self._tags(actor=actor))

    def _tags(self, **tags: str) -> dict[str, str]:
        return {**self._job, **tags}


def phases(receipt: Receipt) -> dict[str, float]:
    """What the actor's seconds went into; their sum is its time."""
    rest = receipt.seconds - receipt.pack_seconds - receipt.compute_seconds
    return {
        "load": receipt.load_seconds,
        "wait": receipt.wait_seconds,
        "pack": receipt.pack_seconds,
        "compute": receipt.compute_seconds,
        "hand": max(0.0, round(rest, 6)),
    }


def _make() -> dict[str, Any]:
    """Ray's objects by name."""
    from ray.util import metrics  # not at the top: --local does without ray

    kinds: dict[str, Any] = {"counter": metrics.Counter, "gauge": metrics.Gauge}
    made = {}
    for metric in METRICS:
        tags = (*OF_THE_JOB, *metric.tags)
        if metric.kind == "histogram":
            made[metric.name] = metrics.Histogram(metric.name, metric.help, BOUNDARIES, tags)
        else:
            made[metric.name] = kinds[metric.kind](metric.name, metric.help, tags)
    return made
