"""Every number of a report, out of an output's records: what `report.json` holds, and all that its page is made of.

A pure function of what lies on storage: no clock, no dice. What is not known is null, and never 0.
"""

import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

import batch_rerank
from batch_rerank.config import JobConfig
from batch_rerank.errors import BatchRerankError, StorageError
from batch_rerank.publish.output import Place, config_of, open_output
from batch_rerank.publish.publication import stands
from batch_rerank.report.histograms import agreement_of, moments, places_of, relevance_of, scores_of, tokens_of
from batch_rerank.report.movers import movers, shapes_of
from batch_rerank.report.timeline import timeline
from batch_rerank.report.verdict import verdict_of
from batch_rerank.store.held import read_held
from batch_rerank.store.manifest import Manifest
from batch_rerank.store.plans import Plan
from batch_rerank.store.receipts import Receipt, Totals
from batch_rerank.store.records import Status
from batch_rerank.store.scan import Scan, scan
from batch_rerank.store.shapes import Shape, together
from batch_rerank.store.verdict import read_verdict

FORMAT = 1
"""Of report.json; raised when a field changes its meaning."""

LINE = 400
"""Characters of a line that is somebody's."""

FAILURES_READ, FAILURES_SHOWN, GATE_ROWS = 40, 12, 5

Json = dict[str, Any]


def gather(
    manifest: Manifest,
    plan: Plan,
    config: JobConfig | None,
    status: Status,
    *,
    against: Place | None = None,
    measures: Json | None = None,
    seconds: float | None = None,
    command: str = "",
) -> Json:
    """The content of a report. status: how the output's last run stands; config: None where this version does not
    understand it; against: an earlier output; seconds: that may be spent on reading texts, None for any; command: the
    job file or path by which commands name the output. Raises StorageError.
    """
    found = scan(manifest, plan)
    totals = Totals()
    for receipt in found.committed:
        totals.add(receipt)
    shapes = shapes_of(found.committed)
    whole = together(shape for _, shape in shapes)
    earlier, before = _earlier(against)
    mark = manifest.read_mark()
    rows_out = mark.rows if mark and stands(mark, plan, found) else None
    gate = _gate(manifest)
    counts = {
        **{name: value for name, value in asdict(totals).items() if name not in ("rows_out", "audit_difference")},
        "rows_out": rows_out,
        "units_planned": len(plan.units),
        "pairs_planned": plan.pairs,
        "queries_planned": plan.counts.get("queries"),
        "zero_row_shards": plan.counts.get("zero_row_shards"),
        "queries_without_candidates": plan.counts.get("queries_without_candidates"),
        "units_broken": len(found.broken),
        "units_set_aside": len(found.set_aside()),
        "parts": len(found.parts),
    }
    named = shlex.quote(command or str(manifest.root))
    content: Json = {
        "format": FORMAT,
        "program": f"batch_rerank {batch_rerank.__version__}",
        "output": str(manifest.root),
        "publication": None if found.publication is None else found.publication.id,
        "as_of": status.updated_at,
        "verdict": verdict_of(status, counts, gate, published=rows_out is not None),
        "status": {
            "state": status.state,
            "exit_code": status.exit_code,
            "started_at": status.started_at,
            "seconds": status.seconds,
            "pairs_per_second": status.pairs_per_second,
        },
        "planned": _planned(read_held(manifest)),
        "counts": counts,
        "audit_difference": totals.audit_difference if totals.audited else None,
        "shapes": {"units": len(shapes), "of": len(found.committed)},
        "scores": scores_of(whole, before),
        "relevance": relevance_of(whole),
        "earlier": earlier,
        "places": places_of(whole),
        "agreement": agreement_of(whole),
        "movers": {
            **movers(manifest, plan, config, found, shapes, seconds),
            "command": f"batch-rerank report {named} --score-movers",
        },
        "tokens": {"bins": tokens_of(whole), "max_length": _number(plan.model.get("max_length"))},
        "time": timeline(found.committed),
        "steps": steps_of(found.committed),
        "failures": _failures(manifest, found, totals),
        "gate": gate,
        "measures": measures,
        "provenance": _provenance(plan, found, status),
    }
    return content


def steps_of(receipts: Sequence[Receipt]) -> Json:
    """Seconds of every step over all units, of any that receipts have: `read_seconds` and so on."""
    names = [one.name for one in fields(Receipt) if one.name.endswith("_seconds")]
    sums = {name.removesuffix("_seconds"): sum(getattr(one, name) for one in receipts) for name in names}
    sums["score"] = sum(one.seconds for one in receipts)
    return {name: round(value, 2) for name, value in sums.items()}


