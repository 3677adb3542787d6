"""What a driver takes for 10^8 and 10^9 pairs, without scoring one: seconds and peak memory of each of its steps.

    python benchmarks/scale.py [--units 50000 500000] [--dir /tmp]

The output is simulated: a plan, receipts of 99 % of its units rolled up, and an empty file of scores for each. Each
step has a process of its own. Prints a card and a line a step, and ends with one JSON line.
"""

import argparse
import json
import os
import pickle
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from many_units import ROLLED, plan_of

PAIRS, SHARD_UNITS = 2000, 250
STEPS = ("plan", "resume", "status", "publish", "verify")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, nargs="+", default=[50_000, 500_000])
    parser.add_argument("--dir", type=Path, help="where the simulated outputs are made")
    parser.add_argument("--step", choices=STEPS, help="one step of an output in --dir, in this process")
    arguments = parser.parse_args()
    if arguments.step:
        told = globals()[f"step_{arguments.step}"](arguments.dir, arguments.units[0])
        print(json.dumps({**told, "cpu_s": round(time.process_time(), 1), "peak_mib": peak_mib()}))
        return
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}", flush=True)
    result = {}
    for units in arguments.units:
        with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
            result[f"{units * PAIRS:,} pairs"] = {"units": units, **measure(Path(folder), units)}
    print(json.dumps({"benchmark": "scale", "cores": os.cpu_count(), **result}))


