"""The engine against sentence-transformers on the same weights, in the same process, without Ray.

    python benchmarks/engine.py                                                all rows, on the CPU
    python benchmarks/engine.py causal passages --repeats 5
    python benchmarks/engine.py causal --device cuda --shape qwen3-reranker-8b

Weights are random, of the shape that is named; texts and vocabulary are real where DATA (a folder of BEIR collections)
and TOKENIZER (a folder with Qwen's tokenizer.json) are given, else they are made from this machine's standard library.
Runs of both sides alternate, CrossEncoder with the fastest of several batch sizes; scores are compared in the same run;
figures are medians of the repeats. Ends with one JSON line.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine_models import SHAPES, build_causal, build_embedding, build_encoder, linear_flop, train_tokenizer
from sentence_transformers import CrossEncoder, SentenceTransformer

from batch_rerank import Reranker
from batch_rerank.demo import standard_library
from batch_rerank.engine.encoded import Group
from batch_rerank.engine.encoding import make_encoder
from batch_rerank.engine.linear import linear

BATCH_SIZES = (8, 16, 32, 64)
CUT = 512
Pairs = list[tuple[str, str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], help="all if none")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="float32 on CPUs, bfloat16 on GPUs")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--queries", type=int, default=2, help="of 100 candidates each")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--data", default=os.environ.get("DATA"))
    parser.add_argument("--tokenizer", default=os.environ.get("TOKENIZER"))
    parser.add_argument("--token-budget", type=int)
    options = parser.parse_args()
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {"benchmark": "engine", **card(options)}
    print("\n".join(f"{key}: {value}" for key, value in result.items()))
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        if not options.tokenizer:
            options.tokenizer = str(train_tokenizer(root / "tokenizer", [f.code for f in standard_library()]))
        for name in options.rows or ROWS:
            if name == "bf16" and options.device == "cuda":
                continue
            result[name] = ROWS[name](options, root / name)
            print(name, json.dumps(result[name]))
    print(json.dumps(result))


def card(options: argparse.Namespace) -> dict[str, Any]:
    import sentence_transformers
    import transformers

    gpu = torch.cuda.get_device_name() if options.device == "cuda" else None
    return {
        "machine": gpu or platform.processor() or platform.machine(),
        "device": options.device,
        "dtype": options.dtype,
        "shape": options.shape,
        "threads": options.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "sentence_transformers": sentence_transformers.__version__,
        "data": "BEIR collections" if options.data else "standard library",
    }


def causal(options: argparse.Namespace, directory: Path, collection: str = "cosqa", cut: int = 8192) -> dict[str, Any]:
    """Candidates of CoSQA: 100 functions of 65 tokens a query."""
    build_causal(directory, SHAPES[options.shape], options.tokenizer, options.device)
    return against_cross_encoder(options, directory, pairs_of(options, collection), cut)


def passages(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Passages of MedQuAD, 233 tokens when the pair is cut at 512."""
    return causal(options, directory, "medquad-liveqa-gov", CUT)


