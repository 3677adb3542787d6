"""The job on Ray Data: CPU tasks read and encode, a pool of actors scores, CPU tasks rank and commit.

The only file that imports ray, and wiring only. One unit is one row of one block, so it is one task of every stage.
Expected errors come back as values in the stream and are raised in the driver; Ray would wrap them in tracebacks.
"""

import json
import logging
import os
import pickle
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.data._internal.actor_autoscaler.autoscaling_actor_pool import ActorPoolInfo
from ray.data._internal.execution.execution_callback import ExecutionCallback

from batch_rerank.config import JobConfig
from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.errors import ConfigError, UnfinishedError, from_value
from batch_rerank.job.devices import Machines, Node, cores, gpus_of_types, reservations, room, settle, this_machine
from batch_rerank.job.watch import Heartbeat, Watch, head_answers
from batch_rerank.score.bundles import Bundling
from batch_rerank.score.read_unit import read_ranges
from batch_rerank.score.tasks import Job, Scoring, call, environment, rank_and_write, read_and_encode
from batch_rerank.store.plans import Plan
from batch_rerank.store.receipts import Receipt, SetAside

if TYPE_CHECKING:
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

log = logging.getLogger("batch_rerank")
T = TypeVar("T")

LOCAL_TASK_CPUS = 4
"""CPUs beside the actors' in a Ray of our own: 2, 4 and 6 gave 15,000, 21,000 and 17,000 pairs/s on 2 cores."""

JOIN_SECONDS = 10.0
"""How long a head is looked for."""

UNIT_TRIES = 40
"""Starts of an actor for one unit. Attempts ends the tries of a unit sooner; units that wait behind it use theirs up
with it."""


def run_ray(
    config: JobConfig,
    model: ModelSpec,
    plan: Plan,
    done: frozenset[str],
    bundling: Bundling | None = None,
) -> Iterator[Receipt | SetAside]:
    """Score and commit the units that are not done; with `bundling`, what is left of them. Receipts come in the order
    in which units finish.

    Raises the expected errors of every step, and UnfinishedError where Ray gives up.
    """
    works = bundling.tasks(plan, done) if bundling else [[work] for work in read_ranges(plan, done)]
    ranges = [{"ranges": pickle.dumps(work)} for work in works]
    if not ranges:
        return
    with on_cluster(config) as found, warnings.catch_warnings():
        # Ray's advice when an input error ends the reading early: nothing that a user can act on
        warnings.filterwarnings("ignore", "The minimum number of concurrent actors")
        config = settle(config, found)
        actors = min(room(config.cluster, found), len(ranges) if bundling else len(plan.units) - len(done))
        job = Job(config, model, plan.fingerprint, environment())
        if bundling:
            job = replace(job, shared=_Shared(ray.put(bundling.reuse)), enough=bundling.enough)
        dataset = _dataset(job, ranges, actors)
        logged = padded = False
        for payload in _payloads(dataset):
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
            yield receipt


class _Shared:
    """A value in Ray's object store."""

    def __init__(self, reference: "ray.ObjectRef[Any]") -> None:
        self._reference = reference

    def get(self) -> Any:
        """The value; its arrays are the node's, for reading."""
        return ray.get(self._reference)


def each_on_ray(config: JobConfig, calls: Sequence[Callable[..., T]], shared: Any = None) -> Iterator[T]:
    """What each call returns, as they finish, each in a task of its own; of `shared`, if that is given, which each node
    has once. Raises their expected errors, and UnfinishedError where Ray gives up."""
    if not calls:
        return
    variables = environment()
    with on_cluster(config), _data_context():
        items = [{"call": pickle.dumps((function, variables))} for function in calls]
        of = {"shared": None if shared is None else _Shared(ray.put(shared))}
        dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            call, batch_size=1, batch_format="pyarrow", num_cpus=1, fn_kwargs=of
        )
        for payload in _payloads(dataset):
            yield pickle.loads(cast(bytes, payload))


class Score(Scoring):
    """An actor."""

    def __init__(self, job: Job) -> None:
        context = ray.get_runtime_context()
        super().__init__(job, context.get_actor_id() or "", context.was_current_actor_reconstructed)


def _payloads(dataset: "ray.data.Dataset") -> Iterator[bytes | SetAside]:
    """The rows of a dataset's blocks as they come. Raises their errors, and UnfinishedError where Ray gives up."""
    node: Any = ray._private.worker._global_node
    with Watch(_waits, Heartbeat(node.raylet_socket_name, node.gcs_address).gone) as watch:
        try:
            for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                for row in cast(pa.Table, batch).to_pylist():
                    watch.progress()
                    if row["error"] is None:
                        yield row["payload"]
                        continue
                    problem = pickle.loads(row["error"])
                    if not isinstance(problem, SetAside):
                        raise from_value(problem)
                    yield problem
        except ray.exceptions.RayError as error:
            raise _given_up(watch.lost or error) from error
        except KeyboardInterrupt:
            if watch.lost:
                raise _given_up(watch.lost) from None
            raise
        finally:
            Execution.latest = None


class Execution(ExecutionCallback):
    """Keeps what Ray Data is executing within reach, for `_waits`."""

    latest: ClassVar["StreamingExecutor | None"] = None

    def before_execution_starts(self, executor: "StreamingExecutor") -> None:
        """Called by Ray Data."""
        Execution.latest = executor


