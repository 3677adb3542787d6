"""Disturbed anywhere, a job ends with the rows, ranks and scores of an undisturbed one, bit for bit.

`campaign.py` does the same for longer and at random. Here every step of the protocol is taken from the journal of an
undisturbed run, so a step that is added to the protocol is killed at as well.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from chaos.harness import REPOSITORY, Chaos, Fault, Step, Violation, end_session

UNITS = 12

# Steps that leave different files behind; `campaign.py` has them all
DISTINCT = {
    *[("load", "before"), ("score", "after")],
    *[(operation, "before") for operation in ("link", "rename", "unlink")],
    *[(operation, "after") for operation in ("create_exclusive", "write_bytes", "remove")],
}


@pytest.fixture(scope="module")
def chaos(tmp_path_factory: pytest.TempPathFactory) -> Chaos:
    return Chaos.make(tmp_path_factory.mktemp("chaos"), UNITS)[0]


def survive_each(
    chaos: Chaos, steps: Mapping[Step, int], prefix: str, *, damaged: bool = False, last: bool = False
) -> list[str]:
    """Kill at each step, somewhere in the job or at its last occurrence, two jobs at a time, and resume; what went
    wrong."""
    drawn = random.Random(1)
    nths = {step: count if last else drawn.randint(1, count) for step, count in steps.items()}
    cases = [(f"{prefix}-{number}", step, nth) for number, (step, nth) in enumerate(nths.items())]

    def strike(case: tuple[str, Step, int]) -> str | None:
        name, step, nth = case
        try:
            chaos.strike(name, step, nth, damaged=damaged)
        except Violation as violation:
            return f"{step} {nth}: {violation}"
        return None

    with ThreadPoolExecutor(2) as pool:
        problems = [problem for problem in pool.map(strike, cases) if problem]
    for name, step, nth in cases:
        try:
            chaos.resume(name, in_process=True)
            chaos.check_done(name)
        except Exception as error:
            problems.append(f"{step} {nth}: {type(error).__name__}: {error}")
    return problems


@pytest.mark.slow
def test_killed_at_each_step(chaos: Chaos) -> None:
    steps = {step: count for step, count in chaos.run("steps").steps().items() if step[:2] in DISTINCT}
    assert len(steps) >= 15
    assert survive_each(chaos, steps, "killed") == []


def mending(chaos: Chaos) -> tuple[dict[Step, int], dict[Step, int]]:
    """Removals from a damaged output, and of them those between the two files of a part."""
    aside = r"\.[^/]*$"  # where a removal moves a file to
    steps = {
        step: count
        for step, count in chaos.steps_of_a_resume().items()
        if step[0] in ("remove", "unlink") or (step[0] == "rename" and step[2].endswith(aside))
    }
    between = {
        (operation, when, match): count
        for (operation, when, match), count in steps.items()
        if (when == "before" and match.startswith("^part")) or (when == "after" and "/parts/" in match)
    }
    assert len(steps) > len(between) >= 2
    return {step: count for step, count in steps.items() if step not in between}, between


@pytest.mark.slow
def test_killed_at_each_step_that_mends_a_damaged_output(chaos: Chaos) -> None:
    assert survive_each(chaos, mending(chaos)[0], "mending", damaged=True) == []


def test_killed_between_the_two_removals_of_a_damaged_part(chaos: Chaos) -> None:
    assert survive_each(chaos, mending(chaos)[1], "between", damaged=True, last=True) == []


@pytest.mark.parametrize("sent", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_interrupted_at_a_step(sent: str, chaos: Chaos) -> None:
    for number, match in enumerate(["^_work/", "receipts/", "^part", "/parts/", "_manifest/scores/"]):
        name = f"{sent}-{number}"
        ended = chaos.strike(name, ("rename" if "scores" in match else "link", "before", match), 5, sent)
        assert ended.log.rstrip().endswith("exit code 130")
        assert status(chaos, name)["state"] == "interrupted"
        chaos.resume(name, in_process=True)
        chaos.check_done(name)


def status(chaos: Chaos, name: str) -> dict[str, object]:
    found: dict[str, object] = json.loads((chaos.output(name) / "_manifest/status.json").read_text())
    return found


def fault(operation: str, match: str, action: str, **more: object) -> Fault:
    return {"operation": operation, "when": "before", "match": match, "action": action, **more}


FULL = [
    ("create_exclusive", "^_work/", 5),
    ("create_exclusive", "receipts/", 5),
    ("link", "^part", 5),
    ("create_exclusive", "^_SUCCESS$", 1),
]
FULL_TOO = [
    ("link", "^_work/", 5),
    ("create_exclusive", "/parts/", 5),
    ("create_exclusive", "publication.json$", 1),
    ("create_exclusive", "^_scores/", 2),
    ("create", r"receipts/\.", 5),
    ("create_exclusive", "plan.json$", 1),
    ("create", "", 12),
]


@pytest.mark.parametrize(
    ("operation", "match", "nth"), [*FULL, *(pytest.param(*one, marks=pytest.mark.slow) for one in FULL_TOO)]
)
def test_a_full_disk(operation: str, match: str, nth: int, chaos: Chaos, tmp_path: Path) -> None:
    name = f"full-{tmp_path.name}"
    ended = chaos.run(name, [fault(operation, match, "ENOSPC", nth=nth)])
    assert ended.code == 6, ended.log
    assert "No space left on device" in ended.log
    assert ended.log.rstrip().endswith("exit code 6")
    assert "Traceback" not in ended.log
    chaos.check_interrupted(name)
    if match and match != "plan.json$":  # else there is no room for the status, or there is no output yet
        assert (status(chaos, name)["state"], status(chaos, name)["exit_code"]) == ("failed", 6)
    chaos.resume(name, in_process=True)
    assert chaos.check_done(name) == 0


@pytest.fixture
def small_disk(chaos: Chaos) -> Iterator[Path]:
    """An output on a disk of its own with 48 KiB: about a third of the job."""
    disk = chaos.output("small-disk")
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a disk needs root")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_disk_that_is_really_full(small_disk: Path, chaos: Chaos) -> None:
    ended = chaos.run(small_disk.name)
    assert ended.code == 6, ended.log
    assert "No space left on device" in ended.log
    assert "Traceback" not in ended.log
    chaos.check_interrupted(small_disk.name)
    assert 0 < len(chaos.committed(small_disk.name)) < UNITS
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    chaos.resume(small_disk.name, in_process=True)
    chaos.check_done(small_disk.name)


@pytest.mark.slow
@pytest.mark.parametrize("days", [-400, 400])
def test_a_clock_that_jumps(days: int, chaos: Chaos) -> None:
    """Forward or back in the middle of a run that is killed later, and back to the true time in the next."""
    name = f"clock{days}"
    faults = [
        fault("score", "", "clock", nth=3, days=days, once=str(chaos.folder / f"{name}.struck")),
        fault("link", "receipts/", "SIGKILL", nth=8),
    ]
    assert chaos.run(name, faults).code == -9
    assert len(chaos.committed(name)) == 7
    chaos.check_interrupted(name)
    assert chaos.resume(name) == UNITS - 7
    chaos.check_done(name)
    whole = chaos.run(f"{name}-whole", faults[:1])
    assert whole.code == 0, whole.log
    chaos.check_done(f"{name}-whole")


def test_a_stopped_process_that_wakes_after_another_has_finished_changes_nothing(chaos: Chaos) -> None:
    sets = ["cluster.lease_seconds=1"]
    stopped = chaos.start("stopped", [fault("link", "receipts/", "SIGSTOP", nth=5)], sets=sets)
    try:
        deadline = time.monotonic() + 240
        while process_state(stopped.process.pid) != "T":
            assert time.monotonic() < deadline
            time.sleep(0.02)
        chaos.resume("stopped", sets=sets)
        before = chaos.committed("stopped")
        os.kill(stopped.process.pid, signal.SIGCONT)
        ended = stopped.wait(240)
    finally:
        end_session(stopped.process.pid)
    assert ended.code == 4 and "another job has taken this output over" in ended.log
    assert chaos.committed("stopped") == before
    assert chaos.check_done("stopped") == 0


def process_state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.slow
def test_ray_workers_killed_while_loading_while_scoring_and_between_part_and_receipt(chaos: Chaos) -> None:
    """An actor that loads, an actor that scores and a task that commits, in one job, which ends by itself."""
    steps = {"load": "", "score": "", "link": "receipts/"}
    faults = [
        fault(operation, match, "SIGKILL", once=str(chaos.folder / f"{operation}.struck"))
        for operation, match in steps.items()
    ]
    running = chaos.start("workers", faults, local=False)
    try:
        ended = running.wait(120)
    finally:
        end_session(running.process.pid)
    assert ended.code == 0, ended.log
    assert [operation for operation in steps if (chaos.folder / f"{operation}.struck").exists()] == list(steps)
    chaos.check_done("workers")
    # the scoring that was killed, and no more than the units that waited in the same actor
    assert ended.scored().total() - UNITS <= 4


@pytest.mark.slow
def test_a_model_that_always_kills_its_actor_ends_the_job(chaos: Chaos) -> None:
    kill: Fault = {"operation": "load", "when": "before", "match": "", "nth": 1, "action": "SIGKILL"}
    ended = chaos.run("loading", [kill], local=False)
    assert ended.code == 5, ended.log
    assert "model 'none': the process died 3 times while loading it" in ended.log
    assert chaos.resume("loading", in_process=True) == chaos.units
    chaos.check_done("loading")


def lose_node(chaos: Chaos, name: str, which: str) -> dict[str, object]:
    """Run on a cluster of three nodes of which one is lost."""
    script = Path(__file__).parent / "lost_node.py"
    process = subprocess.Popen(
        [sys.executable, str(script), str(chaos.folder / "job.yaml"), str(chaos.output(name)), which],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])},
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=200)
    finally:
        end_session(process.pid)
    lines = [line for line in output.splitlines() if line.startswith('{"units"')]
    assert process.returncode == 0 and lines, output[-3000:]
    report: dict[str, object] = json.loads(lines[-1])
    return report


@pytest.fixture(scope="module")
def longer(tmp_path_factory: pytest.TempPathFactory) -> Chaos:
    """Long enough to lose a node in the middle."""
    return Chaos.make(tmp_path_factory.mktemp("longer"), 100)[0]


@pytest.fixture(scope="module")
def lost_worker(longer: Chaos) -> dict[str, object]:
    return lose_node(longer, "node", "worker")


@pytest.mark.chaos
def test_a_lost_node_leaves_nothing_that_a_rerun_does_not_finish(longer: Chaos, lost_worker: dict[str, object]) -> None:
    assert (lost_worker["units"] < longer.units, lost_worker["nodes_left"]) == (True, 2)
    longer.check_interrupted("node")
    left = longer.resume("node", in_process=True)
    assert left <= 8, "more than two actors hold"
    longer.check_done("node")


@pytest.mark.chaos
def test_a_job_that_loses_a_node_ends_by_itself(lost_worker: dict[str, object]) -> None:
    assert lost_worker["ended"] == "done"


@pytest.mark.chaos
def test_the_heads_death_ends_the_driver_and_a_rerun_finishes(longer: Chaos) -> None:
    report = lose_node(longer, "head", "head")
    assert report["ended"] != 0
    longer.check_interrupted("head")
    assert 0 < longer.resume("head", in_process=True) <= longer.units - int(str(report["units"]))
    longer.check_done("head")
