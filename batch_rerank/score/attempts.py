"""What an actor is scoring, on storage: `_manifest/attempts/<actor>.json`, so that its next life knows what it died of.

Ray starts a dead actor again and gives it the same units. A unit that kills the process would do so for ever.
"""

import json
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from threading import Lock

from batch_rerank.errors import BatchRerankError
from batch_rerank.score.leaving import SIGTERM
from batch_rerank.score.poison import Trial
from batch_rerank.store.filesystem import Location, storage_errors
from batch_rerank.store.records import Count, Line, parse

log = logging.getLogger("batch_rerank")

MOST_DEATHS = 2
"""Deaths with one unit after which it is set aside. A node's loss is none."""

MOST_NODES = 5
"""Nodes that may go without notice while they score a unit, or processes that get SIGTERM on a node that stays, after
which it is set aside: it may be what takes them."""

MOST_LOADS = 3
"""Deaths while loading, one after the other, after which the model is not loaded again."""

MOST_TRIES = 30
"""New processes for one unit whose pairs take the device with them: halving 10,000 pairs takes 14."""


@dataclass(frozen=True)
class _State:
    """The diary as it is written. node: where; leaving: why the process is going to end, where that is no unit's fault;
    moves: how often each unit's node has left, nodes: of those, how often without notice."""

    loading: bool = False
    lost_loads: Count = 0
    units: list[Line] = field(default_factory=list)
    deaths: dict[Line, Count] = field(default_factory=dict)
    tries: dict[Line, Count] = field(default_factory=dict)
    trials: dict[Line, Trial] = field(default_factory=dict)
    node: Line = ""
    leaving: Line = ""
    moves: dict[Line, Count] = field(default_factory=dict)
    nodes: dict[Line, Count] = field(default_factory=dict)


class Attempts:
    """An actor's diary. The first life writes behind the scoring, and may score two units at once: each has a death
    then. One that has died before writes first and scores one at a time, so that a second death is the unit's own.

    `node`: where this life is; `gone`: whether a node is not there any more, or is leaving."""

    def __init__(
        self, location: Location, restarted: bool, node: str = "", gone: Callable[[str], bool] = lambda node: False
    ) -> None:
        self._location, self.careful = location, restarted
        self._node, self._gone, self._leaving = node, gone, ""
        self._at_work: list[str] = []
        self._list = Lock()
        self._loading, self._lost_loads = False, 0
        self._deaths: dict[str, int] = {}
        self._tries: dict[str, int] = {}
        self._trials: dict[str, Trial] = {}
        self._moves: dict[str, int] = {}
        self._nodes: dict[str, int] = {}
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
        if self._nodes.get(unit, 0) >= MOST_NODES:
            return f"{self._nodes[unit]} nodes went without notice, or ended its actor, while scoring it"
        with self._list:
            self._at_work = [*self._at_work, unit]
        self._note()
        return None

    def trial(self, unit: str) -> Trial | None:
        """What an earlier life learnt about a unit's pairs; the caller's own, to go on from."""
        known = self._trials.get(unit)
        return known and Trial(list(known.todo), dict(known.errors))

    def tries(self, unit: str) -> int:
        """How often a unit was begun in earlier lives that ended by it, and now."""
        return self._deaths.get(unit, 0) + self._tries.get(unit, 0) + 1

    def moves(self, unit: str) -> int:
        """How often a unit was begun on a node that then left."""
        return self._moves.get(unit, 0)

    def leaving(self, why: str) -> "Future[None]":
        """Note that this process is going to end, by no unit's fault."""
        self._leaving = why
        return self._writer.submit(self._write)

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
        state = _State(
            self._loading,
            self._lost_loads,
            self._at_work,
            self._deaths,
            self._tries,
            self._trials,
            self._node,
            self._leaving,
            self._moves,
            self._nodes,
        )
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
        self._moves, self._nodes = state.moves, state.nodes
        gone = bool(state.node) and self._gone(state.node)
        lost = state.leaving or ("without notice" if gone else "")
        told = bool(state.leaving) and (gone or state.leaving != SIGTERM)
        self._lost_loads = state.lost_loads + (state.loading and not told)
        for unit in [] if state.loading else state.units:
            for counts in [self._moves] if told else [self._moves, self._nodes] if lost else [self._deaths]:
                counts[unit] = counts.get(unit, 0) + 1
            log.warning("%s while scoring unit %s", f"the node left ({lost})" if lost else "the actor died", unit)
        self.careful = not lost or bool(self._deaths or self._tries or self._nodes)
        self._write()
