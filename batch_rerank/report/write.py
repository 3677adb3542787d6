"""Makes a report and puts it beside its output: `_report/report.json`, and `_report/report.html` out of it.

In a folder whose name begins with `_`, because readers of a directory take every other file for rows.
"""

import json
import logging
import time
from dataclasses import dataclass, replace
from typing import Any

import batch_rerank
from batch_rerank.config import JobConfig
from batch_rerank.errors import BatchRerankError, StorageError
from batch_rerank.publish.output import Place, open_output
from batch_rerank.publish.status import of_lease
from batch_rerank.report.gather import FORMAT, gather, known_config
from batch_rerank.report.measures import measures_of
from batch_rerank.report.page import page
from batch_rerank.store.filesystem import Location, locate, storage_errors
from batch_rerank.store.manifest import Manifest
from batch_rerank.store.names import REPORT_HTML, REPORT_JSON
from batch_rerank.store.plans import Plan
from batch_rerank.store.records import Status

log = logging.getLogger("batch_rerank")

MOST_BYTES = 2**20
"""Of a page: what would make it larger is a fault of ours."""

SHARE, LEAST_SECONDS = 0.004, 1.0
"""Of a run's time that reading texts for its report may take, and what it may take in any case."""

TRIES = 3
"""To meet an output that stands still: one that is being worked on changes while it is looked at."""

Json = dict[str, Any]


@dataclass(frozen=True)
class Made:
    """A report: where it is, what is in it, and bytes of its page."""

    html: str
    json: str
    content: Json
    bytes: int
    seconds: float


def report(
    place: Place,
    *,
    qrels: str | None = None,
    against: Place | None = None,
    to: str | None = None,
    command: str = "",
) -> Made:
    """Make the report of an output as it is: finished or not, published or not. `to`: a folder in place of the output's
    own. Raises InputError where judgements cannot be read, and StorageError where there is no output, or where storage
    fails."""
    started = time.monotonic()
    root = locate(place.path, place.options)
    try:
        manifest, plan = open_output(place)
    except StorageError as error:
        content = _of_another_version(root, error)
    else:
        measures = measures_of(place, qrels) if qrels is not None else None
        config = known_config(plan, place)
        for _ in range(TRIES):
            before = manifest.read_status()
            state, message = (before.state, before.message) if before.state != "running" else of_lease(manifest, plan)
            status = replace(before, state=state, message=message)
            content = gather(
                manifest,
                plan,
                config,
                status,
                against=against,
                measures=measures,
                command=command,
            )
            if manifest.read_status() == before:
                break
    return _write(content, locate(to) if to else root, started, bool(to))


def report_run(
    manifest: Manifest,
    plan: Plan,
    config: JobConfig,
    *,
    against: str | None = None,
) -> Made | None:
    """The same at the end of a run, by who holds the output, whose status says how it has ended. plan: with the row
    groups that the run has seen. Never raises: what goes wrong is logged, and None is returned."""
    started = time.monotonic()
    try:
        status = manifest.read_status()
        earlier = Place(against, config.output.storage_options) if against else None
        seconds = max(LEAST_SECONDS, SHARE * status.seconds)
        content = gather(manifest, plan, config, status, against=earlier, seconds=seconds)
        return _write(content, manifest.root, started)
    except Exception as error:
        expected = isinstance(error, BatchRerankError)
        log.warning("the report could not be made: %s", error if expected else f"{type(error).__name__}: {error}")
        log.debug("report", exc_info=True)
        return None


def _write(content: Json, root: Location, started: float, apart: bool = False) -> Made:
    data = json.dumps(content, indent=1).encode() + b"\n"
    html = page(data)
    assert len(html) <= MOST_BYTES, f"a page of {len(html):,} bytes"
    names = [name.rpartition("/")[2] if apart else name for name in (REPORT_JSON, REPORT_HTML)]
    places = [root / name for name in names]
    for location, body in zip(places, (data, html), strict=True):
        with storage_errors(location):
            location.write_bytes(body)
    return Made(str(places[1]), str(places[0]), content, len(html), time.monotonic() - started)


def _of_another_version(root: Location, error: StorageError) -> Json:
    """A report of an output that this version does not read: that it is so, and what its status says. Raises the error
    where there is no such output."""
    manifest = Manifest(root)
    try:
        plan = json.loads(manifest.read("_manifest/plan.json"))
        number = plan["manifest_version"]
    except (StorageError, ValueError, KeyError, TypeError):
        raise error from None
    if not isinstance(number, int) or plan.get("config", {}).get("stage"):
        raise error
    status: Status = manifest.read_status()
    said = [str(error), f"Its last run: {status.state}{f', {status.message}' if status.message else ''}."]
    return {
        "format": FORMAT,
        "program": f"batch_rerank {batch_rerank.__version__}",
        "output": str(root),
        "as_of": status.updated_at,
        "verdict": {
            "tone": "open",
            "line": "An output of another version, which this one does not read.",
            "notes": said,
        },
        "agreement": {},
    }
