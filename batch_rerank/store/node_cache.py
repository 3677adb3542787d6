"""Directories that the processes of a node share: each is filled by one of them, and stays while any of them uses it.

Two locks a directory, of the kernel's kind (flock), which a process gives back however it dies: `alone` for who fills
it, `use` for all who need it, and nothing is removed that is in use. Files of locks are never removed: of one that is
made again two processes could each hold "the" lock.
"""

import fcntl
import logging
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from batch_rerank.errors import ConfigError, StorageError
from batch_rerank.store.failures import storage_errors

log = logging.getLogger("batch_rerank")

ENTRY = r"model-[0-9a-f]{32}"
GONE = r"gone-[0-9a-f]{32}"
"""How directories are named that are ours to remove; what else lies there is not touched."""

SAID_SECONDS = 30.0
"""Between two lines of one that waits."""

_in_use: dict[str, int] = {}
_mine = threading.Lock()


@dataclass(frozen=True)
class NodeCache:
    """root: on a disk of this node; most_bytes: of all directories together, as far as they are not in use."""

    root: Path
    most_bytes: int

    def use(self, entry: str) -> Path:
        """A directory, which stays from now on until this process ends; it may be empty. Raises ConfigError where the
        cache cannot be written."""
        with self._writable():
            (self.root / "locks").mkdir(parents=True, exist_ok=True)
            lock = str(self.root / "locks" / f"{entry}.use")
            with _mine:
                if lock not in _in_use:
                    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
                    fcntl.flock(descriptor, fcntl.LOCK_SH)  # waits for one that is just removing it
                    _in_use[lock] = descriptor
            os.utime(lock)
            directory = self.root / entry
            directory.mkdir(exist_ok=True)
        return directory

    @contextmanager
    def alone(self, entry: str, doing: str) -> Iterator[float]:
        """One process at a time, others wait and say so; yields the seconds that were waited. doing: what is done."""
        with self._writable():
            (self.root / "locks").mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.root / "locks" / f"{entry}.alone", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            started = time.monotonic()
            said = started + 1.0
            while not self._locked(descriptor):
                if time.monotonic() >= said:
                    log.info("%s: another process of this node is at it, waiting", doing)
                    said = time.monotonic() + SAID_SECONDS
                time.sleep(0.05)
            yield time.monotonic() - started
        finally:
            os.close(descriptor)

    def reserve(self, entry: str, size: int, lay_out: Callable[[], None]) -> None:
        """Make room for a directory that is to have `size` bytes, then `lay_out` its files at their full sizes, which
        others count from then on. Raises StorageError where the disk is too small."""
        with self.alone("room", f"{self.root}: making room"), self._writable():
            directory = self.root / entry
            self._evict(entry, max(0, size - apparent(directory)), max(0, size - _allocated(directory)))
            lay_out()

    def _evict(self, entry: str, more: int, on_disk: int) -> None:
        for one in self.root.iterdir():
            if re.fullmatch(GONE, one.name):  # by one that was killed meanwhile
                shutil.rmtree(one, ignore_errors=True)
        sizes = {one.name: apparent(one) for one in self.root.iterdir() if re.fullmatch(ENTRY, one.name)}
        for name in sorted(set(sizes) - {entry}, key=self._last_use):
            if sum(sizes.values()) + more <= self.most_bytes and self._free() >= on_disk:
                return
            if self._remove(name):
                log.info("%s: %s bytes, last used longest ago, removed", self.root / name, f"{sizes.pop(name):,}")
        total = sum(sizes.values()) + more
        if total > self.most_bytes:
            log.warning(
                "%s: %s bytes, all in use, are more than model.cache_bytes: %s",
                self.root,
                f"{total:,}",
                f"{self.most_bytes:,}",
            )
        if self._free() < on_disk:
            raise StorageError(
                f"{self.root}: {self._free():,} bytes are free, and {on_disk:,} are needed; make room there, or set "
                "model.cache_dir to a larger disk of the node"
            )

    def _remove(self, name: str) -> bool:
        """Remove a directory unless it is in use."""
        descriptor = os.open(self.root / "locks" / f"{name}.use", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not self._locked(descriptor):
                return False
            gone = self.root / f"gone-{uuid.uuid4().hex}"
            with suppress(FileNotFoundError):
                (self.root / name).rename(gone)  # at once: one that is killed leaves no half behind
                shutil.rmtree(gone, ignore_errors=True)
            return True
        finally:
            os.close(descriptor)

    def _locked(self, descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            raise ConfigError(
                f"model.cache_dir: {self.root}: files there cannot be locked ({error.strerror}); expected a disk of "
                "the node"
            ) from None
        return True

    def _last_use(self, name: str) -> float:
        with suppress(FileNotFoundError):
            return (self.root / "locks" / f"{name}.use").stat().st_mtime
        return 0.0

    def _free(self) -> int:
        return shutil.disk_usage(self.root).free

    @contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            with storage_errors(self.root):
                yield
        except StorageError as error:
            if isinstance(error.__context__, PermissionError | NotADirectoryError | FileExistsError):
                raise ConfigError(
                    f"model.cache_dir: {self.root} cannot be written ({error.__context__.strerror}); expected a "
                    "directory on a disk of the node, for weights"
                ) from None
            raise


def _files(directory: Path) -> Iterator[os.stat_result]:
    for path in directory.rglob("*"):
        with suppress(FileNotFoundError):
            found = path.lstat()
            if not path.is_dir():
                yield found


def apparent(directory: Path) -> int:
    """Bytes of a directory's files by their sizes, whatever the disk has of them."""
    return sum(found.st_size for found in _files(directory))


def _allocated(directory: Path) -> int:
    return sum(found.st_blocks * 512 for found in _files(directory))
