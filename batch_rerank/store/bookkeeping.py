"""What a job and a stage share: what is done already, and a status that is true to how they end."""

import logging
import re
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import pyarrow.parquet as pq

from batch_rerank.errors import BatchRerankError, ConflictError, StorageError, UnfinishedError
from batch_rerank.outside import without_secrets
from batch_rerank.store.disk import uninterrupted
from batch_rerank.store.distrusted import read_distrusted
from batch_rerank.store.failures import UNREADABLE, is_damage
from batch_rerank.store.filesystem import Location, storage_errors
from batch_rerank.store.lease import Lease
from batch_rerank.store.manifest import Manifest
from batch_rerank.store.names import OUTPUT_KINDS, PART, TREC_RUN, part_name
from batch_rerank.store.plans import Plan
from batch_rerank.store.receipts import Publication, Receipt, Totals
from batch_rerank.store.records import Mark
from batch_rerank.store.scan import (
    WORKERS,
    Scan,
    discard,
    evidence,
    note_name,
    part_files,
    scan,
    scores_files,
    unit_files,
)

log = logging.getLogger("batch_rerank")


def made_again(manifest: Manifest, plan: Plan, found: Scan) -> dict[str, str]:
    """Units with a receipt that a run makes again, by id, and why."""
    again = found.broken | doubtful(manifest, plan, found)
    if "_SUCCESS" not in found.files.found:
        failed = (receipt for receipt in found.committed if receipt.engine_failed)
        again |= {r.unit: f"the engine failed on {r.engine_failed} of its pairs" for r in failed}
    return again


def resume(manifest: Manifest, plan: Plan, totals: Totals, lease: Lease) -> tuple[frozenset[str], Scan]:
    """What is done already. Units that are not as they should be are named and made not done, and so are those with
    pairs that the engine could not score: it may have been the engine; and those with scores that failed an audit.
    Under the lease."""
    found = scan(manifest, plan)
    remove_late_parts(manifest, found, plan)
    refuse_strays(manifest, found, plan)
    again = made_again(manifest, plan, found)
    for unit_id, reason in again.items():
        log.warning("unit %s: %s; it is made again", unit_id, reason)
    done = [receipt for receipt in found.committed if receipt.unit not in again]
    for receipt in done:
        totals.add(receipt)
    totals.resumed_pairs = totals.rows_in
    units = frozenset(receipt.unit for receipt in done)
    _note_again(manifest, found, again, lease)
    with storage_errors(manifest.root):
        # each removal is of what the scan saw: a driver that was paused here must not touch what a successor wrote
        _withdraw(manifest, plan, found, units)
        discard(manifest, found, again)
        for name in found.spoiled:
            for file in scores_files(name):
                manifest.remove_seen(file, found.files)
        kept = {f"_manifest/failures/{unit}.json" for unit in units}
        for name in found.files.leftovers():
            if name not in kept:
                manifest.remove_seen(name, found.files)
    lease.check()
    if done:
        log.info("resuming: %d of %d units are done", len(done), len(plan.units))
    return units, found


def _note_again(manifest: Manifest, found: Scan, again: Iterable[str], lease: Lease) -> None:
    """Note of units that they are made again, before anything of them is removed: who takes over from a driver that is
    paused behind this finds them undone, and publishes nothing of what that removes when it wakes. Raises
    ConflictError where the lease is lost; no note stays then.

    A unit without a file has no note: nothing of it can be removed, and later, gathered, it has none again."""
    files = {unit: unit_files(manifest, unit) for unit in again}
    there = [unit for unit, names in files.items() if any(name in found.files.found for name in names)]
    notes = {note_name(unit): evidence(found.files, files[unit]) for unit in there}

    def write(name: str) -> None:
        location = manifest.root / name
        with storage_errors(location):
            if not location.create_exclusive(notes[name]):  # one of other versions
                manifest.remove_seen(name, found.files)
                location.create_exclusive(notes[name])

    def take_back(name: str) -> None:
        with storage_errors(manifest.root):
            (manifest.root / name).take_back(notes[name])

    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(write, notes))
        try:
            lease.check()  # held still: every holder after this one sees the notes
        except ConflictError:
            list(pool.map(take_back, notes))
            raise


def doubtful(manifest: Manifest, plan: Plan, found: Scan) -> dict[str, str]:
    """Units with scores of an earlier output that failed the audit, or with a file of which no receipt says that it has
    none: a commit would adopt it."""
    distrusted = read_distrusted(manifest)
    if not distrusted:
        return {}
    sources = {receipt.unit: receipt.reused_from for receipt in found.committed}
    files = {unit.id: manifest.unit_name(unit.id) for unit in plan.units if unit.id not in sources}
    units = {unit for unit, name in files.items() if name in found.files.found}
    units |= {unit for unit, outputs in sources.items() if not distrusted.isdisjoint(outputs)}
    return dict.fromkeys(units, "it may have scores of an earlier output that failed the audit")


