"""The job on Ray Data: CPU tasks read and encode, a pool of actors scores, CPU tasks rank and commit.

The only file that imports ray, and wiring only. One unit is one row of one block, so it is one task of every stage.
Expected errors come back as values in the stream and are raised in the driver; Ray would wrap them in tracebacks.
"""

import logging
import os
import pickle
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar, cast

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext

from batch_rerank.config import JobConfig
from batch_rerank.engine.checkpoint import ModelSpec, relocate
from batch_rerank.engine.encoding import Encoder, make_encoder
from batch_rerank.errors import BatchRerankError, ModelError, UnfinishedError, as_value, from_value
from batch_rerank.job.attempts import Attempts
from batch_rerank.job.poison import DeviceLostError, Trial
from batch_rerank.job.read_unit import ReadRange, read_range, read_ranges
from batch_rerank.job.steps import (
    EncodedUnit,
    LoadedScorer,
    ScoredUnit,
    commit_unit,
    encode_unit,
    or_set_aside,
    score_unit,
)
from batch_rerank.store.filesystem import locate
from batch_rerank.store.manifest import Manifest, Plan, Receipt, SetAside

log = logging.getLogger("batch_rerank")
T = TypeVar("T")

READ_CPUS, WRITE_CPUS = 0.75, 0.25
"""What a task reserves where the actors leave one CPU: a reading and a writing task at once. Where they leave two, a
task reserves a whole one: Ray keeps as many idle workers as a node has CPUs, and with more tasks than that at once it
kept starting processes of 1.1 CPU seconds each (10,000 pairs/s of a free scorer instead of 15,000)."""

LOCAL_TASK_CPUS = 4
"""CPUs beside the actors' in a Ray of our own: 2, 4 and 6 gave 15,000, 21,000 and 17,000 pairs/s on 2 cores."""

UNIT_TRIES = 40
"""Starts of an actor for one unit. Attempts ends the tries of a unit sooner; units that wait behind it use theirs up
with it."""


@dataclass(frozen=True)
class Job:
    """What every task needs. `environment` carries the store's credentials to the workers: as an argument, because a
    runtime_env is shown on the dashboard and written to logs."""

    config: JobConfig
    model: ModelSpec
    fingerprint: str
    environment: dict[str, str]

    def enter(self) -> None:
        """Take on the driver's environment in a worker."""
        os.environ.update(self.environment)


def run_ray(config: JobConfig, model: ModelSpec, plan: Plan, done: frozenset[str]) -> Iterator[Receipt | SetAside]:
    """Score and commit the units that are not done; receipts come in the order in which units finish.

    Raises the expected errors of every step, and UnfinishedError where Ray gives up.
    """
    job = Job(config, model, plan.fingerprint, _environment())
    ranges = [{"range": pickle.dumps(work)} for work in read_ranges(plan, done)]
    if not ranges:
        return
    with _cluster(config), warnings.catch_warnings():
        # Ray's advice when an input error ends the reading early: nothing that a user can act on
        warnings.filterwarnings("ignore", "The minimum number of concurrent actors")
        dataset = _dataset(job, ranges, len(plan.units) - len(done))
        logged = padded = False
        try:
            for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                for row in cast(pa.Table, batch).to_pylist():
                    if row["error"] is not None:
                        problem = pickle.loads(row["error"])
                        if not isinstance(problem, SetAside):
                            raise from_value(problem)
                        yield problem
                        continue
                    receipt = Receipt.from_json(row["payload"], "a worker's receipt")
                    if receipt.self_test and not logged:  # of the first actor; the others' are in their receipts
                        log.info("%s", receipt.self_test)
                        logged = True
                    if receipt.fallback and not padded:
                        log.warning("%s: batches are padded, which is slower: %s", receipt.scorer, receipt.fallback)
                        padded = True
                    yield receipt
        except ray.exceptions.RayError as error:
            raise _given_up(error) from error


def each_on_ray(config: JobConfig, calls: Sequence[Callable[[], T]]) -> Iterator[T]:
    """What each call returns, as they finish, each in a task of its own. Raises their expected errors, and
    UnfinishedError where Ray gives up."""
    if not calls:
        return
    environment = _environment()
    with _cluster(config), _data_context():
        items = [{"call": pickle.dumps((call, environment))} for call in calls]
        dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            _call, batch_size=1, batch_format="pyarrow", num_cpus=1
        )
        try:
            for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                for row in cast(pa.Table, batch).to_pylist():
                    if row["error"] is not None:
                        raise from_value(pickle.loads(row["error"]))
                    yield pickle.loads(row["payload"])
        except ray.exceptions.RayError as error:
            raise _given_up(error) from error


