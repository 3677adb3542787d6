"""Arrays larger than memory: appended to files of a temporary directory, read again by ranges, or in order of a key."""

import errno
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from batch_rerank.errors import StorageError

log = logging.getLogger("batch_rerank")
CHUNK = 2**21
"""Records that are looked at together."""

Records = npt.NDArray[Any]


class Spill:
    """Files without a name in TMPDIR: the system frees them when this is left, and also where the process is killed.
    Raises StorageError where nothing can be written."""

    def __init__(self) -> None:
        self._files: list[IO[bytes]] = []
        self.bytes = 0

    def __enter__(self) -> "Spill":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()

    def column(self, kind: npt.DTypeLike) -> "Column":
        """A new file of records of one type."""
        with self.errors():  # unbuffered: records are appended and read some MB at a time
            file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (closed when this is left)
        self._files.append(file)
        return Column(self, self._files[-1], np.dtype(kind))

    def say(self) -> None:
        """How much has been written where."""
        log.info("the join of ids has written %s bytes to temporary files in %s", f"{self.bytes:,}", _place())

    @contextmanager
    def errors(self) -> Iterator[None]:
        """What the disk raises, as StorageError."""
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            needs = "staging needs some 60 bytes a candidate there; " if full else ""
            raise StorageError(
                f"{_place()}: {error.strerror or error} after {self.bytes:,} bytes of the join; {needs}set TMPDIR to a "
                "directory with more room that can be written, and run again"
            ) from None


def _place() -> str:
    try:
        return tempfile.gettempdir()
    except OSError:
        return "the temporary directory"


class Column:
    """Records of one type, in a file."""

    def __init__(self, spill: Spill, file: IO[bytes], kind: np.dtype[Any]) -> None:
        self._spill, self._file, self.kind = spill, file, kind
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def append(self, records: Records) -> None:
        """Raises StorageError."""
        data = np.ascontiguousarray(records, self.kind).view(np.uint8).data
        with self._spill.errors():
            self._file.seek(0, os.SEEK_END)
            while data:
                data = data[self._file.write(data) :]
        self._length += len(records)
        self._spill.bytes += len(records) * self.kind.itemsize

    def read(self, start: int, stop: int) -> Records:
        """Records `start` to `stop`. Raises StorageError."""
        with self._spill.errors():
            self._file.seek(start * self.kind.itemsize)
            found = np.fromfile(self._file, self.kind, stop - start)
        if len(found) != stop - start:
            raise StorageError(f"{_place()}: a temporary file of the join ends early; run again")
        return found

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[Records]:
        """All of them, or some, in order."""
        stop = self._length if stop is None else stop
        for first in range(start, stop, CHUNK):
            yield self.read(first, min(first + CHUNK, stop))


class Sorted:
    """Records in ranges of a key: as many sorted runs as were added, of which a range takes its part of each.

    borders: int64[ranges + 1], ascending; a key is in range i from borders[i] on, below borders[i + 1]."""

    def __init__(self, spill: Spill, kind: npt.DTypeLike, borders: npt.NDArray[np.int64]) -> None:
        self._column, self._borders = spill.column(kind), borders
        self._cuts: list[npt.NDArray[np.int64]] = []

    def add(self, keys: npt.NDArray[Any], records: Records) -> None:
        """One run; its keys ascend."""
        self._cuts.append(np.searchsorted(keys, self._borders) + len(self._column))
        self._column.append(records)

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """int64[ranges]: records of each."""
        none = np.zeros(len(self._borders) - 1, np.int64)
        return np.sum([np.diff(cuts) for cuts in self._cuts], axis=0) if self._cuts else none

    def read(self, index: int) -> Records:
        """The records of a range, run after run."""
        parts = [self._column.read(int(cuts[index]), int(cuts[index + 1])) for cuts in self._cuts]
        return np.concatenate(parts) if parts else np.empty(0, self._column.kind)
