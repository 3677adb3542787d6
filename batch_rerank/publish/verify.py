"""Proof that an output is what its input asks for: re-reads every part and the ids of every shard.

For each unit: the receipt is there, the part has its size and checksum, every input candidate appears exactly once (or
was cut by top_k), ranks are 1, 2, … by score, then first-stage rank, then doc_id, and nothing else lies in between.
"""

import hashlib
import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batch_rerank.config import JobConfig
from batch_rerank.errors import InputError, StorageError
from batch_rerank.input.layouts import run_starts
from batch_rerank.publish.output import Place, config_of, input_ids, is_stage, lease_seconds_of, open_output
from batch_rerank.schema import OUTPUT_NAMES
from batch_rerank.store.filesystem import Location, storage_errors
from batch_rerank.store.lease import hold
from batch_rerank.store.manifest import SUMMED, Manifest, Plan, Receipt, sha256, versions
from batch_rerank.store.names import TREC_RUNS
from batch_rerank.store.plans import Unit
from batch_rerank.store.records import Mark, TrecRun, parse, parse_counts

VERIFY_THREADS = 4
COMPARED = ["query_id", "doc_id", "first_stage_rank"]


@dataclass
class Verdict:
    """What `verify` found. An output is good if there are no problems. damaged: units that a rerun would mend;
    repaired: whether they have been made not done for it."""

    units: int = 0
    rows: int = 0
    candidates: int = 0
    problems: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    repaired: bool = False

    def add(self, unit_id: str, problems: Sequence[str]) -> None:
        """Problems of one unit."""
        if problems:
            self.problems += [f"unit {unit_id}: {problem}" for problem in problems]
            self.damaged.append(unit_id)


def verify(place: Place | str, repair: bool = False, output_only: bool = False) -> Verdict:
    """Check an output against its input or, with `output_only`, against its plan and receipts alone, for when the input
    is gone; with `repair`, make its damaged units not done, so that the next run scores them again.

    Raises StorageError where it has no plan, and with `repair` ConflictError where a job is at work on it;
    differences are in the verdict. Of a staged input parts and receipts are compared, not the sources.
    """
    manifest, plan = open_output(place, or_stage=True)
    config = None if is_stage(plan) else config_of(plan, place)
    if not repair:
        return _verify(manifest, plan, config, output_only)
    with hold(manifest.root, lease_seconds_of(plan)) as lease:
        files = manifest.list_files()
        verdict = _verify(manifest, plan, config, output_only)
        lease.check()
        if verdict.damaged:
            # notes first: whoever takes over from here finds the same units damaged, and removes them itself
            for unit_id in verdict.damaged:
                with storage_errors(manifest.damage(unit_id)):
                    manifest.damage(unit_id).write_bytes(versions(files, unit_id))
            manifest.remove_seen("_SUCCESS", files)
            lease.check()
            verdict.repaired = True
    return verdict


def _verify(manifest: Manifest, plan: Plan, config: JobConfig | None, output_only: bool) -> Verdict:
    verdict = Verdict()
    verdict.problems += _verify_mark(manifest, plan)
    for found in manifest.list_files().strays(unit.id for unit in plan.units):
        verdict.problems.append(
            f"{manifest.root / found}: a Parquet file that the plan does not have; readers would take it for output"
        )
    with ThreadPoolExecutor(VERIFY_THREADS) as pool:
        if config is None:
            work: Callable[[list[Unit]], Verdict] = partial(_verify_staged, manifest, plan)
            shards = [[unit] for unit in plan.units]
        else:
            work = partial(_verify_shard, manifest, plan, config, output_only)
            shards = [list(units) for _, units in groupby(plan.units, key=lambda unit: unit.shard)]
        for result in pool.map(work, shards):
            verdict.units += result.units
            verdict.rows += result.rows
            verdict.candidates += result.candidates
            verdict.problems += result.problems
            verdict.damaged += result.damaged
    return verdict


