"""What an export keeps beside its files: the plan that decides them, a receipt for each part, and `_SUCCESS`."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from batch_rerank.store.records import Count, Line

PLAN = "_manifest/labels.json"


@dataclass(frozen=True)
class LabelPlan:
    """An export: `fields` decide every byte of it, `parts` are the first and last unit of each part, as places in the
    exported output's plan; buckets: files of documents, 0 without such a table; about: what people want to know."""

    fingerprint: str
    fields: dict[str, Any]
    parts: list[tuple[Count, Count]]
    buckets: Count
    about: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """One JSON object."""
        return json.dumps(asdict(self), indent=1).encode()


@dataclass(frozen=True)
class LabelFile:
    """A file of an export. rows: of a table, or lines."""

    name: Line
    rows: Count
    size: Count
    sha256: str


@dataclass(frozen=True)
class LabelReceipt:
    """Proof that a part is whole, or that a file of documents is: its files, those that only later parts need among
    them, and what was counted."""

    part: Count
    fingerprint: str
    files: list[LabelFile]
    counts: dict[str, Count] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """One JSON object."""
        return json.dumps(asdict(self)).encode()


@dataclass(frozen=True)
class LabelMark:
    """`_SUCCESS` of an export: all that it has, and what is known of it. lease: who wrote it."""

    fingerprint: str
    counts: dict[str, Count]
    files: list[LabelFile]
    about: dict[str, Any] = field(default_factory=dict)
    lease: str = ""

    def to_json(self) -> bytes:
        """One JSON object."""
        return json.dumps(asdict(self), indent=1).encode()


def part_receipt(number: int) -> str:
    """Of a part."""
    return f"_manifest/parts/{number:05d}.json"


def documents_receipt(number: int) -> str:
    """Of a file of documents."""
    return f"_manifest/documents/{number:05d}.json"
