"""`_manifest/gate.json`: what the gate of a job has found, and whether it was overridden."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from batch_rerank.errors import StorageError
from batch_rerank.store.filesystem import storage_errors
from batch_rerank.store.manifest import Manifest
from batch_rerank.store.records import Line, parse

GATE = "_manifest/gate.json"

NOT_JUDGED = "not judged yet"
HELD, FAILED, PASSED_OVER = "held", "failed", "passed over"


@dataclass(frozen=True)
class Judged:
    """A condition and what was found. level: error or warn; state: held, failed, or passed over where there is no
    earlier output yet; found: None where nothing could be measured; said: the same in words; rows: what is behind a
    failure, the worst first."""

    condition: str
    level: Line
    state: Line
    found: float | None = None
    said: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Verdict:
    """What was judged by what, when (UTC), and with what result. despite: why it was published all the same; problem:
    why nothing could be judged; gate: of a job that has yet to be judged, the section of its job file."""

    passed: bool
    at: Line = ""
    qrels: str = ""
    against: str = ""
    despite: str = ""
    problem: str = ""
    lines: list[Judged] = field(default_factory=list)
    gate: dict[str, Any] | None = None

    @property
    def awaited(self) -> bool:
        """Whether nothing is judged yet."""
        return not self.passed and self.problem == NOT_JUDGED

    def failed(self, level: str) -> list[Judged]:
        """The conditions of a level that did not hold."""
        return [line for line in self.lines if line.level == level and line.state == FAILED]

    @property
    def summary(self) -> str:
        """In a line, without the characters that a terminal obeys."""
        failed = self.problem or "; ".join(f"{line.condition} (found {line.said})" for line in self.failed("error"))
        said = "passed" if self.passed else NOT_JUDGED if self.awaited else f"failed: {failed}"
        warned = self.failed("warn")
        said += f"; warned of {'; '.join(line.condition for line in warned)}" if warned else ""
        said += f"; published despite it: {self.despite}" if self.despite else ""
        return "".join(sign if sign.isprintable() else " " for sign in said)

    def write(self, manifest: Manifest) -> None:
        """In place of an earlier one."""
        location = manifest.root / GATE
        with storage_errors(location):
            location.write_bytes(json.dumps(asdict(self), indent=1).encode())


def why_unfinished(manifest: Manifest) -> str:
    """Why an output has no `_SUCCESS`, and what to do first. Raises StorageError."""
    verdict = read_verdict(manifest)
    if verdict is None or verdict.passed or verdict.awaited:
        return "no _SUCCESS, the job has not finished; run it again to the end"
    return (
        f"no _SUCCESS, its gate holds it back ({verdict.summary}; {GATE} has the rows): "
        "publish it with batch-rerank publish OUTPUT --despite-gate REASON"
    )


def read_verdict(manifest: Manifest) -> Verdict | None:
    """The last verdict; None where nothing was judged. Raises StorageError where it is damaged."""
    location = manifest.root / GATE
    with storage_errors(location):
        try:
            return parse(Verdict, location.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise StorageError(f"{location}: not what we write ({error}); delete it and run again") from None