def _withdraw(manifest: Manifest, plan: Plan, found: Scan, done: frozenset[str]) -> None:
    """Remove what is published of units that are not done, and parts that are not whole; the mark before them."""
    publication, stale = found.publication, set[int]()
    if publication is not None:
        for number, (first, last) in enumerate(publication.parts):
            whole = all(unit.id in done for unit in plan.units[first : last + 1])
            if not whole or number not in found.parts:
                stale.add(number)
    if stale or len(done) < len(plan.units):
        for name in ("_SUCCESS", TREC_RUN, *found.files.matching(OUTPUT_KINDS["report"])):
            manifest.remove_seen(name, found.files)
    for number in stale:
        for name in (*part_files(number), note_name(part_name(number))):
            manifest.remove_seen(name, found.files)
        found.parts.pop(number, None)


def remove_late_parts(manifest: Manifest, found: Scan, plan: Plan) -> None:
    """Remove parts of this job that no publication has: a publisher that was paused while another withdrew its
    publication has written them since. Under the lease."""
    for name in found.files.strays(expected_parts(manifest, plan, found.publication)):
        if not manifest.staged and re.fullmatch(PART, name) and is_ours(manifest.root / name, plan):
            log.warning("%s: a part of a publication that was withdrawn; removed", manifest.root / name)
            manifest.remove_seen(name, found.files)
            del found.files.found[name]


def is_ours(part: Location, plan: Plan) -> bool:
    """Whether a Parquet file says that it is a part of this job. Raises StorageError."""
    with storage_errors(part), part.open() as file:
        try:
            metadata = pq.read_schema(file).metadata or {}
        except UNREADABLE as error:
            if not is_damage(error):
                raise
            return False
    told = metadata.get(b"batch_rerank.fingerprint") == plan.fingerprint.encode()
    return told and b"batch_rerank.publication" in metadata


def refuse_strays(manifest: Manifest, found: Scan, plan: Plan) -> None:
    """Raise ConflictError where an output holds Parquet files that are not of this plan."""
    strays = found.files.strays(expected_parts(manifest, plan, found.publication))
    if strays:
        raise ConflictError(
            f"{manifest.root}: holds {len(strays)} Parquet file(s) that are not of this job, e.g. {strays[0]}; readers "
            "would take them for output; move them away and run again"
        )


def expected_parts(manifest: Manifest, plan: Plan, publication: Publication | None) -> list[str]:
    """The names of the parts that an output may hold."""
    if manifest.staged:
        return [part_name(unit.id) for unit in plan.units]
    return [part_name(number) for number in range(len(publication.parts))] if publication else []


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
    """Write `_SUCCESS`, unless one that says the same is there. Raises ConflictError where the lease is lost; a mark
    that was written late is taken back."""
    mark = replace(mark, fingerprint=plan.fingerprint, units=len(plan.units), lease=lease.id)
    # a lost lease interrupts the driver that wakes, and what it wrote must be taken back all the same
    uninterrupted(partial(_create_mark, manifest, mark, lease))


def _create_mark(manifest: Manifest, mark: Mark, lease: Lease) -> None:
    location = manifest.success
    with storage_errors(location):
        seen = location.stat() if location.exists() else None
        lease.check()
        if not location.create_exclusive(mark.to_json()):
            there = manifest.read_mark()
            same = there is not None and replace(there, lease=mark.lease) == mark
            # one whose writer was paused behind it would take it back when it wakes
            if there is not None and same and (there.lease == lease.id or not lease.may_wake(there.lease)):
                return
            # of what was seen before the lease was looked at: a successor's mark stays
            gone = seen is not None and location.remove_seen(seen)
            if not gone or not location.create_exclusive(mark.to_json()):
                raise ConflictError(f"{location}: another job has written it meanwhile; run again when that has ended")
        try:
            lease.check()
        except ConflictError:
            location.take_back(mark.to_json())
            raise


@contextmanager
def recording(manifest: Manifest, plan: Plan, totals: Totals, lease: Lease) -> Iterator[None]:
    """Keep `_manifest/status.json` true to how the job ends, as far as storage allows; a job that has lost its lease
    leaves it to its successor. What only publishes leaves the times and the rate of the run that has scored."""
    before = manifest.read_status()
    manifest.write_status(status_of("running", plan, totals, lease))
    try:
        yield
    except BaseException as error:
        # a task may have seen before the driver that the lease is lost, or that a successor has tidied up
        if isinstance(error, ConflictError | StorageError):
            with suppress(StorageError):
                lease.check()
        if not lease.lost:
            _try_status(manifest, _ending(error, plan, totals, lease))
        raise
    done = status_of("done", plan, totals, lease, 0)
    if totals.rows_in == totals.resumed_pairs and before.pairs_per_second:
        done |= {name: getattr(before, name) for name in ("started_at", "seconds", "pairs_per_second")}
    manifest.write_status(done)


def _ending(error: BaseException, plan: Plan, totals: Totals, lease: Lease) -> dict[str, Any]:
    if isinstance(error, KeyboardInterrupt):
        return status_of("interrupted", plan, totals, lease, 130)
    if isinstance(error, BatchRerankError):
        return status_of("failed", plan, totals, lease, error.exit_code, str(error))
    return status_of("failed", plan, totals, lease, 1, without_secrets(f"{type(error).__name__}: {error}"))


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
