"""The passes of a stage, in this process or on Ray: what is not spread yet, then the shards that are not done."""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from batch_rerank.calls import Each
from batch_rerank.config import JobConfig
from batch_rerank.input.exchange import EXCHANGE, Gather, Spread, gather, spread
from batch_rerank.input.join import Join
from batch_rerank.input.notes import Note, Portions, data_name, note_name, of_shards
from batch_rerank.input.sources import Source
from batch_rerank.store.bookkeeping import Expected, status_of
from batch_rerank.store.filesystem import storage_errors
from batch_rerank.store.lease import Lease
from batch_rerank.store.manifest import Manifest
from batch_rerank.store.names import EXCHANGED
from batch_rerank.store.plans import Plan, Unit
from batch_rerank.store.receipts import Totals

log = logging.getLogger("batch_rerank")
LOG_SECONDS = 10.0
SHARDS_AT_ONCE = 1000
"""Whose portions are looked up together."""


def run_passes(
    config: JobConfig,
    manifest: Manifest,
    plan: Plan,
    join: Join,
    sources: Sequence[Source],
    done: frozenset[str],
    totals: Totals,
    lease: Lease,
    each: Each,
) -> None:
    """Spread what is not spread yet, then gather the shards that are not done."""
    units = [unit for unit in join.units if unit.id not in done]
    if not units:
        return
    root = manifest.root
    source = replace(sources[-1], files=[], groups=[])  # goes along with every task
    needed = np.flatnonzero(join.needed).tolist()
    notes = _whole(manifest, needed, len(plan.units))
    pending = [piece for piece in needed if piece not in notes]
    progress = _Progress(manifest, plan, totals, lease)
    portions = [note.portions for note in notes.values()]
    works = (  # made as they are run: together they would be as large as the run
        Spread(piece, source, join.pieces[piece], int(join.starts[piece]), *join.wanted(piece)) for piece in pending
    )
    for note in each(partial(spread, work, config, str(root)) for work in works):
        progress.count("pieces of the sources read", len(pending), note.rows)
        totals.storage_retries += note.retries
        portions.append(note.portions)
    progress = _Progress(manifest, plan, totals, lease)
    gathers = (partial(gather, work, config, str(root), plan.fingerprint) for work in _gathers(units, join, portions))
    expected = Expected(manifest, plan, done)
    for receipt in each(gathers):
        if expected.take(receipt):
            totals.add(receipt)
            progress.count("shards written", len(units), receipt.rows_in)
    expected.check({})


def _gathers(units: Sequence[Unit], join: Join, portions: list[Portions]) -> Iterator[Gather]:
    """What each shard's task needs, made as it is asked for."""
    for start in range(0, len(units), SHARDS_AT_ONCE):
        some = units[start : start + SHARDS_AT_ONCE]
        here = of_shards(portions, int(some[0].id), int(some[-1].id) + 1)
        for unit in some:
            first, last = np.searchsorted(here["shard"], [int(unit.id), int(unit.id) + 1])
            yield Gather(unit, here[first:last], join.details(unit))


def _whole(manifest: Manifest, needed: Sequence[int], shards: int) -> dict[int, Note]:
    """The notes of the pieces that are in the exchange already, by piece; one whose files are not all there as it says,
    or that an earlier version has written, is spread again."""
    files = manifest.list_files()
    found = {}
    for piece in needed:
        location = manifest.root / f"{EXCHANGE}/{note_name(piece)}"
        if files.size(f"{EXCHANGE}/{note_name(piece)}") is None:
            if files.size(f"{EXCHANGE}/{piece:05d}.json") is not None:
                log.info("%s: the exchange is of an earlier version; piece %d is spread again", manifest.root, piece)
            continue
        with storage_errors(location):
            note = Note.from_bytes(location.read_bytes(), piece, shards)
        sizes = note.sizes() if note else []
        if note and all(files.size(f"{EXCHANGE}/{data_name(piece, i)}") == size for i, size in enumerate(sizes)):
            found[piece] = note
        else:
            log.warning("%s: the exchange is not whole there; the piece is spread again", location)
    return found


class _Progress:
    """Says every few seconds how far a pass is, and looks at the lease."""

    def __init__(self, manifest: Manifest, plan: Plan, totals: Totals, lease: Lease) -> None:
        self._manifest, self._plan, self._totals, self._lease = manifest, plan, totals, lease
        self._next = time.monotonic() + LOG_SECONDS
        self._done = self._rows = 0

    def count(self, what: str, of: int, rows: int) -> None:
        self._done, self._rows = self._done + 1, self._rows + rows
        if self._lease.lost:
            self._lease.check()
        if time.monotonic() >= self._next or self._done == of:
            self._next = time.monotonic() + LOG_SECONDS
            log.info("staging: %d of %d %s, %s rows", self._done, of, what, f"{self._rows:,}")
            self._manifest.write_status(status_of("running", self._plan, self._totals, self._lease))


def clean(manifest: Manifest) -> None:
    """Remove the exchange: notes first, so that none is left that promises what is gone."""
    with storage_errors(manifest.root):
        files = manifest.list_files()
        for name in sorted(files.matching(EXCHANGED), key=lambda name: name.endswith(".arrows")):
            manifest.remove_seen(name, files)
