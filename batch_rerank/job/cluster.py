"""The Ray that a job runs on: this process's, the cluster's at an address, or one of our own; and what it has."""

import json
import logging
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import ray

from batch_rerank.config import JobConfig
from batch_rerank.errors import BatchRerankError, ConfigError, UnfinishedError, as_value, from_value, lines_of
from batch_rerank.job.devices import Machines, Node, cores, gpus_of_types, reservations, room, settle, this_machine
from batch_rerank.job.watch import head_answers
from batch_rerank.score.leaving import Notice
from batch_rerank.score.tasks import environment

log = logging.getLogger("batch_rerank")
T = TypeVar("T")

LOCAL_TASK_CPUS = 4
"""CPUs beside the actors' in a Ray of our own: 2, 4 and 6 gave 15,000, 21,000 and 17,000 pairs/s on 2 cores."""

NODES_SECONDS = 2.0

JOIN_SECONDS = 10.0
"""How long a head is looked for."""


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
        with _own_sigterm(), _quiet_core():
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

_LEVEL = "RAY_BACKEND_LOG_LEVEL"


@contextmanager
def _quiet_core() -> Iterator[None]:
    """While Ray starts in this process, unless the user has set a level: Ray Data's actors make its C++ print an error
    about constructor arguments on every start. Of a cluster's processes only this one hears of it."""
    given = _LEVEL in os.environ
    os.environ.setdefault(_LEVEL, "fatal")
    try:
        yield
    finally:
        if not given:
            del os.environ[_LEVEL]


def _join(address: str) -> Machines:
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        if ":" in address.removeprefix("ray://") and not head_answers(address.removeprefix("ray://"), JOIN_SECONDS):
            raise ConnectionError(f"nothing answered there for {JOIN_SECONDS:g} s")  # Ray tries for minutes
        ray.init(address=address, **QUIET)
    except (ConnectionError, RuntimeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"cluster.address {address!r}: no Ray to join there ({lines_of(error)[0][:200]}); expected HOST:PORT of a "
            "running head; leave it and RAY_ADDRESS out to run on this machine"
        ) from error
    return machines()


def _start(config: JobConfig) -> Machines:
    """A Ray of our own on this machine, with CPUs for the tasks beside the actors'."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    cluster = settle(config, this_machine()).cluster
    # a bare ray.init() would join whatever cluster this host last started
    cpus = cluster.max_actors * cluster.threads + LOCAL_TASK_CPUS
    try:
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **QUIET)
    except Exception as error:  # any: Ray has no type for a start that takes too long
        raise UnfinishedError(
            f"no Ray could be started on this machine: {lines_of(error)[0][:300]}; expected one within Ray's own time: "
            "the machine may be too busy, or its /tmp or shared memory full; run it again, or with --local"
        ) from error
    (node,) = machines().nodes
    return Machines("this machine", (Node(cores(), node.gpus, node.accelerator),))


def machines() -> Machines:
    """The nodes that live."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    nodes = tuple(Node(node.get("CPU", 0.0), node.get("GPU", 0.0), _accelerator(node)) for node in alive)
    return Machines("the cluster", nodes, *_growth())


def _accelerator(resources: Mapping[str, float]) -> str:
    return next((name.partition(":")[2] for name in resources if name.startswith("accelerator_type:")), "")


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


def notice(node: str) -> Notice | None:
    """What Ray knows of a node that leaves: by `ray drain-node`, the SIGTERM of its `ray start`, or an autoscaler."""
    return _leaving().get(node)


def gone(node: str) -> bool:
    """Whether a node is not there any more, or is leaving."""
    return node in _leaving() or node not in _names()


def _leaving() -> dict[str, Notice]:
    """The nodes that leave, by their ids; none where the head does not answer."""
    try:
        deadlines = ray._private.state.state.get_draining_nodes()
    except Exception:  # it is asked again
        return {}
    return {node: Notice("Ray drains the node", end / 1000 if end else None) for node, end in deadlines.items()}


def _names() -> dict[str, str]:
    """Addresses of the nodes that live, by their ids."""
    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]


@contextmanager
def nodes_followed(poll: float = NODES_SECONDS) -> Iterator[None]:
    """Say which nodes leave, go and come while a block is at work."""
    ended = threading.Event()
    thread = threading.Thread(target=_follow, args=(_names(), ended, poll), name="nodes", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(1)  # no longer: a head that has gone does not answer


def _follow(known: dict[str, str], ended: threading.Event, poll: float) -> None:
    said = set[str]()
    while not ended.wait(poll):
        try:
            names, leaving = _names(), _leaving()
        except Exception:  # the head is away: `Heartbeat` sees that, and this asks again
            continue
        if ended.is_set():
            return
        for node in leaving.keys() & names.keys() - said:
            end = leaving[node].deadline
            left = "" if end is None else f" in {max(0.0, end - time.time()):.0f} s"
            log.warning("node %s leaves%s: its actors end their units or drop them, and begin none", names[node], left)
        said |= leaving.keys()
        for node in known.keys() - names.keys():
            log.warning("node %s has gone; there are %d left", known[node], len(names))
        for node in names.keys() - known.keys():
            log.info("node %s has come; there are %d", names[node], len(names))
        known = names


def on_actor(config: JobConfig, call: Callable[[JobConfig], T]) -> tuple[T, JobConfig]:
    """What a call returns, and the job with what there is to compute on, which the call is given. Raises its expected
    errors, ConfigError where no Ray answers or no actor has room, and UnfinishedError where Ray gives up."""
    with on_cluster(config) as found:
        config = settle(config, found)
        room(config.cluster, found)
        cpus, _, _ = reservations(config.cluster.threads, config.cluster.gpus, 1, machines())
        wanted: dict[str, Any] = {"num_gpus": config.cluster.gpus, "accelerator_type": config.cluster.accelerator_type}
        task: Any = ray.remote(num_cpus=cpus, max_retries=0, **wanted)(_call)
        try:
            value, error = pickle.loads(ray.get(task.remote(pickle.dumps((call, config, environment())))))
        except ray.exceptions.RayError as failure:
            raise UnfinishedError(f"Ray ended the call: {lines_of(failure)[-1][:300]}") from failure
    if error is not None:
        raise from_value(error)
    return value, config


def _call(data: bytes) -> bytes:
    call, config, variables = pickle.loads(data)
    os.environ.update(variables)
    try:
        return pickle.dumps((call(config), None))
    except BatchRerankError as error:
        return pickle.dumps((None, as_value(error)))
