"""What a plan is made of, and its schema as it lies on storage: what a job believes of it, and what it refuses."""

import json
import posixpath
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from batch_rerank.errors import BatchRerankError, StorageError
from batch_rerank.outside import problem_of
from batch_rerank.store.filesystem import File
from batch_rerank.store.records import Count, Line, UnitId, parse

MANIFEST_VERSION = 2
"""2: units are score files, from which parts are published. Stages are the same in 1."""

JOB_COUNTS = ("shards", "zero_row_shards", "queries", "queries_without_candidates")
STAGE_COUNTS = ("candidates", "queries", "queries_without_candidates")


@dataclass(frozen=True)
class Unit:
    """A range of whole queries of one shard: rows `start` to `stop` of the file."""

    id: str
    shard: int
    start: int
    stop: int
    queries: int
    pairs: int


@dataclass(frozen=True)
class Shard:
    """One input file as the plan saw it: `file.version` says what is in it, the etag, or a hash of the footer where the
    store has none. row_groups: rows and bytes of each; listed: the file with its mtime. Both are known to the run that
    has planned, and in no plan's file."""

    index: int
    url: str
    file: File
    rows: int
    row_groups: tuple[tuple[int, int], ...] = field(default=(), compare=False)
    listed: File | None = field(default=None, compare=False)


@dataclass(frozen=True)
class _Version:
    manifest_version: int


@dataclass(frozen=True)
class _Plan:
    fingerprint: str
    config: dict[str, Any]
    shards: list[tuple[str, str, Count, str, Count]]
    units: list[tuple[UnitId, Count, Count, Count, Count, Count]]
    fingerprint_fields: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    version: Line = ""
    counts: dict[str, Count] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """All that a job is: resolved config and model, fingerprint, shards and units.

    `counts` has what planning saw and passed over: shards, zero-row shards, queries, queries without candidates;
    `notes` what a user should know before the run.
    """

    fingerprint: str
    fingerprint_fields: dict[str, Any]
    config: dict[str, Any]
    model: dict[str, Any]
    version: str
    counts: dict[str, int]
    notes: list[str]
    shards: list[Shard]
    units: list[Unit]

    @property
    def pairs(self) -> int:
        """Candidates of all units."""
        return sum(unit.pairs for unit in self.units)

    def left(self, done: Collection[str]) -> list[Unit]:
        """The units without those whose ids are given."""
        return [unit for unit in self.units if unit.id not in done]

    def to_json(self) -> bytes:
        """Units and shards as lists of values: 50,000 units are about 3 MB."""
        value = {**vars(self), "manifest_version": MANIFEST_VERSION}
        value["shards"] = [[s.url, s.file.path, s.file.size, s.file.version, s.rows] for s in self.shards]
        value["units"] = [[u.id, u.shard, u.start, u.stop, u.queries, u.pairs] for u in self.units]
        return json.dumps(value, separators=(",", ":")).encode()

    @staticmethod
    def from_json(data: bytes, where: object) -> "Plan":
        """Raises StorageError where the content is no plan that we write."""
        try:
            version, fields = parse_plan(data)
        except ValueError as error:
            raise StorageError(f"{where}: not a plan ({error}); the manifest is damaged, use a new output") from None
        if not fields:
            raise StorageError(
                f"{where}: written by another version of batch_rerank; use that version, or a new output"
            )
        if version == 1 and not fields["config"].get("stage"):  # a stage is the same in both
            raise StorageError(
                f"{where}: written by batch_rerank {fields['version'] or '0.1.0'}, whose output has no score files; "
                "use that version to read or verify it, or a new output"
            )
        return Plan(**fields)


def parse_plan(data: bytes) -> tuple[int, dict[str, Any]]:
    """A plan's version and fields; no fields where the version may have others. Raises ValueError."""
    version = parse(_Version, data).manifest_version
    if version not in (1, MANIFEST_VERSION):
        return version, {}
    read = parse(_Plan, data)
    staged = bool(read.config.get("stage"))
    shards = [
        Shard(index, url, File(path, size, version), rows)
        for index, (url, path, size, version, rows) in enumerate(read.shards)
    ]
    units = [Unit(*unit) for unit in read.units]
    for shard in shards:
        refuse_protocol(shard.url, ValueError)
    _check_units(units, shards, staged)
    counts = {**dict.fromkeys(STAGE_COUNTS if staged else JOB_COUNTS, 0), **read.counts}
    return version, {**vars(read), "shards": shards, "units": units, "counts": counts}


def differing_shards(there: Sequence[Shard], here: Sequence[Shard]) -> str:
    """Which shards of two plans are not the same, in a line; empty where all are."""
    names = [posixpath.basename(shard.url) for shard in (*there, *here)]
    contents = [{(shard.file.size, shard.file.version): shard for shard in shards} for shards in (there, here)]
    only = [[shard for key, shard in one.items() if key not in other] for one, other in (contents, contents[::-1])]
    if not any(only):
        return "" if names[: len(there)] == names[len(there) :] else "the same shards in another order"
    said = [
        f"{len(shards)} only {place}, e.g. {shards[0].url} ({shards[0].file.size:,} bytes, {shards[0].file.version})"
        for place, shards in zip(("there", "here"), only, strict=True)
        if shards
    ]
    return "shards: " + "; ".join(said)


def refuse_protocol(url: str, error: type[BatchRerankError | ValueError]) -> None:
    """Raise where a shard is where no input can be: a plan must not send its reader to any host."""
    if problem_of(url):
        raise error(f"a shard at {url[:100]!r}; expected a local path, s3://, gs://, abfs:// or hf://")


def _check_units(units: Sequence[Unit], shards: Sequence[Shard], staged: bool) -> None:
    """Raise ValueError where units are none that planning makes. Those of a stage are ranges of queries."""
    if len({unit.id for unit in units}) < len(units):
        raise ValueError("a unit stands twice")
    end = (0, 0)
    for unit in () if staged else units:
        if (unit.shard, unit.start) < end or unit.start > unit.stop:
            raise ValueError(f"unit {unit.id}: out of order, or it overlaps another")
        if unit.shard >= len(shards) or unit.stop > shards[unit.shard].rows:
            raise ValueError(f"unit {unit.id}: beyond its shard")
        end = (unit.shard, unit.stop)
