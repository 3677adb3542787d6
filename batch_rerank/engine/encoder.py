"""The forward of BERT-like encoders without padding: one row of sequences end to end.

The layers are transformers' own; only attention is replaced, through its `AttentionInterface`, by one that knows
where the sequences begin and end. What reads "the first position" (a pooler, a classification head) is given the
first positions of all sequences.
"""

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface

from batch_rerank.engine.attention import Cuts, Kernel, Tensor, attend, kernel_for, on_device
from batch_rerank.engine.linear import use_onednn
from batch_rerank.engine.packing import Ids

FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert", "gte")
NAME = "batch_rerank_packed"
COUNT_FROM_PAD = ("roberta", "xlm-roberta", "camembert")
"""Architectures that count positions from pad_token_id + 1 and pass over pad tokens inside a text."""


class Packed:
    """An encoder over sequences packed end to end."""

    def __init__(self, model: Any, device: str) -> None:
        self._model, self._device, self._config = model, device, model.config
        self._starts: Tensor | None = None
        head_dim = model.config.hidden_size // model.config.num_attention_heads
        dtype = model.get_input_embeddings().weight.dtype  # the head's is float32
        self._kernel = kernel_for(device, dtype, head_dim)
        self.slower, self.long_apart = self._kernel.reason, self._kernel.name == "varlen"
        use_onednn(model)
        body = model.base_model
        pooler = getattr(body, "pooler", None)
        if model is not body:
            (pooler or model.classifier).register_forward_pre_hook(self._first_positions)

    def logits(self, rows: Sequence[Ids], types: Sequence[Ids] | None) -> Tensor:
        """[n, labels] of a classification model."""
        logits: Tensor = self._forward(rows, types)[0].logits
        return logits

    def pooled(self, rows: Sequence[Ids], pooling: str) -> Tensor:
        """float32[n, hidden] of a bare encoder: the first position of each sequence (cls), or the mean of all."""
        output, cuts = self._forward(rows, None)
        hidden = output.last_hidden_state[0]
        if pooling == "cls":
            first: Tensor = hidden[self._at(cuts)].float()
            return first
        sums = torch.zeros(len(rows), hidden.shape[1], device=hidden.device)
        lengths = np.diff(cuts.at)
        owners = on_device(torch.from_numpy(np.repeat(np.arange(len(rows)), lengths)), self._device)
        total = on_device(torch.from_numpy(lengths), self._device)
        return sums.index_add_(0, owners, hidden.float()) / total[:, None]

    def _forward(self, rows: Sequence[Ids], types: Sequence[Ids] | None) -> tuple[Any, Cuts]:
        cuts = Cuts.of([len(row) for row in rows], self._device)
        given = {} if types is None else {"token_type_ids": self._tensor(types)}
        with self._packed(self._at(cuts)):
            output = self._model(
                input_ids=self._tensor(rows),
                attention_mask=None,
                position_ids=self._tensor([self._positions(row) for row in rows]),
                cuts=cuts,
                kernel=self._kernel,
                **given,
            )
        return output, cuts

    def _positions(self, row: Ids) -> Ids:
        if self._config.model_type not in COUNT_FROM_PAD:
            return np.arange(len(row))
        real = row != self._config.pad_token_id
        positions: Ids = np.cumsum(real) * real + self._config.pad_token_id
        return positions

    def _tensor(self, rows: Sequence[Ids]) -> Tensor:
        return on_device(torch.from_numpy(np.concatenate(rows).astype(np.int64)), self._device)[None]

    def _at(self, cuts: Cuts) -> Tensor:
        return on_device(torch.tensor(cuts.at[:-1]), self._device)

    @contextmanager
    def _packed(self, starts: Tensor) -> Any:
        """One within another leaves the outer one as it was: a signal's handler may score in the middle of a call."""
        before = self._config._attn_implementation, self._starts
        self._config._attn_implementation, self._starts = NAME, starts
        try:
            yield
        finally:
            self._config._attn_implementation, self._starts = before

    def _first_positions(self, module: Any, args: tuple[Any, ...]) -> Any:
        """[1, total, hidden] to [n, 1, hidden], for a module that reads [:, 0]."""
        if self._starts is None:
            return None
        return (args[0][0, self._starts].unsqueeze(1), *args[1:])


def unsupported(model: Any) -> str | None:
    """Why a model cannot run packed, None where it can."""
    if model.config.model_type not in FAMILIES:
        return f"the architecture {model.config.model_type!r} has no packed forward"
    if getattr(model.config, "position_embedding_type", "absolute") not in ("absolute", "rope"):
        return f"its positions are of type {model.config.position_embedding_type!r}"
    return None


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **given: Any
) -> tuple[Tensor, None]:
    """An attention function for transformers: [1, heads, total, dim] each, to [1, total, heads, dim].

    Refuses what it does not honour: an argument that is passed over is a wrong score without a word.
    """
    cuts: Cuts = given.pop("cuts")
    kernel: Kernel = given.pop("kernel")
    given.pop("position_ids", None)
    odd = {name for name, value in given.items() if value is not None and value != 0 and value is not False}
    if attention_mask is not None or odd:
        raise NotImplementedError(f"packed attention of {type(module).__name__}: unexpected arguments {sorted(odd)}")
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    out = torch.empty_like(query)
    attend(query, key, value, cuts, cuts, scaling, False, out, kernel)
    return out[None], None


AttentionInterface.register(NAME, _attention)
