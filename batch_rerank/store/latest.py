"""The file that `output.latest` names, read."""

from dataclasses import dataclass

from batch_rerank.errors import ConflictError
from batch_rerank.store.filesystem import Location, storage_errors
from batch_rerank.store.records import parse


@dataclass(frozen=True)
class _Pointer:
    path: str


def read_latest(pointer: Location) -> str | None:
    """The path of the output that a pointer names; None where there is no pointer. Raises StorageError, and
    ConflictError where it is none of ours."""
    with storage_errors(pointer):
        try:
            return parse(_Pointer, pointer.read_bytes()).path
        except FileNotFoundError:
            return None
        except ValueError:
            raise ConflictError(f"{pointer}: not what output.latest writes; expected JSON with a path") from None
