"""The card, the ceilings that a device reaches with plain products and copies, and how near the kernels come."""

import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch
import transformers
from engine_models import SHAPES
from gpu_device import Record, kernel_seconds, properties, short

from batch_rerank.engine import kernels
from batch_rerank.engine.attention import Cuts, attend, kernel_for

NAMES = {"0.6b": "qwen3-reranker-0.6b", "4b": "qwen3-reranker-4b", "8b": "qwen3-reranker-8b"}
PREFIX, OWN = 105, {65: 76, 233: 244}
"""Tokens before a document, and of a document with what follows it, for documents of 65 and 233 tokens."""


def card(record: Record, device: str, small: bool) -> None:
    """The machine, and what each step will have to do. Nothing is measured."""
    installed = {name: _version(name) for name in ("triton", "sentence_transformers")}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, **installed}
    record(**properties(device), **versions, work={name: _work(SHAPES[full]) for name, full in NAMES.items()})


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _work(shape: tuple[Any, ...]) -> dict[str, Any]:
    """Of one token in one layer: FLOP of its matrices, bytes between them by the passes of kernels.py in bfloat16; and
    of all layers, the weights' bytes."""
    layers, hidden, heads, kv_heads, dim, inner, _ = shape
    weights = hidden * dim * (2 * heads + 2 * kv_heads) + 3 * hidden * inner
    moved = _moved(hidden, heads, kv_heads, dim, inner)
    flop = {str(tokens): short(2.0 * weights * layers * own) for tokens, own in OWN.items()}
    return {
        "flop_per_token_and_layer": 2 * weights,
        "flop_per_document": flop,
        "weights_gib": round(2 * weights * layers / 2**30, 2),
        "bytes_per_token_and_layer": moved,
    }


def _moved(hidden: int, heads: int, kv_heads: int, dim: int, inner: int) -> dict[str, int]:
    """Bytes that each kernel reads and writes for one token in bfloat16: `rotate_`, `add_norm_`, `swiglu`, `merge`."""
    return {
        "rotate": 2 * (2 * (heads + kv_heads) * dim + 2 * dim),
        "add_norm": 2 * 4 * hidden,
        "swiglu": 2 * 3 * inner,
        "merge": 2 * 3 * heads * dim + 4 * 2 * heads,
    }


