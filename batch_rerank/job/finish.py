"""The end of a job: its scores are published, and what only the scoring needed goes."""

from batch_rerank.calls import SMALL_BYTES, Each, in_turn
from batch_rerank.config import JobConfig
from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.publish.keep import tidy
from batch_rerank.publish.publication import stands
from batch_rerank.publish.publish import move_latest, publish, refuse_other_publication
from batch_rerank.store.bookkeeping import refuse_strays
from batch_rerank.store.lease import Lease
from batch_rerank.store.manifest import Manifest
from batch_rerank.store.names import OUTPUT_KINDS, TREC_RUN, Files
from batch_rerank.store.plans import Plan
from batch_rerank.store.receipts import Totals
from batch_rerank.store.records import Mark
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
    if totals.units < len(existing.units) or not stands(mark, existing, found):
        return None
    failed = totals.failed > config.scoring.max_failed_rows * totals.rows_in
    return None if failed or left_beside(config, mark, found.files) else totals


def left_beside(config: JobConfig, mark: Mark | None, files: Files) -> list[str]:
    """What is left to do where all parts are there, in the words in which it is told once it is done."""
    run = mark.trec_run if mark else None
    absent = config.output.trec_run and not (run and files.size(TREC_RUN) == run.size)
    kept = not config.output.keep_scores and files.matching(OUTPUT_KINDS["scores"])
    work = files.matching(OUTPUT_KINDS["work"])
    told = {
        "its TREC run was written": absent,
        "its scores were removed": kept or (work and not config.output.keep_scores),
        "its scores were gathered": work and config.output.keep_scores,
    }
    return [words for words, done in told.items() if done]
