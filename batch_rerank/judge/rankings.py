"""The ranked rows of an output, published or about to be: what measures and comparisons are made of."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from batch_rerank.config import JobConfig
from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.errors import StorageError
from batch_rerank.publish.parts import PartWork, ranked
from batch_rerank.publish.read_parts import read_part
from batch_rerank.store.manifest import PUBLICATION, Manifest
from batch_rerank.store.plans import Plan
from batch_rerank.store.scan import Scan

COLUMNS = ["query_id", "doc_id", "rank", "score"]

TOLERANCE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 4e-2}
"""Differences of scores that are noise, by what they were computed in: twice what another batch was seen to change."""


@dataclass(frozen=True)
class Ranking:
    """An output as its ranked rows. rows: how many there are at most; tables: whole queries with COLUMNS, from the
    beginning each time; tolerance: differences of scores that are noise."""

    name: str
    rows: int
    tables: Callable[[], Iterator[pa.Table]]
    tolerance: float


def published(manifest: Manifest, plan: Plan) -> Ranking:
    """A finished output. Raises StorageError while its rows are read."""
    mark = manifest.read_mark()
    rows = 0 if mark is None else mark.rows
    return Ranking(str(manifest.root), rows, lambda: published_rows(manifest, COLUMNS), tolerance_of(plan))


def published_rows(manifest: Manifest, columns: Sequence[str]) -> Iterator[pa.Table]:
    """The rows of all parts, a row group of whole queries at a time. Raises StorageError."""
    publication = manifest.read_publication()
    if publication is None:
        raise StorageError(f"{manifest.root}: _SUCCESS without {PUBLICATION}; the manifest is damaged; run it again")
    for number in range(len(publication.parts)):
        yield from read_part(manifest.part(number), columns)


def unpublished(manifest: Manifest, plan: Plan, found: Scan, config: JobConfig, model: ModelSpec) -> Ranking:
    """Scores as they would be published, unit by unit. Raises StorageError while they are read."""
    bare = config.output.model_copy(update={"include_text": False, "passthrough": []})
    work = work_of(plan, found)
    bare_config = config.model_copy(update={"output": bare})

    def tables() -> Iterator[pa.Table]:
        return (rows.select(COLUMNS) for rows, _ in ranked(work, manifest, bare_config, model))

    most = config.output.top_k or plan.pairs
    rows = sum(min(unit.pairs, unit.queries * most) for unit in plan.units)
    return Ranking(str(manifest.root), rows, tables, tolerance_of(plan))


def work_of(plan: Plan, found: Scan) -> PartWork:
    """All units of a plan as one part that nobody makes."""
    places = found.places()
    checksums = {receipt.unit: receipt.sha256 for receipt in found.committed}
    return PartWork(0, "", plan.fingerprint, plan.units, places, checksums, {}, 0)


def tolerance_of(plan: Plan) -> float:
    """Differences of scores that are noise in a job."""
    return TOLERANCE.get(str(plan.model.get("dtype")), TOLERANCE["bfloat16"])
