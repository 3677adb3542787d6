"""The input layouts: nested (a row per query) and flat (a row per candidate) become the same canonical rows.

Canonical rows of a unit: `query_index int32` (which query of the unit), `query_id`, `query`, `instruction`, `doc_id`,
`text` (a dictionary in a staged shard), `first_stage_score float32`, `first_stage_rank int32`, then the passed-through
columns, each as `+` and its name.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batch_rerank.errors import InputError
from batch_rerank.schema import ALIASES, PASSED

Int64 = npt.NDArray[np.int64]
ONCE = pa.dictionary(pa.int32(), pa.large_string())
"""The type of a staged shard's texts."""

OPTIONAL = ("instruction", "title", "score", "rank")
OF_QUERY = ("query_id", "query", "instruction")
TEXTS = ("query", "instruction", "text", "title")


@dataclass(frozen=True)
class Columns:
    """Where each of our columns is in a shard: name in the file, by our name. Absent optional ones are left out.

    For `nested`, `names` of a candidate's fields are fields of the struct. `passthrough`: name to True where it is a
    candidate's, False where it is a query's (always True in `flat`).
    """

    layout: str
    names: dict[str, str]
    passthrough: dict[str, bool]

    def without(self, names: Sequence[str]) -> "Columns":
        """The same without some of our columns."""
        return replace(self, names={name: place for name, place in self.names.items() if name not in names})

    def leaves(self, paths: Sequence[str], wanted: Sequence[str], passed: bool = False) -> list[str]:
        """Those Parquet leaf paths that hold the wanted columns (our names), and with `passed` those passed through."""
        places = [(self.names[name], name not in OF_QUERY) for name in wanted]
        places += self.passthrough.items() if passed else ()
        fields = {name for name, of_candidate in places if of_candidate and self.layout == "nested"}
        top = {name for name, of_candidate in places if not of_candidate or self.layout == "flat"}
        candidates = self.names.get("candidates")

        def holds(path: str) -> bool:
            # a nested leaf is candidates.list.element.doc_id (or .item., .array.); a name may have dots itself
            parts = path.removeprefix(f"{candidates}.").split(".", 2)
            of_candidates = path.startswith(f"{candidates}.") and len(parts) == 3 and _within(parts[2], fields)
            return _within(path, top) or of_candidates

        return [path for path in paths if holds(path)]


def _within(path: str, names: set[str]) -> bool:
    """Whether a leaf is one of these columns or inside it."""
    return any(path == name or path.startswith(f"{name}.") for name in names)


def find_columns(
    schema: pa.Schema, layout: str, renamed: dict[str, str], passthrough: Sequence[str], where: str
) -> Columns:
    """Match a shard's schema with the layout. Raises InputError that lists every missing or wrongly typed column."""
    problems: list[str] = []
    top = {field.name: field.type for field in schema}
    names: dict[str, str] = {}
    fields: dict[str, pa.DataType] = top
    if layout == "nested":
        fields = _candidate_fields(top, renamed.get("candidates", "candidates"), names, problems)
    for name in (*OF_QUERY, "doc_id", "text", "title", "score", "rank"):
        place = top if name in OF_QUERY else fields
        wanted = renamed.get(name, name)
        if wanted not in place:
            if name not in OPTIONAL or name in renamed:
                problems.append(_missing(name, wanted, place, "" if place is top else "candidates."))
            continue
        problem = wrong_type(name, place[wanted])
        if problem:
            problems.append(f"column {wanted!r} is {place[wanted]}, expected {problem}")
        names[name] = wanted
    carried: dict[str, bool] = {}
    for name in passthrough:
        if name in fields:
            carried[name] = True
        elif name in top:
            carried[name] = False
        else:
            problems.append(f"output.passthrough names {name!r}, which is not there; found {sorted({*top, *fields})}")
    if layout == "nested" and carried.get(names.get("candidates", "")) is False:
        problems.append(f"output.passthrough names {names['candidates']!r}, the list of candidates; name its fields")
    for name in sorted({*names.values(), *carried} & _repeated(schema, names.get("candidates"))):
        problems.append(f"column {name!r} is there more than once, expected each name once; rename or drop one")
    if problems:
        raise InputError(f"{where}: does not fit input.layout {layout!r}: " + "; ".join(problems))
    return Columns(layout, names, carried)


