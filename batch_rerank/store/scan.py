"""What of an output is done: its listing held against receipts, which are alone or rolled up, and the publication.

A unit is done if and only if its receipt is there and its scores are: in its file, which has the receipt's size, or in
a whole file below `_scores/` with the receipt's checksum, or, where they were not kept, published in a whole part.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field

from batch_rerank.errors import StorageError
from batch_rerank.store.kept import pairs_name, queries_name
from batch_rerank.store.manifest import PUBLICATION, Manifest, scores_receipt_name
from batch_rerank.store.names import NOTE, ROLL, SCORES, Files, part_name, receipt_name
from batch_rerank.store.plans import Plan
from batch_rerank.store.receipts import PartReceipt, Publication, Receipt, ScoresReceipt, unroll
from batch_rerank.store.rolls import write_roll

WORKERS = 16
"""Requests at once."""

FOUND_DAMAGED = "verify has found it damaged"

Held = dict[str, list[tuple[str, int, str]]]
"""Where units are below `_scores/`: file, row group, checksum; the newest file first."""


@dataclass(frozen=True)
class Scan:
    """An output as a listing shows it. broken: units with a receipt that does not fit, and why; loose: receipts that
    are alone; rolled: the units of each roll; held: what is below `_scores/`; spoiled: files there that
    `verify --repair` has found damaged; publication and parts: what is published and whole; withdrawn: notes of
    publications that are taken back, with their ids."""

    files: Files
    committed: list[Receipt] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    loose: dict[str, bytes] = field(default_factory=dict)
    rolled: dict[str, list[str]] = field(default_factory=dict)
    held: Held = field(default_factory=dict)
    publication: Publication | None = None
    parts: dict[int, PartReceipt] = field(default_factory=dict)
    spoiled: list[str] = field(default_factory=list)
    withdrawn: dict[str, str] = field(default_factory=dict)

    @property
    def condemned(self) -> bool:
        """Whether somebody has begun to take back what is published: no `_SUCCESS` and no part of it counts."""
        return self.publication is not None and self.publication.id in self.withdrawn.values()

    def set_aside(self) -> list[str]:
        """Units that could not be scored."""
        done = {receipt.unit for receipt in self.committed}
        return [unit for unit in self.files.units_within("_manifest/failures") if unit not in done]

    def available(self, manifest: Manifest, receipt: Receipt) -> bool:
        """Whether a unit's scores are there still, and not only what was published of them."""
        return manifest.unit_name(receipt.unit) in self.files.found or self.place(receipt) is not None

    def place(self, receipt: Receipt) -> tuple[str, int] | None:
        """The file below `_scores/` that has a unit, and its row group there."""
        found = (one for one in self.held.get(receipt.unit, ()) if one[2] == receipt.sha256)
        return next(((name, group) for name, group, _ in found), None)

    def places(self) -> dict[str, tuple[str, int]]:
        """The same of every unit that has one."""
        return {one.unit: place for one in self.committed if (place := self.place(one)) is not None}


def scan(manifest: Manifest, plan: Plan) -> Scan:
    """What is committed and what is not as it should be, as far as a listing shows; checksums are `verify`'s work.
    One listing, receipts concurrently."""
    files = manifest.list_files()
    alone = {receipt_name(unit.id): unit.id for unit in plan.units}
    names = [name for name in files.within("_manifest/receipts") if name in alone]
    rolls, scores, notes = files.matching(ROLL), files.matching(SCORES), files.matching(NOTE)
    with ThreadPoolExecutor(WORKERS) as pool:
        loose = {alone[name]: body for name, body in zip(names, pool.map(manifest.read, names), strict=True)}
        rolled, told = _read_rolls(manifest, rolls, pool)
        receipts = dict(zip(scores, pool.map(manifest.read_scores_receipt, scores), strict=True))
        damaged = dict(zip(notes, pool.map(manifest.read, notes), strict=True))
        publication = None if manifest.staged else manifest.read_publication()
        if publication is not None and not _is_of(publication, plan):
            raise StorageError(f"{manifest.root / PUBLICATION}: of another job, or damaged; delete it and run again")
        parts = {} if publication is None else manifest.read_part_receipts(publication, files, pool)

    def is_damaged(name: str, *files_of: str) -> bool:
        noted = damaged.get(note_name(name)) if damaged else None
        return noted is not None and noted == evidence(files, files_of)

    parts = {number: part for number, part in parts.items() if not is_damaged(part.part, *part_files(number))}
    spoiled = [name for name in scores if is_damaged(name, name)]
    held = _held(files, plan, {name: receipt for name, receipt in receipts.items() if name not in spoiled})
    withdrawn = manifest.read_withdrawn(files)
    found = Scan(
        files,
        loose=loose,
        rolled=rolled,
        held=held,
        publication=publication,
        parts=parts,
        spoiled=spoiled,
        withdrawn=withdrawn,
    )
    published = {
        unit.id
        for number in parts
        for unit in plan.units[publication.parts[number][0] : publication.parts[number][1] + 1]  # type: ignore[union-attr]
    }
    told |= {unit: _receipt_of(unit, body) for unit, body in loose.items()}
    for unit in plan.units:
        if unit.id not in told:
            continue
        receipt = _fitting(manifest, found, plan.fingerprint, unit.id, told[unit.id], unit.id in published)
        if isinstance(receipt, Receipt) and is_damaged(unit.id, *unit_files(manifest, unit.id)):
            receipt = FOUND_DAMAGED
        if isinstance(receipt, Receipt):
            found.committed.append(receipt)
        else:
            found.broken[unit.id] = receipt
    return found


