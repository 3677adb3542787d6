"""What an output takes on storage, and removing what is not needed of it: only files that are named as ours."""

import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from batch_rerank.errors import ConflictError
from batch_rerank.publish.output import Place, is_stage, lease_seconds_of, open_output
from batch_rerank.publish.publication import stands
from batch_rerank.store.bookkeeping import expected_parts, is_ours
from batch_rerank.store.filesystem import Location, locate
from batch_rerank.store.latest import names as names_it
from batch_rerank.store.latest import read_pointers
from batch_rerank.store.lease import EPOCH, FOLDER, hold
from batch_rerank.store.manifest import Manifest
from batch_rerank.store.names import OUTPUT_KINDS, TREC_RUN, Files, work_name
from batch_rerank.store.plans import Plan
from batch_rerank.store.scan import Scan, scan

What = Literal["work", "scores", "all"]
REMOVALS = 16
"""Requests at once."""


@dataclass(frozen=True)
class Taken:
    """Files and bytes of one kind."""

    files: int
    bytes: int


@dataclass(frozen=True)
class Cleaned:
    """What an output takes by kind, before anything is removed, and which of it was, or would be. `others` are files
    that are not ours, which stay. kept: why an output keeps what it was asked to give."""

    output: str
    takes: dict[str, Taken]
    removed: dict[str, Taken]
    kept: str = ""


def clean(
    place: Place, what: What, *, latest: str | None = None, force: bool = False, dry_run: bool = False
) -> Cleaned:
    """Remove of an output its working files, its scores too, or all of it. `latest`: a pointer beside the one of the
    output's own job; an output that one of them names keeps its parts and scores unless forced.

    Working files are needed until the output is finished, so an unfinished output keeps them, and loses them with
    `all` only; scores that are not gathered yet are no working files. Raises StorageError where it is none of ours,
    and ConflictError where a job is at work on it.
    """
    manifest, plan = open_output(place, or_stage=True)
    found = scan(manifest, plan)
    takes = {kind: _taken(found.files, names) for kind, names in by_kind(manifest, plan, found).items()}

    def nothing(kept: str) -> Cleaned:
        return Cleaned(str(manifest.root), takes, {}, kept)

    if kept := _kept(manifest, plan, found, place, what, latest, force):
        return nothing(kept)
    if dry_run:
        return Cleaned(str(manifest.root), takes, _sizes(found.files, _names(manifest, plan, found, what)))
    with hold(manifest.root, lease_seconds_of(plan)) as lease:
        # the lease may have taken a minute, in which another job has withdrawn, finished or removed the output
        there = manifest.read_plan()
        if there is None or there.fingerprint != plan.fingerprint:
            raise ConflictError(f"{manifest.root}: another job has removed or replaced it meanwhile; look at it again")
        plan, found = there, scan(manifest, there)
        if kept := _kept(manifest, plan, found, place, what, latest, force):
            return nothing(kept)
        names = _names(manifest, plan, found, what)
        lease.check()
        for group in names.values():
            with ThreadPoolExecutor(REMOVALS) as pool:
                list(pool.map(lambda name: manifest.remove_seen(name, found.files), group[:-1]))
            for name in group[-1:]:  # the plan when all else is gone
                manifest.remove_seen(name, found.files)
            lease.check()
    if what == "all":  # the lease itself, which no next job would find a plan beside
        lease.remove()
        _remove_folders(manifest.root, {name.rpartition("/")[0] for group in names.values() for name in group})
    return Cleaned(str(manifest.root), takes, _sizes(found.files, names))


def _remove_folders(root: Location, folders: set[str]) -> None:
    """Of a disk: those of ours in which nothing is left, and the output's own."""
    if root.is_local:
        for folder in sorted({*folders, FOLDER, "_manifest", ""}, key=len, reverse=True):
            with suppress(OSError):  # not empty, or not there
                os.rmdir(f"{root.path}/{folder}".rstrip("/"))


def by_kind(manifest: Manifest, plan: Plan, found: Scan) -> dict[str, list[str]]:
    """The files of an output: mark, parts, scores, work, records, and what is not ours. Parts are those of its
    publication, and what says that it is of this job."""
    files = found.files
    kinds: dict[str, list[str]] = {kind: files.matching(pattern) for kind, pattern in OUTPUT_KINDS.items()}
    expected = {TREC_RUN, *expected_parts(manifest, plan, found.publication)}
    kinds["parts"] = [name for name in kinds["parts"] if name in expected or is_ours(manifest.root / name, plan)]
    known = {name for names in kinds.values() for name in names}
    kinds["others"] = [name for name in files.found if name not in known]
    return kinds


def _names(manifest: Manifest, plan: Plan, found: Scan, what: What) -> dict[str, list[str]]:
    """What goes, in this order: readers see the mark go first, and whoever goes on finds the plan until the end."""
    kinds = by_kind(manifest, plan, found)
    whole = ("mark", "report", "parts", "work", "scores", "records")
    wanted = {"work": ("work",), "scores": ("work", "scores"), "all": whole}
    names = {kind: kinds[kind] for kind in wanted[what]}
    if what == "work":
        alone = {work_name(one.unit) for one in found.committed if found.place(one) is None}
        names["work"] = [name for name in names["work"] if name not in alone]
    if "records" in names:
        names["records"] = [name for name in names["records"] if not re.fullmatch(f"{FOLDER}/{EPOCH}", name)]
        names["records"].sort(key=lambda name: name == "_manifest/plan.json")
    return names


def _kept(
    manifest: Manifest, plan: Plan, found: Scan, place: Place, what: What, latest: str | None, force: bool
) -> str:
    if what != "all" and not _finished(manifest, plan, found):
        return "it is not finished, and its working files are what a run goes on from"
    if force or what == "work":
        return ""
    pointers = [latest, None if is_stage(plan) else (plan.config.get("output") or {}).get("latest")]
    pointers += [place.job.output.latest] if place.job else []
    pointers += [] if is_stage(plan) else read_pointers(manifest)
    for pointer in dict.fromkeys(filter(None, pointers)):
        if _named(locate(str(pointer), place.options), manifest.root):
            return f"{pointer} names it; --force removes it all the same"
    return ""


def _finished(manifest: Manifest, plan: Plan, found: Scan) -> bool:
    """Whether all of it is there: a unit's scores may be so, and the part that was made of them not."""
    whole = "_SUCCESS" in found.files.found if manifest.staged else stands(manifest.read_mark(), plan, found)
    return whole and len(found.committed) == len(plan.units)


def _named(pointer: Location, root: Location) -> bool:
    """Whether a pointer names an output. Raises StorageError, and ConflictError where it is no pointer of ours."""
    try:
        return names_it(pointer, root)
    except ConflictError as error:
        raise ConflictError(f"{error}; --force does without") from None


def _sizes(files: Files, names: dict[str, list[str]]) -> dict[str, Taken]:
    return {kind: _taken(files, group) for kind, group in names.items() if group}


def _taken(files: Files, names: Iterable[str]) -> Taken:
    sizes = [files.found[name].size for name in names]
    return Taken(len(sizes), sum(sizes))