def ceilings(record: Record, device: str, small: bool) -> None:
    """FLOP/s of bfloat16 products in the shapes' own sizes, and bytes/s read and written by a copy."""
    tokens = 64 if small else 16384
    rates = {}
    for name, full in NAMES.items():
        _, hidden, heads, kv_heads, dim, inner, _ = (n // 16 if small else n for n in SHAPES[full])
        qkv = (heads + 2 * kv_heads) * dim
        for what, (k, n) in {"qkv": (hidden, qkv), "gate_up": (hidden, 2 * inner), "down": (inner, hidden)}.items():
            rates[f"{name} {what} K={k} N={n}"] = short(matrix_rate(device, small, tokens, k, n) / 1e12)
    rates["square"] = short(best_matrix_rate(device, small) / 1e12)
    record(matrix_tflops=rates, best_matrix_tflops=max(rates.values()), copy_gb_per_s=short(copy_rate(device, small)))


def best_matrix_rate(device: str, small: bool) -> float:
    """FLOP/s, the best of large products: what shares are counted against."""
    sizes = ((128, 128, 128),) if small else ((8192, 8192, 8192), (16384, 4096, 24576), (16384, 4096, 4096))
    return max(matrix_rate(device, small, *size) for size in sizes)


def matrix_rate(device: str, small: bool, m: int, k: int, n: int) -> float:
    """FLOP/s of [m, k] @ [n, k].T in bfloat16."""
    a, b = (torch.randn(rows, k, device=device, dtype=torch.bfloat16) for rows in (m, n))
    out = torch.empty(m, n, device=device, dtype=torch.bfloat16)
    return 2 * m * k * n / kernel_seconds(lambda: torch.mm(a, b.T, out=out), device, small)


def copy_rate(device: str, small: bool) -> float:
    """GB/s, read and written."""
    source = torch.empty(2**20 if small else 2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * len(source) / 1e9 / kernel_seconds(lambda: target.copy_(source), device, small)


def kernel_rates(record: Record, device: str, small: bool) -> None:
    """GB/s of each kernel beside the copy's, and TFLOP/s of attention (products of real pairs only, each once)."""
    tokens = 64 if small else 32768
    ceiling = copy_rate(device, small)
    record(copy_gb_per_s=short(ceiling), triton=kernels.missing(torch.device(device), torch.bfloat16) or "runs")
    for name, full in NAMES.items():
        sizes = SHAPES["tiny" if small else full][1:6]
        found: dict[str, Any] = {}
        for what, call in _calls(tokens, device, *sizes).items():
            rate = _moved(*sizes)[what] * tokens / 1e9 / kernel_seconds(call, device, small)
            found[what] = {"gb_per_s": short(rate), "of_copy": short(rate / ceiling)}
        for own in OWN.values():
            found[f"attention over {own}"] = _attention(tokens, own, device, small, *sizes[1:4])
        record(**{name: found})


def _calls(
    tokens: int, device: str, hidden: int, heads: int, kv_heads: int, dim: int, inner: int
) -> dict[str, Callable[[], Any]]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    joined, cos, sin = normal(tokens, (heads + 2 * kv_heads) * dim), normal(tokens, dim), normal(tokens, dim)
    norm, wide = (normal(dim), 1e-6), (normal(hidden), 1e-6)
    residual, added, gate_up = normal(tokens, hidden), normal(tokens, hidden), normal(tokens, 2 * inner)
    own, other = normal(tokens, heads, dim), normal(tokens, heads, dim)
    sums = torch.randn(tokens, heads, device=device)
    return {
        "rotate": lambda: kernels.rotate_(joined, heads, kv_heads, cos, sin, norm, norm),
        "add_norm": lambda: kernels.add_norm_(residual, added, wide),
        "swiglu": lambda: kernels.swiglu(gate_up),
        "merge": lambda: kernels.merge(own, sums, other, sums),
    }


def _attention(tokens: int, own: int, device: str, small: bool, heads: int, kv_heads: int, dim: int) -> dict[str, Any]:
    """Documents over themselves (causal), then over the prefix of their group of 100."""
    n = max(1, tokens // own)
    rows, groups = n * own, -(-n // 100)
    query = torch.randn(rows, heads, dim, device=device, dtype=torch.bfloat16)
    key, value = (torch.randn(rows, kv_heads, dim, device=device, dtype=torch.bfloat16) for _ in range(2))
    kernel, out, documents = kernel_for(device, query.dtype, dim), torch.empty_like(query), Cuts.of([own] * n, device)
    prefixes = Cuts.of([min(PREFIX, rows)] * groups if groups * PREFIX <= rows else [rows // groups] * groups, device)
    members = Cuts.of([own * (min(n, at + 100) - at) for at in range(0, n, 100)], device)
    shared = prefixes.at[-1]
    scale = dim**-0.5
    causal = kernel_seconds(
        lambda: attend(query, key, value, documents, documents, scale, True, out, kernel), device, small
    )
    keys = (key[:shared], value[:shared], members, prefixes)
    across = kernel_seconds(lambda: attend(query, *keys, scale, False, out, kernel), device, small)
    flop = 4.0 * heads * dim
    return {
        "kernel": kernel.name,
        "own_tflops": short(flop * n * own * (own + 1) / 2 / causal / 1e12),
        "prefix_tflops": short(flop * rows * (shared // groups) / across / 1e12),
        "own_ns_per_token": short(causal / rows * 1e9),
        "prefix_ns_per_token": short(across / rows * 1e9),
    }
