"""What an actor is scoring, on storage: `_manifest/attempts/<actor>.json`, so that its next life knows what it died of.

Ray starts a dead actor again and gives it the same units. A unit that kills the process would do so for ever.
"""

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from threading import Lock

from batch_rerank.errors import BatchRerankError
from batch_rerank.score.poison import Trial
from batch_rerank.store.filesystem import Location, storage_errors
from batch_rerank.store.records import Count, Line, parse

log = logging.getLogger("batch_rerank")

MOST_DEATHS = 2
"""Deaths with one unit after which it is set aside. One may be a node's loss; two with the same unit are not."""

MOST_LOADS = 3
"""Deaths while loading, one after the other, after which the model is not loaded again."""

MOST_TRIES = 30
"""New processes for one unit whose pairs take the device with them: halving 10,000 pairs takes 14."""


@dataclass(frozen=True)
class _State:
    """The diary as it is written."""

    loading: bool = False
    lost_loads: Count = 0
    units: list[Line] = field(default_factory=list)
    deaths: dict[Line, Count] = field(default_factory=dict)
    tries: dict[Line, Count] = field(default_factory=dict)
    trials: dict[Line, Trial] = field(default_factory=dict)


class Attempts:
    """An actor's diary. The first life writes behind the scoring, and may score two units at once: each has a death
    then. One that has died before writes first and scores one at a time, so that a second death is the unit's own."""

    def __init__(self, location: Location, restarted: bool) -> None:
        self._location, self.careful = location, restarted
        self._at_work: list[str] = []
        self._list = Lock()
        self._loading, self._lost_loads = False, 0
        self._deaths: dict[str, int] = {}
        self._tries: dict[str, int] = {}
        self._trials: dict[str, Trial] = {}
        self._writer = ThreadPoolExecutor(max_workers=1)
        if restarted:
            self._recall()

    def load(self) -> str | None:
        """Note that the model is being loaded; or say why it is not to be."""
        if self._lost_loads >= MOST_LOADS:
            return f"the process died {self._lost_loads} times while loading it (killed, mostly for its memory)"
        self._loading = True
        self._write()
        return None

    def loaded(self) -> None:
        """Note that the model is loaded, or has failed to without a death."""
        self._loading, self._lost_loads = False, 0
        self._write()

    def begin(self, unit: str) -> str | None:
        """Note that a unit is being scored; or say why it is not to be."""
        deaths, tries = self._deaths.get(unit, 0), self._tries.get(unit, 0)
        if deaths >= MOST_DEATHS:
            return f"its actor died {deaths} times while scoring it (killed, or a crash in native code)"
        if tries >= MOST_TRIES:
            return f"its device failed {tries} times while scoring it"
        with self._list:
            self._at_work = [*self._at_work, unit]
        self._note()
        return None

    def trial(self, unit: str) -> Trial | None:
        """What an earlier life learnt about a unit's pairs; the caller's own, to go on from."""
        known = self._trials.get(unit)
        return known and Trial(list(known.todo), dict(known.errors))

    def tries(self, unit: str) -> int:
        """How often a unit was begun in earlier lives, and now."""
        return self._deaths.get(unit, 0) + self._tries.get(unit, 0) + 1

    def end(self, unit: str) -> None:
        """Note that a unit is scored: a death from now on is not its fault. On storage only from the second life on;
        for the first one the next unit's note is enough, and this would be one more request a unit."""
        with self._list:
            self._at_work = [other for other in self._at_work if other != unit]
        if self.careful:
            self._note()

    def leave(self, unit: str, trial: Trial) -> None:
        """Note what is known about a unit before this process ends on purpose."""
        self._tries[unit] = self._tries.get(unit, 0) + 1
        self._trials[unit] = trial
        with self._list:
            self._at_work = []
        self._writer.submit(self._write).result()  # behind what is still being written: the last one counts

    def _note(self) -> None:
        done = self._writer.submit(self._write)
        if self.careful:
            done.result()

    def _write(self) -> None:
        state = _State(self._loading, self._lost_loads, self._at_work, self._deaths, self._tries, self._trials)
        try:
            with storage_errors(self._location):
                self._location.write_bytes(json.dumps(asdict(state)).encode())
        except BatchRerankError as error:  # the diary is a help; without it Ray's own limit ends the tries
            log.warning("%s", error)

    def _recall(self) -> None:
        try:
            with storage_errors(self._location):
                state = parse(_State, self._location.read_bytes())
        except (BatchRerankError, ValueError) as error:
            log.warning("%s: what the actor's earlier life was doing is not known: %s", self._location, error)
            return
        self._deaths, self._tries, self._trials = state.deaths, state.tries, state.trials
        self._lost_loads = state.lost_loads + state.loading
        for unit in [] if state.loading else state.units:
            self._deaths[unit] = self._deaths.get(unit, 0) + 1
            log.warning("the actor died while scoring unit %s", unit)
        self._write()
