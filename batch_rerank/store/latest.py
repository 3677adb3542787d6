"""The file that `output.latest` names; and the pointers that were moved to an output, as it remembers them."""

import json
import os
import posixpath
from dataclasses import asdict, dataclass
from typing import Any

from batch_rerank.errors import ConflictError, StorageError
from batch_rerank.store.filesystem import Location, locate, storage_errors
from batch_rerank.store.manifest import Manifest
from batch_rerank.store.records import Line, parse

POINTERS = "_manifest/pointers.json"


@dataclass(frozen=True)
class Pointer:
    """What a pointer says: the output's path, and of what is published there; `published_at` in UTC. The path is what
    makes it one; the rest is for readers."""

    path: str
    fingerprint: Any = None
    publication: Any = None
    rows: Any = None
    published_at: Any = None

    def to_json(self) -> bytes:
        """One JSON object."""
        return json.dumps(asdict(self)).encode()


def read_pointer(pointer: Location) -> Pointer | None:
    """None where there is no pointer. Raises StorageError, and ConflictError where it is none of ours."""
    with storage_errors(pointer):
        try:
            return parse(Pointer, pointer.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            raise ConflictError(
                f"{pointer}: not what output.latest writes; expected JSON with a path; move it away or use another name"
            ) from None


def read_latest(pointer: Location) -> str | None:
    """The path of the output that a pointer names. None and raises as `read_pointer`."""
    found = read_pointer(pointer)
    return None if found is None else found.path


def names(pointer: Location, root: Location) -> bool:
    """Whether a pointer names an output. Raises what `read_latest` raises."""
    path = read_latest(pointer)
    if path is None:
        return False
    try:
        named = locate(path)
    except StorageError:
        return False
    return named.fs.protocol == root.fs.protocol and real_path(named) == real_path(root)


def real_path(location: Location) -> str:
    """Without links and .. on a local disk; stores have neither."""
    return os.path.realpath(location.path) if location.is_local else posixpath.normpath(location.path)


@dataclass(frozen=True)
class _Pointers:
    pointers: list[Line]


def read_pointers(manifest: Manifest) -> list[str]:
    """The pointers that publishers have moved to an output: a later one may have had another than the job of the plan.
    Raises StorageError, also where the record is damaged."""
    location = manifest.root / POINTERS
    with storage_errors(location):
        try:
            return parse(_Pointers, location.read_bytes()).pointers
        except FileNotFoundError:
            return []
        except ValueError as error:
            raise StorageError(f"{location}: not what we write ({error}); delete it") from None


def remember_pointer(manifest: Manifest, pointer: Location) -> None:
    """Add a pointer to those that an output remembers, before it is moved. Raises StorageError."""
    known = read_pointers(manifest)
    if str(pointer) not in known:
        location = manifest.root / POINTERS
        with storage_errors(location):
            location.write_bytes(json.dumps({"pointers": [*known, str(pointer)]}).encode())
