"""Ranked rows to a committed unit: part first, then receipt, both created exclusively.

A part is immutable. GPU scores are not bitwise stable, so where another attempt has committed the unit already, its
part is adopted and ours is dropped; the receipt always describes the part that won.
"""

import io
import itertools
import json
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

import batch_rerank
from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.errors import StorageError
from batch_rerank.schema import PASSED
from batch_rerank.store.filesystem import Location, storage_errors
from batch_rerank.store.manifest import SUMMED, Manifest, Receipt, sha256
from batch_rerank.store.names import part_name
from batch_rerank.store.plans import Unit
from batch_rerank.store.records import parse_counts

ROW_GROUP_ROWS = 100_000


def write_unit(manifest: Manifest, unit: Unit, rows: pa.Table, model: ModelSpec, receipt: Receipt) -> Receipt:
    """Commit a unit's ranked rows. `receipt` has the counts; part, size and checksum are filled in here.

    Raises StorageError.
    """
    return commit(manifest, unit, serialise(rows, unit, model, receipt), receipt)


def commit(manifest: Manifest, unit: Unit, data: bytes, receipt: Receipt) -> Receipt:
    """Write a part and its receipt, or adopt the part that is there. Raises StorageError."""
    part, location = manifest.part(unit.id), manifest.receipt(unit.id)
    with storage_errors(part):
        if not part.create_exclusive(data):
            data, receipt = _adopt(part, unit, receipt)
        etag = "" if part.is_local else part.stat().version
    receipt = replace(
        receipt,
        part=part_name(unit.id),
        size=len(data),
        sha256=sha256(data),
        etag=etag,
        storage_retries=receipt.storage_retries + part.patience.retries,
    )
    with storage_errors(location):
        if not location.create_exclusive(receipt.to_json()):
            receipt = _other_receipt(location, part, unit, receipt)
    return receipt


def serialise(rows: pa.Table, unit: Unit, model: ModelSpec, receipt: Receipt) -> bytes:
    """A part's bytes: zstd Parquet, row groups of whole queries, what made it and its counts in the schema's
    metadata."""
    index = rows["query_index"].to_numpy()
    rows = rows.drop_columns(["query_index"])
    rows = rows.rename_columns([name.removeprefix(PASSED) for name in rows.column_names]).replace_schema_metadata(
        {
            "batch_rerank.version": batch_rerank.__version__,
            "batch_rerank.fingerprint": receipt.fingerprint,
            "batch_rerank.unit": unit.id,
            "batch_rerank.counts": json.dumps({name: getattr(receipt, name) for name in SUMMED}),
            "batch_rerank.model": model.name,
            "batch_rerank.revision": model.revision or model.identity,
            "batch_rerank.template": model.template,
        }
    )
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, rows.schema, compression="zstd") as writer:
        for start, stop in _row_groups(index):
            writer.write_table(rows.slice(start, stop - start), row_group_size=stop - start)
    return sink.getvalue()


def _row_groups(index: npt.NDArray[np.int32]) -> list[tuple[int, int]]:
    """Ranges of rows that begin and end with a query."""
    borders = [*np.flatnonzero(np.diff(index, prepend=-1)).tolist(), len(index)]
    cuts = [0]
    for border, following in itertools.pairwise(borders):
        if following - cuts[-1] > ROW_GROUP_ROWS:
            cuts.append(border)
    cuts.append(len(index))
    return list(itertools.pairwise(cuts)) if len(index) else []


def _adopt(part: Location, unit: Unit, receipt: Receipt) -> tuple[bytes, Receipt]:
    """The bytes of the part that is there, if it is this unit of this job and complete, and a receipt of it."""
    data = part.read_bytes()
    try:
        table = pq.read_table(io.BytesIO(data))
        metadata = table.schema.metadata or {}
        counts = parse_counts(metadata.get(b"batch_rerank.counts", b"{}"))
    except (pa.ArrowException, OSError, ValueError):
        raise StorageError(
            f"{part}: exists and cannot be read; expected this unit's rows; delete it and run again"
        ) from None
    found = (metadata.get(b"batch_rerank.fingerprint"), metadata.get(b"batch_rerank.unit"), len(table))
    expected = (receipt.fingerprint.encode(), unit.id.encode(), receipt.rows_out)
    if found != expected or counts.get("rows_out") != len(table):  # another version may have counted more, or less
        raise StorageError(
            f"{part}: exists and is another job's or damaged; delete it and run again, or use a new output"
        )
    known: dict[str, Any] = {name: counts.get(name, 0) for name in SUMMED}
    return data, replace(receipt, **known)


def _other_receipt(location: Location, part: Location, unit: Unit, ours: Receipt) -> Receipt:
    """The receipt another attempt wrote; replaced where it does not describe the part that is there now."""
    data, now = _adopt(part, unit, ours)
    with suppress(StorageError):  # damaged: replaced
        theirs = Receipt.from_json(location.read_bytes(), location)
        if (theirs.unit, theirs.sha256, theirs.size) == (unit.id, sha256(data), len(data)):
            return theirs
    now = replace(now, size=len(data), sha256=sha256(data), etag="" if part.is_local else part.stat().version)
    location.write_bytes(now.to_json())
    return now
