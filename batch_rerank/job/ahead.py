"""A job before it runs: its device, its plan and its model, and what is in its way."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from batch_rerank.config import JobConfig
from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.errors import ConfigError, ScatteredError
from batch_rerank.input.places import refuse_overlap, refuse_pointer
from batch_rerank.input.stage import Staged, describe_stage, find_stage, needs_stage, plan_stage
from batch_rerank.job.devices import Machines, Node, settle, this_machine
from batch_rerank.job.gate import check_gate
from batch_rerank.job.staging import stage
from batch_rerank.publish.publication import stands
from batch_rerank.publish.publish import refuse_other_publication
from batch_rerank.score.earlier import Earlier, find_earlier
from batch_rerank.score.plan import configured_model, make_plan
from batch_rerank.store.bookkeeping import made_again, refuse_strays
from batch_rerank.store.filesystem import locate
from batch_rerank.store.lease import Lease
from batch_rerank.store.manifest import Manifest
from batch_rerank.store.plans import Plan, refuse_protocol
from batch_rerank.store.scan import scan

log = logging.getLogger("batch_rerank")


def settled(config: JobConfig, *, local: bool = False) -> JobConfig:
    """The job with its device known, which decides the dtype and so the fingerprint. Threads may stay open until Ray
    is there. Raises ConfigError."""
    if local:
        return settle(config, this_machine(), actors=1)
    if config.cluster.gpus_per_actor != "auto":
        return config
    from batch_rerank.job.cluster import look  # not at the top: --local does without ray

    return settle(config, look(config))


def ready(config: JobConfig, *, local: bool) -> tuple[JobConfig, Plan, ModelSpec]:
    """The job as it will run, its plan and its model; an input that needs it is staged first, or found staged.

    Raises what `make_plan` and `stage` raise.
    """
    found = _input_of(config, lambda config: stage(config, local=local))
    assert found is not None, "stage() makes what it does not find"
    return found


@dataclass(frozen=True)
class There:
    """What an output has of a job. done: ids of units that are scored; published: whether the whole is; gpu_hours: what
    earlier runs have spent."""

    done: frozenset[str] = frozenset()
    published: bool = False
    gpu_hours: float = 0.0


@dataclass(frozen=True)
class Ahead:
    """What a run would do: the job as it will run, its plan, its model and the earlier outputs that serve; or the plan
    of its stage, and no model, where the input is not staged yet. there: what earlier runs have done of it."""

    config: JobConfig
    plan: Plan
    model: ModelSpec | None = None
    earlier: Earlier | None = None
    there: There = There()

    @property
    def left(self) -> Plan:
        """The plan without what is done."""
        return replace(self.plan, units=self.plan.left(self.there.done))


def plan_job(config: JobConfig, *, local: bool = False, anew: bool = False) -> Ahead:
    """What a run would do. Writes nothing and starts nothing: without a cluster to join, the device is this machine's.
    Raises what a run would raise before its first unit; a lease that has to be watched is said. `anew`: whatever there
    is at the output's place."""
    config = settled(config, local=True) if local else _supposed(config)
    found = _input_of(config, find_stage)
    if found is not None:
        job, plan, model = found
        there = There() if anew else _there(job, plan)
        return Ahead(job, plan, model, find_earlier(job, plan), there)
    place, plan = plan_stage(config)
    log.info("to be staged at %s: %s; units are planned when it is", place, describe_stage(plan))
    return Ahead(config, plan)


def _input_of(
    config: JobConfig, staged: Callable[[JobConfig], Staged | None]
) -> tuple[JobConfig, Plan, ModelSpec] | None:
    """The job as it will run, its plan and its model; an input that needs a stage is read from what `staged` returns,
    and None where that is nothing."""
    configured_model(config)  # a stage may take long: what is wrong with the model comes before it
    refuse_overlap(config)
    refuse_pointer(config)
    judged = check_gate(config)
    found: Staged | None = None
    if needs_stage(config):
        if (found := staged(config)) is None:
            return None
    elif config.input.stage:  # named: its ids need not be read to see that they are scattered
        found = find_stage(config)
    try:
        plan, model = make_plan(found.config if found else config, judged)
    except ScatteredError as error:
        found = find_stage(config)
        if found is None:
            log.info("%s", error)
        if (found := found or staged(config)) is None:
            return None
        plan, model = make_plan(found.config, judged)
    if found is None:
        return config, plan, model
    missing = {name: count for name, count in found.counts.items() if name.startswith("missing_")}
    return found.config, replace(plan, counts={**plan.counts, **missing}), model


def _supposed(config: JobConfig) -> JobConfig:
    """The job with the device that a run from here would find; where it is a guess, it says so."""
    if config.cluster.gpus_per_actor != "auto":
        return config
    try:
        found = settled(config)
    except ConfigError as error:
        log.warning("%s", error)
        found = settle(config, Machines("supposed", (Node(1, 1),)))
    if config.model.dtype == "auto" and config.model.kind != "checksum":
        other = "bfloat16" if found.cluster.device == "cpu" else "float32"
        log.info(
            "where cluster.gpus_per_actor: auto finds %s, the job is another one, in %s; model.dtype fixes it",
            "GPUs" if other == "bfloat16" else "none",
            other,
        )
    return found


def _there(config: JobConfig, plan: Plan) -> There:
    """What a job's output has of it. Raises ConflictError where the output is not free for the job."""
    manifest = Manifest(locate(config.output.path, config.output.storage_options))
    there = There()
    existing = manifest.read_plan()
    if existing is None:
        for shard in plan.shards:
            refuse_protocol(shard.url, ConfigError)
        manifest.refuse_foreign()
    else:
        manifest.refuse_other(existing, plan)
        found = scan(manifest, existing)
        refuse_strays(manifest, found, existing)
        refuse_other_publication(manifest, found.publication, config.output)
        again = made_again(manifest, plan, found)
        done = frozenset(receipt.unit for receipt in found.committed if receipt.unit not in again)
        there = There(
            done, stands(manifest.read_mark(), existing, found), manifest.read_status().totals.gpu_seconds / 3600
        )
    Lease(manifest.root, config.cluster.lease_seconds).look()
    return there


def describe(plan: Plan, model: ModelSpec) -> None:
    """Log what was chosen and what the plan passed over."""
    revision = f" at {model.revision}" if model.revision else ""
    log.info(
        "model %s%s: %s, template %s, max_length %d, %s",
        model.name,
        revision,
        model.kind,
        model.template,
        model.max_length,
        model.dtype,
    )
    if model.instruction:
        log.info("instruction: %s", model.instruction)
    log.info(
        "%d shards, %s queries, %s pairs, %d units",
        len(plan.shards),
        f"{plan.counts['queries']:,}",
        f"{plan.pairs:,}",
        len(plan.units),
    )
    for name in ("zero_row_shards", "queries_without_candidates"):
        if plan.counts[name]:
            log.info("%s: %d, passed over", name.replace("_", " "), plan.counts[name])
    for note in plan.notes:
        log.warning("%s", note)
