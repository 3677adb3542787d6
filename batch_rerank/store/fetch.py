"""Files of a store into a directory of this node's cache: in pieces, several at once, each piece once.

A file has its name when all of it is there and is what was asked for. Until then it is a file of its full size in
`parts`, with a byte for each piece beside it, so a fetch that was killed goes on with the pieces that lack. What was
asked for is a name with a size and a version; the version is looked at before the first byte and after every piece, so
a file that is replaced meanwhile is an error and never a mixture, not even where its version comes back later.
"""

import hashlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from batch_rerank.errors import ModelError
from batch_rerank.store.failures import storage_errors
from batch_rerank.store.filesystem import Location
from batch_rerank.store.node_cache import NodeCache, apparent
from batch_rerank.store.patience import may_pass

log = logging.getLogger("batch_rerank")

PIECE = 32 * 2**20
PIECES_AT_ONCE, FILES_AT_ONCE = 8, 4
SAID_SECONDS = 30.0


@dataclass(frozen=True)
class Wanted:
    """A file of a store as it was listed. version: etag, or its time where a store has none; sha256: of its content,
    empty where that is not known."""

    name: str
    size: int
    version: str
    sha256: str = ""


@dataclass
class Fetched:
    """What was done: bytes that came, seconds, waiting for others included, and requests that were repeated."""

    directory: Path
    size: int = 0
    seconds: float = 0.0
    retries: int = 0
    _said: float = field(default_factory=time.monotonic, repr=False)
    _turn: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, size: int, place: Location) -> None:
        """Count what has come, and say so now and then."""
        with self._turn:
            self.size += size
            if time.monotonic() - self._said >= SAID_SECONDS:
                self._said = time.monotonic()
                log.info("%s: %s bytes fetched", place, f"{self.size:,}")


def key_of(place: Location, listed: Sequence[Wanted]) -> str:
    """The cache's directory for files of a place as they were listed: others, or other versions, have another one."""
    told = [str(place), *(f"{one.name}\0{one.size}\0{one.version}" for one in sorted(listed, key=lambda one: one.name))]
    return f"model-{hashlib.sha256(chr(10).join(told).encode()).hexdigest()[:32]}"


def fetch(place: Location, wanted: Sequence[Wanted], cache: NodeCache, key: str, part: str) -> Fetched:
    """Put what lacks of these files below the cache's directory `key`/files, which then stays until this process ends.
    part: a name for them; who fetches one part of a directory does not wait for who fetches another.

    Raises ModelError where a file is gone, is another by now, or is not what its checksum says; StorageError; and
    ConfigError where the cache cannot be used.
    """
    started = time.monotonic()
    entry = cache.use(key)
    found = Fetched(entry / "files")
    if not lacking(found.directory, wanted):
        return found
    before = place.patience.retries
    with cache.alone(f"{key}.{part}", f"{place}: fetching to {found.directory}"):
        missing = lacking(found.directory, wanted)
        if missing:
            parts = {one.name: _Part(entry, one) for one in missing}
            total = apparent(found.directory) + sum(one.size for one in missing)

            def lay_out() -> None:
                for part in parts.values():
                    part.lay_out()

            cache.reserve(key, total, lay_out)
            _fetch_all(place, list(parts.values()), found)
    found.seconds, found.retries = time.monotonic() - started, place.patience.retries - before
    if found.size:
        log.info(
            "%s: %s bytes fetched in %.1f s to %s, %d requests repeated",
            place,
            f"{found.size:,}",
            found.seconds,
            found.directory,
            found.retries,
        )
    return found


def lacking(directory: Path, wanted: Sequence[Wanted]) -> list[Wanted]:
    """Which of the files are not in a directory with their sizes."""

    def size(one: Wanted) -> int | None:
        with suppress(FileNotFoundError, NotADirectoryError):
            return (directory / one.name).stat().st_size
        return None

    return [one for one in wanted if size(one) != one.size]


def forget(directory: Path, names: Sequence[str]) -> None:
    """Remove files that have turned out damaged, to be fetched again."""
    for name in names:
        with suppress(FileNotFoundError):
            (directory / name).unlink()


