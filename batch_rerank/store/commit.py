"""A unit's bytes to a committed unit: file first, then receipt, both created exclusively.

A unit's file is immutable. GPU scores are not bitwise stable, so where another attempt has committed the unit already,
its file is adopted and ours is dropped; the receipt always describes the file that won.
"""

import io
import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

import batch_rerank
from batch_rerank.errors import StorageError
from batch_rerank.store.failures import UNREADABLE
from batch_rerank.store.filesystem import Location, storage_errors
from batch_rerank.store.manifest import Manifest, sha256
from batch_rerank.store.receipts import SUMMED, Receipt
from batch_rerank.store.records import parse_counts

Counts = Mapping[str, int]


def footer(fingerprint: str, unit: str, counts: Counts, **more: str) -> dict[str, str]:
    """What a unit's file says of itself, in its schema's metadata."""
    return {
        "batch_rerank.version": batch_rerank.__version__,
        "batch_rerank.fingerprint": fingerprint,
        "batch_rerank.unit": unit,
        "batch_rerank.counts": json.dumps(dict(counts)),
        **{f"batch_rerank.{name}": value for name, value in more.items()},
    }


def read_footer(data: bytes) -> tuple[pa.Table, dict[str, str], dict[str, int]]:
    """A unit's file: its rows, what it says of itself, and its counts. Raises ValueError where it cannot be read."""
    try:
        table = pq.read_table(io.BytesIO(data))
        metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    except UNREADABLE as error:
        raise ValueError(str(error) or type(error).__name__) from None
    return table, metadata, parse_counts(metadata.get("batch_rerank.counts", "{}").encode())


def commit(manifest: Manifest, unit: str, data: bytes, fingerprint: str, counts: Counts, **about: Any) -> Receipt:
    """Write a unit's file and its receipt, or adopt the file that is there. `counts` are those of SUMMED, `about` the
    other fields of the receipt. Raises StorageError."""
    started = time.monotonic()
    file, location = manifest.unit_file(unit), manifest.receipt(unit)
    with storage_errors(file):
        if not file.create_exclusive(data):
            data, counts, about["shape"] = _adopt(file, unit, fingerprint, counts)
        etag = "" if file.is_local else file.stat().version
    about["storage_retries"] = about.get("storage_retries", 0) + file.patience.retries
    known: dict[str, Any] = {**counts, **about}
    receipt = Receipt(
        unit=unit,
        fingerprint=fingerprint,
        part=file.name,
        size=len(data),
        sha256=sha256(data),
        etag=etag,
        at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        write_seconds=round(time.monotonic() - started, 4),
        **known,
    )
    with storage_errors(location):
        if not location.create_exclusive(receipt.to_json()):
            receipt = _other_receipt(location, file, receipt)
    return receipt


def _adopt(file: Location, unit: str, fingerprint: str, ours: Counts) -> tuple[bytes, dict[str, int], str]:
    """The bytes of the file that is there, if it is this unit of this job and complete, its counts and its shape."""
    data = file.read_bytes()
    try:
        table, metadata, counts = read_footer(data)
    except ValueError:
        raise StorageError(
            f"{file}: exists and cannot be read; expected this unit's rows; delete it and run again"
        ) from None
    found = (metadata.get("batch_rerank.fingerprint"), metadata.get("batch_rerank.unit"), len(table))
    # another version may have counted more, or less
    if found != (fingerprint, unit, ours["rows_out"]) or counts.get("rows_out") != len(table):
        raise StorageError(
            f"{file}: exists and is another job's or damaged; delete it and run again, or use a new output"
        )
    return data, {name: counts.get(name, 0) for name in SUMMED}, metadata.get("batch_rerank.shape", "")


def _other_receipt(location: Location, file: Location, ours: Receipt) -> Receipt:
    """The receipt another attempt wrote; replaced where it does not describe the file that is there now."""
    data, counts, shape = _adopt(file, ours.unit, ours.fingerprint, ours.counts)
    with suppress(StorageError):  # damaged: replaced
        theirs = Receipt.from_json(location.read_bytes(), location)
        if (theirs.unit, theirs.sha256, theirs.size) == (ours.unit, sha256(data), len(data)):
            return theirs
    etag = "" if file.is_local else file.stat().version
    known: dict[str, Any] = {**counts, "size": len(data), "sha256": sha256(data), "etag": etag, "shape": shape}
    now = replace(ours, **known)
    location.write_bytes(now.to_json())
    return now