def _read_rolls(
    manifest: Manifest, rolls: Sequence[str], pool: Executor
) -> tuple[dict[str, list[str]], dict[str, Receipt | None]]:
    """The units of each roll, and their receipts; of those in several the last one's. Some rolls at a time: their
    content is larger than what is read of it."""
    units: dict[str, list[str]] = {}
    receipts: dict[str, Receipt | None] = {}
    for at in range(0, len(rolls), WORKERS):
        some = rolls[at : at + WORKERS]
        for name, data in zip(some, pool.map(manifest.read, some), strict=True):
            read = {unit: _receipt_of(unit, body) for unit, body in unroll(data).items()}
            units[name] = list(read)
            receipts |= read
    return units, receipts


def _receipt_of(unit_id: str, body: bytes) -> Receipt | None:
    """None where it cannot be read."""
    try:
        return Receipt.from_json(body, receipt_name(unit_id))
    except StorageError:
        return None


def _is_of(publication: Publication, plan: Plan) -> bool:
    """Whether its parts are all units of the plan, each once."""
    borders = [-1, *(border for first, last in publication.parts for border in (first - 1, last)), len(plan.units) - 1]
    whole = all(one == other for one, other in zip(borders[::2], borders[1::2], strict=True))
    return publication.fingerprint == plan.fingerprint and whole and borders == sorted(borders)


def _held(files: Files, plan: Plan, receipts: dict[str, ScoresReceipt | None]) -> Held:
    held: Held = {}
    for name in sorted(receipts, reverse=True):
        receipt, seen = receipts[name], files.found[name]
        if receipt is None or (receipt.fingerprint, receipt.size) != (plan.fingerprint, seen.size):
            continue
        if receipt.etag not in ("", seen.version):
            continue
        for group, (unit, checksum) in enumerate(receipt.units):
            held.setdefault(unit, []).append((name, group, checksum))
    return held


def _fitting(
    manifest: Manifest, found: Scan, fingerprint: str, unit_id: str, receipt: Receipt | None, published: bool
) -> Receipt | str:
    """A unit's receipt, or what is wrong with it or its file."""
    if receipt is None:
        return "its receipt cannot be read"
    if (receipt.unit, receipt.fingerprint) != (unit_id, fingerprint):
        return "its receipt is of another unit or job"
    if found.place(receipt) is not None:
        return receipt
    file = found.files.found.get(manifest.unit_name(unit_id))
    what = "part" if manifest.staged else "score file"
    if file is None:
        return receipt if published else f"its {what} is missing"
    if file.size != receipt.size:
        return f"its {what} has {file.size:,} bytes, its receipt says {receipt.size:,}"
    if receipt.etag and receipt.etag != file.version:
        return f"its {what} was replaced after it was committed (another etag)"
    return receipt


def note_name(name: str) -> str:
    """Where it says that a unit, a part or a file of scores is damaged: `_manifest/damaged/part-00000.json`."""
    return f"_manifest/damaged/{name.removesuffix('.parquet').replace('_scores/', 'scores-')}.json"


def unit_files(manifest: Manifest, unit_id: str) -> list[str]:
    """The files of a unit that can be damaged."""
    return [manifest.unit_name(unit_id), receipt_name(unit_id)]


def part_files(number: int) -> list[str]:
    """The files of a part."""
    return [part_name(number), f"_manifest/parts/{number:05d}.json"]


def evidence(files: Files, names: Iterable[str]) -> bytes:
    """Which versions of some files a listing shows: what `verify --repair` notes where they are damaged, so that the
    note says nothing of files that take their places."""
    seen = [files.found.get(name) for name in names]
    return json.dumps([file and [file.size, file.version] for file in seen]).encode()


def discard(manifest: Manifest, found: Scan, unit_ids: Iterable[str]) -> None:
    """Make units not done: remove their files, as far as they are still those that a listing showed. Receipts go behind
    their files: one without its file shows in the next listing, where a damaged file without a receipt would not."""
    gone = set(unit_ids)
    for unit_id in gone:
        for name in (f"_manifest/failures/{unit_id}.json", *unit_files(manifest, unit_id)):
            manifest.remove_seen(name, found.files)
    for name, units in found.rolled.items():
        if not gone.isdisjoint(units):
            kept = [body for unit, body in unroll(manifest.read(name)).items() if unit not in gone]
            if kept:
                write_roll(manifest, kept, found.files)
            manifest.remove_seen(name, found.files)
    for unit_id in gone:
        manifest.remove_seen(note_name(unit_id), found.files)


def unused_scores(found: Scan) -> Iterator[str]:
    """Files below `_scores/` that hold no unit's scores any more, with what is beside them."""
    used = {place[0] for receipt in found.committed if (place := found.place(receipt)) is not None}
    for name in found.files.matching(SCORES):
        if name not in used:
            yield from scores_files(name)


def scores_files(name: str) -> list[str]:
    """A file below `_scores/` with its receipt, which goes first, and what lies beside it."""
    return [scores_receipt_name(name), name, queries_name(name), pairs_name(name)]
