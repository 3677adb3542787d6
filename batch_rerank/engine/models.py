"""One forward for each kind of model.

Each model says how pairs (or texts) are put together (`split`) and computes one such batch. Where device and
architecture allow it, sequences are packed end to end: `decoder.py` for causal models, `encoder.py` for the others.
Else they are padded on the right, with one line in the log. A causal model needs no mask for that: no position looks
ahead, and the answer is read at each row's last real token.

Scores leave in float32, whatever the model's dtype: a bf16 probability near 1 has steps of 2^-8 and would tie the top
of a ranking.
"""

import itertools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from batch_rerank.engine import decoder, encoder
from batch_rerank.engine.attention import Cuts, Tensor, on_device
from batch_rerank.engine.causal_encoding import answer_tokens
from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.engine.encoded import Encoded
from batch_rerank.engine.encoding import PairEncoder
from batch_rerank.engine.loading import load
from batch_rerank.engine.packing import Ids, Index, batches, filled, own_tokens, prefix_of, shared_packs
from batch_rerank.engine.tokens import load_tokenizer
from batch_rerank.errors import ModelError

log = logging.getLogger("batch_rerank")

Forward = Literal["auto", "packed", "padded"]
"""Which forward a model is asked for: packed where there is one, or one of the two insisted on."""


class CausalModel:
    """score = logit(true token) - logit(false token) at the last position (Qwen3-Reranker's card: log-odds of yes), or
    the true token's logit alone where the template names no other."""

    def __init__(self, spec: ModelSpec, device: str, forward: Forward = "auto") -> None:
        model = load(AutoModelForCausalLM, spec, device)
        head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        if getattr(model.config, "final_logit_softcapping", None) or getattr(head, "bias", None) is not None:
            raise ModelError(f"model {spec.name!r}: its head has a bias or a soft cap, which is not supported")
        assert spec.causal is not None
        yes, no = answer_tokens(load_tokenizer(Path(spec.directory)), spec.causal)
        # Two rows in float32 instead of the whole vocabulary: 1.4e-6 from the full head, 35 % less work at 0.6B
        self._direction = head.weight[yes].float()
        if no is not None:
            self._direction = self._direction - head.weight[no].float()
        _refuse_constant(spec, self._direction)
        self.model, self._body, self._device = model, model.base_model, device
        self._decoder, self.fallback = _packed(decoder, self._body, spec, device, forward)

    def split(self, encoded: Encoded, pairs: Index, token_budget: int) -> Iterator[Index]:
        """Pairs in batches of at most `token_budget` tokens; a longer pair is alone."""
        if self._decoder:
            return shared_packs(encoded, pairs, token_budget)
        return (pairs[batch] for batch in batches(encoded.n_tokens[pairs], token_budget))

    def scores(self, encoded: Encoded, pairs: Index) -> Tensor:
        """float32[n] of one batch, on the device."""
        if self._decoder:
            hidden = self._decoder.last_hidden(pack(encoded, pairs, self._device))
        else:
            ids, lengths = padded(sequences(encoded, pairs), self._device)
            hidden = last(self._body(input_ids=ids, use_cache=False).last_hidden_state, lengths)
        scores: Tensor = hidden.float() @ self._direction
        return scores


class ClassificationModel:
    """score = the raw logit of a one-label head over the tokenizer's pair."""

    def __init__(self, spec: ModelSpec, device: str, forward: Forward = "auto") -> None:
        self.model, self._device = load(AutoModelForSequenceClassification, spec, device), device
        linear = [module for module in self.model.modules() if isinstance(module, torch.nn.Linear)]
        heads = [layer for layer in linear if layer.out_features == 1]
        if not heads:
            raise ModelError(
                f"model {spec.name!r}: {type(self.model).__name__} has no linear layer of one output to score"
            )
        _refuse_constant(spec, heads[-1].weight)
        types = getattr(self.model.config, "type_vocab_size", 0) or 0
        pair = PairEncoder(load_tokenizer(Path(spec.directory)), spec.max_length)
        self._document_type = pair.document_type if types > 1 else None
        self._encoder, self.fallback = _packed(encoder, self.model, spec, device, forward)

    def split(self, encoded: Encoded, pairs: Index, token_budget: int) -> Iterator[Index]:
        """Pairs in batches of at most `token_budget` tokens; a longer pair is alone."""
        form = filled if self._encoder else batches
        return (pairs[batch] for batch in form(encoded.n_tokens[pairs], token_budget))

    def scores(self, encoded: Encoded, pairs: Index) -> Tensor:
        """float32[n] of one batch, on the device."""
        rows = sequences(encoded, pairs)
        types = self._types(encoded, pairs, rows) if self._document_type is not None else None
        if self._encoder:
            packed: Tensor = self._encoder.logits(rows, types)[:, 0].float()
            return packed
        ids, lengths = padded(rows, self._device)
        mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        given = {} if types is None else {"token_type_ids": padded(types, self._device)[0]}
        logits: Tensor = self.model(input_ids=ids, attention_mask=mask.long(), **given).logits
        return logits[:, 0].float()

    def _types(self, encoded: Encoded, pairs: Index, rows: Sequence[Ids]) -> list[Ids]:
        """Token types: 0 up to the document, the tokenizer's second type from there on."""
        starts = np.diff(encoded.offsets)[prefix_of(encoded, pairs)]
        second = [np.arange(len(row)) >= start for row, start in zip(rows, starts, strict=True)]
        return [mask * np.int64(self._document_type or 0) for mask in second]


