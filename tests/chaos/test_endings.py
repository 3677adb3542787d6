"""However the processes of a job end, the job ends by itself, with its own code, message and status."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from chaos.harness import Chaos, Ended, Fault, Run, end_session


@pytest.fixture(scope="module")
def chaos(tmp_path_factory: pytest.TempPathFactory) -> Chaos:
    return Chaos.make(tmp_path_factory.mktemp("chaos"), 100)[0]


def status(chaos: Chaos, name: str) -> tuple[object, object]:
    found = json.loads((chaos.output(name) / "_manifest/status.json").read_text())
    return found["state"], found["exit_code"]


def test_a_second_signal_does_not_cut_the_end_short(chaos: Chaos) -> None:
    """The second one comes when the status is about to say that the job is interrupted."""
    faults: list[Fault] = [
        {"operation": "link", "when": "before", "match": "receipts/", "nth": 5, "action": "SIGTERM"},
        {"operation": "write_bytes", "when": "before", "match": "status.json$", "nth": 2, "action": "SIGTERM"},
    ]
    ended = chaos.run("twice", faults)
    assert ended.code == 130, ended.log
    assert ended.log.rstrip().endswith("exit code 130") and "Traceback" not in ended.log
    assert status(chaos, "twice") == ("interrupted", 130)


def of(running: Run, command: str) -> int:
    """A process of the run's session, by a part of its command line; 0 where there is none."""
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == running.process.pid and command in Path(f"/proc/{process}/cmdline").read_text():
                return int(process)
        except OSError:
            continue
    return 0


def on_ray(chaos: Chaos, name: str, ready: Callable[[Run], bool], strike: Callable[[Run], None]) -> Ended:
    """A run on Ray that is struck when it is ready."""
    running = chaos.start(name, local=False)
    try:
        deadline = time.monotonic() + 120
        while not ready(running):
            assert running.process.poll() is None and time.monotonic() < deadline, "too early or too late to strike"
            time.sleep(0.01)
        strike(running)
        ended = running.wait(120)
    finally:
        end_session(running.process.pid)
    assert "Traceback" not in ended.log, ended.log
    return ended


def at_work(chaos: Chaos, name: str) -> Callable[[Run], bool]:
    return lambda running: len(chaos.committed(name)) >= 5


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("command", "message"), [("raylet/raylet", "(raylet) has died"), ("gcs_server", "has not answered for 40 s")]
)
def test_a_job_whose_ray_dies_says_so(command: str, message: str, chaos: Chaos) -> None:
    name = f"dead-{len(command)}"  # `of` looks for the command among others that name the output
    ended = on_ray(chaos, name, at_work(chaos, name), lambda run: os.kill(of(run, command), signal.SIGKILL))
    assert ended.code == 1, ended.log
    assert message in ended.log
    assert ended.log.rstrip().endswith("exit code 1")
    assert status(chaos, name) == ("failed", 1)
    chaos.resume(name, in_process=True)
    chaos.check_done(name)


@pytest.mark.chaos
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_while_ray_starts(sent: signal.Signals, chaos: Chaos) -> None:
    name = f"starting-{sent.name}"
    ended = on_ray(chaos, name, lambda run: of(run, "gcs_server") > 0, lambda run: run.process.send_signal(sent))
    assert ended.code == 130, ended.log
    assert status(chaos, name) == ("interrupted", 130)


@pytest.mark.chaos
def test_interrupted_again_and_again_while_ray_ends(chaos: Chaos) -> None:
    def strike(running: Run) -> None:
        log, deadline = running.folder / "log", time.monotonic() + 60
        while "exit code 130" not in log.read_text() and time.monotonic() < deadline:
            running.process.send_signal(signal.SIGTERM)
            time.sleep(0.1)

    ended = on_ray(chaos, "again", at_work(chaos, "again"), strike)
    assert ended.code == 130, ended.log
    assert status(chaos, "again") == ("interrupted", 130)
