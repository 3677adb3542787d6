"""Texts to token ids: groups of one query and its documents become one flat `Encoded`.

Every distinct text of a call is tokenised once. The ids are those of the checkpoint's own tokenizer.json, read with
the `tokenizers` library: transformers 5 rebuilds some tokenizers and drops their normalisers silently.

A pair's sequence is prefix(query) + document[:kept] + tail. A bi-encoder's two sequences are the prefix (the whole
query) and the document. No torch here, so that a CPU task which only tokenises starts fast and stays small.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.engine.templates import TEMPLATES, CausalTemplate
from batch_rerank.errors import ConfigError, ModelError

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

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
        return CausalEncoder(tokenizer, TEMPLATES[spec.template], spec.instruction, spec.max_length)
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
    """ids(prefix) + ids(middle)[: max_length - prefix - suffix] + ids(suffix), as on Qwen3-Reranker's card.

    The middle is split before the space that precedes the document, which for Qwen's tokenizer gives the ids of the
    whole string, so query and document are tokenised apart and once each. Where the probes disprove that for a
    tokenizer, whole middles are tokenised, pair by pair.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: CausalTemplate, instruction: str | None, max_length: int
    ) -> None:
        self._tokenizer, self._template, self._instruction = tokenizer, template, instruction
        self._prefix, self._suffix = (_ids(tokenizer, [text])[0] for text in (template.prefix, template.suffix))
        self._limit = max_length - len(self._prefix) - len(self._suffix)
        frame = len(_ids(tokenizer, [template.before_document("", instruction)])[0])
        if self._limit <= frame:
            needed = max_length - self._limit + frame
            raise ConfigError(
                f"model.max_length: found {max_length}, but the template {template.name!r} takes {needed} tokens; "
                f"set at least {needed + 16}"
            )
        self.splits = self._split_is_exact()

    def _split_is_exact(self) -> bool:
        heads = [self._head(Group(query, [])) for query in PROBES]
        documents = [self._lead() + text for text in PROBES]
        whole = [head + document for head in heads for document in documents]
        head_ids, document_ids = _ids(self._tokenizer, heads), _ids(self._tokenizer, documents)
        apart = [np.concatenate([head, document]) for head in head_ids for document in document_ids]
        return all(np.array_equal(a, b) for a, b in zip(apart, _ids(self._tokenizer, whole), strict=True))

    def _lead(self) -> str:
        before = self._template.middle.partition("{document}")[0]
        return before[len(before.rstrip(" ")) :]

    def _head(self, group: Group) -> str:
        before = self._template.before_document(
            group.query, self._instruction if group.instruction is None else group.instruction
        )
        return before[: len(before) - len(self._lead())]

    def encode(self, groups: Sequence[Group]) -> Encoded:
        """See Encoder. Cut on the right: the document's tail goes first, then the query's."""
        heads = [self._head(group) for group in groups]
        if self.splits:
            documents = [self._lead() + document for group in groups for document in group.documents]
        else:
            documents = [h + self._lead() + d for h, g in zip(heads, groups, strict=True) for d in g.documents]
            heads = ["" for _ in groups]
        head_ids, head_of = _distinct(self._tokenizer, heads)
        lengths = np.array([len(ids) for ids in head_ids], np.int32)[head_of]
        prefixes = [np.concatenate([self._prefix, ids[: self._limit]]) for ids in head_ids]
        room = np.maximum(self._limit - lengths, 0)
        cut = lengths > self._limit
        return _encode_pairs(self._tokenizer, groups, prefixes, head_of, documents, room, cut, self._suffix)


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


def _starts(groups: Sequence[Group]) -> Int64:
    return np.cumsum([0, *(len(group.documents) for group in groups)], dtype=np.int64)


def _concatenate(segments: Sequence[npt.NDArray[np.integer]]) -> tuple[npt.NDArray[np.integer], Int64]:
    offsets = np.cumsum([0, *(len(ids) for ids in segments)], dtype=np.int64)
    return (np.concatenate(segments) if segments else np.empty(0, np.int32)), offsets


def _unique(texts: list[str]) -> tuple[list[str], Int32]:
    index: dict[str, int] = {}
    positions = [index.setdefault(text, len(index)) for text in texts]
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
