"""Scores to an output that people can use: parts, `_SUCCESS`, the pointer to it, then `_scores/` instead of `_work/`.

Every step is one that another publisher can take over: the publication is created once and says which units are in
which part, parts are a function of it and the score files, and `_SUCCESS` comes when all of them are there.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from batch_rerank.calls import Each
from batch_rerank.config import JobConfig, Output
from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.errors import ConflictError, StorageError
from batch_rerank.publish.parts import PartWork, publish_part, try_part
from batch_rerank.publish.publication import make_publication, of_units, publishing_fields
from batch_rerank.publish.trec import write_trec_run
from batch_rerank.store.bookkeeping import mark_done
from batch_rerank.store.filesystem import locate, storage_errors
from batch_rerank.store.latest import Pointer, read_pointer, remember_pointer
from batch_rerank.store.lease import Lease
from batch_rerank.store.manifest import PUBLICATION, Manifest, differing
from batch_rerank.store.names import TREC_RUN, Files, part_name
from batch_rerank.store.plans import Plan
from batch_rerank.store.receipts import Publication
from batch_rerank.store.records import Mark, PartMark
from batch_rerank.store.scan import Scan, scan

log = logging.getLogger("batch_rerank")
LOG_SECONDS = 10.0


def publish(
    manifest: Manifest, plan: Plan, config: JobConfig, model: ModelSpec, lease: Lease, each: Each
) -> tuple[Mark, Publication]:
    """Publish the scores of a plan, all of which are there, as `config.output` says; what is published already stays.
    Raises the errors of its steps, and ConflictError where the lease is lost or the output is published otherwise."""
    found = scan(manifest, plan)
    refuse_unseen(manifest, plan, found)
    lease.check()  # a successor may have judged otherwise, and what has a publication is not judged again
    standing = None if found.condemned else found.publication
    publication = standing or _begin(manifest, plan, found, config, lease)
    refuse_other_publication(manifest, publication, config.output)
    whole = found.parts if standing else {}
    missing = [number for number in range(len(publication.parts)) if number not in whole]
    if missing:
        _withdraw_parts(manifest, found.files, missing)
        log.info("publishing %d parts of %d units", len(missing), len(plan.units))
    done = dict(whole)
    said = time.monotonic()
    works = _works(publication, plan, found, missing, lease.epoch)
    for receipt in each([partial(publish_part, work, config, model) for work in works]):
        done[int(receipt.part[len("part-") : -len(".parquet")])] = receipt
        lease.check()
        if time.monotonic() - said >= LOG_SECONDS:
            said = time.monotonic()
            log.info("published %d of %d parts", len(done), len(publication.parts))
    there = None if missing else manifest.read_mark()  # of these parts
    run = None if there is None else there.trec_run
    if config.output.trec_run and (run is None or found.files.size(TREC_RUN) != run.size):
        lease.check()
        run = write_trec_run(manifest, range(len(publication.parts)))
    parts = [done[number] for number in range(len(publication.parts))]
    mark = Mark(
        rows=sum(part.rows for part in parts),
        publication=publication.id,
        trec_run=run,
        parts=[PartMark(part.part, part.rows, part.size, part.sha256) for part in parts],
    )
    mark_done(manifest, plan, mark, lease)
    for name, taken_back in found.withdrawn.items():
        if taken_back != publication.id:  # it is gone, and none will be the same
            manifest.remove_seen(name, found.files)
    return mark, publication


def refuse_unseen(manifest: Manifest, plan: Plan, found: Scan) -> None:
    """Raise StorageError where a listing does not show what has been committed."""
    if len(found.committed) < len(plan.units):
        done = {receipt.unit for receipt in found.committed}
        lacking = next(unit.id for unit in plan.units if unit.id not in done)
        raise StorageError(
            f"{manifest.root}: {len(plan.units) - len(done)} of {len(plan.units)} units do not show in a listing, e.g. "
            f"{lacking} ({found.broken.get(lacking, 'no receipt')}); expected all of them; _manifest and _work must be "
            "directories and no links, and no other program may remove files there; run the job again"
        )


def try_out(
    manifest: Manifest, plan: Plan, found: Scan, config: JobConfig, model: ModelSpec, lease: Lease, each: Each
) -> None:
    """Make every part that `publish` will make, and write none: what is published is withdrawn for what can be, and
    nothing else. Raises what `publish` raises."""
    publication = _made(plan, found, config, lease)
    works = list(_works(publication, plan, found, range(len(publication.parts)), lease.epoch))
    log.info("trying %d parts of %d units before what is published is withdrawn", len(works), len(plan.units))
    for _ in each([partial(try_part, work, config, model) for work in works]):
        lease.check()


def _begin(manifest: Manifest, plan: Plan, found: Scan, config: JobConfig, lease: Lease) -> Publication:
    """A new publication; of two publishers both follow the first. Behind a withdrawal it is unlike all before it: who
    withdraws may be paused, and removes on S3 what has the content that it saw."""
    made = _made(plan, found, config, lease)
    location = manifest.root / PUBLICATION
    with storage_errors(location):
        while not location.create_exclusive(made.to_json()):
            there, seen = manifest.read_publication(), location.stat()
            if there is not None and there.id not in found.withdrawn.values():
                return there
            # one that was taken back: a publisher that was paused before it wrote its own has written it since
            lease.check()
            location.remove_seen(seen)
    return made


def _made(plan: Plan, found: Scan, config: JobConfig, lease: Lease) -> Publication:
    sizes = {receipt.unit: receipt.size for receipt in found.committed}
    return make_publication(plan, sizes, publishing_fields(config.output), lease.id if found.withdrawn else "")


def refuse_other_publication(manifest: Manifest, publication: Publication | None, output: Output) -> None:
    """Raise ConflictError that names the settings in which an output is published otherwise."""
    lines = {} if publication is None else differing(publication.fields, publishing_fields(output))
    if lines:
        names = ", ".join(f"output.{name}" for name in lines)
        raise ConflictError(
            f"{manifest.root}: the same scores are published otherwise there; {names} differ:\n"
            + "\n".join(lines.values())
            + "\nexpected the same settings; batch-rerank publish JOB replaces what is published, without scoring; "
            "another output.path keeps it"
        )


def unavailable(manifest: Manifest, plan: Plan, found: Scan) -> list[str]:
    """Units whose scores are not there, or not any more."""
    there = {receipt.unit for receipt in found.committed if found.available(manifest, receipt)}
    return [unit.id for unit in plan.units if unit.id not in there]


def _withdraw_parts(manifest: Manifest, files: Files, numbers: list[int]) -> None:
    """Remove what is there of parts that are not done, and the mark that speaks of them."""
    for name in ("_SUCCESS", TREC_RUN):
        manifest.remove_seen(name, files)
    for number in numbers:
        manifest.remove_seen(part_name(number), files)
        manifest.remove_seen(f"_manifest/parts/{number:05d}.json", files)


def _works(publication: Publication, plan: Plan, found: Scan, numbers: Sequence[int], epoch: int) -> Iterator[PartWork]:
    places = found.places()
    checksums = {receipt.unit: receipt.sha256 for receipt in found.committed}
    for number in numbers:
        units = of_units(publication, plan, number)
        yield PartWork(
            number=number,
            publication=publication.id,
            fingerprint=plan.fingerprint,
            units=units,
            places={unit.id: places[unit.id] for unit in units if unit.id in places},
            checksums={unit.id: checksums[unit.id] for unit in units if unit.id not in places},
            epoch=epoch,
            shards={unit.shard: plan.shards[unit.shard] for unit in units},
        )


def move_latest(manifest: Manifest, plan: Plan, mark: Mark, config: JobConfig) -> None:
    """Point `output.latest` at this output, replacing what it pointed at. A sample never takes a whole output's
    place."""
    if config.output.latest is None:
        return
    if config.limit is not None:
        log.info("output.latest stays as it is: this is a sample of %d queries", config.limit)
        return
    location = locate(config.output.latest, config.output.storage_options)
    told = Pointer(
        path=str(manifest.root),
        fingerprint=plan.fingerprint,
        publication=mark.publication,
        rows=mark.rows,
        published_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
    there = read_pointer(location)
    if there is not None and replace(there, published_at=told.published_at) == told:
        return
    with storage_errors(location):
        remember_pointer(manifest, location)
        location.write_bytes(told.to_json())
    log.info("%s names %s", location, manifest.root)
