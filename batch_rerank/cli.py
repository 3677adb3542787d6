"""The command line: verbs and exit codes. Human text goes to stderr, `--json` prints one object on stdout."""

import logging
import os
import signal
from contextlib import nullcontext
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

import batch_rerank.cli_labels
import batch_rerank.cli_outputs
import batch_rerank.cli_plan
import batch_rerank.cli_report  # noqa: F401  (their verbs)
from batch_rerank.cli_base import (
    Job,
    Json,
    Limit,
    Local,
    Set,
    app,
    interrupt,
    last_word,
    lasting,
    leave,
    print_json,
    verb,
    verdict_told,
)
from batch_rerank.config import load_config
from batch_rerank.store.receipts import Totals

log = logging.getLogger("batch_rerank")


def main(arguments: list[str] | None = None) -> None:
    """The command line. Signals are set here, not in the verbs: who calls a verb in their own process keeps theirs.

    Without `arguments` they are the process's, which ends with the verb. With some it goes on with a SystemExit.
    """
    signals = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background jobs ignore it
        signals.append(signal.SIGINT)
    for number in signals:
        signal.signal(number, interrupt)
    with last_word() if arguments is None else nullcontext():
        app(arguments)


@app.command()
@lasting
def run(
    job: Job,
    local: Local = False,
    limit: Limit = None,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Run a job, or what is left of it."""
    from batch_rerank.job import actual
    from batch_rerank.job.run import run as run_job

    with verdict_told(as_json):
        summary = run_job(load_config(job, overrides or (), limit), local=local)
    totals = summary.totals
    if summary.stood:
        log.info("nothing to do: all %d units were done already", totals.units)
    elif summary.units == 0:
        log.info("nothing to score: all %d units were done already; publishing is done now", totals.units)
    else:
        rate = f"{summary.pairs / summary.seconds:,.0f} pairs/s with start-up"
        steady = f", {summary.steady_rate:,.0f} after it" if summary.steady_rate else ""
        log.info("%s pairs in %.1f s: %s%s", f"{summary.pairs:,}", summary.seconds, rate, steady)
    odd = {
        "pairs cut at max_length": totals.truncated,
        "null texts (error rows)": totals.null_texts,
        "null queries (error rows)": totals.null_queries,
        "pairs the engine could not score (error rows)": totals.engine_failed,
        "empty texts (scored)": totals.empty_texts,
        "zero-row shards": summary.counts["zero_row_shards"],
        "queries without candidates": summary.counts["queries_without_candidates"],
        "candidates without their document or query (left out)": summary.counts.get("missing_candidates", 0),
        "repeated storage requests": totals.storage_retries,
        "units begun again after their process had died": totals.retries,
        "units begun again after their node had left": totals.moves,
        "units scored by the slower padded forward (their receipts say why)": totals.padded_units,
    }
    log.info("%s rows from %s candidates; %s", f"{totals.rows_out:,}", f"{totals.rows_in:,}", _list(odd))
    if summary.reuse is not None or totals.reused:
        log.info("%s", _reused(totals))
    if summary.held is not None and summary.units:
        log.info("%s", actual.said(summary.held))
    log.info("output: %s", summary.output)
    if summary.report:
        log.info("report: %s", summary.report)
    if as_json:
        pairs = {"reused": totals.reused, "scored": totals.scored - totals.reused}
        print_json({**asdict(summary), **pairs, "exit_code": 0})


def _reused(totals: Totals) -> str:
    scored = totals.scored - totals.reused
    why = {
        "of new queries": totals.new_queries,
        "with new or changed documents": totals.new_documents,
        "whose earlier score is damaged or gone": totals.unreadable,
    }
    reasons = ", ".join(f"{count:,} {name}" for name, count in why.items() if count)
    audit = f", of which {totals.audited:,} scored again: {totals.audit_difference:.1e} off at most"
    return (
        f"{totals.reused:,} pairs reused{audit if totals.audited else ''}; {scored:,} scored"
        f"{f': {reasons}' if reasons else ''}"
    )


def _list(odd: dict[str, int]) -> str:
    found = [f"{count:,} {name}" for name, count in odd.items() if count]
    return ", ".join(found) or "no text was cut, and no row failed"


@app.command()
@lasting
def stage(
    job: Job,
    local: Local = False,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Write a job's input as nested shards, once: what `run` does first where the layout needs it."""
    from batch_rerank.job.staging import stage as stage_input

    found = stage_input(load_config(job, overrides or ()), local=local)
    if as_json:
        counted = {"place": found.place, "reused": found.reused, "shards": found.shards, "seconds": found.seconds}
        print_json({**counted, "counts": found.counts, "exit_code": 0})


@app.command()
@verb
def selftest(job: Job, overrides: Set = None, as_json: Json = False) -> None:
    """Load a job's model on this machine and test it, as every actor does before its first unit. Needs no input."""
    from batch_rerank.job.selftest import run_self_test

    found = run_self_test(load_config(job, overrides or ()))
    if as_json:
        results = {name: {**asdict(result), "passed": result.passed} for name, result in found.forwards.items()}
        print_json({**asdict(found.shown), "passed": found.passed, "used": found.used, "forwards": results})
    for check in found.shown.checks:
        log.info("%-6s  %-8s  %s", "passed" if check.passed else "FAILED", check.name, check.seen)
    for thing in found.shown.not_checked:
        log.info("not checked: %s", thing)
    for name, result in found.forwards.items():
        log.info("%s forward: %s%s", name, result.summary(), "; this one is used" if name == found.used else "")
    if found.absent:
        lacks = "without its fastest kernels" if "packed" in found.forwards else "none"
        log.info("packed forward: %s, %s", lacks, found.absent)
    if not found.passed:
        failed = [check.name for check in found.shown.checks if not check.passed]
        leave(5, f"error: the self-test failed: {', '.join(failed) or 'no packed forward'}")


@app.command()
@verb
def models(as_json: Json = False) -> None:
    """List the templates, and the hub ids that are known by name."""
    from batch_rerank.engine.templates import HUB_MODELS, PAIR, SENTENCE, TEMPLATES

    if as_json:
        templates = {name: asdict(template) for name, template in TEMPLATES.items()}
        print_json({"templates": templates, "models": {name: asdict(model) for name, model in HUB_MODELS.items()}})
        return
    about = {name: f"version {template.version}, {template.source}" for name, template in TEMPLATES.items()}
    about[PAIR] = "the tokenizer's own pair of query and document"
    about[SENTENCE] = "each text alone, with the checkpoint's own prompts"
    console = Console(highlight=False)
    for name, source in about.items():
        console.print(f"[bold]{name}[/bold]: {source}")
        ids = Table.grid(Column(no_wrap=True), Column(justify="right"), Column(), padding=(0, 1))
        for model, known in HUB_MODELS.items():
            if known.template == name:
                ids.add_row(f"  {model}", str(known.max_length or TEMPLATES[name].max_length), known.note)
        console.print(ids)
    log.info("The number is the default max_length, in tokens.")
    log.info("Any other hub id, directory or place (s3://…) of the same kinds works too: its files say which it is.")
    log.info("A directory has no id: set model.template to a name above, or to a mapping with a template of your own.")


@app.command()
@verb
def fetch(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A hub id or a checkpoint directory.")],
    to: Annotated[str, typer.Argument(metavar="PLACE", help="Where it goes: a path or an s3:// URL of its own.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Also where its weights are pickled.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="In the place of another model that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Copy a model to where jobs can name it (model.name: s3://…), whole or not at all to those who read."""
    from batch_rerank.score.weights import mirror_model

    done = mirror_model(model, to, revision=revision, allow_pickle=allow_pickle, replacing=replace)
    log.info(
        "%s: %d files, %d were there already, %s bytes copied in %.1f s, %d requests repeated",
        done.place,
        done.files,
        done.kept,
        f"{done.size:,}",
        done.seconds,
        done.retries,
    )
    log.info("identity %s", done.identity)
    if as_json:
        print_json({**asdict(done), "exit_code": 0})


@app.command()
@verb
def demo(
    directory: Annotated[str, typer.Option("--dir", help="Where the collection and the output go.")] = "demo-data",
    model: Annotated[str | None, typer.Option(help="Hub id or directory; MiniLM from PyPI if none.")] = None,
    queries: Annotated[int, typer.Option(min=1, help="How many queries.")] = 200,
) -> None:
    """Build a small code-search collection from Python's standard library and rerank it."""
    from batch_rerank.demo import demo as run_demo

    run_demo(directory, model or os.environ.get("MODEL") or None, queries)


if __name__ == "__main__":
    main()
