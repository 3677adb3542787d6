"""The verb `export`: a scored output to training files."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from batch_rerank.cli_base import Json, LimitOfJob, Local, app, lasting, print_json
from batch_rerank.label_settings import LAYOUTS

log = logging.getLogger("batch_rerank")


@app.command()
@lasting
def export(
    output: Annotated[
        str, typer.Argument(metavar="JOB_OR_OUTPUT", help="A finished output, or its job file, with its labels.")
    ],
    to: Annotated[
        str | None, typer.Option("--to", metavar="TARGET", help=f"Whose training files: {', '.join(LAYOUTS)}.")
    ] = None,
    path: Annotated[str | None, typer.Option("--path", metavar="DEST", help="Where they go; local or s3://.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what each threshold would drop; write nothing.")
    ] = False,
    local: Local = False,
    limit: LimitOfJob = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="labels.KEY=VALUE", help="Override a key, of labels or of a given job file."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write an output's scores as training files in a trainer's own layout: distillation labels."""
    from batch_rerank.calls import in_turn
    from batch_rerank.job.staging import on_ray
    from batch_rerank.labels.export import dry_run as look
    from batch_rerank.labels.export import export as export_labels
    from batch_rerank.publish.output import config_of, open_output

    given = [*(overrides or ()), *_as_overrides(to, path or ("-" if dry_run else None))]
    place, labels = find_labels(output, given, limit)
    each = in_turn if local else on_ray(place.job or config_of(open_output(place)[1]))
    if dry_run:
        found = look(place, labels, each)
        if as_json:
            print_json({**asdict(found), "exit_code": 0})
            return
        _show_thresholds(found.about)
        _say(found.counts, found.about, would=True)
        return
    done = export_labels(place, labels, each)
    if as_json:
        print_json({**asdict(done), "exit_code": 0})
    if done.again:
        log.info("nothing to do: it was exported already")
    _say(done.counts, done.about)
    files = f"{done.rows:,} examples in {done.files:,} files, {done.bytes:,} bytes"
    log.info("%s; %.1f s", files, done.seconds)
    log.info("labels: %s", done.path)


def find_labels(output: str, overrides: Sequence[str], limit: int | None) -> tuple[Any, Any]:
    """The place of an output and how its labels are exported, of a job file or of an output's path. Raises
    ConfigError."""
    from batch_rerank.config import parse_labels
    from batch_rerank.errors import ConfigError
    from batch_rerank.publish.output import find_place

    own = [one for one in overrides if one.startswith("labels.")]
    others = [one for one in overrides if not one.startswith("labels.")]
    place = find_place(output, others, limit)
    if place.job is None:
        return place, parse_labels(own, output)
    place = find_place(output, overrides, limit)
    assert place.job is not None, "it was one a moment ago"
    if place.job.labels is None:
        raise ConfigError(f"{output}: no section labels; expected one, or --to and --path")
    labels = place.job.labels
    options = labels.storage_options or place.job.output.storage_options
    return place, labels.model_copy(update={"storage_options": options})


def _as_overrides(to: str | None, path: str | None) -> list[str]:
    """Options as overrides; quoted, so that YAML takes no path for a number."""
    named = {"labels.to": to, "labels.path": path}
    return [f"{key}={json.dumps(value)}" for key, value in named.items() if value is not None]


def _show_thresholds(about: Mapping[str, Any]) -> None:
    table = Table("false_negatives", "value", "drops", "of the negatives", "queries with too few")
    for row in about["thresholds"]:
        short = f"{row['queries_short']:,} ({row['queries_short_share']:.1%})"
        table.add_row(row["filter"], f"{row['value']:g}", f"{row['dropped']:,}", f"{row['share']:.1%}", short)
    Console().print(table)


def _say(counts: Mapping[str, int], about: Mapping[str, Any], would: bool = False) -> None:
    spread = ", ".join(f"{name} {value:g}" for name, value in about["spread"].items())
    saturated = "" if about["saturated"] is None else f"; {about['saturated']:.2%} of the scores are saturated"
    log.info("spread of a query's scores: %s%s; advised temperature %g", spread, saturated, about["temperature"])
    gone = [
        f"{value:,} {name.removeprefix('dropped: ')}" for name, value in counts.items() if _is(name, "dropped", value)
    ]
    left = [
        f"{value:,} {name.removeprefix('left out: ')}" for name, value in counts.items() if _is(name, "left out", value)
    ]
    absent = counts.get("judged_absent", 0)
    if absent:
        gone.append(f"{absent:,} judged to be relevant and no candidates")
    if counts.get("teachers_extra"):
        gone.append(f"{counts['teachers_extra']:,} scored by another teacher alone")
    held = f", {counts['held_out_queries']:,} of them held out" if "held_out_queries" in counts else ""
    log.info(
        "%s of %s queries%s%s: %s positives, %s negatives (%s, scale %s)",
        f"{counts.get('labelled_queries', 0):,}",
        f"{counts.get('queries', 0):,}",
        " would have labels" if would else " have labels",
        held,
        f"{counts.get('positives', 0):,}",
        f"{counts.get('negatives', 0):,}",
        " ".join(dict.fromkeys((about["to"], about["layout"]))),
        about["scale"],
    )
    log.info("documents dropped: %s; queries left out: %s", ", ".join(gone) or "none", ", ".join(left) or "none")


def _is(name: str, what: str, value: int) -> bool:
    return value > 0 and name.startswith(f"{what}: ")