def _call(batch: pa.Table) -> pa.Table:
    call, environment = pickle.loads(batch["call"][0].as_py())
    os.environ.update(environment)
    try:
        return _row(pickle.dumps(call()), None)
    except BatchRerankError as error:
        return _failure(error)


def _given_up(error: Exception) -> UnfinishedError:
    lines = str(error).strip().splitlines()
    return UnfinishedError(f"Ray ended the job: {lines[-1] if lines else type(error).__name__}; run it again to resume")


def _dataset(job: Job, ranges: list[dict[str, bytes]], units: int) -> "ray.data.Dataset":
    cluster = job.config.cluster
    most = min(cluster.max_actors, units)
    pool = ActorPoolStrategy(
        min_size=min(cluster.min_actors, units),
        max_size=most,
        initial_size=most,  # no ramp: a nightly job wants its GPUs at once
        max_tasks_in_flight_per_actor=cluster.prefetch_units,
    )
    unit: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow"}
    task: dict[str, Any] = {**unit, "fn_kwargs": {"job": job}}
    actor_cpus, read_cpus, write_cpus = _reservations(cluster.cpus_per_actor, most)
    with _data_context():
        items = ray.data.from_items(ranges, override_num_blocks=len(ranges))
        encoded = items.map_batches(read_and_encode, num_cpus=read_cpus, **task)  # type: ignore[arg-type]
        scored = encoded.map_batches(
            Score,
            fn_constructor_args=(job,),
            compute=pool,
            num_cpus=actor_cpus,
            num_gpus=cluster.gpus_per_actor,
            max_task_retries=UNIT_TRIES,
            **unit,
        )
        return scored.map_batches(rank_and_write, num_cpus=write_cpus, **task)  # type: ignore[arg-type]


def _reservations(threads: int, actors: int) -> tuple[float, float, float]:
    """CPUs that an actor, a reading task and a writing task reserve.

    An actor reserves its threads, or less where the actors would leave no CPU to read and write with: actors never give
    theirs back, so on a cluster of fixed size a job that reserves them all waits for ever.
    """
    grows = ray._private.state.state.get_max_resources_from_cluster_config() is not None
    total = float(ray.cluster_resources().get("CPU", 0))  # type: ignore[no-untyped-call]
    left = total - actors * threads
    if grows or left >= 2:
        return threads, 1, 1
    if left >= READ_CPUS + WRITE_CPUS:
        return threads, READ_CPUS, WRITE_CPUS
    reserved = max(0.0, total - READ_CPUS - WRITE_CPUS) / actors
    log.warning(
        "the cluster has %g CPUs; %d actors of %d and reading and writing want %g: each actor reserves %.2g and keeps "
        "its threads, so they share cores (cluster.actors, cluster.cpus_per_actor)",
        total,
        actors,
        threads,
        actors * threads + READ_CPUS + WRITE_CPUS,
        reserved,
    )
    return reserved, READ_CPUS, WRITE_CPUS


@contextmanager
def _data_context() -> Iterator[None]:
    """Ray Data's settings for one dataset, without changing those of the process."""
    with warnings.catch_warnings():
        # Copying the context touches Ray's own deprecated settings. And max_task_retries has no named parameter in Ray
        # 2.60, but without it a unit that kills its actor is tried for ever
        warnings.filterwarnings("ignore", "(?s).*deprecated", DeprecationWarning)
        context = DataContext.get_current().copy()
        context.target_max_block_size = 1  # a block ends after every unit, so units are spread and retried one by one
        context.enable_progress_bars = False
        context.max_errored_blocks = -1  # the driver holds receipts against the plan: a lost unit is missed by name
        with DataContext.current(context):
            yield


def read_and_encode(batch: pa.Table, job: Job) -> Iterator[pa.Table]:
    """A read range to its units, one block each."""
    job.enter()
    work: ReadRange = pickle.loads(batch["range"][0].as_py())
    try:
        for read in read_range(work, job.config, job.model):
            yield _block(or_set_aside(read.unit, lambda read=read: encode_unit(read, _encoder(job.model))))  # type: ignore[misc]
    except BatchRerankError as error:
        yield _failure(error)


