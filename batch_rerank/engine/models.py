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
from transformers.modeling_layers import GenericForSequenceClassification

from batch_rerank.engine import decoder, encoder
from batch_rerank.engine.architecture import looks_both_ways, rope_regime
from batch_rerank.engine.attention import Cuts, Tensor, on_device
from batch_rerank.engine.causal_encoding import answer_tokens
from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.engine.encoded import NONE, Encoded
from batch_rerank.engine.encoding import PairEncoder
from batch_rerank.engine.loading import load
from batch_rerank.engine.packing import (
    Ids,
    Index,
    batches,
    filled,
    long_apart,
    own_tokens,
    prefix_of,
    shared_packs,
)
from batch_rerank.engine.tokens import load_tokenizer
from batch_rerank.errors import ModelError

log = logging.getLogger("batch_rerank")

Forward = Literal["auto", "packed", "padded"]
"""Which forward a model is asked for: packed where there is one, or one of the two insisted on."""


class DecoderModel:
    """A decoder that answers at the last position of a pair, and what its answer is read with: a direction in the
    space of the last hidden state."""

    def __init__(self, spec: ModelSpec, model: Any, direction: Tensor, device: str, forward: Forward) -> None:
        """`direction`: float32[hidden], whose product with the last hidden state is the score."""
        self.model, self._device, self._direction = model, device, direction
        self._padding = Padding(model.base_model, device)
        self._decoder, self.fallback = _packed(decoder, model.base_model, spec, device, forward)
        self.packed = self._decoder is not None

    def split(self, encoded: Encoded, pairs: Index, token_budget: int) -> Iterator[Index]:
        """Pairs in batches of at most `token_budget` tokens; a longer pair is alone."""
        if self._decoder and self._decoder.long_apart:
            own = encoded.n_tokens[pairs] - np.diff(encoded.offsets)[prefix_of(encoded, pairs)]
            parts = (shared_packs(encoded, pairs[alike], token_budget) for alike in long_apart(own))
            return itertools.chain.from_iterable(parts)
        if self._decoder:
            return shared_packs(encoded, pairs, token_budget)
        return (pairs[batch] for batch in self._padding.split(encoded.n_tokens[pairs], token_budget))

    def scores(self, encoded: Encoded, pairs: Index) -> Tensor:
        """float32[n] of one batch, on the device."""
        if self._decoder:
            hidden = self._decoder.last_hidden(pack(encoded, pairs, self._device))
        else:
            hidden = last(*self._padding.hidden(sequences(encoded, pairs)))
        scores: Tensor = hidden.float() @ self._direction
        return scores


def causal_model(spec: ModelSpec, device: str, forward: Forward = "auto") -> DecoderModel:
    """Score = logit(true token) - logit(false token) at the last position (Qwen3-Reranker's card: log-odds of yes), or
    the true token's logit alone where the template names no other."""
    model = load(AutoModelForCausalLM, spec, device)
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if getattr(model.config, "final_logit_softcapping", None) or getattr(head, "bias", None) is not None:
        raise ModelError(f"model {spec.name!r}: its head has a bias or a soft cap, which is not supported")
    assert spec.causal is not None
    yes, no = answer_tokens(load_tokenizer(Path(spec.directory)), spec.causal)
    # Two rows in float32 instead of the whole vocabulary: 1.4e-6 from the full head, 35 % less work at 0.6B
    direction = head.weight[yes].float()
    if no is not None:
        direction = direction - head.weight[no].float()
    _refuse_constant(spec, direction)
    return DecoderModel(spec, model, direction, device, forward)


def classification_model(
    spec: ModelSpec, device: str, forward: Forward = "auto"
) -> "DecoderModel | ClassificationModel":
    """Score = the raw logit of a one-label head, or of two labels the second's minus the first's (the log-odds of
    "relevant" in a softmax over both). A decoder's head reads the last position, as transformers' own does."""
    model = load(AutoModelForSequenceClassification, spec, device)
    if isinstance(model, GenericForSequenceClassification):
        rows = model.score.weight.float()
        direction = rows[0] if len(rows) == 1 else rows[1] - rows[0]
        _refuse_constant(spec, direction)
        return DecoderModel(spec, model, direction, device, forward)
    heads = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module.out_features == 1]
    if not heads:
        raise ModelError(f"model {spec.name!r}: {type(model).__name__} has no linear layer of one output to score")
    _refuse_constant(spec, heads[-1].weight)
    return ClassificationModel(spec, model, device, forward)


