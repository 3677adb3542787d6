"""The input layouts: which columns of a shard are ours, nested (a row per query) or flat (a row per candidate), and
which queries and candidates its id columns hold."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batch_rerank.errors import InputError
from batch_rerank.schema import ALIASES

Int64 = npt.NDArray[np.int64]
OPTIONAL = ("instruction", "title", "score", "rank")
OF_QUERY = ("query_id", "query", "instruction")
TEXTS = ("query", "instruction", "text", "title")

NO_TREC_ID = r"^$|[\s\x0b\x1c-\x1f\x{85}\pZ]"
"""An id that no TREC file can hold. Readers cut lines with str.split, to which more is space than to RE2's \\s."""


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
        raise InputError(f"{where}: does not fit input.layout {layout!r}: " + "; ".join(problems) + _other(layout, top))
    return Columns(layout, names, carried)


def _other(layout: str, top: dict[str, pa.DataType]) -> str:
    """The layout that columns look like, where it is another."""
    lists = [name for name, kind in top.items() if _is_list(kind) and pa.types.is_struct(kind.value_type)]
    if layout == "flat" and lists:
        named = "" if "candidates" in lists else f" with input.columns: {{candidates: {lists[0]}}}"
        return f"; {lists[0]!r} is a list of structs, so this looks like input.layout: nested{named}"
    if layout == "nested" and not lists and {"query_id", "doc_id"} <= set(top):
        return "; a row looks like a candidate, so this looks like input.layout: flat"
    return ""


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
    """The queries of a shard in input order: ids large_string[n]; rows int64[n + 1], where each
    begins; pairs int64[n]."""

    ids: pa.Array
    rows: Int64
    pairs: Int64


@dataclass(frozen=True)
class Scattered:
    """A query that stands in two places, each a shard and a row."""

    query_id: str
    first: tuple[str, int]
    second: tuple[str, int]


def queries_of(tables: Iterable[pa.Table], columns: Columns, where: str, for_trec: bool = False) -> Queries:
    """The queries of a shard's id columns, which come some rows at a time. Raises InputError for a null id or a
    document twice under one query, and `for_trec` for an id that a TREC run cannot hold."""
    found, row = [Queries(pa.array([], pa.large_string()), np.zeros(1, np.int64), np.empty(0, np.int64))], 0
    for table in _whole_queries(tables, columns):
        found.append(_queries_of(table, columns, where, for_trec, row))
        row += len(table)
    starts = [queries.rows[:-1] for queries in found]
    return Queries(
        ids=pa.chunked_array([queries.ids for queries in found]).combine_chunks(),
        rows=np.concatenate([*starts, [row]]),
        pairs=np.concatenate([queries.pairs for queries in found]),
    )


def _whole_queries(tables: Iterable[pa.Table], columns: Columns) -> Iterator[pa.Table]:
    """The same rows, cut where a query ends."""
    if columns.layout == "nested":
        yield from tables
        return
    kept: list[pa.Table] = []  # rows of one query, whose end has not been seen
    last = None
    for table in tables:
        ids = _ids(table[columns.names["query_id"]])
        if not len(ids):
            continue
        start = int(run_starts(ids)[-1])
        if start or ids[0] != last:
            if kept or start:
                yield pa.concat_tables([*kept, table.slice(0, start)])
            kept, last = [table.slice(start)], ids[start]
        else:
            kept.append(table)
    if kept:
        yield pa.concat_tables(kept)


