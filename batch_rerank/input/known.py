"""The ids of a corpus as fingerprints of 128 bits: which row each id is, in 20 bytes a document however long they are.

A fingerprint is two sums of 64 bits over an id's bytes, each times a random number of its place (multilinear hashing,
Carter and Wegman 1979). Two ids differ in some place by at most 2^8, so for numbers drawn after the ids were written
they have one sum with a chance of 2^-56 and both with 2^-112; any two of 10^8 ids with less than 2^-58.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batch_rerank.errors import InputError

Int32 = npt.NDArray[np.int32]
UInt64 = npt.NDArray[np.uint64]
BYTES = 2**20
"""Of ids, looked at together: each takes 30 more for a moment."""

MOST_ROWS = 2**31 - 1
"""Of a corpus: rows are int32, here and in what the stage keeps of them."""


class Fingerprints:
    """The random numbers of one join, drawn as far as the longest id goes."""

    def __init__(self) -> None:
        self._random = np.random.default_rng()
        self._factors = np.empty((2, 0), np.uint64)

    def of(self, ids: pa.Array) -> UInt64:
        """uint64[2, n] of large strings without nulls."""
        if not len(ids):
            return np.empty((2, 0), np.uint64)
        offsets = np.frombuffer(ids.buffers()[1], np.int64)[ids.offset : ids.offset + len(ids) + 1]
        if len(ids) > 1 and offsets[-1] - offsets[0] > BYTES:
            half = len(ids) // 2
            return np.concatenate([self.of(ids[:half]), self.of(ids[half:])], axis=1)
        lengths = np.diff(offsets)
        content = ids.buffers()[2]
        data = np.frombuffer(content or b"", np.uint8)[offsets[0] : offsets[-1]]
        longest = int(lengths.max())
        while self._factors.shape[1] < longest:
            more = self._random.integers(0, 2**64, (2, max(64, self._factors.shape[1])), np.uint64)
            self._factors = np.concatenate([self._factors, more], axis=1)
        some = lengths > 0
        starts = (offsets[:-1] - offsets[0])[some]
        place = np.arange(len(data)) - np.repeat(starts, lengths[some])
        value = data.astype(np.uint64) + np.uint64(1)  # a byte of 0 is not a missing one
        found = np.zeros((2, len(ids)), np.uint64)
        if len(starts):
            for sums, factors in zip(found, self._factors, strict=True):
                sums[some] = np.add.reduceat(factors[place] * value, starts)
        return found


@dataclass(frozen=True)
class Padded:
    """Ids with space around them: int32[n] rows, and uint64[2, n] fingerprints without the space."""

    rows: Int32
    trimmed: UInt64


@dataclass(frozen=True)
class Known:
    """Distinct ids by ascending fingerprint. rows: int32[n], where each stands; first: the first four ids."""

    prints: Fingerprints
    high: UInt64
    low: UInt64
    rows: Int32
    padded: Padded
    first: pa.Array
    alike: int = 1
    """Most ids of one `high`."""

    def __len__(self) -> int:
        return len(self.rows)

    def rows_of(self, prints: UInt64) -> Int32:
        """int32[n]: the row of each fingerprint, -1 where it is not known."""
        order = np.argsort(prints[0])  # neighbours are found where the cache is warm
        high, low = prints[0][order], prints[1][order]
        at = np.searchsorted(self.high, high)
        rows = np.full(len(order), -1, np.int32)
        for step in range(self.alike if len(self) else 0):
            here = np.minimum(at + step, len(self) - 1)
            same = (self.high[here] == high) & (self.low[here] == low)
            rows[order[same]] = self.rows[here[same]]
        return rows


@dataclass(frozen=True)
class Repeated:
    """Ids that stand twice: how many, and two rows of the first."""

    count: int
    rows: tuple[int, int]


def know(chunks: Iterable[pa.Array], prints: Fingerprints) -> Known | Repeated:
    """The ids of a source, in the order of its rows. Raises InputError where there are more than MOST_ROWS."""
    highs, lows, odd, trimmed = [], [], [np.empty(0, np.int32)], [np.empty((2, 0), np.uint64)]
    first, count = pa.array([], pa.large_string()), 0
    for ids in chunks:
        if count + len(ids) > MOST_ROWS:
            raise InputError(
                f"input.corpus: more than {MOST_ROWS:,} documents; expected no more in one job; split the run by "
                "queries, and give each job the documents that it names"
            )
        high, low = prints.of(ids)
        highs.append(high)
        lows.append(low)
        padded, without = padded_of(ids)
        odd.append((count + padded).astype(np.int32))
        trimmed.append(prints.of(without))
        if len(first) < 4:
            first = pa.concat_arrays([first, ids[: 4 - len(first)]])
        count += len(ids)
    high = np.concatenate([np.empty(0, np.uint64), *highs])
    highs.clear()
    low = np.concatenate([np.empty(0, np.uint64), *lows])
    lows.clear()
    rows = np.argsort(high).astype(np.int32)
    high = high[rows]
    alike = high[1:] == high[:-1]
    if alike.any():  # ids that stand twice, or once in 2^56 two ids
        some = np.flatnonzero(np.concatenate([alike, [False]]) | np.concatenate([[False], alike]))
        rows[some] = rows[some][np.lexsort((rows[some], low[rows[some]], high[some]))]
    low = low[rows]
    same = alike & (low[1:] == low[:-1])
    if same.any():
        begins = np.flatnonzero(same & ~np.concatenate([[False], same[:-1]]))
        at = begins[np.argmin(rows[begins])]
        return Repeated(len(begins), (int(rows[at]), int(rows[at + 1])))
    most = 1
    if alike.any():
        most = int(np.diff(np.flatnonzero(np.concatenate([[True], ~alike, [True]]))).max())
    return Known(prints, high, low, rows, Padded(np.concatenate(odd), np.concatenate(trimmed, axis=1)), first, most)


def padded_of(ids: pa.Array) -> tuple[npt.NDArray[np.int64], pa.Array]:
    """Which ids have space around them, and these without it."""
    trimmed = pc.utf8_trim_whitespace(ids)
    padded = np.flatnonzero(pc.not_equal(trimmed, ids).to_numpy(zero_copy_only=False))
    return padded, trimmed.take(pa.array(padded))
