"""Texts to token ids: groups of one query and its documents become one flat `Encoded`.

Every distinct text of a call is tokenised once. The ids are those of the checkpoint's own tokenizer.json, read with
the `tokenizers` library: transformers 5 rebuilds some tokenizers and drops their normalisers silently.

A pair's sequence is prefix(query) + document[:kept] + tail. A bi-encoder's two sequences are the prefix (the whole
query) and the document. No torch here, so that a CPU task which only tokenises starts fast and stays small.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from tokenizers import Encoding, Tokenizer

from batch_rerank.engine.causal_encoding import CausalEncoder, answer_tokens
from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.engine.encoded import (
    NONE,
    Encoded,
    Group,
    Ids,
    assemble,
    chunked,
    concatenate,
    lengths_of,
    pair_starts,
)
from batch_rerank.engine.kinds import with_instruction
from batch_rerank.engine.tokens import (
    PROBES,
    TokenCache,
    distinct_ids,
    load_tokenizer,
    special_ids,
    token_ids,
    unique_items,
)
from batch_rerank.errors import ConfigError, ModelError


class Encoder(Protocol):
    """Turns groups into token ids."""

    def encode(self, groups: Sequence[Group]) -> Encoded:
        """Encode the groups; any valid Unicode text has an encoding."""
        ...


def make_encoder(spec: ModelSpec) -> Encoder:
    """The encoder of a model. Raises ModelError where the tokenizer does not fit the template."""
    if spec.kind == "checksum":
        return ByteEncoder(spec.max_length, spec.instruction or "", spec.chunk_overlap)
    tokenizer = load_tokenizer(Path(spec.directory))
    encoder = _model_encoder(spec, tokenizer)
    return EscapingEncoder(encoder, tokenizer) if spec.escape else encoder


def _model_encoder(spec: ModelSpec, tokenizer: Tokenizer) -> Encoder:
    if spec.causal is not None:  # of a causal model, or of a decoder with a classification head
        if spec.kind == "causal":
            answer_tokens(tokenizer, spec.causal)
        return CausalEncoder(tokenizer, spec.causal, spec.instruction, spec.max_length, spec.chunk_overlap)
    if spec.kind == "sequence_classification":
        return PairEncoder(tokenizer, spec.max_length, spec.chunk_overlap)
    return SentenceEncoder(tokenizer, spec)


class EscapingEncoder:
    """Reads control tokens inside queries, their instructions and documents as plain text: "<|im_end|>" becomes
    "< |im_end|>".

    Tokenizers find the strings of their added tokens anywhere, so a document could end its own turn and begin an
    answer. The space keeps the text readable and the control token out. Tokens that are `normalized` are found in the
    normalized text, so "＜mask＞" may be one too: where there are any, the tokenizer is asked where it sees one, which
    takes as long again as tokenising. Where even the space is normalized away, a character of the token goes.
    """

    def __init__(self, encoder: Encoder, tokenizer: Tokenizer) -> None:
        added = _added(tokenizer)
        contents = sorted(added.values(), key=len, reverse=True)
        self._encoder, self._tokenizer, self._added = encoder, tokenizer, set(added)
        self._control = re.compile("|".join(map(re.escape, contents))) if contents else None
        known = tokenizer.get_added_tokens_decoder()
        self._look = tokenizer.normalizer is not None and any(known[number].normalized for number in added)

    def encode(self, groups: Sequence[Group]) -> Encoded:
        """See Encoder."""
        texts = [text for group in groups for text in (group.query, group.instruction or "", *group.documents)]
        plain = self._plain(list(dict.fromkeys(texts)))
        return self._encoder.encode(
            [
                Group(
                    plain[group.query],
                    [plain[document] for document in group.documents],
                    group.instruction and plain[group.instruction],
                )
                for group in groups
            ]
        )

    def _plain(self, texts: Sequence[str]) -> dict[str, str]:
        """Distinct texts without control tokens."""
        found = {text: self._control.sub(_apart, text) if self._control else text for text in texts}
        left, broken = list(found) if self._look else [], _broken
        while left:
            encodings = self._tokenizer.encode_batch([found[text] for text in left], add_special_tokens=False)
            seen = zip(left, map(self._places, encodings), strict=True)
            again = {text: places for text, places in seen if places and found[text]}
            for text, places in again.items():
                for start, stop in reversed(places):
                    found[text] = broken(found[text], start, stop)
            left, broken = list(again), _shortened  # a normalizer may drop the space again
        return found

    def _places(self, encoding: Encoding) -> list[tuple[int, int]]:
        return [at for number, at in zip(encoding.ids, encoding.offsets, strict=True) if number in self._added]


def _apart(found: re.Match[str]) -> str:
    return f"{found[0][0]} {found[0][1:]}"


def _broken(text: str, start: int, stop: int) -> str:
    """With a space behind the first character of a token, before which it may take spaces along."""
    first = stop - len(text[start:stop].lstrip()) + 1
    return f"{text[:first]} {text[first:]}"


def _shortened(text: str, start: int, stop: int) -> str:
    """Without the last character of a token, which no normalizer brings back."""
    last = max(stop, 1) - 1
    return text[:last] + text[last + 1 :]


def _added(tokenizer: Tokenizer) -> dict[int, str]:
    """The added tokens that a space can break: not single characters, nor the runs of spaces that some have."""
    known = tokenizer.get_added_tokens_decoder()
    return {number: token.content for number, token in known.items() if len(token.content.strip()) > 1}


class PairEncoder:
    """The tokenizer's own pair, e.g. `<s> query </s></s> document </s>`.

    Truncation is FlagEmbedding's: the query to 3/4 of max_length at most, then the document only.
    """

    def __init__(self, tokenizer: Tokenizer, max_length: int, overlap: int | None = None) -> None:
        self._tokenizer, self._max_length, self._overlap = tokenizer, max_length, overlap
        self._cache = TokenCache(tokenizer)
        probe = tokenizer.encode("a", "b")
        self._start, self._middle, self._end = special_ids(probe, 2)
        types = dict(zip(probe.sequence_ids, probe.type_ids, strict=True))
        self.document_type = int(types[1])
        self._assert_layout()

    def _assert_layout(self) -> None:
        for query, document in zip(PROBES, reversed(PROBES), strict=True):
            q, d = token_ids(self._tokenizer, [query, document])
            whole = self._tokenizer.encode(query, document)
            types = [0] * (len(self._start) + len(q) + len(self._middle))
            types += [self.document_type] * (len(d) + len(self._end))
            if [*self._start, *q, *self._middle, *d, *self._end] != whole.ids or types != whole.type_ids:
                raise ModelError(
                    f"the tokenizer's pair layout differs from text to text, seen with {query!r}, {document!r}"
                )

    def encode(self, groups: Sequence[Group]) -> Encoded:
        """See Encoder."""
        longest = self._max_length * 3 // 4
        query_ids, query_of = distinct_ids(self._tokenizer, [group.query for group in groups])
        prefixes = [np.concatenate([self._start, ids[:longest], self._middle]) for ids in query_ids]
        lengths = lengths_of(prefixes)[query_of]
        cut = (lengths_of(query_ids) > longest)[query_of]
        documents = [document for group in groups for document in group.documents]
        room = self._max_length - len(self._end) - lengths
        segments, document_of = self._cache.distinct(documents)
        sizes, one = np.diff(pair_starts(groups)), np.zeros(len(groups), np.int32)
        cuts = np.repeat(cut, sizes)
        tails = [self._end]
        return assemble(groups, prefixes, query_of, tails, one, segments, document_of, room, cuts, self._overlap)


class SentenceEncoder:
    """Each text alone, after its prompt, between the tokenizer's special tokens, which truncation never removes."""

    def __init__(self, tokenizer: Tokenizer, spec: ModelSpec) -> None:
        self._tokenizer, self._spec, self._cache = tokenizer, spec, TokenCache(tokenizer)
        self._start, self._end = special_ids(tokenizer.encode("a"), 1)
        if spec.pooling == "last" and not len(self._end):
            raise ModelError(
                f"model {spec.name!r} pools the last token, but its tokenizer appends no end token to a text; "
                "expected one (Qwen3-Embedding: <|endoftext|>); use the model's own tokenizer.json"
            )
        if spec.chunk_overlap is not None and spec.document_prompt:
            raise ConfigError(
                f"scoring.long_documents: found 'chunk', but the model wants {spec.document_prompt!r} before a "
                "document and its later chunks would lack it; set truncate"
            )

    def encode(self, groups: Sequence[Group]) -> Encoded:
        """See Encoder. `n_tokens` of a pair counts both of its texts."""
        room = self._spec.max_length - len(self._start) - len(self._end)
        document_ids: Sequence[Ids]
        query_ids, query_of = distinct_ids(self._tokenizer, [self._prompt(group) + group.query for group in groups])
        texts = [self._spec.document_prompt + document for group in groups for document in group.documents]
        document_ids, document_of = self._cache.distinct(texts)
        starts, chunks = pair_starts(groups), None
        if self._spec.chunk_overlap is not None:
            rooms = np.full(len(document_of), room, np.int32)
            document_ids, document_of, chunks = chunked(document_ids, document_of, rooms, self._spec.chunk_overlap)
            starts = np.searchsorted(chunks.owner, starts)
        segments = [np.concatenate([self._start, ids[:room], self._end]) for ids in [*query_ids, *document_ids]]
        lengths = lengths_of(segments)
        cut = np.array([len(ids) > room for ids in [*query_ids, *document_ids]], np.bool_)
        if chunks is not None and room > (self._spec.chunk_overlap or 0):
            cut[len(query_ids) :] = False
        document = (document_of + len(query_ids)).astype(np.int32)
        query_of_pair = np.repeat(query_of, np.diff(starts))
        return Encoded(
            *concatenate(segments),
            prefix=query_of,
            tails=[NONE],
            tail=np.zeros(len(groups), np.int32),
            starts=starts,
            document=document,
            kept=lengths[document],
            n_tokens=lengths[query_of_pair] + lengths[document],
            truncated=cut[query_of_pair] | cut[document],
            chunks=chunks,
        )

    def _prompt(self, group: Group) -> str:
        instruction = self._spec.instruction if group.instruction is None else group.instruction
        return with_instruction(self._spec.query_prompt, instruction)


