"""What no file of a run, of its queries or of its corpus shows alone: ids that stand twice, that nobody has, or that
differ by space only. All raise InputError."""

import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batch_rerank.errors import InputError
from batch_rerank.input.candidates import Run
from batch_rerank.input.sources import Source


def files_of(source: Source) -> str:
    """A source by its first file."""
    urls = [url for url, _ in source.files]
    return urls[0] if len(urls) == 1 else f"{urls[0]} and {len(urls) - 1} more"


def refuse_repeated_ids(ids: pa.ChunkedArray, source: Source) -> None:
    """An id that stands twice among queries or documents."""
    name = "query_id" if source.kind == "queries" else "doc_id"
    if pc.count_distinct(ids).as_py() == len(ids):
        return
    counted = pc.value_counts(ids)
    repeated = counted.field("values").filter(pc.greater(counted.field("counts"), 1))
    rows = np.flatnonzero(pc.equal(ids, repeated[0]).to_numpy())[:2].tolist()
    raise InputError(
        f"input.{source.kind}: {files_of(source)}: {name} {repeated[0].as_py()!r} stands in rows {rows[0] + 1} and "
        f"{rows[1] + 1} ({len(repeated)} such ids; a number and its digits are one id); expected each once; drop one"
    )


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
                raise InputError(
                    f"input.{source.kind}: {files_of(source)}: {name} {at!r} differs from {twin[0].as_py()!r} in "
                    f"input.{other.kind} only by space around it; expected one way to write an id; trim it"
                )


def refuse_repeated(run: Run, source: Source) -> None:
    """A document twice under one query."""
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


def refuse_unranked(run: Run, source: Source) -> None:
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


def _place(run: Run, source: Source, row: int) -> str:
    """A row's file and its place there: a line from 1, a Parquet row from 0 as elsewhere."""
    piece = int(np.searchsorted(run.starts, row, side="right")) - 1
    url = run.pieces[piece].url
    first = next(index for index, one in enumerate(run.pieces) if one.url == url)
    within = row - int(run.starts[first])
    return f"{url} line {within + 1}" if source.format == "trec" else f"{url} row {within}"


def refuse_missing(
    lost: int,
    total: int,
    missing: dict[str, list[str]],
    max_missing: float,
    ids: tuple[Run, pa.ChunkedArray, pa.ChunkedArray],
    sources: tuple[Source, Source],
) -> None:
    """More candidates without their query or document than allowed, or all."""
    run, queries, documents = ids
    for name, ours, known, source in (
        ("query_id", run.queries, queries, sources[0]),
        ("doc_id", run.documents, documents, sources[1]),
    ):
        kind = "queries" if name == "query_id" else "documents"
        if len(missing[kind]) == len(ours):
            raise InputError(
                f"no {name} of the run is in input.{source.kind} ({files_of(source)}): the run "
                f"has {_some(ours)}, {source.kind} has {_some(known)}; expected the same ids; do they belong together?"
            )
    if lost > max_missing * total or lost == total:
        parts = [
            f"{len(missing[kind]):,} {kind} that {files_of(source)} lacks, e.g. {_some(missing[kind])}"
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
