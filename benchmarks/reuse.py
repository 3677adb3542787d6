"""What a second night costs: with a scorer that costs nothing, and with a model of 1 % changed pairs.

    python benchmarks/reuse.py free [--pairs 10000000] [--text-bytes 100]
    python benchmarks/reuse.py model [--pairs 4000]

free: nested shards with pyarrow's default row groups through Ray: the first night, a second with the same shards, one
after every query has moved to another place, and one with 1 % of the documents changed; each publishes in whole.
model: a causal float32 model on this CPU, in one process: the first night, and one with 1 % changed pairs.
Prints a card, and ends with one JSON line.
"""

import argparse
import json
import os
import platform
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from publish import CANDIDATES, execute, size_of, write_shards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["free", "model"])
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--text-bytes", type=int, default=100)
    arguments = parser.parse_args()
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory() as name:
        if arguments.what == "free":
            pairs = arguments.pairs or 10_000_000
            result = free(Path(name), pairs, arguments.text_bytes)
        else:
            pairs = arguments.pairs or 4_000
            result = model(Path(name), pairs)
    versions = {name: __import__(name).__version__ for name in ("ray", "pyarrow")}
    card = {"benchmark": f"reuse {arguments.what}", "cores": os.cpu_count(), **versions}
    print(json.dumps({**card, "pairs": pairs, **result}))


def free(directory: Path, pairs: int, text_bytes: int) -> dict[str, Any]:
    write_shards(directory / "in", pairs, text_bytes)
    moved(directory / "in", directory / "moved")
    changed(directory / "in", directory / "changed", share=0.01)
    result: dict[str, Any] = {}
    for night, given, earlier in (
        ("first", "in", None),
        ("same", "in", "first"),
        ("moved", "moved", "first"),
        ("changed", "changed", "first"),
    ):
        found = execute(directory, "run", given=given, to=f"night-{night}", earlier=earlier and f"night-{earlier}")
        found["pairs_per_s_with_publishing"] = round(pairs / found["seconds"])
        result[night] = found
        if earlier is None:
            kept = sum(path.stat().st_size for path in (directory / f"night-{night}" / "_scores").glob("*.npy"))
            result["kept_bytes_a_pair"] = round(kept / pairs, 1)
            result["scores_bytes_a_pair"] = round(size_of(directory / f"night-{night}" / "_scores") / pairs, 1)
    result["times_as_long_when_moved"] = round(result["moved"]["seconds"] / result["same"]["seconds"], 2)
    return result


def moved(source: Path, target: Path) -> None:
    """The same queries, each anywhere in any shard."""
    target.mkdir()
    paths = sorted(source.glob("*.parquet"))
    queries = pa.concat_tables([pq.read_table(path) for path in paths])
    order = np.random.default_rng(1).permutation(len(queries))
    each = -(-len(queries) // len(paths))
    for number in range(len(paths)):
        rows = queries.take(pa.array(order[number * each : (number + 1) * each]))
        pq.write_table(rows, target / f"{number}.parquet")


def changed(source: Path, target: Path, share: float) -> None:
    """The same with other texts of some candidates, spread evenly."""
    target.mkdir()
    chance = np.random.default_rng(2)
    for path in sorted(source.glob("*.parquet")):
        table = pq.read_table(path).combine_chunks()
        lists = table["candidates"].chunk(0)
        candidates = lists.flatten()
        new = pa.array(chance.random(len(candidates)) < share)
        texts = candidates.field("text")
        texts = pc.if_else(new, pc.binary_join_element_wise(texts, pa.scalar("changed"), " "), texts)
        made = pa.StructArray.from_arrays(
            [candidates.field("doc_id"), texts, candidates.field("score")], names=["doc_id", "text", "score"]
        )
        column = pa.ListArray.from_arrays(lists.offsets, made)
        pq.write_table(table.set_column(2, "candidates", column), target / path.name)


def model(directory: Path, pairs: int) -> dict[str, Any]:
    from engine_models import SHAPES, build_causal, train_tokenizer

    from batch_rerank.config import parse_config
    from batch_rerank.demo import standard_library
    from batch_rerank.job.run import run

    functions = list(standard_library())
    tokenizer = train_tokenizer(directory / "tokenizer", (function.code for function in functions))
    build_causal(directory / "model", SHAPES["small"], str(tokenizer), "cpu")
    chance = random.Random(0)
    rows = [
        {"query_id": f"q{query}", "query": functions[query].summary, "doc_id": f"d{number}", "text": chosen.code[:400]}
        for query in range(pairs // CANDIDATES)
        for number, chosen in enumerate(chance.sample(functions, CANDIDATES))
    ]
    result: dict[str, Any] = {}
    for night, earlier in (("first", None), ("second", "first"), ("second_without_audit", "first")):
        if night == "second":
            for row in chance.sample(rows, pairs // 100):
                row["text"] += " # changed"
        (directory / f"in-{night}").mkdir()
        pq.write_table(pa.Table.from_pylist(rows), directory / f"in-{night}/0.parquet")
        raw: dict[str, Any] = {
            "input": {"layout": "flat", "path": f"{directory}/in-{night}/*.parquet"},
            "output": {"path": f"{directory}/{night}"},
            "model": {"name": str(directory / "model"), "max_length": 512, "dtype": "float32"},
            "cluster": {"gpus_per_actor": 0},
        }
        if earlier:
            raw["reuse"] = {"from": f"{directory}/{earlier}", **({"audit": 0} if "without" in night else {})}
        summary = run(parse_config(raw, "benchmark"), local=True)
        totals = summary.totals
        result[night] = {
            "seconds": round(summary.seconds, 1),
            "scoring_seconds": round(totals.seconds, 2),
            "start_up_and_rest_seconds": round(summary.seconds - totals.seconds, 1),
            "reused": totals.reused,
            "scored": totals.scored - totals.reused,
            "audited": totals.audited,
            "audit_difference": totals.audit_difference,
        }
        print(night, result[night], flush=True)
    for night in ("second", "second_without_audit"):
        share = result[night]["scoring_seconds"] / result["first"]["scoring_seconds"]
        result[f"{night}_share_of_the_scoring_time"] = round(share, 4)
    return result


if __name__ == "__main__":
    main()
