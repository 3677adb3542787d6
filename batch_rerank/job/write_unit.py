"""Ranked rows to a committed unit: part first, then receipt, both created exclusively.

A part is immutable. GPU scores are not bitwise stable, so where another attempt has committed the unit already, its
part is adopted and ours is dropped; the receipt always describes the part that won.
"""

import io
import itertools
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

import batch_rerank
from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.errors import StorageError
from batch_rerank.store.filesystem import Location, storage_errors
from batch_rerank.store.manifest import Manifest, Receipt, part_name, sha256
from batch_rerank.store.shards import Unit

ROW_GROUP_ROWS = 100_000


def write_unit(manifest: Manifest, unit: Unit, rows: pa.Table, model: ModelSpec, receipt: Receipt) -> Receipt:
    """Commit a unit's ranked rows. `receipt` has the counts; part, size and checksum are filled in here.

    Raises StorageError.
    """
    data = serialise(rows, unit, model, receipt.fingerprint)
    part = manifest.part(unit.id)
    with storage_errors(part):
        if not part.create_exclusive(data):
            data = _adopt(part, unit, receipt)
        receipt = replace(receipt, part=part_name(unit.id), size=len(data), sha256=sha256(data))
        location = manifest.receipt(unit.id)
        if not location.create_exclusive(receipt.to_json()):
            receipt = _other_receipt(location, receipt)
    return receipt


def serialise(rows: pa.Table, unit: Unit, model: ModelSpec, fingerprint: str) -> bytes:
    """A part's bytes: zstd Parquet, row groups of whole queries, what made it in the schema's metadata."""
    index = rows["query_index"].to_numpy()
    rows = rows.drop_columns(["query_index"]).replace_schema_metadata(
        {
            "batch_rerank.version": batch_rerank.__version__,
            "batch_rerank.fingerprint": fingerprint,
            "batch_rerank.unit": unit.id,
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


def _adopt(part: Location, unit: Unit, receipt: Receipt) -> bytes:
    """The bytes of the part that is there, if it is this unit of this job and complete."""
    data = part.read_bytes()
    try:
        table = pq.read_table(io.BytesIO(data), columns=["query_id"])
        metadata = table.schema.metadata or {}
    except (pa.ArrowException, OSError):
        raise StorageError(
            f"{part}: exists and cannot be read; expected this unit's rows; delete it and run again"
        ) from None
    found = (metadata.get(b"batch_rerank.fingerprint"), metadata.get(b"batch_rerank.unit"), len(table))
    expected = (receipt.fingerprint.encode(), unit.id.encode(), receipt.rows_out)
    if found != expected:
        raise StorageError(
            f"{part}: exists and is another job's or damaged; delete it and run again, or use a new output"
        )
    return data


def _other_receipt(location: Location, ours: Receipt) -> Receipt:
    """The receipt another attempt wrote; replaced where it describes a part that is no longer there."""
    theirs = Receipt.from_json(location.read_bytes(), location)
    if (theirs.sha256, theirs.size) == (ours.sha256, ours.size):
        return theirs
    location.write_bytes(ours.to_json())
    return ours
