"""Where an actor's time goes: every second belongs to one phase, so that the phases add up to its wall time."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

Phase = Literal["pack", "compute", "await", "hand"]
"""What is done to a unit in an actor. `pack`: its batches are made; `compute`: they are sent to the device, on a CPU
computed; `await`: all are sent, and results are waited for; `hand`: all else, from unpacking it to giving it back."""

ORDER: tuple[Phase, ...] = ("compute", "await", "pack", "hand")


class Timesheet:
    """An actor's time, from when it begins to load its model.

    Of two units at work at once, the one that is further decides the phase. So compute_seconds is the union of the
    units' compute intervals: the device's busy seconds, none counted twice, from a unit's first batch until its scores
    have arrived. What a device waits between two batches of one unit is in it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._born = self._since = clock()
        self._loading = True
        self._units: dict[int, Phase] = {}
        self._spent: dict[str, float] = {}

    def loaded(self) -> None:
        """The model is there."""
        with self._lock:
            self._book()
            self._loading = False

    @contextmanager
    def unit(self) -> Iterator[None]:
        """A unit of the calling thread is in the actor."""
        self.enter("hand")
        try:
            yield
        finally:
            with self._lock:
                self._book()
                self._units.pop(threading.get_ident(), None)

    def enter(self, phase: Phase) -> None:
        """The calling thread's unit comes to another phase."""
        with self._lock:
            self._book()
            self._units[threading.get_ident()] = phase

    def take(self, units: int = 1) -> dict[str, float]:
        """Fields of the receipts of so many units that have gone together: to each its part of what was spent since the
        last call. A unit that gets no receipt takes nothing; its time goes to the next one.

        wait_seconds: without a unit; seconds: with one; of those pack_seconds, with a unit being packed and none on the
        device, and compute_seconds; of those result_seconds, with nothing to do but to wait for the device.
        age_seconds: of the actor, now; load_seconds, wait_seconds and seconds of its receipts so far add up to it.
        """
        with self._lock:
            self._book()
            spent, self._spent = self._spent, {}
            age = self._since - self._born
        result, pack = spent.get("await", 0.0), spent.get("pack", 0.0)
        compute = spent.get("compute", 0.0) + result
        fields = {
            "load_seconds": spent.get("load", 0.0),
            "wait_seconds": spent.get("wait", 0.0),
            "seconds": pack + compute + spent.get("hand", 0.0),
            "pack_seconds": pack,
            "compute_seconds": compute,
            "result_seconds": result,
        }
        return {**{name: round(value / units, 6) for name, value in fields.items()}, "age_seconds": round(age, 6)}

    def _book(self) -> None:
        """Give the time since the last change to the phase that there was."""
        now, phases = self._clock(), self._units.values()
        working = next((phase for phase in ORDER if phase in phases), "wait")
        phase = "load" if self._loading else working
        self._spent[phase] = self._spent.get(phase, 0.0) + now - self._since
        self._since = now
