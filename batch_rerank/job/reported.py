"""A run's last act: its report, whichever way it ends. It fails no job, and takes little of its time."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from batch_rerank.config import JobConfig
from batch_rerank.errors import BatchRerankError, ConflictError, StorageError
from batch_rerank.report.write import report_run
from batch_rerank.store.filesystem import locate
from batch_rerank.store.latest import read_latest
from batch_rerank.store.lease import Lease
from batch_rerank.store.manifest import Manifest
from batch_rerank.store.plans import Plan

log = logging.getLogger("batch_rerank")


@dataclass
class Reported:
    """Where the page of a run's report is, once it is made."""

    place: str | None = None


@contextmanager
def reported(manifest: Manifest, plan: Plan, config: JobConfig, lease: Lease, told: Reported) -> Iterator[None]:
    """Make the report when a run has ended and its status says how, under its lease. Not of a run that was interrupted,
    has lost its output, or whose storage fails: it has to end."""
    if not config.output.report:
        yield
        return
    earlier = _named(config, manifest)
    try:
        yield
    except (ConflictError, StorageError):
        raise
    except BatchRerankError:
        _make(manifest, plan, config, lease, told, earlier)
        raise
    _make(manifest, plan, config, lease, told, earlier)


def _make(manifest: Manifest, plan: Plan, config: JobConfig, lease: Lease, told: Reported, earlier: str | None) -> None:
    try:
        lease.check()  # a successor's report stays
    except BatchRerankError as error:
        log.warning("no report is made: %s", error)
        return
    made = report_run(manifest, plan, config, against=earlier)
    told.place = made.html if made else None


def _named(config: JobConfig, manifest: Manifest) -> str | None:
    """The output that `output.latest` names while this one is made: the last time's."""
    if config.output.latest is None:
        return None
    with suppress(BatchRerankError):
        named = read_latest(locate(config.output.latest, config.output.storage_options))
        return named if named and named.rstrip("/") != str(manifest.root).rstrip("/") else None
    return None
