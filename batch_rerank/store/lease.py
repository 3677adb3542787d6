"""One job per output: a lease beside the plan, `_manifest/lease/<epoch>`.

An epoch is created exclusively, and its holder rewrites it with a counter while it lives. Who wants the output watches
that counter on its own monotonic clock and creates the next epoch when it has stood still for the lease's time; no
wall clock decides. A holder whose successor exists has lost: it is told at its next heartbeat and before it writes
`_SUCCESS`. What is scored stays right without a lease, because parts are created once; it guards repairs and
`_SUCCESS`, and saves the accelerators from doing the same work twice.
"""

import json
import logging
import os
import re
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from batch_rerank.errors import BatchRerankError, ConflictError
from batch_rerank.store.filesystem import Location, storage_errors
from batch_rerank.store.records import Count, Line, parse

log = logging.getLogger("batch_rerank")

LEASE_SECONDS = 60.0
FOLDER = "_manifest/lease"

EPOCH = "[1-9][0-9]{0,8}"
"""What we name a lease; other files beside them are passed over."""

HEARTBEATS = 12
"""Heartbeats in the lease's time: a second job learns within one of them that the first is alive."""

LOOKS = 2
"""In a heartbeat's time, of who waits for a sign of life."""


@dataclass(frozen=True)
class Holder:
    """Who holds an epoch. `since` is for people to read; `machine` and `process` tell whether a holder on this machine
    has ended; the counter moves with every heartbeat."""

    id: Line
    host: Line
    machine: Line
    pid: Count
    process: Line
    since: Line
    counter: Count = 0
    released: bool = False

    def to_json(self) -> bytes:
        """One JSON object."""
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def from_json(data: bytes) -> "Holder | None":
        """None where the content is damaged: such a holder is known by its bytes alone."""
        try:
            return parse(Holder, data)
        except ValueError:
            return None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


class HeldError(ConflictError):
    """Another job holds the output."""


class Lease:
    """The right to repair an output and to finish it. Taken by `hold`."""

    def __init__(self, root: Location, seconds: float) -> None:
        self._root, self._seconds = root, seconds
        self._epoch, self._started = 0, time.monotonic()
        self._me = _this_process()
        self._ended = threading.Event()
        self._main = threading.current_thread() is threading.main_thread()
        self._beats = threading.Thread(target=self._beat, name="lease", daemon=True)
        self.lost = False

    @property
    def id(self) -> str:
        """Of this holder alone."""
        return self._me.id

    @property
    def since(self) -> str:
        """When it was taken, in UTC, for people."""
        return self._me.since

    @property
    def seconds_held(self) -> float:
        """Since it was taken."""
        return time.monotonic() - self._started

    def take(self) -> None:
        """Take the output over from nobody, or from a holder that has ended. Raises ConflictError where one lives."""
        with storage_errors(self._at(0)):
            before = _latest(self._root)
            if before:
                self._wait_for_silence(*before)
            self._epoch = before[0] + 1 if before else 1
            created = self._at(self._epoch).create_exclusive(self._me.to_json())
            if not created:
                raise self._held(self._at(self._epoch).read_bytes())
            if not self._at(self._epoch).keeps_first(self._me.to_json()):
                log.warning(
                    "%s: this store replaces what exists although told not to (If-None-Match); run no two jobs on one "
                    "output at once, nothing would keep them apart",
                    self._root,
                )
        self._beats.start()

    def look(self) -> bool:
        """Whether the output is free, without taking it or waiting. Raises ConflictError where a process of this
        machine holds it; where another machine's may, that is logged, and it is not free."""
        with storage_errors(self._at(0)):
            latest = _latest(self._root)
        holder = latest and Holder.from_json(latest[1])
        if latest is None or (holder and holder.released):
            return True
        alive = holder and _is_alive(holder)
        if alive:
            raise self._held(latest[1])
        if alive is None:
            log.warning(
                "%s: was held by %s; a run waits up to %g s to see whether it still is",
                self._root,
                holder or "an unknown holder",
                self._seconds,
            )
        return alive is False

    @property
    def epoch(self) -> int:
        """Its number; a successor has the next one."""
        return self._epoch

    def check(self) -> None:
        """Raise ConflictError where another job has taken the output over."""
        with storage_errors(self._at(self._epoch)):
            self.lost = self.lost or self._at(self._epoch + 1).exists()
        if self.lost:
            raise ConflictError(
                f"{self._root}: another job has taken this output over (lease {self._epoch + 1}): this one was silent "
                f"for {self._seconds:g} s; it stops here, what it committed is kept"
            )

    def may_wake(self, holder: str) -> bool:
        """Whether an earlier holder, by its id, may still be at work: it has not given its lease back, and is not known
        to have ended."""
        for epoch in range(self._epoch - 1, 0, -1):
            with storage_errors(self._at(epoch)), suppress(FileNotFoundError):
                found = Holder.from_json(self._at(epoch).read_bytes())
                if found is not None and found.id == holder:
                    return not found.released and _is_alive(found) is not False
        return False

    def release(self) -> None:
        """Let the next job start at once."""
        self._ended.set()
        if self._beats.is_alive():
            self._beats.join()
        if not self.lost:
            self._write(replace(self._me, released=True))

    def remove(self) -> None:
        """Behind its release: remove this lease and those before it, except what tells a paused holder that it has
        lost. One that a next job has taken stays. Raises StorageError."""
        with storage_errors(self._at(0)):
            found = {path.rsplit("/", 1)[-1]: file for path, file in (self._root / FOLDER).find().items()}
            files = {int(name): file for name, file in found.items() if re.fullmatch(EPOCH, name)}
            holders = {epoch: Holder.from_json(self._at(epoch).read_bytes()) for epoch in files if epoch < self._epoch}
            paused = {e for e, one in holders.items() if not one or not (one.released or _is_alive(one) is False)}
            for epoch, file in files.items():
                if epoch <= self._epoch and epoch - 1 not in paused:
                    self._at(epoch).remove_seen(file)

    def _wait_for_silence(self, epoch: int, seen: bytes) -> None:
        """Return when the holder of an epoch has ended. Raises ConflictError where it has not."""
        holder = Holder.from_json(seen)
        if holder and holder.released:
            return
        alive = holder and _is_alive(holder)
        if alive:
            raise self._held(seen)
        if alive is False:
            log.warning("%s: taken over from %s, which has ended", self._root, holder)
            return
        log.info("%s: held by %s; waiting up to %g s for a sign of life", self._root, holder, self._seconds)
        # looks, and no clock: a store that was away, or a pause of ours, is no silence of the holder's
        for _ in range(LOOKS * HEARTBEATS):
            time.sleep(self._seconds / HEARTBEATS / LOOKS)
            now = _latest(self._root)
            if now and now != (epoch, seen):
                last = Holder.from_json(now[1])
                if last and last.released and now[0] == epoch:
                    return
                raise self._held(now[1])
        log.warning("%s: taken over from %s, silent for %g s", self._root, holder, self._seconds)

    def _held(self, content: bytes) -> HeldError:
        holder = Holder.from_json(content) or "an unknown holder"
        return HeldError(
            f"{self._root}: another job is at work on this output ({holder}); "
            "expected one job per output; wait for it or stop it, or use another output.path"
        )

    def _beat(self) -> None:
        while not self._ended.wait(self._seconds / HEARTBEATS):
            try:
                self.check()
                self._me = replace(self._me, counter=self._me.counter + 1)
                self._write(self._me)
            except ConflictError:
                if self._main and not self._ended.is_set():  # wakes the driver where it waits for a unit
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                return
            except BatchRerankError as error:
                # nobody can take over what nobody can reach: the next heartbeat finds out
                log.warning("the lease could not be renewed: %s", error)

    def _write(self, holder: Holder) -> None:
        with storage_errors(self._at(self._epoch)):
            self._at(self._epoch).write_bytes(holder.to_json())

    def _at(self, epoch: int) -> Location:
        return self._root / f"{FOLDER}/{epoch}"


