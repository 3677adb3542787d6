"""Columns that the output has and the score files lack, read from the input once more: a job that is published with
`include_text` or another `passthrough` than it was scored with."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import pyarrow as pa

from batch_rerank.config import JobConfig
from batch_rerank.errors import InputError
from batch_rerank.input.hashes import asked_hashes, refuse_other_texts
from batch_rerank.input.unit_reader import read_units
from batch_rerank.publish.score_files import ScoreFiles
from batch_rerank.schema import PASSED
from batch_rerank.store.filesystem import locate
from batch_rerank.store.plans import Unit

if TYPE_CHECKING:
    from batch_rerank.publish.parts import PartWork

Rows = Iterator[tuple[Unit, pa.Table]]


def completed(
    scores: ScoreFiles, work: "PartWork", config: JobConfig, with_instructions: bool, extra: Sequence[str]
) -> Rows:
    """Units with score-file rows that have the columns `extra`, `text` or `+` and a name. Raises InputError where the
    input has to be read and is not the one that was scored."""
    columns = [_column(name) for name in extra]
    for shard, units in groupby(scores.read(work.units, wanted=columns), key=lambda pair: pair[0].shard):
        read: Rows | None = None
        for unit, rows in units:
            wanted = [name for name in extra if _column(name) not in rows.column_names]
            if not wanted:
                yield unit, rows
                continue
            read = read or _from_input(work, config, shard, [name for name in extra if name != "text"])
            found = next(rows for other, rows in read if other.id == unit.id)  # units before it may lack nothing
            same = rows["doc_id"].combine_chunks().equals(found["doc_id"].combine_chunks())
            if not same or not rows["query_id"].combine_chunks().equals(found["query_id"].combine_chunks()):
                raise InputError(f"{work.shards[shard].url}: other rows than were scored in unit {unit.id}")
            texts = found["text"].cast(pa.large_string())
            where = f"{work.shards[shard].url}: unit {unit.id}"
            advice = (
                f"{', '.join(wanted)} would be of another input; have it back as it was, or run the job on what there "
                "is now"
            )
            refuse_other_texts(rows, asked_hashes(found, with_instructions), texts, where, advice)
            for name in wanted:
                values = texts if name == "text" else found[_column(name)]
                rows = rows.append_column(_column(name), values)
            yield unit, rows


def _from_input(work: "PartWork", config: JobConfig, shard: int, passthrough: list[str]) -> Rows:
    planned = work.shards[shard]
    location = locate(planned.url, config.input.storage_options)
    units = [unit for unit in work.units if unit.shard == shard]
    given = config.input
    return read_units(location, planned, units, given.layout, given.columns, passthrough)


def _column(name: str) -> str:
    return name if name == "text" else f"{PASSED}{name}"
