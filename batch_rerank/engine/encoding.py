"""Texts to token ids: groups of one query and its documents become one flat `Encoded`.

Every distinct text of a call is tokenised once. The ids are those of the checkpoint's own tokenizer.json, read with
the `tokenizers` library: transformers 5 rebuilds some tokenizers and drops their normalisers silently.

A pair's sequence is prefix(query) + document[:kept] + tail. A bi-encoder's two sequences are the prefix (the whole
query) and the document. No torch here, so that a CPU task which only tokenises starts fast and stays small.
"""

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.engine.templates import CausalTemplate
from batch_rerank.errors import ConfigError, ModelError

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

Item = TypeVar("Item", bound=Hashable)

_NONE = np.empty(0, np.int32)

PROBES = (
    "",
    "x",
    " leading and trailing ",
    "\n\nline\r\n\tbreaks",
    "def f(x):\n    return x ** 2  # code",
    "中国的首都是北京。",
    "Größe, naïve, e\u0301 combining",
    "\u0301starts with a mark",
    "12,345.67 €",
    "السلام عليكم",
    "<|im_end|>\n<|im_start|>assistant",
    "🙂🙃 x" * 3,
)
"""Texts on which a split of the template, or a pair's layout, must give the ids of the whole."""


@dataclass(frozen=True)
class Group:
    """One query with its documents; `instruction` None means the job's or the template's."""

    query: str
    documents: Sequence[str]
    instruction: str | None = None


@dataclass(frozen=True)
class Encoded:
    """Token ids of some groups, every distinct text once.

    Segment i is `tokens[offsets[i]:offsets[i + 1]]`. Pairs are in the order of the groups and their documents.

    tokens: integer[total]; offsets: int64[n_segments + 1]
    prefix: int32[n_groups], segment before the documents of a group
    starts: int64[n_groups + 1], pairs of group g are starts[g] to starts[g + 1]
    document: int32[n_pairs], segment of a pair's document; kept: int32[n_pairs], how many of its tokens are used
    tail: int32[n_tail], tokens after every document (empty for a bi-encoder)
    n_tokens: int32[n_pairs], tokens the model reads for a pair; truncated: bool[n_pairs]
    """

    tokens: npt.NDArray[np.integer]
    offsets: Int64
    prefix: Int32
    starts: Int64
    document: Int32
    kept: Int32
    tail: Int32
    n_tokens: Int32
    truncated: npt.NDArray[np.bool_]

    def segment(self, index: int) -> npt.NDArray[np.integer]:
        """Token ids of one segment."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def group_of_pair(self) -> Int32:
        """int32[n_pairs]: the group each pair belongs to."""
        return np.repeat(np.arange(len(self.prefix), dtype=np.int32), np.diff(self.starts))


class Encoder(Protocol):
    """Turns groups into token ids."""

    def encode(self, groups: Sequence[Group]) -> Encoded:
        """Encode the groups; any valid Unicode text has an encoding."""
        ...


def make_encoder(spec: ModelSpec) -> Encoder:
    """The encoder of a model. Raises ModelError where the tokenizer does not fit the template."""
    if spec.kind == "checksum":
        return ByteEncoder(spec.max_length, spec.instruction or "")
    tokenizer = load_tokenizer(Path(spec.directory))
    if spec.kind == "causal":
        assert spec.causal is not None
        return CausalEncoder(tokenizer, spec.causal, spec.instruction, spec.max_length)
    if spec.kind == "sequence_classification":
        return PairEncoder(tokenizer, spec.max_length)
    return SentenceEncoder(tokenizer, spec)


def load_tokenizer(directory: Path) -> Tokenizer:
    """The checkpoint's tokenizer.json without the padding and truncation that may be stored in it."""
    path = directory / "tokenizer.json"
    if not path.exists():
        raise ModelError(f"model directory {directory}: no tokenizer.json; save the model's fast tokenizer into it")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise ModelError(f"{path}: not a tokenizer ({error}); the file is damaged, copy it again") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


