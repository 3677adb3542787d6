"""Which row of a corpus, or of a scattered flat input, goes to which staged shard.

Ids only: no text passes here but the queries' own. At its peak the driver holds some 40 bytes a candidate, the distinct
ids of the run and all ids of the corpus. Ids are large strings: together they may be more than 2 GiB.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batch_rerank.errors import InputError
from batch_rerank.job.plan import cut_units
from batch_rerank.store.filesystem import Options
from batch_rerank.store.shards import Unit
from batch_rerank.store.sources import Piece, Source, pieces, read_piece

SHARD_PAIRS = 50_000
"""Candidates of a staged shard: some 50 MB of text, which one task holds, and three or four read tasks of a job."""

READ_THREADS = 4
MERGE_VALUES = 2**20
"""Distinct ids of batches that wait to be merged, at least."""

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Ranked:
    """The candidates of one staged shard.

    Its queries' rows, how many candidates each has, and of every candidate the
    number of its document's row in the corpus, its first-stage score and its rank."""

    queries: pa.Table
    pairs: Int64
    documents: Int32
    scores: npt.NDArray[np.float32] | None
    ranks: Int32


@dataclass(frozen=True)
class Join:
    """How the rows of `pieces` are spread over shards. Rows are numbered through all; `starts` int64[pieces + 1].

    needs int64[n]: row * len(units) + shard for each row and a shard that needs it, ascending; units: the shards;
    details: what a shard's task needs besides; missing: what the run names and the sources lack.
    """

    pieces: list[Piece]
    starts: Int64
    needs: Int64
    units: list[Unit]
    details: Callable[[Unit], Ranked | pa.Array]
    counts: dict[str, int]
    missing: dict[str, list[str]] = field(default_factory=dict)

    def wanted(self, piece: int) -> tuple[Int32, Int32]:
        """The rows of one piece that are needed, counted from its first, and where."""
        first, last = np.searchsorted(self.needs, self.starts[piece : piece + 2] * len(self.units))
        rows, shards = np.divmod(self.needs[first:last], max(1, len(self.units)))
        return (rows - self.starts[piece]).astype(np.int32), shards.astype(np.int32)


def join_run(
    run: Source, queries: Source, corpus: Source, depth: int | None, max_missing: float, options: Options
) -> Join:
    """Join a run with its queries and its corpus, by id. Queries are in the order of their first candidate, candidates
    by rank: the run's, else that of their scores, else their order.

    Raises InputError: an empty run, a candidate twice, ids that differ by space only, more than `max_missing` of the
    candidates without a document or a query.
    """
    found = _read_run(run, options)
    if not len(found.query):
        raise InputError(f"input.run: {_files(run)} has no candidates; expected at least one; check the first stage")
    known = pa.concat_tables(_each(queries, ("query_id", "query", "instruction"), options)).combine_chunks()
    corpus_pieces = pieces(corpus)
    ids, starts = _ids_of(corpus, corpus_pieces, "doc_id", options)
    _refuse_repeated_ids(known["query_id"], queries)
    _refuse_repeated_ids(ids, corpus)
    _refuse_spaces("query_id", found.queries, known["query_id"], run, queries)
    _refuse_spaces("doc_id", found.documents, ids, run, corpus)
    _refuse_repeated(found, run, options)
    _refuse_unranked(found, run)

    query_row, document_row = _rows_of(found.queries, known["query_id"]), _rows_of(found.documents, ids)
    total = len(found.query)
    _rank(found, depth)
    cut = total - len(found.query)
    lost = (query_row < 0)[found.query] | (document_row < 0)[found.document]
    missing = {
        "queries": found.queries.take(_used(found.query, query_row < 0)).to_pylist(),
        "documents": found.documents.take(_used(found.document, document_row < 0)).to_pylist(),
    }
    _refuse_missing(
        int(lost.sum()), len(lost), missing, max_missing, (found, known["query_id"], ids), (queries, corpus)
    )
    if lost.any():
        found.keep(~lost)

    pairs = np.bincount(found.query, minlength=len(found.queries)).astype(np.int64)
    present = np.flatnonzero(pairs)
    pairs = pairs[present]
    row = document_row[found.document]
    scores, ranks = found.score, found.rank
    del found  # of every candidate its row, score and rank are left
    units, borders = _shards(pairs)
    ends = np.concatenate([[0], np.cumsum(pairs)])
    if "instruction" in known.column_names and known["instruction"].null_count == len(known):
        known = known.drop_columns("instruction")  # a JSONL file is read as if it might have one

    def details(unit: Unit) -> Ranked:
        here = slice(int(ends[unit.start]), int(ends[unit.stop]))
        counts = pairs[unit.start : unit.stop]
        return Ranked(
            known.take(query_row[present[unit.start : unit.stop]]),
            counts,
            row[here],
            None if scores is None else scores[here],
            _positions(counts) if ranks is None else ranks[here],
        )

    return Join(
        pieces=corpus_pieces,
        starts=starts,
        needs=_needs(row, np.repeat(np.arange(len(units), dtype=np.int32), np.diff(ends[borders])), len(units)),
        units=units,
        details=details,
        counts={
            "queries": len(present),
            "candidates": len(row),
            "documents": len(_used(row, np.ones(len(ids), np.bool_))),
            "corpus": len(ids),
            "candidates_cut": cut,
            "queries_without_candidates": len(known) - len(present),
            "missing_candidates": int(lost.sum()),
            "missing_documents": len(missing["documents"]),
            "missing_queries": len(missing["queries"]),
        },
        missing=missing,
    )


