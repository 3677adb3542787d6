"""The command line: verbs and exit codes. Human text goes to stderr, `--json` prints one object on stdout."""

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from functools import wraps
from typing import Annotated, Any, NoReturn, ParamSpec

import typer
from rich.console import Console
from rich.table import Column, Table

from batch_rerank.config import load_config
from batch_rerank.errors import BatchRerankError

app = typer.Typer(
    name="batch-rerank",
    help="Score every candidate of a first-stage run with a reranker and write the run back re-sorted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
log = logging.getLogger("batch_rerank")

INTERRUPTED = "interrupted: finished units are kept; run the same command again to resume"
ENDING_SECONDS = 60.0
"""How long the end of an interrupted job may take: a status that storage does not take, a Ray that does not answer."""

P = ParamSpec("P")

Job = Annotated[str, typer.Argument(metavar="JOB.YAML", help="The job file.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key of the job file.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first N queries, into OUTPUT-limit-N: a sample run.")]
Output = Annotated[
    str, typer.Argument(help="A job's output: a path or an s3:// URL, or the job file, with its storage options.")
]
SetOfJob = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key, where given a job file.")
]
LimitOfJob = Annotated[int | None, typer.Option("--limit", min=1, help="The sample run of N queries of a job file.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def _verb(function: Callable[P, None]) -> Callable[P, None]:
    """Give a verb its log format and its exit codes; expected errors end without a traceback."""

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        handler = logging.StreamHandler(sys.stderr)
        log.addHandler(handler)
        log.propagate = False
        log.setLevel(logging.INFO)
        try:
            function(*args, **kwargs)
        except BatchRerankError as error:
            _leave(error.exit_code, f"error: {error}")
        except KeyboardInterrupt:
            _leave(130, INTERRUPTED)
        finally:
            log.removeHandler(handler)

    return wrapped


def main(arguments: list[str] | None = None) -> None:
    """The command line. Signals are set here, not in the verbs: who calls a verb in their own process keeps theirs."""
    signals = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background jobs ignore it
        signals.append(signal.SIGINT)
    for number in signals:
        signal.signal(number, _interrupt)
    app(arguments)


def _interrupt(number: int, frame: object) -> NoReturn:
    """The first signal interrupts. What follows is the job's end, and no other signal cuts it short: its status would
    say "running" for ever. It has ENDING_SECONDS."""
    for again in (signal.SIGTERM, signal.SIGINT):
        signal.signal(again, _ending)
    end = threading.Timer(ENDING_SECONDS, _give_up)
    end.daemon = True
    end.start()
    raise KeyboardInterrupt


def _ending(number: int, frame: object) -> None:
    sys.stderr.write(f"ending; this takes up to {ENDING_SECONDS:g} s\n")


def _give_up() -> None:
    sys.stderr.write(f"{INTERRUPTED}\nexit code 130\n")
    sys.stderr.flush()
    os._exit(130)


def _leave(code: int, message: str) -> NoReturn:
    # Ray turns every driver's failure into exit code 1, so the last line of the log carries ours
    log.error("%s", message)
    log.error("exit code %d", code)
    raise typer.Exit(code)


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")


@app.command()
@_verb
def run(
    job: Job,
    local: Annotated[bool, typer.Option("--local", help="In this process, without Ray.")] = False,
    limit: Limit = None,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Run a job, or what is left of it."""
    from batch_rerank.job.run import run as run_job

    summary = run_job(load_config(job, overrides or (), limit), local=local)
    totals = summary.totals
    if summary.units == 0:
        log.info("nothing to do: all %d units were done already", totals.units)
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
        "units scored by the slower padded forward (their receipts say why)": totals.padded_units,
    }
    log.info("%s rows from %s candidates; %s", f"{totals.rows_out:,}", f"{totals.rows_in:,}", _list(odd))
    log.info("output: %s", summary.output)
    if as_json:
        _print_json({**asdict(summary), "exit_code": 0})


def _list(odd: dict[str, int]) -> str:
    found = [f"{count:,} {name}" for name, count in odd.items() if count]
    return ", ".join(found) or "nothing was cut or skipped"


@app.command()
@_verb
def plan(job: Job, limit: Limit = None, overrides: Set = None, as_json: Json = False) -> None:
    """Check a job and show what it would do. Reads ids and footers, writes nothing, touches no GPU."""
    from batch_rerank.job.run import describe, plan_job

    made, model = plan_job(load_config(job, overrides or (), limit))
    if model is not None:
        describe(made, model)
    log.info("fingerprint %s", made.fingerprint)
    if as_json:
        _print_json(json.loads(made.to_json()))


@app.command()
@_verb
def stage(
    job: Job,
    local: Annotated[bool, typer.Option("--local", help="In this process, without Ray.")] = False,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Write a job's input as nested shards, once: what `run` does first where the layout needs it."""
    from batch_rerank.job.staging import stage as stage_input

    found = stage_input(load_config(job, overrides or ()), local=local)
    if as_json:
        counted = {"place": found.place, "reused": found.reused, "shards": found.shards, "seconds": found.seconds}
        _print_json({**counted, "counts": found.counts, "exit_code": 0})


@app.command()
@_verb
def publish(
    output: Output,
    local: Annotated[bool, typer.Option("--local", help="In this process, without Ray.")] = False,
    limit: LimitOfJob = None,
    overrides: SetOfJob = None,
    as_json: Json = False,
) -> None:
    """Publish scores that are there: with another top_k, layout or columns than before, and without a model."""
    from batch_rerank.job.republish import republish
    from batch_rerank.publish.output import find_place

    done = republish(find_place(output, overrides or (), limit), local=local)
    how = "published again" if done.again else "published"
    log.info("%s: %s rows from %s candidates in %.1f s", how, f"{done.rows_out:,}", f"{done.rows_in:,}", done.seconds)
    log.info("output: %s", done.output)
    if as_json:
        _print_json({**asdict(done), "exit_code": 0})


@app.command()
@_verb
def selftest(job: Job, overrides: Set = None, as_json: Json = False) -> None:
    """Load a job's model on this machine and test it, as every actor does before its first unit. Needs no input."""
    from batch_rerank.job.selftest import run_self_test

    found = run_self_test(load_config(job, overrides or ()))
    if as_json:
        results = {name: {**asdict(result), "passed": result.passed} for name, result in found.forwards.items()}
        _print_json({**asdict(found.shown), "passed": found.passed, "used": found.used, "forwards": results})
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
        _leave(5, f"error: the self-test failed: {', '.join(failed) or 'no packed forward'}")


@app.command()
@_verb
def status(output: Output, limit: LimitOfJob = None, overrides: SetOfJob = None, as_json: Json = False) -> None:
    """Show how far an output is, how fast it grows or how its last run ended; a run that has died is said to have."""
    from batch_rerank.publish.output import find_place
    from batch_rerank.publish.status import status_of_output

    found = status_of_output(find_place(output, overrides or (), limit))
    if as_json:
        _print_json(found)
        return
    for name, value in found.items():
        log.info("%-17s %s", name.replace("_", " "), f"{value:,}" if type(value) is int else _shown(value))


def _shown(value: object) -> str:
    """Without the characters that a terminal obeys: a status is somebody's bytes."""
    return "".join(sign if sign.isprintable() or sign == "\n" else "�" for sign in str(value))


@app.command()
@_verb
def verify(
    output: Output,
    repair: Annotated[
        bool, typer.Option("--repair", help="Make what is damaged not done: the next run makes it again.")
    ] = False,
    output_only: Annotated[
        bool, typer.Option("--output-only", help="Without the input: for when it has expired.")
    ] = False,
    limit: LimitOfJob = None,
    overrides: SetOfJob = None,
    as_json: Json = False,
) -> None:
    """Re-read an output and its input, and prove that nothing is lost, doubled or changed."""
    from batch_rerank.publish.output import find_place
    from batch_rerank.publish.verify import verify as verify_output

    verdict = verify_output(find_place(output, overrides or (), limit), repair, output_only)
    if as_json:
        _print_json({**asdict(verdict), "ok": not verdict.problems})
    for problem in verdict.problems[:20]:
        log.error("%s", problem)
    if verdict.problems:
        mended = f"; {len(verdict.damaged)} damaged file(s) are made not done: run the job again"
        mended = mended if verdict.repaired else ""
        _leave(6, f"error: {output}: {len(verdict.problems)} problem(s) found{mended}")
    log.info(
        "verified: %s rows of %s candidates in %d units", f"{verdict.rows:,}", f"{verdict.candidates:,}", verdict.units
    )


@app.command()
@_verb
def evaluate(
    run_: Annotated[str, typer.Option("--run", metavar="OUTPUT", help="The output of a job, or its job file.")],
    qrels: Annotated[str, typer.Option(help="TREC qrels, or a BEIR TSV with a header.")],
    measures: Annotated[list[str] | None, typer.Argument(help="As in ir_measures; nDCG@10 RR@10 R@10 if none.")] = None,
    per_query: Annotated[bool, typer.Option("--per-query", help="Also each query's values.")] = False,
    limit: LimitOfJob = None,
    overrides: SetOfJob = None,
    as_json: Json = False,
) -> None:
    """Evaluate the first stage and the reranked run against qrels."""
    from batch_rerank.evaluate import DEFAULT_MEASURES
    from batch_rerank.evaluate import evaluate as evaluate_output
    from batch_rerank.publish.output import find_place

    place = find_place(run_, overrides or (), limit)
    result = evaluate_output(place, qrels, measures or DEFAULT_MEASURES, per_query=per_query)
    if as_json:
        values = asdict(result)
        if not per_query:
            del values["before_by_query"], values["after_by_query"]
        _print_json(values)
        return
    table = Table("measure", "before", "after", "change")
    for name, after in result.after.items():
        before = result.before[name]
        table.add_row(name, f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}")
    Console().print(table)
    if per_query:
        by_query = Table("query_id", "measure", "before", "after")
        for name, queries in result.after_by_query.items():
            for query_id, after in queries.items():
                by_query.add_row(query_id, name, f"{result.before_by_query[name][query_id]:.4f}", f"{after:.4f}")
        Console().print(by_query)
    missing = (
        f"; {result.queries_missing} of them are not in the run and count as zero" if result.queries_missing else ""
    )
    log.info("%d judged queries%s", result.queries, missing)


@app.command()
@_verb
def models(as_json: Json = False) -> None:
    """List the templates, and the hub ids that are known by name."""
    from batch_rerank.engine.templates import HUB_MODELS, PAIR, SENTENCE, TEMPLATES

    if as_json:
        templates = {name: asdict(template) for name, template in TEMPLATES.items()}
        _print_json({"templates": templates, "models": {name: asdict(model) for name, model in HUB_MODELS.items()}})
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
    log.info("Any other hub id or checkpoint directory of the same kinds works too: its files say which kind it is.")
    log.info("A directory has no id: set model.template to a name above, or to a mapping with a template of your own.")


@app.command()
@_verb
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
