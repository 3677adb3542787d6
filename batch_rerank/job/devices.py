"""What a job computes on: GPUs or CPUs, how many actors there is room for, and what each of them reserves.

Decided from what a cluster has, without Ray and without starting anything.
"""

import ctypes
import logging
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from batch_rerank.config import JobConfig
from batch_rerank.errors import ConfigError
from batch_rerank.sections import Cluster

log = logging.getLogger("batch_rerank")

READ_CPUS, WRITE_CPUS = 0.75, 0.25
"""What a task reserves where the actors leave one CPU: a reading and a writing task at once. Where they leave two, a
task reserves a whole one: Ray keeps as many idle workers as a node has CPUs, and with more tasks than that at once it
kept starting processes of 1.1 CPU seconds each (10,000 pairs/s of a free scorer instead of 15,000)."""


@dataclass(frozen=True)
class Node:
    """What a node has, in use or not. accelerator: Ray's name of its GPUs, empty where that is not known."""

    cpus: float
    gpus: float = 0
    accelerator: str = ""


@dataclass(frozen=True)
class Machines:
    """What there is to compute on. `name` stands for it in messages. `grows`: an autoscaler adds nodes; `most_gpus`:
    how many GPUs it may have then, None where its node types cannot be read."""

    name: str
    nodes: tuple[Node, ...]
    grows: bool = False
    most_gpus: float | None = None

    @property
    def gpus(self) -> float:
        """GPUs that are there now."""
        return sum(node.gpus for node in self.nodes)

    def of(self, accelerator: str | None) -> "Machines":
        """The same with the GPUs of this type alone; with any where it is None."""
        if accelerator is None:
            return self
        nodes = (node if node.accelerator == accelerator else replace(node, gpus=0) for node in self.nodes)
        return replace(self, nodes=tuple(nodes))

    def places(self, gpus: float) -> int:
        """How many actors of so many GPUs there is room for now: a share of a GPU is one of one GPU."""
        return sum(_on_node(node, gpus) for node in self.nodes)

    def __str__(self) -> str:
        cpus = sum(node.cpus for node in self.nodes)
        several = f"{len(self.nodes)} nodes, " if len(self.nodes) > 1 else ""
        return f"{self.name} ({several}{cpus:g} CPUs, {self.gpus:g} GPUs)"


def settle(config: JobConfig, found: Machines, actors: int | None = None) -> JobConfig:
    """The job with numbers in the place of `auto`, said in one line; `actors`: how many there will be if not
    cluster.actors.

    Raises ConfigError where an autoscaling cluster does not show whether it can bring GPUs.
    """
    cluster = config.cluster
    actors = actors or cluster.max_actors
    gpus, cpus = cluster.gpus_per_actor, cluster.cpus_per_actor
    if gpus == "auto":
        gpus = 1.0 if cluster.accelerator_type or _brings_gpus(found) else 0.0
    if cpus == "auto":
        cpus = 1 if gpus else threads([node.cpus for node in found.nodes], actors)
    if (gpus, cpus) == (cluster.gpus_per_actor, cluster.cpus_per_actor):
        return config
    each = f"{gpus:g} GPU each" if gpus else f"{cpus} CPU thread{'s' * (cpus > 1)} each, no GPU"
    log.info("%s: %d actor%s, %s", found, actors, "s" * (actors > 1), each)
    update = {"gpus_per_actor": gpus, "cpus_per_actor": cpus}
    return config.model_copy(update={"cluster": cluster.model_copy(update=update)})


def _brings_gpus(found: Machines) -> bool:
    if found.gpus or not found.grows:
        return found.gpus > 0
    if found.most_gpus is None:
        raise ConfigError(
            f"cluster.gpus_per_actor: auto, but {found} grows by node types that cannot be read from here; expected a "
            "number: 1 to wait for its GPU nodes, 0 to score on CPUs"
        )
    return found.most_gpus > 0


