"""The verbs that come before a run: plan and bench."""

import datetime
import json
import logging
from typing import Annotated, Any

import typer

from batch_rerank.cli_base import Job, Json, Limit, Local, Set, app, lasting, print_json, verb
from batch_rerank.config import load_config

log = logging.getLogger("batch_rerank")


@app.command()
@verb
def plan(
    job: Job,
    exact: Annotated[bool, typer.Option("--exact", help="Read and tokenise all texts, not a sample.")] = False,
    deadline: Annotated[
        str | None, typer.Option("--deadline", metavar="6h|06:00", help="How many actors end by then.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Which units are sampled.")] = 0,
    local: Local = False,
    limit: Limit = None,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Check a job and say what it would do, take and cost. Writes nothing, touches no GPU."""
    from batch_rerank.errors import BudgetError
    from batch_rerank.estimate.forecast import duration
    from batch_rerank.estimate.sample import ALL, SAMPLED
    from batch_rerank.job.ahead import describe, plan_job
    from batch_rerank.job.estimate import deadline_seconds, estimate, for_deadline, said, unknown

    config = load_config(job, overrides or (), limit)
    now = datetime.datetime.now()  # no zone: an offset would not know when clocks change
    left = None if deadline is None else deadline_seconds(deadline, now)
    ahead = plan_job(config, local=local)
    value: dict[str, Any] = {
        **json.loads(ahead.plan.to_json()),
        "done_units": len(ahead.there.done),
        "estimate": unknown(),
        "deadline": None,
    }
    found = None
    if ahead.model is None:
        log.info("what it takes is unknown until the input is staged: batch-rerank stage, then plan again")
    else:
        describe(ahead.plan, ahead.model)
        reuse = ahead.earlier.reuse if ahead.earlier and ahead.earlier.served else None
        budget = ALL if exact else SAMPLED
        there = ahead.there
        if there.done:
            how = " and published" if there.published else ""
            all_units = len(ahead.plan.units)
            log.info("%d of %d units are scored already%s; what follows is the rest", len(there.done), all_units, how)
        found = estimate(
            ahead.config,
            ahead.left,
            ahead.model,
            budget=budget,
            seed=seed,
            reuse=reuse,
            local=local,
            published=0 if there.published else ahead.plan.pairs,
        )
        value["estimate"] = found.json()
        for line in said(found):
            log.info("%s", line)
        most, failed = ahead.config.scoring.max_failed_rows, found.tally.failed.p50 if found.tally else 0
        if failed > most * ahead.left.pairs:
            log.warning(
                "%s of %s rows have no text or query, more than scoring.max_failed_rows: %g allows: a run scores the "
                "others and ends with exit 1",
                *(f"{count:,.0f}" for count in (failed, ahead.left.pairs)),
                most,
            )
        if left is not None:
            value["deadline"] = met = for_deadline(found, left)
            log.info("deadline    in %s: %s", duration(left), _actors(met))
    log.info("fingerprint %s", ahead.plan.fingerprint)
    code = 0
    try:
        if found is not None:
            found.check_budget(ahead.there.gpu_hours)
    except BudgetError as error:
        code = error.exit_code
        raise
    finally:
        if as_json:
            print_json({**value, "exit_code": code})


def _actors(met: dict[str, Any]) -> str:
    if not met["known"]:
        return "unknown: no rate of this model on this device; batch-rerank bench measures one"
    half, ninety = met["actors_p50"], met["actors_p90"]
    if half is None:
        return "no number of actors meets it: start, tail and publishing take longer, or there are too few units"
    sure = f"{ninety} meet it 9 times of 10" if ninety is not None else "none meets it 9 times of 10"
    return f"cluster.actors: {half} meets it half of the time, {sure}"


@app.command()
@lasting
def bench(
    job: Job,
    seconds: Annotated[float, typer.Option("--seconds", min=1, help="Of scoring, at most.")] = 60,
    local: Local = False,
    limit: Limit = None,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Measure a job's model on one actor for a minute, with the job's own text. What is found is what plan goes by."""
    from batch_rerank.estimate.forecast import duration
    from batch_rerank.job.bench import bench as run_bench

    found = run_bench(load_config(job, overrides or (), limit), local=local, seconds=seconds)
    log.info("load        %s, self-test %s", duration(found["load_seconds"]), duration(found["test_seconds"]))
    log.info(
        "rate        %s pairs/s, %s tokens/s in %s, %d units, on %s",
        f"{found['pairs_per_second']:,.0f}",
        f"{found['tokens_per_second']:,.0f}",
        duration(found["seconds"]),
        found["units"],
        found["card"],
    )
    if found["share_of_matrix_rate"] is not None:
        log.info(
            "arithmetic  %.3g FLOP/s while it scores, %.0f %% of the rate of a large matrix product here",
            found["flop"] / found["busy"],
            100 * found["share_of_matrix_rate"],
        )
    for tokens, pace in found["budgets"].items():
        best = "  the best" if int(tokens) == found["best_budget"] else ""
        log.info("batches     of %s tokens: %.3g FLOP/s%s", f"{int(tokens):,}", pace, best)
    if found["fallback"]:
        log.warning("not the fastest forward: %s", found["fallback"])
    log.info("written     %s", found["written"])
    if as_json:
        print_json({**found, "exit_code": 0})
