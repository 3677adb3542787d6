"""The names of an output's files, and what one listing shows of them. Only names of these patterns are ever removed."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from batch_rerank.errors import StorageError
from batch_rerank.store.disk import TEMPORARY_NAME
from batch_rerank.store.filesystem import File
from batch_rerank.store.records import UNIT

TREC_RUNS = ("_run.trec", "run.trec")
"""The ranked rows as a TREC run; the second is where version 0.1.0 had it, in the way of readers of directories."""

_LEFTOVER = re.compile(
    rf"_manifest/(?:attempts/[0-9a-f]+|failures/{UNIT}|damaged/{UNIT})\.json"
    rf"|(?:_manifest/(?:(?:receipts|attempts|failures|damaged|lease|exchange)/)?)?{TEMPORARY_NAME}"
)


def part_name(unit_id: str) -> str:
    """The part of unit `00003-00017` is `part-00003-00017.parquet`, in every run. Raises StorageError."""
    return f"part-{checked(unit_id)}.parquet"


def checked(unit_id: str) -> str:
    """A unit's id, which is about to become part of a path. Raises StorageError where it is none."""
    if not re.fullmatch(UNIT, unit_id):
        raise StorageError(f"unit {unit_id!r}: not a unit's id; expected one as 00003-00017; the manifest is damaged")
    return unit_id


@dataclass(frozen=True)
class Files:
    """An output's files by their path below it, as one listing showed them."""

    found: dict[str, File]

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

    def strays(self, units: Iterable[str]) -> list[str]:
        """Parquet files that a reader would take for output and that are no part of these units."""
        parts = {part_name(unit) for unit in units}
        hidden = ("_", ".")
        names = (name for name in self.found if name.endswith(".parquet") and name not in parts)
        return [name for name in names if not any(part.startswith(hidden) for part in name.split("/"))]
