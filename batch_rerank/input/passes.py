"""The passes of a stage, in this process or on Ray: what is not spread yet, then the shards that are not done."""

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

from batch_rerank.calls import Each
from batch_rerank.config import JobConfig
from batch_rerank.input.exchange import EXCHANGE, Gather, Note, Portion, Spread, gather, spread
from batch_rerank.input.join import Join
from batch_rerank.input.sources import Source
from batch_rerank.store.bookkeeping import Expected, status_of
from batch_rerank.store.filesystem import storage_errors
from batch_rerank.store.lease import Lease
from batch_rerank.store.manifest import Manifest
from batch_rerank.store.names import EXCHANGED
from batch_rerank.store.plans import Plan
from batch_rerank.store.receipts import Totals

log = logging.getLogger("batch_rerank")
T = TypeVar("T")
LOG_SECONDS = 10.0


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
    works = [
        Spread(index, source, piece, int(join.starts[index]), *join.wanted(index))
        for index, piece in enumerate(join.pieces)
    ]
    works = [work for work in works if len(work.rows)]
    notes = _whole(manifest, works, len(plan.units))
    pending = [work for work in works if work.name not in notes]
    progress = _Progress(manifest, plan, totals, lease)
    portions: list[list[Portion]] = [[] for _ in plan.units]
    for note in notes.values():
        _add_portions(portions, note)
    for note in each([partial(spread, work, config, str(root)) for work in pending]):
        progress.count("pieces of the sources read", len(pending), note.rows)
        totals.storage_retries += note.retries
        _add_portions(portions, note)
    progress = _Progress(manifest, plan, totals, lease)
    gathers = [
        partial(
            gather,
            Gather(unit, portions[int(unit.id)], join.details(unit)),
            config,
            str(root),
            plan.fingerprint,
        )
        for unit in units
    ]
    expected = Expected(manifest, plan, done)
    for receipt in each(gathers):
        if expected.take(receipt):
            totals.add(receipt)
            progress.count("shards written", len(units), receipt.rows_in)
    expected.check({})


def _whole(manifest: Manifest, works: Sequence[Spread], shards: int) -> dict[str, Note]:
    """The notes of the pieces that are in the exchange already, by piece; one whose files are not all there as it says
    is spread again."""
    files = manifest.list_files()
    found = {}
    for work in works:
        location = manifest.root / f"{EXCHANGE}/{work.name}.json"
        if files.size(f"{EXCHANGE}/{work.name}.json") is None:
            continue
        with storage_errors(location):
            note = Note.from_json(location.read_bytes())
        if note and all(
            files.size(f"{EXCHANGE}/{name}") == portions[-1][2] and all(shard < shards for shard, _, _ in portions)
            for name, portions in note.files
        ):
            found[work.name] = note
        else:
            log.warning("%s: the exchange is not whole there; the piece is spread again", location)
    return found


def _add_portions(portions: list[list[Portion]], note: Note) -> None:
    for name, found in note.files:
        for shard, start, stop in found:
            portions[shard].append(Portion(name, start, stop))


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
        for name in sorted(files.matching(EXCHANGED), key=lambda name: not name.endswith(".json")):
            manifest.remove_seen(name, files)
