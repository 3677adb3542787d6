"""The job's bookkeeping beside its output: plan, receipts, status and `_SUCCESS`.

`_manifest/plan.json`, `part-<shard>-<unit>.parquet`, `_manifest/receipts/<unit>.json`, `_SUCCESS`, in this order.
A unit is done if and only if its receipt is there and its part is there with the receipt's size.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from batch_rerank.errors import ConfigError, ConflictError, StorageError
from batch_rerank.store.filesystem import Location, storage_errors
from batch_rerank.store.names import TREC_RUNS, Files, checked, part_name
from batch_rerank.store.plans import Shard, Unit, differing_shards, parse_plan, refuse_protocol
from batch_rerank.store.records import Count, Mark, Seconds, Status, UnitId, parse

MANIFEST_VERSION = 1


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

    def to_json(self) -> bytes:
        """Units and shards as lists of values: 50,000 units are about 3 MB."""
        value = {**asdict(self), "manifest_version": MANIFEST_VERSION}
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
        if version != MANIFEST_VERSION:
            raise StorageError(
                f"{where}: written by another version of batch_rerank; use that version, or a new output"
            )
        return Plan(**fields)


@dataclass(frozen=True)
class Receipt:
    """Proof that a unit is committed: what came in, what went out, and what was odd about it.

    Counts of other versions that are missing here are 0, so a receipt of theirs costs no scored unit.
    engine_failed: rows among `failed` whose pair the engine could not score, which a resume tries again; scorer: the
    model copy that scored it; self_test: what its self-test said; storage_retries: requests that were repeated for it;
    etag: the part's version where the store keeps one; fallback: why its batches were padded, empty where packed
    """

    unit: UnitId
    fingerprint: str
    part: str
    size: Count
    sha256: str
    rows_in: Count = 0
    rows_out: Count = 0
    queries: Count = 0
    scored: Count = 0
    failed: Count = 0
    null_texts: Count = 0
    null_queries: Count = 0
    empty_texts: Count = 0
    truncated: Count = 0
    tokens: Count = 0
    seconds: Seconds = 0.0
    scorer: str = ""
    self_test: str = ""
    engine_failed: Count = 0
    storage_retries: Count = 0
    etag: str = ""
    fallback: str = ""

    def to_json(self) -> bytes:
        """One JSON object."""
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def from_json(data: bytes, where: object) -> "Receipt":
        """Fields of a newer version are passed over. Raises StorageError where the content is no receipt."""
        try:
            return parse(Receipt, data)
        except ValueError as error:
            raise StorageError(f"{where}: not a receipt ({error}); delete it to have its unit scored again") from None


@dataclass(frozen=True)
class SetAside:
    """A unit that could not be scored: the job goes on without it and ends with exit 1; a resume tries it again."""

    unit: str
    tries: int
    error: str


SUMMED = (
    "rows_in",
    "rows_out",
    "queries",
    "scored",
    "failed",
    "null_texts",
    "null_queries",
    "empty_texts",
    "truncated",
    "tokens",
    "engine_failed",
)
"""Counts of a receipt that follow from the unit alone: they are in its part's footer too."""


@dataclass
class Totals:
    """Sums over receipts, so that no list of receipts has to be kept. padded_units: those with a fallback;
    resumed_pairs: done by earlier runs."""

    units: int = 0
    rows_in: int = 0
    rows_out: int = 0
    queries: int = 0
    scored: int = 0
    failed: int = 0
    null_texts: int = 0
    null_queries: int = 0
    empty_texts: int = 0
    truncated: int = 0
    tokens: int = 0
    engine_failed: int = 0
    storage_retries: int = 0
    padded_units: int = 0
    seconds: float = 0.0
    resumed_pairs: int = 0

    def add(self, receipt: Receipt) -> None:
        """Count one more unit."""
        self.units += 1
        self.padded_units += bool(receipt.fallback)
        self.seconds += receipt.seconds
        for name in (*SUMMED, "storage_retries"):
            setattr(self, name, getattr(self, name) + getattr(receipt, name))


