"""Queries and documents to the token ids of a causal reranker's template."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from batch_rerank.engine.encoded import NONE, Encoded, Group, Int32, assemble, assemble_whole
from batch_rerank.engine.templates import CausalTemplate
from batch_rerank.engine.tokens import PROBES, TokenCache, distinct_ids, token_ids, unique_items
from batch_rerank.errors import ConfigError, ModelError


class CausalEncoder:
    """ids(prefix) + ids(pieces of the middle) + ids(suffix); what the template has after the document is never cut.

    A piece is split before the space that precedes the document and after the document, which for Qwen's tokenizer
    gives the ids of the whole string, so query and document are tokenised apart and once each. Where the probes
    disprove that for a tokenizer, or where a query follows its document, the pairs are tokenised one by one.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: CausalTemplate,
        instruction: str | None,
        max_length: int,
        overlap: int | None = None,
    ) -> None:
        self._overlap, self._cache = overlap, TokenCache(tokenizer)
        self._tokenizer, self._template, self._instruction = tokenizer, template, instruction
        self._prefix, self._suffix = (token_ids(tokenizer, [text])[0] for text in (template.prefix, template.suffix))
        self._max_length = max_length
        if template.true_token is not None:  # else a classification head answers
            answer_tokens(tokenizer, template)
        empty = self._frame(Group("", []))
        needed = len(self._prefix) + len(self._whole(empty, ""))
        if needed >= max_length:
            raise ConfigError(
                f"model.max_length: found {max_length}, but the template {template.name!r} takes {needed} tokens; "
                f"set at least {needed + 16}"
            )
        self.splits = template.constant_tail and self._split_is_exact()
        if overlap is not None and not self.splits:
            raise ConfigError(
                f"scoring.long_documents: found 'chunk', but with the template {template.name!r} and this tokenizer a "
                "document cannot be tokenised apart from its query; set truncate"
            )

    def _split_is_exact(self) -> bool:
        frames = [self._frame(Group(query, [])) for query in PROBES]
        documents = token_ids(self._tokenizer, [frames[0].lead + text for text in PROBES])
        tail = frames[0].tail
        if not len(tail):
            raise ModelError(f"template {self._template.name!r}: nothing follows the document; add a suffix")
        return all(
            np.array_equal(np.concatenate([frame.head, document, tail]), self._whole(frame, text))
            for frame in frames
            for document, text in zip(documents, PROBES, strict=True)
        )

    def _frame(self, group: Group) -> "_Frame":
        before, after, rest = self._template.pieces(group.query, self._given(group))
        text = before[-1]
        lead = text[len(text.rstrip(" ")) :]
        head = token_ids(self._tokenizer, [*before[:-1], text.rstrip(" ")])
        following = token_ids(self._tokenizer, rest)
        tail = np.concatenate([*token_ids(self._tokenizer, [after]), *following, self._suffix])
        around = (np.concatenate([*head[:-1]]) if head[:-1] else NONE, np.concatenate([*following, self._suffix]))
        return _Frame(np.concatenate(head), lead, tail, text, after, around)

    def _whole(self, frame: "_Frame", document: str) -> Int32:
        """The ids of a pair after the prefix, with the document's piece tokenised as one string."""
        piece = token_ids(self._tokenizer, [frame.before + document + frame.after])[0]
        return np.concatenate([frame.around[0], piece, frame.around[1]])

    def encode(self, groups: Sequence[Group]) -> Encoded:
        """See Encoder."""
        return self._encode_apart(groups) if self.splits else self._encode_whole(groups)

    def _encode_apart(self, groups: Sequence[Group]) -> Encoded:
        keys, frame_of = unique_items([(group.query, self._given(group)) for group in groups])
        befores = [self._template.pieces(*key)[0] for key in keys]
        frame = self._frame(Group("", []))
        flat = [piece for before in befores for piece in [*before[:-1], before[-1].rstrip(" ")]]
        ids, ids_of = distinct_ids(self._tokenizer, flat)
        ends = np.cumsum([len(before) for before in befores])
        heads = [np.concatenate([ids[i] for i in piece]) for piece in np.split(ids_of, ends[:-1])] if keys else []
        limit = self._max_length - len(self._prefix) - len(frame.tail)
        documents = [frame.lead + document for group in groups for document in group.documents]
        lengths = np.array([len(head) for head in heads], np.int32)[frame_of]
        prefixes = [np.concatenate([self._prefix, head[:limit]]) for head in heads]
        room = np.maximum(limit - lengths, 0)
        segments, document_of = self._cache.distinct(documents)
        cut = lengths > limit
        return assemble(groups, prefixes, frame_of, segments, document_of, room, cut, frame.tail, self._overlap)

    def _encode_whole(self, groups: Sequence[Group]) -> Encoded:
        """Every pair's own string. Where it is too long, its pieces are tokenised apart and the document is cut."""
        limit = self._max_length - len(self._prefix)
        keys, key_of = unique_items([(group.query, self._given(group)) for group in groups])
        texts = [
            (int(key), document) for key, group in zip(key_of, groups, strict=True) for document in group.documents
        ]
        known: dict[int, dict[str, int]] = {key: {} for key in range(len(keys))}
        for key, document in texts:
            known[key].setdefault(document, len(known[key]))
        segments: dict[int, list[Int32]] = {}
        cuts: list[bool] = []
        first = np.cumsum([0, *(len(known[key]) for key in range(len(keys)))])
        for key, (query, instruction) in enumerate(keys):
            frame = self._frame(Group(query, [], instruction))
            pieces = token_ids(self._tokenizer, [frame.before + document + frame.after for document in known[key]])
            whole = [np.concatenate([frame.around[0], piece, frame.around[1]]) for piece in pieces]
            cuts += [len(ids) > limit for ids in whole]
            fitted = [
                self._cut(frame, document, limit) if len(ids) > limit else ids
                for document, ids in zip(known[key], whole, strict=True)
            ]
            segments[key] = [ids[: len(ids) - len(self._suffix)] for ids in fitted]
        pair_of = np.array([first[key] + known[key][document] for key, document in texts], np.int32)
        return assemble_whole(groups, key_of, self._prefix, segments, cuts, pair_of, self._suffix)

    def _cut(self, frame: "_Frame", document: str, limit: int) -> Int32:
        tail = frame.tail[-limit:]  # longer only where the query follows the document: its end is kept
        head = frame.head[: limit - len(tail)]
        kept = token_ids(self._tokenizer, [frame.lead + document])[0][: limit - len(tail) - len(head)]
        return np.concatenate([head, kept, tail])

    def _given(self, group: Group) -> str:
        instruction = self._instruction if group.instruction is None else group.instruction
        return instruction or ""


