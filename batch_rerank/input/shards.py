"""Reading shards: footers and id columns for the plan, and row groups, some MB at a time."""

import hashlib
import io
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate

import pyarrow as pa
import pyarrow.parquet as pq

from batch_rerank.errors import InputError
from batch_rerank.input.carried import carried_type
from batch_rerank.input.layouts import Columns, Queries, find_columns, queries_of
from batch_rerank.store.filesystem import File, Location, input_errors
from batch_rerank.store.plans import Shard

BATCH_BYTES = 8 * 2**20
"""Of decoded rows, at a time."""

STREAM_BYTES = 32 * 2**20
"""Of a row group, above which it is streamed: below, its columns are fetched at once, above some MB of each at a time,
so that a row group of any size takes little memory."""

BUFFER_BYTES = 2 * 2**20
"""Of a column, fetched at once from a row group that is streamed."""

ID_ROWS, TEXT_ROWS = 65536, 2048
"""In a batch at most. What a dictionary in the file makes small is as large as its texts once it is decoded."""

ID_BYTES = 512 * 2**20
"""Of rows whose ids alone are read at a time."""


@contextmanager
def open_parquet(
    location: Location, dictionaries: Callable[[pq.ParquetFile], Sequence[str]] | None = None
) -> Iterator[pq.ParquetFile]:
    """A Parquet file, in whose leaves `dictionaries` dictionaries stay. Raises InputError where it is absent, empty or
    not Parquet."""
    with input_errors(location):
        file = location.open()
    with file:
        with reading(location, "the Parquet footer"):
            footer = pq.ParquetFile(file)
            groups = [footer.metadata.row_group(index) for index in range(footer.metadata.num_row_groups)]
            large = any(group.total_byte_size > STREAM_BYTES for group in groups)
            parquet = pq.ParquetFile(
                file,
                metadata=footer.metadata,
                read_dictionary=list(dictionaries(footer)) if dictionaries else None,
                pre_buffer=not large,
                buffer_size=BUFFER_BYTES if large else 0,
                page_checksum_verification=True,
            )
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
    location: Location,
    layout: str,
    renamed: dict[str, str],
    passthrough: Sequence[str],
    for_trec: bool = False,
    rows: int | None = None,
) -> tuple[Columns, Queries, tuple[tuple[int, int], ...], float, dict[str, str]]:
    """What the plan needs of a shard: its columns, its queries, rows and bytes of its row groups, the mean bytes of
    text of a pair, and the types of the passed-through columns. Reads the footer and the id columns only; with
    `rows`, of no more row groups than hold the first so many."""
    with open_parquet(location) as parquet:
        with reading(location, "the Parquet footer"):
            columns = find_columns(parquet.schema_arrow, layout, renamed, passthrough, str(location))
            row_groups = tuple(zip(group_rows(parquet), _group_bytes(parquet), strict=True))
            groups = _first_groups(parquet, rows)
            size = sum(_sizes(parquet, groups, columns.leaves(leaf_paths(parquet), ["text"]))[0])
            types = {name: str(kind) for name, kind in _passed_types(parquet.schema_arrow, columns).items()}
        with reading(location, "an id column"):
            leaves = columns.leaves(leaf_paths(parquet), ["query_id", "doc_id"])
            count, ids = sum(group_rows(parquet)[: len(groups)]), max(_sizes(parquet, groups, leaves)[1], default=0)
            most = max(1, ID_ROWS * count // max(1, ids))
            batches = read_groups(parquet, groups, leaves, location, most, ID_BYTES)
            queries = queries_of((pa.Table.from_batches([one]) for one in batches), columns, str(location), for_trec)
    return columns, queries, row_groups, size / max(1, int(queries.pairs.sum())), types


def _first_groups(parquet: pq.ParquetFile, rows: int | None) -> range:
    ends = list(accumulate(group_rows(parquet)))
    enough = len(ends) if rows is None else bisect_left(ends, rows) + 1
    return range(min(enough, len(ends)))


def _sizes(parquet: pq.ParquetFile, groups: range, leaves: Sequence[str]) -> tuple[list[int], list[int]]:
    """Of each leaf, bytes after decompression and values in row groups, as the footer says."""
    sizes, values = [0] * len(leaves), [0] * len(leaves)
    paths = leaf_paths(parquet)
    for group in groups:
        for place, leaf in enumerate(leaves):
            probe(parquet, group, leaf)
            column = parquet.metadata.row_group(group).column(paths.index(leaf))
            sizes[place] += column.total_uncompressed_size
            values[place] += column.num_values
    return sizes, values


def probe(parquet: pq.ParquetFile, group: int, path: str) -> None:
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


def with_content(location: Location, file: File) -> File:
    """A Parquet file whose version is its content's, not its time's: a copy of the same bytes is the same."""
    if not file.version.startswith("mtime:"):
        return file
    with input_errors(location):
        length = int.from_bytes(location.read_range(file.size - 8, file.size - 4), "little")
        footer = location.read_range(max(0, file.size - 8 - length), file.size)
    return replace(file, version=f"footer:{hashlib.sha256(footer).hexdigest()[:32]}")


def check_planned(location: Location, shard: Shard) -> File:
    """A shard's file as it is now. Raises InputError where it is not the one that was planned."""
    with input_errors(location):
        now = location.stat()
    planned, found = shard.listed or shard.file, now
    if planned.version.startswith("footer:"):  # a plan out of its file: times are not in it
        found = with_content(location, now) if now.size == planned.size else now
    _refuse_changed(location, planned, found)
    return now


def check_unchanged(location: Location, planned: File) -> None:
    """Raise InputError where a file is not the one that was planned."""
    with input_errors(location):
        now = location.stat()
    _refuse_changed(location, planned, now)


def _refuse_changed(location: Location, planned: File, now: File) -> None:
    if (now.size, now.version) != (planned.size, planned.version):
        raise InputError(
            f"{location}: changed since the plan (found {now.size:,} bytes {now.version}, expected "
            f"{planned.size:,} bytes {planned.version}); restore the file, or plan a new output"
        )


def read_groups(
    parquet: pq.ParquetFile,
    groups: Sequence[int],
    leaves: list[str],
    location: Location,
    most_rows: int = ID_ROWS,
    batch_bytes: int = BATCH_BYTES,
) -> Iterator[pa.RecordBatch]:
    """Whole row groups, `batch_bytes` (of all columns) and at most `most_rows` at a time. Raises InputError for damage,
    and where rows are missing."""
    for run in _runs(parquet, groups):
        expected = sum(parquet.metadata.row_group(group).num_rows for group in run)
        rows = min(most_rows, _batch_rows(parquet, run, batch_bytes))
        batches = parquet.iter_batches(rows, row_groups=run, columns=leaves)
        found = 0
        while True:
            with reading(location, f"row groups {run[0]} to {run[-1]}"):
                batch = next(batches, None)
            if batch is None:
                break
            found += batch.num_rows
            yield batch
        if found != expected:
            raise other_rows(found, expected, location)


def _runs(parquet: pq.ParquetFile, groups: Sequence[int]) -> Iterator[list[int]]:
    """Row groups that are read together: small ones, side by side. pyarrow holds what it has fetched of a run until its
    end, and cannot put dictionaries of two row groups together inside a struct."""
    run: list[int] = []
    size = 0
    alone = any(holds_dictionary(field.type) for field in parquet.schema_arrow)
    for group in groups:
        bytes_of = parquet.metadata.row_group(group).total_byte_size
        if run and (alone or size + bytes_of > STREAM_BYTES or group != run[-1] + 1):
            yield run
            run, size = [], 0
        run.append(group)
        size += bytes_of
    if run:
        yield run


def twice_read(row: int, rows: int, size: int) -> float:
    """Bytes of a row group of `rows` rows and `size` bytes that are read again where one task reads up to `row` and
    another from it on: what comes before, and what is fetched at once."""
    if size <= STREAM_BYTES:
        return size
    return min(size, size * row / rows + STREAM_BYTES / 2)


def holds_dictionary(kind: pa.DataType) -> bool:
    """Whether values of a type, or any inside them, are of a dictionary."""
    inside = (kind.field(index).type for index in range(kind.num_fields))
    return bool(pa.types.is_dictionary(kind)) or any(holds_dictionary(one) for one in inside)


def _batch_rows(parquet: pq.ParquetFile, groups: Sequence[int], batch_bytes: int) -> int:
    """How many rows of these row groups are about as many bytes."""
    size = sum(parquet.metadata.row_group(group).total_byte_size for group in groups)
    rows = sum(parquet.metadata.row_group(group).num_rows for group in groups)
    return max(1, int(batch_bytes * rows / max(1, size)))


def _group_bytes(parquet: pq.ParquetFile) -> list[int]:
    return [parquet.metadata.row_group(index).total_byte_size for index in range(parquet.metadata.num_row_groups)]


def group_rows(parquet: pq.ParquetFile) -> list[int]:
    """Rows of each row group."""
    return [parquet.metadata.row_group(index).num_rows for index in range(parquet.metadata.num_row_groups)]


def leaf_paths(parquet: pq.ParquetFile) -> list[str]:
    """The paths of the columns of values, e.g. candidates.list.element.doc_id."""
    return [parquet.schema.column(index).path for index in range(len(parquet.schema))]


def passed_types(
    location: Location, shard: Shard, layout: str, renamed: dict[str, str], passthrough: Sequence[str]
) -> dict[str, pa.DataType]:
    """The types in which columns of a planned shard are passed through. Raises InputError where it is another now, or
    has not got them."""
    check_planned(location, shard)
    with open_parquet(location) as parquet, reading(location, "the Parquet footer"):
        schema = parquet.schema_arrow
        return _passed_types(schema, find_columns(schema, layout, renamed, passthrough, str(location)))


def _passed_types(schema: pa.Schema, columns: Columns) -> dict[str, pa.DataType]:
    return {name: carried_type(_type_of(schema, columns, name)) for name in columns.passthrough}


def _type_of(schema: pa.Schema, columns: Columns, name: str) -> pa.DataType:
    if columns.layout == "nested" and columns.passthrough[name]:
        return schema.field(columns.names["candidates"]).type.value_type.field(name).type
    return schema.field(name).type
