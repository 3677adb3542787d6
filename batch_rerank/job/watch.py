"""A word on what is waited for, where nothing happens for a while: silence would look like a hang."""

import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType

log = logging.getLogger("batch_rerank")

SILENCE_SECONDS = 60.0


class Watch:
    """Logs what `describe` says whenever `seconds` have passed without `progress`, inside a `with`."""

    def __init__(self, describe: Callable[[], str], seconds: float = SILENCE_SECONDS) -> None:
        self._describe, self._seconds = describe, seconds
        self._since = time.monotonic()
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
        while not self._ended.wait(max(0.01, max(said, self._since) + self._seconds - time.monotonic())):
            now = time.monotonic()
            if now < max(said, self._since) + self._seconds:
                continue
            said = now
            try:
                waits = self._describe()
            except Exception as error:  # what is asked may be what has gone
                waits = f"its state cannot be read ({type(error).__name__})"
            if not self._ended.is_set():
                log.warning("nothing has finished for %.0f s: %s", now - self._since, waits)
