"""The job on Ray Data: CPU tasks read and encode, a pool of actors scores, CPU tasks rank and commit.

Wiring only. One unit is one row of one block, so it is one task of every stage.
Expected errors come back as values in the stream and are raised in the driver; Ray would wrap them in tracebacks.
"""

import logging
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.data._internal.actor_autoscaler.autoscaling_actor_pool import ActorPoolInfo
from ray.data._internal.execution.execution_callback import ExecutionCallback

from batch_rerank.calls import Packed, packs
from batch_rerank.config import JobConfig
from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.errors import StuckError, UnfinishedError, from_value
from batch_rerank.job.cluster import gone, machines, nodes_followed, notice, on_cluster
from batch_rerank.job.devices import reservations, room, settle
from batch_rerank.job.watch import Heartbeat, Watch
from batch_rerank.score.bundles import Bundling
from batch_rerank.score.read_unit import ReadRange, read_ranges
from batch_rerank.score.tasks import Job, Life, Scoring, call, environment, rank_and_write, read_and_encode
from batch_rerank.sections import Cluster
from batch_rerank.store.plans import Plan
from batch_rerank.store.receipts import Receipt, SetAside

if TYPE_CHECKING:
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

log = logging.getLogger("batch_rerank")
T = TypeVar("T")

UNIT_TRIES = 40
"""Starts of an actor for one unit. Attempts ends the tries of a unit sooner; units that wait behind it use theirs up
with it."""

CALL_BYTES = 256 * 2**20
"""Of compressed calls in a group: the driver holds each three times while it hands it on."""

MOST_TASKS = 10_000
"""Read tasks of a dataset, and calls of one: the driver makes an object of each before the first one begins, in some
2 ms, and holds it to the end."""


def run_ray(
    config: JobConfig,
    model: ModelSpec,
    plan: Plan,
    done: frozenset[str],
    bundling: Bundling | None = None,
    begin: Callable[[int], None] = lambda actors: None,
) -> Iterator[Receipt | SetAside]:
    """Score and commit the units that are not done; with `bundling`, what is left of them. Receipts come in the order
    in which units finish. `begin` is told how many actors are asked for, when they are.

    Raises the expected errors of every step, and UnfinishedError where Ray gives up.
    """
    works = together(bundling.tasks(plan, done) if bundling else [[work] for work in read_ranges(plan, done)])
    ranges = [{"ranges": pickle.dumps(work)} for work in works]
    if not ranges:
        return
    with on_cluster(config) as found, warnings.catch_warnings():
        # Ray's advice when an input error ends the reading early: nothing that a user can act on
        warnings.filterwarnings("ignore", "The minimum number of concurrent actors")
        config = settle(config, found)
        actors = min(room(config.cluster, found), len(ranges) if bundling else len(plan.units) - len(done))
        begin(actors)
        job = Job(config, model, plan.fingerprint, environment())
        if bundling:
            job = replace(job, shared=_Shared(ray.put(bundling.reuse)), enough=bundling.enough)
        dataset = _dataset(job, ranges, actors)
        logged = padded = False
        for payload in _payloads(dataset, config.cluster):
            if isinstance(payload, SetAside):
                yield payload
                continue
            receipt = Receipt.from_json(payload, "a worker's receipt")
            if receipt.self_test and not logged:  # of the first actor; the others' are in their receipts
                log.info("%s", receipt.self_test)
                logged = True
            if receipt.fallback and not padded:
                log.warning("%s: not the fastest forward: %s", receipt.scorer, receipt.fallback)
                padded = True
            if receipt.fetched_bytes:
                took = f"{receipt.fetched_bytes:,} bytes of weights in {receipt.fetch_seconds:.1f} s"
                log.info("%s has fetched %s", receipt.host, took)
            yield receipt


