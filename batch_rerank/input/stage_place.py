"""Where a staged input is where no job says: a folder named by what its sources hold, so that every job of the same
sources finds it, beside them where a job may write there, else beside the output.

Looked for in this order: the stage that the output was scored from; `<output.path>-stage`, where earlier versions had
it; beside the sources; beside the output.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from batch_rerank.config import JobConfig
from batch_rerank.errors import StorageError
from batch_rerank.input.contents import Key
from batch_rerank.input.places import is_within, same_store
from batch_rerank.input.sources import Source
from batch_rerank.store.failures import denied
from batch_rerank.store.filesystem import STAGE, Location, locate
from batch_rerank.store.manifest import Manifest
from batch_rerank.store.plans import Plan

PART = "/part-*.parquet"


@dataclass(frozen=True)
class Place:
    """A stage's manifest and the plan that is there, if any. `instead`: where the stage goes if this place refuses to
    be written; note: what is to be said of the choice when it is made there, else empty."""

    manifest: Manifest
    existing: Plan | None
    instead: Location | None = None
    note: str = ""


def at(root: Location, instead: Location | None = None) -> Place:
    """What is at a place."""
    manifest = Manifest(root, staged=True)
    return Place(manifest, manifest.read_plan(), instead)


def pattern_of(root: Location) -> str:
    """What a job reads of its stage."""
    return re.sub(r"([*?[])", r"[\1]", str(root)) + PART  # a * in the path is no glob


def of_output(config: JobConfig) -> Location | None:
    """The stage that the job's output was scored from; None where there is no output yet, or it read something else."""
    plan = Manifest(locate(config.output.path, config.output.storage_options)).read_plan()
    given = plan.config.get("input") if plan is not None else None
    return scored_from(config, given) if isinstance(given, dict) else None


def scored_from(config: JobConfig, given: Mapping[str, Any]) -> Location | None:
    """The same, by the section `input` of the output's plan."""
    pattern = given.get("path")
    pattern = pattern[0] if isinstance(pattern, list) and len(pattern) == 1 else pattern
    if given.get("layout") != "nested" or not isinstance(pattern, str) or not pattern.endswith(PART):
        return None
    root = locate(re.sub(r"\[([*?[])\]", r"\1", pattern.removesuffix(PART)), config.output.storage_options)
    if config.input.stage:
        return root if root == locate(config.input.stage, config.output.storage_options) else None
    if re.fullmatch(STAGE, root.name) or root == former(config):
        return root
    plan = Manifest(root, staged=True).read_plan()
    return root if plan is not None and plan.config.get("stage") else None


def former(config: JobConfig) -> Location:
    """Where earlier versions staged: the same place for a sample as for the whole."""
    whole = config.output.path.removesuffix(f"-limit-{config.limit}").rstrip("/")
    return locate(f"{whole}-stage", config.output.storage_options)


def find_place(config: JobConfig, sources: Sequence[Source], fingerprint: str, own: Location | None) -> Place:
    """The place of a stage of these sources: where it is, or else where it goes. own: what `of_output` gives."""
    options = config.output.storage_options
    if config.input.stage:
        return at(locate(config.input.stage, options))
    name = f"_stage-{fingerprint[:16]}"
    if own is not None:
        place = at(own)
        if place.existing is not None or own.name == name or not re.fullmatch(STAGE, own.name):
            return place
        # gone, and of other sources: its name is theirs
    before = at(former(config))
    beside = _beside_output(config)
    there = before if beside is None else at(beside / name)
    aside, note = _look(config, sources, name, there.manifest.root)
    for place in (before, *([aside] if aside else []), there):
        if place.existing is not None and place.existing.fingerprint == fingerprint:
            return place
    if before.existing is not None:
        note = f"{before.manifest.root} holds the stage of other sources, and stays; {note}".removesuffix("; ")
    return replace(aside or there, note=note)


def _look(config: JobConfig, sources: Sequence[Source], name: str, instead: Location) -> tuple[Place | None, str]:
    """The place beside the sources; None where that is not for this job, and why."""
    folder, reason = _beside_sources(config, sources)
    if folder is None:
        return None, f"staged beside the output, as {reason}"
    try:
        return at(folder / name, instead), ""
    except StorageError as error:
        if not denied(error):
            raise
        return None, f"staged beside the output, as {folder} may not be looked into"


def noted(config: JobConfig, sources: Sequence[Source], own: Location | None) -> Mapping[Key, str]:
    """What the stages nearby say of files that are untouched since: those need not be read again. Of a disk's files;
    a store says itself what is in them."""
    known: dict[Key, str] = {}
    wanted = {
        (url, file.size, file.version)
        for source in sources
        for url, file in source.files
        if file.version.startswith("mtime:")
    }
    for root in _nearby(config, sources, own) if wanted else ():
        if wanted <= known.keys():
            break
        try:
            plan = Manifest(root, staged=True).read_plan()
            contents = held(plan) if plan is not None else []
        except (StorageError, TypeError, ValueError):  # of others, perhaps damaged: it only spares work
            continue
        if plan is not None:
            for shard, (_, content) in zip(plan.shards, contents, strict=False):
                known[shard.url, shard.file.size, shard.file.version] = content
    return known


def held(plan: Plan) -> list[tuple[str, str]]:
    """The kind and the content of each file of a stage's sources; nothing in plans of older versions."""
    return [(str(kind), str(content)) for kind, content in plan.config.get("sources", [])]


def _nearby(config: JobConfig, sources: Sequence[Source], own: Location | None) -> Iterator[Location]:
    """Where stages may be that know the sources, the likeliest first."""
    if config.input.stage:
        yield locate(config.input.stage, config.output.storage_options)
        return
    if own is not None:
        yield own
    yield former(config)
    for folder in (_beside_sources(config, sources)[0], _beside_output(config)):
        if folder is not None and folder.is_local:
            for name in _newest(folder.path):
                yield folder / name


def _newest(folder: str) -> list[str]:
    """The stages of a folder, the newest first; none of one that does not let itself be listed."""
    try:
        found = [(entry.stat().st_mtime, entry.name) for entry in os.scandir(folder) if re.fullmatch(STAGE, entry.name)]
    except OSError:  # they only spare work
        return []
    return [name for _, name in sorted(found, reverse=True)]


def _beside_sources(config: JobConfig, sources: Sequence[Source]) -> tuple[Location | None, str]:
    """The folder of the first source file, where a job may write as far as can be told without trying: in the output's
    own bucket, or on a disk in a folder that is open to this user. Else None, and why: where the output lies around it,
    too."""
    url, file = sources[0].files[0]
    output = locate(config.output.path, config.output.storage_options)
    read = locate(url, config.input.storage_options)
    folder = output.at(file.path.rpartition("/")[0] or "/")
    if not (same_store(read, output) and same_store(output, read)) or _bucket(folder) != _bucket(output):
        return None, f"{url} is in another store or bucket, which this job only reads"
    if is_within(folder, output):
        return None, f"{url} lies within the output"
    if output.is_local and not os.access(folder.path, os.W_OK | os.X_OK):
        return None, f"{folder} may not be written"
    return folder, ""


def _beside_output(config: JobConfig) -> Location | None:
    """The folder that the output lies in; None where it is a whole bucket."""
    output = locate(config.output.path, config.output.storage_options)
    above = output.path.rstrip("/").rpartition("/")[0]
    if not above and not output.is_local:
        return None
    return output.at(above or "/")


def _bucket(location: Location) -> str:
    """Of a store; a disk has none."""
    return "" if location.is_local else location.path.lstrip("/").partition("/")[0]
