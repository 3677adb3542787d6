"""The first minutes on a GPU: prove every path of the engine, then measure it. `make gpu`

    python benchmarks/gpu.py                             a CUDA device, under 9 minutes
    python benchmarks/gpu.py --device cpu --small        the same code on tiny shapes: a rehearsal, its figures are none
    python benchmarks/gpu.py --steps card parity         some steps only

Needs torch, transformers and this checkout: no Ray, no Arrow, no network, no installation. Weights are random and are
made on the device. Each step has a time limit of its own: one that fails, hangs or breaks the device is recorded with
what it had found, and the next begins in a new process. Prints the card first and one JSON line last, which is also
benchmarks/results/gpu-<name>.json. Exit code 1 where parity was not proven.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DEADLINE_SECONDS = 530
IMPORT_SECONDS = 60
PATIENCE_ON_CPU = 10
"""A rehearsal on a busy machine is no fault: limits are so many times as long."""
STEPS = {  # module, function, arguments, seconds
    "card": ("gpu_rates", "card", (), 60),
    "ceilings": ("gpu_rates", "ceilings", (), 60),
    "parity": ("gpu_parity", "parity", (), 120),
    "halving": ("gpu_parity", "halving", (), 60),
    "kernels": ("gpu_rates", "kernel_rates", (), 60),
    "0.6b": ("gpu_shapes", "shape", ("0.6b",), 80),
    "4b": ("gpu_shapes", "shape", ("4b",), 100),
    "8b": ("gpu_shapes", "shape", ("8b",), 120),
}
PROOFS = ("parity", "halving")
"""Steps that must say `passed`. A shape proves its own scores too: it must not say that they failed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP", help=", ".join(STEPS))
    parser.add_argument("--out", type=Path, help="the file of the result; on a CPU there is none without it")
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)  # in the process of the steps
    options = parser.parse_args()
    if options.into:
        work(options)
        return
    started = time.monotonic()
    result: dict[str, Any] = {"benchmark": "gpu", "device": options.device, "small": options.small}
    for name, found in run(options, started):
        result[name] = found
        print(name, json.dumps(found, indent=1), flush=True)
    result["faults"] = faults(result)
    result["seconds"] = round(time.monotonic() - started, 1)
    out = options.out
    if out is None and options.device == "cuda":
        gpu = str(result.get("card", {}).get("gpu", "unknown"))
        out = HERE / "results" / f"gpu-{re.sub('[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    sys.exit(1 if result["faults"] else 0)


def run(options: argparse.Namespace, begun: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """What each step found, in a process that is replaced after a step that did not end well; `error` says why."""
    left = list(options.steps)
    slow = PATIENCE_ON_CPU if options.device == "cpu" else 1
    deadline = begun + slow * DEADLINE_SECONDS
    with tempfile.TemporaryDirectory() as directory:
        while left:
            with (Path(directory) / "log").open("w") as log:
                child = begin(left, options, directory, log)
                first = True
                while left:
                    name, started = left.pop(0), time.monotonic()
                    seconds = STEPS[name][3] + (IMPORT_SECONDS if first else 0)
                    until = min(started + slow * seconds, deadline)
                    error = wait(child, Path(directory) / f"{name}.done", until)
                    file = Path(directory) / f"{name}.json"
                    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
                    found["seconds"] = round(time.monotonic() - started, 1)
                    if error:
                        log.flush()
                        text = Path(log.name).read_text(errors="replace")
                        found |= {"error": found.get("error", error), "log": text[-2000:]}
                    yield name, found
                    first = False
                    if error:
                        break
                child.kill()
                child.wait()


def begin(steps: list[str], options: argparse.Namespace, directory: str, log: Any) -> "subprocess.Popen[bytes]":
    command = [sys.executable, __file__, "--steps", *steps, "--into", directory, "--device", options.device]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    small = ["--small"] if options.small else []
    return subprocess.Popen([*command, *small], stdout=log, stderr=subprocess.STDOUT, env=environment)


def wait(child: "subprocess.Popen[bytes]", done: Path, until: float) -> str | None:
    """None once a step is done, else what happened to it."""
    while not done.exists():
        if child.poll() is not None:
            return None if done.exists() else f"the process ended with exit code {child.returncode}"
        if time.monotonic() > until:
            return "not finished in time"
        time.sleep(0.05)
    return None


def work(options: argparse.Namespace) -> None:
    """The process of the steps: writes what is found as soon as it is, so that a step that is ended loses little. It
    ends with the first step that raises: an error of CUDA stays in a process."""
    sys.path[:0] = [str(HERE.parent), str(HERE)]
    for name in options.steps:
        found: dict[str, Any] = {}
        file = options.into / f"{name}.json"

        def record(found: dict[str, Any] = found, file: Path = file, **values: Any) -> None:
            found.update(values)
            new = file.with_suffix(".new")
            new.write_text(json.dumps(found))
            new.replace(file)

        module, function, arguments, _ = STEPS[name]
        try:
            step: Callable[..., None] = getattr(importlib.import_module(module), function)
            step(record, options.device, options.small, *arguments)
        except BaseException as error:
            record(error=f"{type(error).__name__}: {str(error)[:500]}")
            raise
        file.with_suffix(".done").touch()


def faults(result: dict[str, Any]) -> list[str]:
    """Why parity is not proven by the steps that were asked for; empty where it is."""
    found = [f"{name}: not passed" for name in PROOFS if name in result and not result[name].get("passed")]
    shapes = [name for name in STEPS if isinstance(result.get(name), dict)]
    return found + [f"{name}: failed" for name in shapes if name not in PROOFS and result[name].get("passed") is False]


if __name__ == "__main__":
    main()
