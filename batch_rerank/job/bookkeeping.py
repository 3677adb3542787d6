"""What a job and a stage share: what is done already, and a status that is true to how they end."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from batch_rerank.errors import BatchRerankError, ConflictError
from batch_rerank.store.filesystem import storage_errors
from batch_rerank.store.lease import Lease
from batch_rerank.store.manifest import Files, Manifest, Plan, Totals

log = logging.getLogger("batch_rerank")


def resume(manifest: Manifest, plan: Plan, totals: Totals, lease: Lease) -> frozenset[str]:
    """What is done already. Units that are not as they should be are named and made not done, and so are those with
    pairs that the engine could not score: it may have been the engine. Under the lease."""
    scan = manifest.scan(plan)
    refuse_strays(manifest, scan.files, plan)
    again = dict(scan.broken)
    if "_SUCCESS" not in scan.files.found:
        failed = (receipt for receipt in scan.committed if receipt.engine_failed)
        again |= {r.unit: f"the engine failed on {r.engine_failed} of its pairs" for r in failed}
    for unit_id, reason in again.items():
        log.warning("unit %s: %s; it is made again", unit_id, reason)
    done = [receipt for receipt in scan.committed if receipt.unit not in again]
    for receipt in done:
        totals.add(receipt)
    lease.check()
    with storage_errors(manifest.root):
        if len(done) < len(plan.units):
            manifest.success.remove()
            manifest.trec_run.remove()
        for unit_id in again:
            manifest.discard(unit_id)
        kept = {f"_manifest/failures/{receipt.unit}.json" for receipt in done}
        for name in scan.files.leftovers():
            if name not in kept:
                (manifest.root / name).remove()
    if done:
        log.info("resuming: %d of %d units are done", len(done), len(plan.units))
    return frozenset(receipt.unit for receipt in done)


def refuse_strays(manifest: Manifest, files: Files, plan: Plan) -> None:
    """Raise ConflictError where an output holds Parquet files that are not of this plan."""
    strays = files.strays(unit.id for unit in plan.units)
    if strays:
        raise ConflictError(
            f"{manifest.root}: holds {len(strays)} Parquet file(s) that are not of this job, e.g. {strays[0]}; readers "
            "would take them for output; move them away and run again"
        )


@contextmanager
def recording(manifest: Manifest, plan: Plan, totals: Totals, lease: Lease) -> Iterator[None]:
    """Keep `_manifest/status.json` true to how the job ends, as far as storage allows; a job that has lost its lease
    leaves it to its successor."""
    manifest.write_status(status_of("running", plan, totals))
    try:
        yield
    except BaseException as error:
        if not lease.lost:
            _try_status(manifest, _ending(error, plan, totals))
        raise
    manifest.write_status(status_of("done", plan, totals, 0))


def _ending(error: BaseException, plan: Plan, totals: Totals) -> dict[str, Any]:
    if isinstance(error, KeyboardInterrupt):
        return status_of("interrupted", plan, totals, 130)
    if isinstance(error, BatchRerankError):
        return status_of("failed", plan, totals, error.exit_code, str(error))
    return status_of("failed", plan, totals, 1, f"{type(error).__name__}: {error}")


def _try_status(manifest: Manifest, status: dict[str, Any]) -> None:
    try:
        manifest.write_status(status)
    except BatchRerankError as error:
        log.warning("the status could not be written: %s", error)


def status_of(
    state: str, plan: Plan, totals: Totals, exit_code: int | None = None, message: str = ""
) -> dict[str, Any]:
    """What `_manifest/status.json` says."""
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
