"""A unit as one row of one Arrow block: bytes on their way from step to step, or the error that ended it."""

import pickle
from dataclasses import replace
from typing import Any

import pyarrow as pa

from batch_rerank.errors import BatchRerankError, as_value
from batch_rerank.score.steps import EncodedUnit, ScoredUnit
from batch_rerank.store.receipts import Receipt, SetAside


def block(value: EncodedUnit | ScoredUnit | list[Receipt] | list[SetAside]) -> pa.Table:
    """What a step made of a unit, or of several that are scored as one: a row for each receipt then."""
    if isinstance(value, list):
        return pa.concat_tables(
            row(None, pickle.dumps(one)) if isinstance(one, SetAside) else row(one.to_json(), None) for one in value
        )
    return row(_pack(value), None)


def failure(error: BatchRerankError) -> pa.Table:
    """An error that ends the job."""
    return row(None, pickle.dumps(as_value(error)))


def row(payload: bytes | None, error: bytes | None) -> pa.Table:
    """One row: `payload`, or pickled `error`."""
    return pa.table({"payload": pa.array([payload], pa.large_binary()), "error": pa.array([error], pa.binary())})


def _pack(unit: EncodedUnit | ScoredUnit) -> bytes:
    """Pickle with the rows as Arrow IPC: a pickled slice of a table would carry the whole table's buffers."""
    rows = unit.rows
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows)
    return pickle.dumps((replace(unit, rows=None), sink.getvalue().to_pybytes()))


def unpack(buffer: pa.Buffer) -> Any:
    """The unit in a block's payload."""
    unit, rows = pickle.loads(buffer)
    return replace(unit, rows=pa.ipc.open_stream(rows).read_all())
