"""Waiting for a store that throttles, drops connections or is away: bounded exponential backoff with jitter.

s3fs and botocore try a request some five times each. That covers a hiccup; a burst of errors or an outage of a minute
takes longer, and a job of many hours outlives it.
"""

import errno
import http.client
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import TypeVar

from batch_rerank.errors import StorageError
from batch_rerank.outside import without_secrets

log = logging.getLogger("batch_rerank")
T = TypeVar("T")

PATIENCE_SECONDS = 300.0
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 20.0


@dataclass
class Patience:
    """How long one operation is tried, and how often anything was tried again.

    reached: whether the store has answered before, to this process or to the job's driver. A store that has never
    answered is a wrong endpoint, not an outage, so nothing waits for it.
    """

    reached: bool = False
    seconds: float = PATIENCE_SECONDS
    retries: int = 0

    def keep(self, where: object, operation: Callable[[], T]) -> T:
        """The operation's result; it is tried again while it fails for a reason that may pass. It must be safe to
        repeat: its last try may have happened although its answer was lost.

        Raises what the operation raises where waiting does not help, and StorageError where it has not helped: an
        outage is the store's, whoever was reading what.
        """
        deadline = None
        for attempt in count():
            try:
                result = operation()
            except Exception as error:
                now = time.monotonic()
                deadline = now + self.seconds if deadline is None else deadline
                pause = random.uniform(0, min(LONGEST_PAUSE, FIRST_PAUSE * 2**attempt))
                if not may_pass(error, self.reached):
                    raise
                reason = without_secrets(str(error)).splitlines()[0][:200] if str(error) else type(error).__name__
                if now + pause > deadline:
                    raise StorageError(
                        f"{where}: storage failed: {reason}; tried {attempt + 1} times in {self.seconds:g} s; run the "
                        "job again when the store is back"
                    ) from error
                self.retries += 1
                log.warning("%s: %s; trying again in %.1f s", where, reason, pause)
                time.sleep(pause)
            else:
                self.reached = True
                return result
        raise AssertionError  # count() does not end


def may_pass(error: BaseException, reached: bool) -> bool:
    """Whether waiting may help: the store said that it is busy or failed inside, or the connection broke. `reached`
    says whether a store that cannot be connected to at all was there before."""
    import aiohttp  # these three come with s3fs; at the top they would cost every local job a second
    from botocore.exceptions import ClientError, ConnectionError, HTTPClientError
    from botocore.parsers import ResponseParserError
    from fsspec.exceptions import FSTimeoutError

    cause = error if isinstance(error, ClientError) else error.__cause__
    if isinstance(cause, ClientError):
        status = cause.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status in (408, 409, 429) or (status >= 500 and status != 501) or "SlowDown" in str(cause)
    if isinstance(error, ConnectionError | ConnectionRefusedError | aiohttp.ClientConnectorError):
        return reached
    if type(error) is HTTPClientError:  # whatever botocore has no name for: also plain mistakes
        error = error.kwargs["error"]  # type: ignore[attr-defined]
    if (other := _of_another_store(error, reached)) is not None:
        return other
    broken = HTTPClientError | ResponseParserError | FSTimeoutError | aiohttp.ClientError | http.client.HTTPException
    if isinstance(error, broken | TimeoutError):
        return True
    busy = (errno.EBUSY, errno.EREMOTEIO)  # s3fs's names of 503 and 500 where it drops the cause
    return isinstance(error, BrokenPipeError | ConnectionResetError | EOFError) or (
        isinstance(error, OSError) and error.errno in busy
    )


def _of_another_store(error: BaseException, reached: bool) -> bool | None:
    """The same for what the libraries of gs://, abfs:// and hf:// raise; None for what is not theirs. By name: they are
    there only where they are used."""
    for one in (error, error.__cause__):
        library = type(one).__module__.partition(".")[0]
        if one is None or library not in ("azure", "gcsfs", "google", "huggingface_hub", "httpx", "requests"):
            continue
        holders = (one, getattr(one, "response", None))
        found = (getattr(holder, name, None) for holder in holders for name in ("status_code", "code"))
        status = next((value for value in found if isinstance(value, int)), None)
        if status is not None:
            return status in (408, 429) or (status >= 500 and status != 501)
        names = {kind.__name__ for kind in type(one).__mro__}
        if names & {"ServiceRequestError", "ConnectError", "ConnectionError"}:  # nobody is there
            return reached
        # an answer that has broken off
        return bool(names & {"ServiceResponseError", "TransportError", "ProxyError", "ChunkedEncodingError"})
    return None