class ClassificationModel:
    """score = the raw logit of an encoder's one-label head over the tokenizer's pair. The head computes in float32:
    in bfloat16 it gave 30 distinct scores for 100 distinct documents."""

    def __init__(self, spec: ModelSpec, model: Any, device: str, forward: Forward = "auto") -> None:
        self.model, self._device = model, device
        _widen_heads(model)
        types = getattr(self.model.config, "type_vocab_size", 0) or 0
        pair = PairEncoder(load_tokenizer(Path(spec.directory)), spec.max_length)
        self._document_type = pair.document_type if types > 1 else None
        self._encoder, self.fallback = _packed(encoder, self.model, spec, device, forward)
        self.packed = self._encoder is not None

    def split(self, encoded: Encoded, pairs: Index, token_budget: int) -> Iterator[Index]:
        """Pairs in batches of at most `token_budget` tokens; a longer pair is alone."""
        lengths = encoded.n_tokens[pairs]
        form = _filled(self._encoder, lengths, token_budget) if self._encoder else batches(lengths, token_budget)
        return (pairs[batch] for batch in form)

    def scores(self, encoded: Encoded, pairs: Index) -> Tensor:
        """float32[n] of one batch, on the device."""
        rows = sequences(encoded, pairs)
        types = self._types(encoded, pairs, rows) if self._document_type is not None else None
        if self._encoder:
            packed: Tensor = self._encoder.logits(rows, types)[:, 0].float()
            return packed
        ids, lengths = padded(rows, self._device)
        given = {} if types is None else {"token_type_ids": padded(types, self._device)[0]}
        logits: Tensor = self.model(input_ids=ids, attention_mask=mask_of(ids, lengths), **given).logits
        return logits[:, 0].float()

    def _types(self, encoded: Encoded, pairs: Index, rows: Sequence[Ids]) -> list[Ids]:
        """Token types: 0 up to the document, the tokenizer's second type from there on."""
        starts = np.diff(encoded.offsets)[prefix_of(encoded, pairs)]
        second = [np.arange(len(row)) >= start for row, start in zip(rows, starts, strict=True)]
        return [mask * np.int64(self._document_type or 0) for mask in second]


def embedding_model(spec: ModelSpec, device: str, forward: Forward = "auto") -> "EmbeddingModel":
    """A bi-encoder."""
    return EmbeddingModel(spec, load(AutoModel, spec, device), device, forward)


class EmbeddingModel:
    """One vector a text: cls, mean or last-token pooling, then L2 where the checkpoint says so."""

    def __init__(self, spec: ModelSpec, model: Any, device: str, forward: Forward = "auto") -> None:
        self.model, self._device = model, device
        self._pooling, self._normalize = spec.pooling, spec.normalize
        self._padding = Padding(model, device, masked=True)
        self._decoder = self._encoder = None
        if spec.pooling == "last":
            self._decoder, self.fallback = _packed(decoder, self.model, spec, device, forward)
        else:
            self._encoder, self.fallback = _packed(encoder, self.model, spec, device, forward)
        self.packed = bool(self._decoder or self._encoder)

    def split(self, lengths: npt.NDArray[np.int32], token_budget: int) -> Iterator[Index]:
        """Texts of these lengths in batches of at most `token_budget` tokens; a longer text is alone."""
        if self._decoder or self._encoder:
            return _filled(self._decoder or self._encoder, lengths, token_budget)
        return self._padding.split(lengths, token_budget)

    def embed(self, rows: Sequence[Ids]) -> Tensor:
        """float32[n, hidden] of the texts of one batch, on the device."""
        if self._decoder:
            pooled = self._decoder.last_hidden(as_pack([(NONE, rows)], self._device))
        elif self._encoder:
            pooled = self._encoder.pooled(rows, self._pooling)
        else:
            pooled = self._padded(rows)
        return torch.nn.functional.normalize(pooled.float(), dim=1) if self._normalize else pooled.float()

    def _padded(self, rows: Sequence[Ids]) -> Tensor:
        hidden, lengths = self._padding.hidden(rows)
        hidden = hidden.float()
        if self._pooling == "cls":
            return hidden[:, 0]
        if self._pooling == "last":
            return last(hidden, lengths)
        return (hidden * mask_of(hidden, lengths)[:, :, None]).sum(1) / lengths[:, None]


def _filled(path: Any, lengths: npt.NDArray[np.int32], token_budget: int) -> Iterator[Index]:
    """Indexes of sequences in evenly filled runs, long ones apart where the packed forward wants that."""
    for alike in long_apart(lengths) if path.long_apart else [np.arange(len(lengths))]:
        for run in filled(lengths[alike], token_budget):
            yield alike[run]


def sequences(encoded: Encoded, pairs: Index) -> list[Ids]:
    """All token ids of each pair."""
    prefixes = prefix_of(encoded, pairs)
    rows = zip(prefixes, own_tokens(encoded, pairs), strict=True)
    return [np.concatenate([encoded.segment(prefix), own]) for prefix, own in rows]


def pack(encoded: Encoded, pairs: Index, device: str) -> decoder.Pack:
    """Pairs, those of one prefix adjacent, as one row of tokens with every prefix once."""
    groups: list[tuple[Ids, list[Ids]]] = []
    rows = zip(prefix_of(encoded, pairs), own_tokens(encoded, pairs), strict=True)
    for prefix, members in itertools.groupby(rows, lambda item: item[0]):
        ids, documents = encoded.segment(prefix), [own for _, own in members]
        if any(len(document) == 0 for document in documents):  # such a one has the prefix's last token as its own last
            ids, documents = ids[:-1], [np.concatenate([ids[-1:], document]) for document in documents]
        groups.append((ids, documents))
    return as_pack(groups, device)


