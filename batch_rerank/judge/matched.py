"""The queries that two rankings share, in passes of bounded memory, and how far the two agree on each."""

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batch_rerank.input.layouts import run_starts
from batch_rerank.judge.agreement import kendall, overlap, rbo, settled

HELD_ROWS = 10_000_000
"""Rows of an output that are held at once: more queries are compared in several passes, by a hash of their ids."""

COLUMNS = ["query_id", "doc_id", "score"]


def passes_over(*rows: int) -> int:
    """How many passes two outputs of so many rows take."""
    return max(1, -(-max(rows) // HELD_ROWS))


class Held:
    """The queries of a ranking whose ids have one hash of so many, each with its documents in the order of their
    ranks."""

    def __init__(self, tables: Iterable[pa.Table], number: int, passes: int) -> None:
        kept = [_of_pass(rows.select(COLUMNS), number, passes) for rows in tables]
        rows = pa.concat_tables(kept) if kept else pa.table({name: pa.array([], pa.string()) for name in COLUMNS})
        self._documents = rows["doc_id"].combine_chunks() if len(rows) else pa.array([], pa.string())
        self._scores = pc.cast(rows["score"], pa.float64()).to_numpy()  # NaN where null
        ids = rows["query_id"].combine_chunks()
        starts = run_starts(ids)
        names = ids.take(pa.array(starts)).to_pylist()
        stops = [*starts.tolist(), len(rows)][1:]  # of no rows none
        self._at = dict(zip(names, zip(starts.tolist(), stops, strict=True), strict=True))

    def __iter__(self) -> Iterator[str]:
        return iter(self._at)

    def __contains__(self, query_id: str) -> bool:
        return query_id in self._at

    def __len__(self) -> int:
        return len(self._at)

    def ranking(self, query_id: str) -> tuple[list[str], npt.NDArray[np.float64]]:
        """Documents, best first, and their scores."""
        start, stop = self._at[query_id]
        return self._documents[start:stop].to_pylist(), self._scores[start:stop]


def _of_pass(rows: pa.Table, number: int, passes: int) -> pa.Table:
    if passes == 1:
        return rows
    ids = rows["query_id"].combine_chunks()
    starts = run_starts(ids)
    names = ids.take(pa.array(starts)).to_pylist()
    mine = [zlib.crc32(name.encode()) % passes == number for name in names]
    lengths = np.diff(np.append(starts, len(rows)))
    return rows.filter(pa.array(np.repeat(mine, lengths)))


@dataclass(frozen=True)
class Agreed:
    """Two rankings of a query. overlap: at each depth that was asked for; tau: NaN where undefined; shift: new score
    minus old of the documents that both have a score of; gained and lost: documents of only one; old and new: all
    documents, best first."""

    overlap: list[float]
    rbo: float
    tau: float
    shift: npt.NDArray[np.float64]
    gained: int
    lost: int
    old: list[str]
    new: list[str]


def agreed(query: str, old: Held, new: Held, tolerance: float, depths: Sequence[int]) -> Agreed:
    """How two rankings of a query agree, where scores within `tolerance` are ties."""
    (there, before), (here, after) = old.ranking(query), new.ranking(query)
    number = {document: index for index, document in enumerate(there)}
    one = np.arange(len(there))
    other = np.array([number.setdefault(document, len(number)) for document in here], np.int64)
    common = other < len(there)
    shift = after[common] - before[other[common]]
    other = settled(other, after, one, tolerance)
    one = settled(one, before, other, tolerance)
    return Agreed(
        overlap=[overlap(one, other, depth) for depth in depths],
        rbo=rbo(one, other),
        tau=kendall(one, other),
        shift=shift[~np.isnan(shift)],
        gained=int((~common).sum()),
        lost=len(there) - int(common.sum()),
        old=there,
        new=here,
    )
