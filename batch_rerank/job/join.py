"""Which row of a corpus, or of a scattered flat input, goes to which staged shard.

Ids only: no text passes here but the queries' own. The driver holds some 30 bytes a candidate and the distinct ids.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice, pairwise

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
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Ranked:
    """The candidates of one staged shard.

    Its queries' rows, how many candidates each has, and of every candidate the
    number of its document's row in the corpus, its first-stage score and its rank."""

    queries: pa.Table
    pairs: Int64
    documents: Int64
    scores: npt.NDArray[np.float32] | None
    ranks: Int32


@dataclass(frozen=True)
class Join:
    """How the rows of `pieces` are spread over shards. Rows are numbered through all; `starts` int64[pieces + 1].

    rows int64[n], shards int32[n]: a row and a shard that needs it, by row; units: the shards; details: what a shard's
    task needs besides; missing: what the run names and the sources lack.
    """

    pieces: list[Piece]
    starts: Int64
    rows: Int64
    shards: Int32
    units: list[Unit]
    details: Callable[[Unit], Ranked | pa.Array]
    counts: dict[str, int]
    missing: dict[str, list[str]] = field(default_factory=dict)

    def wanted(self, piece: int) -> tuple[Int64, Int32]:
        """The rows of one piece that are needed, and where."""
        first, last = np.searchsorted(self.rows, self.starts[piece : piece + 2])
        return self.rows[first:last], self.shards[first:last]


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
    known = pa.concat_tables(_each(queries, ("query_id", "query", "instruction"), options))
    known = known.combine_chunks()
    corpus_pieces = pieces(corpus)
    ids, starts = _ids_of(corpus, corpus_pieces, "doc_id", options)
    _refuse_repeated_ids(known["query_id"].combine_chunks(), queries)
    _refuse_repeated_ids(ids, corpus)
    _refuse_spaces("query_id", found.queries, known["query_id"].combine_chunks(), run, queries)
    _refuse_spaces("doc_id", found.documents, ids, run, corpus)
    _refuse_repeated(found, run, options)
    _refuse_unranked(found, run)

    query_row, document_row = _rows_of(found.queries, known["query_id"]), _rows_of(found.documents, ids)
    order, pairs = _ranked(found, depth)
    query, document = found.query[order], found.document[order]
    lacks_query, lacks_document = query_row[query] < 0, document_row[document] < 0
    missing = {
        "queries": found.queries.take(np.unique(query[lacks_query])).to_pylist(),
        "documents": found.documents.take(np.unique(document[lacks_document])).to_pylist(),
    }
    lost = lacks_query | lacks_document
    _refuse_missing(
        int(lost.sum()), len(order), missing, max_missing, (found, known["query_id"], ids), (queries, corpus)
    )

    order, query, row = order[~lost], query[~lost], document_row[document[~lost]]
    present, pairs = np.unique(query, return_counts=True)
    pairs = pairs.astype(np.int64)
    units, borders = _shards(pairs)
    ends = np.concatenate([[0], np.cumsum(pairs)])
    ranks = None if found.rank is None else found.rank[order]
    scores = None if found.score is None else found.score[order]
    positions = (np.arange(len(order)) - np.repeat(ends[:-1], pairs) + 1).astype(np.int32)
    if "instruction" in known.column_names and known["instruction"].null_count == len(known):
        known = known.drop_columns("instruction")  # a JSONL file is read as if it might have one

    def details(unit: Unit) -> Ranked:
        here = slice(int(ends[unit.start]), int(ends[unit.stop]))
        return Ranked(
            known.take(query_row[present[unit.start : unit.stop]]),
            pairs[unit.start : unit.stop],
            row[here],
            None if scores is None else scores[here],
            positions[here] if ranks is None else ranks[here],
        )

    shard = np.repeat(np.arange(len(units)), np.diff(ends[borders])).astype(np.int64)
    keys = np.unique(row * len(units) + shard)
    return Join(
        pieces=corpus_pieces,
        starts=starts,
        rows=keys // len(units),
        shards=(keys % len(units)).astype(np.int32),
        units=units,
        details=details,
        counts={
            "queries": len(present),
            "candidates": len(order),
            "documents": len(np.unique(row)),
            "corpus": len(ids),
            "candidates_cut": len(found.query) - len(lost),
            "queries_without_candidates": len(known) - int((np.isin(np.arange(len(known)), query_row[present])).sum()),
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
        rows=np.arange(len(found.query), dtype=np.int64),
        shards=shard_of_query[found.query],
        units=units,
        details=lambda unit: found.queries[unit.start : unit.stop],
        counts={"queries": len(found.queries), "candidates": len(found.query)},
    )


@dataclass(frozen=True)
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


def _read_run(source: Source, options: Options) -> _Run:
    every = pieces(source)
    tables: list[pa.Table] = []
    starts = [0]
    for read in _read(source, every, ("query_id", "doc_id", "score", "rank"), options, _compact):
        tables += read
        starts.append(starts[-1] + sum(map(len, read)))
    table = pa.concat_tables(tables) if tables else pa.table({"query_id": _EMPTY, "doc_id": _EMPTY})
    queries, query = _codes(table["query_id"])
    documents, document = _codes(table["doc_id"])
    score = table["score"].to_numpy() if "score" in table.column_names else None
    rank = table["rank"].to_numpy() if "rank" in table.column_names else None
    return _Run(queries, documents, query, document, score, rank, every, np.array(starts, np.int64))


_EMPTY = pa.DictionaryArray.from_arrays(pa.array([], pa.int32()), pa.array([], pa.large_string()))


def _compact(table: pa.Table) -> pa.Table:
    """Ids as codes."""
    for index, name in enumerate(table.column_names):
        if name in ("query_id", "doc_id"):
            table = table.set_column(index, name, table[name].dictionary_encode())
    return table


def _codes(column: pa.ChunkedArray) -> tuple[pa.Array, Int32]:
    chunks = column.unify_dictionaries().chunks
    if not chunks:
        return pa.array([], pa.large_string()), np.empty(0, np.int32)
    return chunks[0].dictionary, np.concatenate([chunk.indices.to_numpy() for chunk in chunks]).astype(np.int32)


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


def _ids_of(source: Source, every: Sequence[Piece], name: str, options: Options) -> tuple[pa.Array, Int64]:
    """All ids of a source in order, and where each piece begins."""
    chunks: list[pa.Array] = []
    starts = [0]
    for read in _read(source, every, (name,), options):
        chunks += [chunk for table in read for chunk in table[name].chunks]
        starts.append(starts[-1] + sum(len(table) for table in read))
    ids = pa.chunked_array(chunks, pa.large_string()).combine_chunks() if chunks else pa.array([], pa.large_string())
    return ids, np.array(starts, np.int64)


def _rows_of(ids: pa.Array, known: pa.Array | pa.ChunkedArray) -> Int64:
    """int64[n]: the row at which each id is known, -1 where it is not."""
    found = pc.index_in(ids, value_set=known)
    rows: Int64 = pc.fill_null(found, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    return rows


def _ranked(run: _Run, depth: int | None) -> tuple[Int64, Int64]:
    """The candidates by query and rank (of one rank: by score), `depth` of each query; and how many each query has."""
    if run.rank is not None:
        tied = np.zeros(len(run.rank)) if run.score is None else -run.score
        order = np.lexsort((tied, run.rank, run.query))
    elif run.score is not None:
        order = np.lexsort((-run.score, run.query))
    else:
        order = np.argsort(run.query, kind="stable")
    pairs = np.bincount(run.query, minlength=len(run.queries)).astype(np.int64)
    if depth is not None:
        position = np.arange(len(order)) - np.repeat(np.cumsum(pairs) - pairs, pairs)
        order = order[position < depth]
        pairs = np.minimum(pairs, depth)
    return order, pairs


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


def _refuse_repeated_ids(ids: pa.Array, source: Source) -> None:
    name = "query_id" if source.kind == "queries" else "doc_id"
    if pc.count_distinct(ids).as_py() == len(ids):
        return
    counted = pc.value_counts(ids)
    repeated = counted.field("values").filter(pc.greater(counted.field("counts"), 1))
    rows = np.flatnonzero(pc.equal(ids, repeated[0]).to_numpy(zero_copy_only=False))[:2].tolist()
    raise InputError(
        f"input.{source.kind}: {_files(source)}: {name} {repeated[0].as_py()!r} stands in rows {rows[0] + 1} and "
        f"{rows[1] + 1} ({len(repeated)} such ids; a number and its digits are one id); expected each once; drop one"
    )


def _refuse_spaces(name: str, run: pa.Array, known: pa.Array, first: Source, second: Source) -> None:
    """Ids that are the same but for space around them: nobody means two documents by that."""
    for ids, source in ((run, first), (known, second)):
        trimmed = pc.utf8_trim_whitespace(ids)
        padded = pc.not_equal(trimmed, ids)
        if not pc.any(padded).as_py():
            continue
        candidates = pc.filter(trimmed, padded)
        for others, other in ((run, first), (known, second)):
            twin = pc.filter(candidates, pc.is_in(candidates, value_set=others))
            if len(twin):
                at = pc.filter(pc.filter(ids, padded), pc.equal(candidates, twin[0]))[0].as_py()
                raise InputError(
                    f"input.{source.kind}: {_files(source)}: {name} {at!r} differs from {twin[0].as_py()!r} in "
                    f"input.{other.kind} only by space around it; expected one way to write an id; trim it"
                )


def _refuse_repeated(run: _Run, source: Source, options: Options) -> None:
    keys = run.query.astype(np.int64) * len(run.documents) + run.document
    ordered = np.sort(keys)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if not len(twice):
        return
    rows = np.flatnonzero(keys == twice[0])[:2].tolist()
    query_id = run.queries[int(run.query[rows[0]])].as_py()
    document = run.documents[int(run.document[rows[0]])].as_py()
    places = " and ".join(_place(run, source, row) for row in rows)
    scores = "" if run.score is None else f" with scores {run.score[rows[0]]:g} and {run.score[rows[1]]:g}"
    raise InputError(
        f"query_id {query_id!r} has doc_id {document!r} twice{scores}: {places} ({len(twice)} such rows); expected "
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
    ids: tuple[_Run, pa.ChunkedArray, pa.Array],
    sources: tuple[Source, Source],
) -> None:
    run, queries, documents = ids
    for name, ours, known, source in (
        ("query_id", run.queries, queries, sources[0]),
        ("doc_id", run.documents, documents, sources[1]),
    ):
        kind = "queries" if name == "query_id" else "documents"
        if len(missing[kind]) and not pc.any(pc.is_in(ours, value_set=known)).as_py():
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
