"""Labels of a large output: pairs/s of an export and its peak memory, on Ray and in one process.

An output of N scored pairs of 1 KB texts, 100 candidates a query, is made by the job itself with the free scorer, and
exported to two targets. Before: the sizes. After: every list is held against the published scores. Last: one JSON line.
"""

import argparse
import contextlib
import json
import multiprocessing
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from batch_rerank.calls import in_turn
from batch_rerank.config import JobConfig, parse_config
from batch_rerank.job.cluster import on_cluster
from batch_rerank.job.run import run
from batch_rerank.job.staging import on_ray
from batch_rerank.label_settings import Labels
from batch_rerank.labels.export import export
from batch_rerank.publish.output import Place

CANDIDATES, TEXT_BYTES, SHARD_QUERIES, GROUP_QUERIES = 100, 1000, 2000, 100
IDLE = {"local": "the process that has imported it", "ray": "an idle Ray"}
T = TypeVar("T")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--how", nargs="+", choices=list(IDLE), default=list(IDLE))
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
    started = time.monotonic()
    apart(make_output, root, queries)
    print(f"made, scored and published in {time.monotonic() - started:.0f} s")
    found: dict[str, object] = {"cpus": psutil.cpu_count(), "load_before": psutil.getloadavg()[0]}
    for how in hows:
        for to in targets:
            done = [apart(export_once, root, queries, how, to, repeat) for repeat in range(repeats)]
            rate, per_cpu, peak = (statistics.median(column) for column in zip(*done, strict=True))
            found[f"{how}_{to}_pairs_per_second"] = round(rate)
            if how == "local":  # what a busy machine does not change
                found[f"{how}_{to}_pairs_per_cpu_second"] = round(per_cpu)
            found[f"{how}_{to}_peak_mib"] = round(peak)
            print(f"{how} {to}: {rate:,.0f} pairs/s, {peak:,.0f} MiB above {IDLE[how]}", flush=True)
    return found


def apart(function: Callable[..., T], *given: object) -> T:
    """In a process of its own: one that has worked before holds memory that nobody sees it take again."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *given).result()


def job(root: Path) -> JobConfig:
    raw = {
        "input": {"layout": "nested", "path": str(root / "in"), "unit_pairs": 2000},
        "output": {"path": str(root / "out")},
        "model": {"name": "none", "kind": "checksum"},
        "cluster": {"gpus_per_actor": 0},
    }
    return parse_config(raw, "benchmark")


def make_output(root: Path, queries: int) -> None:
    make_input(root / "in", queries)
    run(job(root), local=True)


def export_once(root: Path, queries: int, how: str, to: str, repeat: int) -> tuple[float, float, float]:
    """Pairs a second, pairs a second of this process's CPU time, and MiB."""
    config, place, pairs = job(root), root / f"{how}-{to}-{repeat}", queries * CANDIDATES
    with idle_ray(config) if how == "ray" else contextlib.nullcontext():
        peak, used = Peak(), time.process_time()
        done = export(
            Place(str(root / "out")), Labels(to=to, path=str(place)), in_turn if how == "local" else on_ray(config)
        )
        used = time.process_time() - used
        most = peak.stop()
    assert done.counts["pairs"] == pairs
    check(place, root / "out")
    return pairs / done.seconds, pairs / used, most


@contextlib.contextmanager
def idle_ray(config: JobConfig) -> Iterator[None]:
    """Ray with its workers begun and nothing to do."""
    before = held()
    with on_cluster(config):
        seen = [0.0] * 5  # its processes are begun one after the other
        while max(seen) - min(seen) > 2**20 or not min(seen):
            time.sleep(1)
            seen = [*seen[1:], held()]
        print(f"idle Ray: {(seen[-1] - before) / 2**20:,.0f} MiB", flush=True)
        yield


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
    """The most memory that this process and its children held above what they had, looked at ten times a second; and
    what each of them held then."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._first = held()
        self._most = self._first
        self._then: dict[str, float] = {}
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(0.1):
            now = by_process()
            if sum(now.values()) > self._most:
                self._most, self._then = sum(now.values()), now

    def stop(self) -> float:
        """MiB."""
        self._ended.set()
        self._thread.join()
        large = sorted(self._then.items(), key=lambda one: -one[1])[:8]
        print("the most was held by " + ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in large), flush=True)
        return (self._most - self._first) / 2**20


def held() -> float:
    return sum(by_process().values())


def by_process() -> dict[str, float]:
    found = {}
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            found[f"{process.name()} {process.pid}"] = float(process.memory_full_info().uss)
        except psutil.Error:
            continue
    return found


if __name__ == "__main__":
    main()
