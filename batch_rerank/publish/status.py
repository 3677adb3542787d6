"""How far an output is and whether anybody is at work on it: what `batch-rerank status` shows.

`_manifest/status.json` is what a run said last; a run that was killed says nothing any more. So the lease is asked: its
holder is known to have ended where it was on this machine, and elsewhere its counter must move.
"""

from batch_rerank.publish.output import Place, lease_seconds_of, open_output
from batch_rerank.publish.publication import stands
from batch_rerank.store.lease import sign_of_life
from batch_rerank.store.manifest import Manifest
from batch_rerank.store.plans import Plan
from batch_rerank.store.scan import scan
from batch_rerank.store.verdict import read_verdict

Shown = str | int | float | bool | None | list[str]


def status_of_output(place: Place) -> dict[str, Shown]:
    """The state, counts and rate of an output. Raises ConfigError and StorageError."""
    manifest, plan = open_output(place, or_stage=True)
    last = manifest.read_status()
    found = scan(manifest, plan)
    verdict = read_verdict(manifest)
    state, message = last.state, last.message
    if state == "running":
        state, message = of_lease(manifest, plan)
    return {
        "state": state,
        "exit_code": last.exit_code,
        "message": message,
        "started_at": last.started_at or None,
        "updated_at": last.updated_at or None,
        "seconds": last.seconds,
        "pairs_per_second": last.pairs_per_second,
        "units_done": len(found.committed),
        "units_planned": len(plan.units),
        "units_broken": list(found.broken),
        "units_set_aside": found.set_aside(),
        "parts_published": len(found.parts),
        "parts_planned": None if found.publication is None else len(found.publication.parts),
        "pairs_done": sum(receipt.rows_in for receipt in found.committed),
        "pairs_planned": plan.pairs,
        "failed_rows": sum(receipt.failed for receipt in found.committed),
        "units_padded": sum(bool(receipt.fallback) for receipt in found.committed),
        "units_moved": sum(receipt.moves for receipt in found.committed),
        "gate": None if verdict is None else verdict.summary,
        "success": "_SUCCESS" in found.files.found if manifest.staged else stands(manifest.read_mark(), plan, found),
    }


def of_lease(manifest: Manifest, plan: Plan) -> tuple[str, str]:
    """The state of a run whose last word was that it is running."""
    found = sign_of_life(manifest.root, lease_seconds_of(plan))
    if found.alive:
        return "running", f"{found.holder}"
    if found.alive is None:
        return "silent", f"{found.holder}: no sign of life for {found.seconds:g} s; it may be paused, cut off or killed"
    if found.released:
        return "ended", f"it has ended without saying how; {found.holder} was the last at work here; run the job again"
    return "killed", f"{found.holder} has ended without saying how (killed, or its machine is gone); run the job again"