def _repeated(schema: pa.Schema, candidates: str | None) -> set[str]:
    """Names that two columns, or two fields of a candidate, have."""
    every = [list(schema)]
    if candidates is not None:
        every += [list(field.type.value_type) for field in schema if field.name == candidates]
    names = [[field.name for field in fields] for fields in every]
    return {name for found in names for name in found if found.count(name) > 1}


def _candidate_fields(
    top: dict[str, pa.DataType], wanted: str, names: dict[str, str], problems: list[str]
) -> dict[str, pa.DataType]:
    if wanted not in top:
        problems.append(_missing("candidates", wanted, top, ""))
        return {}
    kind = top[wanted]
    if not _is_list(kind) or not pa.types.is_struct(kind.value_type):
        problems.append(f"column {wanted!r} is {kind}, expected a list of structs (doc_id, text, …)")
        return {}
    names["candidates"] = wanted
    return {field.name: field.type for field in kind.value_type}


def _missing(name: str, wanted: str, place: dict[str, pa.DataType], prefix: str) -> str:
    similar = [alias for alias in ALIASES.get(name, ()) if alias in place]
    hint = f"; set input.columns: {{{name}: {similar[0]}}}" if similar else "; name it in input.columns"
    return f"column '{prefix}{wanted}' is missing (found {sorted(place)}){hint if place else ''}"


def wrong_type(name: str, kind: pa.DataType) -> str | None:
    """What was expected of a column of ours, where the type is wrong."""
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    is_text = pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value)
    if name in TEXTS:
        return None if is_text else "a string"
    if name in ("query_id", "doc_id"):
        return None if is_text or pa.types.is_integer(value) else "a string or an integer"
    if name == "rank":
        return None if pa.types.is_integer(value) else "an integer"
    return None if pa.types.is_floating(value) or pa.types.is_integer(value) else "a number"


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


@dataclass(frozen=True)
class Queries:
    """The queries of a shard in input order: ids string[n]; rows int64[n + 1], where each begins; pairs int64[n]."""

    ids: pa.Array
    rows: Int64
    pairs: Int64


@dataclass(frozen=True)
class Scattered:
    """A query that stands in two places, each a shard and a row."""

    query_id: str
    first: tuple[str, int]
    second: tuple[str, int]


def queries_of(table: pa.Table, columns: Columns, where: str, for_trec: bool = False) -> Queries:
    """The queries of a shard's id columns. Raises InputError for a null id or a document twice under one query, and
    `for_trec` for an id that a TREC run cannot hold."""
    if columns.layout == "nested":
        ids = _as_string(table[columns.names["query_id"]])
        lists = table[columns.names["candidates"]].combine_chunks()
        pairs = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False).astype(np.int64)
        documents = _field(pc.list_flatten(lists), columns.names["doc_id"])
        group = np.repeat(np.arange(len(ids)), pairs)
        rows = np.arange(len(ids) + 1)
        row_of_pair = group
    else:
        every = _as_string(table[columns.names["query_id"]])
        _refuse_null(every, "query_id", where, np.arange(len(every)))
        starts = run_starts(every)
        rows = np.append(starts, len(every))
        ids, pairs = every.take(pa.array(starts)), np.diff(rows)
        documents = table[columns.names["doc_id"]].combine_chunks()
        group, row_of_pair = np.repeat(np.arange(len(starts)), pairs), np.arange(len(every))
    _refuse_null(ids, "query_id", where, rows)
    documents = _as_string(documents)
    _refuse_null(documents, "doc_id", where, row_of_pair)
    _refuse_repeated(ids, group, documents, row_of_pair, where)
    if for_trec:
        _refuse_spaced(ids, "query_id", where)
        _refuse_spaced(documents, "doc_id", where)
    return Queries(ids, rows.astype(np.int64), pairs.astype(np.int64))


