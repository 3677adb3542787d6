"""What there is to say first: how an output stands, in a line, and what a reader should look at."""

from collections.abc import Mapping
from typing import Any

from batch_rerank.store.records import Status

MUCH = 0.05
"""Share of cut or failed pairs from which on it is said first."""

GOOD, WARN, BAD, OPEN = "good", "warn", "bad", "open"
"""Done; done with something to look at; not done and it should be; not done yet."""


def verdict_of(
    status: Status, counts: Mapping[str, Any], gate: Mapping[str, Any] | None, published: bool
) -> dict[str, Any]:
    """tone: one of four; line: a sentence; notes: further ones, the worst first. counts: as in report.json."""
    done, planned = counts["units"], counts["units_planned"]
    share = f"{counts['rows_in']:,} of {counts['pairs_planned']:,} pairs are scored"
    notes = _notes(counts, gate)
    if published:
        if not counts["pairs_planned"]:
            return _said(WARN, "Finished, with nothing to score: the input has no candidates.", notes)
        warned = bool(notes)
        how = "Finished and published" if not warned else "Finished and published, with something to look at"
        line = f"{how}: {counts['rows_in']:,} pairs of {counts['queries']:,} queries."
        return _said(WARN if warned else GOOD, line, notes)
    if gate is not None and gate.get("passed") is False and not gate.get("despite") and done == planned:
        return _said(BAD, "Held back by its gate: all pairs are scored, and nothing is published.", notes)
    if status.state == "running":
        return _said(OPEN, f"Still running: {share} so far.", notes)
    if status.state in ("planned", "") and not done:
        return _said(OPEN, "Planned, and nothing is scored yet.", notes)
    if not planned:
        return _said(OPEN, "Nothing to score, and not finished: the input has no candidates; run the job again.", notes)
    ended = {
        "failed": "The last run failed",
        "interrupted": "The last run was interrupted",
        "killed": "The last run was killed",
        "silent": "The last run gives no sign of life",
        "ended": "The last run has ended without saying how",
        "done": "What was published has been taken back, or is damaged",
    }.get(status.state, "The last run has not finished")
    code = f" with exit code {status.exit_code}" if status.exit_code and status.state == "failed" else ""
    if done == planned:
        line = f"{ended}{code}: all pairs are scored and not published; run the job again."
    else:
        line = f"{ended}{code}: {share}; the same command goes on from there."
    if status.message:
        notes = [_first(status.message), *notes]
    return _said(BAD, line, notes)


def _notes(counts: Mapping[str, Any], gate: Mapping[str, Any] | None) -> list[str]:
    rows = max(1, counts["rows_in"])
    notes = []
    if gate is not None:
        if gate.get("despite"):
            notes.append(f"Published despite the gate: {gate['despite']}")
        failed = [line for line in gate.get("lines", []) if line.get("state") == "failed"]
        notes += [f"The gate {line['level']}s of {line['condition']}: found {line['said']}" for line in failed[:5]]
        if gate.get("problem"):
            notes.append(f"The gate: {gate['problem']}")
    if counts["units_set_aside"]:
        notes.append(f"{counts['units_set_aside']:,} units could not be scored and are set aside.")
    if counts["units_broken"]:
        notes.append(
            f"{counts['units_broken']:,} units are not as their receipts say, and are made again by the next run."
        )
    if counts["failed"]:
        notes.append(
            f"{counts['failed']:,} pairs have no score ({counts['failed'] / rows:.2%}); their rows have the error."
        )
    if counts["truncated"] > MUCH * rows:
        notes.append(f"{counts['truncated'] / rows:.1%} of the pairs were cut at the model's max_length.")
    if counts["unreadable"]:
        notes.append(f"{counts['unreadable']:,} pairs had an earlier score that is damaged or gone; they were scored.")
    if counts["padded_units"]:
        notes.append(f"{counts['padded_units']:,} units were scored by the slower padded forward; see below why.")
    return notes


def _said(tone: str, line: str, notes: list[str]) -> dict[str, Any]:
    return {"tone": tone, "line": line, "notes": notes[:12]}


def _first(message: str) -> str:
    return message if len(message) <= 600 else f"{message[:599]}…"
