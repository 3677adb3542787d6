"""The forward of Llama-like decoders over a pack: no padding, shared prefixes, the last layer only where it is read.

The weights are those of the loaded transformers model, which stays whole beside this (its own forward is the slow
path that the self-test compares with). What differs is the order of the work: projections of the same input are one
matrix product, results land in place, and an answer needs only the last position of each document, so in the last
layer only those positions are queried and go through the MLP. Between the products a GPU computes with `kernels.py`,
a CPU with what its own library fuses to them (`linear.py`).
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional

from batch_rerank.engine import kernels
from batch_rerank.engine.architecture import looks_both_ways
from batch_rerank.engine.attention import Cuts, Tensor, attend, kernel_for, merge
from batch_rerank.engine.float8 import Rowwise, quantised
from batch_rerank.engine.linear import Plain, Weights, linear, linear_with, weights_of

FAMILIES = ("qwen3", "qwen2", "llama", "mistral", "gemma")
"""Architectures that are this computation: RMS norm, rotary positions, grouped queries, gated MLP."""

STEADY_ROPE = ("default", "linear", "llama3", "yarn")
"""Rotary variants whose frequencies do not depend on the length of the batch."""


@dataclass(frozen=True)
class Pack:
    """Token ids of one forward: the prefixes of some groups end to end, then the documents of these groups end to end,
    then those of groups without a prefix.

    ids, positions: int64[total]; prefixes: cuts of the prefixes, from row 0, none of them empty; documents: cuts of
    every document, none of them empty; groups: cuts of the documents of each group that has a prefix, both counted from
    the first document's row; group_documents: the same cuts in documents; last: int64[n_documents], rows of the
    documents' last tokens; singles: cuts of one row a document; asked: int64[n_documents], which document of the pack
    each one that was asked for is, None where they stand in that order.
    """

    ids: Tensor
    positions: Tensor
    prefixes: Cuts
    groups: Cuts
    group_documents: Cuts
    documents: Cuts
    last: Tensor
    singles: Cuts
    asked: Tensor | None = None


class Packed:
    """A decoder's body over packs."""

    def __init__(self, body: Any, device: str, fused: bool | None = None, float8: bool = False) -> None:
        """`body`: the transformers model without its head, e.g. Qwen3Model; `unsupported` must be None for it.

        Joins weights that multiply the same input; the model's own parameters become views of the joined ones.
        fused: whether `kernels.py` computes what is between the products; None: on all devices but CPUs.
        float8: whether all layers but the last multiply in it, with weights of their own beside the model's. The last
        has few rows to multiply, and its rounding is what the score sees first.
        """
        self._fused = device != "cpu" if fused is None else fused
        self._embed, self._rotary = body.embed_tokens, body.rotary_emb
        config = body.config
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._dim = getattr(config, "head_dim", None) or config.hidden_size // self._heads
        self._kernel = kernel_for(device, body.dtype, self._dim)
        self.slower, self.long_apart = self._kernel.reason, self._kernel.name == "varlen"
        if self._fused and torch.cuda.is_available():
            self.slower = self.slower or kernels.missing(torch.device(device), body.dtype)
        self._unit_offset = config.model_type == "gemma"  # its norms multiply by 1 + weight
        self._norm = self._norm_of(body.norm)
        blocks = [self._block(layer, config) for layer in body.layers]
        self._blocks = [block.in_float8() for block in blocks[:-1]] + blocks[-1:] if float8 else blocks

    def _norm_of(self, norm: Any) -> kernels.Norm:
        epsilon = getattr(norm, "variance_epsilon", None) or norm.eps
        return (norm.weight.float() + 1 if self._unit_offset else norm.weight).detach(), float(epsilon)

    def _block(self, layer: Any, config: Any) -> "_Block":
        attention, mlp = layer.self_attn, layer.mlp
        return _Block(
            before=self._norm_of(layer.input_layernorm),
            after=self._norm_of(layer.post_attention_layernorm),
            query_key_value=_join(attention.q_proj, attention.k_proj, attention.v_proj),
            query_norm=self._norm_of(attention.q_norm) if hasattr(attention, "q_norm") else None,
            key_norm=self._norm_of(attention.k_norm) if hasattr(attention, "k_norm") else None,
            scale=float(attention.scaling),
            output=weights_of(attention.o_proj),
            gate_up=_join(mlp.gate_proj, mlp.up_proj) if self._fused and config.hidden_act == "silu" else None,
            gate=weights_of(mlp.gate_proj),
            up=weights_of(mlp.up_proj),
            down=weights_of(mlp.down_proj),
            activation=None if config.hidden_act == "silu" else mlp.act_fn,
        )

    def last_hidden(self, pack: Pack) -> Tensor:
        """[n_documents, hidden]: the normed hidden state at the last token of every document, in the order asked."""
        hidden = self._embed(pack.ids)
        cos, sin = (t[0] for t in self._rotary(hidden, pack.positions[None]))
        if not self._fused:
            half = self._dim // 2
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
            sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)  # rotate_half's sign, once for all layers
        normed = self._normed(hidden, self._blocks[0].before)
        for block, following in pairwise(self._blocks):
            projected = linear(normed, block.query_key_value)
            query, key, value = self._turned(block, projected, self._heads, self._kv_heads, cos, sin)
            attended = self._attend(block, query, key, value, pack)
            hidden, normed = self._after_attention(block, hidden, attended, following.before)
        answers = self._last_layer(self._blocks[-1], hidden, normed, cos, sin, pack)
        return answers if pack.asked is None else answers[pack.asked]

    def _normed(self, hidden: Tensor, norm: kernels.Norm) -> Tensor:
        return kernels.add_norm_(hidden, None, norm) if self._fused else _rms_norm(hidden, norm)

    def _turned(
        self, block: "_Block", projected: Tensor, heads: int, kv_heads: int, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value heads of [n, (heads + 2 * kv_heads) * dim], the first two normed and at their positions;
        in place where that is fused."""
        counts = [heads, kv_heads, kv_heads]
        query, key, value = torch.split(projected.view(len(projected), sum(counts), self._dim), counts, 1)
        if self._fused:
            kernels.rotate_(projected, heads, kv_heads, cos, sin, block.query_norm, block.key_norm)
            return query, key, value
        return _rotate(query, block.query_norm, cos, sin), _rotate(key, block.key_norm, cos, sin), value

    def _after_attention(
        self, block: "_Block", hidden: Tensor, attended: Tensor, following: kernels.Norm
    ) -> tuple[Tensor, Tensor]:
        """The layer's output from its input [n, hidden] and its attention [n, heads * dim], and that output under the
        norm which follows."""
        hidden, normed = self._added(hidden, attended, block.output, block.after)
        return self._added(hidden, block.gated(normed), block.down, following)

    def _added(self, hidden: Tensor, inputs: Tensor, weights: Weights, norm: kernels.Norm) -> tuple[Tensor, Tensor]:
        """The residual with a product added, in place where that is fused, and its norm."""
        if self._fused:
            return hidden, kernels.add_norm_(hidden, linear(inputs, weights), norm)
        hidden = linear_with(inputs, weights, "add", hidden)
        return hidden, _rms_norm(hidden, norm)

    def _attend(self, block: "_Block", query: Tensor, key: Tensor, value: Tensor, pack: Pack) -> Tensor:
        """[total, heads * dim]."""
        shared = pack.prefixes.at[-1]
        out = torch.empty_like(query)
        if shared:
            prefix = (query[:shared], key[:shared], value[:shared], pack.prefixes, pack.prefixes)
            attend(*prefix, block.scale, True, out[:shared], self._kernel)
        documents = pack.documents
        own = (query[shared:], key[shared:], value[shared:], documents, documents)
        sums = attend(*own, block.scale, True, out[shared:], self._kernel)
        self._add_prefix(block, query[shared:], key, value, pack.groups, pack, out[shared:], sums)
        return out.flatten(1)

    def _add_prefix(
        self,
        block: "_Block",
        query: Tensor,
        key: Tensor,
        value: Tensor,
        groups: Cuts,
        pack: Pack,
        out: Tensor,
        sums: Tensor,
    ) -> None:
        """Merge the attention over the group's prefix into `out`, the attention over the document itself, for the rows
        of `groups`: those of groups without a prefix follow them."""
        shared, rows = pack.prefixes.at[-1], groups.at[-1]
        if shared and rows:
            across = torch.empty_like(query[:rows])
            keys = (key[:shared], value[:shared], groups, pack.prefixes)
            prefix_sums = attend(query[:rows], *keys, block.scale, False, across, self._kernel)
            (kernels.merge if self._fused else merge)(out[:rows], sums[:rows], across, prefix_sums)

    def _last_layer(
        self, block: "_Block", hidden: Tensor, normed: Tensor, cos: Tensor, sin: Tensor, pack: Pack
    ) -> Tensor:
        """The model's output at the last rows only; keys and values are needed at all rows."""
        shared, last = pack.prefixes.at[-1], pack.last
        split = self._heads * self._dim
        assert not isinstance(block.query_key_value, Rowwise)
        weight, bias = block.query_key_value
        projected = linear(normed, (weight[split:], None if bias is None else bias[split:]))
        _, key, value = self._turned(block, projected, 0, self._kv_heads, cos, sin)
        projected = linear(normed[last], (weight[:split], None if bias is None else bias[:split]))
        query, _, _ = self._turned(block, projected, self._heads, 0, cos[last], sin[last])
        out = torch.empty_like(query)
        own = (query, key[shared:], value[shared:], pack.singles, pack.documents)
        sums = attend(*own, block.scale, False, out, self._kernel)
        self._add_prefix(block, query, key, value, pack.group_documents, pack, out, sums)
        return self._after_attention(block, hidden[last], out.flatten(1), self._norm)[1]


@dataclass(frozen=True)
class _Block:
    """One layer's weights; `gate_up`: both joined, where that is fused; `activation` None is SiLU."""

    before: kernels.Norm
    after: kernels.Norm
    query_key_value: Weights
    query_norm: kernels.Norm | None
    key_norm: kernels.Norm | None
    scale: float
    output: Weights
    gate_up: Weights | None
    gate: Weights
    up: Weights
    down: Weights
    activation: Any

    def in_float8(self) -> "_Block":
        """The layer with the weights that it multiplies with in float8."""
        names = ["query_key_value", "output", "down", *(["gate", "up"] if self.gate_up is None else ["gate_up"])]
        changed: dict[str, Any] = {name: quantised(*getattr(self, name)) for name in names}
        return replace(self, **changed)

    def gated(self, normed: Tensor) -> Tensor:
        """[n, hidden] to [n, inner]: the activated gate times the up projection."""
        if self.gate_up is not None:
            return kernels.swiglu(linear(normed, self.gate_up))
        gate = (
            linear(normed, self.gate, "swish")
            if self.activation is None
            else self.activation(linear(normed, self.gate))
        )
        return linear_with(normed, self.up, "mul", gate)


def unsupported(body: Any) -> str | None:
    """Why a model cannot run packed, None where it can."""
    config = body.config
    if config.model_type not in FAMILIES:
        return f"the architecture {config.model_type!r} has no packed forward"
    if looks_both_ways(config.to_dict()):
        return "its attention looks both ways"
    layers = getattr(config, "layer_types", None) or []
    if "sliding_attention" in layers or (not layers and getattr(config, "sliding_window", None)):
        return "its attention has a sliding window"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in STEADY_ROPE:
        return f"its rotary positions are of type {rope!r}"
    return None


def _join(*linears: Any) -> Plain:
    """Linear layers of one input as one. Their own weights become views of the joined: no second copy stays."""
    weight = torch.cat([layer.weight.detach() for layer in linears])
    for layer, view in zip(linears, torch.split(weight, [layer.out_features for layer in linears]), strict=True):
        layer.weight.data = view
    if linears[0].bias is None:
        return weight, None
    return weight, torch.cat([layer.bias.detach() for layer in linears])


def _rms_norm(hidden: Tensor, norm: kernels.Norm) -> Tensor:
    weight, epsilon = norm
    if hidden.device.type == "cpu" and hidden.dtype == torch.float32:  # half the passes of torch's own there
        length: Tensor = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
        return (hidden * length.square_().div_(hidden.shape[-1]).add_(epsilon).rsqrt_()).mul_(weight)
    if weight.dtype != hidden.dtype:  # Gemma's 1 + weight, which 8 bits would round
        return functional.rms_norm(hidden.float(), (hidden.shape[-1],), weight, epsilon).to(hidden.dtype)
    return functional.rms_norm(hidden, (hidden.shape[-1],), weight, epsilon)


def _rotate(heads: Tensor, norm: kernels.Norm | None, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions of [n, heads, dim], after the norm of each head where the model has one (Qwen3)."""
    if norm is not None:
        heads = _rms_norm(heads, norm)
    half = heads.shape[-1] // 2
    rotated = heads * cos
    rotated[..., :half].addcmul_(heads[..., half:], sin[..., :half])
    rotated[..., half:].addcmul_(heads[..., :half], sin[..., half:])
    return rotated
