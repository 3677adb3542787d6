"""A scored output to training files: exported once, whatever dies when.

Order: the census of all scores, which every limit is held against; the plan; each part's files, then its receipt; where
there is a table of documents, its files in the same way; `_SUCCESS` when all of them are there. Everything under a
lease, by the same rules as an output.
"""

import logging
import re
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

from batch_rerank.calls import Each
from batch_rerank.errors import ConflictError, InputError, StorageError
from batch_rerank.label_settings import Labels
from batch_rerank.labels.census import Census, take_census
from batch_rerank.labels.documents import BUCKET_ROWS, Gather, gather
from batch_rerank.labels.limits import refuse_left_out, refuse_missing
from batch_rerank.labels.part import Order, commit, create, export_part, receipts_of
from batch_rerank.labels.plan import Prepared, about, by_size, check_matches, prepare, prompted
from batch_rerank.labels.records import (
    PLAN,
    LabelFile,
    LabelMark,
    LabelPlan,
    LabelReceipt,
    documents_receipt,
    part_receipt,
)
from batch_rerank.labels.scores import unit_ids
from batch_rerank.labels.targets import to_bytes
from batch_rerank.publish.output import Place
from batch_rerank.store.disk import TEMPORARY_NAME
from batch_rerank.store.filesystem import Location, locate, storage_errors
from batch_rerank.store.lease import Lease, hold
from batch_rerank.store.manifest import Manifest, differing
from batch_rerank.store.names import Files
from batch_rerank.store.records import parse

log = logging.getLogger("batch_rerank")

LOG_SECONDS = 10.0
OWN = rf"_manifest/lease/.*|(?:.*/)?{TEMPORARY_NAME}"
"""What a directory may hold that nothing was exported to yet: an export that was killed before its plan."""


@dataclass(frozen=True)
class Exported:
    """What is there now. counts: of everything chosen and dropped; about: source, scale, spread, advised temperature,
    thresholds; files: of the readers; again: it was there already."""

    path: str
    counts: dict[str, int]
    about: dict[str, Any]
    files: int
    rows: int
    bytes: int
    seconds: float
    again: bool = False


@dataclass(frozen=True)
class Looked:
    """What `--dry-run` has found."""

    counts: dict[str, int]
    about: dict[str, Any]


def dry_run(place: Place, labels: Labels, each: Each) -> Looked:
    """What would be chosen and dropped, from scores that exist. Writes nothing. Raises as `export`, but for limits."""
    prepared = prepare(place, labels, each)
    census = _census(prepared, by_size(prepared.output, each))
    return Looked(_counts(census), about(prepared) | _told(census, prepared.scale))


