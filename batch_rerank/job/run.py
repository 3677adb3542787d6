"""A job from its config to `_SUCCESS`: plan, resume, run, finalise. Every way to end is recorded in the status."""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from batch_rerank.config import JobConfig
from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.errors import BatchRerankError, UnfinishedError
from batch_rerank.job.plan import make_plan
from batch_rerank.job.progress import Display
from batch_rerank.job.run_local import run_local
from batch_rerank.store.filesystem import locate, storage_errors
from batch_rerank.store.lease import Lease, hold
from batch_rerank.store.manifest import Manifest, Plan, Receipt, Totals

log = logging.getLogger("batch_rerank")
STATUS_SECONDS = 10.0


@dataclass(frozen=True)
class Summary:
    """How a finished job went. `totals` are of the whole output; `units`, `pairs` and `seconds` of this run, start-up
    included; `steady_rate` is this run's pairs/s from its first finished unit on, None with fewer than two."""

    output: str
    fingerprint: str
    totals: Totals
    resumed_units: int
    units: int
    pairs: int
    seconds: float
    steady_rate: float | None
    counts: dict[str, int]


def run(config: JobConfig, *, local: bool = False) -> Summary:
    """Run a job, or what is left of it, on Ray or in this process.

    Raises the errors of `batch_rerank.errors`; none of them leaves a `_SUCCESS` of this run, all leave a resumable
    output.
    """
    started = time.monotonic()
    plan, model = make_plan(config)
    manifest = Manifest(locate(config.output.path, config.output.storage_options))
    # absolute: workers may have another working directory
    output = config.output.model_copy(update={"path": str(manifest.root)})
    config = config.model_copy(update={"output": output})
    totals = Totals()
    with hold(manifest.root, config.cluster.lease_seconds) as lease:
        plan = manifest.write_plan(plan)
        describe(plan, model)
        with _recording(manifest, plan, totals, lease):
            done = _resume(manifest, plan, totals, lease)
            resumed, pairs_before = totals.units, totals.rows_in
            receipts = run_local(config, model, plan, done) if local else _on_ray(config, model, plan, done)
            rates = _follow(receipts, manifest, plan, totals, lease)
            _finalise(manifest, plan, totals, config.scoring.max_failed_rows, lease)
    return Summary(
        output=str(manifest.root),
        fingerprint=plan.fingerprint,
        totals=totals,
        resumed_units=resumed,
        units=totals.units - resumed,
        pairs=totals.rows_in - pairs_before,
        seconds=time.monotonic() - started,
        steady_rate=rates and rates[0],
        counts=plan.counts,
    )


def _on_ray(config: JobConfig, model: ModelSpec, plan: Plan, done: frozenset[str]) -> Iterator[Receipt]:
    from batch_rerank.job.run_ray import run_ray  # not at the top: --local does without ray

    return run_ray(config, model, plan, done)


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


def _resume(manifest: Manifest, plan: Plan, totals: Totals, lease: Lease) -> frozenset[str]:
    committed, broken = manifest.scan()
    for unit_id in broken:
        log.warning(
            "unit %s: its part is missing or has another size than its receipt says; it is scored again", unit_id
        )
    known = {unit.id for unit in plan.units}
    done = [receipt for receipt in committed if receipt.unit in known and receipt.fingerprint == plan.fingerprint]
    for receipt in done:
        totals.add(receipt)
    lease.check()
    if len(done) < len(plan.units):
        with storage_errors(manifest.success):
            manifest.success.remove()
    for unit_id in broken:
        manifest.discard(unit_id)
    if done:
        log.info("resuming: %d of %d units are done", len(done), len(plan.units))
    return frozenset(receipt.unit for receipt in done)


def _follow(
    receipts: Iterator[Receipt], manifest: Manifest, plan: Plan, totals: Totals, lease: Lease
) -> tuple[float, float] | None:
    """Count receipts as they come. Nothing is kept of them, so the driver does not grow with the number of units."""
    next_status = time.monotonic() + STATUS_SECONDS
    with Display(len(plan.units), plan.pairs, totals) as display:
        for receipt in receipts:
            totals.add(receipt)
            display.advance(receipt)
            if lease.lost:
                lease.check()
            if time.monotonic() >= next_status:
                next_status = time.monotonic() + STATUS_SECONDS
                manifest.write_status(_status("running", plan, totals))
        return display.meter.rates


def _finalise(manifest: Manifest, plan: Plan, totals: Totals, max_failed_rows: float, lease: Lease) -> None:
    if totals.units != len(plan.units):
        committed, _ = manifest.scan()
        missing = sorted({unit.id for unit in plan.units} - {receipt.unit for receipt in committed})
        raise UnfinishedError(
            f"{manifest.root}: {len(missing)} of {len(plan.units)} units did not finish, "
            f"e.g. {', '.join(missing[:3])}; Ray's logs have the reason; run the job again to retry them"
        )
    if totals.failed > max_failed_rows * totals.rows_in:
        raise UnfinishedError(
            f"{manifest.root}: {totals.failed:,} of {totals.rows_in:,} rows failed "
            f"({totals.null_queries:,} null queries, {totals.null_texts:,} null texts); "
            f"expected at most {max_failed_rows:.2%}; the rows name their error; "
            "mend the input, or raise scoring.max_failed_rows and run again"
        )
    mark = {"fingerprint": plan.fingerprint, "units": totals.units, "rows": totals.rows_out}
    lease.check()
    with storage_errors(manifest.success):
        manifest.success.create_exclusive(json.dumps(mark).encode())


@contextmanager
def _recording(manifest: Manifest, plan: Plan, totals: Totals, lease: Lease) -> Iterator[None]:
    """Keep `_manifest/status.json` true to how the job ends, as far as storage allows; a job that has lost its lease
    leaves it to its successor."""
    manifest.write_status(_status("running", plan, totals))
    try:
        yield
    except BaseException as error:
        if not lease.lost:
            _try_status(manifest, _ending(error, plan, totals))
        raise
    manifest.write_status(_status("done", plan, totals, 0))


def _ending(error: BaseException, plan: Plan, totals: Totals) -> dict[str, Any]:
    if isinstance(error, KeyboardInterrupt):
        return _status("interrupted", plan, totals, 130)
    if isinstance(error, BatchRerankError):
        return _status("failed", plan, totals, error.exit_code, str(error))
    return _status("failed", plan, totals, 1, f"{type(error).__name__}: {error}")


def _try_status(manifest: Manifest, status: dict[str, Any]) -> None:
    try:
        manifest.write_status(status)
    except BatchRerankError as error:
        log.warning("the status could not be written: %s", error)


def _status(state: str, plan: Plan, totals: Totals, exit_code: int | None = None, message: str = "") -> dict[str, Any]:
    return {
        "state": state,
        "exit_code": exit_code,
        "message": message,
        "updated_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "fingerprint": plan.fingerprint,
        "units_planned": len(plan.units),
        "pairs_planned": plan.pairs,
        "totals": asdict(totals),
    }
