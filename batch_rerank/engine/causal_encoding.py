"""Queries and documents to the token ids of a causal reranker's template."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from batch_rerank.engine.encoded import Encoded, Group, Int32, assemble, lengths_of, pair_starts
from batch_rerank.engine.templates import PLACES, CausalTemplate
from batch_rerank.engine.tokens import PROBES, TokenCache, distinct_ids, token_ids, unique_items
from batch_rerank.errors import ConfigError, ModelError

Way = Literal["apart", "joined", "whole"]
_PLACE = re.compile("|".join(map(re.escape, PLACES)))


class CausalEncoder:
    """ids(prefix) + ids(pieces of the middle) + ids(suffix); what the template has after the document is never cut.

    A pair is a head and a tail, which its query decides, around its document, so query and document are tokenised once
    each. The document's piece is cut before the spaces that precede the document, and `apart`: after the document, or
    `joined`: after the template's own text that follows it, which for Qwen's tokenizer gives the ids of the whole
    string. Where the probes disprove both for a tokenizer, every pair is tokenised as one string (`whole`).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: CausalTemplate,
        instruction: str | None,
        max_length: int,
        overlap: int | None = None,
    ) -> None:
        self._tokenizer, self._template, self._instruction = tokenizer, template, instruction
        self._overlap, self._cache = overlap, TokenCache(tokenizer)
        self._prefix, self._suffix = token_ids(tokenizer, [template.prefix, template.suffix])
        self._limit = max_length - len(self._prefix)
        empty = ("", instruction or "")
        needed = len(self._prefix) + len(self._whole([empty], [""])[0])
        if needed >= max_length:
            raise ConfigError(
                f"model.max_length: found {max_length}, but the template {template.name!r} takes {needed} tokens; "
                f"set at least {needed + 16}"
            )
        self.way: Way = next((way for way in ("apart", "joined") if self._is_exact(way)), "whole")
        if overlap is not None and self.way != "apart":
            raise ConfigError(
                f"scoring.long_documents: found 'chunk', but with the template {template.name!r} and this tokenizer a "
                "document cannot be tokenised apart from its query; set truncate"
            )

    def _is_exact(self, way: Way) -> bool:
        instructions = [self._instruction or "", *(["Find code"] if self._template.instruction is not None else [])]
        for instruction in instructions:
            keys = [(query, instruction) for query in PROBES]
            frames = self._frames(keys, way)
            documents = token_ids(self._tokenizer, [frames[0].before + text + frames[0].behind for text in PROBES])
            for key, frame in zip(keys, frames, strict=True):
                whole = self._whole([key] * len(PROBES), list(PROBES))
                split = (np.concatenate([frame.head, document, frame.tail]) for document in documents)
                if not all(np.array_equal(one, other) for one, other in zip(split, whole, strict=True)):
                    return False
        return True

    def _frames(self, keys: list[tuple[str, str]], way: Way) -> "list[_Frame]":
        """What surrounds the documents of each (query, instruction), and is tokenised apart from them."""
        texts: list[str] = []
        edges = []
        for query, instruction in keys:
            before, after, rest = self._template.pieces(query, instruction)
            lead, behind = self._edges(instruction)
            behind = "" if way == "apart" else behind
            before[-1] = before[-1][: len(before[-1]) - len(lead)]
            edges.append((lead, behind, len(before), len(rest) + 1))
            texts += [*before, after[len(behind) :], *rest]
        ids, ids_of = distinct_ids(self._tokenizer, texts)
        frames, start = [], 0
        for lead, behind, n_before, n_after in edges:
            parts = [ids[i] for i in ids_of[start : start + n_before + n_after]]
            start += n_before + n_after
            head, tail = np.concatenate(parts[:n_before]), np.concatenate([*parts[n_before:], self._suffix])
            frames.append(_Frame(head, lead, behind, tail))
        return frames

    def _edges(self, instruction: str) -> tuple[str, str]:
        """The template's own spaces before the document, and its own text after it, up to the spaces before a place."""
        pieces = self._template.instructed if self._template.instructed and instruction else self._template.middle
        before, after = next(piece for piece in pieces if "{document}" in piece).split("{document}")
        own = _PLACE.split(before)[-1]
        behind, *more = _PLACE.split(after)
        return own[len(own.rstrip(" ")) :], behind.rstrip(" ") if more else behind

    def _whole(self, keys: list[tuple[str, str]], documents: list[str]) -> list[Int32]:
        """The ids of pairs after the prefix, with the document's piece tokenised as one string."""
        texts: list[str] = []
        counts = []
        for key, document in zip(keys, documents, strict=True):
            before, after, rest = self._template.pieces(*key)
            before[-1] += document + after
            texts += [*before, *rest]
            counts.append(len(before) + len(rest))
        ids, ids_of = distinct_ids(self._tokenizer, texts)
        parts = np.split(ids_of, np.cumsum(counts)[:-1]) if counts else []
        return [np.concatenate([*(ids[i] for i in part), self._suffix]) for part in parts]

    def encode(self, groups: Sequence[Group]) -> Encoded:
        """See Encoder."""
        keys, key_of = unique_items([(group.query, self._given(group)) for group in groups])
        if self.way == "whole":
            return self._encode_whole(groups, keys, key_of)
        frames = self._frames(keys, self.way)
        behind = [len(ids) for ids in token_ids(self._tokenizer, [frame.behind for frame in frames])]
        # a tail is longer than the limit only where the query follows the document: its end is kept
        tails = [frame.tail[-(self._limit - n) :] for frame, n in zip(frames, behind, strict=True)]
        heads = [
            frame.head[: self._limit - len(tail) - n] for frame, tail, n in zip(frames, tails, behind, strict=True)
        ]
        room = np.array([self._limit - len(h) - len(t) for h, t in zip(heads, tails, strict=True)], np.int32)
        cut = [
            len(frame.head) > len(head) or len(frame.tail) > len(tail)
            for frame, head, tail in zip(frames, heads, tails, strict=True)
        ]
        frame_of = [frames[key] for key in key_of]
        texts = [
            frame.before + document + frame.behind
            for frame, group in zip(frame_of, groups, strict=True)
            for document in group.documents
        ]
        segments, document_of = self._cache.distinct(texts)
        key_of_pair = np.repeat(key_of, np.diff(pair_starts(groups)))
        cuts = np.array(cut, np.bool_)[key_of_pair]
        if self.way == "joined":
            segments, document_of, too_long = self._shortened(
                frames, key_of_pair, texts, room, list(segments), document_of
            )
            cuts |= too_long
        prefixes = [np.concatenate([self._prefix, head]) for head in heads]
        distinct_tails, tail_of = _distinct(tails)
        return assemble(
            groups,
            prefixes,
            key_of,
            distinct_tails,
            tail_of[key_of],
            segments,
            document_of,
            room[key_of],
            cuts,
            self._overlap,
        )

    def _shortened(
        self,
        frames: "list[_Frame]",
        key_of_pair: Int32,
        texts: list[str],
        room: Int32,
        segments: list[Int32],
        document_of: Int32,
    ) -> tuple[list[Int32], Int32, npt.NDArray[np.bool_]]:
        """Segments that hold what follows the document, for pairs too long for it: the document's own end is cut."""
        too_long = lengths_of(segments)[document_of] > room[key_of_pair]
        document_of = document_of.copy()
        known: dict[tuple[str, int], int] = {}
        for pair in np.flatnonzero(too_long).tolist():
            frame, left = frames[key_of_pair[pair]], int(room[key_of_pair[pair]])
            index = known.setdefault((texts[pair], left), len(segments))
            if index == len(segments):
                bare = texts[pair].removesuffix(frame.behind)
                ids, behind = token_ids(self._tokenizer, [bare, frame.behind])
                segments.append(np.concatenate([ids[: left - len(behind)], behind]))
            document_of[pair] = index
        return segments, document_of, too_long

    def _encode_whole(self, groups: Sequence[Group], keys: list[tuple[str, str]], key_of: Int32) -> Encoded:
        """Every distinct pair's own string; what all pairs of a query begin with is its prefix. Where a pair is too
        long, its parts are tokenised apart and the document is cut."""
        pairs, pair_of = unique_items(
            [(int(key), document) for key, group in zip(key_of, groups, strict=True) for document in group.documents]
        )
        segments = self._whole([keys[key] for key, _ in pairs], [document for _, document in pairs])
        cut = np.array([len(ids) > self._limit for ids in segments], np.bool_)
        frames = self._frames(keys, "apart") if cut.any() else []
        for index in np.flatnonzero(cut).tolist():
            key, document = pairs[index]
            tail = frames[key].tail[-self._limit :]
            head = frames[key].head[: self._limit - len(tail)]
            (ids,) = token_ids(self._tokenizer, [frames[key].before + document])
            segments[index] = np.concatenate([head, ids[: self._limit - len(tail) - len(head)], tail])
        own = [ids[: len(ids) - len(self._suffix)] for ids in segments]
        of_key: list[list[Int32]] = [[] for _ in keys]
        for (key, _), ids in zip(pairs, own, strict=True):
            of_key[key].append(ids)
        common = [_common_length(several) for several in of_key]
        prefixes = [
            np.concatenate([self._prefix, *(ids[:n] for ids in s[:1])]) for s, n in zip(of_key, common, strict=True)
        ]
        own = [ids[common[key] :] for (key, _), ids in zip(pairs, own, strict=True)]
        room, tail_of = np.full(len(groups), self._limit, np.int32), np.zeros(len(groups), np.int32)
        return assemble(groups, prefixes, key_of, [self._suffix], tail_of, own, pair_of, room, cut[pair_of])

    def _given(self, group: Group) -> str:
        instruction = self._instruction if group.instruction is None else group.instruction
        return instruction or ""


def _common_length(segments: list[Int32]) -> int:
    """How many leading ids all segments share, short of a whole segment."""
    if not segments:
        return 0
    longest = max(0, min(len(ids) for ids in segments) - 1)
    for ids in segments[1:]:
        differ = np.flatnonzero(ids[:longest] != segments[0][:longest])
        longest = int(differ[0]) if len(differ) else longest
    return longest


def _distinct(runs: Sequence[Int32]) -> tuple[list[Int32], Int32]:
    """The distinct runs of ids, and int32[n_runs]: which of them each is."""
    unique, index = unique_items([ids.tobytes() for ids in runs])
    return [np.frombuffer(ids, np.int32) for ids in unique], index


@dataclass(frozen=True)
class _Frame:
    """What surrounds a group's documents: ids before (`head`, without the prefix) and after (`tail`, with the suffix);
    the template's own texts `before` and `behind` a document that are tokenised with it."""

    head: Int32
    before: str
    behind: str
    tail: Int32


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
