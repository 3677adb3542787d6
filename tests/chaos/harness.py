"""Running a job's command line under faults, and what must hold of its output after any of them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from conftest import candidate_rows, job, write

from batch_rerank.config import load_config
from batch_rerank.job.run import run
from batch_rerank.publish.verify import verify
from batch_rerank.store.filesystem import locate
from batch_rerank.store.manifest import Manifest
from batch_rerank.store.receipts import unroll
from batch_rerank.store.scan import scan

FAULTS = Path(__file__).parent / "faults"
REPOSITORY = Path(__file__).parents[2]
Fault = dict[str, Any]
Step = tuple[str, str, str]


class Violation(AssertionError):
    """Something that no disturbance may lead to."""


def surroundings() -> dict[str, str]:
    """This process's environment as it was begun with: a Ray that has run in it leaves its way of authentication."""
    return {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "RAY_AUTH_MODE")}


@dataclass(frozen=True)
class Ended:
    """A run that has ended, by itself or not. `journal`: its steps as (process, operation, when, target)."""

    code: int
    log: str
    journal: list[tuple[int, str, str, str]]
    seconds: float

    def scored(self) -> Counter[str]:
        """How often each unit was scored."""
        return Counter(t for _, operation, when, t in self.journal if (operation, when) == ("score", "before"))

    def steps(self) -> Counter[Step]:
        """How often each step of the protocol came: (operation, when, expression that matches all its targets)."""
        return Counter((operation, when, kind(target)) for _, operation, when, target in self.journal)


@dataclass(frozen=True)
class Run:
    """A run in progress, in a session of its own so that whatever outlives it can be found."""

    process: "subprocess.Popen[bytes]"
    folder: Path
    started: float

    def wait(self, seconds: float = 480) -> Ended:
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            end_session(self.process.pid)
            raise Violation(f"the job hangs:\n{(self.folder / 'log').read_text()[-2000:]}") from None
        journal = self.folder / "journal"
        lines = journal.read_text().splitlines() if journal.exists() else []
        return Ended(
            code=code,
            log=(self.folder / "log").read_text(),
            journal=[(int(pid), *rest) for pid, *rest in (line.split(" ", 3) for line in lines)],  # type: ignore[misc]
            seconds=time.monotonic() - self.started,
        )


