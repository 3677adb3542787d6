"""The job without Ray: the same functions in a loop. For laptops and notebooks, and the oracle of the Ray job."""

import logging
from collections.abc import Iterator

from batch_rerank.config import JobConfig
from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.engine.encoding import make_encoder
from batch_rerank.job.read_unit import read_range, read_ranges
from batch_rerank.job.steps import LoadedScorer, commit_unit, encode_unit, score_unit
from batch_rerank.store.manifest import Plan, Receipt

log = logging.getLogger("batch_rerank")


def run_local(config: JobConfig, model: ModelSpec, plan: Plan, done: frozenset[str]) -> Iterator[Receipt]:
    """Score and commit the units that are not done, one after the other. Raises the errors of every step."""
    encoder, scorer = make_encoder(model), LoadedScorer(config, model)
    if scorer.self_test:
        log.info("%s", scorer.self_test)
    for work in read_ranges(plan, done):
        for read in read_range(work, config, model):
            scored = score_unit(encode_unit(read, encoder), scorer)
            yield commit_unit(scored, config, model, plan.fingerprint)
