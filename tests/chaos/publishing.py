"""Processes that publish an output otherwise, killed at a step or stopped there while another publishes, and what must
hold of the output after either."""

import json
import os
import shutil
import signal
import time
from collections import Counter
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batch_rerank.config import load_config
from batch_rerank.errors import ConflictError
from batch_rerank.job.republish import republish
from batch_rerank.publish.output import Place
from batch_rerank.publish.verify import verify
from chaos.harness import Chaos, Ended, Run, Step, Violation, end_session

OTHERWISE = ["output.top_k=3", "cluster.lease_seconds=1"]
NEXT = ["output.top_k=5", "output.file_bytes=9000", "cluster.lease_seconds=1"]
"""What another publisher wants meanwhile."""


def publishing_steps(chaos: Chaos) -> Counter[Step]:
    """The steps of a publisher that withdraws what is published and publishes otherwise."""
    shutil.copytree(chaos.output("undisturbed"), chaos.output("publishing"))
    ended = chaos.run("publishing", verb="publish", sets=OTHERWISE)
    if ended.code != 0:
        raise Violation(f"publishing: {ended.code}:\n{ended.log}")
    check_published(chaos, "publishing", 3)
    shutil.rmtree(chaos.output("publishing"))
    return ended.steps()


def kill_a_publisher(chaos: Chaos, name: str, step: Step, nth: int) -> str:
    """Kill it at a step; another one goes on. Raises Violation."""
    output = chaos.output(name)
    shutil.copytree(chaos.output("undisturbed"), output)
    ended = _struck(chaos, name, step, nth, "SIGKILL").wait()
    if ended.code != -9:
        raise Violation(f"{name}: ended with {ended.code}, expected -9:\n{ended.log[-2000:]}")
    _check_mark(output)
    again = chaos.run(name, verb="publish", sets=OTHERWISE)
    if again.code != 0:
        raise Violation(f"{name}: the next publisher ended with {again.code}:\n{again.log[-2000:]}")
    check_published(chaos, name, 3)
    shutil.rmtree(output)
    return "the next one has published"


def stop_a_publisher(chaos: Chaos, name: str, step: Step, nth: int) -> str:
    """Stop it at a step until another one has published otherwise. Raises Violation."""
    output = chaos.output(name)
    shutil.copytree(chaos.output("undisturbed"), output)
    first = _struck(chaos, name, step, nth, "SIGSTOP")
    try:
        _await_stop(first.process.pid, first.folder / "log")
        _check_mark(output)
        let = False
        with suppress(ConflictError):
            config = load_config(chaos.folder / "job.yaml", [f"output.path={output}", *NEXT])
            republish(Place(str(output), {}, config), local=True)
            let = True
        os.kill(first.process.pid, signal.SIGCONT)
        ended = first.wait(60)
    finally:
        end_session(first.process.pid)
    _check_ending(name, ended, let)
    check_published(chaos, name, 5 if let else 3)
    shutil.rmtree(output)
    return f"the other was {'let' if let else 'refused'}; awake it ended with {ended.code}"


def _check_ending(name: str, ended: Ended, let: bool) -> None:
    # it may be through already, but for the end of its lease
    allowed = (4, 0) if let else (0,)
    if ended.code not in allowed or "Traceback" in ended.log:
        raise Violation(f"{name}: woken it ended with {ended.code}, expected {allowed}:\n{ended.log[-2000:]}")


def _struck(chaos: Chaos, name: str, step: Step, nth: int, action: str) -> Run:
    operation, when, match = step
    fault = {"operation": operation, "when": when, "match": match, "nth": nth, "action": action}
    return chaos.start(name, [fault], verb="publish", sets=OTHERWISE)


def _await_stop(pid: int, log: Path) -> None:
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        if time.monotonic() > deadline:
            raise Violation(f"it was not stopped:\n{log.read_text()[-2000:]}")
        time.sleep(0.02)


def _check_mark(output: Path) -> None:
    """Where there is a `_SUCCESS`, every part that it names is there as it says."""
    with suppress(FileNotFoundError):
        mark = json.loads((output / "_SUCCESS").read_text())
        for part in mark["parts"]:
            if sha256((output / part["name"]).read_bytes()).hexdigest() != part["sha256"]:
                raise Violation(f"{output.name}: {part['name']} is not what _SUCCESS says")


def check_published(chaos: Chaos, name: str, top_k: int) -> None:
    """The rows of the undisturbed output up to a rank, in whole parts that `_SUCCESS` names, and all scores kept.
    Raises Violation."""
    output = chaos.output(name)
    _check_mark(output)
    found = _rows(output)
    expected = _rows(chaos.output("undisturbed"))
    expected = expected.filter(pc.less_equal(expected["rank"], top_k))
    if not found.equals(expected):
        raise Violation(f"{name}: {len(found)} rows, expected the {len(expected)} of ranks up to {top_k}")
    named = {part["name"] for part in json.loads((output / "_SUCCESS").read_text())["parts"]}
    if named != {path.name for path in output.glob("[!.]*.parquet")}:
        raise Violation(f"{name}: parts that _SUCCESS does not name")
    if problems := verify(str(output)).problems:
        raise Violation(f"{name}: verify: {problems[:3]}")
    if len(held := chaos.committed(name)) < chaos.units:
        raise Violation(f"{name}: {len(held)} units are done")


def _rows(output: Path) -> pa.Table:
    parts = sorted(output.glob("[!.]*.parquet"))
    return pa.concat_tables([pq.read_table(part) for part in parts]).replace_schema_metadata(None).combine_chunks()
