"""The verbs of outputs that are there: publish, status, verify, evaluate, clean."""

import logging
import os
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from batch_rerank.cli_base import (
    Json,
    LimitOfJob,
    Local,
    Output,
    SetOfJob,
    app,
    lasting,
    leave,
    print_json,
    verb,
    verdict_told,
)
from batch_rerank.errors import BatchRerankError
from batch_rerank.outside import shown_id

if TYPE_CHECKING:
    from batch_rerank.calls import Each
    from batch_rerank.config import JobConfig
    from batch_rerank.publish.output import Place

log = logging.getLogger("batch_rerank")


def _on(place: "Place", local: bool) -> "Callable[[JobConfig], Each] | None":
    """Where a large output is gone through: in Ray's tasks, but not in those of a cluster whose nodes may not have the
    disk that it is on."""
    from batch_rerank.calls import in_turn
    from batch_rerank.job.staging import on_ray
    from batch_rerank.store.filesystem import locate

    def on(config: "JobConfig") -> "Each":
        address = config.cluster.address or os.environ.get("RAY_ADDRESS")
        if not (address and locate(place.path, place.options).is_local):
            return on_ray(config)
        log.info("%s is on a disk, which the nodes of %s may not have: this process reads it", place.path, address)
        return in_turn

    return None if local else on


@app.command()
@lasting
def publish(
    output: Output,
    local: Local = False,
    despite_gate: Annotated[
        str | None, typer.Option("--despite-gate", metavar="REASON", help="Though the job's gate refuses; recorded.")
    ] = None,
    limit: LimitOfJob = None,
    overrides: SetOfJob = None,
    as_json: Json = False,
) -> None:
    """Publish scores that are there: with another top_k, layout or columns than before, and without a model."""
    from batch_rerank.job.republish import republish
    from batch_rerank.publish.output import find_place

    with verdict_told(as_json):
        done = republish(find_place(output, overrides or (), limit), local=local, despite=despite_gate)
    stood = f"already published; {', '.join(done.beside) or 'nothing to do'}"
    how = stood if done.stood else "published again" if done.again else "published"
    log.info("%s: %s rows from %s candidates in %.1f s", how, f"{done.rows_out:,}", f"{done.rows_in:,}", done.seconds)
    log.info("output: %s", done.output)
    if done.latest:
        log.info("output.latest: %s", done.latest)
    if done.report:
        log.info("report: %s", done.report)
    if as_json:
        print_json({**asdict(done), "exit_code": 0})


@app.command()
@verb
def status(output: Output, limit: LimitOfJob = None, overrides: SetOfJob = None, as_json: Json = False) -> None:
    """Show how far an output is, how fast it grows or how its last run ended; a run that has died is said to have."""
    from batch_rerank.publish.output import find_place
    from batch_rerank.publish.status import status_of_output

    found = status_of_output(find_place(output, overrides or (), limit))
    if as_json:
        print_json(found)
        return
    for name, value in found.items():
        log.info("%-17s %s", name.replace("_", " "), f"{value:,}" if type(value) is int else value)


@app.command()
@verb
def verify(
    output: Output,
    repair: Annotated[
        bool, typer.Option("--repair", help="Make what is damaged not done: the next run makes it again.")
    ] = False,
    output_only: Annotated[
        bool, typer.Option("--output-only", help="Without the input: for when it has expired.")
    ] = False,
    local: Local = False,
    limit: LimitOfJob = None,
    overrides: SetOfJob = None,
    as_json: Json = False,
) -> None:
    """Re-read an output and its input, and prove that nothing is lost, doubled or changed."""
    from batch_rerank.publish.output import find_place
    from batch_rerank.publish.verify import verify as verify_output

    place = find_place(output, overrides or (), limit)
    verdict = verify_output(place, repair, output_only, _on(place, local))
    if as_json:
        print_json({**asdict(verdict), "ok": not verdict.problems})
    for problem in verdict.problems[:20]:
        log.error("%s", problem)
    if verdict.problems:
        mended = f"; {len(verdict.damaged)} damaged file(s) are made not done: run the job again"
        mended = mended if verdict.repaired else ""
        leave(6, f"error: {output}: {len(verdict.problems)} problem(s) found{mended}")
    log.info(
        "verified: %s rows of %s candidates in %d units", f"{verdict.rows:,}", f"{verdict.candidates:,}", verdict.units
    )


