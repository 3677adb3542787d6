"""Nodes that leave a real cluster while they score, each a `ray start` as a pod runs it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chaos.harness import FAULTS, REPOSITORY, Chaos, Run, end_session, surroundings

pytestmark = pytest.mark.chaos
RAY = Path(sys.executable).parent / "ray"
SECONDS = 240.0
"""How long anything here may take on a machine that is busy; nothing waits for it to pass."""


def until(what: Callable[[], Any], seconds: float = SECONDS) -> Any:
    """What a call returns, once it returns anything."""
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "it has not come"
        time.sleep(0.05)
    return found


class Nodes:
    """A head that runs nothing, and nodes of two CPUs that hold every unit they begin until `go` is there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.held, self.workers = folder, folder / "held", list[subprocess.Popen[bytes]]()
        self.all = list[subprocess.Popen[bytes]]()

    def begin(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        self._start(
            "head",
            f"--head --port={port} --num-cpus=0 --include-dashboard=false --temp-dir={self.folder}/ray",
        )

    def add(self) -> None:
        self.workers.append(self._start(f"node{len(self.workers)}", f"--address={self.address} --num-cpus=2"))

    def _start(self, name: str, options: str) -> "subprocess.Popen[bytes]":
        hold = {"operation": "score", "when": "before", "match": ".", "action": "hold", "folder": str(self.held)}
        environment = {
            **surroundings(),
            "HOME": str(self.folder),
            "PYTHONPATH": os.pathsep.join([str(FAULTS), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
            "BATCH_RERANK_FAULTS": json.dumps({"faults": [hold]}),
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "80",
        }
        common = "--num-gpus=0 --block --disable-usage-stats --object-store-memory=100000000"
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                ["/bin/bash", "-c", "--", f"ulimit -n 65536; {RAY} start {options} {common}"],  # as KubeRay does
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.all.append(process)
        until(lambda: process.poll() is not None or "Ray runtime started" in (self.folder / f"{name}.log").read_text())
        return process

    def of(self, pid: int) -> "subprocess.Popen[bytes]":
        """The `ray start` that a process is of."""
        found = {worker.pid: worker for worker in self.workers}
        while pid not in found:
            pid = parent(pid)
        return found[pid]

    def close(self) -> None:
        for process in self.all:
            end_session(process.pid)
            process.wait(10)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    folder = Path(tempfile.mkdtemp(prefix="br", dir="/tmp"))  # short, for Ray's sockets
    found = Nodes(folder)
    try:
        found.begin()
        yield found
    finally:
        found.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def two(nodes: Nodes) -> Nodes:
    """A cluster of two nodes on which nothing runs."""
    nodes.workers = [worker for worker in nodes.workers if worker.poll() is None]
    while len(nodes.workers) < 2:
        nodes.add()
    shutil.rmtree(nodes.held, ignore_errors=True)
    nodes.held.mkdir()
    return nodes


@pytest.fixture(scope="module")
def chaos(tmp_path_factory: pytest.TempPathFactory) -> Chaos:
    return Chaos.make(tmp_path_factory.mktemp("leaving"), 12)[0]


def start(chaos: Chaos, nodes: Nodes, name: str) -> tuple[Run, int]:
    """A job of one actor that holds a unit, and that actor's process."""
    sets = ["cluster.actors=1", "cluster.cpus_per_actor=1", "cluster.lease_seconds=5"]
    environment = {"RAY_ADDRESS": nodes.address, "HOME": str(nodes.folder)}
    run = chaos.start(name, local=False, sets=sets, environment=environment)
    (held,) = until(lambda: list(nodes.held.iterdir()))
    return run, int(held.name)


def diary(chaos: Chaos, name: str) -> dict[str, Any]:
    (file,) = (chaos.output(name) / "_manifest/attempts").glob("[!.]*.json")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def finish(chaos: Chaos, nodes: Nodes, run: Run, name: str) -> tuple[str, int]:
    """The log of the job, which ends as it would have undisturbed, and how often units were begun again."""
    (nodes.held / "go").touch()
    ended = run.wait()
    assert ended.code == 0, ended.log
    chaos.check_done(name)
    receipts = [json.loads(receipt) for receipt in chaos.committed(name).values()]
    assert sum(receipt["retries"] for receipt in receipts) == 0, "no unit is blamed"
    return ended.log, sum(receipt["moves"] for receipt in receipts)


def test_a_pod_that_ends_scores_its_unit_to_the_end_and_begins_none(chaos: Chaos, two: Nodes) -> None:
    run, actor = start(chaos, two, "ended")
    pod = two.of(actor)
    pod.send_signal(signal.SIGTERM)
    until(lambda: diary(chaos, "ended")["leaving"])
    until(lambda: " leaves in " in (run.folder / "log").read_text())  # the driver asks every few seconds
    assert finish(chaos, two, run, "ended")[1] == 0, "it was ended"
    pod.wait(SECONDS)
    begun = {path.name: path.read_text() for path in two.held.iterdir()}
    assert begun[str(actor)], begun


def test_a_unit_that_ends_too_late_is_dropped_and_scored_elsewhere(chaos: Chaos, two: Nodes) -> None:
    run, actor = start(chaos, two, "dropped")
    pod = two.of(actor)
    node = diary(chaos, "dropped")["node"]
    subprocess.run(
        [
            RAY,
            "drain-node",
            f"--address={two.address}",
            f"--node-id={node}",
            "--reason=DRAIN_NODE_REASON_PREEMPTION",
            "--reason-message=test",
            "--deadline-remaining-seconds=7",
        ],
        check=True,
        capture_output=True,
        env={**surroundings(), "HOME": str(two.folder)},
    )
    until(lambda: not Path(f"/proc/{actor}").exists())
    until(lambda: len(list(two.held.iterdir())) == 2)
    log, moves = finish(chaos, two, run, "dropped")
    assert moves == 1
    assert "1 units begun again after their node had left" in log
    end_session(pod.pid)  # its raylet has ended with 0, which `ray start --block` takes for nothing
    pod.wait(10)


def test_nodes_that_go_without_notice_are_no_deaths(chaos: Chaos, two: Nodes) -> None:
    run, actor = start(chaos, two, "gone")
    end_session(two.of(actor).pid)
    until(lambda: len(list(two.held.iterdir())) == 2)
    until(lambda: " has gone; there are " in (run.folder / "log").read_text())
    assert finish(chaos, two, run, "gone")[1] == 1


def test_an_actor_that_gets_sigterm_and_then_sigkill_three_times_is_not_a_poisoned_unit(
    chaos: Chaos, two: Nodes
) -> None:
    run, actor = start(chaos, two, "terminated")
    for life in range(3):
        os.kill(actor, signal.SIGTERM)
        until(lambda: diary(chaos, "terminated")["leaving"])
        os.kill(actor, signal.SIGKILL)
        until(lambda life=life: len(list(two.held.iterdir())) == life + 2)  # type: ignore[misc]
        actor = max((path.stat().st_mtime_ns, int(path.name)) for path in two.held.iterdir())[1]
    _, moves = finish(chaos, two, run, "terminated")
    assert moves == 3


def test_a_job_that_waits_for_a_node_that_never_comes_ends_with_what_it_waits_for(chaos: Chaos, two: Nodes) -> None:
    sets = ["cluster.actors=1", "cluster.cpus_per_actor=1", "cluster.max_seconds_without_progress=4"]
    environment = {"RAY_ADDRESS": two.address, "HOME": str(two.folder)}
    ended = chaos.run("stuck", local=False, sets=sets, environment=environment)
    assert ended.code == 9, ended.log
    assert "nothing has happened for 4 s (cluster.max_seconds_without_progress)" in ended.log
    assert "Score: 1 actors alive" in ended.log and "exit code 9" in ended.log
    status = json.loads((chaos.output("stuck") / "_manifest/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 9)
    (two.held / "go").touch()
    assert chaos.run("stuck", local=False, sets=sets[:2], environment=environment).code == 0
    chaos.check_done("stuck")
