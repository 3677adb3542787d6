"""The names of an output's files, and what one listing shows of them. Only names of these patterns are ever removed."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from batch_rerank.errors import StorageError
from batch_rerank.store.disk import TEMPORARY_NAME
from batch_rerank.store.filesystem import File
from batch_rerank.store.records import UNIT

TREC_RUN = "_run.trec"
"""The ranked rows as a TREC run, under a name that readers of directories pass over."""

REPORT_JSON, REPORT_HTML = "_report/report.json", "_report/report.html"
"""What a run was like, in numbers and for people; hidden from readers of the output."""

_FOLDERS = "receipts|attempts|failures|damaged|lease|exchange|parts|scores|withdrawn"
_LEFTOVER = re.compile(
    rf"_manifest/(?:attempts/[0-9a-f]+|failures/{UNIT}|damaged/(?:part-|scores-)?{UNIT})\.json"
    rf"|(?:_manifest/(?:(?:{_FOLDERS})/)?|_work/|_scores/|_report/)?{TEMPORARY_NAME}"
)
ROLL = r"_manifest/receipts/rolled-[0-9]{5,9}\.jsonl"
"""Many receipts in one file."""

EXCHANGED = rf"_manifest/exchange/(?:[0-9]{{5,9}}(?:-[0-9]{{4,9}}\.arrows|\.note|\.json)|{TEMPORARY_NAME})"
"""What a stage exchanges between its passes. Notes of earlier versions are JSON."""

NOTE = rf"_manifest/damaged/(?:part-|scores-)?{UNIT}\.json"
PART = r"part-[0-9]{5,9}\.parquet"
SCORES = r"_scores/[0-9]{5,9}\.parquet"
WITHDRAWN = r"_manifest/withdrawn/[0-9a-f]{32}\.json"
"""Notes of publications that are taken back, named by the leases of who takes them."""


OUTPUT_KINDS = {
    "mark": "_SUCCESS",
    "parts": rf"part-{UNIT}\.parquet|{re.escape(TREC_RUN)}",
    "scores": r"_scores/[0-9]{5,9}\.(?:parquet|queries\.npy|pairs\.npy)|_manifest/scores/[0-9]{5,9}\.json",
    "report": r"_report/report\.(?:json|html)",
    "work": rf"_work/{UNIT}\.parquet|{EXCHANGED}",
    "records": (
        r"_manifest/(?:(?:plan|status|publication|missing|gate|distrusted|actual|pointers)\.json"
        rf"|(?:receipts|failures)/{UNIT}\.json"
        rf"|parts/[0-9]{{5,9}}\.json|lease/[1-9][0-9]{{0,8}})|{ROLL}|{WITHDRAWN}|{_LEFTOVER.pattern}"
    ),
}
"""All that we write below an output or a stage, by what it is for."""


def part_name(number: int | str) -> str:
    """A part of an output, or of a stage. Raises StorageError."""
    return f"part-{checked(f'{number:05d}' if isinstance(number, int) else number)}.parquet"


def work_name(unit_id: str) -> str:
    """The score file of a unit, hidden from readers of the output. Raises StorageError."""
    return f"_work/{checked(unit_id)}.parquet"


def receipt_name(unit_id: str) -> str:
    """A unit's own receipt. Raises StorageError."""
    return f"_manifest/receipts/{checked(unit_id)}.json"


def checked(unit_id: str) -> str:
    """A unit's id, which is about to become part of a path. Raises StorageError where it is none."""
    if not re.fullmatch(UNIT, unit_id):
        raise StorageError(f"unit {unit_id!r}: not a unit's id; expected one as 00003-00017; the manifest is damaged")
    return unit_id


@dataclass(frozen=True)
class Files:
    """An output's files by their path below it, as one listing showed them."""

    found: dict[str, File]

    @property
    def bytes(self) -> int:
        """Of all of them."""
        return sum(file.size for file in self.found.values())

    def size(self, name: str) -> int | None:
        """Bytes, or None where there is no such file."""
        return self.found[name].size if name in self.found else None

    def within(self, directory: str) -> list[str]:
        """The files of one directory, e.g. _manifest/attempts."""
        return [name for name in self.found if name.startswith(f"{directory}/")]

    def units_within(self, directory: str) -> list[str]:
        """The units that have a record in one directory, e.g. _manifest/failures."""
        pattern = re.compile(rf"{directory}/({UNIT})\.json")
        return [match[1] for match in map(pattern.fullmatch, self.found) if match]

    def leftovers(self) -> list[str]:
        """What earlier runs have left for nobody: notes of actors, failures and damage, and the hidden files of killed
        writes. Nothing that is not named as we name it: other programs may keep files here."""
        return [name for name in self.found if _LEFTOVER.fullmatch(name)]

    def matching(self, pattern: str) -> list[str]:
        """The files of a pattern, in order of their names."""
        return [name for name in self.found if re.fullmatch(pattern, name)]

    def strays(self, parts: Iterable[str]) -> list[str]:
        """Parquet files that a reader would take for output and that are none of these parts."""
        parts = set(parts)
        hidden = ("_", ".")
        names = (name for name in self.found if name.endswith(".parquet") and name not in parts)
        return [name for name in names if not any(part.startswith(hidden) for part in name.split("/"))]
