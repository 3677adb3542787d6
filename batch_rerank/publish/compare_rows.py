"""What is wrong with ranked rows: against the candidates that they came from, and in themselves."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batch_rerank.input.layouts import run_starts
from batch_rerank.store.plans import Unit

COMPARED = ["query_id", "doc_id", "first_stage_rank"]


def rows_of_units(units: Iterator[tuple[Unit, pa.Table]], rows: pa.Table) -> Iterator[tuple[Unit, pa.Table, pa.Table]]:
    """Each unit with its candidates and its share of a part's rows: those of its queries, where they follow each other.
    Rows that are left over come with the last one."""
    ids = rows["query_id"].combine_chunks()
    starts = run_starts(ids)
    queries = ids.take(pa.array(starts)).to_pylist()
    borders = [*starts.tolist(), len(rows)]
    at, pending = 0, next(units, None)
    while pending is not None:
        unit, candidates = pending
        pending = next(units, None)
        first, known = at, set(candidates["query_id"].unique().to_pylist())
        while at < len(queries) and (queries[at] in known or pending is None):
            at += 1
        yield unit, candidates, rows.slice(borders[first], borders[at] - borders[first])


def compare(candidates: pa.Table | None, part: pa.Table, top_k: int | None) -> list[str]:
    """Differences between input candidates of whole queries, where they are known, and their output rows; none if those
    are right."""
    problems = _repeated(part) + ([] if candidates is None else _compare_ids(candidates, part, top_k))
    starts = run_starts(part["query_id"].combine_chunks())
    lengths = np.diff(np.append(starts, len(part)))
    expected = np.arange(len(part)) - np.repeat(starts, lengths) + 1
    if not np.array_equal(part["rank"].to_numpy(), expected):
        problems.append("ranks are not 1, 2, … within each query")
    order = part.select(["score", "first_stage_rank", "doc_id"]).append_column(
        "query", pa.array(np.repeat(starts, lengths))
    )
    keys = [("query", "ascending"), ("score", "descending"), ("first_stage_rank", "ascending"), ("doc_id", "ascending")]
    if not np.array_equal(pc.sort_indices(order, sort_keys=keys).to_numpy(), np.arange(len(part))):
        problems.append("ranks do not follow the scores")
    if not pc.all(pc.equal(pc.is_null(part["score"]), pc.is_valid(part["error"]))).as_py() and len(part):
        problems.append("a row has a score and an error, or neither")
    return problems


def _repeated(part: pa.Table) -> list[str]:
    repeated = part.group_by(["query_id", "doc_id"]).aggregate([([], "count_all")])
    twice = repeated.filter(pc.greater(repeated["count_all"], 1))
    return [f"{len(twice)} candidates appear twice, e.g. {_example(twice)}"] if len(twice) else []


def _compare_ids(candidates: pa.Table, part: pa.Table, top_k: int | None) -> list[str]:
    problems = []
    keys = ["query_id", "doc_id"]
    foreign = part.select(COMPARED).join(candidates.select(COMPARED), COMPARED, join_type="left anti")
    if len(foreign):
        problems.append(f"{len(foreign)} rows are no input candidates, e.g. {_example(foreign)}")
    missing = candidates.select(keys).join(part.select(keys), keys, join_type="left anti")
    if top_k is None and len(missing):
        problems.append(f"{len(missing)} candidates are missing, e.g. {_example(missing)}")
    counts = candidates.group_by("query_id").aggregate([([], "count_all")])
    wanted = pc.min_element_wise(counts["count_all"], top_k if top_k is not None else 2**62)
    kept = part.group_by("query_id").aggregate([([], "count_all")]).rename_columns(["query_id", "kept"])
    both = counts.append_column("wanted", wanted).join(kept, "query_id", join_type="left outer")
    short = both.filter(pc.not_equal(pc.fill_null(both["kept"], 0), both["wanted"]))
    if top_k is not None and len(short):
        row = short.slice(0, 1).to_pylist()[0]
        found = f"{row['query_id']!r}: {row['kept']}, expected {row['wanted']}"
        problems.append(f"{len(short)} queries have another number of rows than top_k keeps, e.g. {found}")
    first = candidates["query_id"].combine_chunks()
    if not problems and first.take(pa.array(run_starts(first))) != _order_of(part):
        problems.append("queries are not in input order")
    return problems


def _order_of(part: pa.Table) -> pa.Array:
    ids = part["query_id"].combine_chunks()
    return ids.take(pa.array(run_starts(ids)))


def _example(rows: pa.Table) -> str:
    row = rows.slice(0, 1).to_pylist()[0]
    return f"({row['query_id']!r}, {row['doc_id']!r})"
