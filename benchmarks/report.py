"""What a report costs: seconds and bytes at the end of a run, and what the shapes in receipts cost the scoring.

    python benchmarks/report.py [--pairs 10000]

Three cases: a job of so many pairs with the free scorer in this process, its report by the run's own clock; receipts of
an output of 10 million pairs in 500 and in 5,000 units, generated (no rows behind them, so no texts of movers); and the
shape of one unit, beside the time in which the free scorer's whole way makes a unit. Prints a card, a line a case,
and ends with one JSON line.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
from pipeline import free_job, write_candidates

from batch_rerank.config import parse_config
from batch_rerank.job.run import run
from batch_rerank.score import score_file
from batch_rerank.score.shape import shape_of
from batch_rerank.store.names import REPORT_HTML, REPORT_JSON

MODEL: Any = SimpleNamespace(relevance="sigmoid", relevance_scale=1.0)
MOST_PAIRS = 10_000_000
SIZES = (500, 2000, 4000)
"""Pairs of a unit; 4,000 is what a large job of 1 KB texts has."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10_000)
    arguments = parser.parse_args()
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_candidates(Path(folder) / "in", arguments.pairs, documents=2000)
        result["run"] = measured_run(Path(folder))
        print("run", result["run"], flush=True)
        write_candidates(Path(folder) / "shape/in", 4 * arguments.pairs, documents=2000)
        result["shape"] = measured_shape(Path(folder) / "shape")
        print("shape", result["shape"], flush=True)
    for units in (500, 5000):
        with tempfile.TemporaryDirectory() as folder:
            result[f"generated_{units}_units"] = measured_receipts(Path(folder), units)
            print("generated", result[f"generated_{units}_units"], flush=True)
    print(json.dumps({"benchmark": "report", "cores": os.cpu_count(), "pairs": arguments.pairs, **result}))


def measured_run(folder: Path) -> dict[str, Any]:
    """A run with its report, and the same without."""
    import batch_rerank.job.reported as reported

    seconds, made = [], []
    report_run = reported.report_run

    def timed(*given: Any, **named: Any) -> Any:
        started = time.process_time(), time.monotonic()
        found = report_run(*given, **named)
        seconds.append((time.process_time() - started[0], time.monotonic() - started[1]))
        made.append(found)
        return found

    reported.report_run = timed
    whole = []
    for number in range(3):
        job = free_job(folder, 500)
        summary = run(parse_config({**job, "output": {"path": f"{folder}/out{number}"}}, "benchmark"), local=True)
        whole.append(summary.seconds)
    reported.report_run = report_run
    output = Path(summary.output)
    return {
        "run_seconds": round(statistics.median(whole), 2),
        "report_seconds": round(statistics.median(wall for _, wall in seconds), 3),
        "report_cpu_seconds": round(statistics.median(cpu for cpu, _ in seconds), 3),
        "html_bytes": (output / REPORT_HTML).stat().st_size,
        "json_bytes": (output / REPORT_JSON).stat().st_size,
    }


def measured_shape(folder: Path) -> dict[str, Any]:
    """CPU time of shapes beside that of a whole free job, in one process."""
    spent = [0.0]

    def timed(*given: Any) -> str:
        started = time.thread_time()
        try:
            return shape_of(*given)
        finally:
            spent[0] += time.thread_time() - started

    score_file.shape_of = timed  # type: ignore[assignment]
    shares, per_pair = [], []
    for unit_pairs in SIZES:
        for repeat in range(3):
            job = {**free_job(folder, unit_pairs), "output": {"path": f"{folder}/s{unit_pairs}-{repeat}"}}
            spent[0], started = 0.0, time.process_time()
            summary = run(parse_config(job, "benchmark"), local=True)
            shares.append((unit_pairs, spent[0] / (time.process_time() - started)))
            per_pair.append((unit_pairs, spent[0] / summary.pairs))
    score_file.shape_of = shape_of  # type: ignore[assignment]

    def median(of: list[tuple[int, float]], size: int) -> float:
        return statistics.median(value for one, value in of if one == size)

    sizes = {f"units_of_{size}": size for size in SIZES}
    return {
        "share_of_cpu": {name: round(median(shares, size), 4) for name, size in sizes.items()},
        "ns_a_pair": {name: round(1e9 * median(per_pair, size)) for name, size in sizes.items()},
        "characters": {name: len(shape_of(unit(size // 100, 0), MODEL)) for name, size in sizes.items()},
    }


def unit(queries: int, seed: int) -> Any:
    random = np.random.default_rng(seed)
    pairs = 100 * queries
    table = {
        "query_index": pa.array(np.repeat(np.arange(queries), 100), pa.int32()),
        "first_stage_rank": pa.array(np.tile(np.arange(1, 101), queries), pa.int32()),
        "error": pa.nulls(pairs, pa.string()),
    }
    scores = np.clip(random.normal(-4, 5, pairs), -11.5, 11).astype(np.float32)
    n_tokens = np.clip(random.lognormal(5, 0.6, pairs), 20, 512).astype(np.int32)
    return SimpleNamespace(rows=pa.table(table), scores=scores, n_tokens=n_tokens)


def measured_receipts(folder: Path, units: int) -> dict[str, Any]:
    """A report of receipts of 10 million pairs, by 64 actors in an hour."""
    from many_units import plan_of, write

    from batch_rerank.config import parse_config
    from batch_rerank.report.write import report_run
    from batch_rerank.store.filesystem import locate
    from batch_rerank.store.manifest import Manifest
    from batch_rerank.store.receipts import Receipt, roll

    plan, pairs = plan_of(units), MOST_PAIRS // units
    write(folder, plan, rolled=True)
    shapes = [shape_of(unit(pairs // 100, seed), MODEL) for seed in range(20)]
    bodies = []
    for number, one in enumerate(plan.units):
        second = 3600 * number // units
        stamp = f"2026-01-01T{second // 3600:02d}:{second // 60 % 60:02d}:{second % 60:02d}Z"
        told = {"rows_in": pairs, "rows_out": pairs, "scored": pairs, "tokens": 150 * pairs, "queries": pairs // 100}
        about = {"scorer": f"host:{number % 64} cuda", "host": "host", "device": "cuda", "at": stamp, "seconds": 40.0}
        name, shape = f"{one.id}.parquet", shapes[number % len(shapes)]
        bodies.append(Receipt(one.id, plan.fingerprint, name, 4, "0" * 64, **told, **about, shape=shape).to_json())
    rolls = sorted((folder / "_manifest/receipts").iterdir())
    for number, path in enumerate(rolls):
        path.write_bytes(roll(bodies[1000 * number : 1000 * number + 1000]))
    (folder / "_manifest/plan.json").write_bytes(plan.to_json())
    config = parse_config(
        {"input": {"layout": "nested", "path": "/in"}, "output": {"path": str(folder)}, "model": {"name": "none"}}, ""
    )
    seconds, cpu = [], []
    for _ in range(3):
        started = time.monotonic(), time.process_time()
        made = report_run(Manifest(locate(str(folder))), plan, config)
        seconds.append(time.monotonic() - started[0])
        cpu.append(time.process_time() - started[1])
    assert made and made.content["scores"]["count"] == pairs * units
    return {
        "pairs": pairs * units,
        "units": units,
        "report_seconds": round(statistics.median(seconds), 2),
        "report_cpu_seconds": round(min(cpu), 2),
        "html_bytes": made.bytes,
        "json_bytes": (folder / REPORT_JSON).stat().st_size,
        "receipt_bytes": round(sum(map(len, bodies)) / units),
    }


if __name__ == "__main__":
    main()
