"""Attention over packed sequences: no padding, and the prefix of a query computed once for all its documents.

A `Pack` puts all prefixes first, then all documents, end to end. A document's token attends to the prefix of its own
group and to its own document up to itself. That is two attentions over plain sequences, merged by their
log-sum-exps, so one primitive, `attend`, serves all: torch's flash kernel for CPUs, sequence by sequence, and
`varlen_attn` on GPUs. Where a device has neither there is no packed path (`can_pack`).
"""

import inspect
from dataclasses import dataclass
from itertools import pairwise

import torch

Tensor = torch.Tensor


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
        cu = on_device(torch.tensor(at, dtype=torch.int32), device) if device == "cuda" else None
        return cls(at, cu, max(lengths, default=0))


def on_device(tensor: Tensor, device: str) -> Tensor:
    """A tensor on the device; to a GPU from pinned memory, without waiting for it."""
    return tensor if device == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def can_pack(device: str, dtype: torch.dtype) -> bool:
    """Whether `attend` has a kernel for the device and dtype."""
    if device == "cpu":
        return hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    takes = inspect.signature(varlen_attn).parameters
    if dtype not in (torch.bfloat16, torch.float16) or not {"window_size", "scale", "enable_gqa"} <= takes.keys():
        return False
    return device == "cuda" and torch.cuda.get_device_capability() >= (8, 0)


def attend(
    query: Tensor, key: Tensor, value: Tensor, cuts: Cuts, key_cuts: Cuts, scale: float, causal: bool, out: Tensor
) -> Tensor:
    """Attention of sequence i of the queries over sequence i of the keys, for all i, into `out`.

    query and out: [n_q, heads, dim], key and value: [n_k, kv_heads, dim], of one dtype; heads share keys in equal
    groups. causal: position j of a sequence sees keys up to j; its queries and keys are then equally long.
    Returns the float32[n_q, heads] log-sum-exp of the scaled products.
    """
    if query.device.type == "cuda":
        return _attend_cuda(query, key, value, cuts, key_cuts, scale, causal, out)
    groups = query.shape[1] // key.shape[1]
    # [kv_heads, group, n, dim] views: a key's head is repeated by a stride of 0, not by a copy
    q, result = (t.view(len(t), -1, groups, t.shape[2]).permute(1, 2, 0, 3) for t in (query, out))
    k, v = (t.permute(1, 0, 2)[:, None].expand(-1, groups, -1, -1) for t in (key, value))
    sums = torch.empty(len(query), key.shape[1], groups, device=query.device)
    for (start, stop), (key_start, key_stop) in zip(pairwise(cuts.at), pairwise(key_cuts.at), strict=True):
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[:, :, start:stop], k[:, :, key_start:key_stop], v[:, :, key_start:key_stop], 0.0, causal, scale=scale
        )
        result[:, :, start:stop] = output
        sums[start:stop] = lse.permute(2, 0, 1)
    return sums.flatten(1)


def _attend_cuda(
    query: Tensor, key: Tensor, value: Tensor, cuts: Cuts, key_cuts: Cuts, scale: float, causal: bool, out: Tensor
) -> Tensor:
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

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
        return_aux=AuxRequest(lse=True),
        scale=scale,
        window_size=(-1, 0) if causal else (-1, -1),
        enable_gqa=True,
    )
    out.copy_(output)
    return lse.transpose(0, 1)


def merge(output: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Make `output`, the attention over some keys, the attention over these and those of `other`."""
    weight = torch.sigmoid(other_lse - lse).unsqueeze(-1)  # exp(other) / (exp(own) + exp(other))
    output.lerp_(other, weight.to(output.dtype))