def join_flat(source: Source, options: Options) -> Join:
    """Group a flat input by query_id. Queries are in the order of their first row, rows keep their order.

    Raises InputError for a candidate that is there twice.
    """
    found = _read_run(source, options)
    if not len(found.query):
        raise InputError(f"input.path: {_files(source)} has no rows; there is nothing to stage")
    _refuse_repeated(found, source, options)
    pairs = np.bincount(found.query, minlength=len(found.queries)).astype(np.int64)
    units, borders = _shards(pairs)
    shard_of_query = np.repeat(np.arange(len(units), dtype=np.int32), np.diff(borders))
    return Join(
        pieces=found.pieces,
        starts=found.starts,
        needs=np.arange(len(found.query), dtype=np.int64) * len(units) + shard_of_query[found.query],
        units=units,
        details=lambda unit: found.queries[unit.start : unit.stop],
        counts={"queries": len(found.queries), "candidates": len(found.query)},
    )


@dataclass
class _Run:
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


def _read_run(source: Source, options: Options) -> _Run:
    every = pieces(source)
    codes = {"query_id": _Codes(), "doc_id": _Codes()}
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
    return _Run(queries, documents, query, document, score, rank, every, np.array(starts, np.int64))


def _compact(table: pa.Table) -> pa.Table:
    """Ids as codes."""
    for index, name in enumerate(table.column_names):
        if name in ("query_id", "doc_id"):
            table = table.set_column(index, name, table[name].dictionary_encode())
    return table


class _Codes:
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


def _each(source: Source, wanted: Sequence[str], options: Options) -> list[pa.Table]:
    return [table for read in _read(source, pieces(source), wanted, options) for table in read]


def _ids_of(source: Source, every: Sequence[Piece], name: str, options: Options) -> tuple[pa.ChunkedArray, Int64]:
    """All ids of a source in order, and where each piece begins."""
    chunks: list[pa.Array] = []
    starts = [0]
    for read in _read(source, every, (name,), options):
        chunks += [chunk for table in read for chunk in table[name].chunks]
        starts.append(starts[-1] + sum(len(table) for table in read))
    return pa.chunked_array(chunks, pa.large_string()), np.array(starts, np.int64)


