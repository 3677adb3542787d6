"""Rows of either layout to the same canonical rows, some at a time: what is held is a unit, not its row group.

Canonical rows of a unit: `query_index int32` (which query of the unit), `query_id`, `query`, `instruction`, `doc_id`,
`text`, `first_stage_score float32`, `first_stage_rank int32`, then the passed-through columns, each as `+` and its
name. Ids are strings; `query`, `instruction` and `text` are dictionaries that hold each text once.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batch_rerank.errors import InputError
from batch_rerank.input.carried import carried
from batch_rerank.input.layouts import OF_QUERY, TEXTS, Columns, Int64, field_of, run_starts
from batch_rerank.schema import PASSED

ONCE = pa.dictionary(pa.int32(), pa.large_string())
"""The type of texts. Large: the texts of a unit may have more than 2 GiB."""


def canonical(table: pa.Table, columns: Columns, where: str) -> pa.Table:
    """Whole queries in canonical form. Raises InputError where one query_id has two queries or instructions."""
    batches = table.to_batches() or [pa.RecordBatch.from_pylist([], table.schema)]
    firsts = accumulate((batch.num_rows for batch in batches), initial=0)
    return whole(
        [candidates(batch, columns, first) for batch, first in zip(batches, firsts, strict=False)], columns, where
    )


def candidates(batch: pa.RecordBatch, columns: Columns, first: int) -> pa.Table:
    """A row for each candidate of some rows of a unit, the `first` of which is its first-th: `row int64`, which of the
    unit's it came from (null in `flat`), our columns under our names, and the passed-through ones."""
    if columns.layout == "nested":
        lists = batch.column(columns.names["candidates"])
        lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
        # not list_parent_indices: a null list may span values, which count for nothing
        rows = pa.array(np.repeat(np.arange(len(lists)), lengths))
        structs = pc.list_flatten(lists)
    else:
        rows = structs = None
    size = batch.num_rows if rows is None else len(rows)

    def column(name: str, of_query: bool, text: bool = False) -> pa.Array:
        if rows is None:
            return carried(batch.column(name))
        if of_query and text:  # held once however many candidates there are
            return pa.DictionaryArray.from_arrays(pc.cast(rows, pa.int32()), _plain(batch.column(name)))
        return carried(batch.column(name)).take(rows) if of_query else carried(field_of(structs, name))

    def ours(name: str) -> pa.Array | None:
        return column(columns.names[name], name in OF_QUERY, name in TEXTS) if name in columns.names else None

    data: dict[str, Any] = {
        "row": pa.nulls(size, pa.int64()) if rows is None else pc.add(pc.cast(rows, pa.int64()), first),
        "query_id": pc.cast(ours("query_id"), pa.string()),
        "query": _once(ours("query"), size),
        "instruction": _once(ours("instruction"), size),
        "doc_id": pc.cast(ours("doc_id"), pa.string()),
        "text": _once(_titled(ours("title"), ours("text")), size),
        "score": _number(ours("score"), size, pa.float64()),
        "rank": _number(ours("rank"), size, pa.int32()),
    }
    for name, of_candidate in columns.passthrough.items():
        values = column(name, not of_candidate)
        data[f"{PASSED}{name}"] = _compact(values) if pa.types.is_dictionary(values.type) else values
    return pa.table(data)


def whole(pieces: Sequence[pa.Table], columns: Columns, where: str) -> pa.Table:
    """Pieces that make up whole queries, in order, in canonical form. Raises InputError as `canonical`."""
    rows = pa.concat_tables(pieces)
    ids = rows["query_id"].combine_chunks()
    if columns.layout == "nested":
        index = rows["row"].to_numpy()
    else:
        starts = run_starts(ids)
        index = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(ids))))
    position = _positions(index)
    data = {
        "query_index": pa.array(index, pa.int32()),
        "query_id": ids,
        **{name: rows[name] for name in ("query", "instruction", "doc_id", "text")},
        "first_stage_score": pc.cast(rows["score"], pa.float32(), safe=False),
        "first_stage_rank": _told_apart(pc.coalesce(rows["rank"], position), rows["score"], index),
        **{name: rows[name] for name in rows.column_names if name.startswith(PASSED)},
    }
    made = pa.table(data).unify_dictionaries()
    if columns.layout == "nested":
        return made
    for name in ("query", "instruction"):
        _refuse_two(made, name, where)
        given = made[name].combine_chunks()
        if 0 < given.null_count < len(given):  # it is of the query's id: the rows that lack it have it from the others
            of_each = first_of_each(given, np.flatnonzero(np.diff(index, prepend=-1)))
            made = made.set_column(made.column_names.index(name), name, of_each.take(pa.array(index)))
    return made


