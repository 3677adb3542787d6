"""Reading shards: footers and id columns for the plan, then whole units, row groups decoded once and streamed."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import pyarrow as pa
import pyarrow.parquet as pq

from batch_rerank.errors import InputError
from batch_rerank.store.filesystem import File, Location, input_errors
from batch_rerank.store.layouts import TEXTS, Columns, Queries, canonical, find_columns, queries_of

BATCH_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Unit:
    """A range of whole queries of one shard: rows `start` to `stop` of the file."""

    id: str
    shard: int
    start: int
    stop: int
    queries: int
    pairs: int


@dataclass(frozen=True)
class Shard:
    """One input file as the plan saw it."""

    index: int
    url: str
    file: File
    rows: int


@contextmanager
def open_parquet(location: Location) -> Iterator[pq.ParquetFile]:
    """A Parquet file. Raises InputError where it is absent, empty or not Parquet."""
    with input_errors(location):
        file = location.open()
    with file:
        with reading(location, "the Parquet footer"):
            parquet = pq.ParquetFile(file, pre_buffer=True, page_checksum_verification=True)
        yield parquet


@contextmanager
def reading(location: Location, what: str) -> Iterator[None]:
    """Around the decoding of a footer or of pages: damage becomes an InputError."""
    try:
        with input_errors(location):
            yield
    except (pa.ArrowException, UnicodeDecodeError, EOFError) as error:
        raise InputError(_unreadable(location, what, error)) from None
    except InputError as error:
        # pyarrow reports most damage as a plain OSError, which no type tells apart from a storage failure
        if isinstance(error.__cause__, OSError):
            raise InputError(_unreadable(location, what, error.__cause__)) from None
        raise


def _unreadable(location: Location, what: str, error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (
        f"{location}: {what} cannot be read ({lines[0] if lines else type(error).__name__}); "
        "expected a complete, undamaged file; write the shard again"
    )


def read_queries(
    location: Location, layout: str, renamed: dict[str, str], passthrough: Sequence[str], for_trec: bool = False
) -> tuple[Columns, Queries, list[int], float, dict[str, str]]:
    """What the plan needs of a shard: its columns, its queries, the rows at which row groups end, the mean bytes of
    text of a pair, and the types of the passed-through columns. Reads the footer and the id columns only."""
    with open_parquet(location) as parquet:
        with reading(location, "the Parquet footer"):
            columns = find_columns(parquet.schema_arrow, layout, renamed, passthrough, str(location))
            ends = list(accumulate(_group_rows(parquet)))
            size = _text_bytes(parquet, columns)
            types = {name: str(_type_of(parquet.schema_arrow, columns, name)) for name in passthrough}
        with reading(location, "an id column"):
            table = parquet.read(columns=columns.leaves(leaf_paths(parquet), ["query_id", "doc_id"]))
            if len(table) != sum(_group_rows(parquet)):
                raise other_rows(len(table), sum(_group_rows(parquet)), location)
            queries = queries_of(table, columns, str(location), for_trec)
    return columns, queries, ends, size / max(1, int(queries.pairs.sum())), types


def _text_bytes(parquet: pq.ParquetFile, columns: Columns) -> int:
    """Bytes of all texts after decompression, as the footer says."""
    texts = columns.leaves(leaf_paths(parquet), ["text"])
    size = 0
    for group in range(parquet.metadata.num_row_groups):
        for index, path in enumerate(leaf_paths(parquet)):
            if path in texts:
                _probe(parquet, group, path)
                size += parquet.metadata.row_group(group).column(index).total_uncompressed_size
    return size


def _probe(parquet: pq.ParquetFile, group: int, path: str) -> None:
    """Raise where the footer's description of a column chunk is damaged, without reading the chunk.

    pyarrow checks some of it only when the description is asked for, and `column()` then ends the process
    (std::terminate). The same check before a read raises.
    """
    try:
        pq.ParquetFile(_Unread(), metadata=parquet.metadata, buffer_size=1024).read_row_group(group, columns=[path])
    except _ReadError:
        return


class _ReadError(Exception):
    """A read of `_Unread`: all checks that come before it have passed."""


class _Unread(io.RawIOBase):
    """A file, large enough for any chunk, whose content nobody gets."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return offset

    def tell(self) -> int:
        return 2**62

    def read(self, size: int = -1, /) -> bytes:
        raise _ReadError


def other_rows(found: int, expected: int, location: Location) -> InputError:
    """The error for a file with fewer or more rows than its footer says."""
    return InputError(
        f"{location}: found {found:,} rows where the Parquet footer says {expected:,}; "
        "expected a complete, undamaged Parquet file; write the shard again"
    )


