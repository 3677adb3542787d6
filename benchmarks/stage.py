"""Staging a run over a corpus: seconds and memory as the number of candidates grows, and other ways to join them.

    python benchmarks/stage.py scale  [--documents 2000000] [--candidates 1000000 3000000 10000000]
    python benchmarks/stage.py ways   [--documents 200000] [--candidates 1000000]
    python benchmarks/stage.py join   [--documents 2000000] [--candidates 1000000 3000000 10000000]
    python benchmarks/stage.py text
    python benchmarks/stage.py skew   [--documents 200000] [--candidates 1000000]

scale: the staging of a job, on a Ray of its own, whose memory is the most that its processes held together (PSS), less
what an idle Ray holds. ways: the same join through the stage, through Ray Data's join, and with the corpus in Ray's
object store for every task to look up (`broadcast`). join: the driver's part alone, which reads ids and says which row
goes where; bytes a candidate are of memory, those that the largest run takes more than the smallest; `spilled` is what
it writes to temporary files. The corpus is 1 KB texts in Parquet (join: none), the run is Parquet ids; each query's
documents are drawn at random, a tenth of them from a hundredth of the corpus. text: one shard of 50,000 candidates over
50,000 to 500 documents, its texts written once a candidate, once a document in the column's dictionary, and once a
document in a second file. skew: a whole job of the free scorer over queries of 10 candidates and one of 100,000. Ends
with one JSON line.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

DEPTH = 100
WAYS = {"scale": ["stage"], "ways": ["stage", "broadcast", "join"], "skew": ["job"]}
FILES = 8

STAGE = """
import json, sys, time
import ray, logging
from batch_rerank.config import parse_config
from batch_rerank.job.staging import stage
folder = sys.argv[1]
ray.init(address="local", num_cpus=int(sys.argv[2]), include_dashboard=False, log_to_driver=False,
         logging_level=logging.ERROR)
print("idle", flush=True); input()
started = time.monotonic()
config = parse_config({
    "input": {"layout": "run", "run": f"{folder}/run", "queries": f"{folder}/queries.parquet",
              "corpus": f"{folder}/corpus"},
    "output": {"path": f"{folder}/out"}, "model": {"name": "none", "kind": "checksum"},
    "cluster": {"gpus_per_actor": 0}}, "benchmark")
found = stage(config)
if sys.argv[3] == "job":
    from batch_rerank.job.run import run
    from pathlib import Path
    staged = time.monotonic() - started
    summary = run(config)
    parts = sorted(Path(f"{folder}/out/_manifest/receipts").iterdir(), key=lambda path: path.stat().st_mtime)
    receipts = [json.loads(path.read_text()) for path in parts]
    place = next(index for index, receipt in enumerate(receipts) if receipt["rows_in"] >= 100_000)
    print(json.dumps({"stage_s": staged, "job_s": summary.seconds, "pairs": summary.pairs, "units": summary.units,
                      "largest_unit": receipts[place]["rows_in"], "units_that_finished_before_it": place}))
    raise SystemExit
print(json.dumps({"seconds": time.monotonic() - started, "candidates": found.counts["candidates"],
                  "shards": found.shards}))
"""

IDS = """
import json, sys, time
from batch_rerank.input.join import join_run
from batch_rerank.input.sources import find_source
from batch_rerank.input.spill import Spill
folder, shuffled = sys.argv[1], sys.argv[2]
given = {"run": f"{folder}/{shuffled}", "queries": f"{folder}/queries.parquet", "corpus": f"{folder}/corpus.parquet"}
sources = [find_source(kind, [path], {}, {}) for kind, path in given.items()]
kib = lambda name: int(open("/proc/self/status").read().split(name + ":")[1].split()[0])
peak = lambda: 1024 * kib("VmHWM")  # not ru_maxrss, which begins with what the parent held
before, started, cpu = peak(), time.monotonic(), time.process_time()
with Spill() as spill:
    join = join_run(*sources, None, 0.0, {}, spill)
print(json.dumps({"seconds": time.monotonic() - started, "cpu_seconds": time.process_time() - cpu,
                  "peak_mib": (peak() - before) / 2**20, "spilled_mib": spill.bytes / 2**20,
                  "candidates": join.counts["candidates"]}))
