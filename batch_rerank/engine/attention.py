"""Attention over packed sequences: no padding, and the prefix of a query computed once for all its documents.

A pack puts all prefixes first, then all documents, end to end. A document's token attends to the prefix of its own
group and to its own document up to itself. That is two attentions over plain sequences, merged by their
log-sum-exps, so one primitive, `attend`, serves all: `varlen_attn` on GPUs that have it, torch's flash kernel for CPUs,
sequence by sequence, and plain products anywhere else (`kernel_for` says which, and why).
"""

import inspect
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch

Tensor = torch.Tensor

PLAIN_ROWS = 1024
"""Queries whose products with all keys are in memory at once in plain attention."""


@dataclass(frozen=True)
class Kernel:
    """What computes attention on a device, and why it is not the fastest, None where it is."""

    name: Literal["varlen", "cpu", "plain"]
    reason: str | None = None


@dataclass(frozen=True)
class Cuts:
    """Where packed sequences begin and end: sequence i is rows at[i] to at[i + 1].

    `cu`: the same as int32[n + 1] on the device, where its kernel needs it, else None; `longest`: tokens.
    """

    at: list[int]
    cu: Tensor | None
    longest: int

    @classmethod
    def of(cls, lengths: list[int], device: str) -> "Cuts":
        """Cuts of sequences of these lengths."""
        at = [0]
        for length in lengths:
            at.append(at[-1] + length)
        cu = None if device == "cpu" else on_device(torch.tensor(at, dtype=torch.int32), device)
        return cls(at, cu, max(lengths, default=0))


def on_device(tensor: Tensor, device: str) -> Tensor:
    """A tensor on the device; to a GPU from pinned memory, without waiting for it."""
    if device == "cpu":
        return tensor
    return (tensor.pin_memory() if torch.cuda.is_available() else tensor).to(device, non_blocking=True)


def kernel_for(device: str, dtype: torch.dtype, head_dim: int) -> Kernel:
    """What `attend` computes with for heads of this size."""
    if device == "cpu":
        found = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
        return Kernel("cpu") if found else Kernel("plain", "this torch has no flash attention for CPUs")
    reason = _without_varlen(device, dtype, head_dim)
    return Kernel("varlen") if reason is None else Kernel("plain", reason)


def _without_varlen(device: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why `varlen_attn` cannot be used, None where it can."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"there is no kernel for packed sequences of {str(dtype).removeprefix('torch.')}"
    if head_dim > 256 or head_dim % 8:
        return f"its heads are of {head_dim}, the kernel takes multiples of 8 up to 256"
    if torch.version.hip is not None:
        return "torch's ROCm build has no kernel for packed sequences"
    if not device.startswith("cuda"):
        return f"device {device} has no kernel for packed sequences"
    found = torch.cuda.get_device_capability(device)
    if found < (8, 0):
        return f"this GPU has compute capability {found[0]}.{found[1]}, the kernel needs 8.0"
    try:
        takes = inspect.signature(_varlen()[0]).parameters
    except ImportError:
        return f"torch {torch.__version__} has no varlen_attn"
    missing = sorted({"window_size", "scale", "return_aux"} - takes.keys())
    return f"torch {torch.__version__}'s varlen_attn has no {', '.join(missing)}" if missing else None


def _varlen() -> tuple[Any, Any]:
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    return varlen_attn, AuxRequest


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cuts: Cuts,
    key_cuts: Cuts,
    scale: float,
    causal: bool,
    out: Tensor,
    kernel: Kernel,
) -> Tensor:
    """Attention of sequence i of the queries over sequence i of the keys, for all i, into `out`.

    query and out: [n_q, heads, dim], key and value: [n_k, kv_heads, dim], of one dtype; heads share keys in equal
    groups. causal: position j of a sequence sees keys up to j; its queries and keys are then equally long.
    Returns the float32[n_q, heads] log-sum-exp of the scaled products; -inf, and zeros in `out`, where there is no key.
    """
    if kernel.name == "varlen":
        return _attend_varlen(query, key, value, cuts, key_cuts, scale, causal, out)
    groups = query.shape[1] // key.shape[1]
    # [kv_heads, group, n, dim] views: a key's head is repeated by a stride of 0, not by a copy
    q, result = (t.view(len(t), -1, groups, t.shape[2]).permute(1, 2, 0, 3) for t in (query, out))
    k, v = (t.permute(1, 0, 2)[:, None].expand(-1, groups, -1, -1) for t in (key, value))
    sums = torch.empty(len(query), key.shape[1], groups, device=query.device)
    compute = _flash_cpu if kernel.name == "cpu" else _plain
    for (start, stop), (key_start, key_stop) in zip(pairwise(cuts.at), pairwise(key_cuts.at), strict=True):
        if start == stop:
            continue
        if key_start == key_stop:
            result[:, :, start:stop], sums[start:stop] = 0, -torch.inf
            continue
        keys = slice(key_start, key_stop)
        output, lse = compute(q[:, :, start:stop], k[:, :, keys], v[:, :, keys], scale, causal)
        result[:, :, start:stop] = output
        sums[start:stop] = lse.permute(2, 0, 1)
    return sums.flatten(1)


def _flash_cpu(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, scale=scale
    )
    return output, lse


def _plain(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """[..., n_q, dim] and float32[..., n_q] of one sequence, in float32, so many queries at a time."""
    outputs, sums = [], []
    for start in range(0, query.shape[2], PLAIN_ROWS):
        part = query[:, :, start : start + PLAIN_ROWS].float()
        products = part @ key.float().transpose(2, 3) * scale
        if causal:
            rows = torch.arange(start, start + part.shape[2], device=query.device)
            later = torch.arange(key.shape[2], device=query.device) > rows[:, None]
            products = products.masked_fill(later, -torch.inf)
        sums.append(products.logsumexp(-1))
        outputs.append((products - sums[-1][..., None]).exp_() @ value.float())
    return torch.cat(outputs, 2), torch.cat(sums, 2)


def _attend_varlen(
    query: Tensor, key: Tensor, value: Tensor, cuts: Cuts, key_cuts: Cuts, scale: float, causal: bool, out: Tensor
) -> Tensor:
    varlen_attn, aux = _varlen()
    given: dict[str, Any] = {}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # torch 2.11 has no such argument and shares keys
        given["enable_gqa"] = True
    assert cuts.cu is not None
    assert key_cuts.cu is not None
    output, lse = varlen_attn(
        query,
        key,
        value,
        cuts.cu,
        key_cuts.cu,
        cuts.longest,
        key_cuts.longest,
        return_aux=aux(lse=True),
        scale=scale,
        window_size=(-1, 0) if causal else (-1, -1),
        **given,
    )
    out.copy_(output)
    # FlashAttention-2 gives [heads, n_q], whatever the docstring says, and +inf where a sequence has no keys
    return torch.where(lse == torch.inf, -torch.inf, lse).transpose(0, 1)


def merge(output: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Make `output`, the attention over some keys, the attention over these and those of `other`, in float32: weights
    of 8 bits are off by up to 2 % where one side is nearly all."""
    weight = torch.sigmoid(other_lse - lse).unsqueeze(-1)  # exp(other) / (exp(own) + exp(other))
    if output.dtype == torch.float32:
        output.lerp_(other, weight)
    else:
        output.copy_(output.float().lerp_(other.float(), weight))
