"""What no file of a run, of its queries or of its corpus shows alone: ids that stand twice, that nobody has, or that
differ by space only. All raise InputError."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batch_rerank.errors import InputError
from batch_rerank.input.candidates import Run
from batch_rerank.input.known import Known, Repeated, know, padded_of
from batch_rerank.input.sources import Source, pieces, read_piece
from batch_rerank.input.spill import Records
from batch_rerank.store.filesystem import Options

Prints = npt.NDArray[np.uint64]
Flags = npt.NDArray[np.bool_]


def files_of(source: Source) -> str:
    """A source by its first file."""
    urls = [url for url, _ in source.files]
    return urls[0] if len(urls) == 1 else f"{urls[0]} and {len(urls) - 1} more"


def refuse_repeated_ids(ids: pa.ChunkedArray, source: Source, options: Options) -> None:
    """An id that stands twice among queries or documents."""
    name = "query_id" if source.kind == "queries" else "doc_id"
    if pc.count_distinct(ids).as_py() == len(ids):
        return
    counted = pc.value_counts(ids)
    repeated = counted.field("values").filter(pc.greater(counted.field("counts"), 1))
    rows = np.flatnonzero(pc.equal(ids, repeated[0]).to_numpy())[:2].tolist()
    raise _repeated(source, name, repeated[0].as_py(), rows, len(repeated), options)


def refuse_repeated_rows(repeated: Repeated, source: Source, options: Options) -> NoReturn:
    """The same of a corpus, whose ids are not held."""
    doc_id = id_at(source, "doc_id", repeated.rows[0], options)
    raise _repeated(source, "doc_id", doc_id, repeated.rows, repeated.count, options)


def _repeated(source: Source, name: str, found: str, rows: Sequence[int], count: int, options: Options) -> InputError:
    places = " and ".join(_place_of(source, name, row, options) for row in rows[:2])
    return InputError(
        f"input.{source.kind}: {name} {found!r} stands in {places} ({count} such ids; a number and its digits are one "
        "id); expected each once; drop one"
    )


def _place_of(source: Source, name: str, row: int, options: Options) -> str:
    """The place of a row of a source, whose rows are counted again up to it."""
    url, first, passed = "", 0, 0
    for piece in pieces(source):
        if piece.url != url:
            url, first = piece.url, passed
        passed += sum(len(table) for table in read_piece(source, piece, (name,), options))
        if row < passed:
            break
    return _told(source, url, row - first)


def id_at(source: Source, name: str, row: int, options: Options) -> str:
    """The id of a row of a source, which is read again up to it: errors alone ask."""
    for piece in pieces(source):
        for table in read_piece(source, piece, (name,), options):
            if row < len(table):
                found: str = table[name][row].as_py()
                return found
            row -= len(table)
    raise InputError(f"{files_of(source)}: changed while it was read; run again")


def refuse_spaces(name: str, run: pa.Array, known: pa.ChunkedArray, first: Source, second: Source) -> None:
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
                raise _padded(source, name, at, twin[0].as_py(), other)


def _padded(source: Source, name: str, found: str, twin: str, other: Source) -> InputError:
    return InputError(
        f"input.{source.kind}: {files_of(source)}: {name} {found!r} differs from {twin!r} in input.{other.kind} only "
        "by space around it; expected one way to write an id; trim it"
    )


def refuse_padded_documents(run: Run, known: Known, first: Source, second: Source, options: Options) -> None:
    """The same of documents, which are known by their fingerprints."""
    at, without = padded_of(run.lost)
    lost = know([run.lost], known.prints)
    assert isinstance(lost, Known)  # they are distinct
    padded = known.padded
    asked = run.used[padded.rows]  # the rows of padded ids that are candidates

    def in_corpus(prints: Prints) -> Flags:
        return known.rows_of(prints) >= 0

    def in_run(prints: Prints) -> Flags:
        rows = known.rows_of(prints)
        return np.where(rows >= 0, run.used[np.maximum(rows, 0)] if len(known) else False, lost.rows_of(prints) >= 0)

    def of_lost(index: int) -> str:
        found: str = run.lost[int(at[index])].as_py()
        return found

    def of_corpus(index: int) -> str:
        return id_at(second, "doc_id", int(padded.rows[index]), options)

    every = np.ones(len(padded.rows), np.bool_)
    odd: list[tuple[Source, Prints, Flags, Callable[[int], str]]] = [
        (first, known.prints.of(without), np.ones(len(at), np.bool_), of_lost),
        (first, padded.trimmed, asked, of_corpus),
        (second, padded.trimmed, every, of_corpus),
    ]
    for source, trimmed, here, of in odd:
        for twin_in, other in ((in_run, first), (in_corpus, second)):
            twins = np.flatnonzero(here & twin_in(trimmed))
            if len(twins):
                one = of(int(twins[0]))
                twin = pc.utf8_trim_whitespace(pa.scalar(one)).as_py()
                raise _padded(source, "doc_id", one, twin, other)


@dataclass
class Twice:
    """Candidates that stand twice under one query: how many rows too many; the query and the document (`Run.documents`)
    of the first."""

    count: int = 0
    query: int = 0
    document: int = 0

    def look(self, run: Run, records: Records) -> None:
        """At the candidates of some whole queries."""
        document = run.documents(records)
        query = records["query"]
        if "high" in run.names:
            keys = document ^ (query.astype(np.int64) * np.int64(0x1E3779B97F4A7C15))
            order = np.argsort(keys, kind="stable")
            keys = keys[order]
            same = np.flatnonzero(keys[1:] == keys[:-1])
            first, second = order[same], order[same + 1]
            real = (query[first] == query[second]) & (records["low"][first] == records["low"][second])
            first = first[real]
        else:
            keys = (query.astype(np.int64) << 32) + (document + 2**31)
            if not (np.diff(np.sort(keys)) == 0).any():
                return
            order = np.argsort(keys, kind="stable")
            first = order[np.flatnonzero(np.diff(keys[order]) == 0)]
        if not self.count and len(first):
            one = first[np.lexsort((first, query[first]))[0]]
            self.query, self.document = int(query[one]), int(document[one])
        self.count += len(first)


def refuse_repeated(run: Run, twice: Twice, source: Source, options: Options) -> None:
    """A document twice under one query."""
    rows: list[int] = []
    scores: list[float] = []
    done = 0
    for records in run.column.chunks():
        here = np.flatnonzero((records["query"] == twice.query) & (run.documents(records) == twice.document))
        rows += (here + done).tolist()
        scores += records["score"][here].tolist() if "score" in run.names else []
        done += len(records)
        if len(rows) > 1:
            break
    query_id = run.queries[twice.query].as_py()
    doc_id = id_at(source, "doc_id", rows[0], options)
    places = " and ".join(_place(run, source, row) for row in rows[:2])
    told = f" with scores {scores[0]:g} and {scores[1]:g}" if scores else ""
    raise InputError(
        f"query_id {query_id!r} has doc_id {doc_id!r} twice{told}: {places} ({twice.count} such rows); expected "
        "each document once per query; drop one"
    )


def refuse_unranked(run: Run, source: Source, options: Options) -> None:
    """A Parquet run's score may be null or NaN where ranks say the order; alone it has to say it."""
    row, count = run.unscored
    if "rank" in run.names or not count:
        return
    query_id, doc_id = (id_at(source, name, row, options) for name in ("query_id", "doc_id"))
    raise InputError(
        f"query_id {query_id!r} has doc_id {doc_id!r} ({_place(run, source, row)}; {count} such rows) "
        "without a score, and the run has no rank; expected one of them in every row; fill or drop it"
    )


