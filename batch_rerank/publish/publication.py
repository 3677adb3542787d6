"""What is made of the scores: which settings decide it, and which units are in which part."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from batch_rerank.config import Output
from batch_rerank.errors import StorageError
from batch_rerank.store.manifest import PUBLICATION, fingerprint
from batch_rerank.store.plans import Plan, Unit
from batch_rerank.store.receipts import Publication
from batch_rerank.store.records import Mark
from batch_rerank.store.scan import Scan

PUBLISHING_VERSION = 1
"""Raised when the same scores would be published differently."""

FIELDS = ("layout", "top_k", "include_text", "passthrough", "file_bytes")
"""Of a job's output section."""


def publishing_fields(output: Output) -> dict[str, Any]:
    """Everything that changes the parts of the same scores. Not the TREC run, which can be had beside them."""
    return {"publishing_version": PUBLISHING_VERSION, **{name: getattr(output, name) for name in FIELDS}}


def make_publication(plan: Plan, sizes: Mapping[str, int], fields: dict[str, Any], lease: str = "") -> Publication:
    """Whole units in the order of the plan, in parts of about `file_bytes`. sizes: bytes of the units' score files;
    lease: of who makes it, where it must be unlike all others of the output."""
    parts: list[tuple[int, int]] = []
    first, size = 0, 0.0
    for index, unit in enumerate(plan.units):
        size += _published_bytes(unit, sizes[unit.id], fields["top_k"])
        if size >= fields["file_bytes"] or index == len(plan.units) - 1:
            parts.append((first, index))
            first, size = index + 1, 0.0
    told = {"fingerprint": plan.fingerprint, "fields": fields, "parts": parts, **({"lease": lease} if lease else {})}
    return Publication(fingerprint(told), plan.fingerprint, fields, parts, lease=lease)


def _published_bytes(unit: Unit, size: int, top_k: int | None) -> float:
    """About how much a unit's score file adds to the output: it has hashes that this has not, and no ranks."""
    kept = 1.0 if top_k is None else min(1.0, unit.queries * top_k / max(1, unit.pairs))
    return kept * size


def of_units(publication: Publication, plan: Plan, number: int) -> list[Unit]:
    """The units of a part."""
    first, last = publication.parts[number]
    return plan.units[first : last + 1]


def stands(mark: Mark | None, plan: Plan, found: Scan) -> bool:
    """Whether `_SUCCESS` speaks of what a listing shows: of this publication, which nobody has begun to take back, and
    of all its parts as their receipts say."""
    publication = found.publication
    if mark is None or publication is None or found.condemned:
        return False
    told = (plan.fingerprint, len(plan.units), publication.id)
    whole = {part.part: (part.size, part.sha256) for part in found.parts.values()}
    there = len(whole) == len(publication.parts) and whole == {one.name: (one.size, one.sha256) for one in mark.parts}
    return there and (mark.fingerprint, mark.units, mark.publication) == told


def output_of(publication: Publication, output: Output) -> Output:
    """The output's settings as they were published. Raises StorageError where they are none that we write."""
    told = {name: publication.fields[name] for name in FIELDS if name in publication.fields}
    try:
        return Output.model_validate({**output.model_dump(), **told, "storage_options": output.storage_options})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise StorageError(
            f"{PUBLICATION}: {'.'.join(map(str, first['loc']))[:100]}: {first['msg']}; it is damaged; delete it and "
            "run again"
        ) from None
