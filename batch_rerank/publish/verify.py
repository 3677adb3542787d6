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
from functools import partial
from itertools import groupby

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batch_rerank.config import JobConfig
from batch_rerank.errors import InputError
from batch_rerank.publish.compare_rows import compare, rows_of_units
from batch_rerank.publish.nested import flat, is_nested
from batch_rerank.publish.output import Place, config_of, input_ids, is_stage, lease_seconds_of, open_output
from batch_rerank.publish.publication import of_units, output_of
from batch_rerank.publish.verify_units import Verdict, content, no_receipt, verify_shard, verify_staged
from batch_rerank.schema import OUTPUT_NAMES
from batch_rerank.store.bookkeeping import expected_parts
from batch_rerank.store.filesystem import Location, storage_errors
from batch_rerank.store.kept import pairs_name, queries_name
from batch_rerank.store.lease import hold
from batch_rerank.store.manifest import Manifest, sha256
from batch_rerank.store.names import SCORES, TREC_RUN, part_name
from batch_rerank.store.plans import Plan, Unit
from batch_rerank.store.receipts import PartReceipt, Publication
from batch_rerank.store.records import Mark, PartMark, TrecRun, parse
from batch_rerank.store.scan import Scan, evidence, note_name, part_files, scan, unit_files

VERIFY_THREADS = 4
HELD = ["query_id", "doc_id", "rank", "score", "first_stage_rank", "error"]
"""Columns of a part that are held against its candidates; the others its checksum covers."""


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
    if found.condemned:
        verdict.problems.append("what is published is being withdrawn; run batch-rerank publish, or the job, to go on")
    for stray in found.files.strays(expected_parts(manifest, plan, found.publication)):
        verdict.problems.append(
            f"{manifest.root / stray}: a Parquet file that the plan does not have; readers would take it for output"
        )
    works: list[Callable[[], Verdict]]
    if config is None:
        works = [partial(verify_staged, manifest, plan, unit) for unit in plan.units]
    elif found.publication is not None:
        marked = {} if mark is None else {part.name: part for part in mark.parts}
        done = {receipt.unit for receipt in found.committed}
        for unit in plan.units:
            if unit.id not in done:
                verdict.add(f"unit {unit.id}", [found.broken.get(unit.id, no_receipt(manifest, unit))])
        works = [
            partial(_verify_part, manifest, plan, found, config, output_only, number, marked.get(part_name(number)))
            for number in range(len(found.publication.parts))
        ]
        numbers = [number for number in range(len(found.publication.parts)) if number not in found.parts]
        waiting = [unit for number in numbers for unit in of_units(found.publication, plan, number)]
        alone = [unit for unit in waiting if manifest.unit_name(unit.id) in found.files.found and unit.id in done]
        works += _by_shard(manifest, plan, found, config, output_only, alone)
    else:
        works = _by_shard(manifest, plan, found, config, output_only, plan.units)
    works += [partial(_verify_scores, manifest, plan, found, name) for name in found.files.matching(SCORES)]
    with ThreadPoolExecutor(VERIFY_THREADS) as pool:
        for result in pool.map(lambda work: work(), works):
            verdict.take(result)
    return verdict


def _by_shard(
    manifest: Manifest, plan: Plan, found: Scan, config: JobConfig, output_only: bool, units: Sequence[Unit]
) -> list[Callable[[], Verdict]]:
    """The work on score files that are not published yet."""
    shards = groupby(units, key=lambda unit: unit.shard)
    return [partial(verify_shard, manifest, plan, found, config, output_only, list(of_shard)) for _, of_shard in shards]


def _verify_mark(manifest: Manifest, plan: Plan, found: Scan) -> tuple[Mark | None, list[str]]:
    """`_SUCCESS`, and what is wrong with it and with the TREC run that it speaks of."""
    body = content(manifest.success)
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
    body, data = content(where), content(location)
    if body is None or data is None:
        absent, path = ("receipt", where) if body is None else ("file", location)
        return None, [f"its {absent} is missing ({path})"]
    try:
        receipt = parse(PartReceipt, body)
        schema = pq.read_schema(io.BytesIO(data))
        names = flat(schema.empty_table()).column_names
        whole = is_nested(schema.names) or not set(HELD) <= set(names)
        rows = flat(pq.read_table(io.BytesIO(data), columns=None if whole else HELD))
    except (pa.ArrowException, OSError, ValueError) as error:
        return None, [(str(error) or type(error).__name__).splitlines()[0]]
    metadata = schema.metadata or {}
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
        f"the columns are {names[:10]}": names[: len(OUTPUT_NAMES)] == list(OUTPUT_NAMES),
    }
    problems = [problem for problem, good in checks.items() if not good]
    return (None if problems else rows), problems


def _verify_scores(manifest: Manifest, plan: Plan, found: Scan, name: str) -> Verdict:
    """A file below `_scores/` against its receipt and those of its units; one without is none yet, and nothing reads
    it."""
    verdict, receipt = Verdict(), manifest.read_scores_receipt(name)
    if receipt is None or receipt.fingerprint != plan.fingerprint:
        return verdict
    data = content(manifest.root / name)
    if data is None or (len(data), sha256(data)) != (receipt.size, receipt.sha256):
        verdict.add(name, ["not what its receipt says (another size or checksum)"])
        return verdict
    beside = {queries_name(name): receipt.queries_sha256, pairs_name(name): receipt.pairs_sha256}
    for other, checksum in beside.items():
        kept = content(manifest.root / other)
        if kept is not None and sha256(kept) != checksum:
            verdict.problems.append(f"{other}: not what {name}'s receipt says; delete it: later jobs score its pairs")
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
