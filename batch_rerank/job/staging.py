"""Staging a job's input, on Ray or in this process."""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, TypeVar

from batch_rerank.calls import Each, in_turn, packs
from batch_rerank.config import JobConfig
from batch_rerank.input.stage import Staged, stage_with

T = TypeVar("T")
TASKS, TASK_BYTES = 1000, 256 * 2**20
"""Of the calls that Ray Data is given at once: it keeps 17 KB of statistics a task in the driver, which holds a call
three times while it hands it on."""


def stage(config: JobConfig, *, local: bool = False) -> Staged:
    """Stage a job's input, or what is left of it. Raises what `stage_with` raises."""
    return stage_with(config, in_turn if local else on_ray(config))


def on_ray(config: JobConfig) -> Each:
    """Each call in a task of Ray's, some at a time: those that wait are not made yet."""

    def each(calls: Iterable[Callable[..., T]], shared: Any = None) -> Iterator[T]:
        groups = packs(calls, TASKS, TASK_BYTES)
        first = next(groups, None)
        if first is None:
            return
        # not at the top: --local does without ray
        from batch_rerank.job.cluster import on_cluster
        from batch_rerank.job.run_ray import each_on_ray

        with on_cluster(config):
            for group in chain([first], groups):
                yield from each_on_ray(config, group, shared)

    return each