def together(works: Sequence[list[ReadRange]], most: int = MOST_TASKS) -> list[list[ReadRange]]:
    """What is read, in the same order, as at most so many tasks."""
    size = -(-len(works) // most) or 1
    return [[work for task in works[at : at + size] for work in task] for at in range(0, len(works), size)]


class _Shared:
    """A value in Ray's object store."""

    def __init__(self, reference: "ray.ObjectRef[Any]") -> None:
        self._reference = reference

    def get(self) -> Any:
        """The value; its arrays are the node's, for reading."""
        return ray.get(self._reference)


def each_on_ray(config: JobConfig, calls: Iterable[Callable[..., T]], shared: Any = None) -> Iterator[T]:
    """What each call returns, as they finish, each in a task of its own; of `shared`, if that is given, which each node
    has once. Calls that are made as they are asked for are made in groups, one dataset after the other. Raises their
    expected errors, and UnfinishedError where Ray gives up."""
    groups = packs(calls, MOST_TASKS, CALL_BYTES)
    first = next(groups, None)
    if first is None:
        return
    with on_cluster(config):
        of = {"shared": None if shared is None else _Shared(ray.put(shared))}
        for group in chain([first], groups):
            yield from _each_of(group, config, of)


def _each_of(calls: Sequence[Packed], config: JobConfig, of: dict[str, _Shared | None]) -> Iterator[Any]:
    """Nobody holds what calls return against a plan: one that is lost ends the others."""
    variables, ended = environment(), 0
    with _data_context(most_lost=0):
        items = [{"call": pickle.dumps((function, variables))} for function in calls]
        dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            call, batch_size=1, batch_format="pyarrow", num_cpus=1, fn_kwargs=of
        )
        for payload in _payloads(dataset, config.cluster):
            ended += 1
            yield pickle.loads(cast(bytes, payload))
    if ended != len(calls):
        raise UnfinishedError(f"Ray has lost {len(calls) - ended} of {len(calls)} tasks without a word; run it again")


class Score(Scoring):
    """An actor."""

    def __init__(self, job: Job) -> None:
        context = ray.get_runtime_context()
        node = context.get_node_id()
        restarted = context.was_current_actor_reconstructed
        super().__init__(job, Life(context.get_actor_id() or "", restarted, node, gone, partial(notice, node)))


def _payloads(dataset: "ray.data.Dataset", cluster: Cluster) -> Iterator[bytes | SetAside]:
    """The rows of a dataset's blocks as they come. Raises their errors, UnfinishedError where Ray gives up, and
    StuckError where nothing happens for too long."""
    node: Any = ray._private.worker._global_node
    heartbeat = Heartbeat(node.raylet_socket_name, node.gcs_address)
    limit = cluster.max_seconds_without_progress
    waits = partial(_waits, cluster.accelerator_type)
    with nodes_followed(), Watch(waits, heartbeat.gone, limit=limit, done=_done) as watch:
        try:
            for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                for row in cast(pa.Table, batch).to_pylist():
                    watch.progress()
                    watch.away = True
                    yield row["payload"] if row["error"] is None else _set_aside(row["error"])
                    watch.away = False
        except ray.exceptions.RayError as error:
            raise _given_up(watch.lost or error) from error
        except KeyboardInterrupt:
            if watch.stuck:
                raise StuckError(watch.stuck) from None
            if watch.lost:
                raise _given_up(watch.lost) from None
            raise
        finally:
            Execution.latest = None


def _set_aside(error: bytes) -> SetAside:
    problem = pickle.loads(error)
    if not isinstance(problem, SetAside):
        raise from_value(problem)
    return problem


class Execution(ExecutionCallback):
    """Keeps what Ray Data is executing within reach, for `_waits`, and lets go of what it keeps of every block."""

    latest: ClassVar["StreamingExecutor | None"] = None

    def before_execution_starts(self, executor: "StreamingExecutor") -> None:
        """Called by Ray Data."""
        Execution.latest = executor

    def on_execution_step(self, executor: "StreamingExecutor") -> None:
        """Called by Ray Data in the thread that adds to these lists, which are for `Dataset.stats()` alone."""
        for stage in executor._topology or {}:
            for blocks in stage.get_stats().values():
                blocks.clear()


def _stages() -> list[Any]:
    executor = Execution.latest
    return list((executor and executor._topology) or {})[1:]  # the first one is the list of ranges


def _done() -> tuple[int, ...]:
    """Numbers of which one grows where a job goes on: tasks that have ended, and actors that are alive."""
    stages = _stages()
    alive = sum(stage.get_actor_info().running for stage in stages)
    return sum(stage.metrics.num_tasks_finished for stage in stages), alive


