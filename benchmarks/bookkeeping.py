"""What the bookkeeping of many units costs: planned, run on 64 fake GPUs, killed at half and resumed.

    python benchmarks/bookkeeping.py [--units 1000 5000 20000]

The scorer is free and a unit has 20 short texts, so what is measured is planning, Ray's tasks, receipts and listings.
Prints a card, then a line a run, and ends with one JSON line. Every output is verified in the same run.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ACTORS = 64
UNITS_A_SHARD = 500

CHILD = """
import json, logging, resource, sys, time
logging.basicConfig(level=logging.WARNING)
logging.getLogger("ray.data").setLevel(logging.ERROR)
import ray
from batch_rerank.config import load_config
from batch_rerank.job import ahead, run as jobs
from batch_rerank.job.run import run
from batch_rerank.publish.verify import verify
from batch_rerank.store.filesystem import Location

seconds, listings = {}, []
def timed(name, function):
    def wrapped(*given):
        started = time.monotonic()
        try:
            return function(*given)
        finally:
            seconds[name] = round(time.monotonic() - started, 2)
    return wrapped
ahead.make_plan = timed("plan", ahead.make_plan)
jobs.resume = timed("resume", jobs.resume)
find = Location.find
Location.find = lambda self: listings.append(self.name) or find(self)

ray.init(address="local", num_cpus=4, num_gpus=int(sys.argv[2]), include_dashboard=False, log_to_driver=False,
         logging_level=logging.ERROR)
summary = run(load_config(sys.argv[1]))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
ray.shutdown()
started = time.monotonic()
problems = verify(summary.output).problems
print(json.dumps({"driver_peak_mib": round(peak), "plan_s": seconds["plan"], "resume_s": seconds["resume"],
                  "listings_of_the_output": listings.count("out"), "units": summary.units,
                  "resumed": summary.resumed_units, "units_per_s": round(summary.units / summary.seconds, 1),
                  "verify_s": round(time.monotonic() - started, 1), "problems": problems}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, nargs="+", default=[1000, 5000, 20000])
    arguments = parser.parse_args()
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    result = {}
    for units in arguments.units:
        with tempfile.TemporaryDirectory() as directory:
            result[f"{units}_units"] = measure(Path(directory), units)
    versions = {name: __import__(name).__version__ for name in ("ray", "pyarrow")}
    card = {"benchmark": "bookkeeping", "cores": os.cpu_count(), "actors": ACTORS, **versions}
    print(json.dumps({**card, **result}))


def measure(directory: Path, units: int) -> dict[str, Any]:
    """A run that is killed at half, and the one that resumes it."""
    write_shards(directory / "in", units)
    started = time.monotonic()
    killed = start(directory, "out")
    scored = directory / "out" / "_work"  # not receipts: those of a thousand units become one file
    actors = with_torch = 0
    while killed.poll() is None and count(scored) < units // 2:
        scoring = [pid for pid, name in processes() if name.startswith("ray::MapWorker(MapBatches(Score))")]
        if len(scoring) > actors:
            actors, with_torch = len(scoring), sum("libtorch" in maps(pid) for pid in scoring)
        time.sleep(0.5)
    peak = peak_mib(killed.pid)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    half = {"units": count(scored), "seconds": round(time.monotonic() - started, 1), "driver_peak_mib": peak}
    resumed = finish(start(directory, "out"))
    assert resumed["units"] + resumed["resumed"] == units and resumed["resumed"] >= units // 2
    assert not resumed.pop("problems")
    result = {"killed": half, "resumed": resumed, "actors_seen": actors, "actors_with_torch": with_torch}
    print(f"{units}: {json.dumps(result)}", flush=True)
    return result


def write_shards(directory: Path, units: int) -> None:
    directory.mkdir()
    for first in range(0, units, UNITS_A_SHARD):
        queries = range(2 * first, 2 * min(units, first + UNITS_A_SHARD))
        rows = [
            {"query_id": f"q{q}", "query": f"query {q}", "doc_id": f"d{d}", "text": f"text {d} of {q}"}
            for q in queries
            for d in range(10)
        ]
        pq.write_table(pa.Table.from_pylist(rows), directory / f"{first:06d}.parquet", row_group_size=2000)


def start(directory: Path, output: str) -> "subprocess.Popen[str]":
    job = {
        "input": {"layout": "flat", "path": f"{directory}/in", "unit_pairs": 20},
        "output": {"path": f"{directory}/{output}"},
        "model": {"name": "none", "kind": "checksum"},
        "cluster": {"actors": ACTORS, "gpus_per_actor": 1},
    }
    path = directory / f"{output}.json"
    path.write_text(json.dumps(job))
    command = [sys.executable, "-c", CHILD, str(path), str(ACTORS)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


def finish(process: "subprocess.Popen[str]") -> dict[str, Any]:
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(process.returncode)
    run: dict[str, Any] = json.loads(output.splitlines()[-1])
    return run


def count(directory: Path) -> int:
    return sum(entry.name.endswith(".parquet") for entry in os.scandir(directory)) if directory.exists() else 0


def processes() -> list[tuple[int, str]]:
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal():
            try:
                found.append((int(entry.name), Path(entry.path, "cmdline").read_text(errors="replace")))
            except OSError:
                continue
    return found


def maps(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return ""


def peak_mib(pid: int) -> int:
    """The highest resident memory of a process so far."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