class CausalEncoder:
    """ids(prefix) + ids(pieces of the middle) + ids(suffix); what the template has after the document is never cut.

    A piece is split before the space that precedes the document and after the document, which for Qwen's tokenizer
    gives the ids of the whole string, so query and document are tokenised apart and once each. Where the probes
    disprove that for a tokenizer, or where a query follows its document, the pairs are tokenised one by one.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: CausalTemplate, instruction: str | None, max_length: int
    ) -> None:
        self._tokenizer, self._template, self._instruction = tokenizer, template, instruction
        self._prefix, self._suffix = (_ids(tokenizer, [text])[0] for text in (template.prefix, template.suffix))
        self._max_length = max_length
        empty = self._frame(Group("", []))
        needed = len(self._prefix) + len(self._whole(empty, ""))
        if needed >= max_length:
            raise ConfigError(
                f"model.max_length: found {max_length}, but the template {template.name!r} takes {needed} tokens; "
                f"set at least {needed + 16}"
            )
        self.splits = template.constant_tail and self._split_is_exact()

    def _split_is_exact(self) -> bool:
        frames = [self._frame(Group(query, [])) for query in PROBES]
        documents = _ids(self._tokenizer, [frames[0].lead + text for text in PROBES])
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
        head = _ids(self._tokenizer, [*before[:-1], text.rstrip(" ")])
        following = _ids(self._tokenizer, rest)
        tail = np.concatenate([*_ids(self._tokenizer, [after]), *following, self._suffix])
        around = (np.concatenate([*head[:-1]]) if head[:-1] else _NONE, np.concatenate([*following, self._suffix]))
        return _Frame(np.concatenate(head), lead, tail, text, after, around)

    def _whole(self, frame: "_Frame", document: str) -> Int32:
        """The ids of a pair after the prefix, with the document's piece tokenised as one string."""
        piece = _ids(self._tokenizer, [frame.before + document + frame.after])[0]
        return np.concatenate([frame.around[0], piece, frame.around[1]])

    def encode(self, groups: Sequence[Group]) -> Encoded:
        """See Encoder."""
        return self._encode_apart(groups) if self.splits else self._encode_whole(groups)

    def _encode_apart(self, groups: Sequence[Group]) -> Encoded:
        keys, frame_of = _unique([(group.query, self._given(group)) for group in groups])
        befores = [self._template.pieces(*key)[0] for key in keys]
        frame = self._frame(Group("", []))
        flat = [piece for before in befores for piece in [*before[:-1], before[-1].rstrip(" ")]]
        ids, ids_of = _distinct(self._tokenizer, flat)
        ends = np.cumsum([len(before) for before in befores])
        heads = [np.concatenate([ids[i] for i in piece]) for piece in np.split(ids_of, ends[:-1])] if keys else []
        limit = self._max_length - len(self._prefix) - len(frame.tail)
        documents = [frame.lead + document for group in groups for document in group.documents]
        lengths = np.array([len(head) for head in heads], np.int32)[frame_of]
        prefixes = [np.concatenate([self._prefix, head[:limit]]) for head in heads]
        room = np.maximum(limit - lengths, 0)
        return _encode_pairs(self._tokenizer, groups, prefixes, frame_of, documents, room, lengths > limit, frame.tail)

    def _encode_whole(self, groups: Sequence[Group]) -> Encoded:
        """Every pair's own string. Where it is too long, its pieces are tokenised apart and the document is cut."""
        limit = self._max_length - len(self._prefix)
        pairs, pair_of = _unique([(group.query, self._given(group), d) for group in groups for d in group.documents])
        segments, cuts = [], []
        for (query, instruction), members in itertools.groupby(pairs, lambda pair: pair[:2]):
            frame = self._frame(Group(query, [], instruction))
            documents = [document for _, _, document in members]
            pieces = _ids(self._tokenizer, [frame.before + document + frame.after for document in documents])
            for document, piece in zip(documents, pieces, strict=True):
                ids = np.concatenate([frame.around[0], piece, frame.around[1]])
                cuts.append(len(ids) > limit)
                segments.append(self._cut(frame, document, limit) if cuts[-1] else ids)
        stop = -len(self._suffix) or None
        return _assemble_whole(groups, self._prefix, [ids[:stop] for ids in segments], cuts, pair_of, self._suffix)

    def _cut(self, frame: "_Frame", document: str, limit: int) -> Int32:
        tail = frame.tail[-limit:]  # longer only where the query follows the document: its end is kept
        head = frame.head[: limit - len(tail)]
        kept = _ids(self._tokenizer, [frame.lead + document])[0][: limit - len(tail) - len(head)]
        return np.concatenate([head, kept, tail])

    def _given(self, group: Group) -> str:
        instruction = self._instruction if group.instruction is None else group.instruction
        return instruction or ""


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


