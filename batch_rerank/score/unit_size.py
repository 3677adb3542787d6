"""How many pairs a unit has where the job does not say: some 20 s of one accelerator, by the model and the texts.

A crash costs the units in flight and a commit costs two requests, so neither a large model on long texts nor a small
one on short texts wants the same number. Rates are nominal, one for any GPU: a factor of 5 either way makes 4 or 100
seconds, which are both well.
"""

from pathlib import Path

from batch_rerank.config import JobConfig
from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.engine.checkpoint_files import matrix_parameters
from batch_rerank.sections import Cluster

UNIT_SECONDS = 20.0
GPU_FLOPS = 2e14
"""Of an accelerator, a second: about half of what an H100 does in bfloat16, and what an A100 does."""

CORE_FLOPS = 5e10
"""Of a core, in float32."""

SOME_CORES = 4
"""Of an actor whose node is not known yet."""

TOKEN_BYTES = 4
"""Of text a token, about."""

PROMPT_TOKENS = 32
"""Query and template a pair, about; a prefix is computed once for many."""

UNKNOWN_PARAMETERS = 600_000_000
"""Of a model whose weights are not on this machine, or are pickled."""

FEWEST, MOST = 100, 20_000
"""Pairs of a unit, in any job."""

UNITS_OF_AN_ACTOR = 8
"""At least, so that actors end together."""

MOST_UNITS = 200_000
"""Of a job, about: each has a line in the plan and some kilobytes on the driver's way."""


def unit_pairs(config: JobConfig, model: ModelSpec, pairs: int, pair_bytes: float) -> int:
    """Pairs of a unit. pairs: of the whole job; pair_bytes: of text a pair, the mean of the shard that is cut."""
    by_bytes = max(1, int(config.input.unit_bytes / max(1.0, pair_bytes)))
    if config.input.unit_pairs != "auto":
        return min(config.input.unit_pairs, by_bytes)
    tokens = min(model.max_length, PROMPT_TOKENS + pair_bytes / TOKEN_BYTES)
    work = 2.0 * _parameters(model) * tokens
    by_work = MOST if work == 0 else int(UNIT_SECONDS * _rate(config.cluster) / work)
    shared = pairs // (UNITS_OF_AN_ACTOR * config.cluster.max_actors)
    fewest = max(FEWEST, pairs // MOST_UNITS)
    return min(max(fewest, min(by_work, shared, MOST)), by_bytes)


def _rate(cluster: Cluster) -> float:
    gpus, cores = cluster.gpus_per_actor, cluster.cpus_per_actor
    if gpus == "auto" or not gpus:
        return CORE_FLOPS * (SOME_CORES if cores == "auto" else cores)
    return GPU_FLOPS * max(1.0, gpus)


def _parameters(model: ModelSpec) -> int:
    return 0 if model.kind == "checksum" else matrix_parameters(Path(model.directory)) or UNKNOWN_PARAMETERS
