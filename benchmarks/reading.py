"""What reading a large shard takes: bytes, memory and time, with the row groups that pyarrow writes unless told.

    python benchmarks/reading.py            nested, flat and staged-like shards of 0.25 GB
    python benchmarks/reading.py --mib 1024

One row group of up to a million rows. Each case runs in a process of its own: bytes are what the process asked of the
kernel (rchar of /proc/self/io), memory is its peak above what it takes before it reads. Every candidate is counted in
the same run. Prints a card, then what it measures, and ends with one JSON line.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

TEXT_BYTES = 1024
PER_QUERY = 100

CHILD = """
import json, sys, time
from batch_rerank.config import parse_config
from batch_rerank.score.plan import make_plan
from batch_rerank.score.read_unit import read_range, read_ranges
from pathlib import Path

def memory(name):
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0]) / 1024

def asked():
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])

path, layout, left = sys.argv[1], sys.argv[2], int(sys.argv[3])
config = parse_config({
    "input": {"layout": layout, "path": path}, "output": {"path": path + "-out"},
    "model": {"name": "none", "kind": "checksum"}, "cluster": {"gpus_per_actor": 0},
}, "benchmark")
started, before = time.monotonic(), asked()
plan, model = make_plan(config)
planned = {"plan_seconds": time.monotonic() - started, "plan_mib": (asked() - before) / 2**20}
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
base, before, started, first, pairs = memory("VmRSS"), asked(), time.monotonic(), None, 0
done = frozenset(unit.id for unit in plan.units[: -left or None]) if left else frozenset()
ranges = read_ranges(plan, done)
for work in ranges:
    for read in read_range(work, config, model):
        pairs += len(read.rows)
        first = first or time.monotonic() - started
print(json.dumps({**planned, "units": len(plan.units) - len(done), "tasks": len(ranges), "pairs": pairs,
                  "read_mib": (asked() - before) / 2**20, "peak_mib": memory("VmHWM") - base,
                  "first_unit_seconds": first, "seconds": time.monotonic() - started}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=256, help="of text in a shard")
    arguments = parser.parse_args()
    print(
        f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}, pyarrow {pa.__version__}"
    )
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        for case in ("nested", "flat", "few_documents"):
            path = Path(directory) / f"{case}.parquet"
            pairs = write(path, case, arguments.mib)
            layout = "flat" if case == "flat" else "nested"
            for left, name in ((0, case), (2, f"{case}_two_units_left")):
                result[name] = {"file_mib": round(path.stat().st_size / 2**20, 1), **read(path, layout, left)}
                print(name, result[name], flush=True)
            assert result[case]["pairs"] == pairs
            path.unlink()
    card = {"benchmark": "reading", "cores": os.cpu_count(), "pyarrow": pa.__version__, "text_mib": arguments.mib}
    print(json.dumps({**card, **result}))


def write(path: Path, case: str, mib: int) -> int:
    """One shard with default row groups; its candidates. Texts are letters that no codec makes much smaller."""
    pairs = mib * 2**20 // TEXT_BYTES // PER_QUERY * PER_QUERY
    queries = pairs // PER_QUERY
    distinct = 1000 if case == "few_documents" else pairs
    letters = np.random.default_rng(0).integers(97, 123, distinct * TEXT_BYTES, dtype=np.uint8)
    offsets = np.arange(distinct + 1, dtype=np.int64) * TEXT_BYTES
    text: pa.Array = pa.LargeStringArray.from_buffers(distinct, pa.py_buffer(offsets), pa.py_buffer(letters))
    if case == "few_documents":
        text = pa.DictionaryArray.from_arrays(pa.array(np.arange(pairs) % distinct, pa.int32()), text)
    doc_id = pa.array([f"d{number}" for number in range(pairs)])
    ids = pa.array([f"q{number}" for number in range(queries)])
    if case == "flat":
        ids = ids.take(pa.array(np.repeat(np.arange(queries), PER_QUERY)))
        table = pa.table({"query_id": ids, "query": ids, "doc_id": doc_id, "text": text})
    else:
        structs = pa.StructArray.from_arrays([doc_id, text], names=["doc_id", "text"])
        lists = pa.ListArray.from_arrays(pa.array(np.arange(queries + 1) * PER_QUERY, pa.int32()), structs)
        table = pa.table({"query_id": ids, "query": ids, "candidates": lists})
    pq.write_table(table, path, store_schema=False)
    return pairs


def read(path: Path, layout: str, left: int) -> dict[str, Any]:
    command = [sys.executable, "-c", CHILD, str(path), layout, str(left)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return {name: round(value, 2) for name, value in json.loads(done.stdout.splitlines()[-1]).items()}


if __name__ == "__main__":
    main()
