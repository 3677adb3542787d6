"""Proof that an output is what its input asks for: re-reads every part and the ids of every shard.

For each part: its receipt and `_SUCCESS` name it with its size and checksum, every input candidate of its units appears
exactly once (or was cut by top_k), ranks are 1, 2, … by score, then first-stage rank, then doc_id, and nothing else
lies in between. Files of scores have their receipts' checksums. Of an output that is not published yet the units'
score files are compared with the input.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, groupby

from batch_rerank.calls import SMALL_BYTES, Each, in_order
from batch_rerank.config import JobConfig
from batch_rerank.publish.output import Opened, Place, config_of, is_stage, lease_seconds_of, open_output
from batch_rerank.publish.publication import of_units, output_of
from batch_rerank.publish.verify_parts import PartCheck, counted, verify_part, verify_scores
from batch_rerank.publish.verify_units import ShardCheck, Verdict, content, no_receipt, verify_shard, verify_staged
from batch_rerank.store.bookkeeping import expected_parts
from batch_rerank.store.filesystem import Location, storage_errors
from batch_rerank.store.lease import hold
from batch_rerank.store.manifest import Manifest
from batch_rerank.store.names import SCORES, TREC_RUN, part_name
from batch_rerank.store.plans import Plan, Unit
from batch_rerank.store.receipts import Publication
from batch_rerank.store.records import Mark, TrecRun, parse
from batch_rerank.store.scan import Scan, evidence, note_name, part_files, scan, unit_files
from batch_rerank.store.verdict import why_unfinished

VERIFY_THREADS = 4

Works = Iterator[Callable[[], Verdict]]
"""Each is small, and can be done anywhere."""


def verify(
    place: Place | str,
    repair: bool = False,
    output_only: bool = False,
    on: Callable[[JobConfig], Each] | None = None,
) -> Verdict:
    """Check an output against its input or, with `output_only`, against its plan and receipts alone, for when the input
    is gone; with `repair`, make what is damaged not done, so that the next run makes it again: parts from the scores,
    and where those are damaged, the scores. `on` says where a large output is gone through; None, and a small one or a
    stage: in threads of this process. The verdict is the same, problems in the same order.

    Raises StorageError where it has no plan, and with `repair` ConflictError where a job is at work on it;
    differences are in the verdict. Of a staged input parts and receipts are compared, not the sources.
    """
    place = Place(place) if isinstance(place, str) else place
    manifest, plan = open_output(place, or_stage=True)
    checks = _Checks(manifest, plan, place, output_only, on)
    if not repair:
        return checks.verdict(scan(manifest, plan))
    with hold(manifest.root, lease_seconds_of(plan)) as lease:
        found = scan(manifest, plan)
        verdict = checks.verdict(found)
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


class _Checks:
    """What is held against what, of an output that is opened."""

    def __init__(
        self,
        manifest: Manifest,
        plan: Plan,
        place: Place,
        output_only: bool,
        on: Callable[[JobConfig], Each] | None,
    ) -> None:
        self._manifest, self._plan, self._on = manifest, plan, on
        self._output = Opened.of(manifest, place.options)
        self._job = None if is_stage(plan) else config_of(plan, place)
        self._input = None if output_only else self._job

    def verdict(self, found: Scan) -> Verdict:
        """All that is wrong."""
        verdict, manifest, plan = Verdict(), self._manifest, self._plan
        mark, problems = _verify_mark(manifest, plan, found)
        verdict.problems += problems
        if found.condemned:
            verdict.problems.append(
                "what is published is being withdrawn; run batch-rerank publish, or the job, to go on"
            )
        for stray in found.files.strays(expected_parts(manifest, plan, found.publication)):
            verdict.problems.append(
                f"{manifest.root / stray}: a Parquet file that the plan does not have; readers would take it for output"
            )
        works: Works
        if self._job is None:
            works = (partial(verify_staged, self._output, plan.fingerprint, unit) for unit in plan.units)
        elif found.publication is not None:
            done = {receipt.unit for receipt in found.committed}
            for unit in plan.left(done):
                verdict.add(f"unit {unit.id}", [found.broken.get(unit.id, no_receipt(manifest, unit))])
            waiting = [
                unit
                for number in range(len(found.publication.parts))
                if number not in found.parts
                for unit in of_units(found.publication, plan, number)
                if manifest.unit_name(unit.id) in found.files.found and unit.id in done
            ]
            works = chain(self._parts(found.publication, self._job, mark), self._shards(found, waiting))
        else:
            works = self._shards(found, plan.units)
        each = None
        if self._on is not None and self._job is not None and found.files.bytes >= SMALL_BYTES:
            each = self._on(self._job)
        for result in in_order(chain(works, self._scores(found)), each, VERIFY_THREADS):
            verdict.take(result)
        return verdict

    def _parts(self, publication: Publication, job: JobConfig, mark: Mark | None) -> Works:
        plan, marked = self._plan, {} if mark is None else {part.name: part for part in mark.parts}
        top_k = output_of(publication, job.output).top_k
        for number in range(len(publication.parts)):
            units = of_units(publication, plan, number)
            check = PartCheck(
                number=number,
                publication=publication.id,
                fingerprint=publication.fingerprint,
                top_k=top_k,
                units=units,
                shards={unit.shard: plan.shards[unit.shard] for unit in units},
                marked=marked.get(part_name(number)),
                config=self._input,
            )
            yield partial(verify_part, self._output, check)

    def _shards(self, found: Scan, units: Sequence[Unit]) -> Works:
        """The work on score files that are not published yet."""
        receipts = {receipt.unit: receipt for receipt in found.committed}
        for shard, of_shard in groupby(units, key=lambda unit: unit.shard):
            mine = list(of_shard)
            ids = [unit.id for unit in mine]
            check = ShardCheck(
                fingerprint=self._plan.fingerprint,
                shard=self._plan.shards[shard],
                units=mine,
                receipts={unit: replace(receipts[unit], shape="") for unit in ids if unit in receipts},
                broken={unit: found.broken[unit] for unit in ids if unit in found.broken},
                config=self._input,
            )
            yield partial(verify_shard, self._output, check)

    def _scores(self, found: Scan) -> Works:
        told = defaultdict[str, dict[int, tuple[str, dict[str, int]]]](dict)
        for receipt in found.committed:
            place = found.place(receipt)
            if place is not None:
                told[place[0]][place[1]] = counted(receipt)
        for name in found.files.matching(SCORES):
            yield partial(verify_scores, self._output, self._plan.fingerprint, name, told.get(name, {}))


def _verify_mark(manifest: Manifest, plan: Plan, found: Scan) -> tuple[Mark | None, list[str]]:
    """`_SUCCESS`, and what is wrong with it and with the TREC run that it speaks of."""
    body = content(manifest.success)
    if body is None:
        return None, [why_unfinished(manifest)]
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
