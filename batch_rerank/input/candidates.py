"""A run as records on disk: read piece by piece, put in the order of its queries, and each query's of their ranks.

In memory are the distinct ids of queries, those of documents that the corpus lacks, and BUCKET candidates.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from batch_rerank.input.known import Fingerprints, Known
from batch_rerank.input.sources import PIECE_BYTES, Piece, Source, pieces, read_piece
from batch_rerank.input.spill import Column, Records, Sorted, Spill
from batch_rerank.input.text_files import codec_of
from batch_rerank.store.filesystem import Options

READ_THREADS = 4
MERGE_VALUES = 2**20
"""Distinct ids of batches that wait to be merged, at least."""

BUCKET = 2**22
"""Candidates that are sorted together, and those of a query in any case: some 100 bytes each."""

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]


@dataclass
class Run:
    """Candidates in the order of the input, as records of `column`.

    query: int32, the number of the id in `queries`, which are in order of first appearance; score: float64 and rank:
    int32 where the run has them. A run's document: int32, the row in the corpus, or below 0 for the documents that it
    lacks, -1 - i for `lacked[i]`, a number of `lost`. A flat input's: high and low, the id's fingerprint.
    pairs: candidates of each query; ordered: whether each query's are side by side, in the order of queries; unscored:
    the first record whose score is NaN, and how many there are; used: bool[corpus], the rows that are candidates.
    """

    column: Column
    queries: pa.Array
    pairs: Int64
    ordered: bool
    unscored: tuple[int, int]
    used: npt.NDArray[np.bool_]
    lost: pa.Array
    lacked: Int32
    pieces: list[Piece]
    starts: Int64

    @property
    def names(self) -> tuple[str, ...]:
        """The fields of its records."""
        return self.column.kind.names or ()

    def documents(self, records: Records) -> Int64:
        """int64[n] that is the same for the same document: of a flat input, but once in 2^56."""
        if "high" in self.names:
            return records["high"].view(np.int64)
        found = records["document"].astype(np.int64)
        lacks = found < 0
        found[lacks] = -1 - self.lacked[-1 - found[lacks]].astype(np.int64)
        return found

    def buckets(self, spill: Spill) -> Iterator[Records]:
        """The candidates of some whole queries at a time, in the order of queries from one time to the next; a query's
        are in the order of the input."""
        ends = np.cumsum(self.pairs)
        borders = [0]  # numbers of queries
        while borders[-1] < len(ends):
            before = int(ends[borders[-1] - 1]) if borders[-1] else 0
            borders.append(max(borders[-1] + 1, int(np.searchsorted(ends, before + BUCKET, side="right"))))
        if self.ordered:
            stops = [0, *(int(ends[border - 1]) for border in borders[1:])]
            yield from (self.column.read(start, stop) for start, stop in pairwise(stops))
            return
        count = len(borders) - 1
        bucket_of = np.repeat(np.arange(count, dtype=np.min_scalar_type(count)), np.diff(borders))  # 16 bits sort fast
        found = Sorted(spill, self.column.kind, np.arange(count + 1))
        for records in self.column.chunks():
            keys = bucket_of[records["query"]]
            order = np.argsort(keys, kind="stable")
            found.add(keys[order], records[order])
        yield from map(found.read, range(count))


def read_run(source: Source, options: Options, spill: Spill, corpus: Known | None = None) -> Run:
    """The candidates of a run over a corpus, or of a flat input, without one. Raises InputError and StorageError."""
    every = pieces(source)
    prints = corpus.prints if corpus is not None else Fingerprints()
    queries: dict[str, int] = {}
    lost = Codes()
    column: Column | None = None
    pairs, used = np.zeros(1024, np.int64), np.zeros(len(corpus) if corpus is not None else 0, np.bool_)
    starts, lacked, last, ordered, unscored = np.zeros(len(every) + 1, np.int64), 0, 0, True, [0, 0]
    for piece, table in _read(source, every, ("query_id", "doc_id", "score", "rank"), options, _compact):
        if column is None:
            numbers = [
                (name, table[name].type.to_pandas_dtype()) for name in ("score", "rank") if name in table.schema.names
            ]
            document = [("document", np.int32)] if corpus is not None else [("high", np.uint64), ("low", np.uint64)]
            column = spill.column([("query", np.int32), *document, *numbers])
        if not len(table):
            continue
        records = np.empty(len(table), column.kind)
        for name in ("score", "rank"):
            if name in table.schema.names:
                records[name] = table[name].to_numpy()
        ids, codes = _dictionary(table["query_id"])
        known = np.array([queries.setdefault(one, len(queries)) for one in ids.to_pylist()], np.int32)
        query = records["query"] = known[codes]
        ids, codes = _dictionary(table["doc_id"])
        if corpus is None:
            records["high"], records["low"] = (one[codes] for one in prints.of(ids))
        else:
            rows = corpus.rows_of(prints.of(ids))
            used[rows[rows >= 0]] = True
            lacks = np.flatnonzero(rows < 0)
            rows[lacks] = -1 - np.arange(lacked, lacked + len(lacks))
            lacked += len(lacks)
            lost.add(_own(ids.take(pa.array(lacks))))
            records["document"] = rows[codes]
        if "score" in records.dtype.names:
            nan = np.flatnonzero(np.isnan(records["score"]))
            if len(nan) and not unscored[1]:
                unscored[0] = len(column) + int(nan[0])
            unscored[1] += len(nan)
        ordered = ordered and bool(query[0] >= last and (query[1:] >= query[:-1]).all())
        last = int(query[-1])
        while len(pairs) < len(queries):
            pairs = np.concatenate([pairs, np.zeros_like(pairs)])
        counts = np.bincount(query)
        pairs[: len(counts)] += counts
        starts[piece + 1] += len(table)
        column.append(records)
    names, codes = lost.result()
    return Run(
        column if column is not None else spill.column([("query", np.int32)]),
        pa.array(list(queries), pa.large_string()),
        pairs[: len(queries)],
        ordered,
        (unscored[0], unscored[1]),
        used,
        names,
        codes,
        every,
        np.cumsum(starts),
    )


def _compact(table: pa.Table) -> pa.Table:
    """Ids as codes."""
    for index, name in enumerate(table.column_names):
        if name in ("query_id", "doc_id"):
            table = table.set_column(index, name, table[name].combine_chunks().dictionary_encode())
    return table


def _dictionary(column: pa.ChunkedArray) -> tuple[pa.Array, Int32]:
    one = column.combine_chunks()
    one = one.chunk(0) if isinstance(one, pa.ChunkedArray) else one
    return one.dictionary, one.indices.to_numpy()


def _own(values: pa.Array) -> pa.DictionaryArray:
    """Values as their own dictionary."""
    return pa.DictionaryArray.from_arrays(pa.array(np.arange(len(values), dtype=np.int32)), values)


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
) -> Iterator[tuple[int, pa.Table]]:
    """What is to be kept of each piece's tables, in order, with the piece's number; a few threads read ahead. A large
    compressed file is one piece, of which no more than a block is held."""

    def read(piece: Piece) -> Iterator[pa.Table]:
        tables = map(keep, read_piece(source, piece, wanted, options))
        large = bool(codec_of(piece.url)) and source.format != "parquet" and piece.file.size > PIECE_BYTES
        return tables if large else iter(list(tables))

    with ThreadPoolExecutor(READ_THREADS) as pool:
        rest = iter(every)
        running = [pool.submit(read, piece) for piece in islice(rest, READ_THREADS)]
        number = 0
        while running:
            for table in running.pop(0).result():
                yield number, table
            number += 1
            running += [pool.submit(read, piece) for piece in islice(rest, 1)]


def read_all(source: Source, wanted: Sequence[str], options: Options) -> list[pa.Table]:
    """Columns of a whole source."""
    return [table for _, table in _read(source, pieces(source), wanted, options)]


def ids_of(
    source: Source, every: Sequence[Piece], name: str, options: Options, starts: Int64 | None = None
) -> Iterator[pa.Array]:
    """All ids of a source in order; `starts` int64[pieces + 1] is told where each piece begins, at the end."""
    counts = np.zeros(len(every) + 1, np.int64)
    for piece, table in _read(source, every, (name,), options):
        counts[piece + 1] += len(table)
        yield from table[name].chunks
    if starts is not None:
        starts[:] = np.cumsum(counts)


def order_of(query: Int32, score: Float64 | None, rank: Int32 | None) -> Int64 | None:
    """The order of candidates by query and rank, of one rank by score; None where they are in it already, as most runs
    are."""
    keys = query.astype(np.int64) << 32
    if rank is not None:
        keys += rank.astype(np.int64) + 2**31
    elif score is not None:
        # the bits of floats, as integers that fall with them; -0 is 0
        with np.errstate(over="ignore"):
            bits = (score.astype(np.float32) + np.float32(0)).view(np.int32)
        keys += 2**31 - 1 - np.where(bits < 0, bits ^ np.int32(2**31 - 1), bits).astype(np.int64)
    order = None if (keys[1:] >= keys[:-1]).all() else np.argsort(keys, kind="stable")
    if score is None:
        return order
    if order is not None:
        keys, scores = keys[order], score[order]
    else:
        scores = score
    # two of one rank, or of one float32, not as their scores fall: rare, and more keys take four times as long
    tied = np.flatnonzero(keys[1:] == keys[:-1])
    if not (scores[tied] >= scores[tied + 1]).all():
        return np.lexsort((-score, query) if rank is None else (-score, rank, query))
    return order


def positions(pairs: Int64) -> Int32:
    """1, 2, … within each query."""
    return (np.arange(pairs.sum()) - np.repeat(np.cumsum(pairs) - pairs, pairs) + 1).astype(np.int32)