@dataclass(frozen=True)
class Chaos:
    """A job of `units` units with a query of ten candidates each, and the parts that an undisturbed run of it makes:
    one for each unit, in their order."""

    folder: Path
    units: int
    expected: dict[str, bytes]

    @staticmethod
    def make(folder: Path, units: int, shards: int = 4) -> tuple["Chaos", Ended]:
        """With the undisturbed run."""
        per_shard = units // shards
        for shard in range(shards):
            write(folder / "in" / f"{shard}.parquet", candidate_rows(per_shard, 10, first=per_shard * shard))
        raw = job(folder / "in", folder / "undisturbed", input__unit_pairs=10, output__file_bytes=1).model_dump()
        del raw["limit"]
        (folder / "job.yaml").write_text(yaml.safe_dump(raw))
        ended = Chaos(folder, units, {}).run("undisturbed")
        made = Chaos(folder, per_shard * shards, parts(folder / "undisturbed"))
        if ended.code != 0 or len(made.expected) != made.units:
            raise Violation(f"undisturbed: {ended.code}, {len(made.expected)} parts:\n{ended.log}")
        return made, ended

    def output(self, name: str) -> Path:
        return self.folder / name

    def start(
        self,
        name: str,
        faults: Sequence[Fault] = (),
        *,
        local: bool = True,
        sets: Sequence[str] = (),
        environment: dict[str, str] | None = None,
        verb: str = "run",
    ) -> Run:
        """Run the job into output `name` with faults, or publish it."""
        folder = Path(tempfile.mkdtemp(prefix="run-", dir=self.folder))
        spec = {"root": str(self.output(name)), "journal": str(folder / "journal"), "faults": list(faults)}
        command = [sys.executable, "-m", "batch_rerank.cli", verb, str(self.folder / "job.yaml")]
        command += ["--set", f"output.path={self.output(name)}", *(["--local"] if local else [])]
        command += [argument for setting in sets for argument in ("--set", setting)]
        paths = [str(FAULTS), str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                command,
                env={
                    **surroundings(),
                    "PYTHONPATH": os.pathsep.join(paths),
                    "BATCH_RERANK_FAULTS": json.dumps(spec),
                    **(environment or {}),
                },
                stdout=log,
                stderr=log,
                start_new_session=True,
                # what a shell starts in the background ignores Ctrl-C, and so would what is started from there
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        return Run(process, folder, time.monotonic())

    def run(self, name: str, faults: Sequence[Fault] = (), **options: Any) -> Ended:
        """Run the job into output `name` with faults, to its end."""
        return self.start(name, faults, **options).wait()

    def committed(self, name: str) -> dict[str, bytes]:
        """The units that count as done, with their receipts, which name who scored them and when."""
        manifest = Manifest(locate(str(self.output(name))))
        plan = manifest.read_plan()
        if plan is None:
            return {}
        found = scan(manifest, plan)
        bodies = {unit: body for name in found.rolled for unit, body in unroll(manifest.read(name)).items()}
        bodies |= found.loose
        return {receipt.unit: json.dumps(json.loads(bodies[receipt.unit])).encode() for receipt in found.committed}

    def check_interrupted(self, name: str, damaged: Iterable[str] = ()) -> None:
        """What a reader may see at any time: nothing before all units are done, then whole parts, and a `_SUCCESS` only
        over all of them."""
        damaged = set(damaged)
        seen = {part: data for part, data in parts(self.output(name)).items() if part not in damaged}
        if seen and not damaged and len(done := self.committed(name)) < self.units:
            raise Violation(f"{name}: parts are there and {len(done)} of {self.units} units are done")
        for part, data in seen.items():
            if self.expected.get(part) != data:
                raise Violation(f"{name}: {part} is not what an undisturbed run writes")
        if (self.output(name) / "_SUCCESS").exists() and len(seen) < self.units - len(damaged):
            raise Violation(f"{name}: _SUCCESS over {len(seen)} of {self.units} parts")

    def resume(self, name: str, *, in_process: bool = False, **options: Any) -> int:
        """Run the job to its end without faults: nothing committed is scored or written again. The units scored."""
        before = self.committed(name)
        if in_process:
            summary = run(load_config(self.folder / "job.yaml", [f"output.path={self.output(name)}"]), local=True)
            scored, again = summary.units, len(before) - summary.resumed_units
        else:
            ended = self.run(name, **options)
            if ended.code != 0:
                raise Violation(f"{name}: the rerun ended with {ended.code}:\n{ended.log[-2000:]}")
            scored, again = len(ended.scored()), len(set(ended.scored()) & set(before))
        after = self.committed(name)
        if changed := [unit for unit, version in before.items() if after.get(unit) != version]:
            raise Violation(f"{name}: {len(changed)} committed units were written again, e.g. {changed[0]}")
        if again:
            raise Violation(f"{name}: {again} committed units were scored again")
        return scored

    def check_done(self, name: str, *, command_line: bool = False) -> int:
        """Bitwise the undisturbed output, verified, and nothing else that a reader could take for output.

        The number of hidden leftovers.
        """
        output = self.output(name)
        if parts(output) != self.expected:
            raise Violation(f"{name}: other parts than an undisturbed run's")
        files = [path.relative_to(output) for path in output.rglob("*") if path.is_file()]
        hidden = [path for path in files if path.name.startswith(".")]
        fixed = {"_SUCCESS", *(f"_manifest/{name}.json" for name in ("plan", "status", "publication"))}
        receipts = {f"_manifest/parts/{part[5:-8]}.json" for part in self.expected}
        visible = {str(path) for path in files if path not in hidden}
        if missing := (fixed | receipts) - visible:
            raise Violation(f"{name}: missing {sorted(missing)[:3]}")
        scores = {path for path in visible if path.startswith("_scores/")}
        stray = [path for path in visible - set(self.expected) - fixed - scores if not path.startswith("_manifest/")]
        stray += [path for path in visible - receipts if path.startswith("_manifest/parts/")]
        stray += [path for path in scores if not (output / _receipt_of(path)).exists()]
        if len(held := self.committed(name)) < self.units or len(_gathered(output)) != self.units:
            raise Violation(f"{name}: {len(held)} units are done, the scores of {len(_gathered(output))} are kept")
        if stray:
            raise Violation(f"{name}: stray files {sorted(stray)[:3]}")
        state = json.loads((output / "_manifest/status.json").read_text())["state"]
        if state != "done":
            raise Violation(f"{name}: the status says {state}")
        if command_line:
            command = [sys.executable, "-m", "batch_rerank", "verify", str(output)]
            result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
            problems = result.stderr.splitlines()[:3] if result.returncode else []
        else:
            problems = verify(str(output)).problems
        if problems:
            raise Violation(f"{name}: verify: {problems}")
        return len(hidden)

    def damage(self, name: str) -> list[str]:
        """A finished output in which a unit's receipt is lost, a part is lost and a part is cut short; the names of
        their parts."""
        output = self.output(name)
        shutil.copytree(self.output("undisturbed"), output)
        first, second, third = sorted(self.expected)[: 3 * 2 : 2]
        sorted((output / "_manifest/receipts").iterdir())[0].unlink()
        (output / second).unlink()
        (output / third).write_bytes(self.expected[third][:-20])
        return [first, second, third]

    def steps_of_a_resume(self) -> Counter[Step]:
        """The steps of a run that finds a damaged output."""
        shutil.rmtree(self.output("damaged"), ignore_errors=True)
        self.damage("damaged")
        ended = self.run("damaged")
        if ended.code != 0:
            raise Violation(f"damaged: {ended.code}:\n{ended.log}")
        self.check_done("damaged")
        return ended.steps()

    def strike(self, name: str, step: Step, nth: int, action: str = "SIGKILL", *, damaged: bool = False) -> Ended:
        """Run into output `name` until a signal at a step. A process that such a signal ends has that exit code."""
        torn = self.damage(name) if damaged else []
        operation, when, match = step
        ended = self.run(name, [{"operation": operation, "when": when, "match": match, "nth": nth, "action": action}])
        allowed = {"SIGKILL": [-9], "SIGTERM": [130], "SIGINT": [130]}[action]
        if ended.code not in allowed:
            raise Violation(f"{name}: ended with {ended.code}, expected {allowed}:\n{ended.log[-2000:]}")
        self.check_interrupted(name, torn)
        if len(lost := set(ended.scored()) - set(self.committed(name))) > 1:
            raise Violation(f"{name}: {len(lost)} units were in flight, a local job has one")
        return ended


def _receipt_of(scores: str) -> str:
    return f"_manifest/scores/{scores.removeprefix('_scores/').split('.')[0]}.json"


def _gathered(output: Path) -> set[str]:
    receipts = (output / "_manifest/scores").glob("[!.]*.json")
    return {unit for receipt in receipts for unit, _ in json.loads(receipt.read_text())["units"]}


def parts(output: Path) -> dict[str, bytes]:
    """What a plain reader takes for output."""
    return {path.name: path.read_bytes() for path in output.glob("[!.]*.parquet")}


def kind(target: str) -> str:
    """An expression that matches the targets which play the same part in the protocol."""
    folder, slash, name = target.rpartition("/")
    if name.startswith("."):
        return rf"^{folder}{slash}\.[^/]*$"
    if folder not in ("", "_manifest"):
        return rf"^{folder}/[^./][^/]*$"
    return "^" + re.sub(r"\d+", lambda _: r"\d+", re.escape(target)) + "$"


def end_session(session: int) -> int:
    """End what is left of a session, by process ids; how many there were."""
    found = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _session(pid) == session]
    for pid in found:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return len(found)


def _session(pid: int) -> int | None:
    try:
        state, _, _, found = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:4]
    except OSError:
        return None
    return None if state == "Z" else int(found)
