"""Score files to a part of the output: ranked, cut at top_k, flat or nested, in row groups of whole queries.

A part is a pure function of the plan, the publication and the score files, so whoever makes it makes the same; it is
created exclusively, in one request, and then its receipt.
"""

import io
import itertools
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

import batch_rerank
from batch_rerank.config import JobConfig
from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.errors import ConflictError, StorageError
from batch_rerank.input.carried import all_carried
from batch_rerank.publish.columns import completed
from batch_rerank.publish.nested import nest
from batch_rerank.publish.rank import rank
from batch_rerank.publish.score_files import Place, ScoreFiles
from batch_rerank.publish.trec import refuse_spaced
from batch_rerank.store.disk import uninterrupted
from batch_rerank.store.failures import UNREADABLE
from batch_rerank.store.filesystem import Location, locate, storage_errors
from batch_rerank.store.lease import check_epoch
from batch_rerank.store.manifest import Manifest, sha256
from batch_rerank.store.names import part_name
from batch_rerank.store.plans import Shard, Unit
from batch_rerank.store.receipts import PartReceipt
from batch_rerank.store.records import parse

ROW_GROUP_ROWS = 100_000
Int64 = npt.NDArray[np.int64]
Ranked = tuple[pa.Table, Int64]
"""Rows of whole queries, and the first row of each query."""


@dataclass(frozen=True)
class PartWork:
    """A part to be made. places: of the units whose scores are below `_scores/`; checksums: those of the receipts of
    the others; shards: those of the units; epoch: the lease under which it was begun."""

    number: int
    publication: str
    fingerprint: str
    units: list[Unit]
    places: Mapping[str, Place]
    checksums: Mapping[str, str]
    shards: Mapping[int, Shard]
    epoch: int


def publish_part(work: PartWork, config: JobConfig, model: ModelSpec) -> PartReceipt:
    """Make a part and its receipt, or find them there. `config.output` says how.

    Raises StorageError; InputError where a column has to be read from an input that changed; and ConflictError where
    another job has taken over: a part that was written late is taken back.
    """
    started = time.monotonic()
    manifest = Manifest(locate(config.output.path, config.output.storage_options, reached=True))
    data, rows = build(work, manifest, config, model)
    location = manifest.part(work.number)
    # a lost lease interrupts the driver that wakes, and what it wrote must be taken back all the same
    etag = uninterrupted(partial(_create, location, work, manifest, data))
    receipt = PartReceipt(
        part=part_name(work.number),
        publication=work.publication,
        rows=rows,
        size=len(data),
        sha256=sha256(data),
        etag=etag,
        at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        seconds=round(time.monotonic() - started, 3),
    )
    where = manifest.part_receipt(work.number)
    with storage_errors(where):
        if not where.create_exclusive(receipt.to_json()):
            receipt = _other_receipt(where, receipt, manifest, work)
    return receipt


def try_part(work: PartWork, config: JobConfig, model: ModelSpec) -> None:
    """Make a part and throw it away. Raises what `publish_part` raises for its scores and its input."""
    build(work, Manifest(locate(config.output.path, config.output.storage_options, reached=True)), config, model)


def build(work: PartWork, manifest: Manifest, config: JobConfig, model: ModelSpec) -> tuple[bytes, int]:
    """A part's bytes, and its rows: candidates, in either layout."""
    metadata = {
        "batch_rerank.version": batch_rerank.__version__,
        "batch_rerank.fingerprint": work.fingerprint,
        "batch_rerank.publication": work.publication,
        "batch_rerank.part": str(work.number),
        "batch_rerank.model": model.name,
        "batch_rerank.revision": model.revision or model.identity,
        "batch_rerank.template": model.template,
    }
    sink, writer, count = io.BytesIO(), None, 0
    for rows, starts in row_groups(ranked(work, manifest, config, model)):
        count += len(rows)
        table = nest(rows, starts) if config.output.layout == "nested" else rows
        table = table.replace_schema_metadata(metadata)
        writer = writer or pq.ParquetWriter(sink, table.schema, compression="zstd", write_page_checksum=True)
        writer.write_table(table, row_group_size=max(1, len(table)))
    assert writer is not None, "a part has a unit"
    writer.close()
    return sink.getvalue(), count


