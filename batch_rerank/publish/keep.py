"""`_work/`, a file a unit, to `_scores/`, large files with a row group a unit: what a later run reads again.

Beside each file lies what later jobs find scores by: see `store/kept.py`.
"""

import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batch_rerank.calls import Each, ahead
from batch_rerank.config import JobConfig
from batch_rerank.errors import StorageError
from batch_rerank.schema import CHUNK_OFFSET, QUERY_HASH, TEXT_HASH
from batch_rerank.store.filesystem import locate, storage_errors
from batch_rerank.store.kept import PAIR, Records, index_of, pairs_name, queries_name, to_bytes
from batch_rerank.store.lease import Lease
from batch_rerank.store.manifest import Manifest, scores_receipt_name, sha256
from batch_rerank.store.names import OUTPUT_KINDS, SCORES, work_name
from batch_rerank.store.plans import Plan
from batch_rerank.store.receipts import ScoresReceipt
from batch_rerank.store.scan import Scan, scan, unused_scores

GATHERED_BYTES = 64 * 2**20
"""Of score files that become one: they, and their pairs, are held in memory."""

REMOVALS = 16
"""Requests at once."""


def tidy(manifest: Manifest, plan: Plan, config: JobConfig, lease: Lease, each: Each) -> None:
    """Gather the score files below `_work/` and remove them; with `keep_scores: false` remove all scores.

    Only what a listing shows to be gathered is removed. Raises StorageError, and ConflictError where the lease is lost.
    """
    found = scan(manifest, plan)
    if config.output.keep_scores:
        groups = list(_groups(found, min(config.output.file_bytes, GATHERED_BYTES)))
        number = 1 + max((int(name[8:-8]) for name in found.files.matching(SCORES)), default=-1)  # _scores/ .parquet
        calls = [
            partial(gather_scores, number + index, units, config, plan.fingerprint)
            for index, units in enumerate(groups)
        ]
        for _ in each(calls):
            lease.check()
        found = scan(manifest, plan) if groups else found
    lease.check()
    names = list(_needless(found, config.output.keep_scores))
    with ThreadPoolExecutor(REMOVALS) as pool:
        list(pool.map(lambda name: manifest.remove_seen(name, found.files), names))
    if manifest.root.is_local:
        with suppress(OSError):  # not empty, or gone
            os.rmdir((manifest.root / "_work").path)


def _groups(found: Scan, file_bytes: int) -> Iterator[list[tuple[str, str]]]:
    """The units that are alone, with their checksums, in groups of about so many bytes."""
    group: list[tuple[str, str]] = []
    size = 0
    for receipt in found.committed:
        if work_name(receipt.unit) in found.files.found and found.place(receipt) is None:
            group.append((receipt.unit, receipt.sha256))
            size += receipt.size
            if size >= file_bytes:
                yield group
                group, size = [], 0
    if group:
        yield group


def _needless(found: Scan, keep: bool) -> Iterator[str]:
    for receipt in found.committed:
        if not keep or found.place(receipt) is not None:
            yield work_name(receipt.unit)
    if keep:
        yield from unused_scores(found)
    else:
        yield from found.files.matching(OUTPUT_KINDS["scores"])


def gather_scores(number: int, units: Sequence[tuple[str, str]], config: JobConfig, fingerprint: str) -> ScoresReceipt:
    """Write units' score files as one, its index and its receipt. Raises StorageError where one is not what its receipt
    says."""
    manifest = Manifest(locate(config.output.path, config.output.storage_options, reached=True))
    name = f"_scores/{number:05d}.parquet"
    bodies = list(ahead([partial(_body, manifest, unit, checksum) for unit, checksum in units]))
    schema = _shared([pq.read_schema(io.BytesIO(body)) for body in bodies], fingerprint)
    sink = io.BytesIO()
    hashes, kept = [np.empty(0, np.uint64)], [np.empty(0, PAIR)]
    with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
        for group, body in enumerate(bodies):
            bodies[group] = b""  # not needed again
            rows = pq.read_table(io.BytesIO(body))
            writer.write_table(
                rows.select(schema.names).replace_schema_metadata(schema.metadata), row_group_size=max(1, len(rows))
            )
            scored = rows.filter(pc.is_valid(rows["score"]))
            hashes.append(scored[QUERY_HASH].to_numpy())
            kept.append(_pairs(scored))
    data, location = sink.getvalue(), manifest.root / name
    sink.close()
    with storage_errors(location):
        if not location.create_exclusive(data):
            raise StorageError(f"{location}: written by another job meanwhile; run again when it has ended")
        etag = "" if location.is_local else location.stat().version
    size, checksum = len(data), sha256(data)
    del data  # each of these is some 100 MB: one after the other
    # behind their file, which another gatherer may have won, and before the receipt, without which nobody reads them
    pairs = np.concatenate(kept)
    kept.clear()
    made = {queries_name(name): index_of(np.concatenate(hashes), pairs), pairs_name(name): pairs}
    told = []
    for beside, records in made.items():
        content = to_bytes(records)
        with storage_errors(manifest.root / beside):
            (manifest.root / beside).write_bytes(content)
        told.append(sha256(content))
    receipt = ScoresReceipt(name, fingerprint, list(units), size, checksum, etag, *told)
    where = manifest.root / scores_receipt_name(name)
    with storage_errors(where):
        where.write_bytes(receipt.to_json())
    return receipt


def _body(manifest: Manifest, unit: str, checksum: str) -> bytes:
    data = manifest.read(work_name(unit))
    if sha256(data) != checksum:
        raise StorageError(
            f"{manifest.unit_file(unit)}: not what its receipt says (another checksum); "
            "see batch-rerank verify --repair"
        )
    return data


def _shared(schemas: Sequence[pa.Schema], fingerprint: str) -> pa.Schema:
    """The columns that all units have with the same type. Others are passed-through columns, or texts, that a job was
    told of between two runs: publishing reads them from the input."""
    names = schemas[0].names
    names = [name for name in names if name not in (QUERY_HASH, TEXT_HASH)]  # beside the file, once
    fields = [schemas[0].field(name) for name in names if all(name in other.names for other in schemas)]
    same = [field for field in fields if all(other.field(field.name).type == field.type for other in schemas)]
    return pa.schema(same, {"batch_rerank.fingerprint": fingerprint})


def _pairs(rows: pa.Table) -> Records:
    """PAIR[n] of rows with a score."""
    made = np.zeros(len(rows), PAIR)
    for name in ("text_hash", "score", "n_tokens", "truncated"):
        made[name] = rows[name].to_numpy()
    made[CHUNK_OFFSET] = rows[CHUNK_OFFSET].to_numpy() if CHUNK_OFFSET in rows.column_names else -1
    return made
