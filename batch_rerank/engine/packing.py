"""Which pairs are scored together. How they are grouped never changes a score beyond the dtype's tolerance."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from batch_rerank.engine.encoded import Encoded, Int32

Index = npt.NDArray[np.int64]
Ids = npt.NDArray[np.integer]
Float32 = npt.NDArray[np.float32]

LONG = 1024
"""Tokens from which on a sequence is packed apart from shorter ones, on GPUs."""


def distinct_pairs(encoded: Encoded) -> Index:
    """int64[n_pairs]: for each pair the first one with the same prefix, document and tail. A repeated pair is scored
    once, so that its copies tie exactly."""
    group = encoded.group_of_pair()
    keys = np.stack([encoded.prefix[group], encoded.document, encoded.tail[group]])
    order = np.lexsort(keys)  # stable: of equal pairs the first comes first
    new = np.diff(keys[:, order], axis=1, prepend=-1).any(0)
    first = np.empty(len(order), np.int64)
    first[order] = order[new][np.cumsum(new) - 1] if len(order) else order
    return first


def unreadable(encoded: Encoded, texts: bool) -> npt.NDArray[np.bool_]:
    """bool[n_pairs]: pairs of which nothing is left to read, or with `texts`, for a bi-encoder, one of whose two texts
    has no token. Tokenizers without special tokens make them of empty texts."""
    if not texts:
        return np.equal(encoded.n_tokens, 0)
    empty = np.equal(np.diff(encoded.offsets), 0)
    return np.logical_or(empty[encoded.prefix[encoded.group_of_pair()]], empty[encoded.document])


def read_segments(encoded: Encoded) -> Index:
    """int64[n]: the segments that a bi-encoder reads of the readable pairs, queries and documents, each once."""
    pairs = np.flatnonzero(~unreadable(encoded, texts=True))
    return np.unique(np.concatenate([prefix_of(encoded, pairs), encoded.document[pairs]]))


@dataclass(frozen=True)
class Scored:
    """What is known of each document: float32 score (NaN: none), int32 tokens read, whether it was cut, and int32 first
    token of its best chunk, None where documents are not read in chunks."""

    scores: Float32
    n_tokens: Int32
    truncated: npt.NDArray[np.bool_]
    offset: Int32 | None


def best_chunks(encoded: Encoded, scores: Float32) -> Scored:
    """Pairs to documents: a document has the score of its best chunk (MaxP), the first of equals."""
    if encoded.chunks is None or not len(scores):
        offset = None if encoded.chunks is None else encoded.chunks.offset
        return Scored(scores, encoded.n_tokens, encoded.truncated, offset)
    owner = encoded.chunks.owner
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    best = np.maximum.reduceat(scores, starts)  # NaN where a chunk has none
    wins = np.isnan(best)[owner] | (scores == best[owner])
    first = np.minimum.reduceat(np.where(wins, np.arange(len(scores)), len(scores)), starts)
    n_tokens = np.add.reduceat(encoded.n_tokens, starts)
    return Scored(best, n_tokens, np.logical_or.reduceat(encoded.truncated, starts), encoded.chunks.offset[first])


def shared_packs(encoded: Encoded, pairs: Index, token_budget: int) -> Iterator[Index]:
    """Pairs in packs of at most `token_budget` tokens, where a prefix counts once; a pair that is longer is alone.

    Pairs of one prefix that do not fit into one pack are spread evenly over as few as hold them, because each of
    these packs computes the prefix again.
    """
    prefixes = prefix_of(encoded, pairs)
    lengths = np.diff(encoded.offsets)[prefixes]
    own = encoded.n_tokens[pairs] - lengths
    order = np.argsort(prefixes, kind="stable")
    borders = np.flatnonzero(np.diff(prefixes[order])) + 1
    pack: list[Index] = []
    used = 0
    for members in np.split(order, borders) if len(pairs) else ():
        prefix = int(lengths[members[0]])
        for run in _even(own[members], token_budget - prefix):
            part = members[run]
            tokens = prefix + int(own[part].sum())
            if pack and used + tokens > token_budget:
                yield pairs[np.concatenate(pack)]
                pack, used = [], 0
            pack.append(part)
            used += tokens
    if pack:
        yield pairs[np.concatenate(pack)]


def _even(lengths: npt.NDArray[np.integer], room: int) -> Iterator[slice]:
    """Runs of sequences of these lengths, in order, of at most `room` tokens, as equal as that allows; a longer one is
    a run."""
    ends = np.cumsum(lengths, dtype=np.int64)
    start, spent = 0, 0
    while start < len(ends):
        left = int(ends[-1]) - spent
        goal = left / max(1, -(-left // max(1, room)))
        # the one that crosses the goal still belongs to the run if there is room for it
        stop = int(np.searchsorted(ends, spent + goal)) + 1 if left else len(ends)
        stop = min(stop, max(start + 1, int(np.searchsorted(ends, spent + room, side="right"))))
        yield slice(start, stop)
        start, spent = stop, int(ends[min(stop, len(ends)) - 1])


def batches(lengths: Int32, token_budget: int) -> Iterator[Index]:
    """Indexes of sequences, longest first, so that rows times the longest row stay within the budget; a sequence
    longer than the budget is alone. Sorting by length is what keeps padding low."""
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    start = 0
    while start < len(order):
        rows = max(1, token_budget // max(1, int(lengths[order[start]])))
        yield order[start : start + rows]
        start += rows


def filled(lengths: Int32, token_budget: int) -> Iterator[Index]:
    """Indexes of sequences, in order, in evenly filled runs of at most `token_budget` tokens: no padding to save."""
    for run in _even(lengths, token_budget):
        yield np.arange(run.start, run.stop)


def long_apart(lengths: npt.NDArray[np.integer]) -> list[Index]:
    """Indexes of the sequences of up to LONG tokens, and of the longer ones: a GPU's kernel for packed sequences starts
    as many blocks for each as the longest of its pack needs, 614,000 mostly empty ones for 600 short documents beside
    one of 8,000 tokens."""
    parts = (np.flatnonzero(lengths <= LONG), np.flatnonzero(lengths > LONG))
    return [part for part in parts if len(part)]


def prefix_of(encoded: Encoded, pairs: Index) -> Int32:
    """int32[n]: the prefix segment of each of these pairs."""
    return encoded.prefix[encoded.group_of_pair()[pairs]]


def own_tokens(encoded: Encoded, pairs: Index) -> list[Ids]:
    """The tokens of each pair after its prefix: as much of the document as is used, and the tail."""
    tails = encoded.tail[encoded.group_of_pair()[pairs]]
    documents = (encoded.segment(encoded.document[pair])[: encoded.kept[pair]] for pair in pairs)
    return [
        np.concatenate([document, encoded.tails[tail]]) if len(encoded.tails[tail]) else document
        for document, tail in zip(documents, tails, strict=True)
    ]