class _Part:
    """A file on its way."""

    def __init__(self, entry: Path, wanted: Wanted) -> None:
        self.wanted, self.target = wanted, entry / "files" / wanted.name
        name = hashlib.sha256(wanted.name.encode()).hexdigest()[:16]
        self.path, self.marks = entry / "parts" / name, entry / "parts" / f"{name}.pieces"

    def lay_out(self) -> None:
        """The file at its full size, of nothing yet; or as an earlier process has left it."""
        self.path.parent.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):
            if self.path.stat().st_size == self.wanted.size:
                return
        self.marks.unlink(missing_ok=True)  # first: marks without their bytes would pass for them
        with self.path.open("wb") as file:
            file.truncate(self.wanted.size)

    def pieces(self) -> list[int]:
        """Which pieces lack."""
        marks = self.marks.read_bytes() if self.marks.exists() else b""
        count = -(-self.wanted.size // PIECE)
        return [piece for piece in range(count) if marks[piece : piece + 1] != b"1"]

    def write(self, piece: int, data: bytes) -> None:
        """A piece, and then its mark: on the disk in this order, also where the machine stops."""
        with self.path.open("r+b") as file:
            file.seek(piece * PIECE)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        descriptor = os.open(self.marks, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            os.pwrite(descriptor, b"1", piece)
        finally:
            os.close(descriptor)

    def check(self, where: Location) -> None:
        """Raise ModelError where the content is not what its checksum says; it is fetched anew the next time."""
        if not self.wanted.sha256:
            return
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != self.wanted.sha256:
            self.drop()
            raise ModelError(
                f"{where}: found sha256 {digest}, expected {self.wanted.sha256} by the place's _MIRROR; the copy there "
                "is damaged: mirror the model again (batch-rerank fetch)"
            )

    def drop(self) -> None:
        """Begin anew the next time."""
        self.path.unlink(missing_ok=True)
        self.marks.unlink(missing_ok=True)

    def place(self) -> None:
        """Give the file its name."""
        self.target.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(self.path, self.target)
        self.marks.unlink(missing_ok=True)


@contextmanager
def threads(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that begin nothing more once the caller has an error, or an interrupt."""
    pool = ThreadPoolExecutor(threads)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _fetch_all(place: Location, parts: list[_Part], found: Fetched) -> None:
    with threads(FILES_AT_ONCE) as files, threads(PIECES_AT_ONCE) as pieces:
        begun = [files.submit(_fetch_one, place, part, found, pieces) for part in parts]
        for one in wait(begun, return_when=FIRST_EXCEPTION).done:
            one.result()


def _fetch_one(place: Location, part: _Part, found: Fetched, pieces: ThreadPoolExecutor) -> None:
    where = place / part.wanted.name
    with storage_errors(where, ModelError):
        refuse_other(where, part.wanted)

    def piece(number: int) -> None:
        start = number * PIECE
        data = read_range(where, part.wanted, start, min(part.wanted.size, start + PIECE))
        with storage_errors(where, ModelError):
            refuse_other(where, part.wanted)  # a piece that is marked stays, also when its version is put back
        with storage_errors(part.path):
            part.write(number, data)
        found.add(len(data), place)

    list(pieces.map(piece, part.pieces()))
    with storage_errors(part.path):
        part.check(where)
        part.place()


def read_range(where: Location, wanted: Wanted, start: int, stop: int) -> bytes:
    """Bytes of a file as it was listed. Raises ModelError where it is another by now, and StorageError."""

    def read() -> bytes:
        try:
            data: bytes = where.fs.cat_file(where.path, start=start, end=stop)
            if len(data) == stop - start:
                return data
        except Exception as error:  # any: such as a range beyond the end of a shorter one
            if not may_pass(error, reached=True):
                with suppress(FileNotFoundError):
                    refuse_other(where, wanted)
            raise
        refuse_other(where, wanted)
        raise EOFError(f"bytes {start} to {stop}: {len(data)} arrived")

    with storage_errors(where, ModelError):
        return where.patiently(read)


def refuse_other(where: Location, wanted: Wanted) -> None:
    """Raise ModelError where a file is not the one that was listed."""
    now = where.stat()
    if (now.size, now.version) != (wanted.size, wanted.version):
        raise ModelError(
            f"{where}: found {now.size:,} bytes, version {now.version!r}; expected {wanted.size:,} bytes, version "
            f"{wanted.version!r}, as it was when the job was planned; the model was replaced meanwhile: put that "
            "version back, or run again to plan with the new one, into a new output"
        )
