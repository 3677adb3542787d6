"""The job's bookkeeping beside its output: plan, score files, receipts, publication, status and `_SUCCESS`.

`_manifest/plan.json`, then for each unit `_work/<unit>.parquet` and `_manifest/receipts/<unit>.json`, then the parts
that are made of them, `_SUCCESS`, and `_scores/`, which takes over from `_work/`. Of a staged input the units' files
are its parts. What is done is `scan`'s to say.
"""

import hashlib
import json
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from batch_rerank.errors import ConfigError, ConflictError, StorageError
from batch_rerank.store.filesystem import Location, storage_errors
from batch_rerank.store.names import TREC_RUN, WITHDRAWN, Files, checked, part_name, receipt_name, work_name
from batch_rerank.store.plans import Plan, differing_shards, refuse_protocol
from batch_rerank.store.receipts import PartReceipt, Publication, ScoresReceipt, Withdrawal
from batch_rerank.store.records import Mark, Status, parse

PUBLICATION = "_manifest/publication.json"


def fingerprint(fields: dict[str, Any]) -> str:
    """sha256 of everything that changes what comes out."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Manifest:
    """The files of one output, or of a staged input."""

    root: Location
    staged: bool = False

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
        return self.root / TREC_RUN

    def unit_name(self, unit_id: str) -> str:
        """The file that a unit commits."""
        return part_name(unit_id) if self.staged else work_name(unit_id)

    def unit_file(self, unit_id: str) -> Location:
        """Where the file is that a unit commits."""
        return self.root / self.unit_name(unit_id)

    def receipt(self, unit_id: str) -> Location:
        """Where a unit's receipt is, unless it is rolled up."""
        return self.root / receipt_name(unit_id)

    def failure(self, unit_id: str) -> Location:
        """Where it says what the engine could not score of a unit."""
        return self.root / f"_manifest/failures/{checked(unit_id)}.json"

    def part(self, number: int) -> Location:
        """Where a part of the output is."""
        return self.root / part_name(number)

    def part_receipt(self, number: int) -> Location:
        """Where its receipt is."""
        return self.root / f"_manifest/parts/{number:05d}.json"

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
        lines = differing(existing.fingerprint_fields, plan.fingerprint_fields)
        shards = differing_shards(existing.shards, plan.shards)
        return (
            f"{self.root}: belongs to another job, which differs in {', '.join(lines)}:\n"
            + "\n".join([*lines.values(), *([f"  {shards}"] if shards else [])])
            + "\nexpected the same job or an empty output; use another output.path (or input.stage), or delete this "
            "one to replace it"
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

    def list_files(self, folder: str = "") -> Files:
        """All files of the output, or of a folder of it, in one listing; names are below the output."""
        with storage_errors(self.root):
            start = len(self.root.path.rstrip("/")) + 1
            found = (self.root / folder if folder else self.root).find()
            return Files({path[start:]: file for path, file in found.items()})

    def remove_seen(self, name: str, files: Files) -> None:
        """Remove a file of a listing, if it is still that one."""
        seen = files.found.get(name)
        if seen is not None:
            with storage_errors(self.root / name):
                (self.root / name).remove_seen(seen)

    def read(self, name: str) -> bytes:
        """The content of a file. Raises StorageError."""
        with storage_errors(self.root / name):
            return (self.root / name).read_bytes()

    def read_publication(self) -> Publication | None:
        """What is being published, or was; None where nothing was yet. Raises StorageError where it is damaged."""
        location = self.root / PUBLICATION
        with storage_errors(location):
            try:
                return parse(Publication, location.read_bytes())
            except FileNotFoundError:
                return None
            except ValueError as error:
                raise StorageError(f"{location}: not what we write ({error}); delete it and run again") from None

    def read_withdrawn(self, files: Files) -> dict[str, str]:
        """The notes of a listing, each with the id of the publication that it takes back; of one that is none, ""."""
        found = {}
        for name in files.matching(WITHDRAWN):
            try:
                found[name] = parse(Withdrawal, self.read(name)).publication
            except ValueError:
                found[name] = ""
        return found

    def read_part_receipts(self, publication: Publication, files: Files, pool: Executor) -> dict[int, PartReceipt]:
        """The receipts of a publication's parts that are there with the size and version that they say, by number."""
        numbers = range(len(publication.parts))
        names = {number: f"_manifest/parts/{number:05d}.json" for number in numbers if part_name(number) in files.found}
        names = {number: name for number, name in names.items() if name in files.found}
        found = {}
        for number, body in zip(names, pool.map(self.read, names.values()), strict=True):
            seen = files.found[part_name(number)]
            try:
                receipt = parse(PartReceipt, body)
            except ValueError:
                continue
            told = (publication.id, part_name(number), seen.size)
            if (receipt.publication, receipt.part, receipt.size) == told and receipt.etag in ("", seen.version):
                found[number] = receipt
        return found

    def read_scores_receipt(self, name: str) -> ScoresReceipt | None:
        """The receipt of a file below `_scores/`; None where there is none that can be read."""
        try:
            return parse(ScoresReceipt, self.read(scores_receipt_name(name)))
        except (StorageError, ValueError):
            return None

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


def scores_receipt_name(name: str) -> str:
    """The receipt of `_scores/00003.parquet`."""
    return f"_manifest/scores/{name.removeprefix('_scores/').removesuffix('.parquet')}.json"


def differing(there: dict[str, Any], here: dict[str, Any]) -> dict[str, str]:
    """The fields in which two records differ, with a line each."""
    keys = [key for key in sorted({*there, *here}) if there.get(key) != here.get(key)]
    return {key: f"  {key}: there {_short(there.get(key))}, here {_short(here.get(key))}" for key in keys}


def sha256(data: bytes) -> str:
    """Hex digest."""
    return hashlib.sha256(data).hexdigest()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
