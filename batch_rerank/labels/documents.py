"""The table of documents: each text once, however many parts have it.

A part leaves its documents in one file of `_work/`, a row group for each bucket of ids; then a bucket is gathered out
of all parts. What is held at once is a part, or a bucket.
"""

import io
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batch_rerank.errors import StorageError
from batch_rerank.labels.targets import two_texts
from batch_rerank.store.filesystem import locate, storage_errors

BUCKET_ROWS = 100_000
"""Chosen documents of a bucket, counted as often as they are chosen."""

BUCKETS = b"batch_rerank.buckets"


@dataclass(frozen=True)
class Gather:
    """A bucket to be gathered out of the files of these parts."""

    bucket: int
    parts: Sequence[int]


def work_name(number: int) -> str:
    """The documents of a part."""
    return f"_work/documents-{number:05d}.parquet"


def split_documents(chosen: pa.Table, number: int, buckets: int) -> tuple[str, bytes, int]:
    """A part's documents, `document_id` and `text`, each once, in row groups by bucket: name, content, rows. A document
    that has two texts keeps both, for `gather` to refuse."""
    documents = pa.table({"document_id": chosen["doc_id"], "text": chosen["text"]})
    documents = documents.group_by(["document_id", "text"]).aggregate([]).sort_by("document_id")
    names = documents["document_id"].to_pylist()
    bucket = np.array([zlib.crc32(name.encode()) % buckets for name in names], np.int64)
    there = np.unique(bucket).tolist()
    schema = documents.schema.with_metadata({BUCKETS: json.dumps(there).encode()})
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
        for one in there:
            rows = documents.take(pa.array(np.flatnonzero(bucket == one))).combine_chunks()
            writer.write_table(rows.replace_schema_metadata(schema.metadata), row_group_size=len(rows))
    return work_name(number), sink.getvalue(), len(documents)


def gather(work: Gather, root: str, options: dict[str, object], where: str) -> pa.Table:
    """A bucket's documents, sorted by id. Raises InputError where a document has two texts, and StorageError."""
    tables = []
    at = locate(root, options, reached=True)
    for number in work.parts:
        location = at / work_name(number)
        try:
            with storage_errors(location), location.open() as file:
                parquet = pq.ParquetFile(file)
                groups = json.loads(parquet.schema_arrow.metadata[BUCKETS])
                if work.bucket in groups:
                    tables.append(parquet.read_row_group(groups.index(work.bucket)))
        except (pa.ArrowException, KeyError, ValueError) as error:
            raise StorageError(f"{location}: cannot be read ({error}); delete it and run again") from None
    if not tables:
        return pa.table({"document_id": pa.array([], pa.string()), "text": pa.array([], pa.large_string())})
    rows = pa.concat_tables([one.replace_schema_metadata(None) for one in tables])
    rows = rows.group_by(["document_id", "text"]).aggregate([]).sort_by("document_id").combine_chunks()
    ids = rows["document_id"].combine_chunks()
    same = pc.equal(ids[1:], ids[:-1]).to_numpy(zero_copy_only=False).astype(np.bool_)
    if same.any():
        raise two_texts(ids[int(np.flatnonzero(same)[0])].as_py(), where)
    return rows
