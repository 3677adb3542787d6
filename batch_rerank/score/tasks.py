"""What the tasks and actors of a Ray job do, one unit a block. Wiring them is `run_ray`'s work.

Expected errors come back as values in the stream and are raised in the driver; Ray would wrap them in tracebacks.
"""

import logging
import os
import pickle
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Protocol

import pyarrow as pa

from batch_rerank.config import JobConfig
from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.engine.encoding import Encoder, make_encoder
from batch_rerank.errors import BatchRerankError, ModelError, UnfinishedError, lines_of
from batch_rerank.model_settings import Model
from batch_rerank.score.attempts import Attempts
from batch_rerank.score.blocks import block, failure, row, unpack
from batch_rerank.score.bundles import read_bundles
from batch_rerank.score.leaving import Leaving, Notice
from batch_rerank.score.poison import DeviceLostError, Trial
from batch_rerank.score.read_unit import ReadRange, read_range
from batch_rerank.score.score_file import commit_unit
from batch_rerank.score.steps import EncodedUnit, LoadedScorer, ScoredUnit, encode_unit, or_set_aside, score_unit
from batch_rerank.score.weights import on_this_node
from batch_rerank.store.filesystem import locate
from batch_rerank.store.manifest import Manifest
from batch_rerank.store.receipts import Receipt, SetAside

log = logging.getLogger("batch_rerank")


class Shared(Protocol):
    """A value of which each node has one copy."""

    def get(self) -> Any:
        """The value, not to be changed."""
        ...


@dataclass(frozen=True)
class Job:
    """What every task needs. `environment` carries the store's credentials to the workers: as an argument, because a
    runtime_env is shown on the dashboard and written to logs. `shared`: a `Reuse`, of which each node has one; units go
    together then until they have `enough` pairs to score."""

    config: JobConfig
    model: ModelSpec
    fingerprint: str
    environment: dict[str, str]
    shared: Shared | None = None
    enough: int = 0

    def enter(self) -> None:
        """Take on the driver's environment in a worker."""
        os.environ.update(self.environment)


def read_and_encode(batch: pa.Table, job: Job) -> Iterator[pa.Table]:
    """Read ranges to their units, or to bundles of units, one block each."""
    job.enter()
    works: list[ReadRange] = pickle.loads(batch["ranges"][0].as_py())
    planned = _Planned(job.model, job.config.model)
    try:
        if job.shared is not None:
            given = (job.config, job.model, job.shared.get(), job.enough, _encoder(planned))
            yield from map(block, read_bundles(works, *given))
            return
        for work in works:
            for read in read_range(work, job.config, job.model):
                yield block(or_set_aside([read.unit], lambda read=read: encode_unit(read, _encoder(planned))))  # type: ignore[misc]
    except BatchRerankError as error:
        yield failure(error)


@dataclass(frozen=True)
class Life:
    """One life of an actor, as its cluster knows it. `actor` is the same in all of them; `restarted`: this is not the
    first; `gone`: whether a node is not there any more, or is leaving; `notice`: that this one is."""

    actor: str
    restarted: bool
    node: str
    gone: Callable[[str], bool]
    notice: Callable[[], Notice | None]