def answer_tokens(tokenizer: Tokenizer, template: CausalTemplate) -> tuple[int, int | None]:
    """Ids of the template's true and false token. Raises ModelError unless each is one token of the vocabulary."""
    answers = (template.true_token, template.false_token)
    true, false = (_token(tokenizer, template.name, answer) for answer in answers)
    if true == false or true is None:
        raise ModelError(f"template {template.name!r}: both answers are token {true}, expected two different ones")
    return true, false


def _token(tokenizer: Tokenizer, template: str, token: str | int | None) -> int | None:
    if token is None:
        return None
    if isinstance(token, int):
        if tokenizer.id_to_token(token) is None:
            raise ModelError(
                f"template {template!r}: the answer is token id {token}, which the tokenizer does not have"
            )
        return token
    found = tokenizer.encode(token, add_special_tokens=False).ids
    if len(found) != 1:
        raise ModelError(
            f"template {template!r}: the answer {token!r} is {len(found)} tokens here ({found}), expected one"
        )
    return int(found[0])


@dataclass(frozen=True)
class _Frame:
    """What surrounds a group's documents: ids before (`head`, without the prefix) and after (`tail`, with the suffix);
    the spaces that go with the document; the texts around it in its own piece, and the ids of the other pieces."""

    head: Int32
    lead: str
    tail: Int32
    before: str
    after: str
    around: tuple[Int32, Int32]
