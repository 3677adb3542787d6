"""Every way that a score is computed, against float32: tiny random models of every kind, written to a folder that goes
away again, and a token budget that memory is too small for."""

import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from gpu_device import Record, has_float8, limit_memory, short

from batch_rerank.engine import decoder
from batch_rerank.engine.attention import Kernel
from batch_rerank.engine.checkpoint import ModelSpec, resolve_model
from batch_rerank.engine.encoded import Encoded, Group
from batch_rerank.engine.encoding import make_encoder
from batch_rerank.engine.packing import Float32
from batch_rerank.engine.reference import Reference
from batch_rerank.engine.scorer import make_scorer

DOCUMENT_FIRST = {"middle": "{document}\nQuery: {query}", "suffix": "<|im_end|>", "true_token": "yes"}
KINDS: dict[str, tuple[str, Any]] = {  # builder in tests/checkpoints.py, template
    "qwen3": ("qwen3_reranker", "auto"),
    "document first": ("qwen3_reranker", DOCUMENT_FIRST),
    "qwen2": ("qwen2_reranker", "mxbai-rerank-v2"),
    "gemma": ("gemma_reranker", "bge-reranker-v2-gemma"),
    "decoder with a head": ("qwen3_seq_cls", "qwen3-reranker"),
    "xlm-r": ("xlmr_reranker", "auto"),
    "bert": ("bert_reranker", "auto"),
    "gte": ("gte_reranker", "auto"),
    "bi-encoder, last": ("qwen3_embedding", "auto"),
    "bi-encoder, mean": ("bert_embedding", "auto"),
}
SMALL = ("document first", "xlm-r", "bi-encoder, last")
GROUPS = [  # many, one, two of them empty
    Group("where is Paris?", [f"{i} Paris river " * (1 + i % 7) for i in range(20)]),
    Group("one", ["alone"]),
    Group("where is Москва?", ["Москва " * 150, "x", "x", ""]),
]
TOKENS = 500
"""Of a batch, so that the groups fall into several."""


def parity(record: Record, device: str, small: bool) -> None:
    """Scores of each kind on each path. Tolerances are the self-test's."""
    builders, passed = _builders(), True
    for name in SMALL if small else KINDS:
        found: dict[str, Any] = {}
        try:
            for path, verdict in _paths_of(name, builders, device):
                found[path] = verdict
                passed &= verdict["passed"]
        except Exception as error:  # the other kinds are still to be seen
            found["error"] = f"{type(error).__name__}: {str(error)[:500]}"
            passed = False
        record(**{name: found})
    record(passed=passed)


def _paths_of(name: str, builders: ModuleType, device: str) -> Iterator[tuple[str, dict[str, Any]]]:
    builder, template = KINDS[name]
    with tempfile.TemporaryDirectory() as directory:
        path = getattr(builders, builder)(Path(directory))
        if getattr(builders, "ENCODER", {}).get("num_attention_heads") and builder.startswith(("xlmr", "bert", "gte")):
            builders.rewrite(path / "config.json", num_attention_heads=2)  # heads of 24: GPUs take multiples of 8
        specs = {d: resolve_model(str(path), template=template, dtype=d) for d in ("float32", "bfloat16")}
        encoded = make_encoder(specs["float32"]).encode(GROUPS)
        network = make_scorer(specs["float32"], "cpu", TOKENS, "padded").network
        assert network is not None
        pairs = [(group.query, document) for group in GROUPS for document in group.documents]
        exact = Reference(specs["float32"], network).scores(pairs)
        for dtype, spec in specs.items():
            for label, score in _paths(spec, encoded, device).items():
                yield f"{dtype}, {label}", _verdict(spec, score, exact)
        if specs["float32"].causal is not None and has_float8(device):
            yield "float8, packed", _float8(replace(specs["bfloat16"], dtype="float8"), encoded, device, exact)