def encoder(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """A cross-encoder of XLM-R's shape over CoSQA."""
    build_encoder(directory, SHAPES[options.shape], options.tokenizer, options.device)
    return against_cross_encoder(options, directory, pairs_of(options, "cosqa"), CUT)


def against_cross_encoder(options: argparse.Namespace, directory: Path, pairs: Pairs, cut: int) -> dict[str, Any]:
    kinds = {"max_length": cut, "device": options.device, "dtype": options.dtype}
    ours = Reranker(str(directory), **kinds, token_budget=options.token_budget)
    theirs = CrossEncoder(
        str(directory),
        device=options.device,
        max_length=cut,
        model_kwargs={"dtype": options.dtype},
        activation_fn=torch.nn.Identity(),
        local_files_only=True,
    )
    sample = pairs[:100]
    trials = [
        (seconds(lambda s=size: theirs.predict(sample, batch_size=s), options.device), size) for size in BATCH_SIZES
    ]
    best = min(trials)[1]
    ours.score(sample)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    compared = alternate(options, lambda: ours.score(pairs), lambda: theirs.predict(pairs, batch_size=best))
    difference = np.abs(ours.score(pairs) - theirs.predict(pairs, batch_size=best))
    work = executed(ours, pairs, options)
    rate = work["linear_flop"] / compared["our_seconds"]
    ceiling = matmul_rate(options)
    peak = {"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if options.device == "cuda" else {}
    return {
        "pairs": len(pairs),
        "pairs_per_s": round(len(pairs) / compared["our_seconds"], 2),
        "cross_encoder_pairs_per_s": round(len(pairs) / compared["their_seconds"], 2),
        "cross_encoder_batch_size": best,
        "times_as_fast": round(compared["their_seconds"] / compared["our_seconds"], 3),
        "spread": compared["spread"],
        "tokens_per_pair": round(work["tokens"] / len(pairs), 1),
        "computed_tokens": work["computed"],
        "computed_tokens_per_s": round(work["computed"] / compared["our_seconds"]),
        "share_of_matmul_rate": round(rate / ceiling, 3),
        "matmul_gflops": round(ceiling / 1e9),
        "largest_difference": float(f"{difference.max():.2g}"),
        "tokenising_share": round(work["tokenising_seconds"] / compared["our_seconds"], 4),
        **peak,
    }


def bi_encoder(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """A bi-encoder over CoSQA, all queries with 20 candidates: documents repeat between queries."""
    build_embedding(directory, SHAPES[options.shape], options.tokenizer, options.device)
    pairs = pairs_of(options, "cosqa", queries=40 * options.queries, depth=20)
    kinds = {"max_length": CUT, "device": options.device, "dtype": options.dtype}
    theirs = SentenceTransformer(
        str(directory), device=options.device, model_kwargs={"dtype": options.dtype}, local_files_only=True
    )
    theirs.max_seq_length = CUT
    ours = Reranker(str(directory), **kinds)
    queries, documents = list(dict.fromkeys(q for q, _ in pairs)), [d for _, d in pairs]

    def reference() -> Any:
        vectors = dict(zip(queries, theirs.encode(queries, batch_size=32), strict=True))
        return np.einsum("nd,nd->n", theirs.encode(documents, batch_size=32), np.stack([vectors[q] for q, _ in pairs]))

    def fresh() -> Any:
        ours._scorer._cache.clear()
        return ours.score(pairs)

    compared = alternate(options, fresh, reference)
    return {
        "pairs": len(pairs),
        "distinct_documents": len(set(documents)),
        "pairs_per_s": round(len(pairs) / compared["our_seconds"], 2),
        "sentence_transformer_pairs_per_s": round(len(pairs) / compared["their_seconds"], 2),
        "times_as_fast": round(compared["their_seconds"] / compared["our_seconds"], 3),
        "times_by_repeats_alone": round((len(pairs) + len(queries)) / (len(set(documents)) + len(queries)), 3),
        "spread": compared["spread"],
        "largest_difference": float(f"{np.abs(fresh() - reference()).max():.2g}"),
    }


def bf16(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Bfloat16 against float32, both ours, on the CPU."""
    build_causal(directory, SHAPES[options.shape], options.tokenizer, options.device)
    pairs = pairs_of(options, "cosqa")
    half, full = (Reranker(str(directory), device="cpu", dtype=dtype) for dtype in ("bfloat16", "float32"))
    compared = alternate(options, lambda: half.score(pairs), lambda: full.score(pairs))
    difference = np.abs(half.score(pairs) - full.score(pairs))
    return {
        "times_as_fast": round(compared["their_seconds"] / compared["our_seconds"], 3),
        "spread": compared["spread"],
        "largest_difference": float(f"{difference.max():.3g}"),
        "mean_difference": float(f"{difference.mean():.3g}"),
    }


def memory(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Peak memory of scoring one query with 100 and with 10,000 candidates, each in a process of its own."""
    build_causal(directory, SHAPES["tiny"], options.tokenizer, "cpu")
    peaks = {}
    for candidates in (100, 10_000):
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(directory), str(candidates), options.device],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks[f"peak_mib_at_{candidates}_candidates"] = round(float(done.stdout.split()[-1]))
    return peaks


CHILD = """
import resource, sys
from batch_rerank import Reranker
ours = Reranker(sys.argv[1], device=sys.argv[3])
ours.score([("what is it?", f"candidate {i} " * 20) for i in range(int(sys.argv[2]))])
if sys.argv[3] == "cuda":
    import torch
    print(torch.cuda.max_memory_allocated() / 2**20)
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""

ROWS: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {
    "causal": causal,
    "passages": passages,
    "encoder": encoder,
    "bi_encoder": bi_encoder,
    "bf16": bf16,
    "memory": memory,
}


def pairs_of(options: argparse.Namespace, collection: str, queries: int | None = None, depth: int = 100) -> Pairs:
    """Queries with `depth` documents each: the run's, filled up at random (fixed seed) where the run is shallower."""
    queries = queries or options.queries
    rng = random.Random(0)
    if not options.data:
        found = list(standard_library())
        return [(f.summary, d.code) for f in rng.sample(found, queries) for d in rng.sample(found, depth)]
    root = Path(options.data) / collection
    texts = {name: dict(_texts(root / f"{name}.jsonl")) for name in ("queries", "corpus")}
    run: dict[str, list[str]] = {}
    for line in (root / "bm25.top100.run").read_text().splitlines():
        query_id, _, doc_id, *_ = line.split()
        run.setdefault(query_id, []).append(doc_id)
    chosen = rng.sample(sorted(run), min(queries, len(run)))
    pairs = []
    for query in chosen:
        more = [doc for doc in rng.sample(sorted(texts["corpus"]), depth) if doc not in run[query]]
        pairs += [(texts["queries"][query], texts["corpus"][doc]) for doc in (run[query] + more)[:depth]]
    return pairs


def _texts(path: Path) -> list[tuple[str, str]]:
    rows = map(json.loads, path.read_text().splitlines())
    return [(row["_id"], f"{row.get('title') or ''} {row['text']}".strip()) for row in rows]


def executed(ours: Reranker, pairs: Pairs, options: argparse.Namespace) -> dict[str, Any]:
    """What the engine computed: tokens of the pairs, tokens that went through the layers, FLOP of their matrices."""
    by_query: dict[str, list[str]] = {}
    for query, document in pairs:
        by_query.setdefault(query, []).append(document)
    encoder = make_encoder(ours.spec)
    started = time.perf_counter()
    encoded = encoder.encode([Group(query, documents) for query, documents in by_query.items()])
    tokenising = time.perf_counter() - started
    model, budget = ours._scorer._model, ours._scorer._budget
    packs = list(model.split(encoded, np.arange(len(pairs)), budget.tokens))
    prefixes = np.diff(encoded.offsets)[encoded.prefix]
    group = encoded.group_of_pair()
    shared = sum(int(prefixes[np.unique(group[p])].sum()) for p in packs) if ours.spec.kind == "causal" else 0
    own = encoded.n_tokens - prefixes[group] if ours.spec.kind == "causal" else encoded.n_tokens
    computed = shared + int(own.sum())
    flop = linear_flop(model.model.config, computed, len(pairs), trimmed=ours.spec.kind == "causal")
    tokens = int(encoded.n_tokens.sum())
    return {"tokens": tokens, "computed": computed, "linear_flop": flop, "tokenising_seconds": tokenising}


def matmul_rate(options: argparse.Namespace) -> float:
    """FLOP/s of a large matrix product in this dtype, the best of several sizes and tries."""
    rates = []
    for size in (1024, 2048) if options.device == "cpu" else (4096, 8192):
        a = torch.randn(size, size, device=options.device, dtype=getattr(torch, options.dtype))
        for call in (lambda a=a: a @ a, lambda a=a: linear(a, (a, None))):  # on CPUs: MKL and oneDNN
            rates += [2 * size**3 / seconds(call, options.device) for _ in range(10)]
    return max(rates)


def alternate(options: argparse.Namespace, ours: Callable[[], Any], theirs: Callable[[], Any]) -> dict[str, Any]:
    times = [(seconds(ours, options.device), seconds(theirs, options.device)) for _ in range(options.repeats)]
    our_seconds, their_seconds = (statistics.median(column) for column in zip(*times, strict=True))
    ratios = [theirs / ours for ours, theirs in times]
    spread = [round(min(ratios), 3), round(max(ratios), 3)]
    return {"our_seconds": our_seconds, "their_seconds": their_seconds, "spread": spread}


def seconds(call: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