class EmbeddingModel:
    """One vector a text: cls, mean or last-token pooling, then L2 where the checkpoint says so."""

    def __init__(self, spec: ModelSpec, device: str, forward: Forward = "auto") -> None:
        self.model, self._device = load(AutoModel, spec, device), device
        self._pooling, self._normalize = spec.pooling, spec.normalize
        self._decoder = self._encoder = None
        if spec.pooling == "last":
            self._decoder, self.fallback = _packed(decoder, self.model, spec, device, forward)
        else:
            self._encoder, self.fallback = _packed(encoder, self.model, spec, device, forward)

    def split(self, lengths: npt.NDArray[np.int32], token_budget: int) -> Iterator[Index]:
        """Texts of these lengths in batches of at most `token_budget` tokens; a longer text is alone."""
        return (filled if self._decoder or self._encoder else batches)(lengths, token_budget)

    def embed(self, rows: Sequence[Ids]) -> Tensor:
        """float32[n, hidden] of the texts of one batch, on the device."""
        if self._decoder:
            pooled = self._decoder.last_hidden(text_pack(rows, self._device))
        elif self._encoder:
            pooled = self._encoder.pooled(rows, self._pooling)
        else:
            pooled = self._padded(rows)
        return torch.nn.functional.normalize(pooled.float(), dim=1) if self._normalize else pooled.float()

    def _padded(self, rows: Sequence[Ids]) -> Tensor:
        ids, lengths = padded(rows, self._device)
        mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        hidden: Tensor = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state.float()
        if self._pooling == "cls":
            return hidden[:, 0]
        if self._pooling == "last":
            return last(hidden, lengths)
        return (hidden * mask[:, :, None]).sum(1) / lengths[:, None]


def sequences(encoded: Encoded, pairs: Index) -> list[Ids]:
    """All token ids of each pair."""
    prefixes = prefix_of(encoded, pairs)
    return [np.concatenate([encoded.segment(p), own_tokens(encoded, i)]) for p, i in zip(prefixes, pairs, strict=True)]


def pack(encoded: Encoded, pairs: Index, device: str) -> decoder.Pack:
    """Pairs, those of one prefix adjacent, as one row of tokens with every prefix once."""
    prefixes, groups = [], []
    for prefix, members in itertools.groupby(zip(prefix_of(encoded, pairs), pairs, strict=True), lambda item: item[0]):
        ids = encoded.segment(prefix)
        documents = [own_tokens(encoded, pair) for _, pair in members]
        if not len(encoded.tail):  # an empty document then has the prefix's last token as its own last
            documents = [np.concatenate([ids[-1:], document]) for document in documents]
            ids = ids[:-1]
        prefixes.append(ids)
        groups.append(documents)
    return _as_pack(prefixes, groups, device)


def text_pack(rows: Sequence[Ids], device: str) -> decoder.Pack:
    """Texts that share nothing."""
    return _as_pack([], [rows], device)


def _as_pack(prefixes: Sequence[Ids], groups: Sequence[Sequence[Ids]], device: str) -> decoder.Pack:
    starts = [len(prefix) for prefix in prefixes] or [0] * len(groups)
    documents = [document for group in groups for document in group]
    positions = [np.arange(len(prefix)) for prefix in prefixes]
    for start, group in zip(starts, groups, strict=True):
        positions += [np.arange(start, start + len(document)) for document in group]
    return decoder.Pack(
        ids=to_device(np.concatenate([*prefixes, *documents]), device),
        positions=to_device(np.concatenate(positions), device),
        prefixes=Cuts.of([len(prefix) for prefix in prefixes], device),
        groups=Cuts.of([sum(map(len, group)) for group in groups], device),
        group_documents=Cuts.of([len(group) for group in groups], device),
        documents=Cuts.of([len(document) for document in documents], device),
    )


def padded(rows: Sequence[Ids], device: str) -> tuple[Tensor, Tensor]:
    """int64[n, longest] padded on the right with 0, and int64[n] lengths."""
    lengths = np.array([len(row) for row in rows], np.int64)
    ids = np.zeros((len(rows), int(lengths.max(initial=1))), np.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
    return to_device(ids, device), to_device(lengths, device)


def to_device(values: npt.NDArray[np.integer], device: str) -> Tensor:
    """As int64 on the device."""
    return on_device(torch.from_numpy(values.astype(np.int64)), device)


def last(hidden: Tensor, lengths: Tensor) -> Tensor:
    """[n, hidden] at the last real position of [n, longest, hidden]."""
    return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]


def _packed(path: Any, model: Any, spec: ModelSpec, device: str, forward: Forward) -> tuple[Any, str | None]:
    """The packed forward of a model, or None and why its batches are padded, which is said once in the log.

    Raises ModelError where the packed forward is insisted on and there is none for the model.
    """
    reason = "model.forward is padded" if forward == "padded" else path.unsupported(model, device)
    if reason is None:
        return path.Packed(model, device), None
    if forward == "packed":
        raise ModelError(f"model.forward: found packed, but model {spec.name!r} has no such forward here: {reason}")
    if forward == "auto":
        log.warning("model %s: batches are padded, which is slower: %s", spec.name, reason)
    return None, reason


def _refuse_constant(spec: ModelSpec, head: torch.Tensor) -> None:
    """An untrained or zeroed head scores everything alike, and nothing else would say so."""
    if head.min() == head.max():
        raise ModelError(
            f"model {spec.name!r}: every weight of its scoring head is {head.flatten()[0].item():g}; "
            "expected a trained head; this is a base model or a damaged checkpoint"
        )