def _waits(accelerator: str | None = None) -> str:
    """What is at work, stage by stage, and what the cluster has free."""
    said = []
    for stage in _stages():
        actors = stage.get_actor_info()
        pool = f"{actors.running} actors alive, {actors.pending + actors.restarting} waited for, "
        at_work = f"{pool if actors != ActorPoolInfo(0, 0, 0) else ''}{stage.num_active_tasks()} tasks"
        said.append(f"{stage.name.removeprefix('MapBatches(').removesuffix(')')}: {at_work}")
    free = ray.available_resources()  # type: ignore[no-untyped-call]
    unused = f"free: {free.get('CPU', 0):g} CPUs, {free.get('GPU', 0):g} GPUs"
    found = machines()
    wanted = f"; {accelerator} GPUs: {found.of(accelerator).gpus:g}" if accelerator else ""
    return "; ".join([*said, f"{found}, {unused}{wanted}"])


def units_waiting() -> dict[str, int]:
    """Units that wait at each actor, beside those at work, by its id; empty where nothing is executed."""
    executor, found = Execution.latest, {}
    for stage in list((executor and executor._topology) or {}):
        for pool in stage.get_autoscaling_actor_pools():
            states: dict[Any, Any] = pool._running_actors  # type: ignore[attr-defined]
            for actor, state in list(states.items()):
                found[actor._actor_id.hex()] = max(0, state.num_tasks_in_flight - pool.max_actor_concurrency())
    return found


def _given_up(error: Exception | str) -> UnfinishedError:
    lines = str(error).strip().splitlines()
    return UnfinishedError(f"Ray ended the job: {lines[-1] if lines else type(error).__name__}; run it again to resume")


def _dataset(job: Job, ranges: list[dict[str, bytes]], actors: int) -> "ray.data.Dataset":
    cluster = job.config.cluster
    at_once = 2 if cluster.gpus else 1  # a CPU that computes has no time to pack the next unit beside it
    pool = ActorPoolStrategy(
        min_size=min(cluster.min_actors, actors),
        max_size=actors,
        initial_size=actors,  # no ramp: a nightly job wants its GPUs at once
        max_tasks_in_flight_per_actor=cluster.prefetch_units + at_once - 1,
        max_concurrent_calls_per_actor=at_once,
        enable_true_multi_threading=at_once > 1,
    )
    unit: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow"}
    task: dict[str, Any] = {**unit, "fn_kwargs": {"job": job}}
    actor_cpus, read_cpus, write_cpus = reservations(cluster.threads, cluster.gpus, actors, machines())
    with _data_context():
        items = ray.data.from_items(ranges, override_num_blocks=len(ranges))
        encoded = items.map_batches(read_and_encode, num_cpus=read_cpus, **task)  # type: ignore[arg-type]
        scored = encoded.map_batches(
            Score,
            fn_constructor_args=(job,),
            compute=pool,
            num_cpus=actor_cpus,
            num_gpus=cluster.gpus,
            accelerator_type=cluster.accelerator_type,
            max_task_retries=UNIT_TRIES,
            **unit,
        )
        return scored.map_batches(rank_and_write, num_cpus=write_cpus, **task)  # type: ignore[arg-type]


@contextmanager
def _data_context(most_lost: int = -1) -> Iterator[None]:
    """Ray Data's settings for one dataset, without changing those of the process. most_lost: how many blocks may be
    lost to errors that nobody expected; of -1 any, for the driver holds receipts against the plan, and misses a lost
    unit by name."""
    with warnings.catch_warnings():
        # Copying the context touches Ray's own deprecated settings. And max_task_retries has no named parameter in Ray
        # 2.60, but without it a unit that kills its actor is tried for ever
        warnings.filterwarnings("ignore", "(?s).*deprecated", DeprecationWarning)
        context = DataContext.get_current().copy()
        context.target_max_block_size = 1  # a block ends after every unit, so units are spread and retried one by one
        context.enable_progress_bars = False
        context.execution_no_progress_timeout_s = (
            -1
        )  # 30 minutes: a node, or a unit, may take longer, and _waits says so
        context.custom_execution_callback_classes = [Execution]
        context.max_errored_blocks = most_lost
        with DataContext.current(context):
            yield
