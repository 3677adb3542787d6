"""A word on what is waited for, where nothing happens for a while, and an end where that is gone."""

import logging
import math
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from itertools import zip_longest
from types import TracebackType
from typing import Any

log = logging.getLogger("batch_rerank")

SILENCE_SECONDS = 60.0

STOPPED_SECONDS = 10.0
"""By how much a look comes late where this process was stopped; a busy machine is not that late."""

HEAD_SECONDS = 40.0
"""How long a head may be away: Ray ends the driver itself after 60 (RAY_gcs_rpc_server_reconnect_timeout_s)."""


class Watch:
    """Logs what `describe` says whenever `seconds` have passed without `progress`, inside a `with`.

    `gone` is asked every `poll` seconds whether what the block waits for will never come, and why. Then the main thread
    is woken by a KeyboardInterrupt, and `lost` has the reason. So it is where there is a `limit` in seconds, and for so
    long there was no `progress` and none of the numbers of `done` was higher than ever: `stuck` has what is waited for.
    `away`: the block is at something else meanwhile, which does not count; nor does a time in which this process was
    stopped.
    """

    def __init__(
        self,
        describe: Callable[[], str],
        gone: Callable[[], str | None] = lambda: None,
        seconds: float = SILENCE_SECONDS,
        poll: float = 1.0,
        limit: float | None = None,
        done: Callable[[], Sequence[int]] = tuple,
    ) -> None:
        self._describe, self._gone, self._seconds, self._poll = describe, gone, seconds, poll
        self._limit, self._done = limit or math.inf, done
        self._most: list[int] = []
        self.away = False
        self._main = threading.current_thread() is threading.main_thread()
        self.lost: str | None = None
        self.stuck: str | None = None
        self._since = self._grown = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join(1)  # no longer: it may hang where the job does

    def progress(self) -> None:
        """Something has happened."""
        self._since = time.monotonic()

    def _watch(self) -> None:
        said = self._since
        poll = min(self._poll, self._seconds)
        asleep = time.monotonic()
        while not self._ended.wait(poll):
            self._pass_over(time.monotonic() - asleep - poll)
            self.lost = self._gone()
            if self.lost:
                self._wake()
                return
            now = time.monotonic()
            if now >= max(said, self._since) + self._seconds:
                said = now
                waits = self._waits()
                if not self._ended.is_set():
                    log.warning("nothing has finished for %.0f s: %s", now - self._since, waits)
            if self._stands_still(now):
                self.stuck = (
                    f"nothing has happened for {self._limit:g} s (cluster.max_seconds_without_progress): "
                    f"{self._waits()}; finished units are kept; run it again to resume"
                )
                self._wake()
                return
            asleep = time.monotonic()

    def _pass_over(self, late: float) -> None:
        """A process that was stopped, and its machine perhaps, has waited for nothing meanwhile."""
        if late >= STOPPED_SECONDS:
            self._grown = time.monotonic()

    def _waits(self) -> str:
        try:
            return self._describe()
        except Exception as error:  # what is asked may be what has gone
            return f"its state cannot be read ({type(error).__name__})"

    def _stands_still(self, now: float) -> bool:
        try:
            found = list(self._done())
        except Exception:  # the same; then only `progress` counts
            found = []
        most = [max(pair) for pair in zip_longest(self._most, found, fillvalue=0)]
        if most != self._most or self.away:
            self._most, self._grown = most, now
        return now - max(self._since, self._grown) >= self._limit

    def _wake(self) -> None:
        if self._ended.is_set():
            return
        if self._main:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        else:
            log.error("%s; only a job in its process's main thread can be ended from here", self.lost or self.stuck)


class Heartbeat:
    """Looks whether the Ray that a driver hangs on is still there: `raylet`, the socket of its node's process, and
    `head`, HOST:PORT. Ray's own end for a driver whose node process has died is to end the process: without a message,
    and with the job's status at "running" for ever."""

    def __init__(self, raylet: str, head: str) -> None:
        self._raylet, self._head = raylet, head
        self._head_seen = time.monotonic()

    def gone(self) -> str | None:
        """Why this process has no Ray any more, None while it has."""
        if not _answers(socket.AF_UNIX, self._raylet) and not _answers(socket.AF_UNIX, self._raylet):
            return "the Ray process of this node (raylet) has died"
        now = time.monotonic()
        if head_answers(self._head):
            self._head_seen = now
        if now - self._head_seen > HEAD_SECONDS:
            return f"Ray's head {self._head} has not answered for {HEAD_SECONDS:g} s"
        return None


def head_answers(address: str, seconds: float = 0) -> bool:
    """Whether something listens at HOST:PORT, or comes to in so many seconds."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not port.isdecimal():
        return False
    deadline = time.monotonic() + seconds
    while not _answers(socket.AF_INET6 if ":" in host else socket.AF_INET, (host, int(port))):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.5)
    return True


def _answers(family: int, address: Any) -> bool:
    with socket.socket(family) as connection:
        connection.settimeout(5)
        try:
            connection.connect(address)
        except (OSError, OverflowError):
            return False
        return True