def room(cluster: Cluster, found: Machines) -> int:
    """How many of the actors that are asked for can be there at once; on a cluster that grows, all.

    Raises ConfigError where that is none and stays none.
    """
    asked, gpus = cluster.max_actors, cluster.gpus
    if gpus == 0:
        return asked
    kind = cluster.accelerator_type
    places = found.of(kind).places(gpus)
    each = f"{gpus:g} {kind} GPUs" if kind else f"{gpus:g} GPUs"
    if found.grows and (found.most_gpus is None or found.most_gpus >= gpus):
        if places == 0:
            log.info("%s has no room for an actor of %s yet: waiting for the autoscaler", found, each)
        return asked
    if places == 0 and found.places(gpus):
        known = sorted({node.accelerator or "of a type that Ray does not know" for node in found.nodes if node.gpus})
        raise ConfigError(
            f"cluster.accelerator_type: found {kind!r}, but the GPUs of {found} are {', '.join(known)}, and it does "
            "not grow; expected one of these, or null for any GPU"
        )
    if places == 0:
        grows = f" and grows to {found.most_gpus:g} GPUs at most" if found.grows else ", and it does not grow"
        raise ConfigError(
            f"cluster.gpus_per_actor: found {gpus:g}, but {found} has no node with so many{grows}; set it to 0 to "
            "score on CPUs or to auto to take what is there, or run on a cluster with GPUs (cluster.address)"
        )
    if places < asked:
        log.warning("cluster.actors asks for %d: %s has room for %d of %s", asked, found, places, each)
    return min(asked, places)


def threads(cpus: list[float], actors: int) -> int:
    """Threads of an actor on CPUs: as many as let all actors onto the nodes at once, at least one. A node of more than
    two CPUs keeps one for reading and writing."""
    usable = [count - 1 if count > 2 else count for count in cpus]
    most = int(max(usable, default=1))
    return next((n for n in range(most, 1, -1) if sum(int(count // n) for count in usable) >= actors), 1)


def reservations(threads: int, gpus: float, actors: int, found: Machines) -> tuple[float, float, float]:
    """CPUs that an actor, a reading task and a writing task reserve.

    An actor reserves its threads; less where they fit on no node with its GPUs, and where the actors would leave no CPU
    to read and write with: actors never give theirs back, so on a cluster of fixed size a job that reserves them all
    waits for ever.
    """
    if found.grows:
        return threads, 1, 1
    hosts = [node for node in found.nodes if not gpus or _on_node(node, gpus)]
    each = _largest(hosts, gpus, actors, threads)
    total = sum(node.cpus for node in found.nodes)
    left = total - actors * each
    if each < threads or left < READ_CPUS + WRITE_CPUS:
        # as little as leaves a CPU on the largest node, wherever Ray puts the actors: parts of CPUs that are left on
        # several nodes are no CPU
        most = max((node.cpus for node in found.nodes), default=0.0)
        each, left = min(each, max(0.0, most - READ_CPUS - WRITE_CPUS) / actors), 1
    if each < threads and actors * threads > total:
        log.warning(
            "%s: %d actors of %d threads want %d CPUs and reading and writing one more: each actor reserves %.2g and "
            "keeps its threads, so they share cores (cluster.actors, cluster.cpus_per_actor)",
            found,
            actors,
            threads,
            actors * threads,
            each,
        )
    return (each, 1, 1) if left >= 2 else (each, READ_CPUS, WRITE_CPUS)


def _largest(hosts: list[Node], gpus: float, actors: int, threads: int) -> float:
    """The largest reservation up to `threads` with which all actors fit onto the nodes; 0 where none does."""

    def fit(each: float) -> bool:
        return sum(min(_on_node(node, gpus), int(node.cpus / each + 1e-9)) for node in hosts) >= actors

    shares = {node.cpus / count for node in hosts for count in range(1, actors + 1)}
    return next((each for each in (threads, *sorted(shares, reverse=True)) if 0 < each <= threads and fit(each)), 0.0)


def _on_node(node: Node, gpus: float) -> int:
    """How many actors of so many GPUs a node has room for; without any, as many as one likes."""
    if gpus == 0:
        return 10**9
    return int(node.gpus // gpus) if gpus >= 1 else int(node.gpus) * math.floor(1 / gpus + 1e-9)


def gpus_of_types(config: Path, types: set[str]) -> float | None:
    """GPUs that the node types of `ray up`'s config have together at most; None where the file is not there or is of
    another cluster than one that has nodes of these types."""
    try:
        known: dict[str, Any] = yaml.safe_load(config.read_text())["available_node_types"]
        if not types <= set(known):
            return None
        most = [kind.get("max_workers", 0) * kind.get("resources", {}).get("GPU", 0) for kind in known.values()]
        return float(sum(most))
    except (OSError, KeyError, TypeError, AttributeError, ValueError, yaml.YAMLError):
        return None


def this_machine() -> Machines:
    """The machine this process is on, as a job without a cluster has it."""
    return Machines("this machine", (Node(cores(), _gpus()),))


def cores() -> int:
    """CPUs that this process may use: those it is bound to, and no more than its control group has."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(count, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file; or no quota: "max"
        return count


def _gpus() -> int:
    """GPUs that torch sees. Without a driver it can see none, and importing it to be told so takes two seconds."""
    if not _loads("libcuda.so.1") and not Path("/dev/kfd").exists():
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
