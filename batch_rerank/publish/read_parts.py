"""Parts of an output, read back as flat rows."""

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from batch_rerank.errors import StorageError
from batch_rerank.publish.nested import LIST, flat, is_nested
from batch_rerank.store.filesystem import Location, storage_errors


def read_part(location: Location, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Columns of the rows of a part in either layout, a row group of whole queries at a time. Raises StorageError."""
    with storage_errors(location):
        try:
            with location.open() as file:
                parquet = pq.ParquetFile(file)
                nested = is_nested(parquet.schema_arrow.names)
                wanted = [*(name for name in columns if name == "query_id"), LIST] if nested else list(columns)
                for group in range(parquet.metadata.num_row_groups):
                    rows = parquet.read_row_group(group, columns=wanted)
                    yield flat(rows).select(columns) if nested else rows
        except pa.ArrowException as error:
            raise StorageError(f"{location}: cannot be read ({error}); see batch-rerank verify --repair") from None
