"""A unit's canonical rows to what is scored: groups of texts, and the rows that wait for their scores."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batch_rerank.config import JobConfig
from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.engine.encoded import Group
from batch_rerank.store.filesystem import locate
from batch_rerank.store.manifest import Plan
from batch_rerank.store.shards import Shard, Unit, read_units

NULL_QUERY = "query is null"
NULL_TEXT = "text is null"


@dataclass(frozen=True)
class ReadUnit:
    """A unit after reading: `rows` without texts (unless the output includes them) and with `error`, which is null for
    the rows that are scored; `groups` hold the texts of those rows, in row order; `retries`: repeated requests."""

    unit: Unit
    rows: pa.Table
    groups: list[Group]
    empty_texts: int
    retries: int = 0


@dataclass(frozen=True)
class ReadRange:
    """Units of one shard whose row groups are read together: one read task."""

    shard: Shard
    units: list[Unit]


def read_ranges(plan: Plan, done: frozenset[str]) -> list[ReadRange]:
    """The units that are not done, as ranges of at most RANGE_UNITS units of one shard, in order.

    A unit that is much larger than the others is a range of its own, and such ranges come first: nothing waits behind
    it, and it is not the last one running.
    """
    wanted = [unit for unit in plan.units if unit.id not in done]
    large = LARGE_UNITS * max(1, sum(unit.pairs for unit in wanted)) / max(1, len(wanted))
    first = [ReadRange(plan.shards[unit.shard], [unit]) for unit in wanted if unit.pairs > large]
    ranges = []
    for shard, units in groupby((unit for unit in wanted if unit.pairs <= large), key=lambda unit: unit.shard):
        pending = list(units)
        for start in range(0, len(pending), RANGE_UNITS):
            ranges.append(ReadRange(plan.shards[shard], pending[start : start + RANGE_UNITS]))
    return first + ranges


RANGE_UNITS = 8
"""Units of a read task: enough to decode a row group for several units, few enough to spread a large shard."""


LARGE_UNITS = 4
"""Times the mean of the units that are left, above which one is large."""


def read_range(work: ReadRange, config: JobConfig, model: ModelSpec) -> Iterator[ReadUnit]:
    """Read the units of a range, each row group once. Raises InputError."""
    location = locate(work.shard.url, config.input.storage_options, reached=True)
    names = (config.input.layout, config.input.columns, config.output.passthrough)
    before = 0
    for unit, rows in read_units(location, work.shard, work.units, *names):
        read = prepare(unit, rows, model.takes_instruction, config.output.include_text)
        yield replace(read, retries=location.patience.retries - before)
        before = location.patience.retries


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
    return ReadUnit(unit, kept.append_column("error", error), groups, empty)


def _groups(rows: pa.Table, takes_instruction: bool) -> list[Group]:
    index = rows["query_index"].to_numpy()
    starts = np.flatnonzero(np.diff(index, prepend=-1)).tolist()
    queries, texts = rows["query"], _texts(rows["text"])
    instructions = rows["instruction"]
    groups = []
    for start, stop in pairwise([*starts, len(texts)]):
        instruction = _first_text(instructions.slice(start, stop - start)) if takes_instruction else None
        groups.append(Group(queries[start].as_py(), texts[start:stop], instruction))
    return groups


def _texts(column: pa.ChunkedArray) -> list[str]:
    """One string for each row; the rows of one dictionary value share it."""
    if not pa.types.is_dictionary(column.type):
        return cast(list[str], column.to_pylist())
    texts: list[str] = []
    for chunk in column.chunks:  # a unit's own values: the dictionary is that of its whole row group
        used, index = np.unique(chunk.indices.to_numpy(), return_inverse=True)
        values = chunk.dictionary.take(pa.array(used)).to_pylist()
        texts += [values[one] for one in index.tolist()]
    return texts


def _first_text(values: pa.ChunkedArray) -> str | None:
    """The query's instruction: flat rows carry it on every row, some of them null."""
    present: Sequence[str] = values.drop_null().slice(0, 1).to_pylist()
    return present[0] if present else None
