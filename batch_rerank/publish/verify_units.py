"""What is wrong with units' files: of a staged input, or of an output that is not published yet."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from batch_rerank.config import JobConfig
from batch_rerank.errors import InputError, StorageError
from batch_rerank.publish.compare_rows import COMPARED
from batch_rerank.publish.output import Opened, input_ids
from batch_rerank.store.commit import read_footer
from batch_rerank.store.filesystem import Location, storage_errors
from batch_rerank.store.manifest import Manifest, sha256
from batch_rerank.store.plans import Shard, Unit
from batch_rerank.store.receipts import SUMMED, Receipt


@dataclass
class Verdict:
    """What `verify` found. An output is good if there are no problems. damaged: units, parts and files of scores that a
    rerun would mend; repaired: whether it is noted that they are not done."""

    units: int = 0
    rows: int = 0
    candidates: int = 0
    problems: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    repaired: bool = False

    def add(self, name: str, problems: Sequence[str]) -> None:
        """Problems of a unit, a part or a file of scores."""
        if problems:
            self.problems += [f"{name}: {problem}" for problem in problems]
            self.damaged.append(name.removeprefix("unit "))

    def take(self, other: "Verdict") -> None:
        """All that another one has found."""
        self.units += other.units
        self.rows += other.rows
        self.candidates += other.candidates
        self.problems += other.problems
        self.damaged += other.damaged


@dataclass(frozen=True)
class ShardCheck:
    """Units of a shard that are not published yet. receipts: of those that are done; broken: what is wrong with others;
    config: of the input, None where that is not looked at."""

    fingerprint: str
    shard: Shard
    units: list[Unit]
    receipts: Mapping[str, Receipt]
    broken: Mapping[str, str]
    config: JobConfig | None


def verify_shard(output: Opened, check: ShardCheck) -> Verdict:
    """The score files of units that are not published yet."""
    verdict, manifest, units = Verdict(), output.manifest(), check.units
    rows = ((unit, None) for unit in units) if check.config is None else input_ids(check.shard, check.config, units)
    try:
        for unit, candidates in rows:
            receipt = check.receipts.get(unit.id)
            if receipt is None:
                verdict.add(f"unit {unit.id}", [check.broken.get(unit.id, no_receipt(manifest, unit))])
                continue
            table, problems = _read_unit(manifest, check.fingerprint, unit, receipt)
            if table is not None:
                same = candidates is None or table.select(COMPARED).equals(candidates.select(COMPARED))
                problems = [] if same else ["its rows are not the candidates of the input"]
                verdict.units += 1
                verdict.rows += len(table)
                verdict.candidates += unit.pairs
            verdict.add(f"unit {unit.id}", problems)
    except InputError as error:
        verdict.problems.append(
            f"units {units[0].id} to {units[-1].id}: input: {error} (--output-only does without the input)"
        )
    return verdict


def no_receipt(manifest: Manifest, unit: Unit) -> str:
    """What is said of a unit that is not done."""
    return f"its receipt is missing ({manifest.receipt(unit.id)})"


def verify_staged(output: Opened, fingerprint: str, unit: Unit) -> Verdict:
    """A staged shard against its receipt."""
    manifest = output.manifest()
    verdict, body = Verdict(), content(manifest.receipt(unit.id))
    if body is None:
        verdict.add(f"unit {unit.id}", [no_receipt(manifest, unit)])
        return verdict
    try:
        receipt = Receipt.from_json(body, manifest.receipt(unit.id))
        table, problems = _read_unit(manifest, fingerprint, unit, receipt)
    except StorageError as error:
        table, problems = None, [str(error)]
    if table is not None and table.column_names[:2] != ["query_id", "query"]:
        problems = [f"the columns are {table.column_names[:10]}"]
    if table is not None:
        verdict.units, verdict.rows, verdict.candidates = 1, len(table), unit.pairs
    verdict.add(f"unit {unit.id}", problems)
    return verdict


def _read_unit(manifest: Manifest, fingerprint: str, unit: Unit, receipt: Receipt) -> tuple[pa.Table | None, list[str]]:
    """A unit's rows, or what is wrong with its file."""
    data, what = content(manifest.unit_file(unit.id)), "part" if manifest.staged else "score file"
    if data is None:
        return None, [f"its {what} is missing ({manifest.unit_file(unit.id)})"]
    try:
        table, metadata, counts = read_footer(data)
    except ValueError as error:
        return None, [str(error).splitlines()[0]]
    # a count that one of the two versions did not have yet is 0 in both
    edited = sorted(name for name in SUMMED if counts.get(name, 0) != getattr(receipt, name))
    checks = {
        "the receipt is of another job or unit": (receipt.fingerprint, receipt.unit) == (fingerprint, unit.id),
        f"the {what} has {len(data):,} bytes, its receipt says {receipt.size:,}": len(data) == receipt.size,
        f"the {what}'s checksum is not its receipt's": sha256(data) == receipt.sha256,
        f"the {what} is of another job": metadata.get("batch_rerank.fingerprint") == fingerprint,
        f"the {what} is of another unit": metadata.get("batch_rerank.unit") == unit.id,
        f"the {what} has {len(table)} rows, its receipt says {receipt.rows_out}": len(table) == receipt.rows_out,
        f"the receipt's counts are not the {what}'s: {', '.join(edited)}": not edited,
        f"the receipt has {receipt.rows_in} candidates, the plan {unit.pairs}": receipt.rows_in == unit.pairs,
    }
    problems = [problem for problem, good in checks.items() if not good]
    return (None if problems else table), problems


def content(location: Location) -> bytes | None:
    """Of a file; None where there is none. Raises StorageError."""
    with storage_errors(location):
        try:
            return location.read_bytes()
        except FileNotFoundError:
            return None
