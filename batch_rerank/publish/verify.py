"""Proof that an output is what its input asks for: re-reads every part and the ids of every shard.

For each part: its receipt and `_SUCCESS` name it with its size and checksum, every input candidate of its units appears
exactly once (or was cut by top_k), ranks are 1, 2, … by score, then first-stage rank, then doc_id, and nothing else
lies in between. Files of scores have their receipts' checksums. Of an output that is not published yet the units'
score files are compared with the input.
"""

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batch_rerank.config import JobConfig
from batch_rerank.errors import InputError, StorageError
from batch_rerank.publish.compare_rows import compare, rows_of_units
from batch_rerank.publish.nested import flat
from batch_rerank.publish.output import Place, config_of, input_ids, is_stage, lease_seconds_of, open_output
from batch_rerank.publish.publication import of_units, output_of
from batch_rerank.schema import OUTPUT_NAMES
from batch_rerank.store.bookkeeping import expected_parts
from batch_rerank.store.commit import read_footer
from batch_rerank.store.filesystem import Location, storage_errors
from batch_rerank.store.lease import hold
from batch_rerank.store.manifest import Manifest, sha256
from batch_rerank.store.names import SCORES, TREC_RUN, part_name
from batch_rerank.store.plans import Plan, Unit
from batch_rerank.store.receipts import SUMMED, PartReceipt, Publication, Receipt
from batch_rerank.store.records import Mark, PartMark, TrecRun, parse
from batch_rerank.store.scan import Scan, evidence, note_name, part_files, scan, unit_files

VERIFY_THREADS = 4


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


def verify(place: Place | str, repair: bool = False, output_only: bool = False) -> Verdict:
    """Check an output against its input or, with `output_only`, against its plan and receipts alone, for when the input
    is gone; with `repair`, make what is damaged not done, so that the next run makes it again: parts from the scores,
    and where those are damaged, the scores.

    Raises StorageError where it has no plan, and with `repair` ConflictError where a job is at work on it;
    differences are in the verdict. Of a staged input parts and receipts are compared, not the sources.
    """
    manifest, plan = open_output(place, or_stage=True)
    config = None if is_stage(plan) else config_of(plan, place)
    if not repair:
        return _verify(manifest, plan, scan(manifest, plan), config, output_only)
    with hold(manifest.root, lease_seconds_of(plan)) as lease:
        found = scan(manifest, plan)
        verdict = _verify(manifest, plan, found, config, output_only)
        lease.check()
        if verdict.damaged:
            # notes first: whoever takes over from here finds the same files damaged, and removes them itself
            for name in verdict.damaged:
                location = manifest.root / note_name(name)
                with storage_errors(location):
                    location.write_bytes(evidence(found.files, _files_of(manifest, name)))
            manifest.remove_seen("_SUCCESS", found.files)
            lease.check()
            verdict.repaired = True
    return verdict


def _files_of(manifest: Manifest, name: str) -> list[str]:
    if name.startswith("_scores/"):
        return [name]
    if name.startswith("part-"):
        return part_files(int(name[len("part-") : -len(".parquet")]))
    return unit_files(manifest, name)


def _verify(manifest: Manifest, plan: Plan, found: Scan, config: JobConfig | None, output_only: bool) -> Verdict:
    verdict = Verdict()
    mark, problems = _verify_mark(manifest, plan, found)
    verdict.problems += problems
    for stray in found.files.strays(expected_parts(manifest, plan, found.publication)):
        verdict.problems.append(
            f"{manifest.root / stray}: a Parquet file that the plan does not have; readers would take it for output"
        )
    works: list[Callable[[], Verdict]]
    if config is None:
        works = [partial(_verify_staged, manifest, plan, unit) for unit in plan.units]
    elif found.publication is not None:
        marked = {} if mark is None else {part.name: part for part in mark.parts}
        done = {receipt.unit for receipt in found.committed}
        for unit in plan.units:
            if unit.id not in done:
                verdict.add(f"unit {unit.id}", [found.broken.get(unit.id, _no_receipt(manifest, unit))])
        works = [
            partial(_verify_part, manifest, plan, found, config, output_only, number, marked.get(part_name(number)))
            for number in range(len(found.publication.parts))
        ]
    else:
        shards = groupby(plan.units, key=lambda unit: unit.shard)
        works = [partial(_verify_shard, manifest, plan, found, config, output_only, list(units)) for _, units in shards]
    works += [partial(_verify_scores, manifest, plan, found, name) for name in found.files.matching(SCORES)]
    with ThreadPoolExecutor(VERIFY_THREADS) as pool:
        for result in pool.map(lambda work: work(), works):
            verdict.take(result)
    return verdict


