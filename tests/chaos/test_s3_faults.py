"""A whole job through a proxy that breaks S3 in every way, before a real server: it ends right without a restart.

The server is Ceph's gateway where that is installed, else moto; each test's name says which. The slow faults are for
`make chaos` alone.
"""

import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import candidate_rows, job

from batch_rerank.job.run import run
from batch_rerank.publish.verify import verify
from batch_rerank.store.filesystem import locate
from chaos.faultproxy import FaultProxy, Rule
from chaos.servers import Ceph, Server, any_server, ceph_installed

UNITS = 24
NUMBERS = itertools.count()  # of buckets: a name that is the same in every run, as the proxy draws by path
OBJECTS = r"/bucket/(in|out)"


@pytest.fixture(scope="module", params=[any_server], ids=lambda make: make().name)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with request.param() as server:
        yield server


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pa.Table]:
    """The rows that the job writes from a local disk to a local disk."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for number, table in enumerate(shards()):
        (folder / "in").mkdir(exist_ok=True)
        pq.write_table(table, folder / "in" / f"{number}.parquet", row_group_size=60)
    run(job(folder / "in", folder / "out", input__unit_pairs=20, output__file_bytes=1), local=True)
    return {part.name: pq.read_table(part) for part in (folder / "out").glob("part-*")}


def shards() -> list[pa.Table]:
    return [pa.Table.from_pylist(candidate_rows(UNITS // 2, 20, first=UNITS // 2 * number)) for number in range(2)]


class Bucket:
    """A bucket with the job's input, reached directly and through the proxy."""

    def __init__(self, server: Server, proxy: FaultProxy, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.proxy, self.folder = proxy, folder
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        self.name = f"bucket-{next(NUMBERS)}"
        self.fs = locate(f"s3://{self.name}").fs
        self.fs.mkdir(self.name)
        for number, table in enumerate(shards()):
            sink = pa.BufferOutputStream()
            pq.write_table(table, sink, row_group_size=60)
            self.fs.pipe_file(f"{self.name}/in/{number}.parquet", sink.getvalue().to_pybytes())
        raw = job(
            f"s3://{self.name}/in/*.parquet", f"s3://{self.name}/out", input__unit_pairs=20, output__file_bytes=1
        ).model_dump()
        del raw["limit"]
        (folder / "job.yaml").write_text(yaml.safe_dump(raw))
        self.environment = {**os.environ, **server.environment, "AWS_ENDPOINT_URL": proxy.url}

    def start(self, *options: str, **environment: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "batch_rerank.cli", "run", str(self.folder / "job.yaml"), *options]
        given = {**self.environment, **environment}
        return subprocess.Popen(command, env=given, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, *options: str, **environment: str) -> tuple[int, str, float]:
        """Exit code, log and seconds of a job whose store is behind the proxy."""
        started = time.monotonic()
        process = self.start(*options, **environment)
        _, log = process.communicate(timeout=400)
        return process.returncode, log, time.monotonic() - started

    def parts(self) -> dict[str, pa.Table]:
        paths = self.fs.glob(f"{self.name}/out/part-*")
        return {path.rsplit("/", 1)[-1]: pq.read_table(pa.BufferReader(self.fs.cat_file(path))) for path in paths}

    def check(self, undisturbed: dict[str, pa.Table]) -> None:
        assert self.parts() == undisturbed
        assert verify(f"s3://{self.name}/out").problems == []
        found = {path.removeprefix(f"{self.name}/out/") for path in self.fs.find(f"{self.name}/out")}
        shown = {path for path in found if not path.startswith(("_manifest/", "_scores/"))}
        assert shown == {*undisturbed, "_SUCCESS"}


@pytest.fixture
def bucket(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    with FaultProxy(server.url) as proxy:
        yield Bucket(server, proxy, tmp_path, monkeypatch)


FAULTS = {
    "resets": [Rule("reset", probability=0.2)],
    "lost replies": [Rule("lost", "PUT", probability=0.3), Rule("lost", "DELETE", probability=0.3)],
    "truncated": [  # few requests read shards: the first two are cut for certain
        Rule("truncate", "GET", r"in/\d\.parquet", times=2),
        Rule("truncate", "GET", r"in/\d\.parquet", probability=0.3),
    ],
    "busy": [Rule("503", probability=0.3)],
    "failing": [Rule("500", probability=0.3)],
    "slow": [Rule("slow", probability=0.2, delay=1)],
    "everything": [Rule(action, probability=0.04) for action in ("503", "500", "reset", "lost", "truncate")],
}
SLOW = ("resets", "busy", "failing", "slow", "everything")


@pytest.mark.parametrize(
    "faults", [pytest.param(name, marks=[pytest.mark.chaos] if name in SLOW else []) for name in FAULTS]
)
def test_a_job_ends_right_through(faults: str, bucket: Bucket, undisturbed: dict[str, pa.Table]) -> None:
    bucket.proxy.set(*FAULTS[faults], seed=1)
    code, log, _ = bucket.run("--local")
    hits = bucket.proxy.hits()
    bucket.proxy.set()
    assert code == 0, log
    assert sum(hits.values()) >= 2, "there were faults"
    bucket.check(undisturbed)


def test_a_lost_reply_to_a_conditional_write_is_no_conflict(bucket: Bucket) -> None:
    """Each first write of an object happens, and its answer is lost."""
    location = locate(f"s3://{bucket.name}/object", {"endpoint_url": bucket.proxy.url}, reached=True)
    bucket.proxy.set(Rule("lost", "PUT", times=1))
    assert location.create_exclusive(b"mine") is True
    assert bucket.proxy.hits()["lost"] == 1
    assert location.create_exclusive(b"another's") is False
    assert location.read_bytes() == b"mine"


@pytest.mark.chaos
@pytest.mark.parametrize(("action", "tries"), [("500", 12), ("503", 40), ("reset", 60)])
def test_a_listing_that_fails_is_waited_for_and_never_empty(action: str, tries: int, bucket: Bucket) -> None:
    location = locate(f"s3://{bucket.name}/in", {"endpoint_url": bucket.proxy.url}, reached=True)
    bucket.proxy.set(Rule(action, "GET", times=tries))
    assert len(location.find()) == 2
    assert location.patience.retries > 0, "more than s3fs itself repeats"


@pytest.mark.chaos
def test_an_outage_in_the_middle_is_waited_for(bucket: Bucket, undisturbed: dict[str, pa.Table]) -> None:
    bucket.proxy.set(Rule("outage", "PUT", "00000-00005", times=1, delay=30))
    code, log, seconds = bucket.run("--local")
    assert code == 0, log
    assert seconds > 30 and "trying again in" in log and "repeated storage requests" in log
    bucket.check(undisturbed)


@pytest.mark.chaos
def test_an_outage_of_a_minute_on_ray(bucket: Bucket, undisturbed: dict[str, pa.Table]) -> None:
    bucket.proxy.set(Rule("outage", "PUT", "00000-00005", times=1, delay=60))
    code, log, seconds = bucket.run()
    assert code == 0, log
    assert seconds > 60
    bucket.check(undisturbed)


@pytest.mark.chaos
@pytest.mark.skipif(not ceph_installed(), reason="needs a server that keeps its objects: Ceph is not installed")
def test_a_gateway_killed_and_started_again_is_waited_for(
    server: Server, bucket: Bucket, undisturbed: dict[str, pa.Table]
) -> None:
    assert isinstance(server, Ceph)
    bucket.proxy.set(Rule("slow", "PUT", delay=0.3))
    process = bucket.start("--local")
    while not bucket.fs.glob(f"{bucket.name}/out/_manifest/receipts/*"):
        assert process.poll() is None
        time.sleep(0.2)
    server.kill()
    thread = threading.Timer(10, server.restart)
    thread.start()
    _, log = process.communicate(timeout=300)
    thread.join()
    assert process.returncode == 0, log
    bucket.check(undisturbed)


def test_a_refusal_ends_the_job_in_seconds_with_the_reason(bucket: Bucket) -> None:
    bucket.proxy.set(Rule("403", "PUT", "part-"))
    code, log, seconds = bucket.run("--local")
    assert code == 6 and "not permitted" in log and "part-00000.parquet" in log
    assert seconds < 30


def test_a_server_that_is_not_there_ends_the_job_in_seconds(bucket: Bucket) -> None:
    code, log, seconds = bucket.run("--local", AWS_ENDPOINT_URL="http://127.0.0.1:9")
    assert code == 6 and "127.0.0.1:9" in log
    assert seconds < 40