def run_starts(ids: pa.Array) -> Int64:
    """int64[n_runs]: where a run of equal adjacent ids begins."""
    if len(ids) == 0:
        return np.empty(0, np.int64)
    changes = pc.not_equal(ids[1:], ids[:-1]).to_numpy(zero_copy_only=False)
    return np.flatnonzero(np.concatenate([[True], changes.astype(bool)]))


def _refuse_null(ids: pa.Array, name: str, where: str, rows: Int64) -> None:
    if ids.null_count:
        row = int(rows[np.flatnonzero(pc.is_null(ids).to_numpy(zero_copy_only=False))[0]])
        raise InputError(
            f"{where}: row {row}: {name} is null ({ids.null_count} such); expected an id in every row; fill or drop it"
        )


def _refuse_spaced(ids: pa.Array, name: str, where: str) -> None:
    spaced = ids.filter(pc.match_substring_regex(ids, r"^$|\s"))
    if len(spaced):
        raise InputError(
            f"{where}: {name} {spaced[0].as_py()!r} is empty or has space in it ({len(spaced)} such), which no TREC "
            "run can hold; leave output.trec_run out, or use other ids"
        )


def _refuse_repeated(ids: pa.Array, group: Int64, documents: pa.Array, rows: Int64, where: str) -> None:
    keys = pa.table({"group": group, "doc_id": documents})
    counted = keys.group_by(["group", "doc_id"]).aggregate([([], "count_all")])
    if len(counted) == len(keys):
        return
    repeated = counted.filter(pc.greater(counted["count_all"], 1)).slice(0, 1).to_pylist()[0]
    same = (group == repeated["group"]) & pc.equal(documents, repeated["doc_id"]).to_numpy(zero_copy_only=False)
    at = rows[np.flatnonzero(same)][:2].tolist()
    raise InputError(
        f"{where}: query_id {ids[repeated['group']].as_py()!r} has doc_id {repeated['doc_id']!r} "
        f"{repeated['count_all']} times (rows {at[0]} and {at[1]}); expected each document once per query; drop one"
    )


def find_scattered(shards: Sequence[tuple[str, Queries]]) -> list[Scattered]:
    """Queries that stand in two places, in the order of their second place. What to do about them is the caller's."""
    if not shards:
        return []
    places = pa.table(
        {
            "query_id": pa.concat_arrays([queries.ids for _, queries in shards]),
            "shard": np.repeat(np.arange(len(shards)), [len(queries.ids) for _, queries in shards]),
            "row": np.concatenate([queries.rows[:-1] for _, queries in shards]),
        }
    )
    counted = places.group_by("query_id").aggregate([([], "count_all")])
    repeated = counted.filter(pc.greater(counted["count_all"], 1))["query_id"]
    found: dict[str, tuple[str, int]] = {}
    scattered = []
    for place in places.filter(pc.is_in(places["query_id"], repeated.combine_chunks())).to_pylist():
        here = (shards[place["shard"]][0], place["row"])
        first = found.setdefault(place["query_id"], here)
        if first != here:
            scattered.append(Scattered(place["query_id"], first, here))
    return scattered


