"""What an output takes on storage, and removing what is not needed of it: only files that are named as ours."""

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from batch_rerank.errors import ConflictError, StorageError
from batch_rerank.publish.output import Place, is_stage, lease_seconds_of, open_output
from batch_rerank.store.filesystem import Location, locate, storage_errors
from batch_rerank.store.lease import FOLDER, hold
from batch_rerank.store.manifest import Manifest
from batch_rerank.store.names import OUTPUT_KINDS, Files, work_name
from batch_rerank.store.plans import Plan
from batch_rerank.store.scan import scan

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
    files = manifest.list_files()
    takes = {kind: _taken(files, names) for kind, names in by_kind(files).items()}
    kept = _kept(manifest, plan, place, what, latest, force)
    if kept:
        return Cleaned(str(manifest.root), takes, {}, kept)
    if dry_run:
        return Cleaned(str(manifest.root), takes, _sizes(files, _names(manifest, plan, files, what)))
    with hold(manifest.root, lease_seconds_of(plan)) as lease:
        files = manifest.list_files()
        names = _names(manifest, plan, files, what)
        lease.check()
        for group in names.values():
            with ThreadPoolExecutor(REMOVALS) as pool:
                list(pool.map(lambda name: manifest.remove_seen(name, files), group))
            lease.check()
    if what == "all":  # the lease itself, which no next job would find a plan beside
        last = manifest.list_files(FOLDER)
        for name in last.found:
            manifest.remove_seen(name, last)
    return Cleaned(str(manifest.root), takes, _sizes(files, names))


def by_kind(files: Files) -> dict[str, list[str]]:
    """The files of an output: mark, parts, scores, work, records, and what is not ours."""
    found: dict[str, list[str]] = {kind: files.matching(pattern) for kind, pattern in OUTPUT_KINDS.items()}
    known = {name for names in found.values() for name in names}
    found["others"] = [name for name in files.found if name not in known]
    return found


def _names(manifest: Manifest, plan: Plan, files: Files, what: What) -> dict[str, list[str]]:
    """What goes, in this order: readers see the mark go first, and whoever goes on finds the plan until the end."""
    kinds = by_kind(files)
    wanted = {"work": ("work",), "scores": ("work", "scores"), "all": ("mark", "parts", "work", "scores", "records")}
    names = {kind: kinds[kind] for kind in wanted[what]}
    if what == "work":
        found = scan(manifest, plan)
        alone = {work_name(one.unit) for one in found.committed if found.place(one) is None}
        names["work"] = [name for name in names["work"] if name not in alone]
    if "records" in names:
        names["records"] = [name for name in names["records"] if not name.startswith(f"{FOLDER}/")]
        names["records"].sort(key=lambda name: name == "_manifest/plan.json")
    return names


def _kept(manifest: Manifest, plan: Plan, place: Place, what: What, latest: str | None, force: bool) -> str:
    found = scan(manifest, plan)
    if what != "all" and ("_SUCCESS" not in found.files.found or len(found.committed) < len(plan.units)):
        return "it is not finished, and its working files are what a run goes on from"
    if force or what == "work":
        return ""
    pointers = [latest, None if is_stage(plan) else (plan.config.get("output") or {}).get("latest")]
    pointers += [place.job.output.latest] if place.job else []
    for pointer in dict.fromkeys(filter(None, pointers)):
        if _named(locate(str(pointer), place.options), manifest.root):
            return f"{pointer} names it; --force removes it all the same"
    return ""


def _named(pointer: Location, root: Location) -> bool:
    """Whether a pointer names an output. Raises StorageError, and ConflictError where it is no pointer of ours."""
    with storage_errors(pointer):
        try:
            told = json.loads(pointer.read_bytes())
        except FileNotFoundError:
            return False
        except ValueError:
            told = None
    if not isinstance(told, dict) or not isinstance(told.get("path"), str):
        raise ConflictError(
            f"{pointer}: not what output.latest writes; expected JSON with a path; --force does without"
        )
    try:
        return str(locate(told["path"])) == str(root)
    except StorageError:
        return False


def _sizes(files: Files, names: dict[str, list[str]]) -> dict[str, Taken]:
    return {kind: _taken(files, group) for kind, group in names.items() if group}


def _taken(files: Files, names: Iterable[str]) -> Taken:
    sizes = [files.found[name].size for name in names]
    return Taken(len(sizes), sum(sizes))