def _paths(spec: ModelSpec, encoded: Encoded, device: str) -> dict[str, Callable[[], tuple[Float32, str]]]:
    """Ways to score, by name. Each gives scores and the attention that computed them."""

    def with_(change: Callable[[Any], None] | None, forward: Any = "auto") -> Callable[[], tuple[Float32, str]]:
        def score() -> tuple[Float32, str]:
            scorer: Any = make_scorer(spec, device, TOKENS, forward)
            if change:
                change(scorer._model)
            packed = getattr(scorer._model, "_decoder", None) or getattr(scorer._model, "_encoder", None)
            return scorer.score(encoded), packed._kernel.name if packed else "padded"

        return score

    def plain(model: Any) -> None:
        (getattr(model, "_decoder", None) or model._encoder)._kernel = Kernel("plain")

    def fused(wanted: bool) -> Callable[[Any], None]:
        def change(model: Any) -> None:
            model._decoder = decoder.Packed(model.model.base_model, device, fused=wanted)

        return change

    paths = {"padded": with_(None, "padded"), "packed": with_(None, "packed"), "plain attention": with_(plain)}
    if spec.causal is not None or spec.pooling == "last":
        paths |= {"kernels fused": with_(fused(True)), "kernels not fused": with_(fused(False))}
    return paths


def _verdict(spec: ModelSpec, score: Callable[[], tuple[Float32, str]], exact: Float32) -> dict[str, Any]:
    """docs/decisions.md: float32 to 1e-4 of the score's size; bfloat16 to 0.25, of cosines to 0.05."""
    try:
        scores, attention = score()
    except Exception as error:  # one path that raises is one finding
        return {"passed": False, "error": f"{type(error).__name__}: {str(error)[:500]}"}
    difference = np.abs(scores - exact)
    cosine = spec.kind == "bi_encoder"
    if spec.dtype == "float32":
        difference, most, mean = difference / np.maximum(1, np.abs(exact)), 1e-4, 1e-4
    else:
        most, mean = (0.05, 0.02) if cosine else (0.25, 0.1)
    passed = bool(np.isfinite(scores).all() and difference.max() <= most and difference.mean() <= mean)
    figures = {"largest": short(float(difference.max())), "mean": short(float(difference.mean()))}
    return {"passed": passed, "attention": attention, **figures, "allowed": most, "spread": short(float(np.ptp(exact)))}


def _float8(spec: ModelSpec, encoded: Encoded, device: str, exact: Float32) -> dict[str, Any]:
    """As near to float32 as the CPU's plain operations on the same rounded numbers: random weights bear no limit."""
    try:
        scores, emulated = (make_scorer(spec, on, TOKENS).score(encoded) for on in (device, "cpu"))
    except Exception as error:
        return {"passed": False, "error": f"{type(error).__name__}: {str(error)[:500]}"}
    ours, plain = np.abs(scores - exact), np.abs(emulated - exact)
    return {
        "passed": bool(np.isfinite(scores).all() and ours.mean() <= 1.5 * plain.mean()),
        "largest": short(float(ours.max())),
        "mean": short(float(ours.mean())),
        "emulated_mean": short(float(plain.mean())),
        "spread": short(float(np.ptp(exact))),
    }


def halving(record: Record, device: str, small: bool) -> None:
    """A token budget far above the memory that there is: it must go down, and the scores must be the same."""
    builders = _builders()
    with tempfile.TemporaryDirectory() as directory:
        spec = resolve_model(str(builders.qwen3_reranker(Path(directory))), dtype="bfloat16")
        queries = 2 if small else 60
        groups = [Group(f"where is {q}?", [f"{q} river {i} " * 12 for i in range(50)]) for q in range(queries)]
        encoded = make_encoder(spec).encode(groups)
        expected = make_scorer(spec, device, 4096).score(encoded)
        budget = int(encoded.n_tokens.sum())
        scorer: Any = make_scorer(spec, device, budget)
        model, compute = scorer._model, scorer._model.scores
        limit_memory(device, 128 * 2**20)
        if device != "cuda":  # no limit can be set there: memory runs out by word of mouth
            model.scores = lambda given, pairs: compute(given, _fitting(given, pairs, budget // 5))
        scores = scorer.score(encoded)
        limit_memory(device, None)
        tokens = scorer._budget.tokens
    difference = float(np.abs(scores - expected).max())
    record(asked_tokens=budget, tokens_at_the_end=tokens, halvings=int(np.log2(budget / max(1, tokens)) + 0.5))
    record(largest_difference=short(difference), passed=bool(tokens < budget and difference <= 0.1))


def _fitting(encoded: Encoded, pairs: Any, tokens: int) -> Any:
    if int(encoded.n_tokens[pairs].sum()) > tokens:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return pairs


def _builders() -> ModuleType:
    """tests/checkpoints.py of this checkout."""
    path = Path(__file__).resolve().parent.parent / "tests" / "checkpoints.py"
    spec = importlib.util.spec_from_file_location("checkpoints", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
