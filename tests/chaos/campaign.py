"""Kills jobs at every step of their protocol and at random times, runs them to their end, and holds the output against
that of an undisturbed run. A line a kill, then one JSON object; exit 1 where anything is not as it has to be.

python tests/chaos/campaign.py --seed 1 --kills 50 [--minutes 20] [--short]

The kills are: each step of an undisturbed run and of one that mends a damaged output, once while there is time (the
last line counts the others), at an occurrence drawn from
the seed; `batch-rerank publish` with other settings killed, and stopped while another publishes, at each of its steps;
then `RAY_KILLS` of drivers, actors and tasks on Ray; then at least `RANDOM_KILLS`, and up to `--kills`, of
local runs at random times, one output several times in a row. `--short` has fewer units and leaves out Ray.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # conftest

from chaos.harness import Chaos, Ended, Fault, Step, Violation, end_session
from chaos.publishing import kill_a_publisher, publishing_steps, stop_a_publisher

SIGNALS = [signal.SIGKILL] * 3 + [signal.SIGTERM, signal.SIGINT]
RAY_KILLS = 10
RANDOM_KILLS = 10


@dataclass
class Campaign:
    """What was done and found so far."""

    chaos: Chaos
    drawn: random.Random
    deadline: float
    kills: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    sessions: list[int] = field(default_factory=list)
    survivors: int = 0
    outputs: int = 0
    hidden: int = 0
    not_begun: int = 0
    in_flight: dict[str, int] = field(default_factory=lambda: {"local": 0, "ray": 0})

    def over(self) -> bool:
        return time.monotonic() > self.deadline

    def say(self, mode: str, what: str, result: str) -> None:
        print(f"{self.kills.total():3} {mode:5} {what}: {result}", flush=True)

    def lost(self, mode: str, name: str, ended: Ended) -> int:
        """Units that this run scored and did not commit: the work that is done again."""
        lost = len(set(ended.scored()) - set(self.chaos.committed(name)))
        self.in_flight[mode] = max(self.in_flight[mode], lost)
        return lost

    def finish(self, mode: str, name: str, what: str, result: str) -> None:
        """Run to the end and check everything."""
        try:
            scored = self.chaos.resume(name, local=mode == "local")
            self.close(name)
            self.say(mode, what, f"{result}, {scored} left to score: the same output")
        except Violation as violation:
            self.violate(mode, what, violation)

    def close(self, name: str) -> None:
        self.hidden += self.chaos.check_done(name, command_line=True)
        self.outputs += 1
        shutil.rmtree(self.chaos.output(name))

    def violate(self, mode: str, what: str, violation: Violation) -> None:
        lines = str(violation).splitlines()
        self.violations.append(" | ".join([f"{mode} {what}: {lines[0]}", *lines[1:][-3:]]))
        self.say(mode, what, f"VIOLATION {violation}")

    def steps(self, steps: Counter[Step], label: str, damaged: bool) -> None:
        """One kill at each step, each in an output of its own."""
        for number, (step, count) in enumerate(steps.items()):
            if self.over():
                self.not_begun += 1
                continue
            nth, name = self.drawn.randint(1, count), f"{label}-{number}"
            operation, when, match = step
            what = f"SIGKILL {when} {operation} {match}, {nth} of {count}, {label}"
            try:
                ended = self.chaos.strike(name, step, nth, damaged=damaged)
            except Violation as violation:
                self.violate("local", what, violation)
                continue
            self.kills["SIGKILL local step"] += 1
            self.finish("local", name, what, f"{self.lost('local', name, ended)} in flight")

    def publishers(self) -> None:
        """Each step of a publisher with other settings: killed there, and stopped there while another one publishes."""
        for number, (step, count) in enumerate(publishing_steps(self.chaos).items()):
            for name, strike in (("SIGKILL", kill_a_publisher), ("SIGSTOP", stop_a_publisher)):
                if self.over():
                    self.not_begun += 1
                    continue
                nth = self.drawn.randint(1, count)
                what = f"{name} {step[1]} {step[0]} {step[2]}, {nth} of {count}, publish"
                try:
                    result = strike(self.chaos, f"publish-{name}-{number}", step, nth)
                    self.kills[f"{name} publish step"] += 1
                    self.outputs += 1
                    self.say("local", what, result)
                except Violation as violation:
                    self.violate("local", what, violation)

    def random_times(self, kills: int) -> None:
        """Local runs of one output killed at random times until it is done, then of the next one."""
        goal, output = self.kills.total() + kills, 0
        while self.kills.total() < goal and not self.over():
            output += 1
            name = f"random-{output}"
            for _ in range(self.drawn.randint(1, 5)):
                if self.kills.total() < goal and not (self.chaos.output(name) / "_SUCCESS").exists():
                    self.kill_driver(name, "local")
            self.finish("local", name, f"output {name}", "run to its end")

    def kill_driver(self, name: str, mode: str, share: float = 1.0) -> None:
        """Start a run and send its driver a signal: while it starts, or at a drawn number of units up to this share."""
        sent, output = self.drawn.choice(SIGNALS), self.chaos.output(name)
        before = len(self.chaos.committed(name))
        most = max(before, int(share * self.chaos.units))
        units = self.drawn.choice([None, *[self.drawn.randint(before, most) for _ in range(4)]])
        pause = self.drawn.uniform(0, 0.7 if units is None else 0.02)
        what = f"{sent.name} {pause:.3f} s after " + ("the start" if units is None else f"{units} units")
        running = self.chaos.start(name, local=mode == "local")
        while units is not None and running.process.poll() is None and _receipts(output) < units:
            time.sleep(0.005)
        time.sleep(pause)
        if running.process.poll() is None:
            os.kill(running.process.pid, sent)
        try:
            ended = running.wait()
            if ended.code == 0:
                self.say(mode, what, "too late, it was done")
                return
            # before the command line is up, and after it is through, Python itself answers the signal
            by_python = units is None or not ended.journal or (output / "_SUCCESS").exists()
            if ended.code not in ([-9] if sent == signal.SIGKILL else [130, -sent, 1] if by_python else [130]):
                raise Violation(f"ended with {ended.code}:\n{ended.log[-2000:]}")
            self.kills[f"{sent.name} {mode} driver"] += 1
            self.chaos.check_interrupted(name)
            committed, lost = len(self.chaos.committed(name)), self.lost(mode, name, ended)
            if mode == "local" and lost > 1:
                raise Violation(f"{lost} units were in flight, a local job has one")
            self.say(mode, what, f"{committed} of {self.chaos.units} units committed, {lost} in flight")
        except Violation as violation:
            self.violate(mode, what, violation)
        if mode == "ray":
            self.sessions.append(running.process.pid)  # Ray's processes are let live on beside the next run

    def workers(self, name: str, wanted: list[tuple[str, str, str]]) -> None:
        """One run on Ray in which processes are killed at steps, each once: it has to end by itself."""
        faults: list[Fault] = [
            {
                "operation": operation,
                "when": when,
                "match": match,
                "nth": 1 if operation == "load" else self.drawn.randint(1, 3),
                "once": str(self.chaos.folder / f"{name}-{number}.struck"),
                "action": "SIGKILL",
            }
            for number, (operation, when, match) in enumerate(wanted)
        ]
        what = "SIGKILL " + ", ".join(f"{when} {operation} {match}" for operation, when, match in wanted)
        running = self.chaos.start(name, faults, local=False)
        try:
            ended = running.wait()
            struck = sum(Path(fault["once"]).exists() for fault in faults)
            self.kills["SIGKILL ray worker"] += struck
            if ended.code != 0 or struck < len(faults):
                raise Violation(f"ended with {ended.code}, {struck} of {len(faults)} struck:\n{ended.log[-2000:]}")
            again = ended.scored().total() - self.chaos.units
            self.in_flight["ray"] = max(self.in_flight["ray"], again)
            self.close(name)
            self.say("ray", what, f"{again} units scored again: the same output")
        except Violation as violation:
            self.violate("ray", what, violation)
        finally:
            end_session(running.process.pid)

    def on_ray(self, drivers: int) -> None:
        """Workers killed at steps, then one output whose drivers are killed at random times."""
        self.workers("ray-1", [("load", "before", ""), ("score", "before", ""), ("link", "before", "receipts/")])
        self.workers("ray-2", [("score", "after", ""), ("link", "before", "^_work/"), ("encode", "before", "")])
        for number in range(drivers):
            if not self.over() and not (self.chaos.output("ray-3") / "_SUCCESS").exists():
                self.kill_driver("ray-3", "ray", (number + 1) / (drivers + 1))
        self.finish("ray", "ray-3", "output ray-3", "run to its end")
        left = {session: end_session(session) for session in self.sessions}
        self.survivors = sum(left.values())


def _receipts(output: Path) -> int:
    return sum(1 for _ in (output / "_manifest/receipts").glob("[!.]*.json"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=50, help="at least so many; every step is killed at in any case")
    parser.add_argument("--minutes", type=float, default=60, help="begin no kill after so many")
    parser.add_argument("--short", action="store_true")
    arguments = parser.parse_args()
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="batch-rerank-chaos-"))
    chaos, undisturbed = Chaos.make(folder, 40 if arguments.short else 200)
    campaign = Campaign(chaos, random.Random(arguments.seed), started + arguments.minutes * 60)
    mends = chaos.steps_of_a_resume()
    campaign.steps(undisturbed.steps(), "new", damaged=False)
    campaign.steps(Counter({step: n for step, n in mends.items() if step[0] in ("remove", "unlink")}), "mend", True)
    campaign.publishers()
    if not arguments.short and not campaign.over():
        campaign.on_ray(RAY_KILLS - 6)
    campaign.random_times(max(RANDOM_KILLS, arguments.kills - campaign.kills.total()))
    if not campaign.violations:
        shutil.rmtree(folder)
    summary = {
        "seed": arguments.seed,
        "kills": campaign.kills.total(),
        "steps_not_begun_in_time": campaign.not_begun,
        "kinds": dict(campaign.kills),
        "units": chaos.units,
        "outputs_checked": campaign.outputs,
        "most_units_in_flight": campaign.in_flight,
        "hidden_leftovers": campaign.hidden,
        "ray_processes_that_outlived_killed_drivers": campaign.survivors,
        "violations": campaign.violations,
        "folder": str(folder) if campaign.violations else None,
        "seconds": round(time.monotonic() - started, 1),
    }
    print(json.dumps(summary))
    return 1 if campaign.violations else 0


if __name__ == "__main__":
    sys.exit(main())
