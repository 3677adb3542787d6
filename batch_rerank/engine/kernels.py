"""What a decoder's layer does between its matrix products, on GPUs: one Triton kernel for each, one pass over memory.

These steps are bound by memory, and as separate operations they take as long as the products of a 0.6B model. Beside
each kernel is its plain form, which says what it computes: the tests' reference, and what runs where Triton is absent
or cannot launch. Every value is computed in float32 and rounded where transformers rounds it: after an addition to the
residual, after a norm and again after its weight, after an activation. Rotary positions round once, at the end.

Tensors may be views with any stride between rows; within a row elements are adjacent.
"""

from __future__ import annotations  # Triton's types, in kernels' signatures, may be absent

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

try:
    import triton
    from triton import language as tl
except ImportError:  # no part of a CPU install
    triton = tl = None

log = logging.getLogger("batch_rerank")

Tensor = torch.Tensor
Norm = tuple[Tensor, float]
"""weight and epsilon. The normed value is rounded to the weight's dtype before it is multiplied: a float32 weight
(Gemma's 1 + weight) so gives Gemma's rounding, one in the model's dtype that of Llama and Qwen."""

INTERPRETED = bool(triton and triton.knobs.runtime.interpret)
"""TRITON_INTERPRET=1: the kernels run on the CPU, for tests."""

LONGEST_ROW = 16384
"""Elements of a row that a program of the norm holds in registers, 32 a thread. Longer ones take the plain form."""


def use(tensor: Tensor) -> bool:
    """Whether the kernels compute on this tensor; else the plain forms do. Fake tensors are for the plain forms."""
    if type(tensor) is not Tensor or not (tensor.is_cuda or INTERPRETED):
        return False
    return missing(tensor.device, tensor.dtype) is None


@functools.cache
def missing(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run on a GPU in a dtype, None where they can; a reason is logged, once. One is launched to
    see: Triton builds its launcher with the machine's C compiler, and there may be none."""
    if triton is None:
        reason = "Triton is not installed"
    else:
        try:
            sample = torch.linspace(-2, 2, 64, device=device).to(dtype).view(2, 32)
            if torch.allclose(_swiglu_triton(sample), plain_swiglu(sample), rtol=0.01, atol=0.01):
                return None
            reason = "a kernel's result is wrong"
        except Exception as error:  # a driver, a compiler, an assembler: whatever it is, the plain forms remain
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    log.warning("Triton kernels do not run on %s in %s, plain operations do, slower: %s", device, dtype, reason)
    return reason


def jit(function: Callable[..., None]) -> Any:
    """A kernel; the function itself where Triton is absent."""
    return triton.jit(function) if triton else function


def launch(kernel: Any, grid: tuple[int, ...], on: Tensor, *arguments: Any, warps: int) -> None:
    """Run a kernel on the device of `on`."""
    with torch.cuda.device(on.get_device()):  # else on the current one, whatever its tensors'; -1, a CPU's, is none
        kernel[grid](*arguments, num_warps=warps)


def row_strides(*tensors: Tensor) -> list[int]:
    """Strides between rows; raises ValueError where a row's elements are not adjacent."""
    for tensor in tensors:
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"kernels: found strides {tensor.stride()}, expected adjacent elements in a row")
    return [tensor.stride(0) for tensor in tensors]


