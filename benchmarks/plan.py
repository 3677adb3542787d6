"""What a plan costs and how true it is.

    python benchmarks/plan.py scale [--pairs 1000000 10000000]   seconds and memory of a plan, by pairs
    python benchmarks/plan.py coverage                           how often the interval has the truth, of 100 seeds
    python benchmarks/plan.py error [--seconds 30]               predicted against actual time of five runs on this CPU

Texts of scale are generated, 100 bytes each, in nested shards with pyarrow's default row groups; those of coverage and
error are functions of this machine's standard library. TOKENIZER (a folder with a tokenizer.json) is used where it is
set, else a small one is trained. The runs of error are of different shape: short texts, long ones, lengths that differ
by orders of magnitude, texts that are cut, and a bi-encoder with repeats. Ends with one JSON line.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from engine_models import SHAPES, build_causal, build_embedding, train_tokenizer
from publish import write_shards

from batch_rerank.config import parse_config
from batch_rerank.demo import standard_library
from batch_rerank.estimate.sample import ALL, Budget
from batch_rerank.job.ahead import plan_job
from batch_rerank.job.bench import bench
from batch_rerank.job.estimate import estimate
from batch_rerank.job.run import run

CHILD = """
import json, sys, time
from batch_rerank.config import load_config
from batch_rerank.estimate.sample import SAMPLED
from batch_rerank.job.ahead import plan_job
from batch_rerank.job.estimate import estimate
started = time.monotonic()
ahead = plan_job(load_config(sys.argv[1]), local=True)
planned = time.monotonic() - started
found = estimate(ahead.config, ahead.plan, ahead.model, budget=SAMPLED, local=True)
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({
    "seconds": round(time.monotonic() - started, 1), "of_which_ids": round(planned, 1), "peak_mib": int(peak) // 1024,
    "units": len(ahead.plan.units), "estimate": found.json(),
}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["scale", "coverage", "error"])
    parser.add_argument("--pairs", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--seconds", type=float, default=30)
    options = parser.parse_args()
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        tokenizer = os.environ.get("TOKENIZER") or str(
            train_tokenizer(root / "tokenizer", [one.code for one in standard_library()])
        )
        found = {"scale": scale, "coverage": coverage, "error": error}[options.what](root, tokenizer, options)
    print(json.dumps({"benchmark": f"plan {options.what}", "cores": os.cpu_count(), **found}))


def scale(root: Path, tokenizer: str, options: argparse.Namespace) -> dict[str, Any]:
    build_causal(root / "model", SHAPES["tiny"], tokenizer, "cpu")
    found = {}
    for pairs in options.pairs:
        folder = root / str(pairs)
        write_shards(folder, pairs, 100)
        file = root / "job.yaml"
        file.write_text(json.dumps(raw(folder, root / "out", root / "model")))
        done = subprocess.run([sys.executable, "-c", CHILD, str(file)], capture_output=True, text=True, check=True)
        found[str(pairs)] = json.loads(done.stdout.splitlines()[-1])
        print(pairs, found[str(pairs)], flush=True)
        for path in folder.iterdir():
            path.unlink()
    return found


def coverage(root: Path, tokenizer: str, options: argparse.Namespace) -> dict[str, Any]:
    """Every seed draws 40 units of some 300 anew, reads and tokenises them."""
    build_causal(root / "model", SHAPES["tiny"], tokenizer, "cpu")
    write_functions(root / "in", 600, 20, lambda code, rng: code)
    config = parse_config({**raw(root / "in", root / "out", root / "model"), "scoring": {}}, "benchmark")
    config = config.model_copy(update={"input": config.input.model_copy(update={"unit_pairs": 40})})
    ahead = plan_job(config, local=True)
    assert ahead.model is not None
    truth = estimate(ahead.config, ahead.plan, ahead.model, budget=ALL, local=True).tally
    names = ("tokens", "truncated", "computed_tokens")
    within = dict.fromkeys(names, 0)
    size = sum(size for shard in ahead.plan.shards for _, size in shard.row_groups)
    few = Budget(text=0.9 * size, read=float("inf"), least=40, most=40)
    for seed in range(100):
        one = estimate(ahead.config, ahead.plan, ahead.model, budget=few, seed=seed, local=True).tally
        assert one is not None and truth is not None and not one.exact
        for name in names:
            within[name] += getattr(one, name).low <= getattr(truth, name).p50 <= getattr(one, name).high
    return {"units": len(ahead.plan.units), "units_read": 40, "covered_of_100": within}


def error(root: Path, tokenizer: str, options: argparse.Namespace) -> dict[str, Any]:
    build_causal(root / "causal", SHAPES["small"], tokenizer, "cpu")
    build_embedding(root / "embedding", SHAPES["small"], tokenizer, "cpu")
    runs: dict[str, tuple[str, int, int, int, Any]] = {
        "short": ("causal", 512, 60, 60, lambda code, rng: code[:160]),
        "long": ("causal", 1024, 12, 20, lambda code, rng: code * 3),
        "skewed": ("causal", 1024, 30, 30, lambda code, rng: code[: int(rng.lognormvariate(5, 1.2))]),
        "truncated": ("causal", 128, 60, 40, lambda code, rng: code * 2),
        "bi-encoder with repeats": ("embedding", 256, 120, 60, lambda code, rng: code[:1000]),
    }
    found = {}
    for name, (model, longest, queries, candidates, text) in runs.items():
        folder = root / name.replace(" ", "-")
        write_functions(folder / "in", queries, candidates, text, pool=1500)
        config = parse_config(raw(folder / "in", folder / "out", root / model, longest), "benchmark")
        measured = bench(config, local=True, seconds=options.seconds)
        summary = run(config, local=True)
        assert summary.held is not None
        planned, actual = summary.held["planned"], summary.held["actual"]
        seconds, busy = planned["seconds"]["p50"], planned["actor_seconds"]["p50"]
        found[name] = {
            "pairs": actual["pairs"],
            "bench_seconds": round(measured["seconds"], 1),
            "predicted_seconds": round(seconds, 1),
            "actual_seconds": round(actual["seconds"], 1),
            "off": round(actual["seconds"] / seconds - 1, 3),
            "actor_seconds_off": round(actual["actor_seconds"] / busy - 1, 3),
            "reasons": summary.held["reasons"],
        }
        print(name, found[name], flush=True)
    return found


def raw(given: Path, output: Path, model: Path, max_length: int = 512) -> dict[str, Any]:
    template = {"template": "qwen3-reranker"} if "embedding" not in str(model) else {}
    return {
        "input": {"layout": "nested", "path": f"{given}/*.parquet"},
        "output": {"path": str(output)},
        "model": {"name": str(model), "max_length": max_length, **template},
        "cluster": {"actors": 1, "gpus_per_actor": 0},
    }


def write_functions(folder: Path, queries: int, candidates: int, text: Any, pool: int | None = None) -> None:
    """Queries with functions of the standard library, drawn from `pool` of them."""
    folder.mkdir(parents=True)
    rng = random.Random(0)
    functions = list(standard_library())[:pool]
    rows = []
    for query in range(queries):
        chosen = rng.sample(functions, candidates)
        listed = [{"doc_id": f"d{at}", "text": text(one.code, rng)} for at, one in enumerate(chosen)]
        rows.append({"query_id": f"q{query}", "query": chosen[0].summary, "candidates": listed})
    pq.write_table(pa.Table.from_pylist(rows), folder / "0.parquet")


if __name__ == "__main__":
    started = time.monotonic()
    main()
    print(f"{time.monotonic() - started:.0f} s", file=sys.stderr)
