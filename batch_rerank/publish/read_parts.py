"""Parts of an output, read back as flat rows."""

import io
from collections.abc import Iterator, Sequence
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from batch_rerank.errors import StorageError
from batch_rerank.publish.nested import LIST, flat, is_nested
from batch_rerank.store.failures import UNREADABLE, is_damage
from batch_rerank.store.filesystem import Location, storage_errors
from batch_rerank.store.manifest import sha256


def read_part(location: Location, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Columns of the rows of a part in either layout, a row group of whole queries at a time. Raises StorageError, for
    pages too that are not what was written: their checksums are looked at."""
    with storage_errors(location), location.open() as file:
        yield from _rows(location, file, columns)


def read_checked_part(location: Location, checksum: str, columns: Sequence[str]) -> Iterator[pa.Table]:
    """The same of a part that is held whole, and whose sha256 must be this one: those of earlier versions have no
    checksums of pages."""
    with storage_errors(location):
        data = location.read_bytes()
    if sha256(data) != checksum:
        raise StorageError(
            f"{location}: not what its receipt says (another checksum); see batch-rerank verify --repair"
        )
    yield from _rows(location, io.BytesIO(data), columns)


def _rows(location: Location, file: IO[bytes], columns: Sequence[str]) -> Iterator[pa.Table]:
    try:
        parquet = pq.ParquetFile(file, page_checksum_verification=True)
        nested = is_nested(parquet.schema_arrow.names)
        wanted = [*(name for name in columns if name == "query_id"), LIST] if nested else list(columns)
        for group in range(parquet.metadata.num_row_groups):
            rows = parquet.read_row_group(group, columns=wanted)
            yield flat(rows).select(columns)
    except (*UNREADABLE, TypeError, AttributeError) as error:  # a footer, which no checksum covers, may say anything
        if not is_damage(error):
            raise
        raise StorageError(f"{location}: cannot be read ({error}); see batch-rerank verify --repair") from None
