"""Matrix products with what follows them: on CPUs through oneDNN, which does both in one pass.

float32 products are a tenth faster there than through MKL on AMD, a gated MLP with its activation and its residual a
third (`docs/decisions.md`). The operator is what torch's own compiler emits; where torch has none, plain operations
give the same.
"""

from typing import Any, Literal

import torch
from torch.nn import functional

Tensor = torch.Tensor
Weights = tuple[Tensor, Tensor | None]
"""weight [out, in] and bias [out] or None."""

_ONEDNN = torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_DTYPES = (torch.float32, torch.bfloat16)


def linear(inputs: Tensor, weights: Weights, then: Literal["none", "swish"] = "none") -> Tensor:
    """[n, in] to [n, out]: inputs @ weight.T + bias, then the activation."""
    if _fits(inputs):
        product: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, *weights, then, [], "")
        return product
    product = functional.linear(inputs, *weights)
    return functional.silu(product, inplace=True) if then == "swish" else product


def linear_with(inputs: Tensor, weights: Weights, then: Literal["add", "mul"], other: Tensor) -> Tensor:
    """[n, in] to [n, out]: inputs @ weight.T + bias, then plus or times `other` [n, out]."""
    if _fits(inputs):
        product: Tensor = torch.ops.mkldnn._linear_pointwise.binary(inputs, other, *weights, then)
        return product
    product = functional.linear(inputs, *weights)
    return product.add_(other) if then == "add" else product.mul_(other)


def use_onednn(model: torch.nn.Module) -> None:
    """Let every plain linear layer of a model on the CPU compute its product this way."""
    for module in model.modules():
        if type(module) is torch.nn.Linear and module.weight.device.type == "cpu":
            module.forward = _Forward(module)  # type: ignore[method-assign,assignment]


class _Forward:
    """`forward` of a linear layer; reads its weights when called, as the layer itself does."""

    def __init__(self, module: torch.nn.Linear) -> None:
        self._module = module

    def __call__(self, inputs: Tensor) -> Tensor:
        flat = inputs.reshape(-1, inputs.shape[-1])
        return linear(flat, (self._module.weight, self._module.bias)).view(*inputs.shape[:-1], -1)


def _fits(inputs: Tensor) -> bool:
    return _ONEDNN and inputs.device.type == "cpu" and inputs.dtype in _DTYPES


def weights_of(module: Any) -> Weights:
    """Weight and bias of a linear layer."""
    return module.weight.detach(), None if module.bias is None else module.bias.detach()