def measure(folder: Path, units: int) -> dict[str, Any]:
    result = {}
    for step in STEPS:
        command = [sys.executable, __file__, "--step", step, "--units", str(units), "--dir", str(folder)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        result[step] = json.loads(done.stdout.splitlines()[-1])
        if step == "plan":
            write_receipts(folder, units, 0, units - units // 100)
        if step == "status":  # what is published is whole
            write_receipts(folder, units, units - units // 100, units)
        print(f"{units} units: {step} {result[step]}", flush=True)
    return result


def timed(seconds: dict[str, Any], name: str, started: float) -> float:
    now = time.monotonic()
    seconds[f"{name}_s"] = round(now - started, 1)
    return now


def step_plan(folder: Path, units: int) -> dict[str, Any]:
    from batch_rerank.store.filesystem import locate
    from batch_rerank.store.manifest import Manifest

    plan = simulated(folder, units)
    told: dict[str, Any] = {}
    at = time.monotonic()
    manifest = Manifest(locate(str(folder)))
    manifest.write_plan(plan)
    at = timed(told, "write", at)
    read = manifest.read_plan()
    timed(told, "read", at)
    assert read is not None and read.units == plan.units
    return {**told, "plan_bytes": manifest.plan_location.stat().size}


def step_resume(folder: Path, units: int) -> dict[str, Any]:
    from batch_rerank.job.run_ray import together
    from batch_rerank.score.read_unit import read_ranges
    from batch_rerank.store.bookkeeping import Expected, resume
    from batch_rerank.store.filesystem import locate
    from batch_rerank.store.lease import hold
    from batch_rerank.store.manifest import Manifest
    from batch_rerank.store.receipts import Totals
    from batch_rerank.store.rolls import Rolls

    told: dict[str, Any] = {}
    manifest, totals = Manifest(locate(str(folder))), Totals()
    begun = at = time.monotonic()
    plan = manifest.read_plan()
    assert plan is not None
    at = timed(told, "read_plan", at)
    with hold(manifest.root) as lease:
        done, found = resume(manifest, plan, totals, lease)
        at = timed(told, "resume", at)
        left = Expected(manifest, plan, done).left
        Rolls(manifest, lease, done, found.loose)
        tasks = [pickle.dumps(work) for work in together([[work] for work in read_ranges(plan, done)])]
        at = timed(told, "read_tasks", at)
        timed(told, "all", begun)
        assert len(left) == units // 100 and totals.units == units - units // 100
        after = status_mib("VmRSS")
        fresh = [pickle.dumps(work) for work in together([[work] for work in read_ranges(plan, frozenset())])]
        at = timed(told, "read_tasks_of_all", at)
    return {**told, "tasks": len(tasks), "tasks_of_all": len(fresh), "mib_behind_it": after}


def step_status(folder: Path, units: int) -> dict[str, Any]:
    from batch_rerank.publish.output import Place
    from batch_rerank.publish.status import status_of_output

    told: dict[str, Any] = {}
    at = time.monotonic()
    found = status_of_output(Place(str(folder)))
    timed(told, "all", at)
    assert found["units_done"] == units - units // 100
    return told


def step_publish(folder: Path, units: int) -> dict[str, Any]:
    from batch_rerank.config import parse_config
    from batch_rerank.publish import publish
    from batch_rerank.publish.publication import make_publication, publishing_fields
    from batch_rerank.store.filesystem import locate
    from batch_rerank.store.manifest import Manifest
    from batch_rerank.store.scan import scan

    told: dict[str, Any] = {}
    manifest = Manifest(locate(str(folder)))
    begun = at = time.monotonic()
    plan = manifest.read_plan()
    assert plan is not None
    found = scan(manifest, plan)
    at = timed(told, "scan", at)
    publish.refuse_unseen(manifest, plan, found)
    sizes = {receipt.unit: 40 * receipt.rows_in for receipt in found.committed}  # of score files as they are
    config = parse_config(JOB, "")
    publication = make_publication(plan, sizes, publishing_fields(config.output))
    checksums = {receipt.unit: receipt.sha256 for receipt in found.committed}
    parts = range(len(publication.parts))
    sent = [len(pickle.dumps(publish._work(publication, plan, number, {}, checksums, 1))) for number in parts]
    timed(told, "tasks", at)
    timed(told, "all", begun)
    return {**told, "parts": len(parts), "bytes_of_a_task": max(sent)}


def step_verify(folder: Path, units: int) -> dict[str, Any]:
    """Of an output that is not published yet, so that every receipt goes into a task."""
    from batch_rerank.publish.output import Place, open_output
    from batch_rerank.publish.verify import _Checks
    from batch_rerank.store.scan import scan

    told: dict[str, Any] = {}
    at = time.monotonic()
    manifest, plan = open_output(str(folder))
    checks = _Checks(manifest, plan, Place(str(folder)), False, None)
    found = scan(manifest, plan)
    at = timed(told, "scan", at)
    sent = [len(pickle.dumps(work)) for work in checks._shards(found, plan.units)]
    sent += [len(pickle.dumps(work)) for work in checks._scores(found)]
    timed(told, "tasks", at)
    return {**told, "tasks": len(sent), "bytes_of_a_task": max(sent)}


JOB = {
    "input": {"layout": "nested", "path": "/in"},
    "output": {"path": "/out"},
    "model": {"name": "none", "kind": "checksum"},
    "cluster": {"gpus_per_actor": 0, "cpus_per_actor": 1},
}


def simulated(folder: Path, units: int) -> Any:
    from dataclasses import replace

    from batch_rerank.config import parse_config
    from batch_rerank.store.filesystem import File
    from batch_rerank.store.plans import Shard

    rows = 2 * SHARD_UNITS
    files = [File(f"/in/{number:05d}.parquet", 1, "0" * 32) for number in range(-(-units // SHARD_UNITS))]
    shards = [Shard(number, file.path, file, rows) for number, file in enumerate(files)]
    made = [
        replace(
            unit,
            id=f"{number // SHARD_UNITS:05d}-{number % SHARD_UNITS:05d}",
            shard=number // SHARD_UNITS,
            start=2 * (number % SHARD_UNITS),
            stop=2 * (number % SHARD_UNITS) + 2,
            pairs=PAIRS,
        )
        for number, unit in enumerate(plan_of(units).units)
    ]
    config = parse_config(JOB, "").model_copy(update={"limit": None})
    config = config.model_copy(update={"output": config.output.model_copy(update={"path": str(folder)})})
    return replace(plan_of(0), config=config.model_dump(mode="json"), shards=shards, units=made)


def write_receipts(folder: Path, units: int, first: int, last: int) -> None:
    """Receipts as a GPU's actors write them, rolled up, with their units' files of scores."""
    from report import MODEL, unit

    from batch_rerank.score.shape import shape_of
    from batch_rerank.store.receipts import Receipt, roll

    for name in ("_manifest/receipts", "_work"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    plan = simulated(folder, units)
    shapes = [shape_of(unit(PAIRS // 100, seed), MODEL) for seed in range(20)]
    told = {"rows_in": PAIRS, "rows_out": PAIRS, "scored": PAIRS, "tokens": 150 * PAIRS, "queries": 2}
    about = {"host": "host", "device": "NVIDIA H100 80GB HBM3", "at": "2026-01-01T00:00:00Z", "actor": "0" * 32}
    scorer = "host:1234 cuda bf16 fused NVIDIA H100 80GB HBM3 threads=4 load=42.1s"
    timings = {"seconds": 19.123, "read_seconds": 0.1234, "encode_seconds": 1.2345, "compute_seconds": 18.1234}
    for at in range(first, last, ROLLED):
        bodies = []
        for number, one in enumerate(plan.units[at : min(last, at + ROLLED)], at):
            body = Receipt(
                unit=one.id,
                fingerprint=plan.fingerprint,
                part=f"{one.id}.parquet",
                size=4,
                sha256=f"{number:064x}",
                scorer=scorer,
                self_test="self-test passed: load, weights, spread, order, batch, packed",
                shape=shapes[number % 20],
                **told,  # type: ignore[arg-type]
                **about,  # type: ignore[arg-type]
                **timings,  # type: ignore[arg-type]
            )
            bodies.append(body.to_json())
            (folder / f"_work/{one.id}.parquet").write_bytes(b"PAR1")
        path = folder / f"_manifest/receipts/rolled-{len(list((folder / '_manifest/receipts').iterdir())):05d}.jsonl"
        path.write_bytes(roll(bodies))


def peak_mib() -> int:
    return status_mib("VmHWM")


def status_mib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
