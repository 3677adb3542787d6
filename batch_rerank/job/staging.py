"""Staging a job's input, on Ray or in this process."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from batch_rerank.calls import Each, in_turn
from batch_rerank.config import JobConfig
from batch_rerank.input.stage import Staged, stage_with

T = TypeVar("T")


def stage(config: JobConfig, *, local: bool = False) -> Staged:
    """Stage a job's input, or what is left of it. Raises what `stage_with` raises."""
    return stage_with(config, in_turn if local else on_ray(config))


def on_ray(config: JobConfig) -> Each:
    """Each call in a task of Ray's, some at a time: those that wait are not made yet."""

    def each(calls: Iterable[Callable[..., T]], shared: Any = None) -> Iterator[T]:
        from batch_rerank.job.run_ray import each_on_ray  # not at the top: --local does without ray

        return each_on_ray(config, calls, shared)

    return each