def fingerprint(fields: dict[str, Any]) -> str:
    """sha256 of everything that changes an output byte."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Manifest:
    """The files of one output."""

    root: Location

    @property
    def plan_location(self) -> Location:
        """Where the plan is."""
        return self.root / "_manifest/plan.json"

    @property
    def success(self) -> Location:
        """The mark of a complete output."""
        return self.root / "_SUCCESS"

    @property
    def trec_run(self) -> Location:
        """Where the ranked rows are as a TREC run, if the config asks for it."""
        return self.root / TREC_RUNS[0]

    def part(self, unit_id: str) -> Location:
        """Where a unit's rows are."""
        return self.root / part_name(unit_id)

    def receipt(self, unit_id: str) -> Location:
        """Where a unit's receipt is."""
        return self.root / f"_manifest/receipts/{checked(unit_id)}.json"

    def failure(self, unit_id: str) -> Location:
        """Where it says what the engine could not score of a unit."""
        return self.root / f"_manifest/failures/{checked(unit_id)}.json"

    def damage(self, unit_id: str) -> Location:
        """Where it says which part and receipt of a unit `verify --repair` has found damaged."""
        return self.root / f"_manifest/damaged/{checked(unit_id)}.json"

    def read_plan(self) -> Plan | None:
        """The plan, or None for an output that has none."""
        with storage_errors(self.plan_location):
            try:
                return Plan.from_json(self.plan_location.read_bytes(), self.plan_location)
            except FileNotFoundError:
                return None

    def write_plan(self, plan: Plan) -> Plan:
        """Create the plan; where there is one already, it must have the same fingerprint and is the one to follow.

        Raises ConflictError that names the differing fields, and where the output holds anything without a plan.
        """
        existing = self.read_plan()
        if existing is None:
            for shard in plan.shards:
                refuse_protocol(shard.url, ConfigError)
            self.refuse_foreign()
            with storage_errors(self.root):
                created = self.plan_location.create_exclusive(plan.to_json())
            if created:
                return plan
            existing = self.read_plan()
            assert existing is not None
        self.refuse_other(existing, plan)
        return existing

    def refuse_other(self, existing: Plan, plan: Plan) -> None:
        """Raise ConflictError that names the differing fields, where the plan that is there is of another job."""
        if existing.fingerprint != plan.fingerprint:
            raise ConflictError(self._conflict(existing, plan))

    def _conflict(self, existing: Plan, plan: Plan) -> str:
        ours, theirs = plan.fingerprint_fields, existing.fingerprint_fields
        differing = [key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]
        lines = [f"  {key}: there {_short(theirs.get(key))}, here {_short(ours.get(key))}" for key in differing]
        shards = differing_shards(existing.shards, plan.shards)
        lines += [f"  {shards}"] if shards else []
        return (
            f"{self.root}: belongs to another job, which differs in {', '.join(differing)}:\n" + "\n".join(lines) + "\n"
            "expected the same job or an empty output; use another output.path (or input.stage), or delete this one "
            "to replace it"
        )

    def refuse_foreign(self) -> None:
        """Raise ConflictError where there are Parquet files and no plan."""
        with storage_errors(self.root):
            foreign = self.list_files().strays(())
        if foreign:
            raise ConflictError(
                f"{self.root}: holds {len(foreign)} Parquet file(s) that no plan describes, e.g. {foreign[0]}; "
                "expected an empty output; use another output.path"
            )

    def list_files(self) -> Files:
        """All files of the output, in one listing."""
        with storage_errors(self.root):
            start = len(self.root.path.rstrip("/")) + 1
            return Files({path[start:]: file for path, file in self.root.find().items()})

    def scan(self, plan: Plan, workers: int = 16) -> "Scan":
        """What is committed and what is not as it should be, as far as a listing shows; checksums are `verify`'s work.
        One listing, receipts concurrently."""
        files = self.list_files()
        names = {f"_manifest/receipts/{unit.id}.json": unit.id for unit in plan.units}
        found = [name for name in names if name in files.found]
        noted = {unit: f"_manifest/damaged/{unit}.json" for unit in files.units_within("_manifest/damaged")}
        with ThreadPoolExecutor(workers) as pool:
            bodies = list(pool.map(lambda name: _read(self.root / name), [*found, *noted.values()]))
        damaged = dict(zip(noted, bodies[len(found) :], strict=True))
        committed: list[Receipt] = []
        broken: dict[str, str] = {}
        for name, body in zip(found, bodies, strict=False):
            unit_id = names[name]
            receipt = _fitting(files, plan.fingerprint, unit_id, body, self.root / name)
            if isinstance(receipt, Receipt) and damaged.get(unit_id) == versions(files, unit_id):
                receipt = "verify has found it damaged"
            if isinstance(receipt, Receipt):
                committed.append(receipt)
            else:
                broken[unit_id] = receipt
        return Scan(files, committed, broken)

    def discard(self, unit_id: str, files: Files) -> None:
        """Make a unit not done: remove its files, as far as they are still those that a listing showed. Its receipt
        goes behind its part: one without its part shows in the next listing, where a damaged part without a receipt
        would not."""
        for location in (self.failure(unit_id), self.part(unit_id), self.receipt(unit_id), self.damage(unit_id)):
            self.remove_seen(location.path[len(self.root.path.rstrip("/")) + 1 :], files)

    def remove_seen(self, name: str, files: Files) -> None:
        """Remove a file of a listing, if it is still that one."""
        seen = files.found.get(name)
        if seen is not None:
            with storage_errors(self.root / name):
                (self.root / name).remove_seen(seen)

    def write_status(self, status: dict[str, Any]) -> None:
        """`_manifest/status.json`: how far the job is and how it ended. Ray hides a driver's exit code; this has it."""
        with storage_errors(self.root):
            (self.root / "_manifest/status.json").write_bytes(json.dumps(status, indent=1).encode())

    def read_mark(self) -> Mark | None:
        """What `_SUCCESS` says; None where there is none, or none of ours."""
        with storage_errors(self.success):
            try:
                return parse(Mark, self.success.read_bytes())
            except (FileNotFoundError, ValueError):
                return None

    def read_status(self) -> Status:
        """The last status, or that of a job that has not begun."""
        with storage_errors(self.root):
            try:
                return parse(Status, (self.root / "_manifest/status.json").read_bytes())
            except (FileNotFoundError, ValueError):
                return Status()