def read_units(
    location: Location,
    shard: Shard,
    units: Sequence[Unit],
    layout: str,
    renamed: dict[str, str],
    passthrough: Sequence[str],
    ids_only: bool = False,
) -> Iterator[tuple[Unit, pa.Table]]:
    """Canonical rows of units of a shard in file order, one unit at a time; with `ids_only`, the texts are null.

    Raises InputError where the file is damaged, or is not the one that was planned, at open or after the last read.
    """
    check_unchanged(location, shard.file)
    with open_parquet(location) as parquet:
        columns = find_columns(parquet.schema_arrow, layout, renamed, passthrough, str(location))
        if ids_only:
            columns = columns.without(TEXTS)
        wanted = [name for name in columns.names if name != "candidates"]
        leaves = columns.leaves(leaf_paths(parquet), wanted, passed=True)
        for unit, table in _slices(parquet, units, leaves, location):
            with reading(location, f"unit {unit.id} (rows {unit.start} to {unit.stop})"):
                rows = canonical(table, columns, str(location))
                rows.validate(full=True)  # Parquet promises UTF-8 and does not check it
            yield unit, rows
    check_unchanged(location, shard.file)


def check_unchanged(location: Location, planned: File) -> None:
    """Raise InputError where a file is not the one that was planned."""
    with input_errors(location):
        now = location.stat()
    if (now.size, now.version) != (planned.size, planned.version):
        raise InputError(
            f"{location}: changed since the plan (found {now.size:,} bytes {now.version}, expected "
            f"{planned.size:,} bytes {planned.version}); restore the file, or plan a new output"
        )


def _slices(
    parquet: pq.ParquetFile, units: Sequence[Unit], leaves: list[str], location: Location
) -> Iterator[tuple[Unit, pa.Table]]:
    """Cut the row groups that the units touch into units; stops decoding after the last one."""
    groups, position = _row_groups(parquet, units[0].start, units[-1].stop)
    batches = parquet.iter_batches(_batch_rows(parquet, groups), row_groups=groups, columns=leaves)
    pending: list[pa.RecordBatch] = []
    end = position
    for unit in units:
        while end < unit.stop:
            with reading(location, f"unit {unit.id} (rows {unit.start} to {unit.stop})"):
                batch = next(batches, None)
            if batch is None:
                raise other_rows(end, unit.stop, location)
            pending.append(batch)
            end += batch.num_rows
        table = pa.Table.from_batches(pending)
        yield unit, table.slice(unit.start - position, unit.stop - unit.start)
        pending = table.slice(unit.stop - position).to_batches()
        position = unit.stop


def read_groups(
    parquet: pq.ParquetFile, groups: Sequence[int], leaves: list[str], location: Location
) -> Iterator[pa.RecordBatch]:
    """Whole row groups, some MB at a time. Raises InputError for damage, and where rows are missing."""
    expected = sum(parquet.metadata.row_group(group).num_rows for group in groups)
    batches = parquet.iter_batches(_batch_rows(parquet, groups), row_groups=list(groups), columns=leaves)
    found = 0
    while True:
        with reading(location, f"row groups {groups[0]} to {groups[-1]}"):
            batch = next(batches, None)
        if batch is None:
            break
        found += batch.num_rows
        yield batch
    if found != expected:
        raise other_rows(found, expected, location)


def _batch_rows(parquet: pq.ParquetFile, groups: Sequence[int]) -> int:
    """How many rows of these row groups are about BATCH_BYTES."""
    size = sum(parquet.metadata.row_group(group).total_byte_size for group in groups)
    rows = sum(parquet.metadata.row_group(group).num_rows for group in groups)
    return max(1, min(65536, int(BATCH_BYTES * rows / max(1, size))))


def _row_groups(parquet: pq.ParquetFile, start: int, stop: int) -> tuple[list[int], int]:
    """Row groups that overlap rows start to stop, and the first row of the first of them."""
    groups: list[int] = []
    first = row = 0
    for index, rows in enumerate(_group_rows(parquet)):
        if row < stop and row + rows > start:
            first = first if groups else row
            groups.append(index)
        row += rows
    return groups, first


def _group_rows(parquet: pq.ParquetFile) -> list[int]:
    return [parquet.metadata.row_group(index).num_rows for index in range(parquet.metadata.num_row_groups)]


def leaf_paths(parquet: pq.ParquetFile) -> list[str]:
    """The paths of the columns of values, e.g. candidates.list.element.doc_id."""
    return [parquet.schema.column(index).path for index in range(len(parquet.schema))]


def _type_of(schema: pa.Schema, columns: Columns, name: str) -> pa.DataType:
    if columns.layout == "nested" and columns.passthrough[name]:
        return schema.field(columns.names["candidates"]).type.value_type.field(name).type
    return schema.field(name).type