def _waits() -> str:
    """What is at work, stage by stage, and what the cluster has free."""
    executor = Execution.latest
    stages = list((executor and executor._topology) or {})[1:]  # the first one is the list of ranges
    said = []
    for stage in stages:
        actors = stage.get_actor_info()
        pool = f"{actors.running} actors alive, {actors.pending + actors.restarting} waited for, "
        at_work = f"{pool if actors != ActorPoolInfo(0, 0, 0) else ''}{stage.num_active_tasks()} tasks"
        said.append(f"{stage.name.removeprefix('MapBatches(').removesuffix(')')}: {at_work}")
    free = ray.available_resources()  # type: ignore[no-untyped-call]
    unused = f"free: {free.get('CPU', 0):g} CPUs, {free.get('GPU', 0):g} GPUs"
    return "; ".join([*said, f"{machines()}, {unused}"])


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
            max_task_retries=UNIT_TRIES,
            **unit,
        )
        return scored.map_batches(rank_and_write, num_cpus=write_cpus, **task)  # type: ignore[arg-type]


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
        context.execution_no_progress_timeout_s = (
            -1
        )  # 30 minutes: a node, or a unit, may take longer, and _waits says so
        context.custom_execution_callback_classes = [Execution]
        context.max_errored_blocks = -1  # the driver holds receipts against the plan: a lost unit is missed by name
        with DataContext.current(context):
            yield


def look(config: JobConfig) -> Machines:
    """What a job of this config would run on. Starts nothing: without a cluster to join it is this machine.

    Raises ConfigError where no Ray answers at the address.
    """
    if not (ray.is_initialized() or _address(config)):
        return this_machine()
    with on_cluster(config) as found:
        return found


def _address(config: JobConfig) -> str | None:
    return config.cluster.address or os.environ.get("RAY_ADDRESS")


_own: list[Machines] = []
"""What this process computes on while a Ray of its own is open: Ray itself counts more CPUs than the machine has."""


@contextmanager
def on_cluster(config: JobConfig) -> Iterator[Machines]:
    """Ray as this process already has it, else the cluster of cluster.address or RAY_ADDRESS, else our own; and what
    there is to compute on. One within another is the same. Raises ConfigError where no Ray answers at the address."""
    if ray.is_initialized():
        yield _own[0] if _own else machines()
        return
    address = _address(config)
    try:
        with _own_sigterm():
            found = _join(address) if address else _start(config)
        _own[:] = [] if address else [found]
        yield found
    finally:
        _own.clear()
        _leave()


def _leave() -> None:
    """ray.shutdown, after which SIGTERM is this process's own again: Ray's C++ resets it to its default, and then Ray
    takes a second or more to end its processes."""
    node: Any = ray._private.worker._global_node
    if node is not None and threading.current_thread() is threading.main_thread():
        ours, end = signal.getsignal(signal.SIGTERM), node.kill_all_processes

        def end_processes(**options: Any) -> None:
            signal.signal(signal.SIGTERM, ours)
            end(**options)

        node.kill_all_processes = end_processes
    with _own_sigterm():
        ray.shutdown()


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep this process's way of ending: ray.init puts its own in place, which exits with 15 and leaves no status."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:
        signal.signal(signal.SIGTERM, ours)
        signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, ours)


QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}


def _join(address: str) -> Machines:
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        if ":" in address.removeprefix("ray://") and not head_answers(address.removeprefix("ray://"), JOIN_SECONDS):
            raise ConnectionError(f"nothing answered there for {JOIN_SECONDS:g} s")  # Ray tries for minutes
        ray.init(address=address, **QUIET)
    except (ConnectionError, RuntimeError, ValueError, AssertionError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            f"cluster.address {address!r}: no Ray to join there ({lines[0][:200]}); expected HOST:PORT of a running "
            "head; leave it and RAY_ADDRESS out to run on this machine"
        ) from error
    return machines()


def _start(config: JobConfig) -> Machines:
    """A Ray of our own on this machine, with CPUs for the tasks beside the actors'."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    # Ray Data's actors make Ray's C++ log a line at level error on every start; this Ray is ours and short-lived
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    cluster = settle(config, this_machine()).cluster
    # a bare ray.init() would join whatever cluster this host last started
    cpus = cluster.max_actors * cluster.threads + LOCAL_TASK_CPUS
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, **QUIET)
    return Machines("this machine", (Node(cores(), machines().gpus),))


def machines() -> Machines:
    """The nodes that live."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    nodes = tuple(Node(node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in alive)
    return Machines("the cluster", nodes, *_growth())


def _growth() -> tuple[bool, float | None]:
    """Whether an autoscaler adds nodes, and how many GPUs there may be then, None where that is not known.

    Ray 2.60 tells neither (`get_max_resources_from_cluster_config` is None also on a cluster of `ray up`). But its
    monitor gives the nodes of a cluster of fixed size types of their own, "node_<id>", and `ray up` leaves its config
    on the head, where `ray job submit` runs drivers.
    """
    state = ray._private.state.state
    most = state.get_max_resources_from_cluster_config()
    if most is not None:
        return True, most.get("GPU", 0)
    types = _node_types()
    if all(name.startswith("node_") for name in types):
        return False, None
    return True, gpus_of_types(Path("~/ray_bootstrap_config.yaml").expanduser(), types)


def _node_types() -> set[str]:
    """The types of the nodes by the monitor's report; none where there is no monitor."""
    from ray.autoscaler.v2.sdk import get_cluster_status
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    if is_autoscaler_v2(fetch_from_server=True):
        status = get_cluster_status(ray.get_runtime_context().gcs_address)
        return {node.ray_node_type_name for node in (*status.active_nodes, *status.idle_nodes)} - {""}
    report = ray.experimental.internal_kv._internal_kv_get("__autoscaling_status")
    return set(((json.loads(report).get("autoscaler_report") if report else None) or {}).get("active_nodes") or {})