@app.command()
@verb
def evaluate(
    run_: Annotated[str, typer.Option("--run", metavar="OUTPUT", help="The output of a job, or its job file.")],
    qrels: Annotated[str, typer.Option(help="TREC qrels, or a BEIR TSV with a header.")],
    measures: Annotated[list[str] | None, typer.Argument(help="As in ir_measures; nDCG@10 RR@10 R@10 if none.")] = None,
    per_query: Annotated[bool, typer.Option("--per-query", help="Also each query's values.")] = False,
    local: Local = False,
    limit: LimitOfJob = None,
    overrides: SetOfJob = None,
    as_json: Json = False,
) -> None:
    """Evaluate the first stage and the reranked run against qrels."""
    from batch_rerank.judge.evaluate import DEFAULT_MEASURES
    from batch_rerank.judge.evaluate import evaluate as evaluate_output
    from batch_rerank.publish.output import find_place

    place = find_place(run_, overrides or (), limit)
    on = _on(place, local)
    result = evaluate_output(place, qrels, measures or DEFAULT_MEASURES, per_query=per_query, on=on)
    if as_json:
        values = asdict(result)
        if not per_query:
            del values["before_by_query"], values["after_by_query"]
        print_json(values)
        return
    if result.limit is not None:  # before the numbers, which are small
        log.warning(
            "this is a sample of %s queries, and the means are over all %s judged ones: %s of them count as zero",
            *(f"{count:,}" for count in (result.limit, result.queries, result.queries_missing)),
        )
    if result.deeper:
        log.warning(
            "%s: deeper than output.top_k: %d, by which the reranked run was cut and the first stage was not; what was "
            "cut counts as not found (batch-rerank publish with a larger top_k keeps more)",
            ", ".join(result.deeper),
            result.top_k,
        )
    table = Table("measure", "before", "after", "change")
    for name, after in result.after.items():
        before = result.before[name]
        table.add_row(Text(name), f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}")
    Console().print(table)
    if per_query:
        by_query = Table("query_id", "measure", "before", "after")
        for name, queries in result.after_by_query.items():
            for query_id, after in queries.items():
                before = result.before_by_query[name][query_id]
                by_query.add_row(Text(shown_id(query_id)), Text(name), f"{before:.4f}", f"{after:.4f}")
        Console().print(by_query)
    missing = (
        f"; {result.queries_missing} of them are not in the run and count as zero" if result.queries_missing else ""
    )
    log.info("%d judged queries%s", result.queries, missing)


@app.command()
@verb
def clean(
    outputs: Annotated[list[str], typer.Argument(metavar="OUTPUT…", help="Outputs or stages, or their job files.")],
    scores: Annotated[bool, typer.Option("--scores", help="Their scores too: they cannot be published again.")] = False,
    whole: Annotated[bool, typer.Option("--all", help="All of them, parts and plan.")] = False,
    latest: Annotated[str | None, typer.Option(help="A pointer whose output is kept, beside output.latest.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Also what a pointer names.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go.")] = False,
    as_json: Json = False,
) -> None:
    """Show what outputs take on storage, and remove what only a run needed; with options, more."""
    from batch_rerank.publish.clean import What
    from batch_rerank.publish.clean import clean as clean_output
    from batch_rerank.publish.output import find_place

    what: What = "all" if whole else "scores" if scores else "work"
    told: list[dict[str, Any]] = []
    failed: BatchRerankError | None = None
    for output in outputs:  # of each is said what was done, whatever becomes of the next
        try:
            one = clean_output(find_place(output), what, latest=latest, force=force, dry_run=dry_run)
        except BatchRerankError as error:
            failed = failed or error
            told.append({"output": output, "error": str(error), "exit_code": error.exit_code})
            if len(outputs) > 1:
                log.error("%s", error)
            continue
        told.append(asdict(one))
        log.info("%s", one.output)
        for kind, taken in one.takes.items():
            gone = one.removed.get(kind)
            said = "" if gone is None else "  would be removed" if dry_run else "  removed"
            stays = "  not ours, kept" if kind == "others" and taken.files else ""
            log.info("  %-8s %9s files  %15s bytes%s%s", kind, f"{taken.files:,}", f"{taken.bytes:,}", said, stays)
        if one.kept:
            log.warning("  kept: %s", one.kept)
    if failed is not None and len(outputs) == 1:
        raise failed
    if as_json:
        print_json(told)
    if failed is not None:
        errors = sum("error" in one for one in told)
        leave(failed.exit_code, f"error: {errors} of {len(told)} outputs could not be looked at or cleaned; see above")


