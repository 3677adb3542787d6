"""Which pairs are scored together. How they are grouped never changes a score beyond the dtype's tolerance."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from batch_rerank.engine.encoding import Encoded, Int32

Index = npt.NDArray[np.int64]
Ids = npt.NDArray[np.integer]
Float32 = npt.NDArray[np.float32]


def distinct_pairs(encoded: Encoded) -> Index:
    """int64[n_pairs]: for each pair the first one with the same prefix and document. A repeated pair is scored once, so
    that its copies tie exactly."""
    prefixes = prefix_of(encoded, np.arange(len(encoded.document)))
    keys = prefixes.astype(np.int64) << 32 | encoded.document
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return np.asarray(first[inverse], np.int64)


def shared_packs(encoded: Encoded, pairs: Index, token_budget: int) -> Iterator[Index]:
    """Pairs in packs of at most `token_budget` tokens, where a prefix counts once; a pair that is longer is alone.

    Pairs of one prefix that do not fit into one pack are spread evenly over as few as hold them, because each of
    these packs computes the prefix again.
    """
    prefixes = prefix_of(encoded, pairs)
    lengths = np.diff(encoded.offsets)[prefixes]
    own = encoded.kept + len(encoded.tail)
    order = np.argsort(prefixes, kind="stable")
    borders = np.flatnonzero(np.diff(prefixes[order])) + 1
    pack: list[Index] = []
    used = 0
    for members in np.split(order, borders) if len(pairs) else ():
        prefix = int(lengths[members[0]])
        for part in _even(pairs[members], own[pairs[members]], token_budget - prefix):
            tokens = prefix + int(own[part].sum())
            if pack and used + tokens > token_budget:
                yield np.concatenate(pack)
                pack, used = [], 0
            pack.append(part)
            used += tokens
    if pack:
        yield np.concatenate(pack)


def _even(pairs: Index, lengths: Int32, room: int) -> Iterator[Index]:
    """Pairs, in order, in runs of at most `room` tokens, as equal as that allows; a longer pair is a run."""
    ends = np.cumsum(lengths, dtype=np.int64)
    runs = max(1, -(-int(ends[-1]) // max(1, room)))
    goal = ends[-1] / runs
    start, spent = 0, 0
    while start < len(pairs):
        # the pair that crosses the goal still belongs to the run if there is room for it
        stop = int(np.searchsorted(ends, spent + goal)) + 1
        stop = min(stop, max(start + 1, int(np.searchsorted(ends, spent + room, side="right"))))
        yield pairs[start:stop]
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
    if len(lengths):
        yield from _even(np.arange(len(lengths)), lengths, token_budget)


def prefix_of(encoded: Encoded, pairs: Index) -> Int32:
    """int32[n]: the prefix segment of each of these pairs."""
    return encoded.prefix[encoded.group_of_pair()[pairs]]


def own_tokens(encoded: Encoded, pair: int) -> Ids:
    """The tokens of a pair after its prefix: as much of the document as is used, and the tail."""
    document = encoded.segment(int(encoded.document[pair]))[: encoded.kept[pair]]
    return np.concatenate([document, encoded.tail]) if len(encoded.tail) else document
