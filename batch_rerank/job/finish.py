"""The end of a job: its scores are published, and what only the scoring needed goes."""

from batch_rerank.calls import SMALL_BYTES, Each, in_turn
from batch_rerank.config import JobConfig
from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.publish.keep import tidy
from batch_rerank.publish.publish import move_latest, publish, refuse_other_publication
from batch_rerank.store.bookkeeping import refuse_strays
from batch_rerank.store.lease import Lease
from batch_rerank.store.manifest import Manifest
from batch_rerank.store.names import OUTPUT_KINDS, TREC_RUN, Files
from batch_rerank.store.plans import Plan
from batch_rerank.store.receipts import Totals
from batch_rerank.store.scan import scan


def finish(
    manifest: Manifest,
    plan: Plan,
    totals: Totals,
    config: JobConfig,
    model: ModelSpec,
    lease: Lease,
    each: Each,
    point: bool = True,
) -> None:
    """Publish a plan whose units are all scored, and point `output.latest` at it. Raises what `publish` and `tidy`
    raise."""
    each = by_size(manifest.list_files(), each)
    mark, _ = publish(manifest, plan, config, model, lease, each)
    totals.rows_out = mark.rows
    if point:
        move_latest(manifest, plan, mark, config)
    tidy(manifest, plan, config, lease, each)


def by_size(files: Files, each: Each) -> Each:
    """Who goes through the scores that a listing shows: this process, where Ray would take longer to start."""
    scores = (*files.within("_work"), *files.within("_scores"))
    return in_turn if sum(files.found[name].size for name in scores) < SMALL_BYTES else each


def finished(config: JobConfig, manifest: Manifest, plan: Plan) -> Totals | None:
    """The counts of a job that has nothing left to do: nothing is written then, and no model is loaded."""
    mark = manifest.read_mark()
    if mark is None:
        return None
    existing = manifest.read_plan()
    status = manifest.read_status()
    if existing is None or status.state != "done":
        return None
    manifest.refuse_other(existing, plan)
    found = scan(manifest, existing)
    refuse_strays(manifest, found, existing)
    refuse_other_publication(manifest, None if found.condemned else found.publication, config.output)
    if not Lease(manifest.root, config.cluster.lease_seconds).look():
        return None
    totals = Totals(gpu_seconds=status.totals.gpu_seconds)
    for receipt in found.committed:
        totals.add(receipt)
    totals.rows_out = mark.rows
    if found.publication is None or found.condemned or totals.units < len(existing.units):
        return None
    told = (existing.fingerprint, len(existing.units), found.publication.id)
    whole = {part.part: (part.size, part.sha256) for part in found.parts.values()}
    if (mark.fingerprint, mark.units, mark.publication) != told:
        return None
    if {part.name: (part.size, part.sha256) for part in mark.parts} != whole:
        return None
    absent = config.output.trec_run and not (mark.trec_run and found.files.size(TREC_RUN) == mark.trec_run.size)
    needless = ("work",) if config.output.keep_scores else ("work", "scores")
    untidy = any(found.files.matching(OUTPUT_KINDS[kind]) for kind in needless)
    if absent or untidy or totals.failed > config.scoring.max_failed_rows * totals.rows_in:
        return None
    return totals
