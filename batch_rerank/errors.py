"""The errors a user can cause, each with the exit code of the command line.

An error says where, what was found, what was expected and what to do. Inside Ray workers these errors are caught,
sent to the driver as values (`as_value`) and raised again there (`from_value`): Ray would wrap them in a traceback.
"""

from batch_rerank.outside import without_secrets


class BatchRerankError(Exception):
    """Base of all expected failures. No message has a secret in it, whoever wrote it."""

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(without_secrets(message))


class UnfinishedError(BatchRerankError):
    """The job ended without `_SUCCESS`: failed rows above the limit, or units that did not finish."""

    exit_code = 1


class ConfigError(BatchRerankError):
    """The command line, the job file or a setting in it is wrong."""

    exit_code = 2


class InputError(BatchRerankError):
    """The input data is not what the job file says, or it changed while the job ran."""

    exit_code = 3


class ScatteredError(InputError):
    """The candidates of a query are not side by side: the input has to be staged."""


class ConflictError(BatchRerankError):
    """The output belongs to a job with another fingerprint."""

    exit_code = 4


class ModelError(BatchRerankError):
    """The checkpoint cannot be loaded, or it is not a model this program can score with."""

    exit_code = 5


class AuditError(ModelError):
    """Scores of an earlier output are not those that the model computes now."""


class StorageError(BatchRerankError):
    """Storage refused a read or a write, or `verify` found a difference."""

    exit_code = 6


class GateError(BatchRerankError):
    """The gate of the job does not let its scores be published. verdict: what was found, of plain values."""

    exit_code = 7

    def __init__(self, message: str, verdict: dict[str, object] | None = None) -> None:
        super().__init__(message)
        self.verdict = verdict


class BudgetError(BatchRerankError):
    """The job would cost more than its budget, or has reached it. estimate: of a plan that was refused."""

    exit_code = 8

    def __init__(self, message: str, estimate: dict[str, object] | None = None) -> None:
        super().__init__(message)
        self.estimate = estimate


class StuckError(BatchRerankError):
    """Nothing has happened for cluster.max_seconds_without_progress."""

    exit_code = 9


def lines_of(error: BaseException) -> list[str]:
    """The lines of another library's message; the name of its type where it has none."""
    return str(error).strip().splitlines() or [type(error).__name__]


def as_value(error: BatchRerankError) -> dict[str, str]:
    """The error as a plain value that can cross a process border."""
    return {"type": type(error).__name__, "message": str(error)}


def from_value(value: dict[str, str]) -> BatchRerankError:
    """The error that `as_value` described; the base class if the type is unknown."""
    known: tuple[type[BatchRerankError], ...] = (*BatchRerankError.__subclasses__(), AuditError)
    types = {cls.__name__: cls for cls in known}
    return types.get(value["type"], BatchRerankError)(value["message"])
