"""Units of which little is left to score: committed where they were read, or scored together with others.

A unit that earlier outputs know in whole never reaches an actor. Of the others some go together as one until what they
have left is worth a unit, so that batches are as full as in a job that reuses nothing; their commits stay apart.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import pyarrow as pa

from batch_rerank.config import JobConfig
from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.engine.encoding import Encoder
from batch_rerank.engine.packing import Scored
from batch_rerank.score.read_unit import ReadRange, ReadUnit, read_range, read_ranges
from batch_rerank.score.reuse import Known, Reuse, asked_groups, recall
from batch_rerank.score.score_file import commit_unit
from batch_rerank.score.steps import EncodedUnit, Member, ScoredUnit, or_set_aside
from batch_rerank.store.plans import Plan
from batch_rerank.store.receipts import Receipt, SetAside

MOST_ROWS = 250_000
"""Candidates of units that go together: some 25 MB without their texts."""

NOTHING = Scored(np.empty(0, np.float32), np.empty(0, np.int32), np.empty(0, np.bool_), None)


@dataclass(frozen=True)
class Matched:
    """Units that needed no scoring, and how many pairs each of the others has left."""

    receipts: list[Receipt] = field(default_factory=list)
    misses: dict[str, int] = field(default_factory=dict)


def match_range(work: ReadRange, config: JobConfig, model: ModelSpec, fingerprint: str, reuse: Reuse) -> Matched:
    """Read some units, and commit those whose pairs have all been scored before. Raises InputError and StorageError."""
    found = Matched()
    for read in read_range(work, config, model):
        known = recall(read, reuse)
        misses = int((~known.found).sum())
        if misses:
            found.misses[read.unit.id] = misses
        else:
            found.receipts.append(commit_unit(_all_known(read, known, model), config, model, fingerprint))
    return found


def _all_known(read: ReadUnit, known: Known, model: ModelSpec) -> ScoredUnit:
    scores = known.merge(NOTHING, chunked=model.chunk_overlap is not None)
    return ScoredUnit(
        unit=read.unit,
        rows=read.rows,
        scores=scores.scores,
        n_tokens=scores.n_tokens,
        truncated=scores.truncated,
        offset=scores.offset,
        empty_texts=read.empty_texts,
        about={**read.about, **known.about},
    )


@dataclass(frozen=True)
class Bundling:
    """How the units that are left are scored. misses: pairs that each has to score; enough: pairs from which on units
    that go together are worth an actor's while, 1 for each alone."""

    reuse: Reuse
    misses: Mapping[str, int]
    enough: int

    def tasks(self, plan: Plan, done: frozenset[str]) -> list[list[ReadRange]]:
        """The units that are not done, in tasks of ranges that have `enough` pairs left together, or many rows."""
        tasks: list[list[ReadRange]] = []
        left = rows = 0
        for work in read_ranges(plan, done):
            if not tasks or left >= self.enough or rows >= MOST_ROWS:
                tasks.append([])
                left = rows = 0
            tasks[-1].append(work)
            left += sum(self.misses.get(unit.id, unit.pairs) for unit in work.units)
            rows += sum(unit.pairs for unit in work.units)
        return tasks


def read_bundles(
    works: Sequence[ReadRange], config: JobConfig, model: ModelSpec, reuse: Reuse, enough: int, encoder: Encoder
) -> Iterator[EncodedUnit | list[SetAside]]:
    """Units in bundles with `enough` pairs to score, encoded; alone, or set aside, where they cannot be encoded
    together. Raises InputError."""
    pending: list[tuple[ReadUnit, Known]] = []
    left = rows = 0
    for work in works:
        for read in read_range(work, config, model):
            known = recall(read, reuse)
            pending.append((read, known))
            left += int(known.asked.sum())
            rows += len(read.rows)
            if left >= enough or rows >= MOST_ROWS:
                yield from _encoded(pending, encoder)
                pending, left, rows = [], 0, 0
    if pending:
        yield from _encoded(pending, encoder)


def _encoded(pending: Sequence[tuple[ReadUnit, Known]], encoder: Encoder) -> Iterator[EncodedUnit | list[SetAside]]:
    made = or_set_aside([read.unit for read, _ in pending], partial(_encode, pending, encoder))
    if isinstance(made, list) and len(pending) > 1:
        for one in pending:
            yield from _encoded([one], encoder)
    else:
        yield made


def _encode(pending: Sequence[tuple[ReadUnit, Known]], encoder: Encoder) -> EncodedUnit:
    started = time.monotonic()
    groups = [group for read, known in pending for group in asked_groups(read.groups, known.asked)]
    encoded = encoder.encode(groups)
    seconds = round((time.monotonic() - started) / len(pending), 4)
    members = tuple(
        Member(read.unit, len(read.rows), read.empty_texts, {**read.about, **known.about, "encode_seconds": seconds})
        for read, known in pending
    )
    first = members[0].unit
    unit = replace(first, pairs=sum(one.unit.pairs for one in members))
    rows = pa.concat_tables([read.rows for read, _ in pending])
    known = Known.together([one for _, one in pending])
    return EncodedUnit(unit, rows, encoded, sum(one.empty_texts for one in members), {}, known, members)
