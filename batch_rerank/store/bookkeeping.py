"""What a job and a stage share: what is done already, and a status that is true to how they end."""

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from batch_rerank.errors import BatchRerankError, ConflictError, UnfinishedError
from batch_rerank.store.filesystem import storage_errors
from batch_rerank.store.lease import Lease
from batch_rerank.store.manifest import Manifest, Plan, Receipt, Totals
from batch_rerank.store.names import TREC_RUNS, Files
from batch_rerank.store.records import Mark

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
    totals.resumed_pairs = totals.rows_in
    lease.check()
    with storage_errors(manifest.root):
        # each removal is of what the scan saw: a driver that was paused here must not touch what a successor wrote
        if len(done) < len(plan.units):
            old_run = plan.config.get("output", {}).get("trec_run")  # else a run.trec is somebody else's
            for name in ("_SUCCESS", *(TREC_RUNS if old_run else TREC_RUNS[:1])):
                manifest.remove_seen(name, scan.files)
        for unit_id in again:
            manifest.discard(unit_id, scan.files)
        kept = {f"_manifest/failures/{receipt.unit}.json" for receipt in done}
        for name in scan.files.leftovers():
            if name not in kept:
                manifest.remove_seen(name, scan.files)
    lease.check()
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


class Expected:
    """The units of a plan that have no receipt yet. `_SUCCESS` rests on this set, not on a number of receipts."""

    def __init__(self, manifest: Manifest, plan: Plan, done: Iterable[str]) -> None:
        self._where, self._of = manifest.root, len(plan.units)
        self.left = {unit.id for unit in plan.units} - set(done)

    def take(self, receipt: Receipt) -> bool:
        """Whether this is the first receipt of a unit that was expected; others are named and must not be counted."""
        if receipt.unit not in self.left:
            log.warning(
                "%s: a receipt of unit %r, which is done or not of this job; passed over", self._where, receipt.unit
            )
            return False
        self.left.remove(receipt.unit)
        return True

    def check(self, known: dict[str, str]) -> None:
        """Raise UnfinishedError that names what is missing; `known` has the reasons as far as they are known."""
        if not self.left:
            return
        missing = sorted(self.left)
        named = [f"{unit} ({known.get(unit, 'Ray gave it up; its logs have the reason')})" for unit in missing[:3]]
        raise UnfinishedError(
            f"{self._where}: {len(missing)} of {self._of} units did not finish: {', '.join(named)}"
            f"{', …' if len(missing) > 3 else ''}; the others are done; run the job again to retry them"
        )


def mark_done(manifest: Manifest, plan: Plan, mark: Mark, lease: Lease) -> None:
    """Write `_SUCCESS`, unless one that says the same is there. Raises ConflictError where the lease is lost."""
    lease.check()
    mark = replace(mark, fingerprint=plan.fingerprint, units=len(plan.units), lease=lease.id)
    with storage_errors(manifest.success):
        if manifest.success.create_exclusive(mark.to_json()):
            return
        there = manifest.read_mark()
        same = there is not None and (there.fingerprint, there.units, there.rows) == (
            mark.fingerprint,
            mark.units,
            mark.rows,
        )
        if there is None or not same or mark.trec_run not in (None, there.trec_run):
            manifest.success.write_bytes(mark.to_json())
            if there is not None and there.old_run:
                (manifest.root / TREC_RUNS[1]).remove()


@contextmanager
def recording(manifest: Manifest, plan: Plan, totals: Totals, lease: Lease) -> Iterator[None]:
    """Keep `_manifest/status.json` true to how the job ends, as far as storage allows; a job that has lost its lease
    leaves it to its successor."""
    manifest.write_status(status_of("running", plan, totals, lease))
    try:
        yield
    except BaseException as error:
        if not lease.lost:
            _try_status(manifest, _ending(error, plan, totals, lease))
        raise
    manifest.write_status(status_of("done", plan, totals, lease, 0))


def _ending(error: BaseException, plan: Plan, totals: Totals, lease: Lease) -> dict[str, Any]:
    if isinstance(error, KeyboardInterrupt):
        return status_of("interrupted", plan, totals, lease, 130)
    if isinstance(error, BatchRerankError):
        return status_of("failed", plan, totals, lease, error.exit_code, str(error))
    return status_of("failed", plan, totals, lease, 1, f"{type(error).__name__}: {error}")


def _try_status(manifest: Manifest, status: dict[str, Any]) -> None:
    try:
        manifest.write_status(status)
    except BatchRerankError as error:
        log.warning("the status could not be written: %s", error)


def status_of(
    state: str, plan: Plan, totals: Totals, lease: Lease, exit_code: int | None = None, message: str = ""
) -> dict[str, Any]:
    """What `_manifest/status.json` says: `records.Status`, and more for people."""
    seconds = lease.seconds_held
    return {
        "state": state,
        "exit_code": exit_code,
        "message": message,
        "started_at": lease.since,
        "seconds": round(seconds, 1),
        "pairs_per_second": round((totals.rows_in - totals.resumed_pairs) / seconds, 1) if seconds else 0.0,
        "updated_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "fingerprint": plan.fingerprint,
        "units_planned": len(plan.units),
        "pairs_planned": plan.pairs,
        "totals": asdict(totals),
    }