@contextmanager
def hold(root: Location, seconds: float = LEASE_SECONDS) -> Iterator[Lease]:
    """Hold an output. Raises ConflictError where another job holds it, or takes it over in between."""
    lease = Lease(root, seconds)
    lease.take()
    try:
        yield lease
    except KeyboardInterrupt:
        if lease.lost:
            lease.check()
        raise
    finally:
        try:
            lease.release()
        except BatchRerankError as error:
            log.warning("the lease could not be given back, the next job waits %g s: %s", seconds, error)


@dataclass(frozen=True)
class Sign:
    """What is known of who holds an output. alive: None where it has been watched for `seconds` and did nothing."""

    holder: Holder | str
    alive: bool | None
    released: bool = False
    seconds: float = 0.0


def sign_of_life(root: Location, seconds: float) -> Sign:
    """Whether the holder of an output lives. On this machine that is known at once; elsewhere its counter is watched
    for three heartbeats of a lease of `seconds`. Raises StorageError."""
    with storage_errors(root / FOLDER):
        seen = _latest(root)
        holder = Holder.from_json(seen[1]) if seen else None
        if seen is None or holder is None:
            return Sign("an unknown holder", False)
        if holder.released:
            return Sign(holder, False, released=True)
        alive = _is_alive(holder)
        if alive is not None:
            return Sign(holder, alive)
        for _ in range(3 * LOOKS):
            time.sleep(seconds / HEARTBEATS / LOOKS)
            now = _latest(root)
            last = Holder.from_json(now[1]) if now else None
            if now != seen and last is not None:
                return Sign(last, not last.released, released=last.released)
        return Sign(holder, None, seconds=3 * seconds / HEARTBEATS)


def check_epoch(root: Location, epoch: int) -> None:
    """Raise ConflictError where the lease under which a task was begun has a successor: what it read may be another by
    now."""
    with storage_errors(root):
        if (root / f"{FOLDER}/{epoch + 1}").exists():
            raise ConflictError(f"{root}: another job has taken this output over (lease {epoch + 1}); it goes on there")


def _latest(root: Location) -> tuple[int, bytes] | None:
    """The last epoch, and who says to hold it."""
    names = [path.rsplit("/", 1)[-1] for path in (root / FOLDER).find()]
    epochs = [int(name) for name in names if re.fullmatch(EPOCH, name)]
    return (max(epochs), (root / f"{FOLDER}/{max(epochs)}").read_bytes()) if epochs else None


def _this_process() -> Holder:
    return Holder(
        id=uuid.uuid4().hex,
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        process=_started(os.getpid()) or "",
        since=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


def _machine() -> str:
    """The boot of the machine and the namespace of processes; empty where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """When a process began, in ticks since the boot: tells it from a later one with the same number. None where there
    is no such process, or only its remains."""
    fields = _stat(pid)
    return fields[19] if fields and fields[0] not in "ZX" else None


def _is_alive(holder: Holder) -> bool | None:
    """Whether a holder's process lives; None where only its heartbeat can tell: elsewhere, or stopped."""
    if not holder.machine or holder.machine != _machine():
        return None
    if _started(holder.pid) != holder.process:
        return False
    fields = _stat(holder.pid)
    return None if fields and fields[0] in "Tt" else True


def _stat(pid: int) -> list[str]:
    """What the system says of a process behind its name; nothing where there is none."""
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_bytes().rsplit(b")", 1)[1].decode().split()  # a name may be any bytes
    return []
