"""A unit's canonical rows to what is scored: groups of texts, and the rows that wait for their scores."""

import time
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import accumulate, groupby, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batch_rerank.config import JobConfig
from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.engine.encoded import Group
from batch_rerank.input.hashes import first_text, query_hashes, text_hashes
from batch_rerank.input.shards import twice_read
from batch_rerank.input.unit_reader import read_units
from batch_rerank.schema import NULL_QUERY, NULL_TEXT, QUERY_HASH, TEXT_HASH
from batch_rerank.store.filesystem import locate
from batch_rerank.store.plans import Plan, Shard, Unit


@dataclass(frozen=True)
class ReadUnit:
    """A unit after reading: `rows` without texts (unless the output includes them) and with `error`, which is null for
    the rows that are scored; `groups` hold the texts of those rows, in row order; `about`: fields of its receipt."""

    unit: Unit
    rows: pa.Table
    groups: list[Group]
    empty_texts: int
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ReadRange:
    """Units of one shard that are read one after the other: one read task."""

    shard: Shard
    units: list[Unit]


RANGE_UNITS = 8
"""Units of a read task at least, where its shard has as many: a task costs Ray some 10 ms."""

TWICE = 0.1
"""Of what a read task reads, the share that the next task may read again to begin inside a row group."""

LARGE_UNITS = 4
"""Times the mean of the units that are left, above which one is large."""


def read_ranges(plan: Plan, done: frozenset[str]) -> list[ReadRange]:
    """The units that are not done, in ranges of one shard, cut where little is read twice: between row groups. Units
    are given on as they are read, so a row group of any size feeds many actors.

    Ranges with a unit that is much larger than the others come first: it is not the last one running.
    """
    wanted = plan.left(done)
    large = LARGE_UNITS * max(1, sum(unit.pairs for unit in wanted)) / max(1, len(wanted))
    ranges = []
    for index, units in groupby(wanted, key=lambda unit: unit.shard):
        shard = plan.shards[index]
        ranges += [ReadRange(replace(shard, row_groups=()), cut) for cut in _cut(list(units), shard)]
    return sorted(ranges, key=lambda work: all(unit.pairs <= large for unit in work.units))


def _cut(units: list[Unit], shard: Shard) -> Iterator[list[Unit]]:
    borders = list(accumulate((rows for rows, _ in shard.row_groups), initial=0))
    pending: list[Unit] = []
    for unit in units:
        if len(pending) >= RANGE_UNITS and shard.row_groups:
            group = bisect_right(borders, unit.start) - 1
            rows, size = shard.row_groups[group]
            shared = pending[-1].stop > borders[group]
            twice = twice_read(unit.start - borders[group], rows, size) if shared else 0
            first = bisect_right(borders, pending[0].start) - 1
            if twice <= TWICE * sum(size for _, size in shard.row_groups[first:group]):
                yield pending
                pending = []
        pending.append(unit)
    if pending:
        yield pending


def read_range(work: ReadRange, config: JobConfig, model: ModelSpec) -> Iterator[ReadUnit]:
    """Read the units of a range, each row group once. Raises InputError."""
    location = locate(work.shard.url, config.input.storage_options, reached=True)
    names = (config.input.layout, config.input.columns, config.output.passthrough)
    before, started = 0, time.monotonic()
    for unit, rows in read_units(location, work.shard, work.units, *names):
        read = prepare(unit, rows, model.takes_instruction, config.output.include_text)
        read.about["storage_retries"] = location.patience.retries - before
        read.about["read_seconds"] = round(time.monotonic() - started, 4)
        yield read
        before, started = location.patience.retries, time.monotonic()


def prepare(unit: Unit, rows: pa.Table, takes_instruction: bool, include_text: bool) -> ReadUnit:
    """Take the texts out of canonical rows. A null query or text becomes the row's error; an empty text is scored."""
    null_text = pc.if_else(pc.is_null(rows["text"]), NULL_TEXT, pa.scalar(None, pa.string()))
    error = pc.if_else(pc.is_null(rows["query"]), NULL_QUERY, null_text)
    good = rows.filter(pc.is_null(error))
    groups = _groups(good, takes_instruction)
    empty = sum(text == "" for group in groups for text in group.documents)
    if include_text:
        rows = rows.set_column(rows.column_names.index("text"), "text", rows["text"].cast(pa.large_string()))
    kept = rows.drop_columns(["query", "instruction"] if include_text else ["query", "instruction", "text"])
    scored = pc.is_null(error).to_numpy()
    asked = query_hashes([(group.query, group.instruction) for group in groups])
    of_query = np.repeat(asked, [len(group.documents) for group in groups])
    for name, hashes in ((QUERY_HASH, of_query), (TEXT_HASH, text_hashes(good["text"]))):
        kept = kept.append_column(name, spread(hashes, scored, pa.uint64()))
    return ReadUnit(unit, kept.append_column("error", error), groups, empty)


def spread(values: npt.NDArray[Any], scored: npt.NDArray[np.bool_], kind: pa.DataType) -> pa.Array:
    """Values of the scored rows at their places among all rows, null elsewhere."""
    full = np.zeros(len(scored), values.dtype)
    full[scored] = values
    return pa.array(full, kind, mask=~scored)


def _groups(rows: pa.Table, takes_instruction: bool) -> list[Group]:
    index = rows["query_index"].to_numpy()
    starts = np.flatnonzero(np.diff(index, prepend=-1)).tolist()
    queries, texts = rows["query"], _texts(rows["text"])
    instructions = rows["instruction"]
    groups = []
    for start, stop in pairwise([*starts, len(texts)]):
        instruction = first_text(instructions.slice(start, stop - start)) if takes_instruction else None
        groups.append(Group(queries[start].as_py(), texts[start:stop], instruction))
    return groups


def _texts(column: pa.ChunkedArray) -> list[str]:
    """One string for each row; the rows of one dictionary value share it."""
    texts: list[str] = []
    for chunk in column.chunks:
        values = chunk.dictionary.to_pylist()
        texts += [values[one] for one in chunk.indices.to_pylist()]
    return texts