def rotate_(
    joined: Tensor, heads: int, kv_heads: int, cos: Tensor, sin: Tensor, query_norm: Norm | None, key_norm: Norm | None
) -> None:
    """Norm (where the model has one) and rotary positions of queries and keys, in place.

    joined: [n, at least (heads + kv_heads) * dim]: a token's query heads, then its key heads; what follows (the values)
    stays as it is. cos, sin: [n, dim] of each token, as transformers' rotary embedding gives them; norms: weight [dim].
    """
    if not len(joined) or not heads + kv_heads:
        return
    if not use(joined):
        plain_rotate_(joined, heads, kv_heads, cos, sin, query_norm, key_norm)
        return
    half = cos.shape[1] // 2
    columns = triton.next_power_of_2(half)
    query_weight, query_epsilon = query_norm or (None, 0.0)
    key_weight, key_epsilon = key_norm or (None, 0.0)
    strides = row_strides(joined, cos, sin)
    norms = (query_weight, query_epsilon, key_weight, key_epsilon)
    sizes = (heads, kv_heads, half, columns, max(512 // columns, 1))
    launch(_rotate_kernel, (len(joined),), joined, joined, cos, sin, *strides, *norms, *sizes, warps=2)


def plain_rotate_(
    joined: Tensor, heads: int, kv_heads: int, cos: Tensor, sin: Tensor, query_norm: Norm | None, key_norm: Norm | None
) -> None:
    """`rotate_` in plain operations."""
    cos, sin = cos.float().unsqueeze(1), sin.float().unsqueeze(1)
    turned = joined[:, : (heads + kv_heads) * cos.shape[2]].view(len(joined), heads + kv_heads, cos.shape[2])
    for part, norm in zip(torch.split(turned, [heads, kv_heads], 1), (query_norm, key_norm), strict=True):
        values = (_plain_norm(part, norm) if norm else part).float()
        low, high = values.chunk(2, 2)
        part.copy_(values * cos + torch.cat([-high, low], 2) * sin)


@jit
def _rotate_kernel(
    joined: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    stride: tl.tensor,
    cos_stride: tl.tensor,
    sin_stride: tl.tensor,
    query_weight: tl.tensor,
    query_epsilon: tl.tensor,
    key_weight: tl.tensor,
    key_epsilon: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """A program is a token: its cosines stay in registers while its heads pass, TILE at a time."""
    token = tl.program_id(0).to(tl.int64)
    row = joined + token * stride
    cos, sin = cos + token * cos_stride, sin + token * sin_stride
    _rotate_heads(row, cos, sin, query_weight, query_epsilon, 0, HEADS, HALF, COLUMNS, TILE)
    _rotate_heads(row, cos, sin, key_weight, key_epsilon, HEADS, HEADS + KV_HEADS, HALF, COLUMNS, TILE)


@jit
def _rotate_heads(
    row: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    weight: tl.tensor,
    epsilon: tl.tensor,
    FIRST: tl.constexpr,
    STOP: tl.constexpr,
    HALF: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Heads FIRST to STOP of one token; each half of a head is HALF elements in COLUMNS, a power of 2."""
    column = tl.arange(0, COLUMNS)[None, :]
    inside = column < HALF
    low_cos, high_cos = tl.load(cos + column, inside), tl.load(cos + HALF + column, inside)
    low_sin, high_sin = tl.load(sin + column, inside), tl.load(sin + HALF + column, inside)
    low_cos, high_cos = low_cos.to(tl.float32), high_cos.to(tl.float32)
    low_sin, high_sin = low_sin.to(tl.float32), high_sin.to(tl.float32)
    for start in range(FIRST, STOP, TILE):
        head = start + tl.arange(0, TILE)[:, None]
        at = row + head * (2 * HALF) + column
        kept = inside & (head < STOP)
        low = tl.load(at, kept, 0.0).to(tl.float32)
        high = tl.load(at + HALF, kept, 0.0).to(tl.float32)
        if weight is not None:
            squares = tl.sum(low * low, 1) + tl.sum(high * high, 1)
            scale = tl.rsqrt(squares / (2 * HALF) + epsilon)[:, None]
            low_weight = tl.load(weight + column, inside, 0.0)
            high_weight = tl.load(weight + HALF + column, inside, 0.0)
            low = (low * scale).to(low_weight.dtype).to(tl.float32) * low_weight.to(tl.float32)
            high = (high * scale).to(low_weight.dtype).to(tl.float32) * high_weight.to(tl.float32)
            low, high = low.to(row.dtype.element_ty).to(tl.float32), high.to(row.dtype.element_ty).to(tl.float32)
        tl.store(at, low * low_cos - high * low_sin, kept)
        tl.store(at + HALF, high * high_cos + low * high_sin, kept)


def add_norm_(residual: Tensor, added: Tensor | None, norm: Norm) -> Tensor:
    """Add to the residual in place, and return the norm of the sum, [n, width].

    residual: [n, width]; added: the same or None for nothing to add; norm: weight [width].
    """
    if not len(residual) or residual.shape[1] > LONGEST_ROW or not use(residual):
        return plain_add_norm_(residual, added, norm)
    weight, epsilon = norm
    out = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    width = residual.shape[1]
    block = triton.next_power_of_2(width)
    strides = row_strides(residual, residual if added is None else added)
    arguments = (residual, added, weight, out, *strides, width, epsilon, block)
    launch(_add_norm_kernel, (len(residual),), residual, *arguments, warps=min(max(block // 512, 1), 16))
    return out


def plain_add_norm_(residual: Tensor, added: Tensor | None, norm: Norm) -> Tensor:
    """`add_norm_` in plain operations."""
    if added is not None:
        residual.add_(added)
    return _plain_norm(residual, norm)


def _plain_norm(values: Tensor, norm: Norm) -> Tensor:
    """RMS norm over the last dimension (Zhang and Sennrich 2019), rounded as `Norm` says."""
    weight, epsilon = norm
    exact = values.float()
    normed = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + epsilon)
    return (normed.to(weight.dtype) * weight).to(values.dtype)


@jit
def _add_norm_kernel(
    residual: tl.tensor,
    added: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    stride: tl.tensor,
    added_stride: tl.tensor,
    width: tl.tensor,
    epsilon: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """A program is a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    values = tl.load(residual + row * stride + column, inside, 0.0)
    if added is not None:
        more = tl.load(added + row * added_stride + column, inside, 0.0)
        values = (values.to(tl.float32) + more.to(tl.float32)).to(values.dtype)
        tl.store(residual + row * stride + column, values, inside)
    exact = values.to(tl.float32)
    exact *= tl.rsqrt(tl.sum(exact * exact, 0) / width + epsilon)
    scale = tl.load(weight + column, inside, 0.0)
    tl.store(out + row * width + column, exact.to(scale.dtype).to(tl.float32) * scale.to(tl.float32), inside)


def swiglu(joined: Tensor) -> Tensor:
    """[n, 2 * inner], the gate's products then the up's, to silu(gate) * up, [n, inner] (Shazeer 2020)."""
    return _swiglu_triton(joined) if joined.numel() and use(joined) else plain_swiglu(joined)


def plain_swiglu(joined: Tensor) -> Tensor:
    """`swiglu` in plain operations."""
    gate, up = joined.chunk(2, 1)
    return functional.silu(gate).mul_(up)


def _swiglu_triton(joined: Tensor) -> Tensor:
    inner = joined.shape[1] // 2
    out = torch.empty(len(joined), inner, dtype=joined.dtype, device=joined.device)
    grid = (len(joined), triton.cdiv(inner, 1024))
    launch(_swiglu_kernel, grid, joined, joined, out, *row_strides(joined), inner, 1024, warps=4)
    return out


@jit
def _swiglu_kernel(joined: tl.tensor, out: tl.tensor, stride: tl.tensor, inner: tl.tensor, BLOCK: tl.constexpr) -> None:
    """A program is BLOCK elements of a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < inner
    gate = tl.load(joined + row * stride + column, inside, 0.0)
    up = tl.load(joined + row * stride + inner + column, inside, 0.0)
    exact = gate.to(tl.float32)
    active = (exact / (1.0 + tl.exp(-exact))).to(gate.dtype)
    tl.store(out + row * inner + column, active.to(tl.float32) * up.to(tl.float32), inside)


def merge(own: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor, into: Tensor | None = None) -> None:
    """The attention over two sets of keys from the attentions over each, written to `into`; None is in place of `own`.

    own, other, into: [n, heads, dim]; lse, other_lse: float32[n, heads], the log-sum-exp of the scaled products over
    each set, infinite for a set without keys (FlashAttention-2 reports +inf there, arithmetic gives -inf): such a set
    counts for nothing, whatever its attention holds, and where both are without keys `own` stays.
    """
    into = own if into is None else into
    if not own.numel():
        return
    if not use(own):
        plain_merge(own, lse, other, other_lse, into)
        return
    heads, dim = own.shape[1:]
    columns = triton.next_power_of_2(dim)
    row_strides(own, other, into)
    sums = (*lse.stride(), *other_lse.stride())
    strides = [stride for tensor in (own, other, into) for stride in tensor.stride()[:2]]
    tile = min(max(2048 // columns, 1), triton.next_power_of_2(heads))
    grid = (len(own), triton.cdiv(heads, tile))
    arguments = (own, lse, other, other_lse, into, *sums, *strides, heads, dim, columns, tile)
    launch(_merge_kernel, grid, own, *arguments, warps=4)


def plain_merge(own: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor, into: Tensor) -> None:
    """`merge` in plain operations."""
    weight = torch.sigmoid(other_lse - lse)  # exp(other) / (exp(own) + exp(other))
    weight = weight.masked_fill(lse.isinf(), 1).masked_fill(other_lse.isinf(), 0).unsqueeze(-1)
    mixed = torch.lerp(own.float(), other.float(), weight).to(own.dtype)
    into.copy_(torch.where(weight == 0, own, torch.where(weight == 1, other, mixed)))


@jit
def _merge_kernel(
    own: tl.tensor,
    lse: tl.tensor,
    other: tl.tensor,
    other_lse: tl.tensor,
    into: tl.tensor,
    lse_row: tl.tensor,
    lse_head: tl.tensor,
    other_lse_row: tl.tensor,
    other_lse_head: tl.tensor,
    own_row: tl.tensor,
    own_head: tl.tensor,
    other_row: tl.tensor,
    other_head: tl.tensor,
    into_row: tl.tensor,
    into_head: tl.tensor,
    heads: tl.tensor,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """A program is TILE heads of a token."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * TILE + tl.arange(0, TILE)
    kept = head < heads
    ours = tl.load(lse + row * lse_row + head * lse_head, kept, 0.0)
    theirs = tl.load(other_lse + row * other_lse_row + head * other_lse_head, kept, 0.0)
    weight = 1.0 / (1.0 + tl.exp(ours - theirs))
    weight = tl.where(tl.abs(ours) == float("inf"), 1.0, weight)
    weight = tl.where(tl.abs(theirs) == float("inf"), 0.0, weight)[:, None]
    head, column = head[:, None], tl.arange(0, COLUMNS)[None, :]
    inside = kept[:, None] & (column < DIM)
    first = tl.load(own + row * own_row + head * own_head + column, inside, 0.0).to(tl.float32)
    second = tl.load(other + row * other_row + head * other_head + column, inside, 0.0).to(tl.float32)
    mixed = first + weight * (second - first)
    mixed = tl.where(weight == 0.0, first, tl.where(weight == 1.0, second, mixed))
    tl.store(into + row * into_row + head * into_head + column, mixed, inside)