def first_of_each(values: pa.Array, starts: Int64) -> pa.Array:
    """Each query's first value that is not null: flat rows carry a query on every row."""
    present = np.flatnonzero(pc.is_valid(values).to_numpy(zero_copy_only=False))
    at = np.searchsorted(present, starts)
    ends = np.append(starts[1:], len(values))
    found = np.append(present, len(values))[at]
    return values.take(pa.array(np.where(found < ends, found, 0), mask=found >= ends))


def with_title(title: pa.Array | None, text: pa.Array) -> pa.Array:
    """BEIR's text of a document: (title + " " + text).strip(); a null text stays null.

    Where the title is null or empty the text is as it is: a file format or a layout may bring a column of titles along
    in which there are none, and the same document has to be scored as the same text.
    """
    if title is None:
        return text
    titles = pc.fill_null(_plain(title), "")
    both = pc.utf8_trim_whitespace(pc.binary_join_element_wise(titles, text, pa.scalar(" ", pa.large_string())))
    return pc.if_else(pc.equal(titles, ""), text, both)


def _titled(title: pa.Array | None, text: pa.Array | None) -> pa.Array | None:
    if title is None or text is None:
        return text
    return with_title(title, _plain(text))


def _number(values: pa.Array | None, size: int, kind: pa.DataType) -> pa.Array:
    if values is None:
        return pa.nulls(size, kind)
    return pc.cast(values, kind, safe=kind != pa.float64())


def _plain(texts: pa.Array) -> pa.Array:
    return pc.cast(texts, pa.large_string())


def _once(values: pa.Array | None, size: int) -> pa.Array:
    """Texts of type ONCE, with no others in the dictionary: a row group's holds all of the row group."""
    if values is None:
        return pa.nulls(size, ONCE)
    if not pa.types.is_dictionary(values.type):
        return pc.dictionary_encode(_plain(values))
    values = _compact(values)
    distinct = pc.dictionary_encode(_plain(values.dictionary))  # a file's may hold a text twice, or null
    return pa.DictionaryArray.from_arrays(distinct.indices.take(values.indices), distinct.dictionary)


def _compact(values: pa.DictionaryArray) -> pa.DictionaryArray:
    """The same values with a dictionary of those that occur."""
    absent = pc.is_null(values.indices).to_numpy(zero_copy_only=False)
    indices = pc.fill_null(values.indices, 0).to_numpy(zero_copy_only=False)
    if values.dictionary.null_count:  # Arrow puts no such dictionaries together
        absent |= pc.is_null(values.dictionary).to_numpy(zero_copy_only=False)[indices]
    used, places = np.unique(indices[~absent], return_inverse=True)
    new = np.zeros(len(indices), np.int64)
    new[~absent] = places
    found = pa.array(new, values.type.index_type, mask=absent)
    return pa.DictionaryArray.from_arrays(found, values.dictionary.take(pa.array(used)), ordered=values.type.ordered)


def _positions(index: Int64) -> pa.Array:
    """First-stage ranks from the order of the input: 1, 2, … within each query."""
    if len(index) == 0:
        return pa.array([], pa.int32())
    starts = np.flatnonzero(np.diff(index, prepend=index[0] - 1))
    lengths = np.diff(np.append(starts, len(index)))
    return pa.array(np.arange(len(index)) - np.repeat(starts, lengths) + 1, pa.int32())


def _told_apart(ranks: pa.ChunkedArray, scores: pa.ChunkedArray, index: Int64) -> pa.Array:
    """First-stage ranks; those of a query in which any repeats (tools write 0 or 1 everywhere) are its places by rank,
    then score, as the stage ranks a run."""
    rank = pc.cast(ranks, pa.int64()).to_numpy()
    keys = (index << 32) + rank + 2**31
    in_order = np.sort(keys)
    repeated = in_order[1:][in_order[1:] == in_order[:-1]] >> 32
    if not len(repeated):
        return pc.cast(ranks, pa.int32()).combine_chunks()
    here = np.flatnonzero(np.isin(index, repeated))
    score = pc.fill_null(pc.cast(scores, pa.float64()), float("nan")).to_numpy()[here]
    order = here[np.lexsort((-np.nan_to_num(score, nan=-np.inf), rank[here], index[here]))]
    rank = rank.copy()
    rank[order] = _positions(index[order]).to_numpy()
    return pa.array(rank, pa.int32())


def _refuse_two(rows: pa.Table, name: str, where: str) -> None:
    codes = rows[name].combine_chunks()
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
