"""Receipts: the proof that a unit is scored, or a shard staged, alone or some 1,000 in a roll; and sums over them."""

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from pydantic import Field

from batch_rerank.errors import StorageError
from batch_rerank.store.records import Count, Line, Seconds, UnitId, parse

SUMMED = (
    "rows_in",
    "rows_out",
    "queries",
    "scored",
    "failed",
    "null_texts",
    "null_queries",
    "empty_texts",
    "truncated",
    "tokens",
    "engine_failed",
)
"""Counts of a receipt that follow from the unit alone: they are in its file's footer too."""

Text = Annotated[str, Field(pattern=r"^[\x20-\x7e]*$", max_length=6000)]

REUSE_COUNTS = ("reused", "new_queries", "new_documents", "unreadable", "audited")
"""Counts of pairs that follow from the earlier outputs too."""

TIMES = (
    "read_seconds",
    "encode_seconds",
    "write_seconds",
    "load_seconds",
    "wait_seconds",
    "seconds",
    "pack_seconds",
    "compute_seconds",
    "result_seconds",
)
"""Seconds of a receipt that may be summed over units."""


ALIKE = ("fingerprint", "scorer", "self_test", "fallback", "host", "device", "actor")
"""Texts of a receipt of which a job has few."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """Proof that a unit is committed: what came in, what went out, and what was odd about it.

    Fields of other versions that are missing here have their defaults, and those that this version does not know are
    passed over, so that a receipt of theirs costs no scored unit.
    part: the file's name; engine_failed: rows among `failed` whose pair the engine could not score, which a resume
    tries again; scorer: the model copy that scored it; self_test: what its self-test said; storage_retries: requests
    that were repeated for it; etag: the file's version where the store keeps one; fallback: why its batches were
    padded, empty where packed; at: when it was committed, in UTC; host and device: where it was scored, actor: Ray's id
    of by whom, token_budget: of its batches, 0 where there are none; seconds: its part of the actor's time with a unit,
    beside those of the other steps; load_seconds (of the actor's first unit), wait_seconds, pack_seconds,
    compute_seconds, result_seconds and age_seconds: see score/timesheet.py, all 0 for a unit that no actor has met;
    retries: how often it was begun before, by a process that died with it, moves: by one whose node left; reused: pairs
    with the score of an earlier output, reused_from: of which;
    new_queries, new_documents, unreadable: pairs that such outputs do not have, by reason: none knows the query, or the
    document beside it, or what does is damaged or gone; audited: reused pairs whose score was computed again, and
    audit_difference: the largest that was seen; computed_tokens and flop: what a model computed for it, see
    engine/work.py; fetched_bytes and fetch_seconds: of weights that its actor has fetched from a store before this, its
    first unit; shape: how scores, lengths and places of its pairs lie, see store/shapes.py, empty in receipts of
    0.1.0
    """

    unit: UnitId
    fingerprint: str
    part: str
    size: Count
    sha256: str
    rows_in: Count = 0
    rows_out: Count = 0
    queries: Count = 0
    scored: Count = 0
    failed: Count = 0
    null_texts: Count = 0
    null_queries: Count = 0
    empty_texts: Count = 0
    truncated: Count = 0
    tokens: Count = 0
    seconds: Seconds = 0.0
    scorer: str = ""
    self_test: str = ""
    engine_failed: Count = 0
    storage_retries: Count = 0
    etag: str = ""
    fallback: str = ""
    at: Line = ""
    host: Line = ""
    device: Line = ""
    read_seconds: Seconds = 0.0
    encode_seconds: Seconds = 0.0
    write_seconds: Seconds = 0.0
    reused: Count = 0
    reused_from: list[Line] = field(default_factory=list)
    new_queries: Count = 0
    new_documents: Count = 0
    unreadable: Count = 0
    audited: Count = 0
    audit_difference: Seconds = 0.0
    computed_tokens: Count = 0
    flop: Seconds = 0.0
    load_seconds: Seconds = 0.0
    wait_seconds: Seconds = 0.0
    pack_seconds: Seconds = 0.0
    compute_seconds: Seconds = 0.0
    result_seconds: Seconds = 0.0
    age_seconds: Seconds = 0.0
    actor: Line = ""
    token_budget: Count = 0
    retries: Count = 0
    moves: Count = 0
    shape: Text = ""
    fetched_bytes: Count = 0
    fetch_seconds: Seconds = 0.0

    def __post_init__(self) -> None:
        # once for all receipts: a driver holds those of a million units
        for name in ALIKE:
            object.__setattr__(self, name, sys.intern(getattr(self, name)))

    @property
    def counts(self) -> dict[str, int]:
        """What follows from the unit alone."""
        return {name: getattr(self, name) for name in SUMMED}

    def to_json(self) -> bytes:
        """One JSON object."""
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def from_json(data: bytes, where: object) -> "Receipt":
        """Raises StorageError where the content is no receipt."""
        try:
            return parse(Receipt, data)
        except ValueError as error:
            raise StorageError(f"{where}: not a receipt ({error}); delete it to have its unit scored again") from None


@dataclass(frozen=True)
class _UnitOf:
    unit: UnitId


def roll(bodies: Iterable[bytes]) -> bytes:
    """Receipts as one file, a line each. They stay as they are: another version's fields with them."""
    return b"".join(json.dumps(json.loads(body), separators=(",", ":")).encode() + b"\n" for body in bodies)


def unroll(data: bytes) -> dict[str, bytes]:
    """The receipts of a roll by their unit. A line that is none is passed over: its unit has no receipt then."""
    found = {}
    for line in data.splitlines():
        try:
            found[parse(_UnitOf, line).unit] = line
        except ValueError:
            continue
    return found


@dataclass(frozen=True)
class ScoresReceipt:
    """Proof that a file below `_scores/` is whole: the units in it, one row group each, in this order, each with the
    sha256 that its receipt has. queries_sha256, pairs_sha256: of the files beside it, empty where there are none."""

    name: Line
    fingerprint: str
    units: list[tuple[UnitId, str]]
    size: Count
    sha256: str
    etag: str = ""
    queries_sha256: str = ""
    pairs_sha256: str = ""

    def to_json(self) -> bytes:
        """One JSON object."""
        return json.dumps(asdict(self)).encode()


@dataclass(frozen=True)
class PartReceipt:
    """Proof that a part of the output is whole. publication: the id of the one that it is of."""

    part: Line
    publication: str
    rows: Count
    size: Count
    sha256: str
    etag: str = ""
    at: Line = ""
    seconds: Seconds = 0.0

    def to_json(self) -> bytes:
        """One JSON object."""
        return json.dumps(asdict(self)).encode()


@dataclass(frozen=True)
class Publication:
    """What is made of the scores: `fields` decide it, `parts` are the first and last unit of each part, as places in
    the plan. Created once, and followed by whoever goes on. lease: who made it, where another was withdrawn before it,
    so that no two publications of an output are the same; id: a hash of it all, which every part has in it."""

    id: str
    fingerprint: str
    fields: dict[str, Any]
    parts: list[tuple[Count, Count]]
    counts: dict[str, Count] = field(default_factory=dict)
    lease: Line = ""

    def to_json(self) -> bytes:
        """One JSON object."""
        return json.dumps(asdict(self)).encode()


@dataclass(frozen=True)
class Withdrawal:
    """Says that the publication with this id is taken back: whoever holds the output removes the rest of it."""

    publication: str

    def to_json(self) -> bytes:
        """One JSON object."""
        return json.dumps(asdict(self)).encode()


@dataclass(frozen=True)
class SetAside:
    """A unit that could not be scored: the job goes on without it and ends with exit 1; a resume tries it again."""

    unit: str
    tries: int
    error: str


@dataclass
class Totals:
    """Sums over receipts, so that no list of receipts has to be kept. padded_units: those with a fallback;
    resumed_pairs: done by earlier runs; gpu_seconds: for which all runs of the job have held GPUs. rows_out: of the
    parts, once they are published."""

    units: int = 0
    rows_in: int = 0
    rows_out: int = 0
    queries: int = 0
    scored: int = 0
    failed: int = 0
    null_texts: int = 0
    null_queries: int = 0
    empty_texts: int = 0
    truncated: int = 0
    tokens: int = 0
    engine_failed: int = 0
    storage_retries: int = 0
    reused: int = 0
    new_queries: int = 0
    new_documents: int = 0
    unreadable: int = 0
    audited: int = 0
    audit_difference: float = 0.0
    padded_units: int = 0
    seconds: float = 0.0
    computed_tokens: int = 0
    flop: float = 0.0
    resumed_pairs: int = 0
    gpu_seconds: float = 0.0
    retries: int = 0
    moves: int = 0
    read_seconds: float = 0.0
    encode_seconds: float = 0.0
    write_seconds: float = 0.0
    load_seconds: float = 0.0
    wait_seconds: float = 0.0
    pack_seconds: float = 0.0
    compute_seconds: float = 0.0
    result_seconds: float = 0.0

    def add(self, receipt: Receipt) -> None:
        """Count one more unit."""
        self.units += 1
        self.padded_units += bool(receipt.fallback)
        self.computed_tokens += receipt.computed_tokens
        self.flop += receipt.flop
        self.audit_difference = max(self.audit_difference, receipt.audit_difference)
        for name in (*SUMMED, "storage_retries", "retries", "moves", *REUSE_COUNTS, *TIMES):
            setattr(self, name, getattr(self, name) + getattr(receipt, name))
