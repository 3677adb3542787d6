"""What a resume reads of an output with many units: receipts that are alone, as 0.1.0 kept them, and rolled up.

    python benchmarks/many_units.py [--units 500000]

The output is simulated: a plan, receipts, and files of scores by their receipts alone. `scan` is what run, status,
verify and publish begin with. Prints a card and a line a case, and ends with one JSON line.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROLLED, GATHERED = 1000, 5000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=500_000)
    parser.add_argument("--case", choices=["alone", "rolled"], help="one case, in this process")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(arguments.units, arguments.case == "rolled")))
        return
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    result = {}
    for case in ("alone", "rolled"):
        command = [sys.executable, __file__, "--units", str(arguments.units), "--case", case]
        result[case] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(case, result[case], flush=True)
    print(json.dumps({"benchmark": "many units", "cores": os.cpu_count(), "units": arguments.units, **result}))


def measure(units: int, rolled: bool) -> dict[str, Any]:
    from batch_rerank.store.filesystem import Location, locate
    from batch_rerank.store.manifest import Manifest
    from batch_rerank.store.scan import scan

    with tempfile.TemporaryDirectory() as name:
        manifest, plan = Manifest(locate(name)), plan_of(units)
        write(Path(name), plan, rolled)
        read = []
        read_bytes = Location.read_bytes
        Location.read_bytes = lambda self: read.append(self.path) or read_bytes(self)  # type: ignore[method-assign, func-returns-value]
        started = time.monotonic()
        found = scan(manifest, plan)
        seconds = time.monotonic() - started
        assert len(found.committed) == units, found.broken
        files = len(found.files.found)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": round(seconds, 1), "objects_read": len(read), "files": files, "peak_mib": round(peak)}


def plan_of(units: int) -> Any:
    from batch_rerank.store.filesystem import File
    from batch_rerank.store.plans import Plan, Shard, Unit

    shards = [Shard(0, "/in/0.parquet", File("/in/0.parquet", 1, "etag"), 2 * units)]
    made = [Unit(f"{i // 1000:05d}-{i % 1000:05d}", 0, 2 * i, 2 * i + 2, 2, 200) for i in range(units)]
    return Plan("f" * 64, {}, {}, {}, "", {}, [], shards, made)


def write(folder: Path, plan: Any, rolled: bool) -> None:
    from batch_rerank.store.receipts import Receipt, ScoresReceipt, roll

    for name in ("_manifest/receipts", "_manifest/scores", "_scores", "_work"):
        (folder / name).mkdir(parents=True)
    checksum = "0" * 64
    bodies = [
        Receipt(
            unit.id, plan.fingerprint, f"{unit.id}.parquet", 4, checksum, rows_in=200, scorer="host:1 cuda"
        ).to_json()
        for unit in plan.units
    ]
    if not rolled:
        for unit, body in zip(plan.units, bodies, strict=True):
            (folder / f"_manifest/receipts/{unit.id}.json").write_bytes(body)
            (folder / f"_work/{unit.id}.parquet").write_bytes(b"PAR1")
        return
    for number, first in enumerate(range(0, len(bodies), ROLLED)):
        (folder / f"_manifest/receipts/rolled-{number:05d}.jsonl").write_bytes(roll(bodies[first : first + ROLLED]))
    for number, first in enumerate(range(0, len(bodies), GATHERED)):
        name = f"_scores/{number:05d}.parquet"
        (folder / name).write_bytes(b"PAR1")
        held = [(unit.id, checksum) for unit in plan.units[first : first + GATHERED]]
        receipt = ScoresReceipt(name, plan.fingerprint, held, 4, checksum)
        (folder / f"_manifest/scores/{number:05d}.json").write_bytes(receipt.to_json())


if __name__ == "__main__":
    main()
