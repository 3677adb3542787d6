"""The forward of Llama-like decoders over a pack: no padding, shared prefixes, the last layer only where it is read.

The weights are those of the loaded transformers model, which stays whole beside this (its own forward is the slow
path that the self-test compares with). What differs is the order of the work: projections of the same input are one
matrix product, results land in place, and an answer needs only the last position of each document, so in the last
layer only those positions are queried and go through the MLP.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from batch_rerank.engine.attention import Cuts, Tensor, attend, can_pack, merge

FAMILIES = ("qwen3", "qwen2", "llama", "mistral", "gemma")
"""Architectures that are this computation: RMS norm, rotary positions, grouped queries, gated MLP."""

STEADY_ROPE = ("default", "linear", "llama3", "yarn")
"""Rotary variants whose frequencies do not depend on the length of the batch."""


@dataclass(frozen=True)
class Pack:
    """Token ids of one forward: the prefixes of some groups end to end, then their documents end to end.

    ids, positions: int64[total]; prefixes: cuts of the prefixes, from row 0; groups: cuts of each group's documents,
    and documents: cuts of every document, both counted from the first document's row.
    """

    ids: Tensor
    positions: Tensor
    prefixes: Cuts
    groups: Cuts
    group_documents: Cuts
    documents: Cuts


class Packed:
    """A decoder's body over packs."""

    def __init__(self, body: Any, device: str) -> None:
        """`body`: the transformers model without its head, e.g. Qwen3Model; `unsupported` must be None for it.

        Joins weights that multiply the same input; the model's own parameters become views of the joined ones.
        """
        self._embed, self._rotary, self._layers = body.embed_tokens, body.rotary_emb, list(body.layers)
        config = body.config
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._dim = getattr(config, "head_dim", None) or config.hidden_size // self._heads
        self._unit_offset = config.model_type == "gemma"  # its norms multiply by 1 + weight
        self._norm = self._norm_of(body.norm)
        self._blocks = [self._block(layer) for layer in self._layers]

    def _norm_of(self, norm: Any) -> tuple[Tensor, float]:
        epsilon = getattr(norm, "variance_epsilon", None) or norm.eps
        return (norm.weight + 1 if self._unit_offset else norm.weight).detach(), float(epsilon)

    def _block(self, layer: Any) -> "_Block":
        attention, mlp = layer.self_attn, layer.mlp
        return _Block(
            before=self._norm_of(layer.input_layernorm),
            after=self._norm_of(layer.post_attention_layernorm),
            query_key_value=_join(attention.q_proj, attention.k_proj, attention.v_proj),
            query_norm=self._norm_of(attention.q_norm) if hasattr(attention, "q_norm") else None,
            key_norm=self._norm_of(attention.k_norm) if hasattr(attention, "k_norm") else None,
            scale=float(attention.scaling),
            output=(attention.o_proj.weight.detach(), attention.o_proj.bias),
            gate_up=_join(mlp.gate_proj, mlp.up_proj),
            down=(mlp.down_proj.weight.detach(), mlp.down_proj.bias),
            activation=mlp.act_fn,
        )

    def last_hidden(self, pack: Pack) -> Tensor:
        """[n_documents, hidden]: the normed hidden state at the last token of every document, in the pack's order."""
        hidden = self._embed(pack.ids)
        cos, sin = (t[0].unsqueeze(1) for t in self._rotary(hidden, pack.positions[None]))
        half = self._dim // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)  # rotate_half's sign, once for all layers
        for block in self._blocks[:-1]:
            query, key, value = self._project(block, hidden, cos, sin)
            block.add_attention(hidden, self._attend(block, query, key, value, pack))
            block.add_mlp(hidden)
        return _rms_norm(self._last_layer(self._blocks[-1], hidden, cos, sin, pack), self._norm)

    def _project(self, block: "_Block", hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        projected = functional.linear(_rms_norm(hidden, block.before), *block.query_key_value)
        heads = [self._heads, self._kv_heads, self._kv_heads]
        query, key, value = torch.split(projected.view(len(hidden), -1, self._dim), heads, 1)
        return _rotate(query, block.query_norm, cos, sin), _rotate(key, block.key_norm, cos, sin), value

    def _attend(self, block: "_Block", query: Tensor, key: Tensor, value: Tensor, pack: Pack) -> Tensor:
        shared = pack.prefixes.at[-1]
        prefix = (key[:shared], value[:shared])
        documents = attend(
            query[shared:], key[shared:], value[shared:], pack.documents, pack.documents, block.scale, True
        )
        if not shared:
            return documents[0].flatten(1)
        prefixes, _ = attend(query[:shared], *prefix, pack.prefixes, pack.prefixes, block.scale, True)
        across = attend(query[shared:], *prefix, pack.groups, pack.prefixes, block.scale, False)
        return torch.cat([prefixes, merge(*documents, *across)]).flatten(1)

    def _last_layer(self, block: "_Block", hidden: Tensor, cos: Tensor, sin: Tensor, pack: Pack) -> Tensor:
        """The layer's output at the last rows only; keys and values are needed at all rows."""
        shared = pack.prefixes.at[-1]
        last = torch.tensor(pack.documents.at[1:], device=hidden.device) + (shared - 1)
        split = self._heads * self._dim
        weight, bias = block.query_key_value
        normed = _rms_norm(hidden, block.before)
        projected = functional.linear(normed, weight[split:], None if bias is None else bias[split:])
        key, value = projected.view(len(hidden), -1, self._dim).chunk(2, 1)
        key = _rotate(key, block.key_norm, cos, sin)
        query = functional.linear(normed[last], weight[:split], None if bias is None else bias[:split])
        query = _rotate(query.view(len(last), -1, self._dim), block.query_norm, cos[last], sin[last])
        n = len(pack.documents.at) - 1
        single = Cuts.of([1] * n, hidden.device.type)
        answer, sums = attend(query, key[shared:], value[shared:], single, pack.documents, block.scale, False)
        if shared:
            across = attend(
                query, key[:shared], value[:shared], pack.group_documents, pack.prefixes, block.scale, False
            )
            answer = merge(answer, sums, *across)
        rows = hidden[last]
        block.add_attention(rows, answer.flatten(1))
        block.add_mlp(rows)
        return rows


@dataclass(frozen=True)
class _Block:
    """One layer's weights as (weight, bias) and norms as (weight, epsilon)."""

    before: tuple[Tensor, float]
    after: tuple[Tensor, float]
    query_key_value: tuple[Tensor, Tensor | None]
    query_norm: tuple[Tensor, float] | None
    key_norm: tuple[Tensor, float] | None
    scale: float
    output: tuple[Tensor, Tensor | None]
    gate_up: tuple[Tensor, Tensor | None]
    down: tuple[Tensor, Tensor | None]
    activation: Any

    def add_attention(self, hidden: Tensor, attended: Tensor) -> None:
        """Add output(attended) to hidden."""
        _add_linear(hidden, attended, *self.output)

    def add_mlp(self, hidden: Tensor) -> None:
        """Add down(activation(gate) * up) to hidden."""
        gate, up = functional.linear(_rms_norm(hidden, self.after), *self.gate_up).chunk(2, -1)
        _add_linear(hidden, self.activation(gate).mul_(up), *self.down)


def unsupported(body: Any, device: str) -> str | None:
    """Why a model cannot run packed, None where it can."""
    config = body.config
    if config.model_type not in FAMILIES:
        return f"the architecture {config.model_type!r} has no packed forward"
    layers = getattr(config, "layer_types", None) or []
    if "sliding_attention" in layers or (not layers and getattr(config, "sliding_window", None)):
        return "its attention has a sliding window"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in STEADY_ROPE:
        return f"its rotary positions are of type {rope!r}"
    if not can_pack(device):
        return "this device and torch have no attention over packed sequences"
    return None


def _join(*linears: Any) -> tuple[Tensor, Tensor | None]:
    """Linear layers of one input as one. Their own weights become views of the joined: no second copy stays."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    for linear, view in zip(linears, torch.split(weight, [linear.out_features for linear in linears]), strict=True):
        linear.weight.data = view
    if linears[0].bias is None:
        return weight, None
    return weight, torch.cat([linear.bias.detach() for linear in linears])


def _add_linear(hidden: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    hidden.addmm_(inputs, weight.t())
    if bias is not None:
        hidden.add_(bias)


def _rms_norm(hidden: Tensor, norm: tuple[Tensor, float]) -> Tensor:
    weight, epsilon = norm
    return functional.rms_norm(hidden, (hidden.shape[-1],), weight, epsilon)


def _rotate(heads: Tensor, norm: tuple[Tensor, float] | None, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions of [n, heads, dim], after the norm of each head where the model has one (Qwen3)."""
    if norm is not None:
        heads = _rms_norm(heads, norm)
    half = heads.shape[-1] // 2
    rotated = heads * cos
    rotated[..., :half].addcmul_(heads[..., half:], sin[..., :half])
    rotated[..., half:].addcmul_(heads[..., :half], sin[..., half:])
    return rotated
