"""Output rows as a row for each query with its ranked list, and back."""

import numpy as np
import pyarrow as pa

LIST = "candidates"
"""The list's column: a nested output has the form of a nested input, so one job's output can be another's input."""


def nest(rows: pa.Table) -> pa.Table:
    """Rows of whole queries, `query_index` last, to `query_id` and `candidates`, a list of the other columns."""
    rows = rows.combine_chunks()
    index = rows["query_index"].to_numpy()
    starts = np.flatnonzero(np.diff(index, prepend=-1))
    names = [name for name in rows.column_names if name not in ("query_id", "query_index")]
    arrays = [_array(rows[name]) for name in names]
    fields = [pa.field(name, array.type) for name, array in zip(names, arrays, strict=True)]
    structs = pa.StructArray.from_arrays(arrays, fields=fields)
    offsets = pa.array(np.append(starts, len(rows)), pa.int32())
    query_ids = _array(rows["query_id"]).take(pa.array(starts))
    return pa.table({"query_id": query_ids, LIST: pa.ListArray.from_arrays(offsets, structs)})


def flat(rows: pa.Table) -> pa.Table:
    """The output rows of either layout as flat rows."""
    if LIST not in rows.column_names:
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
        return pa.schema(fields).empty_table()
    return pa.concat_tables(tables)


def _array(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