def _earlier(against: Place | None) -> tuple[Json | None, Shape | None]:
    """What an earlier output has counted, and how its scores lie; why not, where they are not known."""
    if against is None:
        return None, None
    try:
        manifest, plan = open_output(against)
        found = scan(manifest, plan)
    except StorageError as error:
        return {"output": against.path, "problem": _line(str(error))}, None
    totals = Totals()
    for receipt in found.committed:
        totals.add(receipt)
    whole = together(shape for _, shape in shapes_of(found.committed))
    told: Json = {
        "output": str(manifest.root),
        "counts": {
            name: getattr(totals, name) for name in ("queries", "rows_in", "tokens", "reused", "failed", "truncated")
        },
        "same_job": None,
        "scores": moments(whole),
        "agreement": agreement_of(whole),
    }
    if not whole.count:
        told["problem"] = "its receipts have no distributions: it was scored by an earlier version"
    return told, whole if whole.count else None


def _gate(manifest: Manifest) -> Json | None:
    try:
        verdict = read_verdict(manifest)
    except StorageError as error:
        return {"problem": _line(str(error)), "passed": None, "lines": []}
    if verdict is None:
        return None
    lines = [
        {**asdict(line), "said": _line(line.said), "rows": [_row(row) for row in line.rows[:GATE_ROWS]]}
        for line in verdict.lines[:40]
    ]
    told = replace(verdict, lines=[])
    return {**asdict(told), "problem": _line(verdict.problem), "despite": _line(verdict.despite), "lines": lines}


def _row(row: Mapping[str, Any]) -> Json:
    return {
        str(name)[:40]: value if isinstance(value, int | float) else _line(str(value), 200)
        for name, value in row.items()
    }


def _planned(planned: Mapping[str, Any] | None) -> Json | None:
    """Only what has the shape that is shown."""
    if not planned:
        return None
    sides = {
        side: {
            _line(str(name), 60): value
            for name, value in list(dict(planned.get(side) or {}).items())[:40]
            if value is None or isinstance(value, int | float | str) or _is_interval(value)
        }
        for side in ("planned", "actual")
    }
    return {**sides, "reasons": [_line(str(reason)) for reason in list(planned.get("reasons") or [])[:20]]}


def _is_interval(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(one, int | float | None) for one in value.values())


def _failures(manifest: Manifest, found: Scan, totals: Totals) -> Json:
    """Rows without a score by cause, and units that were set aside."""
    causes: Counter[str] = Counter()
    examples: dict[str, Json] = {}
    aside = []
    names = [name for name in found.files.within("_manifest/failures") if name.endswith(".json")]
    for name in names[:FAILURES_READ]:
        try:
            told = json.loads(manifest.read(name))
            rows = told.get("rows")
            if rows is None:
                aside.append(
                    {"unit": _line(str(told["unit"]), 60), "tries": told["tries"], "error": _line(str(told["error"]))}
                )
                continue
            for row in rows:
                cause = _line(str(row["error"]))
                causes[cause] += 1
                examples.setdefault(
                    cause, {"query_id": _line(str(row["query_id"]), 200), "doc_id": _line(str(row["doc_id"]), 200)}
                )
        except (BatchRerankError, ValueError, KeyError, TypeError, AttributeError):
            continue
    listed = [{"cause": cause, "rows": count, **examples[cause]} for cause, count in causes.most_common(FAILURES_SHOWN)]
    return {
        "null_texts": totals.null_texts,
        "null_queries": totals.null_queries,
        "engine": listed,
        "files": len(names),
        "files_read": min(len(names), FAILURES_READ),
        "set_aside": aside[:FAILURES_SHOWN],
        "broken": [{"unit": unit, "why": _line(why)} for unit, why in list(found.broken.items())[:FAILURES_SHOWN]],
    }


def _provenance(plan: Plan, found: Scan, status: Status) -> Json:
    """Where the scores come from."""
    devices: Counter[str] = Counter()
    for receipt in found.committed:
        devices[" · ".join(filter(None, (receipt.host, receipt.device))) or "reused, no device"] += 1
    said = Counter(one.fallback for one in found.committed if one.fallback)
    tests = Counter(one.self_test.rpartition(";")[0] or one.self_test for one in found.committed if one.self_test)
    reused = Counter(place for one in found.committed for place in one.reused_from)
    model = plan.model
    shown = ("name", "revision", "identity", "kind", "template", "max_length", "dtype", "instruction")
    inputs = plan.config.get("input") if isinstance(plan.config.get("input"), dict) else {}
    return {
        "model": {name: _line(str(model[name])) for name in shown if model.get(name) not in (None, "")},
        "written_by": plan.version,
        "fingerprint": plan.fingerprint,
        "input": {name: _line(str(value)) for name, value in (inputs or {}).items() if value and name in _INPUT},
        "shards": len(plan.shards),
        "notes": [_line(note) for note in plan.notes[:10]],
        "devices": _most(devices),
        "self_tests": _most(tests),
        "fallbacks": _most(said),
        "reused_from": _most(reused),
        "started_at": status.started_at,
    }


_INPUT = ("layout", "path", "run", "queries", "corpus", "candidates_per_query")


def _most(counter: Counter[str]) -> list[list[Any]]:
    return [[_line(name), count] for name, count in counter.most_common(12)]


def _number(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _line(text: str, most: int = LINE) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def known_config(plan: Plan, place: Place) -> JobConfig | None:
    """The job of a plan, where this version understands it."""
    try:
        return config_of(plan, place)
    except StorageError:
        return None