def _queries_of(table: pa.Table, columns: Columns, where: str, for_trec: bool, first: int) -> Queries:
    """Of whole queries, the first of whose rows is row `first` of the shard."""
    ids = _ids(table[columns.names["query_id"]])
    if columns.layout == "nested":
        lists = table[columns.names["candidates"]]
        pairs = pc.fill_null(pc.list_value_length(lists), 0).to_numpy().astype(np.int64)
        documents = _ids(field_of(pc.list_flatten(lists), columns.names["doc_id"]))
        group = np.repeat(np.arange(len(ids)), pairs)
        rows = first + np.arange(len(ids) + 1)
        row_of_pair = first + group
    else:
        row_of_pair = first + np.arange(len(ids))
        _refuse_null(ids, "query_id", where, row_of_pair)
        starts = run_starts(ids)
        rows = first + np.append(starts, len(ids))
        ids, pairs = ids.take(pa.array(starts)), np.diff(rows)
        documents = _ids(table[columns.names["doc_id"]])
        group = np.repeat(np.arange(len(starts)), pairs)
    _refuse_null(ids, "query_id", where, rows)
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
        gone = rows[np.flatnonzero(pc.is_null(ids).to_numpy(zero_copy_only=False))]
        raise InputError(
            f"{where}: row {gone[0]}: {name} is null ({ids.null_count} such up to row {gone[-1]}); "
            "expected an id in every row; fill or drop it"
        )


def _refuse_spaced(ids: pa.Array, name: str, where: str) -> None:
    spaced = ids.filter(pc.match_substring_regex(ids, NO_TREC_ID))
    if len(spaced):
        raise InputError(
            f"{where}: {name} {spaced[0].as_py()!r} is empty or has space in it ({len(spaced)} such), which no TREC "
            "run can hold; leave output.trec_run out, or use other ids"
        )


def _refuse_repeated(ids: pa.Array, group: Int64, documents: pa.Array, rows: Int64, where: str) -> None:
    # numbers, not the ids: Arrow's group_by ends the process (std::length_error) at 2 GiB of keys
    numbers = pc.dictionary_encode(documents)
    keys = group * max(1, len(numbers.dictionary)) + numbers.indices.to_numpy()
    in_order = np.sort(keys)
    repeated = in_order[1:][in_order[1:] == in_order[:-1]]
    if not len(repeated):
        return
    same = np.flatnonzero(keys == repeated[0])
    at = rows[same][:2].tolist()
    raise InputError(
        f"{where}: query_id {ids[int(group[same[0]])].as_py()!r} has doc_id {documents[int(same[0])].as_py()!r} "
        f"{len(same)} times (rows {at[0]} and {at[1]}); expected each document once per query; drop one"
    )


def find_scattered(shards: Sequence[tuple[str, Queries]]) -> list[Scattered]:
    """Queries that stand in two places, in the order of their second place. What to do about them is the caller's."""
    if not shards:
        return []
    ids = pa.chunked_array([queries.ids for _, queries in shards]).combine_chunks()
    numbers = pc.dictionary_encode(ids).indices.to_numpy()
    twice = np.flatnonzero(np.bincount(numbers)[numbers] > 1) if len(ids) else numbers
    places = pa.table(
        {
            "query_id": ids.take(pa.array(twice)),
            "shard": np.repeat(np.arange(len(shards)), [len(queries.ids) for _, queries in shards])[twice],
            "row": np.concatenate([queries.rows[:-1] for _, queries in shards])[twice],
        }
    )
    found: dict[str, tuple[str, int]] = {}
    scattered = []
    for place in places.to_pylist():
        here = (shards[place["shard"]][0], place["row"])
        first = found.setdefault(place["query_id"], here)
        if first != here:
            scattered.append(Scattered(place["query_id"], first, here))
    return scattered


def field_of(structs: pa.StructArray | pa.ChunkedArray, name: str) -> pa.Array | pa.ChunkedArray:
    """A field of structs, null where the struct is. By number: Arrow takes a dot in a name for a path."""
    return pc.struct_field(structs, [[field.name for field in structs.type].index(name)])


def _ids(values: pa.ChunkedArray) -> pa.Array:
    """Ids as one large_string array: those of a shard may have more than 2 GiB."""
    return pc.cast(values, pa.large_string()).combine_chunks()
