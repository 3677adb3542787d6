"""Passed-through columns in types whose rows Arrow can select and put together, in every file the same.

A writer chooses a dictionary's index by how many values that file has: pandas takes int8 for a Categorical of up to
127, and the values of two files together may be more. Of string_view, binary_view and runs pyarrow 26 selects no rows.
"""

import pyarrow as pa
import pyarrow.compute as pc

INDEX = pa.int32()
"""Of every dictionary, however many values a file has."""


def carried_type(kind: pa.DataType) -> pa.DataType:
    """The type in which a column of type `kind` is passed through: the same values, also those inside lists and
    structs."""
    if pa.types.is_dictionary(kind):
        return pa.dictionary(INDEX, carried_type(kind.value_type), kind.ordered)
    if pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_binary_view(kind):
        return pa.large_binary()
    inside = [kind.field(index) for index in range(kind.num_fields)]
    fields = [field.with_type(carried_type(field.type)) for field in inside]
    if fields == inside:
        return kind
    if pa.types.is_struct(kind):
        return pa.struct(fields)
    if pa.types.is_map(kind):
        return pa.map_(carried_type(kind.key_type), carried_type(kind.item_type), keys_sorted=kind.keys_sorted)
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(fields[0], kind.list_size)
    # Arrow casts no list_view to another one
    large = pa.types.is_large_list(kind) or pa.types.is_large_list_view(kind)
    return pa.large_list(fields[0]) if large else pa.list_(fields[0])


def carried(values: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """A column in the type in which it is passed through."""
    values = pc.run_end_decode(values) if pa.types.is_run_end_encoded(values.type) else values  # no file has them
    kind = carried_type(values.type)
    return values if kind == values.type else values.cast(kind)


def all_carried(rows: pa.Table) -> pa.Table:
    """Rows with every column as `carried`."""
    for index, name in enumerate(rows.column_names):
        rows = rows.set_column(index, name, carried(rows.column(index)))
    return rows
