"""Labels of a large output: pairs/s of an export and its peak memory, on Ray and in one process.

An output of N scored pairs of 1 KB texts, 100 candidates a query, is made by the job itself with the free scorer, and
exported to two targets. Before: the sizes. After: every list is held against the published scores. Last: one JSON line.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from batch_rerank.calls import in_turn
from batch_rerank.config import parse_config
from batch_rerank.job.run import run
from batch_rerank.job.staging import on_ray
from batch_rerank.label_settings import Labels
from batch_rerank.labels.export import export
from batch_rerank.publish.output import Place

CANDIDATES, TEXT_BYTES, SHARD_QUERIES, GROUP_QUERIES = 100, 1000, 2000, 100
HOW = ("local", "ray")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--how", nargs="+", choices=HOW, default=list(HOW))
    parser.add_argument("--to", nargs="+", default=["flagembedding", "pylate"])
    parser.add_argument("--write", action="store_true", help="Write benchmarks/results/export.json.")
    given = parser.parse_args()
    queries = given.pairs // CANDIDATES
    print(f"{queries:,} queries x {CANDIDATES} candidates of {TEXT_BYTES} bytes, {psutil.cpu_count()} CPUs")
    root = Path(tempfile.mkdtemp(prefix="export-"))
    try:
        result = measure(root, queries, given.repeats, given.how, given.to)
    finally:
        shutil.rmtree(root)
    line = json.dumps({"benchmark": "export", "pairs": queries * CANDIDATES, "text_bytes": TEXT_BYTES, **result})
    if given.write:
        (Path(__file__).parent / "results" / "export.json").write_text(line + "\n")
    print(line)


def measure(root: Path, queries: int, repeats: int, hows: list[str], targets: list[str]) -> dict[str, object]:
    make_input(root / "in", queries)
    config = parse_config(
        {
            "input": {"layout": "nested", "path": str(root / "in"), "unit_pairs": 2000},
            "output": {"path": str(root / "out")},
            "model": {"name": "none", "kind": "checksum"},
            "cluster": {"gpus_per_actor": 0},
        },
        "benchmark",
    )
    started = time.monotonic()
    run(config, local=True)
    print(f"scored and published in {time.monotonic() - started:.0f} s")
    found: dict[str, object] = {"cpus": psutil.cpu_count(), "load_before": psutil.getloadavg()[0]}
    for how in hows:
        for to in targets:
            rates, peaks, cores = [], [], []
            for repeat in range(repeats):
                place = root / f"{how}-{to}-{repeat}"
                peak, used = Peak(), time.process_time()
                done = export(
                    Place(str(root / "out")),
                    Labels(to=to, path=str(place)),
                    in_turn if how == "local" else on_ray(config),
                )
                rates.append(queries * CANDIDATES / done.seconds)
                cores.append(queries * CANDIDATES / (time.process_time() - used))
                peaks.append(peak.stop())
                assert done.counts["pairs"] == queries * CANDIDATES
                check(place, root / "out")
            found[f"{how}_{to}_pairs_per_second"] = round(statistics.median(rates))
            if how == "local":  # what a busy machine does not change
                found[f"{how}_{to}_pairs_per_cpu_second"] = round(statistics.median(cores))
            found[f"{how}_{to}_peak_mib"] = round(max(peaks))
            print(f"{how} {to}: {statistics.median(rates):,.0f} pairs/s, {max(peaks):,.0f} MiB above the start")
    return found


def make_input(path: Path, queries: int) -> None:
    """Shards of 2,000 queries, row groups of 100; a document has one text under all queries."""
    path.mkdir()
    words = np.array([f"word{number:04d}" for number in range(5000)])
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, TEXT_BYTES // 9)) for _ in range(20_000)]
    for shard, first in enumerate(range(0, queries, SHARD_QUERIES)):
        count = min(SHARD_QUERIES, queries - first)
        writer = None
        for start in range(first, first + count, GROUP_QUERIES):
            rows = []
            for query in range(start, min(start + GROUP_QUERIES, first + count)):
                ids = [(query * 37 + place) % len(texts) for place in range(CANDIDATES)]
                documents = [{"doc_id": f"d{one}", "text": texts[one]} for one in ids]
                rows.append({"query_id": f"q{query}", "query": f"question {query}", "candidates": documents})
            table = pa.Table.from_pylist(rows)
            writer = writer or pq.ParquetWriter(path / f"{shard:04d}.parquet", table.schema, use_dictionary=False)
            writer.write_table(table)
        if writer is not None:
            writer.close()


def check(place: Path, output: Path) -> None:
    """The labels of the first file are the published scores, and the positive of each list is its query's best."""
    scores = pq.read_table(sorted(output.glob("part-*.parquet"))[0], columns=["query_id", "doc_id", "score", "rank"])
    told = {(row["query_id"], row["doc_id"]): row for row in scores.slice(0, 20_000).to_pylist()}
    rows = pq.read_table(sorted((place / "_labels").glob("*.parquet"))[0]).slice(0, 2_000).to_pylist()
    for row in rows:
        of = told[row["query_id"], row["doc_id"]]
        assert (row["score"], row["rank"]) == (of["score"], of["rank"])
        assert (row["role"] == "positive") == (row["rank"] == 1)


class Peak:
    """The most memory that this process and its children held above what they had, looked at ten times a second."""

    def __init__(self) -> None:
        import threading

        self._ended = threading.Event()
        self._first = held()
        self._most = self._first
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(0.1):
            self._most = max(self._most, held())

    def stop(self) -> float:
        """MiB."""
        self._ended.set()
        self._thread.join()
        return (self._most - self._first) / 2**20


def held() -> int:
    total = 0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            total += process.memory_full_info().uss
        except psutil.Error:
            continue
    return total


if __name__ == "__main__":
    main()
