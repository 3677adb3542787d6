"""What is waited for, how long, and what is not."""

import errno
from collections.abc import Iterator
from http.client import IncompleteRead, RemoteDisconnected

import aiohttp
import fsspec
import pytest
from botocore.exceptions import (
    ClientError,
    ConnectionClosedError,
    EndpointConnectionError,
    HTTPClientError,
    ReadTimeoutError,
)
from s3fs.errors import translate_boto_error

from batch_rerank.errors import StorageError
from batch_rerank.input.shards import check_unchanged, open_parquet
from batch_rerank.store import patience
from batch_rerank.store.filesystem import Location, input_errors
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
    IncompleteRead(b""),
    RemoteDisconnected("no answer"),
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
    with pytest.raises(StorageError, match=r"here: storage failed: gone for good; tried .* times in 300 s"):
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


class Store(fsspec.AbstractFileSystem):
    """A store with one file of 100 bytes that answers `left` requests, and is away from then on."""

    protocol = "away"
    cachable = False

    def __init__(self, left: int, error: Exception) -> None:
        super().__init__()
        self.left, self.error, self.asked = left, error, 0

    def answer(self) -> None:
        self.asked += 1
        if self.asked > self.left:
            raise self.error

    def info(self, path: str, **_: object) -> dict[str, object]:
        self.answer()
        return {"name": path, "size": 100, "type": "file", "ETag": "e"}

    def cat_file(self, path: str, start: int = 0, end: int = 100, **_: object) -> bytes:
        self.answer()
        return b"x" * (end - start)


OUTAGES = [AWAY[0], ConnectionResetError("cut"), IncompleteRead(b""), EOFError("bytes 0 to 10: 5 arrived")]


@pytest.mark.parametrize("error", OUTAGES, ids=repr)
@pytest.mark.parametrize("left", [1, 2])  # at the footer's size, and at its bytes
def test_an_outage_while_a_shard_is_read_is_waited_for_and_then_the_stores(
    left: int, error: Exception, clock: Clock
) -> None:
    location = Location(Store(left, error), "shard.parquet")
    location.stat()
    with pytest.raises(StorageError, match="storage failed"), open_parquet(location):
        pass
    assert clock.now > 250
    with pytest.raises(StorageError, match="storage failed"):
        check_unchanged(location, location.at("x"))  # type: ignore[arg-type]


def test_a_store_that_answered_anybody_here_is_away_and_no_wrong_endpoint(clock: Clock) -> None:
    store = Store(1, AWAY[0])
    Location(store, "first").stat()
    with pytest.raises(StorageError), input_errors("second"):
        Location(store, "second").stat()
    assert clock.now > 250
    clock.now = 0
    with pytest.raises(StorageError, match="storage failed"), input_errors("other"):
        Location(Store(0, AWAY[0]), "other").stat()
    assert clock.now == 0, "nothing waits for a store that never answered"