def _place(run: Run, source: Source, row: int) -> str:
    """The place of a row of a run."""
    piece = int(np.searchsorted(run.starts, row, side="right")) - 1
    url = run.pieces[piece].url
    first = next(index for index, one in enumerate(run.pieces) if one.url == url)
    within = row - int(run.starts[first])
    return _told(source, url, within)


def _told(source: Source, url: str, within: int) -> str:
    """A file and a row's place in it: a line from 1, a Parquet row from 0 as elsewhere."""
    return f"{url} row {within}" if source.format == "parquet" else f"{url} line {within + 1}"


def refuse_missing(
    lost: int,
    total: int,
    missing: Mapping[str, pa.Array],
    max_missing: float,
    run: Mapping[str, pa.Array | None],
    known: Mapping[str, pa.Array | pa.ChunkedArray],
    sources: tuple[Source, Source],
) -> None:
    """More candidates without their query or document than allowed, or all. run: all ids of it, of documents only where
    the corpus has none of them; known: ids of the sources, the first few at least."""
    for kind, source in zip(("queries", "documents"), sources, strict=True):
        ours = run[kind]
        if ours is not None and len(missing[kind]) == len(ours):
            raise InputError(
                f"no {'query_id' if kind == 'queries' else 'doc_id'} of the run is in input.{source.kind} "
                f"({files_of(source)}): the run has {_some(ours)}, {source.kind} has {_some(known[kind])}; expected "
                "the same ids; do they belong together?"
            )
    if lost > max_missing * total or lost == total:
        parts = [
            f"{len(missing[kind]):,} {kind} that {files_of(source)} lacks, e.g. {_some(missing[kind])}"
            for kind, source in zip(("queries", "documents"), sources, strict=True)
            if len(missing[kind])
        ]
        allowed = f"expected at most input.max_missing = {max_missing:g} of them; mend the run, or raise it to go on"
        raise InputError(
            f"{lost:,} of {total:,} candidates name {' and '.join(parts)}; "
            + ("nothing is left; do they belong together?" if lost == total else f"{allowed} without them")
        )


def _some(ids: pa.Array | pa.ChunkedArray) -> str:
    if not len(ids):
        return "none"
    first = ids.slice(0, 3).to_pylist()
    return ", ".join(json.dumps(one, ensure_ascii=False)[:60] for one in first) + (", …" if len(ids) > 3 else "")