def _rows_of(ids: pa.Array, known: pa.ChunkedArray) -> Int32:
    """int32[n]: the row at which each id is known, -1 where it is not. The fewer ones, those of the run, are hashed."""
    rows = np.full(len(ids), -1, np.int32)
    first = 0
    for chunk in pc.index_in(known, value_set=ids).chunks:
        found = pc.fill_null(chunk, -1).to_numpy(zero_copy_only=False)
        here = np.flatnonzero(found >= 0)
        rows[found[here]] = first + here
        first += len(found)
    return rows


def _rank(run: _Run, depth: int | None) -> None:
    """Order the candidates by query and rank (of one rank: by score), and keep `depth` of each query."""
    order = _order(run)
    if order is not None:
        run.keep(order)
        del order
    if depth is not None:
        pairs = np.bincount(run.query, minlength=len(run.queries))
        chosen = _positions(pairs) <= depth
        if not chosen.all():
            run.keep(chosen)


def _order(run: _Run) -> Int64 | None:
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


def _positions(pairs: Int64) -> Int32:
    """1, 2, … within each query."""
    return (np.arange(pairs.sum()) - np.repeat(np.cumsum(pairs) - pairs, pairs) + 1).astype(np.int32)


def _used(codes: Int32, among: npt.NDArray[np.bool_]) -> Int64:
    """The distinct codes, of those that `among` has, ascending."""
    used = np.zeros(len(among), np.bool_)
    used[codes] = True
    return np.flatnonzero(used & among)


def _needs(row: Int32, shard: Int32, shards: int) -> Int64:
    """Distinct row * shards + shard, ascending. Not np.unique: in numpy 2.4 it takes 100 times a sort."""
    keys = row.astype(np.int64)
    keys *= shards
    keys += shard
    keys.sort()
    return keys[np.concatenate([[True], keys[1:] != keys[:-1]])] if len(keys) else keys


def _shards(pairs: Int64) -> tuple[list[Unit], Int64]:
    """Whole queries in shards of about SHARD_PAIRS, as units whose rows are queries; and the borders between them."""
    borders = np.array(cut_units(pairs, np.arange(len(pairs) + 1), [], SHARD_PAIRS), np.int64)
    units = [
        Unit(f"{index:05d}", 0, int(first), int(last), int(last - first), int(pairs[first:last].sum()))
        for index, (first, last) in enumerate(pairwise(borders.tolist()))
    ]
    return units, borders


def _files(source: Source) -> str:
    urls = [url for url, _ in source.files]
    return urls[0] if len(urls) == 1 else f"{urls[0]} and {len(urls) - 1} more"


def _refuse_repeated_ids(ids: pa.ChunkedArray, source: Source) -> None:
    name = "query_id" if source.kind == "queries" else "doc_id"
    if pc.count_distinct(ids).as_py() == len(ids):
        return
    counted = pc.value_counts(ids)
    repeated = counted.field("values").filter(pc.greater(counted.field("counts"), 1))
    rows = np.flatnonzero(pc.equal(ids, repeated[0]).to_numpy())[:2].tolist()
    raise InputError(
        f"input.{source.kind}: {_files(source)}: {name} {repeated[0].as_py()!r} stands in rows {rows[0] + 1} and "
        f"{rows[1] + 1} ({len(repeated)} such ids; a number and its digits are one id); expected each once; drop one"
    )


def _refuse_spaces(name: str, run: pa.Array, known: pa.ChunkedArray, first: Source, second: Source) -> None:
    """Ids that are the same but for space around them: nobody means two documents by that."""
    for ids, source in ((pa.chunked_array([run]), first), (known, second)):
        padded = [chunk.filter(pc.not_equal(pc.utf8_trim_whitespace(chunk), chunk)) for chunk in ids.chunks]
        odd = pa.chunked_array(padded, pa.large_string())
        if not len(odd):
            continue
        trimmed = pc.utf8_trim_whitespace(odd)
        for others, other in ((run, first), (known, second)):
            twin = trimmed.filter(pc.is_in(trimmed, value_set=others))
            if len(twin):
                at = odd.filter(pc.equal(trimmed, twin[0]))[0].as_py()
                raise InputError(
                    f"input.{source.kind}: {_files(source)}: {name} {at!r} differs from {twin[0].as_py()!r} in "
                    f"input.{other.kind} only by space around it; expected one way to write an id; trim it"
                )


