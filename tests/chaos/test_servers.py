"""What tests under faults rely on: each fault of the proxy reaches a client as just that fault."""

import http.client
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import boto3
import fsspec
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError, ConnectionClosedError, EndpointConnectionError, ReadTimeoutError

from chaos.faultproxy import FaultProxy, Rule
from chaos.servers import Ceph, Moto, Server, ceph_installed

BUCKET = "bucket"
BODY = bytes(range(256)) * 4096


def client(server: Server, timeout: float = 60) -> Any:
    """A client that tries once, so that it reports the fault itself."""
    keys = server.environment
    config = Config(retries={"total_max_attempts": 1}, read_timeout=timeout, s3={"addressing_style": "path"})
    return boto3.client(
        "s3",
        endpoint_url=server.url,
        aws_access_key_id=keys["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
        region_name=keys["AWS_DEFAULT_REGION"],
        config=config,
    )


@pytest.fixture(scope="module")
def moto() -> Iterator[Moto]:
    with Moto() as server:
        yield server


@pytest.fixture(scope="module")
def running_proxy(moto: Moto) -> Iterator[FaultProxy]:
    with FaultProxy(moto.url) as proxy:
        yield proxy


@pytest.fixture
def proxy(moto: Moto, running_proxy: FaultProxy) -> FaultProxy:
    """No rules, and an empty bucket."""
    running_proxy.set()
    urllib.request.urlopen(urllib.request.Request(f"{moto.url}/moto-api/reset", method="POST")).close()
    client(moto).create_bucket(Bucket=BUCKET)
    return running_proxy


def put(server: Server, key: str, body: bytes = BODY, timeout: float = 60, **headers: str) -> str:
    """The error's code, or an empty string."""
    try:
        client(server, timeout).put_object(Bucket=BUCKET, Key=key, Body=body, **headers)
    except ClientError as error:
        return str(error.response["Error"]["Code"])
    return ""


def get(server: Server, key: str) -> bytes:
    return bytes(client(server).get_object(Bucket=BUCKET, Key=key)["Body"].read())


def keys_in(server: Server) -> list[str]:
    return [found["Key"] for found in client(server).list_objects_v2(Bucket=BUCKET).get("Contents", [])]


def test_without_rules_everything_passes(proxy: FaultProxy) -> None:
    assert put(proxy, "a b/ü?.parquet") == ""
    assert get(proxy, "a b/ü?.parquet") == BODY
    assert client(proxy).head_object(Bucket=BUCKET, Key="a b/ü?.parquet")["ContentLength"] == len(BODY)
    part = client(proxy).get_object(Bucket=BUCKET, Key="a b/ü?.parquet", Range="bytes=256-511")
    assert (part["Body"].read(), part["ContentRange"]) == (BODY[:256], f"bytes 256-511/{len(BODY)}")
    with pytest.raises(ClientError, match="404"):
        client(proxy).head_object(Bucket=BUCKET, Key="none")
    client(proxy).delete_object(Bucket=BUCKET, Key="a b/ü?.parquet")
    assert keys_in(proxy) == []
    assert proxy.hits() == {}


@pytest.mark.parametrize(("action", "code"), [("503", "SlowDown"), ("500", "InternalError"), ("403", "AccessDenied")])
def test_an_error_is_answered_as_often_as_asked_and_nothing_is_written(
    proxy: FaultProxy, moto: Moto, action: str, code: str
) -> None:
    proxy.set(Rule(action, method="PUT", match="/key$", times=2))
    assert put(proxy, "other") == ""
    assert [put(proxy, "key"), put(proxy, "key")] == [code, code]
    assert keys_in(moto) == ["other"]
    assert put(proxy, "key") == ""
    assert proxy.hits() == {action: 2}


def test_reset_writes_nothing_and_lost_has_written(proxy: FaultProxy, moto: Moto) -> None:
    proxy.set(Rule("reset", match="/before"), Rule("lost", match="/after"))
    for key in ("before", "after"):
        with pytest.raises(ConnectionClosedError):
            put(proxy, key)
    assert keys_in(moto) == ["after"]
    assert get(moto, "after") == BODY
    assert proxy.hits() == {"reset": 1, "lost": 1}


def test_a_reset_is_a_reset_on_the_wire(proxy: FaultProxy) -> None:
    proxy.set(Rule("reset"))
    with socket.create_connection(("127.0.0.1", proxy.port)) as wire:
        wire.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        with pytest.raises(ConnectionResetError):
            wire.recv(1)


def test_slow_is_forwarded_although_the_client_has_gone(proxy: FaultProxy, moto: Moto) -> None:
    proxy.set(Rule("slow", match="/soon", delay=0.3), Rule("slow", match="/late", delay=2))
    begin = time.monotonic()
    assert put(proxy, "soon") == ""
    assert time.monotonic() - begin > 0.3
    with pytest.raises(ReadTimeoutError):
        put(proxy, "late", timeout=1)
    assert keys_in(moto) == ["soon"]
    time.sleep(1.5)
    assert keys_in(moto) == ["late", "soon"]


def test_truncate_ends_half_way_with_the_whole_length_announced(proxy: FaultProxy) -> None:
    put(proxy, "key")
    proxy.set(Rule("truncate", match="/key"))
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port)
    signed = client(proxy).generate_presigned_url("get_object", {"Bucket": BUCKET, "Key": "key"})
    connection.request("GET", signed.removeprefix(proxy.url))
    with closing(connection), connection.getresponse() as answer:
        assert answer.headers["Content-Length"] == str(len(BODY))
        received = answer.read(len(BODY) // 2)
        with pytest.raises(ConnectionResetError):
            answer.read()
    assert received == BODY[: len(BODY) // 2]
    assert client(proxy).head_object(Bucket=BUCKET, Key="key")["ContentLength"] == len(BODY)
    assert proxy.hits() == {"truncate": 1}


def test_stall_never_answers(proxy: FaultProxy, moto: Moto) -> None:
    proxy.set(Rule("stall", times=1))
    with pytest.raises(ReadTimeoutError):
        put(proxy, "key", timeout=1)
    assert keys_in(moto) == []


def test_an_outage_resets_what_is_open_and_refuses_what_is_new(proxy: FaultProxy) -> None:
    put(proxy, "key")
    proxy.set(Rule("outage", match="/key", times=1, delay=1), Rule("stall", match="/other"))
    with ThreadPoolExecutor() as threads:
        open_by_then = threads.submit(put, proxy, "other")
        while "stall" not in proxy.hits():
            time.sleep(0.02)
        with pytest.raises(ConnectionClosedError):
            put(proxy, "key")
        with pytest.raises(EndpointConnectionError):
            get(proxy, "key")
        with pytest.raises(ConnectionClosedError):
            open_by_then.result()
    assert proxy.hits() == {"stall": 1, "outage": 1}
    time.sleep(1.2)
    assert get(proxy, "key") == BODY


def test_an_upstream_that_is_down_is_a_reset(proxy: FaultProxy, moto: Moto) -> None:
    assert put(proxy, "key") == ""
    moto.kill()
    with pytest.raises(ConnectionClosedError):
        put(proxy, "key")
    moto.restart()
    client(proxy).create_bucket(Bucket=BUCKET)
    assert keys_in(proxy) == []


def test_probable_faults_are_the_same_for_a_seed(proxy: FaultProxy) -> None:
    def failed(seed: int, order: list[int]) -> set[int]:
        proxy.set(Rule("503", method="GET", probability=0.3), seed=seed)
        missed = set()
        for key in order:
            try:
                urllib.request.urlopen(f"{proxy.url}/{BUCKET}?prefix={key}").close()
            except urllib.error.HTTPError as error:
                error.close()
                missed.add(key)
        assert proxy.hits().get("503", 0) == len(missed)
        return missed

    first = failed(1, list(range(40)))
    assert 3 < len(first) < 25
    assert failed(1, list(range(39, -1, -1))) == first
    assert failed(2, list(range(40))) != first


def test_an_unknown_action_is_refused() -> None:
    with pytest.raises(ValueError, match="no such action: 504"):
        Rule("504")


def test_a_conditional_put_has_one_winner(proxy: FaultProxy) -> None:
    assert put(proxy, "key", b"first", IfNoneMatch="*") == ""
    assert put(proxy, "key", b"second", IfNoneMatch="*") == "PreconditionFailed"
    assert get(proxy, "key") == b"first"


def test_s3fs_goes_on_after_faults_it_repeats(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in proxy.environment.items():
        monkeypatch.setenv(key, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    proxy.set(Rule("503", method="PUT", times=1), Rule("reset", method="GET", match="/key", times=1))
    fs = fsspec.filesystem("s3")
    fs.pipe_file(f"{BUCKET}/key", BODY)
    assert fs.cat_file(f"{BUCKET}/key") == BODY
    assert proxy.hits() == {"503": 1, "reset": 1}


@pytest.mark.skipif(not ceph_installed(), reason="radosgw, ceph-mon and ceph-osd are not installed")
def test_ceph_has_one_winner_and_keeps_what_it_acknowledged() -> None:
    with Ceph() as server, FaultProxy(server.url) as proxy:
        client(server).create_bucket(Bucket=BUCKET)

        def race(number: int) -> str:
            return put(proxy, "race", str(number).encode(), IfNoneMatch="*")

        with ThreadPoolExecutor(16) as threads:
            answers = list(threads.map(race, range(16)))
        winner = answers.index("")
        assert answers.count("") == 1
        assert set(answers) == {"", "PreconditionFailed"}
        assert get(proxy, "race") == str(winner).encode()
        for number in range(20):
            assert put(proxy, f"acknowledged/{number:02}") == ""
        server.kill()
        with pytest.raises(EndpointConnectionError):
            put(server, "while-down")
        with pytest.raises(ConnectionClosedError):
            put(proxy, "while-down")
        server.restart()
        assert keys_in(server) == [*(f"acknowledged/{number:02}" for number in range(20)), "race"]
        assert all(get(server, key) == BODY for key in keys_in(server)[:-1])
