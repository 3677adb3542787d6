"""An actor whose node is leaving: it begins no further unit, ends those at work or drops them, and then ends itself.

Ray starts it again on another node and gives it the units that it has not answered. What is dropped has left nothing
behind: scores are committed by other tasks, whole or not at all.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass

log = logging.getLogger("batch_rerank")

SIGTERM = "SIGTERM"
"""Why, where that is all that is known: the node may stay."""

POLL_SECONDS = 1.0

ANSWER_SECONDS = 1.0
"""How long the answer to a unit may take to leave the process when it is scored."""

COMMIT_SECONDS = 5.0
"""Before a node's end, from when on a unit is dropped: nobody would fetch its scores in time."""

NOTE_SECONDS = 5.0


@dataclass(frozen=True)
class Notice:
    """That a node is leaving. `deadline`: until when it is there, as a time.time(); None where nobody said."""

    why: str
    deadline: float | None = None


class Leaving:
    """Waits for a notice. `look` is asked for one every `poll` seconds, and SIGTERM is one too; `note` writes down why
    this process is going to end, before a unit can be lost with it; `end` ends it."""

    def __init__(
        self,
        look: Callable[[], Notice | None],
        note: Callable[[str], "Future[None]"],
        end: Callable[[], None] = lambda: os._exit(1),
        poll: float = POLL_SECONDS,
    ) -> None:
        self._look, self._note, self._end, self._poll = look, note, end, poll
        self._changed = threading.Condition()
        self._notice: Notice | None = None
        self._terminated = threading.Event()
        self._loading, self._at_work, self._answered = True, 0, time.monotonic()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_sigterm)  # in place of Ray's: exit at once, in the midst of a unit
        threading.Thread(target=self._watch, name="leaving", daemon=True).start()

    def loaded(self) -> None:
        """The model is loaded, or has failed to: until then a notice ends the process at once."""
        with self._changed:
            self._loading = False

    @contextmanager
    def unit(self) -> Iterator[None]:
        """A unit is at work. Once there is a notice none is begun: the caller waits for the end of the process."""
        with self._changed:
            self._changed.wait_for(lambda: self._notice is None)
            self._at_work += 1
        try:
            yield
        finally:
            with self._changed:
                self._at_work -= 1
                self._answered = time.monotonic()
                self._changed.notify_all()

    def _on_sigterm(self, number: int, frame: object) -> None:
        self._terminated.set()  # and no lock: the thread that is interrupted here may hold it

    def _watch(self) -> None:
        while (notice := self._found()) is None:
            self._terminated.wait(self._poll)
        with self._changed:
            self._notice = notice
            busy = self._loading or self._at_work > 0
        noted = [self._note(notice.why)] if busy else []  # else nothing can be lost: no request at every job's end
        if busy:
            log.warning("%s: this actor's node is leaving", notice.why)
        self._until_answered(notice)
        wait(noted, NOTE_SECONDS)
        self._end()

    def _found(self) -> Notice | None:
        return Notice(SIGTERM) if self._terminated.is_set() else self._look()

    def _until_answered(self, notice: Notice) -> None:
        """Return when all units at work are answered, or have to be dropped."""
        last = float("inf") if notice.deadline is None else notice.deadline - COMMIT_SECONDS
        with self._changed:
            while self._at_work and not self._loading and time.time() < last:
                self._changed.wait(min(self._poll, max(0.0, last - time.time())))
            answered = self._answered
        if time.time() < last:
            time.sleep(max(0.0, answered + ANSWER_SECONDS - time.monotonic()))
