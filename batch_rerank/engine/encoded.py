"""Groups of texts, and what becomes of them: token ids, every distinct text once, put end to end. No torch here."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.integer]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
NONE = np.empty(0, np.int32)


@dataclass(frozen=True)
class Group:
    """One query with its documents; `instruction` None means the job's or the template's."""

    query: str
    documents: Sequence[str]
    instruction: str | None = None


@dataclass(frozen=True)
class Chunks:
    """Which document each pair of an `Encoded` is a part of, where long documents are read in chunks.

    owner: int64[n_pairs], ascending, counts the groups' documents; offset: int32[n_pairs], first token of the chunk.
    """

    owner: Int64
    offset: Int32


@dataclass(frozen=True)
class Encoded:
    """Token ids of some groups, every distinct text once.

    Segment i is `tokens[offsets[i]:offsets[i + 1]]`. Pairs are in the order of the groups and their documents.

    tokens: integer[total]; offsets: int64[n_segments + 1]
    prefix: int32[n_groups], segment before the documents of a group
    tails: the distinct runs of int32 ids after a document; tail: int32[n_groups], which of them follows a group's
    starts: int64[n_groups + 1], pairs of group g are starts[g] to starts[g + 1]
    document: int32[n_pairs], segment of a pair's document; kept: int32[n_pairs], how many of its tokens are used
    n_tokens: int32[n_pairs], tokens the model reads for a pair; truncated: bool[n_pairs]
    chunks: None, or what each pair is a chunk of
    """

    tokens: npt.NDArray[np.integer]
    offsets: Int64
    prefix: Int32
    tails: Sequence[Int32]
    tail: Int32
    starts: Int64
    document: Int32
    kept: Int32
    n_tokens: Int32
    truncated: npt.NDArray[np.bool_]
    chunks: Chunks | None = None

    def segment(self, index: int) -> npt.NDArray[np.integer]:
        """Token ids of one segment."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def group_of_pair(self) -> Int32:
        """int32[n_pairs]: the group each pair belongs to."""
        return np.repeat(np.arange(len(self.prefix), dtype=np.int32), np.diff(self.starts))

    def part(self, start: int, stop: int) -> "Encoded":
        """The same with only the pairs from start to stop; what they are chunks of is left out."""
        return replace(
            self,
            starts=np.clip(self.starts, start, stop) - start,
            document=self.document[start:stop],
            kept=self.kept[start:stop],
            n_tokens=self.n_tokens[start:stop],
            truncated=self.truncated[start:stop],
            chunks=None,
        )


def assemble(
    groups: Sequence[Group],
    prefixes: Sequence[Ids],
    prefix_of: Int32,
    tails: Sequence[Int32],
    tail_of: Int32,
    segments: Sequence[Ids],
    document_of: Int32,
    room: Int32,
    cut: npt.NDArray[np.bool_],
    overlap: int | None = None,
) -> Encoded:
    """Put prefixes and document segments end to end. `room[g]`: document tokens that fit beside group g's prefix and
    tail; `cut`: bool[n_pairs], what has been cut already. `overlap`: None to cut longer documents, else the tokens that
    two chunks of one share."""
    starts, chunks = pair_starts(groups), None
    if overlap is not None:
        rooms = np.repeat(room, np.diff(starts))
        segments, document_of, chunks = chunked(segments, document_of, rooms, overlap)
        starts, cut = np.searchsorted(chunks.owner, starts), cut[chunks.owner]
    group = np.repeat(np.arange(len(groups)), np.diff(starts))
    lengths = lengths_of(segments)[document_of]
    kept = np.minimum(lengths, room[group]).astype(np.int32)
    longer = lengths > kept
    if chunks is not None:
        longer &= np.bincount(chunks.owner)[chunks.owner] == 1  # of several the next begins before this one ends
    around = lengths_of(prefixes)[prefix_of] + lengths_of(tails)[tail_of]
    longest = int(room.max(initial=0))  # tokens that no pair can use need not travel to the scorer
    return Encoded(
        *concatenate([*prefixes, *(ids[:longest] for ids in segments)]),
        prefix=prefix_of,
        tails=tails,
        tail=tail_of,
        starts=starts,
        document=(document_of + len(prefixes)).astype(np.int32),
        kept=kept,
        n_tokens=(around[group] + kept).astype(np.int32),
        truncated=longer | cut,
        chunks=chunks,
    )


def chunked(
    segments: Sequence[Ids], document_of: Int32, rooms: Int32, overlap: int
) -> tuple[Sequence[Ids], Int32, Chunks]:
    """Pairs whose document is longer than its room become one pair a chunk of that size; each chunk begins `overlap`
    tokens before the end of the one before. Where there is room for no more than the overlap the document is cut."""
    chunks = list(segments)
    known: dict[tuple[int, int, int], int] = {}
    chunk_of, owner, offset = [], [], []
    for pair, (document, room) in enumerate(zip(document_of.tolist(), rooms.tolist(), strict=True)):
        ids = segments[document]
        step = room - overlap
        more = -(-(len(ids) - room) // step) if step > 0 and len(ids) > room else 0
        for start in range(0, (more + 1) * step, step) if more else (0,):
            index = document if start == 0 else known.setdefault((document, start, room), len(chunks))
            if index == len(chunks):
                chunks.append(ids[start : start + room])
            chunk_of.append(index)
            owner.append(pair)
            offset.append(start)
    return chunks, np.array(chunk_of, np.int32), Chunks(np.array(owner, np.int64), np.array(offset, np.int32))


def lengths_of(segments: Sequence[Ids]) -> Int32:
    """int32[n_segments]."""
    return np.array([len(ids) for ids in segments], np.int32)


def pair_starts(groups: Sequence[Group]) -> Int64:
    """int64[n_groups + 1]: pairs of group g are result[g] to result[g + 1]."""
    return np.cumsum([0, *(len(group.documents) for group in groups)], dtype=np.int64)


def concatenate(segments: Sequence[Ids]) -> tuple[Ids, Int64]:
    """Segments end to end, and int64[n_segments + 1]: where each begins."""
    offsets = np.cumsum([0, *(len(ids) for ids in segments)], dtype=np.int64)
    return (np.concatenate(segments) if segments else np.empty(0, np.int32)), offsets