def canonical(table: pa.Table, columns: Columns, where: str) -> pa.Table:
    """A unit's rows in canonical form. Raises InputError where one query_id has two queries or instructions."""
    nested = columns.layout == "nested"
    if nested:
        lists = table[columns.names["candidates"]].combine_chunks()
        index = pc.list_parent_indices(lists).to_numpy(zero_copy_only=False).astype(np.int64)
        flat = pc.list_flatten(lists)
        ids = _as_string(table[columns.names["query_id"]]).take(pa.array(index))
    else:
        ids = _as_string(table[columns.names["query_id"]])
        index = np.repeat(np.arange(len(run_starts(ids))), np.diff(np.append(run_starts(ids), len(ids))))

    def column(name: str, of_query: bool) -> pa.Array | None:
        if not nested:
            return table[name].combine_chunks()
        return table[name].combine_chunks().take(pa.array(index)) if of_query else _field(flat, name)

    def named(name: str) -> pa.Array | None:
        return column(columns.names[name], name in OF_QUERY) if name in columns.names else None

    size = len(index)
    score, rank = named("score"), named("rank")
    position = _positions(index)
    data: dict[str, Any] = {
        "query_index": pa.array(index, pa.int32()),
        "query_id": ids,
        "query": _as_string(named("query"), size),
        "instruction": _as_string(named("instruction"), size),
        "doc_id": _as_string(named("doc_id")),
        "text": _text(named("text"), named("title"), size),
        "first_stage_score": pa.nulls(size, pa.float32())
        if score is None
        else pc.cast(score, pa.float32(), safe=False),
        "first_stage_rank": position if rank is None else pc.coalesce(pc.cast(rank, pa.int32()), position),
    }
    for name, of_candidate in columns.passthrough.items():
        data[f"{PASSED}{name}"] = column(name, not of_candidate)
    rows = pa.table(data)
    for name in () if nested else ("query", "instruction"):
        _refuse_two(rows, name, where)
    return rows


def _positions(index: Int64) -> pa.Array:
    """First-stage ranks from the order of the input: 1, 2, … within each query."""
    if len(index) == 0:
        return pa.array([], pa.int32())
    starts = np.flatnonzero(np.diff(index, prepend=index[0] - 1))
    lengths = np.diff(np.append(starts, len(index)))
    return pa.array(np.arange(len(index)) - np.repeat(starts, lengths) + 1, pa.int32())


def _refuse_two(rows: pa.Table, name: str, where: str) -> None:
    codes = rows[name].combine_chunks().dictionary_encode()
    numbers = pc.fill_null(codes.indices, -1).to_numpy(zero_copy_only=False)
    index = rows["query_index"].to_numpy()
    if not len(index):
        return
    starts = np.flatnonzero(np.diff(index, prepend=-1))
    highest = np.maximum.reduceat(numbers, starts)
    lowest = np.minimum.reduceat(np.where(numbers < 0, highest[index], numbers), starts)
    for group in np.flatnonzero(highest != lowest):
        query_id = rows["query_id"][int(starts[group])].as_py()
        both = sorted(codes.dictionary[int(code)].as_py() for code in (lowest[group], highest[group]))
        raise InputError(
            f"{where}: query_id {query_id!r} has two values of {name}: {both[0][:80]!r} and {both[1][:80]!r}; "
            "expected one; give them different ids"
        )


def _text(text: pa.Array | None, title: pa.Array | None, size: int) -> pa.Array:
    """Texts; in a staged shard each stands once, and stays so."""
    if text is not None and title is None and text.type == ONCE:
        return text
    return with_title(title, _as_string(text, size, pa.large_string()))


def with_title(title: pa.Array | None, text: pa.Array) -> pa.Array:
    """BEIR's text of a document: (title + " " + text).strip(); a null text stays null."""
    if title is None:
        return text
    titles = pc.fill_null(_as_string(title, kind=pa.large_string()), "")
    return pc.utf8_trim_whitespace(pc.binary_join_element_wise(titles, text, pa.scalar(" ", pa.large_string())))


def _field(structs: pa.StructArray, name: str) -> pa.Array:
    """A field of structs, null where the struct is. By number: Arrow takes a dot in a name for a path."""
    return pc.struct_field(structs, [[field.name for field in structs.type].index(name)])


def _as_string(values: pa.Array | pa.ChunkedArray | None, size: int = 0, kind: pa.DataType | None = None) -> pa.Array:
    kind = kind or pa.string()
    if values is None:
        return pa.nulls(size, kind)
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    return values if values.type == kind else pc.cast(values, kind)