def versions(files: Files, unit_id: str) -> bytes:
    """Which part and receipt of a unit a listing shows: what `verify --repair` notes where they are damaged."""
    seen = [files.found.get(name) for name in (part_name(unit_id), f"_manifest/receipts/{unit_id}.json")]
    return json.dumps([file and [file.size, file.version] for file in seen]).encode()


@dataclass(frozen=True)
class Scan:
    """An output as a listing shows it. broken: units with a receipt that does not fit, and why."""

    files: Files
    committed: list[Receipt]
    broken: dict[str, str]

    def set_aside(self) -> list[str]:
        """Units that could not be scored."""
        done = {receipt.unit for receipt in self.committed}
        return [unit for unit in self.files.units_within("_manifest/failures") if unit not in done]


def _fitting(files: Files, fingerprint: str, unit_id: str, body: bytes, where: object) -> Receipt | str:
    """A unit's receipt, or what is wrong with it or its part."""
    try:
        receipt = Receipt.from_json(body, where)
    except StorageError:
        return "its receipt cannot be read"
    part = files.found.get(part_name(unit_id))
    if (receipt.unit, receipt.fingerprint) != (unit_id, fingerprint):
        return "its receipt is of another unit or job"
    if part is None:
        return "its part is missing"
    if part.size != receipt.size:
        return f"its part has {part.size:,} bytes, its receipt says {receipt.size:,}"
    if receipt.etag and receipt.etag != part.version:
        return "its part was replaced after it was committed (another etag)"
    return receipt


def sha256(data: bytes) -> str:
    """Hex digest."""
    return hashlib.sha256(data).hexdigest()


def _read(location: Location) -> bytes:
    with storage_errors(location):
        return location.read_bytes()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
