"""The parts of a page that are words and tables: plan, movers, failures, gate, measures, provenance."""

from collections.abc import Mapping
from typing import Any

from batch_rerank.report.parts import card, section, table
from batch_rerank.report.text import count, figure, shown

Json = Mapping[str, Any]


PLANNED = {
    "pairs": "Pairs",
    "reused": "Scores reused",
    "tokens": "Tokens read",
    "truncated": "Pairs cut to the model’s length",
    "computed_tokens": "Tokens computed, shared prefixes and repeats once",
    "seconds": "Seconds in all",
    "startup_seconds": "Seconds until the first unit",
    "publish_seconds": "Seconds of publishing",
    "actors": "Actors",
    "actor_seconds": "Seconds of scoring, all actors",
    "utilisation": "Share of the actors’ time that scores",
    "gpu_hours": "GPU hours",
    "usd": "USD",
}
"""What is shown of a plan and of what happened."""


def planned(content: Json) -> str:
    """What was foreseen beside what happened; unknown where no plan was kept."""
    told = content.get("planned")
    if content.get("counts") is None:
        return ""
    if not told:
        return section("Planned and actual", "<p>Unknown: no plan’s estimate was kept for this output.</p>")
    rows = [
        [label, _value(told["planned"].get(name)), _value(told["actual"].get(name)), _off(told, name)]
        for name, label in PLANNED.items()
        if told["planned"].get(name) is not None or told["actual"].get(name) is not None
    ]
    reasons = "".join(f"<li>{shown(reason)}</li>" for reason in told["reasons"])
    made = f"<h3>What made the difference</h3><ul>{reasons}</ul>" if reasons else ""
    return section("Planned and actual", card("", table(["", "planned", "actual", "off by"], rows, 3) + made, "wide"))


def _value(value: object) -> str:
    if isinstance(value, Mapping):
        low, high = (value.get(one) for one in ("low", "high"))
        middle = value.get("p50", value.get("value"))
        span = f" ({_value(low)} to {_value(high)})" if low is not None and high is not None else ""
        return f"{_value(middle)}{span}" if middle is not None else span.strip() or "unknown"
    if value is None:
        return "unknown"
    if isinstance(value, bool | str):
        return shown(value, 200)
    return (
        f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(float(str(value))) < 1e6 else f"{value:,.0f}"
    )


def _off(told: Json, name: str) -> str:
    foreseen, actual = told["planned"].get(name), told["actual"].get(name)
    if isinstance(foreseen, Mapping):
        foreseen = foreseen.get("p50", foreseen.get("value"))
    numbers = all(isinstance(one, int | float) and not isinstance(one, bool) for one in (foreseen, actual))
    return f"{(actual - foreseen) / foreseen:+.1%}" if numbers and foreseen else ""


def movers(content: Json) -> str:
    """The candidates that have moved most."""
    told = content.get("movers")
    if not told or not told["rows"]:
        return ""
    note = f"<p>{shown(told['note'], 600)}</p>" if told["note"] else ""
    ways = [[row for row in told["rows"] if (row["after"] < row["before"]) is up] for up in (True, False)]
    boxes = "".join(
        card(title, f'<ol class="movers">{"".join(map(_mover, rows))}</ol>')
        for title, rows in zip(("Up", "Down"), ways, strict=True)
        if rows
    )
    about = (
        "<p>The candidates that have gained and lost most places, one of a query and a few of a unit. To score them "
        "again with this model, on this machine:</p>"
    )
    return section(
        "What moved most", f"{about}<pre>{shown(told['command'], 900)}</pre>{note}<div class='cards'>{boxes}</div>"
    )


def _mover(row: Json) -> str:
    up = row["after"] < row["before"]
    way = f'<span class="way {"rise" if up else "fall"}">{row["before"]:,} → {row["after"]:,}</span>'
    place = f"unit {shown(row['unit'])}, row {row['row']:,}"
    ids = f"{_kept(row['query_id'])} · {_kept(row['doc_id'])}" if "doc_id" in row else place
    query = f'<p class="ask">{_kept(row["query"])}</p>' if row.get("query") is not None else ""
    text = ""
    if row.get("text") is not None:
        text = f"<pre tabindex=0>{_kept(row['text']) if row['text'] else '(an empty text)'}</pre>"
    return f'<li>{way} · score {row["score"]:.4g} <span class="ids">{ids}</span>{query}{text}</li>'


def _kept(value: object) -> str:
    """A text as it was kept: whole, or its beginning."""
    if isinstance(value, Mapping):
        start = str(value.get("start", ""))
        more = int(value.get("characters", 0)) - len(start)
        return f"{shown(start)} <span class=esc>… {more:,} more characters</span>"
    return shown(value)


