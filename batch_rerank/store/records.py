"""Records that are read back from storage: plan, receipts, notes, leases, status, `_SUCCESS`.

They are somebody's bytes until they have the shape that we write, so each is parsed by one schema, the types of its
dataclass. Fields that this version does not know are passed over, and those that are missing have their defaults.
"""

import json
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Annotated, Any, TypeVar, cast

from pydantic import Field, TypeAdapter, ValidationError

T = TypeVar("T")

UNIT = r"[0-9]{5,9}(-[0-9]{5,9})?"
"""A unit's id as we write it. It becomes a part of file names, so nothing else is one."""

UnitId = Annotated[str, Field(pattern=f"^{UNIT}$")]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Line = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f-\x9f]*$", max_length=1000)]
"""Text that is shown: without the characters that a terminal obeys."""


def parse(kind: type[T], data: bytes) -> T:
    """A record of this kind from JSON. Raises ValueError that says in one line what is wrong, without the content."""
    try:
        return cast(T, _adapter(cast(Any, kind)).validate_json(data, strict=True))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])[:100]
        raise ValueError(f"{place}: {first['msg']}" if place else first["msg"]) from None


def parse_counts(data: bytes) -> dict[str, int]:
    """The counts in a part's footer. Raises ValueError."""
    return parse(dict[str, Count], data)


@cache
def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


@dataclass(frozen=True)
class Spent:
    """What a status says of the totals and a later run goes on from."""

    gpu_seconds: Seconds = 0.0


@dataclass(frozen=True)
class Status:
    """`_manifest/status.json`, for people: how far a run is and how it ended. Times are UTC, `seconds` the run's."""

    state: Line = "planned"
    exit_code: int | None = None
    message: str = ""
    started_at: Line = ""
    updated_at: Line = ""
    seconds: Seconds = 0.0
    pairs_per_second: Seconds = 0.0
    totals: Spent = field(default_factory=Spent)


@dataclass(frozen=True)
class TrecRun:
    """What `_SUCCESS` says of the TREC run beside the parts."""

    size: Count
    sha256: str


@dataclass(frozen=True)
class PartMark:
    """What `_SUCCESS` says of a part: its name, candidates, bytes and checksum."""

    name: Line
    rows: Count
    size: Count
    sha256: str


@dataclass(frozen=True)
class Mark:
    """`_SUCCESS`. `lease` names the run that wrote it: no two marks are the same, so one can be told from a later one.
    A reader's manifest: `parts` are all files of the output; a stage names none."""

    fingerprint: str = ""
    units: Count = 0
    rows: Count = 0
    lease: str = ""
    publication: str = ""
    parts: list[PartMark] = field(default_factory=list)
    trec_run: TrecRun | None = None

    def to_json(self) -> bytes:
        """One JSON object."""
        value = {name: value for name, value in asdict(self).items() if value is not None}
        return json.dumps(value).encode()
