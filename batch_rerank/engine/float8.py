"""Matrix products in float8 (e4m3), for `model.dtype: float8`: weights and activations with a scale a row.

A row of a weight is scaled once and a row of activations (a token) each time, so that its largest element becomes the
format's largest; a product is summed in float32 and scaled back (Micikevicius et al. 2022, with scales by row). On a
GPU torch's `_scaled_mm` multiplies, at twice the rate of bfloat16; elsewhere plain operations do, on the same rounded
numbers: slow, and what tests hold the rest against.
"""

from __future__ import annotations  # Triton's types, in kernels' signatures, may be absent

from dataclasses import dataclass

import torch

from batch_rerank.engine import kernels
from batch_rerank.errors import ModelError

try:
    import triton
    from triton import language as tl
except ImportError:  # no part of a CPU install
    triton = tl = None

Tensor = torch.Tensor

LARGEST = 448.0
"""Of e4m3's numbers."""

SMALLEST_SCALE = 1e-12
"""Rows of zeros have it."""

FEWEST_ROWS = 512
"""Fewer are filled up with zeros: cuBLAS has no product with scales by row for up to 256 rows of 9,216 elements on an
H100 (pytorch/ao#4582), and a score should not depend on how many rows its pack has."""


@dataclass(frozen=True)
class Rowwise:
    """A linear layer: weight float8_e4m3fn[out, in], what its rows are multiplied with, float32[1, out], and its bias
    [out] or None in the model's dtype."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None


def quantised(weight: Tensor, bias: Tensor | None) -> Rowwise:
    """A linear layer's weight [out, in] in float8. Raises ModelError where GPUs cannot multiply its shape."""
    if any(size % 16 for size in weight.shape):
        raise ModelError(
            f"model.dtype: found float8, but the model has a weight of {list(weight.shape)}; expected multiples of 16; "
            "set model.dtype to bfloat16"
        )
    rows, scale = quantise(weight)
    return Rowwise(rows, scale.T.contiguous(), bias)


def product(inputs: Tensor, weights: Rowwise) -> Tensor:
    """[n, in] to [n, out] in the dtype of the inputs, rounded once: inputs @ weight.T + bias."""
    return (_scaled_product if inputs.device.type == "cuda" else _plain_product)(inputs, weights)


def _scaled_product(inputs: Tensor, weights: Rowwise) -> Tensor:
    n = len(inputs)
    if n < FEWEST_ROWS:
        inputs = torch.cat([inputs, inputs.new_zeros(FEWEST_ROWS - n, inputs.shape[1])])
    rows, scale = quantise(inputs)
    scales = {"scale_a": scale, "scale_b": weights.scale}
    result: Tensor = torch._scaled_mm(  # the same arguments in torch 2.11 and 2.13
        rows, weights.weight.T, **scales, bias=weights.bias, out_dtype=inputs.dtype, use_fast_accum=True
    )
    return result[:n]


def _plain_product(inputs: Tensor, weights: Rowwise) -> Tensor:
    rows, scale = plain_quantise(inputs)
    result = (rows.float() @ weights.weight.float().T) * scale * weights.scale
    return (result if weights.bias is None else result + weights.bias.float()).to(inputs.dtype)


def quantise(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[n, width] as float8_e4m3fn[n, width] times float32[n, 1]. The scale, or an element, of a row that is not finite
    is NaN, and so is every product with it."""
    if not len(rows) or rows.shape[1] > kernels.LONGEST_ROW or not kernels.use(rows):
        return plain_quantise(rows)
    width = rows.shape[1]
    out = torch.empty(rows.shape, dtype=torch.float8_e4m3fn, device=rows.device)
    scale = torch.empty(len(rows), 1, dtype=torch.float32, device=rows.device)
    block = triton.next_power_of_2(width)
    arguments = (rows, out, scale, *kernels.row_strides(rows), width, block)
    kernels.launch(_quantise_kernel, (len(rows),), rows, *arguments, warps=min(max(block // 512, 1), 16))
    return out, scale


def plain_quantise(rows: Tensor) -> tuple[Tensor, Tensor]:
    """`quantise` in plain operations."""
    exact = rows.float()
    scale = (exact.abs().amax(1, keepdim=True) / LARGEST).clamp_(min=SMALLEST_SCALE)
    return (exact / scale).to(torch.float8_e4m3fn), scale


@kernels.jit
def _quantise_kernel(
    rows: tl.tensor, out: tl.tensor, scales: tl.tensor, stride: tl.tensor, width: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """A program is a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    values = tl.load(rows + row * stride + column, inside, 0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(values), 0) / 448.0, 1e-12)
    scale += tl.sum(values * 0.0, 0)  # NaN where an element is not finite: a maximum passes over NaN
    tl.store(scales + row, scale)
    tl.store(out + row * width + column, (values / scale).to(tl.float8e4nv), inside)