def _verify_mark(manifest: Manifest, plan: Plan) -> list[str]:
    """What is wrong with `_SUCCESS`, and with the TREC run that it speaks of."""
    body = _content(manifest.success)
    if body is None:
        return ["no _SUCCESS: the job has not finished"]
    try:
        mark = parse(Mark, body)
    except ValueError:
        return ["_SUCCESS cannot be read"]
    problems = []
    if (mark.fingerprint, mark.units) != (plan.fingerprint, len(plan.units)):
        problems.append(f"_SUCCESS is of another job, or of {mark.units} units where the plan has {len(plan.units)}")
    for name, claimed in zip(TREC_RUNS, (mark.trec_run, mark.old_run), strict=True):
        if claimed is not None:
            problems += _verify_trec_run(manifest.root / name, claimed)
    return problems


def _verify_trec_run(location: Location, claimed: TrecRun) -> list[str]:
    digest, size = hashlib.sha256(), 0
    with storage_errors(location):
        try:
            with location.open() as file:
                while block := file.read(2**24):
                    digest.update(block)
                    size += len(block)
        except FileNotFoundError:
            return [f"{location.name} is missing; remove _SUCCESS and run the job again"]
    if claimed != TrecRun(size, digest.hexdigest()):
        return [f"{location.name} is not what the job wrote; remove _SUCCESS and run the job again"]
    return []


def _verify_shard(manifest: Manifest, plan: Plan, config: JobConfig, output_only: bool, units: list[Unit]) -> Verdict:
    verdict = Verdict()
    rows = ((unit, None) for unit in units) if output_only else input_ids(plan, config, units)
    try:
        for unit, candidates in rows:
            part, problems = _read_part(manifest, plan, unit)
            if part is not None:
                problems = compare(candidates, part, config.output.top_k)
                verdict.units += 1
                verdict.rows += len(part)
                verdict.candidates += unit.pairs if candidates is None else len(candidates)
            verdict.add(unit.id, problems)
    except InputError as error:
        verdict.problems.append(
            f"units {units[0].id} to {units[-1].id}: input: {error} (--output-only does without the input)"
        )
    return verdict


def _verify_staged(manifest: Manifest, plan: Plan, units: list[Unit]) -> Verdict:
    verdict = Verdict()
    for unit in units:
        part, problems = _read_part(manifest, plan, unit, ("query_id", "query"))
        if part is not None:
            verdict.units += 1
            verdict.rows += len(part)
            verdict.candidates += unit.pairs
        verdict.add(unit.id, problems)
    return verdict


def _read_part(
    manifest: Manifest, plan: Plan, unit: Unit, columns: Sequence[str] = OUTPUT_NAMES
) -> tuple[pa.Table | None, list[str]]:
    """A unit's rows, whose first columns must be these, or what is wrong with its receipt and part."""
    where, location = manifest.receipt(unit.id), manifest.part(unit.id)
    body, data = _content(where), _content(location)
    if body is None or data is None:
        absent = "receipt" if body is None else "part"
        return None, [f"its {absent} is missing ({where if body is None else location})"]
    try:
        receipt = Receipt.from_json(body, where)
        table = pq.read_table(io.BytesIO(data))
        metadata = table.schema.metadata or {}
        counts = parse_counts(metadata.get(b"batch_rerank.counts", b"{}"))
    except (StorageError, pa.ArrowException, OSError, ValueError) as error:
        return None, [(str(error) or type(error).__name__).splitlines()[0]]
    # a count that one of the two versions did not have yet is 0 in both
    edited = sorted(name for name in SUMMED if counts.get(name, 0) != getattr(receipt, name))
    checks = {
        "the receipt is of another job or unit": (receipt.fingerprint, receipt.unit) == (plan.fingerprint, unit.id),
        f"the part has {len(data):,} bytes, its receipt says {receipt.size:,}": len(data) == receipt.size,
        "the part's checksum is not its receipt's": sha256(data) == receipt.sha256,
        "the part is of another job": metadata.get(b"batch_rerank.fingerprint") == plan.fingerprint.encode(),
        "the part is of another unit": metadata.get(b"batch_rerank.unit") == unit.id.encode(),
        f"the part has {len(table)} rows, its receipt says {receipt.rows_out}": len(table) == receipt.rows_out,
        f"the receipt's counts are not the part's: {', '.join(edited)}": not edited,
        f"the receipt has {receipt.rows_in} candidates, the plan {unit.pairs}": receipt.rows_in == unit.pairs,
        f"the columns are {table.column_names[:10]}": table.column_names[: len(columns)] == list(columns),
    }
    problems = [problem for problem, good in checks.items() if not good]
    return (None if problems else table), problems