def _refuse_repeated(run: _Run, source: Source, options: Options) -> None:
    keys = run.query.astype(np.int64)
    keys *= len(run.documents)
    keys += run.document
    keys.sort()
    twice = keys[1:][keys[1:] == keys[:-1]]
    if not len(twice):
        return
    query, document = divmod(int(twice[0]), len(run.documents))
    rows = np.flatnonzero((run.query == query) & (run.document == document))[:2].tolist()
    query_id = run.queries[query].as_py()
    doc_id = run.documents[document].as_py()
    places = " and ".join(_place(run, source, row) for row in rows)
    scores = "" if run.score is None else f" with scores {run.score[rows[0]]:g} and {run.score[rows[1]]:g}"
    raise InputError(
        f"query_id {query_id!r} has doc_id {doc_id!r} twice{scores}: {places} ({len(twice)} such rows); expected "
        "each document once per query; drop one"
    )


def _refuse_unranked(run: _Run, source: Source) -> None:
    """A Parquet run's score may be null or NaN where ranks say the order; alone it has to say it."""
    if run.rank is not None or run.score is None:
        return
    unknown = np.flatnonzero(np.isnan(run.score))
    if len(unknown):
        row = int(unknown[0])
        raise InputError(
            f"query_id {run.queries[int(run.query[row])].as_py()!r} has doc_id "
            f"{run.documents[int(run.document[row])].as_py()!r} ({_place(run, source, row)}; {len(unknown)} such rows) "
            "without a score, and the run has no rank; expected one of them in every row; fill or drop it"
        )


def _place(run: _Run, source: Source, row: int) -> str:
    """A row's file and its place there: a line from 1, a Parquet row from 0 as elsewhere."""
    piece = int(np.searchsorted(run.starts, row, side="right")) - 1
    url = run.pieces[piece].url
    first = next(index for index, one in enumerate(run.pieces) if one.url == url)
    within = row - int(run.starts[first])
    return f"{url} line {within + 1}" if source.format == "trec" else f"{url} row {within}"


def _refuse_missing(
    lost: int,
    total: int,
    missing: dict[str, list[str]],
    max_missing: float,
    ids: tuple[_Run, pa.ChunkedArray, pa.ChunkedArray],
    sources: tuple[Source, Source],
) -> None:
    run, queries, documents = ids
    for name, ours, known, source in (
        ("query_id", run.queries, queries, sources[0]),
        ("doc_id", run.documents, documents, sources[1]),
    ):
        kind = "queries" if name == "query_id" else "documents"
        if len(missing[kind]) == len(ours):
            raise InputError(
                f"no {name} of the run is in input.{source.kind} ({_files(source)}): the run "
                f"has {_some(ours)}, {source.kind} has {_some(known)}; expected the same ids; do they belong together?"
            )
    if lost > max_missing * total or lost == total:
        parts = [
            f"{len(missing[kind]):,} {kind} that {_files(source)} lacks, e.g. {_some(missing[kind])}"
            for kind, source in zip(("queries", "documents"), sources, strict=True)
            if missing[kind]
        ]
        allowed = f"expected at most input.max_missing = {max_missing:g} of them; mend the run, or raise it to go on"
        raise InputError(
            f"{lost:,} of {total:,} candidates name {' and '.join(parts)}; "
            + ("nothing is left; do they belong together?" if lost == total else f"{allowed} without them")
        )


def _some(ids: pa.Array | pa.ChunkedArray | Sequence[str]) -> str:
    first = ids[:3] if isinstance(ids, Sequence) else ids.slice(0, 3).to_pylist()
    if not len(ids):
        return "none"
    return ", ".join(json.dumps(one, ensure_ascii=False)[:60] for one in first) + (", …" if len(ids) > 3 else "")
