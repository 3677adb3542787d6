"""Units out of their shard: each row group is read once, in order and some MB at a time, whatever its size."""

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from statistics import median

import pyarrow as pa
import pyarrow.parquet as pq

from batch_rerank.input.canonical import candidates, whole
from batch_rerank.input.layouts import TEXTS, Columns, find_columns
from batch_rerank.input.shards import (
    check_planned,
    check_unchanged,
    group_rows,
    holds_dictionary,
    leaf_paths,
    open_parquet,
    other_rows,
    probe,
    read_groups,
    reading,
)
from batch_rerank.store.filesystem import Location
from batch_rerank.store.plans import Shard, Unit

INDEX_BYTES = 4
"""Of a dictionary's index, at most."""

DICTIONARY_UNITS = 4
"""Units in a batch with dictionaries: pyarrow copies a row group's dictionary for every batch."""


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

    Reads the row groups that hold them, each once. Raises InputError where the file is damaged, or is not the one that
    was planned, at open or after the last read.
    """
    opened = check_planned(location, shard)
    found: list[Columns] = []

    def texts(parquet: pq.ParquetFile) -> list[str]:
        columns = find_columns(parquet.schema_arrow, layout, renamed, passthrough, str(location))
        found.append(columns.without(TEXTS) if ids_only else columns)
        return [] if ids_only else _worth_a_dictionary(parquet, columns, units)

    with open_parquet(location, texts) as parquet:
        (columns,) = found
        for unit, pieces in _cut(_batches(parquet, columns, units, location), columns, units, location):
            with reading(location, f"unit {unit.id} (rows {unit.start} to {unit.stop})"):
                rows = whole(pieces, columns, str(location))
                rows.validate(full=True)  # Parquet promises UTF-8 and does not check it
            yield unit, rows
    check_unchanged(location, opened)


def _cut(
    batches: Iterator[tuple[int, pa.RecordBatch]], columns: Columns, units: Sequence[Unit], location: Location
) -> Iterator[tuple[Unit, list[pa.Table]]]:
    """The candidates of each unit, out of batches that begin at the given rows; what no unit wants is dropped."""
    start, batch = next(batches, (0, None))
    for unit in units:
        pieces = []
        at = unit.start
        while at < unit.stop:
            if batch is None or start > at:
                raise other_rows(at, unit.stop, location)
            if start + batch.num_rows <= at:
                start, batch = next(batches, (0, None))
                continue
            stop = min(unit.stop, start + batch.num_rows)
            with reading(location, f"unit {unit.id} (rows {unit.start} to {unit.stop})"):
                pieces.append(candidates(batch.slice(at - start, stop - at), columns, at - unit.start))
            at = stop
        yield unit, pieces


def _batches(
    parquet: pq.ParquetFile, columns: Columns, units: Sequence[Unit], location: Location
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """The row groups that hold units, in batches of about a unit, each with its first row: what a dictionary in the
    file makes small is as large as its texts once it is decoded."""
    borders = list(accumulate(group_rows(parquet), initial=0))
    wanted = [name for name in columns.names if name != "candidates"]
    leaves = columns.leaves(leaf_paths(parquet), wanted, passed=True)
    most = _unit_rows(units) * (DICTIONARY_UNITS if _has_dictionaries(parquet) else 1)
    for groups in _side_by_side(_touched(borders, units)):
        row = borders[groups[0]]
        for batch in read_groups(parquet, groups, leaves, location, most):
            yield row, batch
            row += batch.num_rows


def _touched(borders: Sequence[int], units: Sequence[Unit]) -> list[int]:
    """Row groups that hold rows of these units."""
    groups = []
    unit = iter(units)
    one = next(unit, None)
    for group, (start, stop) in enumerate(pairwise(borders)):
        while one is not None and one.stop <= start:
            one = next(unit, None)
        if one is not None and one.start < stop and start < stop:
            groups.append(group)
    return groups


def _side_by_side(groups: Sequence[int]) -> Iterator[list[int]]:
    run: list[int] = []
    for group in groups:
        if run and group != run[-1] + 1:
            yield run
            run = []
        run.append(group)
    if run:
        yield run


def _unit_rows(units: Sequence[Unit]) -> int:
    return max(1, int(median(unit.stop - unit.start for unit in units)))


def _has_dictionaries(parquet: pq.ParquetFile) -> bool:
    return any(holds_dictionary(field.type) for field in parquet.schema_arrow)


def _worth_a_dictionary(parquet: pq.ParquetFile, columns: Columns, units: Sequence[Unit]) -> list[str]:
    """Leaves of texts that stay dictionaries: those that are nothing else in all row groups that hold units. A column
    that a writer began with a dictionary and ended without would gather all its texts in memory.

    Not where row groups hold few units: with dictionaries they are read one by one.
    """
    borders = list(accumulate(group_rows(parquet), initial=0))
    groups = _touched(borders, units)
    rows = sum(borders[group + 1] - borders[group] for group in groups)
    if rows < 2 * DICTIONARY_UNITS * _unit_rows(units) * len(groups):
        return []
    paths = leaf_paths(parquet)
    texts = columns.leaves(paths, [name for name in TEXTS if name in columns.names])
    return [path for path in texts if all(_only_indices(parquet, group, paths, path) for group in groups)]


def _only_indices(parquet: pq.ParquetFile, group: int, paths: Sequence[str], path: str) -> bool:
    """Whether the values behind a column chunk's dictionary take no more bytes than indices do."""
    probe(parquet, group, path)
    chunk = parquet.metadata.row_group(group).column(paths.index(path))
    if not chunk.has_dictionary_page or chunk.dictionary_page_offset is None:
        return False
    behind = chunk.total_compressed_size - (chunk.data_page_offset - chunk.dictionary_page_offset)
    return bool(behind <= INDEX_BYTES * chunk.num_values + 1024)