def export(place: Place, labels: Labels, each: Each) -> Exported:
    """Export an output's labels, or what is left of it.

    Raises ConfigError, InputError (an unfinished output, an input that changed, judgements of other queries, more
    queries left out than may be), ConflictError where the place holds something else, StorageError.
    """
    started = time.monotonic()
    prepared = prepare(place, labels, each)
    each = by_size(prepared.output, each)
    root = locate(labels.path, labels.storage_options)
    plan = _standing(root, prepared)
    if plan is not None:
        refuse_missing(prepared, plan.about["counts"])
        refuse_left_out(prepared, plan.about["counts"])
        mark = read_mark(root)
        if mark is not None and _is_whole(mark, plan, _list(root)):
            _tidy(root, _list(root))
            return _exported(root, mark, started, again=True)
    if plan is None:
        census = _census(prepared, each)
        counts = _counts(census)
        refuse_left_out(prepared, counts)
        chosen = counts["positives"] + counts["negatives"]
        buckets = -(-chosen // BUCKET_ROWS) if labels.form[1] == "tables" else 0
        told = about(prepared) | _told(census, prepared.scale) | {"counts": counts}
        plan = LabelPlan(prepared.fingerprint, prepared.fields, prepared.parts, buckets, told)
    with hold(root, prepared.output.config.cluster.lease_seconds) as lease:
        plan = _begin(root, plan, prepared)
        _withdraw_mark(root, plan)
        mark = _finish(root, plan, prepared, lease, each)
    return _exported(root, mark, started)


def _census(prepared: Prepared, each: Each) -> Census:
    census = Census()
    calls = [partial(take_census, work, prepared.labels, prepared.output.model) for work in prepared.works()]
    for found in each(calls, prepared.qrels):  # the judgements are the last argument
        census.add(found)
    first = (name for _, names in unit_ids(prepared.output.source(prepared.output.plan.units[:1])) for name in names)
    check_matches(prepared, census.counts["judged_queries"], first)
    refuse_missing(prepared, census.counts)
    return census


def _counts(census: Census) -> dict[str, int]:
    return dict(sorted(census.counts.items()))


def _told(census: Census, scale: str) -> dict[str, Any]:
    spread = census.spread
    return {
        "spread": spread.percentiles,
        "saturated": spread.saturated,
        "temperature": census.temperature(scale),
        "thresholds": census.thresholds,
    }


def _list(root: Location) -> Files:
    return Manifest(root).list_files()


def _standing(root: Location, prepared: Prepared) -> LabelPlan | None:
    """The plan that is there, which must be this export's. Raises ConflictError where the place holds another export,
    or anything else."""
    location = root / PLAN
    with storage_errors(location):
        try:
            data = location.read_bytes()
        except FileNotFoundError:
            foreign = [name for name in _list(root).found if not re.fullmatch(OWN, name)]
            if foreign:
                raise ConflictError(
                    f"{root}: holds {len(foreign)} file(s) that are of no export, e.g. {foreign[0]}; expected an empty "
                    "place; use another labels.path (--path)"
                ) from None
            return None
        except NotADirectoryError:
            raise ConflictError(f"{root}: is a file; expected a directory; use another labels.path (--path)") from None
    try:
        plan = parse(LabelPlan, data)
    except ValueError as error:
        raise StorageError(
            f"{location}: not what we write ({error}); use another labels.path, or delete all of it"
        ) from None
    lines = differing(plan.fields, prepared.fields)
    if lines or plan.fingerprint != prepared.fingerprint:
        raise ConflictError(
            f"{root}: holds another export, which differs in {', '.join(lines)}:\n"
            + "\n".join(lines.values())
            + "\nexpected the same export or an empty place; use another labels.path (--path), or delete this one"
        )
    return plan


def _begin(root: Location, plan: LabelPlan, prepared: Prepared) -> LabelPlan:
    """Of two exports both follow the plan that was first."""
    with storage_errors(root / PLAN):
        if (root / PLAN).create_exclusive(plan.to_json()):
            return plan
    there = _standing(root, prepared)
    assert there is not None, "it exists"
    return there


def read_mark(root: Location) -> LabelMark | None:
    """`_SUCCESS` of an export; None where there is none, or none of ours."""
    with storage_errors(root / "_SUCCESS"):
        try:
            return parse(LabelMark, (root / "_SUCCESS").read_bytes())
        except (FileNotFoundError, ValueError):
            return None


def _is_whole(mark: LabelMark, plan: LabelPlan, files: Files) -> bool:
    return mark.fingerprint == plan.fingerprint and all(files.size(one.name) == one.size for one in mark.files)


def _withdraw_mark(root: Location, plan: LabelPlan) -> None:
    """Remove a `_SUCCESS` that speaks of files which are gone. Under the lease."""
    mark, files = read_mark(root), _list(root)
    if "_SUCCESS" in files.found and (mark is None or not _is_whole(mark, plan, files)):
        Manifest(root).remove_seen("_SUCCESS", files)


def _finish(root: Location, plan: LabelPlan, prepared: Prepared, lease: Lease, each: Each) -> LabelMark:
    """Make what is missing, and mark it complete."""
    order = Order(
        root=str(root),
        labels=prepared.labels,
        model=prepared.output.model,
        scale=prepared.scale,
        fingerprint=plan.fingerprint,
        buckets=plan.buckets,
        prompted=prompted(prepared.output),
        epoch=lease.epoch,
    )
    done = _receipts(root, plan, "_manifest/parts")
    missing = [work for work in prepared.works() if work.number not in done]
    if done:
        log.info("resuming: %d of %d parts are done", len(done), len(plan.parts))
    said = time.monotonic()
    for receipt in each([partial(export_part, work, order) for work in missing], prepared.qrels):
        done[receipt.part] = receipt
        lease.check()
        if time.monotonic() - said >= LOG_SECONDS:
            said = time.monotonic()
            log.info("exported %d of %d parts", len(done), len(plan.parts))
    parts = [done[number] for number in range(len(plan.parts))]
    counts = Counter[str]()
    for receipt in parts:
        counts.update(receipt.counts)
    try:
        refuse_left_out(prepared, counts)
    except InputError as error:  # texts have ruled out more than scores alone
        _discard(root, parts)
        raise InputError(
            f"{error}\nempty and repeated texts count here, which --dry-run does not read; what was written is removed"
        ) from None
    documents = _documents(root, plan, order, parts, lease, each)
    files = [one for receipt in (*parts, *documents) for one in receipt.files if not one.name.startswith("_work/")]
    counts["documents"] = sum(one.rows for receipt in documents for one in receipt.files)
    return _mark(root, plan, dict(sorted(counts.items())), files, lease)


def _discard(root: Location, parts: list[LabelReceipt]) -> None:
    """Take parts away again, receipts first: a reader takes whatever lies in its folder."""
    files = _list(root)
    names = [part_receipt(one.part) for one in parts] + [file.name for one in parts for file in one.files]
    for name in names:
        Manifest(root).remove_seen(name, files)


def _receipts(root: Location, plan: LabelPlan, folder: str) -> dict[int, LabelReceipt]:
    """The receipts whose files are there, with the sizes that they say."""
    files = _list(root)
    bodies = [Manifest(root).read(name) for name in files.within(folder) if name.endswith(".json")]
    return {
        one.part: one
        for one in receipts_of(bodies)
        if one.fingerprint == plan.fingerprint and all(files.size(file.name) == file.size for file in one.files)
    }


def _documents(
    root: Location, plan: LabelPlan, order: Order, parts: list[LabelReceipt], lease: Lease, each: Each
) -> list[LabelReceipt]:
    done = _receipts(root, plan, "_manifest/documents")
    having = [one.part for one in parts if any(file.name.startswith("_work/") for file in one.files)]
    missing = [number for number in range(plan.buckets) if number not in done]
    calls = [partial(_gathered, Gather(number, having), order) for number in missing]
    for receipt in each(calls):
        done[receipt.part] = receipt
        lease.check()
    return [done[number] for number in range(plan.buckets)]


def _gathered(work: Gather, order: Order) -> LabelReceipt:
    options = order.labels.storage_options
    table = gather(work, order.root, options, order.root)
    root = locate(order.root, options, reached=True)
    name = f"documents/part-{work.bucket:05d}.parquet"
    files = [create(root, name, to_bytes(table), len(table), order.epoch)] if len(table) else []
    receipt = LabelReceipt(work.bucket, order.fingerprint, files)
    return commit(root, documents_receipt(work.bucket), receipt, order.epoch)


def _mark(root: Location, plan: LabelPlan, counts: dict[str, int], files: list[LabelFile], lease: Lease) -> LabelMark:
    """Write `_SUCCESS`. What it says is true of files that nobody changes, so one that was written late stays true."""
    listed = _list(root)
    gone = [one.name for one in files if listed.size(one.name) != one.size]
    if gone:
        raise StorageError(
            f"{root}: {len(gone)} file(s) do not show in a listing as they were written, e.g. {gone[0]}; run again"
        )
    told = {name: value for name, value in plan.about.items() if name != "counts"}
    mark = LabelMark(plan.fingerprint, counts, files, told, lease.id)
    lease.check()
    with storage_errors(root / "_SUCCESS"):
        if not (root / "_SUCCESS").create_exclusive(mark.to_json()):
            there = read_mark(root)
            if there is None or (there.fingerprint, there.files) != (mark.fingerprint, mark.files):
                raise ConflictError(f"{root / '_SUCCESS'}: another export has written it meanwhile; run again")
            mark = there
    _tidy(root, listed)
    return mark


def _tidy(root: Location, files: Files) -> None:
    """Behind `_SUCCESS`: what only the export needed goes, and hidden files of killed writes."""
    for name in files.matching(rf"_work/documents-[0-9]{{5,9}}\.parquet|(?:.*/)?{TEMPORARY_NAME}"):
        Manifest(root).remove_seen(name, files)


def _exported(root: Location, mark: LabelMark, started: float, again: bool = False) -> Exported:
    shown = [one for one in mark.files if not one.name.startswith("_")]
    return Exported(
        path=str(root),
        counts=dict(mark.counts),
        about=dict(mark.about),
        files=len(shown),
        rows=sum(one.rows for one in shown if one.name.startswith(("train/", "heldout/"))),
        bytes=sum(one.size for one in shown),
        seconds=round(time.monotonic() - started, 3),
        again=again,
    )
