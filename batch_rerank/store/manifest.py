"""The job's bookkeeping beside its output: plan, receipts, status and `_SUCCESS`.

`_manifest/plan.json`, `part-<shard>-<unit>.parquet`, `_manifest/receipts/<unit>.json`, `_SUCCESS`, in this order.
A unit is done if and only if its receipt is there and its part is there with the receipt's size.
"""

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from typing import Any

from batch_rerank.errors import ConflictError, StorageError
from batch_rerank.store.filesystem import TEMPORARY, File, Location, storage_errors
from batch_rerank.store.shards import Shard, Unit, differing_shards

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
        """Raises StorageError where the content is no plan."""
        try:
            value = json.loads(data)
            if value.pop("manifest_version") != MANIFEST_VERSION:
                raise StorageError(
                    f"{where}: written by another version of batch_rerank; use that version, or a new output"
                )
            shards = [
                Shard(i, url, File(path, size, version), rows)
                for i, (url, path, size, version, rows) in enumerate(value.pop("shards"))
            ]
            units = [Unit(*unit) for unit in value.pop("units")]
            return Plan(**value, shards=shards, units=units)
        except (ValueError, KeyError, TypeError) as error:
            raise StorageError(f"{where}: not a plan ({error}); the manifest is damaged, use a new output") from None


@dataclass(frozen=True)
class Receipt:
    """Proof that a unit is committed: what came in, what went out, and what was odd about it.

    engine_failed: rows among `failed` whose pair the engine could not score, which a resume tries again; scorer: the
    model copy that scored it; self_test: what its self-test said; storage_retries: requests that were repeated for it;
    etag: the part's version where the store keeps one; fallback: why its batches were padded, empty where packed
    """

    unit: str
    fingerprint: str
    part: str
    size: int
    sha256: str
    rows_in: int
    rows_out: int
    queries: int
    scored: int
    failed: int
    null_texts: int
    null_queries: int
    empty_texts: int
    truncated: int
    tokens: int
    seconds: float
    scorer: str
    self_test: str = ""
    engine_failed: int = 0
    storage_retries: int = 0
    etag: str = ""
    fallback: str = ""

    def to_json(self) -> bytes:
        """One JSON object."""
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def from_json(data: bytes, where: object) -> "Receipt":
        """Fields of a newer version are passed over. Raises StorageError where the content is no receipt."""
        try:
            known = {field.name for field in fields(Receipt)}
            return Receipt(**{name: value for name, value in json.loads(data).items() if name in known})
        except (ValueError, TypeError, AttributeError) as error:
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
    """Sums over receipts, so that no list of receipts has to be kept. padded_units: those with a fallback."""

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
class Files:
    """An output's files by their path below it, as one listing showed them."""

    found: dict[str, File]

    def size(self, name: str) -> int | None:
        """Bytes, or None where there is no such file."""
        return self.found[name].size if name in self.found else None

    def within(self, directory: str) -> list[str]:
        """The files of one directory, e.g. _manifest/attempts."""
        return [name for name in self.found if name.startswith(f"{directory}/")]

    def leftovers(self) -> list[str]:
        """What earlier runs have left for nobody: notes of actors, failures, and the hidden files of killed writes."""
        old = ("_manifest/attempts/", "_manifest/failures/")
        return [name for name in self.found if name.startswith(old) or name.endswith(TEMPORARY)]

    def strays(self, units: Iterable[str]) -> list[str]:
        """Parquet files that a reader would take for output and that are no part of these units."""
        parts = {part_name(unit) for unit in units}
        hidden = ("_", ".")
        names = (name for name in self.found if name.endswith(".parquet") and name not in parts)
        return [name for name in names if not any(part.startswith(hidden) for part in name.split("/"))]


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
        return self.root / "run.trec"

    def part(self, unit_id: str) -> Location:
        """Where a unit's rows are."""
        return self.root / part_name(unit_id)

    def receipt(self, unit_id: str) -> Location:
        """Where a unit's receipt is."""
        return self.root / f"_manifest/receipts/{unit_id}.json"

    def failure(self, unit_id: str) -> Location:
        """Where it says what the engine could not score of a unit."""
        return self.root / f"_manifest/failures/{unit_id}.json"

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

    def list_files(self) -> "Files":
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
        with ThreadPoolExecutor(workers) as pool:
            bodies = list(pool.map(lambda name: _read(self.root / name), found))
        committed: list[Receipt] = []
        broken: dict[str, str] = {}
        for name, body in zip(found, bodies, strict=True):
            receipt = _fitting(files, plan.fingerprint, names[name], body, self.root / name)
            if isinstance(receipt, Receipt):
                committed.append(receipt)
            else:
                broken[names[name]] = receipt
        return Scan(files, committed, broken)

    def discard(self, unit_id: str) -> None:
        """Make a unit not done. Its receipt goes last: one without its part shows in the next listing, where a damaged
        part without a receipt would not."""
        for location in (self.failure(unit_id), self.part(unit_id), self.receipt(unit_id)):
            with storage_errors(location):
                location.remove()

    def write_status(self, status: dict[str, Any]) -> None:
        """`_manifest/status.json`: how far the job is and how it ended. Ray hides a driver's exit code; this has it."""
        with storage_errors(self.root):
            (self.root / "_manifest/status.json").write_bytes(json.dumps(status, indent=1).encode())

    def read_status(self) -> dict[str, Any]:
        """The last status, or nothing."""
        with storage_errors(self.root):
            try:
                value: dict[str, Any] = json.loads((self.root / "_manifest/status.json").read_bytes())
                return value
            except (FileNotFoundError, ValueError):
                return {}


@dataclass(frozen=True)
class Scan:
    """An output as a listing shows it. broken: units with a receipt that does not fit, and why."""

    files: Files
    committed: list[Receipt]
    broken: dict[str, str]

    def set_aside(self) -> list[str]:
        """Units that could not be scored."""
        done = {receipt.unit for receipt in self.committed}
        failed = (name.rsplit("/", 1)[-1].removesuffix(".json") for name in self.files.within("_manifest/failures"))
        return [unit for unit in failed if unit not in done]


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


def part_name(unit_id: str) -> str:
    """The part of unit `00003-00017` is `part-00003-00017.parquet`, in every run."""
    return f"part-{unit_id}.parquet"


def sha256(data: bytes) -> str:
    """Hex digest."""
    return hashlib.sha256(data).hexdigest()


def _read(location: Location) -> bytes:
    with storage_errors(location):
        return location.read_bytes()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
