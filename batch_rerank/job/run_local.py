"""The job without Ray: the same functions in a loop. For laptops and notebooks, and the oracle of the Ray job."""

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from batch_rerank.config import JobConfig
from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.engine.encoding import make_encoder
from batch_rerank.score.bundles import Bundling, read_bundles
from batch_rerank.score.read_unit import read_range, read_ranges
from batch_rerank.score.score_file import commit_unit
from batch_rerank.score.steps import EncodedUnit, LoadedScorer, encode_unit, or_set_aside, score_unit
from batch_rerank.store.plans import Plan
from batch_rerank.store.receipts import Receipt, SetAside

log = logging.getLogger("batch_rerank")
T = TypeVar("T")


def run_local(
    config: JobConfig,
    model: ModelSpec,
    plan: Plan,
    done: frozenset[str],
    bundling: Bundling | None = None,
    begin: Callable[[int], None] = lambda actors: None,
) -> Iterator[Receipt | SetAside]:
    """Score and commit the units that are not done, one after the other; with `bundling`, what is left of them.
    `begin` is told before that there is one actor. Raises the errors of every step."""
    if len(done) == len(plan.units):
        return
    begin(1)
    encoder, scorer = make_encoder(model), LoadedScorer(config, model)
    if scorer.self_test:
        log.info("%s", scorer.self_test)
    units: Iterator[EncodedUnit | list[SetAside]]
    if bundling is not None:
        given = (config, model, bundling.reuse, bundling.enough, encoder)
        units = (one for works in bundling.tasks(plan, done) for one in read_bundles(works, *given))
    else:
        reads = (read for work in read_ranges(plan, done) for read in read_range(work, config, model))
        units = (or_set_aside([read.unit], partial(encode_unit, read, encoder)) for read in reads)
    for unit in one_ahead(units):
        yield from (
            unit
            if isinstance(unit, list)
            else or_set_aside(unit.units, partial(_finish, unit, scorer, config, model, plan.fingerprint))
        )


def _finish(
    unit: EncodedUnit, scorer: LoadedScorer, config: JobConfig, model: ModelSpec, fingerprint: str
) -> list[Receipt]:
    with scorer.sheet.unit():
        scored = score_unit(unit, scorer)
    return [commit_unit(one, config, model, fingerprint) for one in scored.apart()]


def one_ahead(units: Iterator[T]) -> Iterator[T]:
    """The same units, the next one read and encoded by a thread while the caller scores: tokenizers release the GIL."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        following = thread.submit(next, units, None)
        while (unit := following.result()) is not None:
            following = thread.submit(next, units, None)
            yield unit
