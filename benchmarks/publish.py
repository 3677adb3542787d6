"""What a large job costs from its first read to `_SUCCESS`, with a scorer that costs nothing.

    python benchmarks/publish.py [--pairs 10000000] [--text-bytes 100]

Nested shards with pyarrow's default row groups, 100 candidates a query, one million distinct documents, through Ray.
Prints a card, then the run with its publishing, its output's files, the driver's peak memory, verify, a republication
with another top_k, and a resume that has nothing to do; ends with one JSON line.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

DOCUMENTS, CANDIDATES, SHARDS = 1_000_000, 100, 10

CHILD = """
import json, logging, sys, time
logging.basicConfig(level=logging.WARNING)
import batch_rerank.job.run as jobs
from batch_rerank.config import load_config
from batch_rerank.publish.output import Place
from batch_rerank.publish.verify import verify
seconds = {}
def timed(module, name):
    function = getattr(module, name)
    def wrapped(*given, **named):
        started = time.monotonic()
        try:
            return function(*given, **named)
        finally:
            seconds[name] = round(time.monotonic() - started, 1)
    setattr(module, name, wrapped)
import batch_rerank.job.ahead as ahead, batch_rerank.job.finish as finish, batch_rerank.job.republish as again
for module, name in ((ahead, "make_plan"), (again, "try_out"), (finish, "publish"), (finish, "tidy")):
    timed(module, name)
config = load_config(sys.argv[1])
what, started = sys.argv[2], time.monotonic()
said = {}
if what == "run":
    summary = jobs.run(config)
    said = {"units": summary.units, "steady_rate": summary.steady_rate and round(summary.steady_rate)}
    said["reused"] = summary.totals.reused
elif what == "verify":
    said = {"problems": verify(config.output.path).problems}
elif what == "publish":
    said = {"rows": again.republish(Place(config.output.path, {}, config)).rows_out}
told = open("/proc/self/status").read()  # not getrusage: its peak is the parent's where that was larger
peak = round(int(told.split("VmHWM:")[1].split()[0]) / 1024)
print(json.dumps({**said, **seconds, "seconds": round(time.monotonic() - started, 1), "peak_mib": peak}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10_000_000)
    parser.add_argument("--text-bytes", type=int, default=100)
    arguments = parser.parse_args()
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory() as name:
        result = measure(Path(name), arguments.pairs, arguments.text_bytes)
    versions = {name: __import__(name).__version__ for name in ("ray", "pyarrow")}
    card = {"benchmark": "publish", "cores": os.cpu_count(), **versions}
    print(json.dumps({**card, "pairs": arguments.pairs, "text_bytes": arguments.text_bytes, **result}))


def measure(directory: Path, pairs: int, text_bytes: int) -> dict[str, Any]:
    write_shards(directory / "in", pairs, text_bytes)
    out = directory / "out"
    result: dict[str, Any] = {"input_bytes": size_of(directory / "in")}
    result["run"] = execute(directory, "run")
    result["run"]["pairs_per_s_with_publishing"] = round(pairs / result["run"]["seconds"])
    result["files"] = {"visible": len(list(out.glob("*.parquet"))), "all": sum(p.is_file() for p in out.rglob("*"))}
    result["bytes_a_pair"] = {
        "parts": round(sum(part.stat().st_size for part in out.glob("*.parquet")) / pairs, 1),
        "scores": round(size_of(out / "_scores") / pairs, 1),
    }
    result["verify"] = execute(directory, "verify")
    result["publish_again"] = execute(directory, "publish", top_k=10)
    result["files_with_top_k"] = len(list(out.glob("*.parquet")))
    result["nothing_to_do"] = execute(directory, "run", top_k=10)
    return result


def execute(
    directory: Path, what: str, given: str = "in", to: str = "out", earlier: str | None = None, **output: int
) -> dict[str, Any]:
    """Do something in a process of its own with the shards `given` and the output `to`; what it took."""
    job: dict[str, Any] = {
        "input": {"layout": "nested", "path": f"{directory}/{given}/*.parquet"},
        "output": {"path": f"{directory}/{to}", **output},
        "model": {"name": "none", "kind": "checksum"},
        "cluster": {"actors": 1, "gpus_per_actor": 0, "cpus_per_actor": 1},
    }
    if earlier is not None:
        job["reuse"] = {"from": f"{directory}/{earlier}"}
    (directory / "job.yaml").write_text(json.dumps(job))
    started = time.monotonic()
    command = [sys.executable, "-c", CHILD, str(directory / "job.yaml"), what]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    found["seconds_with_imports"] = round(time.monotonic() - started, 1)
    print(what, to, found, flush=True)
    return found


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def write_shards(folder: Path, pairs: int, text_bytes: int) -> None:
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    letters = random.integers(97, 123, (DOCUMENTS, text_bytes), dtype=np.uint8)
    letters[:, 7::8] = 32
    offsets = pa.array(np.arange(DOCUMENTS + 1) * text_bytes, pa.int64()).buffers()[1]
    texts = pa.LargeStringArray.from_buffers(DOCUMENTS, offsets, pa.py_buffer(letters.tobytes()))
    queries = pairs // CANDIDATES // SHARDS
    for shard in range(SHARDS):
        first, step = random.integers(0, DOCUMENTS, queries), random.integers(1, DOCUMENTS // CANDIDATES, queries)
        chosen = ((first[:, None] + step[:, None] * np.arange(CANDIDATES)) % DOCUMENTS).ravel()  # each once a query
        ids = pc.binary_join_element_wise(pa.scalar("d"), pc.cast(pa.array(chosen), pa.string()), "")
        structs = pa.StructArray.from_arrays(
            [ids, texts.take(pa.array(chosen)).cast(pa.string()), pa.array(random.random(len(chosen), np.float32))],
            names=["doc_id", "text", "score"],
        )
        starts = pa.array(np.arange(queries + 1) * CANDIDATES, pa.int32())
        numbers = [f"{shard}-{query}" for query in range(queries)]
        table = pa.table(
            {
                "query_id": [f"q{number}" for number in numbers],
                "query": [f"what about number {number}" for number in numbers],
                "candidates": pa.ListArray.from_arrays(starts, structs),
            }
        )
        pq.write_table(table, folder / f"{shard}.parquet")


if __name__ == "__main__":
    main()
