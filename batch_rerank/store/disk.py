"""Writing on a local disk: a file is there with its whole content, synced, or not at all."""

import os
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import IO, TypeVar

T = TypeVar("T")

TEMPORARY_NAME = r"\.[0-9a-f]{32}\.tmp"
"""How the hidden files are named from which a write takes its content; a killed process leaves them."""


@contextmanager
def writer(path: str) -> Iterator[IO[bytes]]:
    """To create or replace a file that is too large to be held."""
    temporary = _temporary(os.path.dirname(path))
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


def remove_if(path: str, is_it: Callable[[str], bool]) -> bool:
    """Remove a file if it is the one that is meant. No system call removes on a condition, so it is moved aside, looked
    at under its other name, and moved back, unless there is a new one by then. Raises FileNotFoundError.

    An interrupt must not come between the moves.
    """
    return uninterrupted(partial(_remove_if, path, is_it))


def uninterrupted(act: Callable[[], T]) -> T:
    """What an act gives. No interrupt cuts it short: it runs in a thread, and interrupts are the main thread's."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(act).result()


def _remove_if(path: str, is_it: Callable[[str], bool]) -> bool:
    aside = _temporary(os.path.dirname(path))
    os.rename(path, aside)
    found = False
    try:
        found = is_it(aside)
    finally:
        if not found:
            with suppress(FileExistsError):
                os.link(aside, path)
        os.unlink(aside)
    return found


def link_exclusive(path: str, data: bytes) -> bool:
    """Create a file with this content; False where the name is taken."""
    if os.path.exists(path):
        return False
    try:
        place(os.link, path, data)
    except FileExistsError:
        return False
    return True


def place(into: Callable[[str, str], None], path: str, data: bytes) -> None:
    """Give `path` its content at once, from a temporary file."""
    while True:
        temporary = _write_temporary(path, data)
        try:
            into(temporary, path)
            break
        except FileNotFoundError:
            # a job that took over from a paused one removes what it left; awake again, that one writes it once more
            if os.path.exists(temporary):
                raise
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
    _sync_directory(os.path.dirname(path))


def _write_temporary(path: str, data: bytes) -> str:
    """A synced file beside `path`, hidden from globs, on the same disk so that it can be linked."""
    directory = os.path.dirname(path)
    os.makedirs(directory, exist_ok=True)
    temporary = _temporary(directory)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:  # a full disk must not keep what did not fit
        with suppress(OSError):
            os.unlink(temporary)
        raise
    return temporary


def _temporary(directory: str) -> str:
    return os.path.join(directory, f".{uuid.uuid4().hex}.tmp")


def _sync_directory(directory: str) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
