"""The scores of an output, unit by unit, from wherever they are: its score files, or what was published of them.

Rows of a unit: `query_index int32` (which query of the unit), `query_id`, `doc_id`, `first_stage_rank int32`, `score
float64`, NaN where there is none, and `query_hash` and `text_hash` of what was scored, null where it is not known.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batch_rerank.config import JobConfig
from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.errors import InputError, StorageError
from batch_rerank.input.layouts import run_starts
from batch_rerank.input.unit_reader import read_units
from batch_rerank.publish.output import Place as OutputPlace
from batch_rerank.publish.output import config_of, model_of, open_output
from batch_rerank.publish.read_parts import read_checked_part
from batch_rerank.publish.score_files import Place, ScoreFiles
from batch_rerank.schema import QUERY_HASH, TEXT_HASH
from batch_rerank.store.filesystem import Options, locate
from batch_rerank.store.manifest import Manifest
from batch_rerank.store.plans import Plan, Shard, Unit
from batch_rerank.store.scan import Scan, scan
from batch_rerank.store.verdict import why_unfinished

COLUMNS = ["query_index", "query_id", "doc_id", "first_stage_rank"]


@dataclass(frozen=True)
class Source:
    """Some units of an output, and where their scores are. places and checksums: as of ScoreFiles; parts: of the output
    that have them where no score files do, with their sha256; shards: those of the units."""

    path: str
    options: Options
    config: JobConfig
    units: list[Unit]
    shards: Mapping[int, Shard]
    places: Mapping[str, Place]
    checksums: Mapping[str, str]
    parts: Mapping[int, str] = field(default_factory=dict)
    publication: str = ""


@dataclass(frozen=True)
class Opened:
    """A finished output. whole: it has a score file of every unit; cut: the depth to which it was published."""

    manifest: Manifest
    plan: Plan
    found: Scan = field(repr=False)
    config: JobConfig
    model: ModelSpec
    options: Options
    whole: bool
    cut: int | None

    def source(self, units: Sequence[Unit]) -> Source:
        """Some of its units."""
        names = {unit.id for unit in units}
        committed = [receipt for receipt in self.found.committed if receipt.unit in names]
        places = {one.unit: place for one in committed if (place := self.found.place(one)) is not None}
        made = Source(
            path=str(self.manifest.root),
            options=self.options,
            config=self.config,
            units=list(units),
            shards={unit.shard: replace(self.plan.shards[unit.shard], row_groups=()) for unit in units},
            places=places,
            checksums={one.unit: one.sha256 for one in committed if one.unit not in places},
        )
        if self.whole:
            return made
        publication = self.found.publication
        assert publication is not None, "seen when it was opened"
        at = [index for index, unit in enumerate(self.plan.units) if unit.id in names]
        parts = {
            number: self.found.parts[number].sha256
            for number, (first, last) in enumerate(publication.parts)
            if at and first <= at[-1] and last >= at[0]
        }
        return replace(made, parts=parts, publication=publication.id)


def open_scores(place: OutputPlace, depth: int | None) -> Opened:
    """Open an output whose scores are wanted down to a rank of each query, None for all. Raises InputError where it is
    unfinished or does not have them any more, and StorageError."""
    manifest, plan = open_output(place)
    if manifest.read_mark() is None:
        raise InputError(f"{manifest.root}: {why_unfinished(manifest)}, then export")
    found = scan(manifest, plan)
    there = {receipt.unit for receipt in found.committed}
    absent = [unit.id for unit in plan.units if unit.id not in there]
    if absent:
        raise InputError(
            f"{manifest.root}: {len(absent)} of {len(plan.units)} units are not as their receipts say, e.g. "
            f"{absent[0]} ({found.broken.get(absent[0], 'no receipt')}); expected a whole output; "
            "see batch-rerank verify --repair"
        )
    whole = all(found.available(manifest, receipt) for receipt in found.committed)
    cut: int | None = None
    if not whole:
        publication = found.publication
        if publication is None or found.condemned or len(found.parts) < len(publication.parts):
            raise InputError(f"{manifest.root}: neither scores nor whole parts; see batch-rerank verify --repair")
        cut = publication.fields.get("top_k")
        if cut is not None and (depth is None or depth > cut):
            wanted = "all candidates" if depth is None else f"ranks up to {depth}"
            raise InputError(
                f"{manifest.root}: has the {cut} best candidates of each query and no others (output.top_k: {cut}, and "
                f"output.keep_scores was false); the labels are drawn from {wanted}; set the last of "
                f"labels.negatives.ranks to {cut} at most, or run the job again with output.keep_scores: true, which "
                "keeps every score beside what is published"
            )
    return Opened(manifest, plan, found, config_of(plan, place), model_of(plan), place.options, whole, cut)


def read_scores(source: Source) -> Iterator[tuple[Unit, pa.Table]]:
    """Units in order, with their rows. Raises StorageError, and InputError where the input has to be read (for the ids
    of what was published without score files) and has changed."""
    manifest = Manifest(locate(source.path, source.options, reached=True))
    if source.parts:
        yield from _published(manifest, source)
        return
    for unit, rows in ScoreFiles(manifest, source.places, source.checksums).read(source.units, hashed=True):
        if len(rows) != unit.pairs:
            raise StorageError(
                f"{manifest.root}: the scores of unit {unit.id} have {len(rows):,} rows, the plan {unit.pairs:,}; "
                "see batch-rerank verify --repair"
            )
        yield unit, _plain(rows)


def _plain(rows: pa.Table) -> pa.Table:
    score = pc.fill_null(pc.cast(rows["score"], pa.float64()), float("nan"))
    plain = rows.select(COLUMNS).append_column("score", score)
    for name in (QUERY_HASH, TEXT_HASH):
        there = name in rows.column_names
        plain = plain.append_column(name, rows[name] if there else pa.nulls(len(rows), pa.uint64()))
    return plain.combine_chunks()


def _published(manifest: Manifest, source: Source) -> Iterator[tuple[Unit, pa.Table]]:
    """The published rows of each unit, found by the ids of its queries."""
    wanted = ["query_id", "doc_id", "first_stage_rank", "score"]
    tables = []
    for number, checksum in source.parts.items():
        tables += list(read_checked_part(manifest.part(number), checksum, wanted))
    rows = pa.concat_tables(tables).combine_chunks() if tables else None
    starts = run_starts(rows["query_id"].combine_chunks()) if rows is not None else np.empty(0, np.int64)
    names = [] if rows is None else rows["query_id"].take(pa.array(starts)).to_pylist()
    lengths = np.diff(np.append(starts, 0 if rows is None else len(rows)))
    at = {name: place for place, name in enumerate(names)}
    for unit, ids in unit_ids(source):
        found = [at[name] for name in ids if name in at]
        take = np.concatenate([np.arange(starts[one], starts[one] + lengths[one]) for one in found] or [starts[:0]])
        if rows is None:
            continue
        index = np.repeat(np.arange(len(found)), lengths[found])
        mine = rows.take(pa.array(take)).append_column("query_index", pa.array(index, pa.int32()))
        yield unit, _plain(mine)


def unit_ids(source: Source) -> Iterator[tuple[Unit, list[str]]]:
    """The queries of each unit that have candidates, by the input's ids."""
    given = source.config.input
    for shard, units in groupby(source.units, key=lambda unit: unit.shard):
        planned = source.shards[shard]
        location = locate(planned.url, given.storage_options, reached=True)
        for unit, rows in read_units(location, planned, list(units), given.layout, given.columns, [], ids_only=True):
            ids = rows["query_id"].combine_chunks()
            yield unit, ids.take(pa.array(run_starts(ids))).to_pylist()