def _verify_mark(manifest: Manifest, plan: Plan, found: Scan) -> tuple[Mark | None, list[str]]:
    """`_SUCCESS`, and what is wrong with it and with the TREC run that it speaks of."""
    body = _content(manifest.success)
    if body is None:
        return None, ["no _SUCCESS: the job has not finished"]
    try:
        mark = parse(Mark, body)
    except ValueError:
        return None, ["_SUCCESS cannot be read"]
    problems = []
    if (mark.fingerprint, mark.units) != (plan.fingerprint, len(plan.units)):
        problems.append(f"_SUCCESS is of another job, or of {mark.units} units where the plan has {len(plan.units)}")
    elif not manifest.staged:
        names = expected_parts(manifest, plan, found.publication)
        publication = "" if found.publication is None else found.publication.id
        if (mark.publication, [part.name for part in mark.parts]) != (publication, names):
            problems.append("_SUCCESS is of another publication; remove it and run the job again")
    if mark.trec_run is not None:
        problems += _verify_trec_run(manifest.trec_run, mark.trec_run)
    return mark, problems


def _verify_trec_run(location: Location, claimed: TrecRun) -> list[str]:
    digest, size = hashlib.sha256(), 0
    with storage_errors(location):
        try:
            with location.open() as file:
                while block := file.read(2**24):
                    digest.update(block)
                    size += len(block)
        except FileNotFoundError:
            return [f"{TREC_RUN} is missing; remove _SUCCESS and run the job again"]
    if claimed != TrecRun(size, digest.hexdigest()):
        return [f"{TREC_RUN} is not what the job wrote; remove _SUCCESS and run the job again"]
    return []


def _verify_part(
    manifest: Manifest,
    plan: Plan,
    found: Scan,
    config: JobConfig,
    output_only: bool,
    number: int,
    marked: PartMark | None,
) -> Verdict:
    """A part against its receipt, `_SUCCESS` and the candidates of its units."""
    verdict, publication = Verdict(), found.publication
    assert publication is not None
    name, units = part_name(number), of_units(publication, plan, number)
    rows, problems = _read_part(manifest, publication, number, marked)
    if rows is None:
        verdict.add(name, problems)
        return verdict
    top_k = output_of(publication, config.output).top_k
    if output_only:
        problems = compare(None, rows, top_k)
        verdict.candidates = sum(unit.pairs for unit in units)
    else:
        try:
            for unit, candidates, ours in rows_of_units(_candidates(plan, config, units), rows):
                wrong = compare(candidates, ours, top_k)
                problems += [f"unit {unit.id}: {problem}" for problem in wrong]
                verdict.candidates += len(candidates)
        except InputError as error:
            verdict.problems.append(f"{name}: input: {error} (--output-only does without the input)")
    verdict.units, verdict.rows = len(units), len(rows)
    verdict.add(name, problems)
    return verdict


def _candidates(plan: Plan, config: JobConfig, units: Sequence[Unit]) -> Iterator[tuple[Unit, pa.Table]]:
    for _, of_shard in groupby(units, key=lambda unit: unit.shard):
        yield from input_ids(plan, config, list(of_shard))


def _read_part(
    manifest: Manifest, publication: Publication, number: int, marked: PartMark | None
) -> tuple[pa.Table | None, list[str]]:
    """A part's flat rows, or what is wrong with its receipt and its file."""
    where, location = manifest.part_receipt(number), manifest.part(number)
    body, data = _content(where), _content(location)
    if body is None or data is None:
        absent, path = ("receipt", where) if body is None else ("file", location)
        return None, [f"its {absent} is missing ({path})"]
    try:
        receipt = parse(PartReceipt, body)
        table = pq.read_table(io.BytesIO(data))
    except (pa.ArrowException, OSError, ValueError) as error:
        return None, [(str(error) or type(error).__name__).splitlines()[0]]
    metadata = table.schema.metadata or {}
    rows = flat(table)
    told = None if marked is None else (marked.rows, marked.size, marked.sha256)
    checks = {
        "the receipt is of another publication or part": (receipt.publication, receipt.part)
        == (publication.id, part_name(number)),
        f"the part has {len(data):,} bytes, its receipt says {receipt.size:,}": len(data) == receipt.size,
        "the part's checksum is not its receipt's": sha256(data) == receipt.sha256,
        "_SUCCESS says otherwise than its receipt": told in (None, (receipt.rows, receipt.size, receipt.sha256)),
        "the part is of another job": metadata.get(b"batch_rerank.fingerprint") == publication.fingerprint.encode(),
        "the part is another one, or of another publication": (
            metadata.get(b"batch_rerank.publication"),
            metadata.get(b"batch_rerank.part"),
        )
        == (publication.id.encode(), str(number).encode()),
        f"the part has {len(rows)} rows, its receipt says {receipt.rows}": len(rows) == receipt.rows,
        f"the columns are {rows.column_names[:10]}": rows.column_names[: len(OUTPUT_NAMES)] == list(OUTPUT_NAMES),
    }
    problems = [problem for problem, good in checks.items() if not good]
    return (None if problems else rows), problems


