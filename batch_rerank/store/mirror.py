"""A model's files in a store, as `batch-rerank fetch` puts them there: `_MIRROR` comes last and says what they are.

A reader takes the files that `_MIRROR` names and no others, and holds what it fetches against their checksums. Until
then `_MIRROR.unfinished` says what has arrived, so that the same command goes on where it was killed.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, NoReturn

from pydantic import Field

from batch_rerank.errors import ConflictError, ModelError, StorageError
from batch_rerank.store.failures import storage_errors
from batch_rerank.store.filesystem import File, Location
from batch_rerank.store.records import Count, Line, parse

log = logging.getLogger("batch_rerank")

MIRROR, UNFINISHED = "_MIRROR", "_MIRROR.unfinished"


@dataclass(frozen=True)
class Mirrored:
    """A file: its name below the place, bytes, checksum, and the version that the store gave it, empty before."""

    name: Line
    size: Count
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    version: Line = ""


@dataclass(frozen=True)
class Mirror:
    """`_MIRROR`. identity: of the model, as plans have it; source: the hub id that it is a copy of, else empty."""

    identity: Annotated[str, Field(pattern=r"^(commit|sha256):[0-9a-f]{1,64}$")]
    source: Line = ""
    files: list[Mirrored] = field(default_factory=list)

    def to_json(self) -> bytes:
        """One JSON object."""
        return json.dumps(asdict(self), indent=1).encode()

    def same_as(self, other: "Mirror | None") -> bool:
        """Whether these are the same files, whatever versions a store gave them."""
        if other is None:
            return False
        ours, theirs = ({(one.name, one.size, one.sha256) for one in two.files} for two in (self, other))
        return (self.identity, self.source, ours) == (other.identity, other.source, theirs)


@dataclass(frozen=True)
class Done:
    """What mirroring took. size: bytes that were copied; kept: files that were there already."""

    place: str
    identity: str
    files: int
    size: int
    kept: int
    seconds: float
    retries: int


def names_below(place: Location, listed: Mapping[str, File]) -> dict[str, File]:
    """Files of a listing by their names below a place."""
    start = f"{place.path.rstrip('/')}/"
    return {path[len(start) :]: file for path, file in listed.items() if path.startswith(start)}


def read_mirror(place: Location, listed: Mapping[str, File]) -> Mirror | None:
    """What a place is a mirror of, None where it is none. listed: its files by name.

    Raises ModelError where the mirror is not finished, or its files are not there as it says.
    """
    if MIRROR not in listed:
        if UNFINISHED in listed:
            refuse_unfinished(place)
        return None
    try:
        with storage_errors(place, ModelError):
            found = parse(Mirror, (place / MIRROR).read_bytes())
    except ValueError as error:
        raise ModelError(
            f"{place / MIRROR}: damaged ({error}); mirror the model again (batch-rerank fetch --replace)"
        ) from None
    wrong = [one.name for one in found.files if one.name not in listed or listed[one.name].size != one.size]
    if wrong:
        raise ModelError(
            f"{place}: {len(wrong)} files are not there with the sizes that {MIRROR} says, such as {wrong[0]!r}; the "
            "copy is damaged: mirror the model again (batch-rerank fetch)"
        )
    return found


def refuse_unfinished(place: Location) -> NoReturn:
    """Raise ModelError for a mirror without its mark."""
    raise ModelError(
        f"{place}: a mirror that is not finished; expected {MIRROR}; wait for `batch-rerank fetch`, or run it again"
    )


def mirror(
    place: Location, directory: Path, names: Sequence[str], identity: str, source: str = "", replacing: bool = False
) -> Done:
    """Copy files of a directory to a place; those that an earlier call has copied are kept.

    Raises ConflictError where something else is there (`replacing`: another mirror is replaced), and StorageError.
    """
    started = time.monotonic()
    with storage_errors(place):
        listed = names_below(place, place.find())
        finished, begun = (_recorded(place / name, listed) for name in (MIRROR, UNFINISHED))
    files = [Mirrored(name, (directory / name).stat().st_size, _sha256(directory / name)) for name in sorted(names)]
    wanted = Mirror(identity, source, files)
    _refuse_other(place, listed, wanted, [one for one in (finished, begun) if one], replacing)
    there = {one.name: one for old in (finished, begun) if old for one in old.files if _is_there(one, listed)}
    kept = [one.name for one in files if (one.size, one.sha256) == _content(there.get(one.name))]
    if wanted.same_as(finished) and len(kept) == len(files) and UNFINISHED not in listed:
        return Done(str(place), identity, len(files), 0, len(kept), time.monotonic() - started, place.patience.retries)
    now = {name: there[name] for name in kept}
    with storage_errors(place):
        _record(place / UNFINISHED, wanted, now)
        if not wanted.same_as(finished):
            (place / MIRROR).remove()
        size = 0
        for number, one in enumerate(files, 1):
            if one.name in now:
                continue
            log.info("%s: %s bytes (%d of %d)", place / one.name, f"{one.size:,}", number, len(files))
            now[one.name] = replace(one, version=_put(place / one.name, directory / one.name, one.size))
            size += one.size
            _record(place / UNFINISHED, wanted, now)
        stale = {one.name for old in (finished, begun) if old for one in old.files} - set(now)
        for name in stale & set(listed):
            (place / name).remove()
        _check(place, now)
        (place / MIRROR).write_bytes(replace(wanted, files=[now[one.name] for one in files]).to_json())
        (place / UNFINISHED).remove()
    seconds = time.monotonic() - started
    return Done(str(place), identity, len(files), size, len(kept), seconds, place.patience.retries)


def _recorded(location: Location, listed: Mapping[str, File]) -> Mirror | None:
    if location.name not in listed:
        return None
    try:
        return parse(Mirror, location.read_bytes())
    except ValueError as error:
        log.warning("%s: damaged (%s)", location, error)
        return None


def _refuse_other(
    place: Location, listed: Mapping[str, File], wanted: Mirror, earlier: list[Mirror], replacing: bool
) -> None:
    if not {MIRROR, UNFINISHED} & set(listed):
        if listed:
            raise ConflictError(
                f"{place}: holds files that are of no mirror, e.g. {min(listed)!r}; expected an empty place for the "
                "model; use another one"
            )
        return
    if not earlier and not replacing:
        raise ConflictError(
            f"{place}: what it says of its model cannot be read (see above), so it may be another one; expected an "
            "empty place; use another one, or replace what is there with --replace (jobs that fetch it meanwhile end)"
        )
    others = [one for one in earlier if not wanted.same_as(one)]
    # the newest is begun: killed while it replaced another, it goes on
    if others and not replacing and not (len(earlier) == 2 and wanted.same_as(earlier[1])):
        raise ConflictError(
            f"{place}: holds {others[-1].source or 'a model'} ({others[-1].identity}), finished or not; expected an "
            f"empty place, or {wanted.identity}; use another place, or replace what is there with --replace (jobs that "
            "fetch it meanwhile end)"
        )


def _is_there(one: Mirrored, listed: Mapping[str, File]) -> bool:
    file = listed.get(one.name)
    return file is not None and (file.size, file.version) == (one.size, one.version)


def _content(one: Mirrored | None) -> tuple[int, str] | None:
    return None if one is None else (one.size, one.sha256)


def _record(location: Location, wanted: Mirror, now: Mapping[str, Mirrored]) -> None:
    """What is to be there; a file without a version has not arrived."""
    files = [now.get(one.name, one) for one in wanted.files]
    location.write_bytes(replace(wanted, files=files).to_json())


def _put(location: Location, source: Path, size: int) -> str:
    """Copy a file, and give its version."""
    if location.is_local:
        os.makedirs(os.path.dirname(location.path), exist_ok=True)
        with location.writer() as file, source.open("rb") as opened:
            shutil.copyfileobj(opened, file, 2**24)
    else:
        location.patiently(lambda: location.fs.put_file(str(source), location.path))
    found = location.stat()
    if found.size != size:
        raise StorageError(
            f"{location}: found {found.size:,} bytes, expected {size:,}; somebody else writes there, or the source "
            "changed; run it again"
        )
    return found.version


def _check(place: Location, now: Mapping[str, Mirrored]) -> None:
    listed = names_below(place, place.find())
    wrong = [one.name for one in now.values() if not _is_there(one, listed)]
    if wrong:
        raise StorageError(f"{place}: {wrong[0]!r} is not as it was written; somebody else writes there; run it again")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
