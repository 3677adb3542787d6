"""The verb `report`: what an output's run did, as a page and as numbers."""

import logging
from typing import Annotated

import typer

from batch_rerank.cli_base import Json, LimitOfJob, Output, SetOfJob, app, print_json, verb

log = logging.getLogger("batch_rerank")


@app.command()
@verb
def report(
    output: Output,
    qrels: Annotated[str | None, typer.Option(help="Judgements: measures before and after.")] = None,
    against: Annotated[
        str | None, typer.Option(metavar="OUTPUT", help="An earlier output, whose scores are laid beside these.")
    ] = None,
    to: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Put the two files there, not beside the output.")
    ] = None,
    score_movers: Annotated[
        bool, typer.Option("--score-movers", help="Score the candidates that moved most again, on this machine.")
    ] = False,
    limit: LimitOfJob = None,
    overrides: SetOfJob = None,
    as_json: Json = False,
) -> None:
    """Show what a run did: a page that opens offline, and the numbers that it is made of, beside the output."""
    from batch_rerank.publish.output import find_place
    from batch_rerank.report.write import report as make_report

    place = find_place(output, overrides or (), limit)
    earlier = find_place(against) if against else None
    made = make_report(place, qrels=qrels, against=earlier, to=to, command=output)
    log.info("%s", made.content["verdict"]["line"])
    for note in made.content["verdict"]["notes"]:
        log.info("  %s", "".join(sign if sign.isprintable() else " " for sign in note))
    log.info("report: %s", made.html)
    if as_json:
        files = {"html": made.html, "json": made.json, "bytes": made.bytes, "seconds": round(made.seconds, 3)}
        print_json({"report": files, **made.content, "exit_code": 0})
