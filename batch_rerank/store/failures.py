"""What stores raise, as one of our errors: whose fault it is, and what to do about it."""

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

from batch_rerank.errors import BatchRerankError, InputError, StorageError
from batch_rerank.outside import protocol_of

LIBRARIES = (
    *("botocore", "aiobotocore", "aiohttp", "s3fs", "fsspec", "http."),
    *("adlfs", "azure.", "gcsfs", "google.", "requests", "huggingface_hub", "httpx"),
)

UNREADABLE = (pa.ArrowException, OSError, ValueError, KeyError)
"""What Arrow raises where a file is not what it was: a damaged name may be a UnicodeDecodeError or a KeyError."""


@contextmanager
def storage_errors(where: object, kind: type[BatchRerankError] = StorageError) -> Iterator[None]:
    """Turn what stores raise (no credentials, no such bucket, disk full, …) into one of our errors with the reason.

    kind: of what the files are to blame for. A store that cannot be reached, or lets nobody in, is StorageError.
    """
    try:
        yield
    except BatchRerankError:
        raise
    except FileNotFoundError:
        advice = "check the path" if is_local(where) else "check the path, the bucket and, for S3, AWS_ENDPOINT_URL"
        raise kind(f"{where}: not found; {advice}") from None
    except PermissionError as error:
        local = is_local(where)
        advice = "check the rights" if local else "check the rights and the credentials"
        blame = kind if local else StorageError
        raise blame(f"{where}: not permitted ({str(error) or 'permission denied'}); {advice}") from None
    except OSError as error:
        away = isinstance(error, ConnectionError) or _is_of_a_library(error) or _is_of_a_library(error.__cause__)
        away = away or _is_refusal(error)
        blame = StorageError if away else kind
        raise blame(f"{where}: storage failed: {error.strerror or error}") from error
    except Exception as error:
        # botocore's errors (NoCredentialsError, EndpointConnectionError, ClientError) share no base with OSError
        if not _is_of_a_library(error):
            raise
        raise StorageError(f"{where}: storage failed: {error}") from error


@contextmanager
def input_errors(where: object) -> Iterator[None]:
    """The same for the input: a missing shard is an input error."""
    with storage_errors(where, InputError):
        yield


def is_damage(error: Exception) -> bool:
    """Whether what was raised while Arrow read from a store is about the bytes of the file. Arrow's own failure is a
    plain OSError without a number; a store's has a number, a type of its own, or is a refusal."""
    plain = type(error) is OSError and error.errno is None
    return not _is_of_a_library(error) and (not isinstance(error, OSError) or (plain and not _is_refusal(error)))


def denied(error: StorageError) -> bool:
    """Whether it was a refusal: there may be nothing wrong with the place but that it is somebody else's."""
    return _is_refusal(error.__context__)


def is_local(where: object) -> bool:
    """Whether a place, or the pattern of one, is on a disk of this machine."""
    return protocol_of(str(where)) in ("file", "local")


def _is_refusal(error: BaseException | None) -> bool:
    """Azure's libraries and gcsfs have no PermissionError."""
    forbidden = isinstance(error, OSError) and str(error).startswith("Forbidden:")
    return isinstance(error, PermissionError) or forbidden or getattr(error, "status_code", None) == 403


def _is_of_a_library(error: BaseException | None) -> bool:
    return error is not None and type(error).__module__.startswith(LIBRARIES)