def failures(content: Json) -> str:
    """What has no score, by cause."""
    told = content.get("failures")
    if not told:
        return ""
    rows = [
        [name, count(told[key]), ""]
        for key, name in (("null_queries", "the query is null"), ("null_texts", "the text is null"))
        if told[key]
    ]
    rows += [
        [shown(one["cause"]), count(one["rows"]), f"{shown(one['query_id'])} · {shown(one['doc_id'])}"]
        for one in told["engine"]
    ]
    parts = card("", table(["cause", "pairs", "e.g."], [[a, b, c] for a, b, c in rows]), "wide") if rows else ""
    if told["set_aside"]:
        aside = [[shown(one["unit"]), count(one["tries"]), shown(one["error"])] for one in told["set_aside"]]
        parts += card("Units that could not be scored", table(["unit", "tries", "error"], aside), "wide")
    if told["broken"]:
        broken = [[shown(one["unit"]), shown(one["why"])] for one in told["broken"]]
        parts += card("Units that are made again", table(["unit", "why"], broken), "wide")
    if told["files"] > told["files_read"]:
        parts += f"<p>Of {told['files']:,} records of failures the first {told['files_read']:,} are shown.</p>"
    return section("Failures", parts or "<p>None.</p>")


STATES = {"held": "held", "failed": "failed", "passed over": "over"}


def gate(content: Json) -> str:
    """What the job's gate has found."""
    told = content.get("gate")
    if not told:
        return ""
    said = "It let the scores be published." if told["passed"] else "It held the scores back."
    said = f"It was overridden: {shown(told['despite'])}" if told.get("despite") else said
    if told.get("problem"):
        said += f" {shown(told['problem'])}"
    rows = []
    for line in told["lines"]:
        state = "warned" if line["state"] == "failed" and line["level"] == "warn" else STATES.get(line["state"], "over")
        behind = "".join(
            f"<br>{', '.join(f'{shown(k)} {shown(v, 120)}' for k, v in row.items())}" for row in line["rows"]
        )
        found = f"{shown(line['said'])}{behind}"
        rows.append([f'<span class="state {state}">{shown(line["state"])}</span>', shown(line["condition"]), found])
    against = f" Against <code>{shown(told['against'], 300)}</code>." if told.get("against") else ""
    return section(
        "Gate", f"<p>{said}{against}</p>" + (card("", table(["", "condition", "found"], rows), "wide") if rows else "")
    )


def measures(content: Json) -> str:
    """Judged quality, where judgements were given."""
    told = content.get("measures")
    if not told:
        return ""
    about = f"{count(told['queries'])} judged queries of <code>{shown(told['qrels'], 300)}</code>."
    if told.get("missing"):
        about += f" {count(told['missing'])} of them are not in the output and count as zero."
    problem = "".join(f"<p>{shown(told[name], 600)}</p>" for name in ("problem", "cut") if told.get(name))
    rows = [
        [
            shown(one["measure"]),
            figure(one["before"]),
            figure(one["after"]),
            f"{one['after'] - one['before']:+.3f}",
            f"{one['low']:+.3f} to {one['high']:+.3f}",
            *(count(one[way]) for way in ("better", "even", "worse")),
        ]
        for one in told.get("rows", [])
    ]
    head = ["measure", "first stage", "reranked", "change", "95 % interval", "better", "even", "worse"]
    return section("Measures", f"<p>{about}</p>{problem}" + (card("", table(head, rows, 7), "wide") if rows else ""))


def provenance(content: Json) -> str:
    """Where the scores come from."""
    told = content.get("provenance")
    if not told:
        return ""
    rows = [
        ["model" if name == "name" else shown(name.replace("_", " ")), shown(value)]
        for name, value in told["model"].items()
    ]
    rows += [[f"input {shown(name)}", shown(value)] for name, value in told["input"].items()]
    rows += [["shards", count(told["shards"])], ["scored by", shown(f"batch_rerank {told['written_by']}")]]
    rows += [["fingerprint", f"<code>{shown(told['fingerprint'])}</code>"]]
    if content.get("publication"):
        rows.append(["publication", f"<code>{shown(content['publication'])}</code>"])
    listed = {
        "devices": "units scored on",
        "self_tests": "self-test",
        "fallbacks": "padded forward, because",
        "reused_from": "scores reused from",
    }
    for key, name in listed.items():
        rows += [[name, f"{shown(value, 400)} ({number:,} units)"] for value, number in told[key]]
    rows += [["note", shown(note)] for note in told["notes"]]
    return section("Provenance", card("", table(["", ""], rows), "wide"))
