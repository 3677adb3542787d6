"""Output rows as a row for each query with its ranked list, and back."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

LIST = "candidates"
"""The list's column: a nested output has the form of a nested input, so one job's output can be another's input."""


def is_nested(names: Sequence[str]) -> bool:
    """Whether these are the columns of a nested output. Not by its list: a passed-through column may have its name."""
    return "doc_id" not in names


def nest(rows: pa.Table, starts: npt.NDArray[np.int64], ids: pa.Array | None = None) -> pa.Table:
    """Rows of whole queries that begin at `starts` to `query_id` and `candidates`, a list of the other columns. `ids`:
    string[n], of the queries, where some have no rows."""
    names = [name for name in rows.column_names if name != "query_id"]
    arrays = [_array(rows[name]) for name in names]
    fields = [pa.field(name, array.type) for name, array in zip(names, arrays, strict=True)]
    structs = pa.StructArray.from_arrays(arrays, fields=fields)
    offsets = pa.array(np.append(starts, len(rows)), pa.int32())
    query_ids = _array(rows["query_id"]).take(pa.array(starts)) if ids is None else ids
    return pa.table({"query_id": query_ids, LIST: pa.ListArray.from_arrays(offsets, structs)})


def flat(rows: pa.Table) -> pa.Table:
    """The output rows of either layout as flat rows."""
    if not is_nested(rows.column_names):
        return rows
    tables = []
    for batch in rows.to_batches():
        lists = batch.column(LIST)
        structs = lists.flatten()
        data = {"query_id": batch.column("query_id").take(lists.value_parent_indices())}
        data |= {field.name: structs.field(number) for number, field in enumerate(structs.type)}
        tables.append(pa.table(data))
    if not tables:
        fields = [rows.schema.field("query_id"), *rows.schema.field(LIST).type.value_type]
        # not Schema.empty_table: pyarrow 26 makes no list of an extension type (uuid) out of nothing
        return pa.table([pa.chunked_array([], field.type) for field in fields], schema=pa.schema(fields))
    return pa.concat_tables(tables)


def flat_names(schema: pa.Schema) -> list[str]:
    """The columns that `flat` has of rows of this schema. Raises KeyError and TypeError where it is no output's."""
    if not is_nested(schema.names):
        return list(schema.names)
    return ["query_id", *(field.name for field in schema.field(LIST).type.value_type)]


def _array(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
