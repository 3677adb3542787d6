"""Tables that were made of rows, block by block: where all values of a column are null, or all lists empty, Arrow has
no type for it, and the next block has another one."""

from collections.abc import Mapping, Sequence

import pyarrow as pa

TYPES = {
    **dict.fromkeys(("query_id", "query", "instruction", "doc_id", "text", "title"), pa.string()),
    "score": pa.float32(),
    "rank": pa.int32(),
}
"""Of our columns, where a block does not say."""


def with_types(table: pa.Table, renamed: Mapping[str, str], passthrough: Sequence[str]) -> pa.Table:
    """Nested rows with a type for each of our columns. Those that a block without candidates cannot have are there:
    passed-through ones with the type null, and what `renamed` says that there is."""
    types = {renamed.get(name, name): kind for name, kind in TYPES.items()}
    listed = renamed.get("candidates", "candidates")
    own = ["doc_id", "text", *(name for name in ("title", "score", "rank") if name in renamed)]
    fields = {renamed.get(name, name): TYPES[name] for name in own}
    fields = {**{name: pa.null() for name in passthrough if name not in table.column_names}, **fields}
    bare = pa.struct(list(fields.items()))

    def of(field: pa.Field) -> pa.Field:
        known = pa.types.is_null(field.type) and field.name in types
        return field.with_type(types[field.name]) if known else field

    def of_list(field: pa.Field) -> pa.Field:
        if pa.types.is_null(field.type):
            return field.with_type(pa.list_(bare))
        if not (pa.types.is_list(field.type) or pa.types.is_large_list(field.type)):
            return field
        value, make = field.type.value_type, pa.list_ if pa.types.is_list(field.type) else pa.large_list
        if pa.types.is_struct(value):
            return field.with_type(make(pa.struct([of(one) for one in value])))
        return field.with_type(make(bare)) if pa.types.is_null(value) else field

    schema = pa.schema([of_list(field) if field.name == listed else of(field) for field in table.schema])
    return table if schema.equals(table.schema) else table.cast(schema)