class Score:
    """An actor: one model copy. An error of the load is kept and returned with every unit."""

    def __init__(self, job: Job) -> None:
        job.enter()
        context = ray.get_runtime_context()
        manifest = Manifest(locate(job.config.output.path, job.config.output.storage_options, reached=True))
        self._attempts = Attempts(
            manifest.root / f"_manifest/attempts/{context.get_actor_id()}.json",
            context.was_current_actor_reconstructed,
        )
        self._scorer = self._load(job)

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
            return _failure(self._scorer)
        return _step(batch, self._score)

    def _score(self, unit: EncodedUnit) -> ScoredUnit | SetAside:
        assert isinstance(self._scorer, LoadedScorer)
        name, attempts = unit.unit.id, self._attempts
        refused = attempts.begin(name)
        if refused:
            return SetAside(name, attempts.tries(name) - 1, refused)
        trial = attempts.trial(name) or Trial.of(unit.encoded)
        try:
            return score_unit(unit, self._scorer, trial)
        except DeviceLostError as error:
            attempts.leave(name, trial)
            log.error("unit %s: the device is lost (%s); this process ends, and Ray starts another", name, error)
            os._exit(1)
        finally:
            attempts.end()


def rank_and_write(batch: pa.Table, job: Job) -> pa.Table:
    """A scored unit to its receipt."""
    job.enter()
    return _step(batch, lambda unit: commit_unit(unit, job.config, job.model, job.fingerprint))


def _step(batch: pa.Table, work: Callable[[Any], ScoredUnit | Receipt | SetAside]) -> pa.Table:
    """Apply a step to the one unit of a block; errors and units set aside pass through."""
    if batch["error"][0].is_valid:
        return batch
    try:
        unit = _unpack(batch["payload"][0].as_buffer())
        return _block(or_set_aside(unit.unit, lambda: work(unit)))
    except BatchRerankError as error:
        return _failure(error)


def _block(value: EncodedUnit | ScoredUnit | Receipt | SetAside) -> pa.Table:
    if isinstance(value, SetAside):
        return _row(None, pickle.dumps(value))
    return _row(value.to_json() if isinstance(value, Receipt) else _pack(value), None)


def _failure(error: BatchRerankError) -> pa.Table:
    return _row(None, pickle.dumps(as_value(error)))


def _row(payload: bytes | None, error: bytes | None) -> pa.Table:
    return pa.table({"payload": pa.array([payload], pa.large_binary()), "error": pa.array([error], pa.binary())})


def _pack(unit: EncodedUnit | ScoredUnit) -> bytes:
    """Pickle with the rows as Arrow IPC: a pickled slice of a table would carry the whole table's buffers."""
    rows = unit.rows
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows)
    return pickle.dumps((replace(unit, rows=None), sink.getvalue().to_pybytes()))


def _unpack(buffer: pa.Buffer) -> Any:
    unit, rows = pickle.loads(buffer)
    return replace(unit, rows=pa.ipc.open_stream(rows).read_all())


@lru_cache(maxsize=2)
def _encoder(model: ModelSpec) -> Encoder:
    """One tokenizer a worker process: loading the 11 MB of Qwen's takes longer than encoding a unit."""
    return make_encoder(relocate(model))


def _environment() -> dict[str, str]:
    """Credentials, endpoint and hub settings of the driver. Files, profiles and roles are a node's and stay there."""
    local = ("_FILE", "_BUNDLE", "PROFILE", "CONTAINER", "ROLE")
    names = [name for name in os.environ if name.startswith(("AWS_", "HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE"))]
    return {name: os.environ[name] for name in names if not any(part in name for part in local)}


@contextmanager
def _cluster(config: JobConfig) -> Iterator[None]:
    """Ray as this process already has it, else the cluster of cluster.address or RAY_ADDRESS, else our own."""
    if ray.is_initialized():
        yield
        return
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    on_sigterm = signal.getsignal(signal.SIGTERM)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if address:
        ray.init(address=address, **quiet)
    else:
        # Ray Data's actors make Ray's C++ log a line at level error on every start; this Ray is ours and short-lived
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        # a bare ray.init() would join whatever cluster this host last started
        actors = config.cluster.max_actors * config.cluster.cpus_per_actor
        ray.init(address="local", num_cpus=actors + LOCAL_TASK_CPUS, include_dashboard=False, **quiet)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # ray.init puts its own in place, which exits with 15 and no status
    try:
        yield
    finally:
        ray.shutdown()