def _verify_scores(manifest: Manifest, plan: Plan, found: Scan, name: str) -> Verdict:
    """A file below `_scores/` against its receipt and those of its units; one without is none yet, and nothing reads
    it."""
    verdict, receipt = Verdict(), manifest.read_scores_receipt(name)
    if receipt is None or receipt.fingerprint != plan.fingerprint:
        return verdict
    data = _content(manifest.root / name)
    if data is None or (len(data), sha256(data)) != (receipt.size, receipt.sha256):
        verdict.add(name, ["not what its receipt says (another size or checksum)"])
        return verdict
    of_units = {place[1]: one for one in found.committed if (place := found.place(one)) and place[0] == name}
    file = pq.ParquetFile(io.BytesIO(data))
    for group, one in of_units.items():
        rows = file.read_row_group(group, columns=["score", "n_tokens", "truncated"])
        counts = {
            "rows_in": len(rows),
            "scored": len(rows) - rows["score"].null_count,
            "tokens": pc.sum(rows["n_tokens"]).as_py() or 0,
            "truncated": pc.sum(rows["truncated"]).as_py() or 0,
        }
        edited = [counted for counted, value in counts.items() if getattr(one, counted) != value]
        if edited:
            verdict.add(f"unit {one.unit}", [f"the receipt's counts are not its scores': {', '.join(edited)}"])
    return verdict


def _no_receipt(manifest: Manifest, unit: Unit) -> str:
    return f"its receipt is missing ({manifest.receipt(unit.id)})"


def _verify_shard(
    manifest: Manifest, plan: Plan, found: Scan, config: JobConfig, output_only: bool, units: list[Unit]
) -> Verdict:
    """The score files of units that are not published yet."""
    verdict = Verdict()
    receipts = {receipt.unit: receipt for receipt in found.committed}
    rows = ((unit, None) for unit in units) if output_only else input_ids(plan, config, units)
    try:
        for unit, candidates in rows:
            receipt = receipts.get(unit.id)
            if receipt is None:
                verdict.add(f"unit {unit.id}", [found.broken.get(unit.id, _no_receipt(manifest, unit))])
                continue
            table, problems = _read_unit(manifest, plan, unit, receipt)
            if table is not None:
                names = ["query_id", "doc_id", "first_stage_rank"]
                same = candidates is None or table.select(names).equals(candidates.select(names))
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


def _verify_staged(manifest: Manifest, plan: Plan, unit: Unit) -> Verdict:
    verdict, body = Verdict(), _content(manifest.receipt(unit.id))
    if body is None:
        verdict.add(f"unit {unit.id}", [_no_receipt(manifest, unit)])
        return verdict
    try:
        receipt = Receipt.from_json(body, manifest.receipt(unit.id))
        table, problems = _read_unit(manifest, plan, unit, receipt)
    except StorageError as error:
        table, problems = None, [str(error)]
    if table is not None and table.column_names[:2] != ["query_id", "query"]:
        problems = [f"the columns are {table.column_names[:10]}"]
    if table is not None:
        verdict.units, verdict.rows, verdict.candidates = 1, len(table), unit.pairs
    verdict.add(f"unit {unit.id}", problems)
    return verdict


def _read_unit(manifest: Manifest, plan: Plan, unit: Unit, receipt: Receipt) -> tuple[pa.Table | None, list[str]]:
    """A unit's rows, or what is wrong with its file."""
    data, what = _content(manifest.unit_file(unit.id)), "part" if manifest.staged else "score file"
    if data is None:
        return None, [f"its {what} is missing ({manifest.unit_file(unit.id)})"]
    try:
        table, metadata, counts = read_footer(data)
    except ValueError as error:
        return None, [str(error).splitlines()[0]]
    # a count that one of the two versions did not have yet is 0 in both
    edited = sorted(name for name in SUMMED if counts.get(name, 0) != getattr(receipt, name))
    checks = {
        "the receipt is of another job or unit": (receipt.fingerprint, receipt.unit) == (plan.fingerprint, unit.id),
        f"the {what} has {len(data):,} bytes, its receipt says {receipt.size:,}": len(data) == receipt.size,
        f"the {what}'s checksum is not its receipt's": sha256(data) == receipt.sha256,
        f"the {what} is of another job": metadata.get("batch_rerank.fingerprint") == plan.fingerprint,
        f"the {what} is of another unit": metadata.get("batch_rerank.unit") == unit.id,
        f"the {what} has {len(table)} rows, its receipt says {receipt.rows_out}": len(table) == receipt.rows_out,
        f"the receipt's counts are not the {what}'s: {', '.join(edited)}": not edited,
        f"the receipt has {receipt.rows_in} candidates, the plan {unit.pairs}": receipt.rows_in == unit.pairs,
    }
    problems = [problem for problem, good in checks.items() if not good]
    return (None if problems else table), problems


def _content(location: Location) -> bytes | None:
    with storage_errors(location):
        try:
            return location.read_bytes()
        except FileNotFoundError:
            return None
