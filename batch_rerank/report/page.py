"""`report.json` to `report.html`: one file that asks for nothing, the same bytes from the same numbers every time."""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from batch_rerank.report import figures
from batch_rerank.report.details import failures, gate, measures, movers, planned, provenance
from batch_rerank.report.figures import Figure
from batch_rerank.report.parts import card, drawn, section, table
from batch_rerank.report.style import PAGE
from batch_rerank.report.text import count, duration, figure, plain, share, short, shown

Json = Mapping[str, Any]


def page(data: bytes) -> bytes:
    """The page of a report's JSON. It may run no script and load nothing: its own policy says so to the browser."""
    content: Json = json.loads(data)
    style = base64.b64encode(hashlib.sha256(PAGE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{style}'; img-src data:; base-uri 'none'; form-action 'none'"
    body = "".join(part for part in _sections(content) if part)
    told = hashlib.sha256(data).hexdigest()
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="referrer" content="no-referrer"><meta name="robots" content="noindex">'
        f'<link rel="icon" href="data:,"><title>Reranked: {plain(_name(content))}</title>'
        f"<style>{PAGE}</style></head><body><main>{body}"
        f"<footer>Made by {shown(content.get('program', ''))} from report.json alone (sha256 <code>{told}</code>)."
        "</footer></main></body></html>\n"
    ).encode()


def _name(content: Json) -> str:
    return str(content.get("output", "")).rstrip("/").rpartition("/")[2][:120]


def _sections(content: Json) -> list[str]:
    return [
        _head(content),
        _tiles(content) if content.get("counts") else "",
        planned(content),
        _scores(content),
        _places(content),
        movers(content),
        _lengths(content),
        _time(content),
        failures(content),
        gate(content),
        measures(content),
        provenance(content),
    ]


def _head(content: Json) -> str:
    verdict = content["verdict"]
    notes = "".join(f"<li>{shown(note, 700)}</li>" for note in verdict["notes"])
    tone = verdict["tone"] if verdict["tone"] in ("good", "warn", "bad", "open") else "open"
    when = f" · as of {shown(content['as_of'])}" if content.get("as_of") else ""
    return (
        f"<header><h1>Rerank report</h1><p><code>{shown(content['output'], 600)}</code>{when}</p></header>"
        f'<div class="verdict {tone}"><p>{shown(verdict["line"], 600)}</p>{f"<ul>{notes}</ul>" if notes else ""}</div>'
    )


def _tiles(content: Json) -> str:
    counts, earlier = content["counts"], (content.get("earlier") or {}).get("counts") or {}
    rows, status = counts["rows_in"], content["status"]
    of = "" if rows == counts["pairs_planned"] else f"of {count(counts['pairs_planned'])} planned"
    then = {name: f"earlier {short(value)}" for name, value in earlier.items()}
    per_pair = f"{counts['tokens'] / counts['scored']:,.0f} a pair" if counts["scored"] else ""
    published = "not yet" if counts["rows_out"] is None else short(counts["rows_out"])
    parts = "" if counts["rows_out"] is None else f"rows, in {_counted(counts['parts'], 'file')}"
    tiles = [
        ("Pairs", short(rows), [of, f"of {count(counts['queries'])} queries", then.get("rows_in", "")]),
        ("Tokens read", short(counts["tokens"]), [per_pair, then.get("tokens", "")]),
        ("Last run took", duration(status["seconds"] or None), [_rate(status)]),
        ("Published", published, [parts]),
        ("Reused scores", share(counts["reused"], rows), [_many(counts["reused"]), _audited(content)]),
        ("Without a score", share(counts["failed"], rows), [_many(counts["failed"]), then.get("failed", "")]),
        ("Cut to the model’s length", share(counts["truncated"], rows), [_many(counts["truncated"])]),
        ("Units", count(counts["units"]), [f"of {count(counts['units_planned'])} planned", _retried(counts)]),
    ]
    return '<dl class="tiles">' + "".join(_tile(*tile) for tile in tiles) + "</dl>"


def _tile(name: str, value: str, small: Sequence[str]) -> str:
    beside = "".join(f"<small>{one}</small>" for one in small if one)
    return f"<div><dt>{name}</dt><dd>{value}{beside}</dd></div>"


def _counted(value: int, what: str) -> str:
    return f"{count(value)} {what}{'' if value == 1 else 's'}"


def _many(value: int) -> str:
    return _counted(value, "pair") if value else "none"


def _rate(status: Json) -> str:
    return f"{short(status['pairs_per_second'])} pairs/s, start-up included" if status["pairs_per_second"] else ""


def _retried(counts: Json) -> str:
    return f"{count(counts['storage_retries'])} storage requests repeated" if counts["storage_retries"] else ""


def _audited(content: Json) -> str:
    counts = content["counts"]
    if not counts["audited"]:
        return ""
    return f"{count(counts['audited'])} computed again, {content['audit_difference']:.1e} off at most"


def _scores(content: Json) -> str:
    told, earlier = content.get("scores"), content.get("earlier")
    then = ""
    if earlier:
        problem = f" {shown(earlier['problem'], 400)}" if earlier.get("problem") else ""
        then = f"<p>Beside the earlier output <code>{shown(earlier['output'], 300)}</code>.{problem}</p>"
    if not told:
        return section("Scores", _unknown(content, "how the scores lie") + then)
    rows = [_moments("this output", told)]
    if earlier and (earlier.get("scores") or {}).get("count"):
        rows.append(_moments("the earlier output", earlier["scores"]))
    head = ["", "scores", "mean", "deviation", "least", "lower quarter", "median", "upper quarter", "most"]
    known = content["shapes"]
    partly = f"<p>Of {known['units']:,} of {known['of']:,} units; the others have an older receipt.</p>"
    boxes = card("Raw scores", drawn(figures.scores(content)), "wide")
    boxes += card("As relevance, 0 to 1", drawn(figures.relevance(content)), "wide") if content.get("relevance") else ""
    return section(
        "Scores",
        then
        + (partly if known["units"] < known["of"] else "")
        + boxes
        + card("", table(head, rows, numbers=8), "wide"),
    )


def _moments(name: str, told: Json) -> list[str]:
    names = ("mean", "deviation", "least", "lower", "median", "upper", "most")
    return [name, f"{told['count']:,}", *(f"{told[one]:.4g}" for one in names)]


def _unknown(content: Json, what: str) -> str:
    if not (content.get("shapes") or {}).get("of"):
        return f"<p>Nothing is scored, so it is unknown {what}.</p>"
    return f"<p>Unknown {what}: these receipts have no distributions; they are of an earlier version.</p>"


def _places(content: Json) -> str:
    agreement = content["agreement"]
    if not content.get("places"):
        return section("Against the first stage", _unknown(content, "what moved"))
    then = (content.get("earlier") or {}).get("agreement") or {}
    sample = f"{agreement['tau_queries']:,} queries of a sample"
    tiles = [
        ("Overlap of the top 10", "overlap_at_10", f"{agreement['overlap_queries']:,} queries with more than 10"),
        ("Rank-biased overlap, p 0.9", "rbo", f"{agreement['rbo_queries']:,} queries"),
        ("Kendall’s τ", "tau", sample),
    ]
    row = "".join(
        _tile(name, figure(agreement[key]), [of, f"earlier {figure(then[key])}" if then.get(key) is not None else ""])
        for name, key, of in tiles
    )
    boxes = card("Places gained and lost", drawn(figures.places(content)))
    if agreement["overlap_counts"]:
        boxes += card("How many of the top 10 were there before", drawn(figures.overlap(content)))
    about = (
        "<p>1 is the order of the first stage, 0 nothing in common (τ: −1 is the reverse). Low is no fault: it is what "
        "reranking is for.</p>"
    )
    return section(
        "Against the first stage", about + f'<dl class="tiles">{row}</dl><div class="cards card-row">{boxes}</div>'
    )


def _lengths(content: Json) -> str:
    found: Figure | None = figures.tokens(content)
    counts = content.get("counts")
    if found is None or not counts:
        return ""
    said = f"{share(counts['truncated'], counts['rows_in'])} of the pairs were cut to the model’s length"
    longest = content["tokens"].get("max_length")
    said += f", {longest:,} tokens." if longest else "."
    return section("Lengths", f"<p>{said}</p>" + card("Tokens a pair", drawn(found), "wide"))


def _time(content: Json) -> str:
    told = content.get("time")
    if not content.get("counts"):
        return ""
    if not told:
        return section("Time", "<p>Unknown when what was scored: no unit of this output was scored by an actor.</p>")
    boxes = card("Pairs a second", drawn(figures.rate(content)), "wide")
    head = ["actor", "units", "pairs", "tokens", "busy", "there for", "idle"]
    rows = [
        [
            shown(one["name"], 80),
            *(f"{one[name]:,}" for name in ("units", "pairs", "tokens")),
            *(duration(one[name]) for name in ("busy_seconds", "seconds")),
            share(one["idle_share"], 1),
        ]
        for one in told["actors"]
    ]
    lanes = "".join(
        f'<span class="name">{shown(one["name"], 60)}</span>{figures.lane(number, one, told["edges"])}'
        f'<span class="idle">{share(one["idle_share"], 1)} idle</span>'
        for number, one in enumerate(told["actors"])
    )
    more = f"<p>… and {told['others']:,} more actors.</p>" if told["others"] else ""
    actors = f'<div class="lanes">{lanes}</div>{more}<details><summary>Every actor in numbers</summary>'
    boxes += card("Each model copy: when it scored", actors + table(head, rows, numbers=6) + "</details>", "wide")
    boxes += card("Where the time of all units went", drawn(figures.steps(content)), "wide")
    gaps = "".join(
        f"<li>{shown(gap['at'])}: nothing scored for {duration(gap['seconds'])}</li>" for gap in told["gaps"]
    )
    notes = f"<h3>Gaps</h3><ul>{gaps}</ul>" if gaps else ""
    if told["reused_units"]:
        reused = f"{told['reused_units']:,} units ({told['reused_pairs']:,} pairs)"
        notes += f"<p>{reused} had all their scores from earlier outputs and took no actor.</p>"
    about = (
        "<p>Idle is the share of an actor’s time, from its first unit to its last, in which it did not score. Times "
        "are to the second.</p>"
    )
    return section("Time", about + boxes + notes)