@app.command()
@verb
def compare(
    old: Annotated[str, typer.Argument(help="A finished output, or its job file.")],
    new: Annotated[str, typer.Argument(help="Another one: of other settings, another model, or another night.")],
    qrels: Annotated[str | None, typer.Option(help="Judgements: each measure side by side, with its interval.")] = None,
    measures: Annotated[list[str] | None, typer.Option("--measure", help="As in ir_measures.")] = None,
    tolerance: Annotated[
        float | None, typer.Option(min=0, help="Scores this near are ties; by the dtypes if left out.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what moved between two outputs, query by query, and whether judgements see it."""
    from batch_rerank.judge.compare import compare as compare_outputs
    from batch_rerank.publish.output import find_place

    found = compare_outputs(find_place(old), find_place(new), qrels=qrels, measures=measures or (), tolerance=tolerance)
    if as_json:
        print_json(asdict(found))
        return
    if not found.queries:
        log.warning("no query_id is in both outputs: there is nothing to compare")
    if found.differing:
        log.info("the jobs differ in %s", ", ".join(found.differing))
    log.info(
        "%s queries in both, %s in the old one only, %s in the new one only",
        *(f"{count:,}" for count in (found.queries, found.only_old, found.only_new)),
    )
    log.info("candidates gained and lost in them: %s, %s", f"{found.gained:,}", f"{found.lost:,}")
    shift = (found.shift_mean, found.shift_mean_absolute, found.shift_largest)
    log.info("scores of %s pairs: %+.4g on average, %.4g absolute, %.4g at most", f"{found.pairs:,}", *shift)
    table = Table("agreement", "mean", title=f"scores within {found.tolerance:g} are ties")
    agreements = {f"overlap@{depth}": value for depth, value in found.overlap.items()}
    for name, value in {**agreements, "RBO (p 0.9)": found.rbo, "Kendall's tau": found.tau}.items():
        table.add_row(name, "-" if value is None else f"{value:.4f}")
    console = Console()
    console.print(table)
    if found.judged:
        one = next(iter(found.judged.values()))
        title = f"{one.queries:,} judged queries" + (
            f"; {one.in_neither:,} more are in neither" if one.in_neither else ""
        )
        judged = Table("measure", "old", "new", "change", "95 %", "queries to see a loss of 0.01", title=title)
        for name, one in found.judged.items():
            needed = "-" if one.queries_to_see_a_loss is None else f"{one.queries_to_see_a_loss:,}"
            interval = f"{one.low:+.4f} to {one.high:+.4f}"
            judged.add_row(Text(name), f"{one.old:.4f}", f"{one.new:.4f}", f"{one.difference:+.4f}", interval, needed)
        console.print(judged)
    for moved in found.moved:
        lists = [", ".join(map(shown_id, documents)) for documents in (moved.old, moved.new)]
        log.info("moved most: %s (RBO %.3f): %s -> %s", shown_id(moved.query_id), moved.rbo, *lists)
