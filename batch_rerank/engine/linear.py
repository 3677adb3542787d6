"""Matrix products with what follows them: on CPUs through oneDNN, which does both in one pass.

float32 products are a tenth faster there than through MKL on AMD, a gated MLP with its activation and its residual a
third (`docs/decisions.md`). The operator is what torch's own compiler emits; where torch has none, plain operations
give the same.
"""

from typing import Any, Literal

import torch
from torch.nn import functional

from batch_rerank.engine.float8 import Rowwise, product

Tensor = torch.Tensor
Plain = tuple[Tensor, Tensor | None]
"""weight [out, in] and bias [out] or None."""
Weights = Plain | Rowwise

_ONEDNN = torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_DTYPES = (torch.float32, torch.bfloat16) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else (torch.float32,)
"""oneDNN refuses bfloat16 on CPUs without AVX-512: there plain operations compute it."""


def linear(inputs: Tensor, weights: Weights, then: Literal["none", "swish", "gelu"] = "none") -> Tensor:
    """[n, in] to [n, out]: inputs @ weight.T + bias, then the activation (gelu: the exact one, by erf)."""
    if not isinstance(weights, Rowwise) and _fits(inputs):
        fused: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, *weights, then, [], "none")
        return fused
    bare = _bare(inputs, weights)
    if then == "gelu":
        return functional.gelu(bare)
    return functional.silu(bare, inplace=True) if then == "swish" else bare


def linear_with(inputs: Tensor, weights: Weights, then: Literal["add", "mul"], other: Tensor) -> Tensor:
    """[n, in] to [n, out]: inputs @ weight.T + bias, then plus or times `other` [n, out]."""
    if not isinstance(weights, Rowwise) and _fits(inputs):
        fused: Tensor = torch.ops.mkldnn._linear_pointwise.binary(inputs, other, *weights, then)
        return fused
    bare = _bare(inputs, weights)
    return bare.add_(other) if then == "add" else bare.mul_(other)


def _bare(inputs: Tensor, weights: Weights) -> Tensor:
    return product(inputs, weights) if isinstance(weights, Rowwise) else functional.linear(inputs, *weights)


def use_onednn(model: Any) -> None:
    """Let every plain linear layer of an encoder on the CPU compute its product this way, BERT's GELU with it."""
    exact_gelu = getattr(model.config, "hidden_act", None) == "gelu"
    for module in model.modules():
        if type(module) is torch.nn.Linear and module.weight.device.type == "cpu":
            _compute(module, "none")
        if exact_gelu and hasattr(module, "intermediate_act_fn") and module.dense.weight.device.type == "cpu":
            module.intermediate_act_fn = torch.nn.Identity()
    for module in model.modules():
        if isinstance(getattr(module, "intermediate_act_fn", None), torch.nn.Identity):
            _compute(module.dense, "gelu")


def _compute(module: Any, then: Literal["none", "gelu"]) -> None:
    """Replace a linear layer's forward; the weights are read when it is called, as the layer itself does."""

    def forward(inputs: Tensor) -> Tensor:
        flat = inputs.reshape(-1, inputs.shape[-1])
        return linear(flat, (module.weight, module.bias), then).view(*inputs.shape[:-1], -1)

    module.forward = forward


def _fits(inputs: Tensor) -> bool:
    return _ONEDNN and inputs.device.type == "cpu" and inputs.dtype in _DTYPES


def weights_of(module: Any) -> Plain:
    """Weight and bias of a linear layer."""
    return module.weight.detach(), None if module.bias is None else module.bias.detach()