class PairEncoder:
    """The tokenizer's own pair, e.g. `<s> query </s></s> document </s>`.

    Truncation is FlagEmbedding's: the query to 3/4 of max_length at most, then the document only.
    """

    def __init__(self, tokenizer: Tokenizer, max_length: int) -> None:
        self._tokenizer, self._max_length = tokenizer, max_length
        probe = tokenizer.encode("a", "b")
        self._start, self._middle, self._end = _special_ids(probe, 2)
        types = dict(zip(probe.sequence_ids, probe.type_ids, strict=True))
        self.document_type = int(types[1])
        self._assert_layout()

    def _assert_layout(self) -> None:
        for query, document in zip(PROBES, reversed(PROBES), strict=True):
            q, d = _ids(self._tokenizer, [query, document])
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
        query_ids, query_of = _distinct(self._tokenizer, [group.query for group in groups])
        prefixes = [np.concatenate([self._start, ids[:longest], self._middle]) for ids in query_ids]
        lengths = np.array([len(ids) for ids in prefixes], np.int32)[query_of]
        cut = np.array([len(ids) > longest for ids in query_ids], np.bool_)[query_of]
        documents = [document for group in groups for document in group.documents]
        room = self._max_length - len(self._end) - lengths
        return _encode_pairs(self._tokenizer, groups, prefixes, query_of, documents, room, cut, self._end)


class SentenceEncoder:
    """Each text alone, after its prompt, between the tokenizer's special tokens, which truncation never removes."""

    def __init__(self, tokenizer: Tokenizer, spec: ModelSpec) -> None:
        self._tokenizer, self._spec = tokenizer, spec
        self._start, self._end = _special_ids(tokenizer.encode("a"), 1)
        if spec.pooling == "last" and not len(self._end):
            raise ModelError(
                f"model {spec.name!r} pools the last token, but its tokenizer appends no end token to a text; "
                "expected one (Qwen3-Embedding: <|endoftext|>); use the model's own tokenizer.json"
            )

    def encode(self, groups: Sequence[Group]) -> Encoded:
        """See Encoder. `n_tokens` of a pair counts both of its texts."""
        room = self._spec.max_length - len(self._start) - len(self._end)
        query_ids, query_of = _distinct(self._tokenizer, [self._prompt(group) + group.query for group in groups])
        texts = [self._spec.document_prompt + document for group in groups for document in group.documents]
        document_ids, document_of = _distinct(self._tokenizer, texts)
        segments = [np.concatenate([self._start, ids[:room], self._end]) for ids in [*query_ids, *document_ids]]
        lengths = np.array([len(ids) for ids in segments], np.int32)
        cut = np.array([len(ids) > room for ids in [*query_ids, *document_ids]], np.bool_)
        starts = _starts(groups)
        document = (document_of + len(query_ids)).astype(np.int32)
        query_of_pair = np.repeat(query_of, np.diff(starts))
        return Encoded(
            *_concatenate(segments),
            prefix=query_of,
            starts=starts,
            document=document,
            kept=lengths[document],
            tail=np.empty(0, np.int32),
            n_tokens=lengths[query_of_pair] + lengths[document],
            truncated=cut[query_of_pair] | cut[document],
        )

    def _prompt(self, group: Group) -> str:
        instruction = self._spec.instruction if group.instruction is None else group.instruction
        return self._spec.query_prompt if instruction is None else f"Instruct: {instruction}\nQuery:"


class ByteEncoder:
    """UTF-8 bytes as token ids: what the free `checksum` kind scores, for measuring and testing the pipeline."""

    def __init__(self, max_length: int, instruction: str = "") -> None:
        self._max_length, self._instruction = max_length, instruction

    def encode(self, groups: Sequence[Group]) -> Encoded:
        """See Encoder."""
        instructions = [self._instruction if group.instruction is None else group.instruction for group in groups]
        heads = [f"{i}\n{group.query}\n" for i, group in zip(instructions, groups, strict=True)]
        unique, head_of = _unique(heads)
        whole = [_bytes(text) for text in unique]
        lengths = np.array([len(ids) for ids in whole], np.int32)[head_of]
        texts, document_of = _unique([document for group in groups for document in group.documents])
        segments = [_bytes(text) for text in texts]
        prefixes = [ids[: self._max_length] for ids in whole]
        room, cut = np.maximum(self._max_length - lengths, 0), lengths > self._max_length
        return _assemble(groups, prefixes, head_of, segments, document_of, room, cut, np.empty(0, np.int32))


def _encode_pairs(
    tokenizer: Tokenizer,
    groups: Sequence[Group],
    prefixes: list[Int32],
    prefix_of: Int32,
    documents: list[str],
    room: Int32,
    query_cut: npt.NDArray[np.bool_],
    tail: Int32,
) -> Encoded:
    segments, document_of = _distinct(tokenizer, documents)
    return _assemble(groups, prefixes, prefix_of, segments, document_of, room, query_cut, tail)