def as_pack(groups: Sequence[tuple[Ids, Sequence[Ids]]], device: str) -> decoder.Pack:
    """Prefixes with their documents, none of which is empty; a prefix may be, then its documents come last."""
    prefixed = [group for group in groups if len(group[0])]
    bare = [document for prefix, documents in groups if not len(prefix) for document in documents]
    prefixes = [prefix for prefix, _ in prefixed]
    documents = [*(document for _, own in prefixed for document in own), *bare]
    starts = [*(len(prefix) for prefix, own in prefixed for _ in own), *(0 for _ in bare)]
    positions = [np.arange(len(prefix)) for prefix in prefixes]
    positions += [np.arange(start, start + len(own)) for start, own in zip(starts, documents, strict=True)]
    cuts = Cuts.of([len(document) for document in documents], device)
    shared = sum(map(len, prefixes))
    is_bare = np.repeat([not len(prefix) for prefix, _ in groups], [len(own) for _, own in groups])
    asked = np.argsort(np.argsort(is_bare, kind="stable"))
    return decoder.Pack(
        ids=to_device(np.concatenate([*prefixes, *documents]), device),
        positions=to_device(np.concatenate(positions), device),
        prefixes=Cuts.of([len(prefix) for prefix in prefixes], device),
        groups=Cuts.of([sum(map(len, own)) for _, own in prefixed], device),
        group_documents=Cuts.of([len(own) for _, own in prefixed], device),
        documents=cuts,
        last=to_device(np.array(cuts.at[1:]) + (shared - 1), device),
        singles=Cuts.of([1] * len(documents), device),
        asked=to_device(asked, device) if (np.diff(asked) < 0).any() else None,
    )


class Padding:
    """How a model's sequences are padded, on the right, into batches: what its positions and its attention allow."""

    def __init__(self, body: Any, device: str, masked: bool = False) -> None:
        """`masked`: a mask is always given; else only where a position looks ahead."""
        self._body, self._device = body, device
        config = body.config.to_dict()
        self._border, self._masked = rope_regime(config), masked or looks_both_ways(config)
        self._given = {"use_cache": False} if hasattr(body.config, "use_cache") else {}

    def split(self, lengths: npt.NDArray[np.int32], token_budget: int) -> Iterator[Index]:
        """Indexes of sequences in batches. Those above the length from which on rotary positions are scaled otherwise
        (longrope) are never beside shorter ones: transformers takes the longest one's for the whole batch."""
        longer = lengths > (lengths.max(initial=0) if self._border is None else self._border)
        for alike in (np.flatnonzero(~longer), np.flatnonzero(longer)):
            for batch in batches(lengths[alike], token_budget):
                yield alike[batch]

    def hidden(self, rows: Sequence[Ids]) -> tuple[Tensor, Tensor]:
        """[n, longest, hidden] of one batch, and int64[n] lengths."""
        ids, lengths = padded(rows, self._device)
        mask = {"attention_mask": mask_of(ids, lengths)} if self._masked else {}
        return self._body(input_ids=ids, **mask, **self._given).last_hidden_state, lengths


def mask_of(ids: Tensor, lengths: Tensor) -> Tensor:
    """int64[n, longest]: 1 at real positions, 0 at padding."""
    return (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()


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


def _widen_heads(model: Any) -> None:
    """Let everything behind an encoder's layers, its pooler included, compute in float32."""
    body = model.base_model

    def widen(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(one.float() if isinstance(one, Tensor) and one.is_floating_point() else one for one in args)

    heads = [child for child in model.children() if child is not body]
    for head in [*heads, getattr(body, "pooler", None)]:
        if head is not None and next(head.parameters(), None) is not None:
            for weight in head.parameters():
                weight.data = weight.data.float()
            head.register_forward_pre_hook(widen)


def _packed(path: Any, model: Any, spec: ModelSpec, device: str, forward: Forward) -> tuple[Any, str | None]:
    """The packed forward of a model, or None and why its batches are padded, which is said once in the log.

    Raises ModelError where the packed forward is insisted on, or float8, which is its alone, and there is none for the
    model.
    """
    reason = "model.forward is padded" if forward == "padded" else path.unsupported(model)
    float8 = spec.dtype == "float8"
    if float8 and (reason or path is not decoder):
        reason = reason or "it is no decoder"
        raise ModelError(f"model.dtype: found float8, which model {spec.name!r} has not here: {reason}; set bfloat16")
    if reason is None:
        found = decoder.Packed(model, device, float8=True) if float8 else path.Packed(model, device)
        if found.slower:
            log.warning("model %s: the packed forward does without its fastest kernels: %s", spec.name, found.slower)
        return found, found.slower
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