def ranked(work: PartWork, manifest: Manifest, config: JobConfig, model: ModelSpec) -> Iterator[Ranked]:
    """The output rows of each unit, and where its queries start."""
    output = config.output
    extra = [*(["text"] if output.include_text else []), *output.passthrough]
    scores = ScoreFiles(manifest, work.places, work.checksums)
    for unit, rows in completed(scores, work, config, model.takes_instruction, extra):
        if len(rows) != unit.pairs:
            raise StorageError(
                f"{manifest.root}: the score file of unit {unit.id} has {len(rows):,} rows, the plan {unit.pairs:,}; "
                "see batch-rerank verify --repair"
            )
        made, index = rank(all_carried(rows), model, output.top_k, extra)
        if output.trec_run:
            refuse_spaced(made)
        yield made, np.flatnonzero(np.diff(index, prepend=-1))


def row_groups(units: Iterator[Ranked]) -> Iterator[Ranked]:
    """The rows of units in tables of whole queries and about ROW_GROUP_ROWS, each with where its queries start; one
    table at least."""
    pending: list[Ranked] = []
    size = 0
    for rows, starts in units:
        for piece in _pieces(rows, starts):
            if pending and size + len(piece[0]) > ROW_GROUP_ROWS:
                yield _together(pending)
                pending, size = [], 0
            pending.append(piece)
            size += len(piece[0])
    yield _together(pending)


def _together(pieces: list[Ranked]) -> Ranked:
    firsts = itertools.accumulate((len(rows) for rows, _ in pieces), initial=0)
    starts = [starts + first for (_, starts), first in zip(pieces, firsts, strict=False)]
    return pa.concat_tables([rows for rows, _ in pieces]).combine_chunks(), np.concatenate(starts)


def _pieces(rows: pa.Table, starts: Int64) -> Iterator[Ranked]:
    """A unit's rows in pieces that begin with a query, of ROW_GROUP_ROWS at most unless a query has more."""
    borders = [*starts.tolist(), len(rows)]
    cuts = [0]
    for border, following in itertools.pairwise(borders):
        if following - cuts[-1] > ROW_GROUP_ROWS and border > cuts[-1]:
            cuts.append(border)
    for start, stop in itertools.pairwise([*cuts, len(rows)]):
        yield rows.slice(start, stop - start), starts[(starts >= start) & (starts < stop)] - start


def _create(location: Location, work: PartWork, manifest: Manifest, data: bytes) -> str:
    """Write a part, and its etag where its store has one. Raises ConflictError where the lease is lost."""
    with storage_errors(location):
        if not location.create_exclusive(data):
            _replace(location, work, manifest, data)
        try:
            check_epoch(manifest.root, work.epoch)
        except ConflictError:
            there = manifest.read_publication()
            # of the same publication whoever took over has made, or found, the same part, and counts on it
            if there is None or there.id != work.publication:
                location.take_back(data)
            raise
        return "" if location.is_local else location.stat().version


def _replace(location: Location, work: PartWork, manifest: Manifest, ours: bytes) -> None:
    """Put our part in the place of one of this job that is there: of an earlier publication, or of earlier scores,
    which a paused publisher wrote late. Whoever holds the lease has read what counts."""
    seen, data = location.stat(), location.read_bytes()
    try:
        metadata = pq.read_schema(io.BytesIO(data)).metadata or {}
    except UNREADABLE:
        metadata = {}
    if metadata.get(b"batch_rerank.fingerprint") != work.fingerprint.encode():
        raise StorageError(
            f"{location}: exists and cannot be read, or is not ours; expected this part; move it away and run again"
        )
    check_epoch(manifest.root, work.epoch)
    location.remove_seen(seen)
    if not location.create_exclusive(ours):
        raise ConflictError(f"{location}: written by another job meanwhile; run again when it has ended")


def _other_receipt(location: Location, ours: PartReceipt, manifest: Manifest, work: PartWork) -> PartReceipt:
    """The receipt that is there, replaced where it does not describe the part that is there now."""
    with suppress(ValueError):
        theirs = parse(PartReceipt, location.read_bytes())
        if (theirs.publication, theirs.sha256, theirs.size) == (ours.publication, ours.sha256, ours.size):
            return theirs
    check_epoch(manifest.root, work.epoch)
    location.write_bytes(ours.to_json())
    return ours
