"""What is waited for, how long, and what is not."""

import errno
from collections.abc import Iterator

import aiohttp
import pytest
from botocore.exceptions import (
    ClientError,
    ConnectionClosedError,
    EndpointConnectionError,
    HTTPClientError,
    ReadTimeoutError,
)
from s3fs.errors import translate_boto_error

from batch_rerank.store import patience
from batch_rerank.store.patience import LONGEST_PAUSE, Patience, may_pass


def answered(status: int, code: str) -> Exception:
    """An error answer of S3 as s3fs raises it."""
    response = {"Error": {"Code": code, "Message": "said"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return translate_boto_error(ClientError(response, "PutObject"))  # type: ignore[arg-type]


BROKEN = [
    answered(503, "SlowDown"),
    answered(500, "InternalError"),
    answered(502, "502"),
    answered(429, "TooManyRequests"),
    answered(409, "ConditionalRequestConflict"),
    ConnectionClosedError(endpoint_url="http://x"),
    ReadTimeoutError(endpoint_url="http://x"),
    aiohttp.ClientPayloadError(),
    HTTPClientError(error=ConnectionResetError()),
    ConnectionResetError(),
    TimeoutError(),
    EOFError("bytes 0 to 10: 5 arrived"),
    OSError(errno.EBUSY, "slow down"),
]
FINAL = [
    answered(403, "AccessDenied"),
    answered(403, "InvalidAccessKeyId"),
    answered(404, "NoSuchBucket"),
    answered(400, "InvalidRequest"),
    answered(501, "NotImplemented"),
    answered(412, "PreconditionFailed"),
    FileNotFoundError("no"),
    PermissionError("no"),
    OSError(errno.ENOSPC, "full"),
    HTTPClientError(error=ValueError("a bug")),
    ValueError("a bug"),
]
AWAY = [EndpointConnectionError(endpoint_url="http://x"), ConnectionRefusedError()]


@pytest.mark.parametrize("error", BROKEN, ids=repr)
def test_what_may_pass_is_waited_for(error: Exception) -> None:
    assert may_pass(error, reached=False)
    assert may_pass(error, reached=True)


@pytest.mark.parametrize("error", FINAL, ids=repr)
def test_what_will_not_pass_is_not(error: Exception) -> None:
    assert not may_pass(error, reached=True)


@pytest.mark.parametrize("error", AWAY, ids=repr)
def test_a_store_that_never_answered_is_a_wrong_endpoint(error: Exception) -> None:
    assert not may_pass(error, reached=False)
    assert may_pass(error, reached=True)


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now, self.pauses = 0.0, list[float]()

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(patience.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(patience.time, "sleep", clock.sleep)
    yield clock


def test_an_operation_is_tried_until_it_works_and_its_retries_are_counted(clock: Clock, logged: list[str]) -> None:
    left = [ConnectionResetError("gone"), TimeoutError(), answered(503, "SlowDown")]

    def operation() -> str:
        if left:
            raise left.pop()
        return "done"

    kept = Patience()
    assert kept.keep("s3://bucket/part", operation) == "done"
    assert (kept.retries, kept.reached, len(clock.pauses)) == (3, True, 3)
    assert len([message for message in logged if message.startswith("s3://bucket/part: ")]) == 3


def test_the_pauses_grow_are_random_and_end(clock: Clock) -> None:
    def operation() -> None:
        raise ConnectionResetError("gone for good")

    kept = Patience(reached=True, seconds=300)
    with pytest.raises(ConnectionResetError):
        kept.keep("here", operation)
    assert 250 < clock.now <= 300, "an outage of minutes is survived, and not for ever"
    assert max(clock.pauses) <= LONGEST_PAUSE
    assert max(clock.pauses[:3]) <= 2 and len(set(clock.pauses)) == len(clock.pauses)


def test_no_secret_of_a_url_is_logged(clock: Clock, logged: list[str]) -> None:
    left: list[Exception] = [EndpointConnectionError(endpoint_url="http://user:canary@127.0.0.1:9/")]

    def operation() -> None:
        if left:
            raise left.pop()

    Patience(reached=True).keep("here", operation)
    assert "http://***@127.0.0.1:9/" in logged[0] and "canary" not in "".join(logged)