class Scoring:
    """What an actor does: one model copy. An error of the load is kept and returned with every unit.

    `life` says where it is. Two units may be scored at once: while the device computes one, the other is unpacked,
    packed and sent.
    """

    def __init__(self, job: Job, life: Life) -> None:
        job.enter()
        manifest = Manifest(locate(job.config.output.path, job.config.output.storage_options, reached=True))
        diary = manifest.root / f"_manifest/attempts/{life.actor}.json"
        self._actor, self._attempts = life.actor, Attempts(diary, life.restarted, life.node, life.gone)
        self._leaving = Leaving(life.notice, self._attempts.leaving)
        self._scorer = self._load(job)
        self._leaving.loaded()
        self._alone = threading.Lock()

    def _load(self, job: Job) -> LoadedScorer | BatchRerankError:
        refused = self._attempts.load()
        if refused:
            return ModelError(
                f"model {job.model.name!r}: {refused}; give an actor more memory, or use fewer actors a node"
            )
        try:
            return LoadedScorer(job.config, job.model)
        except BatchRerankError as error:
            return error
        finally:
            self._attempts.loaded()

    def __call__(self, batch: pa.Table) -> pa.Table:
        """An encoded unit to a scored one."""
        if isinstance(self._scorer, BatchRerankError):
            return failure(self._scorer)
        with self._alone if self._attempts.careful else nullcontext(), self._leaving.unit(), self._scorer.sheet.unit():
            return _step(batch, self._score)

    def _score(self, unit: EncodedUnit) -> ScoredUnit | list[SetAside]:
        assert isinstance(self._scorer, LoadedScorer)
        name, attempts = unit.unit.id, self._attempts
        refused = attempts.begin(name)
        if refused:
            tries = attempts.tries(name) + attempts.moves(name) - 1
            return [SetAside(one.id, tries, refused) for one in unit.units]
        trial = attempts.trial(name) or Trial.of(unit.encoded)
        try:
            scored = score_unit(unit, self._scorer, trial, attempts.careful)
            begun = {"retries": attempts.tries(name) - 1, "moves": attempts.moves(name)}
            return replace(scored, about={**scored.about, "actor": self._actor, **begun})
        except DeviceLostError as error:
            attempts.leave(name, trial)
            log.error("unit %s: the device is lost (%s); this process ends, and Ray starts another", name, error)
            os._exit(1)
        finally:
            attempts.end(name)


def rank_and_write(batch: pa.Table, job: Job) -> pa.Table:
    """A scored unit to its receipt, or several to theirs."""
    job.enter()
    return _step(batch, lambda unit: [commit_unit(one, job.config, job.model, job.fingerprint) for one in unit.apart()])


def _step(batch: pa.Table, work: Callable[[Any], ScoredUnit | list[Receipt] | list[SetAside]]) -> pa.Table:
    """Apply a step to the one unit of a block; errors and units set aside pass through."""
    if batch["error"][0].is_valid:
        return batch
    try:
        unit = unpack(batch["payload"][0].as_buffer())
        return block(or_set_aside(unit.units, lambda: work(unit)))
    except BatchRerankError as error:
        return failure(error)


@dataclass(frozen=True)
class _Planned:
    """A model, and how its files are reached, which makes it no other one."""

    model: ModelSpec
    settings: Model = field(compare=False)


@lru_cache(maxsize=2)
def _encoder(planned: _Planned) -> Encoder:
    """One tokenizer a worker process: loading the 11 MB of Qwen's takes longer than encoding a unit."""
    return make_encoder(on_this_node(planned.model, planned.settings, weights=False)[0])


def environment() -> dict[str, str]:
    """Credentials, endpoint and hub settings of the driver. Files, profiles and roles are a node's and stay there."""
    local = ("_FILE", "_BUNDLE", "PROFILE", "CONTAINER", "ROLE")
    ours = ("AWS_", "AZURE_STORAGE_", "STORAGE_EMULATOR_HOST", "HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE")
    names = [name for name in os.environ if name.startswith(ours)]
    return {name: os.environ[name] for name in names if not any(part in name for part in local)}


def call(batch: pa.Table, shared: Shared | None = None) -> pa.Table:
    """What a pickled function returns, pickled; of what is shared, if anything is."""
    function, variables = pickle.loads(batch["call"][0].as_py())
    os.environ.update(variables)
    try:
        return row(pickle.dumps(function() if shared is None else function(shared.get())), None)
    except BatchRerankError as error:
        return failure(error)
    except Exception as error:  # a defect: raised, Ray would tell of its own advice, and of this in a log at most
        log.exception("a task has failed")
        at = traceback.extract_tb(error.__traceback__)[-1]
        told = f"{type(error).__name__}: {lines_of(error)[0][:300]} ({at.filename}:{at.lineno})"
        return failure(UnfinishedError(f"a task has failed: {told}; a defect, or a machine without room; run it again"))