def _assemble(
    groups: Sequence[Group],
    prefixes: Sequence[npt.NDArray[np.integer]],
    prefix_of: Int32,
    segments: Sequence[npt.NDArray[np.integer]],
    document_of: Int32,
    room: Int32,
    query_cut: npt.NDArray[np.bool_],
    tail: Int32,
) -> Encoded:
    """Put prefixes and document segments end to end. `room[g]`: document tokens that fit beside group g's prefix."""
    starts = _starts(groups)
    group = np.repeat(np.arange(len(groups)), np.diff(starts))
    lengths = np.array([len(ids) for ids in segments], np.int32)[document_of]
    kept = np.minimum(lengths, room[group]).astype(np.int32)
    prefix_lengths = np.array([len(ids) for ids in prefixes], np.int32)[prefix_of]
    longest = int(room.max(initial=0))  # tokens that no pair can use need not travel to the scorer
    return Encoded(
        *_concatenate([*prefixes, *(ids[:longest] for ids in segments)]),
        prefix=prefix_of,
        starts=starts,
        document=(document_of + len(prefixes)).astype(np.int32),
        kept=kept,
        tail=tail,
        n_tokens=(prefix_lengths[group] + kept + len(tail)).astype(np.int32),
        truncated=(lengths > kept) | query_cut[group],
    )


def _assemble_whole(
    groups: Sequence[Group], prefix: Int32, segments: list[Int32], cuts: list[bool], pair_of: Int32, tail: Int32
) -> Encoded:
    """Distinct pairs' own ids (`segments`) behind one prefix, which takes over what all of them begin with."""
    common = _common(segments)
    prefix = np.concatenate([prefix, *(ids[:common] for ids in segments[:1])])
    segments = [ids[common:] for ids in segments]
    lengths = np.array([len(ids) for ids in segments], np.int32)[pair_of]
    return Encoded(
        *_concatenate([prefix, *segments]),
        prefix=np.zeros(len(groups), np.int32),
        starts=_starts(groups),
        document=pair_of + np.int32(1),
        kept=lengths,
        tail=tail,
        n_tokens=(len(prefix) + lengths + len(tail)).astype(np.int32),
        truncated=np.array(cuts, np.bool_)[pair_of],
    )


def _common(segments: list[Int32]) -> int:
    """How many leading ids all segments share, short of a whole segment."""
    if not segments:
        return 0
    first = segments[0]
    longest = min(len(ids) for ids in segments) - 1
    for ids in segments[1:]:
        differ = np.flatnonzero(ids[:longest] != first[:longest])
        longest = int(differ[0]) if len(differ) else longest
    return max(longest, 0)


def _starts(groups: Sequence[Group]) -> Int64:
    return np.cumsum([0, *(len(group.documents) for group in groups)], dtype=np.int64)


def _concatenate(segments: Sequence[npt.NDArray[np.integer]]) -> tuple[npt.NDArray[np.integer], Int64]:
    offsets = np.cumsum([0, *(len(ids) for ids in segments)], dtype=np.int64)
    return (np.concatenate(segments) if segments else np.empty(0, np.int32)), offsets


def _unique(items: "list[Item]") -> "tuple[list[Item], Int32]":
    index: dict[Item, int] = {}
    positions = [index.setdefault(item, len(index)) for item in items]
    return list(index), np.array(positions, np.int32)


def _distinct(tokenizer: Tokenizer, texts: list[str]) -> tuple[list[Int32], Int32]:
    """The ids of every distinct text, and int32[n_texts]: which of them each text has."""
    unique, positions = _unique(texts)
    return _ids(tokenizer, unique), positions


def _ids(tokenizer: Tokenizer, texts: list[str]) -> list[Int32]:
    """Ids without special tokens."""
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(encoding.ids, np.int32) for encoding in encodings]


def _bytes(text: str) -> npt.NDArray[np.integer]:
    return np.frombuffer(text.encode(), np.uint8)


def _special_ids(probe: Encoding, n_sequences: int) -> list[Int32]:
    """The special ids before, between and after the sequences of an encoding."""
    runs: list[list[int]] = [[] for _ in range(n_sequences + 1)]
    seen = 0
    for token, sequence in zip(probe.ids, probe.sequence_ids, strict=True):
        seen = seen if sequence is None else sequence + 1
        if sequence is None:
            runs[seen].append(token)
    return [np.array(run, np.int32) for run in runs]
