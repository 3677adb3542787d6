"""A run as arrays: its ids as codes, read piece by piece, and its candidates in the order of their ranks."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from batch_rerank.input.sources import Piece, Source, pieces, read_piece
from batch_rerank.store.filesystem import Options

READ_THREADS = 4
MERGE_VALUES = 2**20
"""Distinct ids of batches that wait to be merged, at least."""

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


@dataclass
class Run:
    """Candidates in the order of their rows: codes int32[n] into the distinct ids, in order of first appearance."""

    queries: pa.Array
    documents: pa.Array
    query: Int32
    document: Int32
    score: npt.NDArray[np.float32] | None
    rank: Int32 | None
    pieces: list[Piece]
    starts: Int64

    def keep(self, chosen: Int64 | npt.NDArray[np.bool_]) -> None:
        """Take some candidates, or all in another order; one column after the other, so that one is held twice."""
        self.query = self.query[chosen]
        self.document = self.document[chosen]
        self.score = None if self.score is None else self.score[chosen]
        self.rank = None if self.rank is None else self.rank[chosen]


def read_run(source: Source, options: Options) -> Run:
    """The candidates of a run, or of a flat input. Raises InputError."""
    every = pieces(source)
    codes = {"query_id": Codes(), "doc_id": Codes()}
    numbers: dict[str, list[npt.NDArray[Any]]] = {"score": [], "rank": []}
    starts = [0]
    for read in _read(source, every, ("query_id", "doc_id", "score", "rank"), options, _compact):
        for table in read:
            for name, found in codes.items():
                for chunk in table[name].chunks:
                    found.add(chunk)
            for name in numbers.keys() & set(table.column_names):
                numbers[name].append(table[name].to_numpy())
        starts.append(starts[-1] + sum(map(len, read)))
    queries, query = codes.pop("query_id").result()
    documents, document = codes.pop("doc_id").result()
    score, rank = (np.concatenate(numbers.pop(name)) if numbers[name] else None for name in ("score", "rank"))
    return Run(queries, documents, query, document, score, rank, every, np.array(starts, np.int64))


def _compact(table: pa.Table) -> pa.Table:
    """Ids as codes."""
    for index, name in enumerate(table.column_names):
        if name in ("query_id", "doc_id"):
            table = table.set_column(index, name, table[name].dictionary_encode())
    return table


class Codes:
    """Distinct values in order of first appearance, and a code for every value, from dictionary arrays one by one.

    Dictionaries are merged when those that wait are as large as the merged one: a batch's own holds nearly all its ids,
    and together they would be as large as the run.
    """

    def __init__(self) -> None:
        self._values = pa.array([], pa.large_string())
        self._codes: list[Int32] = []
        self._waiting: list[pa.DictionaryArray] = []
        self._size = 0

    def add(self, chunk: pa.DictionaryArray) -> None:
        """The next values."""
        self._waiting.append(chunk)
        self._size += len(chunk.dictionary)
        if self._size >= max(MERGE_VALUES, len(self._values)):
            self._merge()

    def _merge(self) -> None:
        first = pa.DictionaryArray.from_arrays(pa.array([], pa.int32()), self._values)
        # the merged values begin with those of the first chunk, so codes that were given stay
        _, *chunks = pa.chunked_array([first, *self._waiting]).unify_dictionaries().chunks
        if chunks:
            self._values = chunks[0].dictionary
        self._codes += [chunk.indices.to_numpy() for chunk in chunks]
        self._waiting, self._size = [], 0

    def result(self) -> tuple[pa.Array, Int32]:
        """The distinct values, and int32[n]."""
        self._merge()
        return self._values, np.concatenate([np.empty(0, np.int32), *self._codes])


def _read(
    source: Source,
    every: Sequence[Piece],
    wanted: Sequence[str],
    options: Options,
    keep: Callable[[pa.Table], pa.Table] = lambda table: table,
) -> Iterator[list[pa.Table]]:
    """What is to be kept of each piece's tables, in order; a few threads read ahead."""

    def read(piece: Piece) -> list[pa.Table]:
        return [keep(table) for table in read_piece(source, piece, wanted, options)]

    with ThreadPoolExecutor(READ_THREADS) as pool:
        rest = iter(every)
        running = [pool.submit(read, piece) for piece in islice(rest, READ_THREADS)]
        while running:
            yield running.pop(0).result()
            running += [pool.submit(read, piece) for piece in islice(rest, 1)]


def read_all(source: Source, wanted: Sequence[str], options: Options) -> list[pa.Table]:
    """Columns of a whole source."""
    return [table for read in _read(source, pieces(source), wanted, options) for table in read]


def ids_of(source: Source, every: Sequence[Piece], name: str, options: Options) -> tuple[pa.ChunkedArray, Int64]:
    """All ids of a source in order, and where each piece begins."""
    chunks: list[pa.Array] = []
    starts = [0]
    for read in _read(source, every, (name,), options):
        chunks += [chunk for table in read for chunk in table[name].chunks]
        starts.append(starts[-1] + sum(len(table) for table in read))
    return pa.chunked_array(chunks, pa.large_string()), np.array(starts, np.int64)


def rank_candidates(run: Run, depth: int | None) -> None:
    """Order the candidates by query and rank (of one rank: by score), and keep `depth` of each query."""
    order = order_of(run)
    if order is not None:
        run.keep(order)
        del order
    if depth is not None:
        pairs = np.bincount(run.query, minlength=len(run.queries))
        chosen = positions(pairs) <= depth
        if not chosen.all():
            run.keep(chosen)


def order_of(run: Run) -> Int64 | None:
    """The order of the candidates; None where they are in it already, as most runs are."""
    keys = run.query.astype(np.int64) << 32
    score, rank = run.score, run.rank
    if rank is not None:
        keys += rank.astype(np.int64) + 2**31
    elif score is not None:
        # the bits of floats, as integers that fall with them; -0 is 0
        bits = (score + np.float32(0)).view(np.int32)
        keys += 2**31 - 1 - np.where(bits < 0, bits ^ np.int32(2**31 - 1), bits).astype(np.int64)
    if rank is None or score is None:
        return None if (keys[1:] >= keys[:-1]).all() else np.argsort(keys, kind="stable")
    if (keys[1:] > keys[:-1]).all():
        return None
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    if (keys[1:] == keys[:-1]).any():  # two of one rank: rare, and three keys take four times as long
        return np.lexsort((-score, rank, run.query))
    return order


def positions(pairs: Int64) -> Int32:
    """1, 2, … within each query."""
    return (np.arange(pairs.sum()) - np.repeat(np.cumsum(pairs) - pairs, pairs) + 1).astype(np.int32)
