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
from batch_rerank.errors import BatchRerankError, ConflictError, UnfinishedError
from batch_rerank.job.plan import make_plan
from batch_rerank.job.progress import Display
from batch_rerank.job.run_local import run_local
from batch_rerank.store.filesystem import locate, storage_errors
from batch_rerank.store.lease import Lease, hold
from batch_rerank.store.manifest import Manifest, Plan, Receipt, SetAside, Totals

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
            rates, failed = _follow(receipts, manifest, plan, totals, lease, config.scoring.max_failed_units)
            _finalise(manifest, plan, totals, config.scoring.max_failed_rows, failed, lease)
    totals.storage_retries += manifest.root.patience.retries
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


def _on_ray(config: JobConfig, model: ModelSpec, plan: Plan, done: frozenset[str]) -> Iterator[Receipt | SetAside]:
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
    """What is done already. Units that are not as they should be are named and made not done, and so are those with
    pairs that the engine could not score: it may have been the engine. Under the lease."""
    scan = manifest.scan(plan)
    strays = scan.files.strays(unit.id for unit in plan.units)
    if strays:
        raise ConflictError(
            f"{manifest.root}: holds {len(strays)} Parquet file(s) that are not of this job, e.g. {strays[0]}; readers "
            "would take them for output; move them away and run again"
        )
    again = dict(scan.broken)
    if "_SUCCESS" not in scan.files.found:
        failed = (receipt for receipt in scan.committed if receipt.engine_failed)
        again |= {r.unit: f"the engine failed on {r.engine_failed} of its pairs" for r in failed}
    for unit_id, reason in again.items():
        log.warning("unit %s: %s; it is scored again", unit_id, reason)
    done = [receipt for receipt in scan.committed if receipt.unit not in again]
    for receipt in done:
        totals.add(receipt)
    lease.check()
    with storage_errors(manifest.root):
        if len(done) < len(plan.units):
            manifest.success.remove()
        for unit_id in again:
            manifest.discard(unit_id)
        kept = {f"_manifest/failures/{receipt.unit}.json" for receipt in done}
        for name in scan.files.leftovers():
            if name not in kept:
                (manifest.root / name).remove()
    if done:
        log.info("resuming: %d of %d units are done", len(done), len(plan.units))
    return frozenset(receipt.unit for receipt in done)


def _follow(
    receipts: Iterator[Receipt | SetAside],
    manifest: Manifest,
    plan: Plan,
    totals: Totals,
    lease: Lease,
    max_failed_units: int,
) -> tuple[tuple[float, float] | None, list[SetAside]]:
    """Count receipts as they come: this run's rates, and the units set aside. No receipt is kept, so the driver does
    not grow with the number of units."""
    next_status = time.monotonic() + STATUS_SECONDS
    failed: list[SetAside] = []
    with Display(len(plan.units), plan.pairs, totals) as display:
        for receipt in receipts:
            if isinstance(receipt, SetAside):
                failed.append(receipt)
                _record_failure(manifest, receipt)
                if len(failed) > max_failed_units:
                    raise UnfinishedError(
                        f"{manifest.root}: {len(failed)} units could not be scored, the last {receipt.unit}: "
                        f"{receipt.error}; expected at most scoring.max_failed_units = {max_failed_units} before the "
                        "job gives up; see _manifest/failures; run the job again to retry them"
                    )
            else:
                totals.add(receipt)
                display.advance(receipt)
            if lease.lost:
                lease.check()
            if time.monotonic() >= next_status:
                next_status = time.monotonic() + STATUS_SECONDS
                manifest.write_status(_status("running", plan, totals))
        return display.meter.rates, failed


def _record_failure(manifest: Manifest, failed: SetAside) -> None:
    log.error("unit %s is set aside after %d tries: %s", failed.unit, failed.tries, failed.error)
    location = manifest.failure(failed.unit)
    with storage_errors(location):
        location.write_bytes(json.dumps(asdict(failed)).encode())


def _finalise(
    manifest: Manifest, plan: Plan, totals: Totals, max_failed_rows: float, failed: list[SetAside], lease: Lease
) -> None:
    if totals.units != len(plan.units):
        raise UnfinishedError(_unfinished(manifest, plan, failed))
    if totals.failed > max_failed_rows * totals.rows_in:
        raise UnfinishedError(
            f"{manifest.root}: {totals.failed:,} of {totals.rows_in:,} rows failed "
            f"({totals.null_queries:,} null queries, {totals.null_texts:,} null texts, {totals.engine_failed:,} in the "
            f"engine); expected at most {max_failed_rows:.2%}; the rows name their error; "
            "mend the input, or raise scoring.max_failed_rows and run again"
        )
    mark = {"fingerprint": plan.fingerprint, "units": totals.units, "rows": totals.rows_out}
    lease.check()
    with storage_errors(manifest.success):
        manifest.success.create_exclusive(json.dumps(mark).encode())


def _unfinished(manifest: Manifest, plan: Plan, failed: list[SetAside]) -> str:
    """Which units are missing, and why as far as is known."""
    done = {receipt.unit for receipt in manifest.scan(plan).committed}
    known = {unit.unit: unit.error for unit in failed}
    missing = [unit.id for unit in plan.units if unit.id not in done]
    named = [f"{unit} ({known.get(unit, 'Ray gave it up; its logs have the reason')})" for unit in missing[:3]]
    return (
        f"{manifest.root}: {len(missing)} of {len(plan.units)} units did not finish: {', '.join(named)}"
        f"{', …' if len(missing) > 3 else ''}; the others are done; run the job again to retry them"
    )


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
