"""The verb `report`: what an output's run did, as a page and as numbers."""

import logging
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from batch_rerank.cli_base import Json, LimitOfJob, Output, SetOfJob, app, print_json, verb

if TYPE_CHECKING:
    from batch_rerank.publish.output import Place

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
    again: Annotated[
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
    if again:
        _again(place, as_json)
        return
    earlier = find_place(against) if against else None
    made = make_report(place, qrels=qrels, against=earlier, to=to, command=output)
    log.info("%s", made.content["verdict"]["line"])
    for note in made.content["verdict"]["notes"]:
        log.info("  %s", "".join(sign if sign.isprintable() else " " for sign in note))
    log.info("report: %s", made.html)
    if as_json:
        files = {"html": made.html, "json": made.json, "bytes": made.bytes, "seconds": round(made.seconds, 3)}
        print_json({"report": files, **made.content, "exit_code": 0})


def _again(place: "Place", as_json: bool) -> None:
    from batch_rerank.job.again import score_movers
    from batch_rerank.outside import shown_id

    found = score_movers(place)
    if as_json:
        print_json({"movers": [asdict(one) for one in found], "exit_code": 0})
        return
    if not found:
        log.info("no candidate has moved")
        return
    table = Table("query_id", "doc_id", "place", "score kept", "computed now", "difference")
    for one in found:
        now, off = ("-", "-") if one.computed is None else (f"{one.computed:.6g}", f"{one.computed - one.kept:+.2g}")
        ids = (Text(shown_id(one.query_id)), Text(shown_id(one.doc_id)))  # no markup, and no :name: of a picture
        table.add_row(*ids, f"{one.before} -> {one.after}", f"{one.kept:.6g}", now, off)
    Console().print(table)