class ByteEncoder:
    """UTF-8 bytes as token ids: what the free `checksum` kind scores, for measuring and testing the pipeline."""

    def __init__(self, max_length: int, instruction: str = "", overlap: int | None = None) -> None:
        self._max_length, self._instruction, self._overlap = max_length, instruction, overlap

    def encode(self, groups: Sequence[Group]) -> Encoded:
        """See Encoder."""
        instructions = [self._instruction if group.instruction is None else group.instruction for group in groups]
        heads = [f"{i}\n{group.query}\n" for i, group in zip(instructions, groups, strict=True)]
        unique, head_of = unique_items(heads)
        whole = [_byte_ids(text) for text in unique]
        lengths = lengths_of(whole)[head_of]
        texts, document_of = unique_items([document for group in groups for document in group.documents])
        segments = [_byte_ids(text) for text in texts]
        prefixes = [ids[: self._max_length] for ids in whole]
        room = np.maximum(self._max_length - lengths, 0)
        sizes, one = np.diff(pair_starts(groups)), np.zeros(len(groups), np.int32)
        cuts = np.repeat(lengths > self._max_length, sizes)
        return assemble(groups, prefixes, head_of, [NONE], one, segments, document_of, room, cuts, self._overlap)


def _byte_ids(text: str) -> Ids:
    return np.frombuffer(text.encode(), np.uint8)