"""

JOIN = """
import json, sys, time
import ray, logging
folder, way = sys.argv[1], sys.argv[3]
logging.getLogger("ray.data").setLevel(logging.ERROR)
ray.init(address="local", num_cpus=int(sys.argv[2]), include_dashboard=False, log_to_driver=False,
         logging_level=logging.ERROR)
print("idle", flush=True); input()
started = time.monotonic()
run = ray.data.read_parquet(f"{folder}/run")
if way == "join":
    corpus = ray.data.read_parquet(f"{folder}/corpus")
    joined = run.join(corpus, join_type="left_outer", num_partitions=32, on=("doc_id",), right_on=("doc_id",))
else:
    import pyarrow.parquet as pq, pyarrow.compute as pc
    corpus = ray.put(pq.read_table(f"{folder}/corpus").combine_chunks())
    def look_up(batch, corpus):
        corpus = ray.get(corpus)
        rows = pc.index_in(batch["doc_id"], value_set=corpus["doc_id"])
        return batch.append_column("text", corpus["text"].take(rows))
    joined = run.map_batches(look_up, batch_format="pyarrow", batch_size=50_000,
                             fn_kwargs={"corpus": corpus})
joined.sort("query_id").write_parquet(f"{folder}/out-{way}")
print(json.dumps({"seconds": time.monotonic() - started}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["scale", "ways", "join", "text", "skew"])
    parser.add_argument("--documents", type=int)
    parser.add_argument("--candidates", type=int, nargs="+")
    parser.add_argument("--dir", help="where the data goes; a temporary directory if not given")
    args = parser.parse_args()
    if args.what == "text":
        carry_text()
        return
    large = args.what in ("scale", "join")
    documents = args.documents or (2_000_000 if large else 200_000)
    sizes = args.candidates or ([1_000_000, 3_000_000, 10_000_000] if large else [1_000_000])
    if args.what == "join":
        print(json.dumps(join_ids(documents, sizes, args.dir)))
        return
    result: dict[str, Any] = {"benchmark": f"stage {args.what}", "cores": os.cpu_count(), "documents": documents}
    with tempfile.TemporaryDirectory(dir=args.dir) as name:
        folder = Path(name)
        write_corpus(folder / "corpus", documents)
        result["corpus_mib"] = round(sum(file.stat().st_size for file in (folder / "corpus").iterdir()) / 2**20)
        for size in sizes:
            if args.what == "skew":
                write_skewed_run(folder, documents, size)
            else:
                write_run(folder, documents, size)
            for way in WAYS[args.what]:
                seen = measure(folder, way)
                result[f"{way}_{size}_candidates"] = seen
                print(f"{way}: {size:,} candidates: {seen}", flush=True)
                for output in folder.glob("out*"):
                    shutil.rmtree(output)
    print(json.dumps(result))


def join_ids(documents: int, sizes: list[int], place: str | None) -> dict[str, Any]:
    """Seconds and memory of the driver's join: a run in order, and the same rows shuffled without ranks."""
    result: dict[str, Any] = {"benchmark": "stage join", "cores": os.cpu_count(), "documents": documents}
    peaks: dict[str, list[float]] = {"ordered": [], "shuffled": []}
    with tempfile.TemporaryDirectory(dir=place) as name:
        folder = Path(name)
        names = pa.array([f"document-{i}" for i in range(documents)])
        pq.write_table(pa.table({"doc_id": names, "text": names}), folder / "corpus.parquet")
        for size in sizes:
            random = np.random.default_rng(1)
            queries = pa.array([f"query-{q}" for q in range(size // DEPTH)])
            pq.write_table(pa.table({"query_id": queries, "query": queries}), folder / "queries.parquet")
            first = random.integers(0, documents, len(queries))
            order = random.permutation(size).astype(np.int32)
            write_ids(folder / "ordered.parquet", names, queries, first, None)
            write_ids(folder / "shuffled.parquet", names, queries, first, order)
            del order
            for way, seen in peaks.items():
                command = [sys.executable, "-c", IDS, name, f"{way}.parquet"]
                found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
                seen.append(found["peak_mib"])
                result[f"{way}_{size}_candidates"] = {key: round(value, 1) for key, value in found.items()}
                print(way, found, flush=True)
    if len(sizes) > 1:
        for way, seen in peaks.items():
            result[f"{way}_bytes_a_candidate"] = round((seen[-1] - seen[0]) * 2**20 / (sizes[-1] - sizes[0]))
    return result


def write_ids(path: Path, names: pa.Array, queries: pa.Array, first: Any, order: Any) -> None:
    """A run of ids, a row group at a time: in order with ranks, or its rows in another order without them."""
    with ExitStack() as stack:
        out = None
        for start in range(0, len(first) * DEPTH, 2**20):
            row = np.arange(start, min(start + 2**20, len(first) * DEPTH))
            row = row if order is None else order[row]
            query, position = np.divmod(row, DEPTH)
            table = pa.table(
                {
                    "query_id": queries.take(query),
                    "doc_id": names.take((first[query] + position.astype(np.int64) * 7919) % len(names)),
                    "score": (20 - position / 10).astype(np.float32),
                }
            )
            if order is None:
                table = table.append_column("rank", pa.array((position + 1).astype(np.int32)))
            out = out or stack.enter_context(pq.ParquetWriter(path, table.schema))
            out.write_table(table)


def carry_text() -> None:
    """Bytes of a shard, and seconds to write it and to read it whole, for three ways to carry its texts."""
    result: dict[str, Any] = {"benchmark": "stage text", "cores": os.cpu_count(), "candidates": 50_000}
    with tempfile.TemporaryDirectory() as name:
        write_corpus(Path(name) / "corpus", 50_000)
        texts = pq.read_table(Path(name) / "corpus")["text"].combine_chunks().cast(pa.large_string())
        for documents in (50_000, 5_000, 500):
            index = pa.array(np.random.default_rng(0).integers(0, documents, 50_000), pa.int32())
            once = pa.DictionaryArray.from_arrays(index, texts[:documents])
            ways: dict[str, dict[str, pa.Array]] = {
                "a candidate": {"0": once.cast(pa.large_string())},
                "a document, dictionary": {"0": once},
                "a document, second file": {"0": index, "1": texts[:documents]},
            }
            for way, columns in ways.items():
                result[f"once {way}, {documents} documents"] = timed(Path(name), columns)
    print(json.dumps(result))


def timed(folder: Path, columns: dict[str, pa.Array]) -> dict[str, float]:
    started = time.monotonic()
    for name, column in columns.items():
        ids = pa.array([f"document-{i}" for i in range(len(column))])
        value: Any = pa.StructArray.from_arrays([ids, column], names=["doc_id", "text"])
        if name == "0":
            value = pa.ListArray.from_arrays(pa.array(range(0, 50_001, 100), pa.int32()), value)
        table = pa.table({"candidates": value})
        pq.write_table(table, folder / name, compression="zstd", dictionary_pagesize_limit=2**30)
    written = time.monotonic()
    held = sum(pq.read_table(folder / name).nbytes for name in columns)
    return {
        "mib": round(sum((folder / name).stat().st_size for name in columns) / 2**20, 1),
        "write_s": round(written - started, 2),
        "read_s": round(time.monotonic() - written, 2),
        "held_mib": round(held / 2**20, 1),
    }


def write_corpus(folder: Path, documents: int) -> None:
    """1 KB texts that compress by about a half, as real ones do."""
    folder.mkdir()
    random = np.random.default_rng(0)
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz      ", np.uint8)
    for file in range(FILES):
        ids = range(file * documents // FILES, (file + 1) * documents // FILES)
        with pq.ParquetWriter(
            folder / f"{file}.parquet", pa.schema([("doc_id", pa.string()), ("text", pa.string())])
        ) as out:
            for start in range(ids.start, ids.stop, 20_000):
                here = range(start, min(start + 20_000, ids.stop))
                data = letters[random.integers(0, len(letters), len(here) * 1024)]
                offsets = pa.py_buffer(np.arange(0, len(data) + 1, 1024, dtype=np.int32))
                text = pa.StringArray.from_buffers(len(here), offsets, pa.py_buffer(data))
                out.write_table(pa.table({"doc_id": [f"document-{i}" for i in here], "text": text}))


def write_run(folder: Path, documents: int, candidates: int) -> None:
    """Queries and their candidates, and a fresh place for both."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    (folder / "run").mkdir()
    random = np.random.default_rng(1)
    queries = candidates // DEPTH
    pq.write_table(
        pa.table(
            {"query_id": [f"query-{q}" for q in range(queries)], "query": [f"what is {q}" for q in range(queries)]}
        ),
        folder / "queries.parquet",
    )
    step = 5000
    for number, first in enumerate(range(0, queries, step)):
        here = min(step, queries - first)
        popular = random.integers(0, documents // 100, (here, DEPTH // 10))
        rest = random.integers(0, documents, (here, DEPTH - DEPTH // 10))
        chosen = np.concatenate([popular, rest], axis=1)
        for row in chosen:  # each document once per query
            while len(set(row)) < DEPTH:
                row[:] = random.choice(documents, DEPTH, replace=False)
        pq.write_table(
            pa.table(
                {
                    "query_id": [f"query-{q}" for q in np.repeat(np.arange(first, first + here), DEPTH)],
                    "doc_id": [f"document-{d}" for d in chosen.ravel()],
                    "score": np.tile(np.linspace(20, 10, DEPTH, dtype=np.float32), here),
                }
            ),
            folder / "run" / f"{number:05d}.parquet",
        )


def write_skewed_run(folder: Path, documents: int, candidates: int) -> None:
    """Queries of ten candidates, and in their middle one of 100,000."""
    (folder / "run").mkdir()
    random = np.random.default_rng(1)
    queries = candidates // 10
    names = [f"query-{q}" for q in range(queries)]
    first = random.integers(0, documents - 10, queries)
    many = np.repeat(np.arange(queries), 10)
    half = len(many) // 2
    chosen = (first[many] + np.tile(np.arange(10), queries)).tolist()
    ids = [names[q] for q in many]
    table = {
        "query_id": ids[:half] + ["huge"] * 100_000 + ids[half:],
        "doc_id": [f"document-{d}" for d in chosen[:half] + list(range(100_000)) + chosen[half:]],
    }
    pq.write_table(pa.table(table), folder / "run" / "0.parquet")
    every = [*names, "huge"]
    pq.write_table(pa.table({"query_id": every, "query": every}), folder / "queries.parquet")


def measure(folder: Path, way: str) -> dict[str, Any]:
    """Seconds and peak memory of one way, in a process of its own."""
    script = STAGE if way in ("stage", "job") else JOIN
    command = [sys.executable, "-c", script, str(folder), str(os.cpu_count()), way]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdin and process.stdout and process.stderr
    peaks: list[float] = []
    done = threading.Event()
    errors: list[str] = []
    threading.Thread(target=lambda: errors.append(process.stderr.read()), daemon=True).start()
    assert process.stdout.readline().strip() == "idle", errors
    time.sleep(3)
    idle = _memory(process.pid)

    def watch() -> None:
        while not done.wait(1.0):
            peaks.append(_memory(process.pid))

    thread = threading.Thread(target=watch)
    thread.start()
    process.stdin.write("\n")
    process.stdin.flush()
    lines = process.stdout.read().strip().splitlines()
    process.wait()
    done.set()
    thread.join()
    if process.returncode:
        return {"failed": (errors or [""])[0].strip().splitlines()[-1:]}
    result = json.loads(lines[-1])
    out = sum(file.stat().st_size for place in folder.glob("out*") for file in place.rglob("*.parquet"))
    return {
        **{key: round(value, 1) if isinstance(value, float) else value for key, value in result.items()},
        "peak_mib_above_idle": round((max(peaks, default=idle) - idle) / 2**20),
        "output_mib": round(out / 2**20),
    }


def _memory(pid: int) -> float:
    """Bytes that a process and all it started hold: private ones, and shared ones once."""
    total = 0.0
    for one in _family(pid):
        try:
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def _family(pid: int) -> set[int]:
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
    family = {pid}
    while True:
        more = {one for one, parent in parents.items() if parent in family} - family
        if not more:
            return family
        family |= more


if __name__ == "__main__":
    main()