def _content(location: Location) -> bytes | None:
    with storage_errors(location):
        try:
            return location.read_bytes()
        except FileNotFoundError:
            return None


def compare(candidates: pa.Table | None, part: pa.Table, top_k: int | None) -> list[str]:
    """Differences between a unit's input candidates, where they are known, and its output rows; none if the part is
    right."""
    problems = _repeated(part) + ([] if candidates is None else _compare_ids(candidates, part, top_k))
    starts = run_starts(part["query_id"].combine_chunks())
    lengths = np.diff(np.append(starts, len(part)))
    expected = np.arange(len(part)) - np.repeat(starts, lengths) + 1
    if not np.array_equal(part["rank"].to_numpy(), expected):
        problems.append("ranks are not 1, 2, … within each query")
    order = part.select(["score", "first_stage_rank", "doc_id"]).append_column(
        "query", pa.array(np.repeat(starts, lengths))
    )
    keys = [("query", "ascending"), ("score", "descending"), ("first_stage_rank", "ascending"), ("doc_id", "ascending")]
    if not np.array_equal(pc.sort_indices(order, sort_keys=keys).to_numpy(), np.arange(len(part))):
        problems.append("ranks do not follow the scores")
    if not pc.all(pc.equal(pc.is_null(part["score"]), pc.is_valid(part["error"]))).as_py() and len(part):
        problems.append("a row has a score and an error, or neither")
    return problems


def _repeated(part: pa.Table) -> list[str]:
    repeated = part.group_by(["query_id", "doc_id"]).aggregate([([], "count_all")])
    twice = repeated.filter(pc.greater(repeated["count_all"], 1))
    return [f"{len(twice)} candidates appear twice, e.g. {_example(twice)}"] if len(twice) else []


def _compare_ids(candidates: pa.Table, part: pa.Table, top_k: int | None) -> list[str]:
    problems = []
    keys = ["query_id", "doc_id"]
    foreign = part.select(COMPARED).join(candidates.select(COMPARED), COMPARED, join_type="left anti")
    if len(foreign):
        problems.append(f"{len(foreign)} rows are no input candidates, e.g. {_example(foreign)}")
    missing = candidates.select(keys).join(part.select(keys), keys, join_type="left anti")
    if top_k is None and len(missing):
        problems.append(f"{len(missing)} candidates are missing, e.g. {_example(missing)}")
    counts = candidates.group_by("query_id").aggregate([([], "count_all")])
    wanted = pc.min_element_wise(counts["count_all"], top_k if top_k is not None else 2**62)
    kept = part.group_by("query_id").aggregate([([], "count_all")]).rename_columns(["query_id", "kept"])
    both = counts.append_column("wanted", wanted).join(kept, "query_id", join_type="left outer")
    short = both.filter(pc.not_equal(pc.fill_null(both["kept"], 0), both["wanted"]))
    if top_k is not None and len(short):
        row = short.slice(0, 1).to_pylist()[0]
        found = f"{row['query_id']!r}: {row['kept']}, expected {row['wanted']}"
        problems.append(f"{len(short)} queries have another number of rows than top_k keeps, e.g. {found}")
    first = candidates["query_id"].combine_chunks()
    if not problems and first.take(pa.array(run_starts(first))) != _order_of(part):
        problems.append("queries are not in input order")
    return problems


def _order_of(part: pa.Table) -> pa.Array:
    ids = part["query_id"].combine_chunks()
    return ids.take(pa.array(run_starts(ids)))


def _example(rows: pa.Table) -> str:
    row = rows.slice(0, 1).to_pylist()[0]
    return f"({row['query_id']!r}, {row['doc_id']!r})"
