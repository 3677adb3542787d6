"""A job that reuses scores: first the units that need no actor, then what is left."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial

from batch_rerank.calls import Each
from batch_rerank.config import JobConfig
from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.job.run_local import run_local
from batch_rerank.score.bundles import Bundling, match_range
from batch_rerank.score.earlier import Earlier
from batch_rerank.score.read_unit import read_ranges
from batch_rerank.store.plans import Plan
from batch_rerank.store.receipts import Receipt, SetAside

log = logging.getLogger("batch_rerank")


def score(
    config: JobConfig,
    model: ModelSpec,
    plan: Plan,
    done: frozenset[str],
    earlier: Earlier | None,
    each: Each,
    local: bool,
    begin: Callable[[int], None] = lambda actors: None,
) -> Iterator[Receipt | SetAside]:
    """Score and commit the units that are not done, reusing what earlier outputs have. `begin` is told how many actors
    are asked for, when they are. Raises the errors of every step."""
    if earlier is None or not earlier.served or len(done) == len(plan.units):
        yield from _runner(local)(config, model, plan, done, begin=begin)
        return
    with nullcontext() if local else _cluster(config):
        misses: dict[str, int] = {}
        finished = set(done)
        calls = [partial(match_range, work, config, model, plan.fingerprint) for work in read_ranges(plan, done)]
        for found in each(calls, earlier.reuse):
            misses |= found.misses
            finished |= {receipt.unit for receipt in found.receipts}
            yield from found.receipts
        log.info(
            "reuse: %d units need no scoring; %s pairs of %d others do",
            len(finished) - len(done),
            f"{sum(misses.values()):,}",
            len(misses),
        )
        bundling = Bundling(earlier.reuse, misses, enough=max(1, plan.pairs // len(plan.units)))  # a unit's pairs
        run, failed = _runner(local), []
        for one in run(config, model, plan, frozenset(finished), bundling, begin):
            if isinstance(one, SetAside):
                failed.append(one.unit)
            else:
                yield one
        if failed:  # one of those that go together is enough for all of them
            log.warning("reuse: %d units were set aside together, e.g. %s; each is tried alone", len(failed), failed[0])
            others = frozenset(unit.id for unit in plan.units) - set(failed)
            yield from run(config, model, plan, others, replace(bundling, enough=1))


def _runner(local: bool) -> Callable[..., Iterator[Receipt | SetAside]]:
    """`run_local`, or `run_ray`, which takes the same."""
    if local:
        return run_local
    from batch_rerank.job.run_ray import run_ray  # not at the top: --local does without ray

    return run_ray


def _cluster(config: JobConfig) -> AbstractContextManager[object]:
    from batch_rerank.job.cluster import on_cluster

    return on_cluster(config)
