"""Stores that are neither S3 nor a disk, by the libraries and fakes that they have: Azure's own emulator (Azurite, from
npm: `npm install --prefix .azurite azurite`), and one of Google's that knows no conditions."""

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import candidate_rows, job, nested, rows_of, write

from batch_rerank.errors import ConfigError, InputError, StorageError
from batch_rerank.job.run import run
from batch_rerank.publish.verify import verify
from batch_rerank.store.failures import storage_errors
from batch_rerank.store.filesystem import Location, list_files, locate
from batch_rerank.store.latest import read_latest
from batch_rerank.store.patience import may_pass

ROOT = Path(__file__).parent.parent
AZURITE = shutil.which("azurite-blob") or str(ROOT / ".azurite/node_modules/.bin/azurite-blob")
# Azurite's own well-known account
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def wait_for(port: int, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 180
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)


@pytest.fixture(scope="module")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The connection string of an emulator of Azure's blobs."""
    if not Path(AZURITE).exists():
        pytest.skip("needs Azurite: npm install --prefix .azurite azurite")
    port = free_port()
    command = [AZURITE, "--silent", "--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry"]
    command += ["--blobHost", "127.0.0.1", "--blobPort", str(port)]
    with (tmp_path_factory.mktemp("azurite") / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(port, process)
        yield (
            f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={KEY};"
            f"BlobEndpoint=http://127.0.0.1:{port}/{ACCOUNT};"
        )
    finally:
        process.kill()
        process.wait(10)


@pytest.fixture(scope="module")
def google() -> Iterator[str]:
    from gcp_storage_emulator.server import create_server

    port = free_port()
    server = create_server("127.0.0.1", port, in_memory=True)
    server.start()
    yield f"http://127.0.0.1:{port}"
    server.stop()


@pytest.fixture(params=["abfs", "gs"])
def bucket(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty bucket."""
    if request.param == "abfs":
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", request.getfixturevalue("azurite"))
    else:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", request.getfixturevalue("google"))
        monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    fsspec.get_filesystem_class(request.param).clear_instance_cache()
    name = f"bucket-{time.monotonic_ns()}"
    fsspec.filesystem(request.param).mkdir(name)
    yield f"{request.param}://{name}"
    fsspec.get_filesystem_class(request.param).clear_instance_cache()


def test_files_are_what_the_rest_takes_them_for(bucket: str) -> None:
    file, folder = locate(f"{bucket}/a/x.bin"), locate(f"{bucket}/a")
    assert str(file) == f"{bucket}/a/x.bin" and not file.is_local
    assert not file.exists() and folder.find() == {}
    with pytest.raises(FileNotFoundError):
        file.read_bytes()
    file.remove()
    assert file.create_exclusive(b"one") and file.create_exclusive(b"one"), "the same content: a lost reply"
    first = file.stat()
    assert first.size == 3 and folder.find() == {first.path: first}
    another = Location(file.fs.__class__(skip_instance_cache=True), file.path)
    another.write_bytes(b"three")
    assert file.stat() != first and folder.find() == {first.path: file.stat()}, "no listing is older than it is asked"
    assert file.remove_seen(first) is False and file.read_range(1, 4) == b"hre"
    with file.writer() as writing:
        writing.write(b"w" * 100)
    with file.open() as reading:
        reading.seek(98)
        assert reading.read() == b"ww"
    assert file.remove_seen(file.stat()) is True and not file.exists()
    assert [one.path for one in list_files(locate(f"{bucket}/a/*.bin"))] == []


def test_what_exists_is_not_created_again(bucket: str) -> None:
    """Google's emulator passes over conditions, so what is looked at there is that they are sent."""
    large = b"x" * (1 << 20)
    file = locate(f"{bucket}/lease/0")
    if bucket.startswith("gs://"):
        asked: list[Any] = []
        call = file.fs._call

        async def recorded(method: str, path: str, *args: Any, **kwargs: Any) -> Any:
            asked.append((method, kwargs))
            return await call(method, path, *args, **kwargs)

        file.fs._call = recorded
        assert file.create_exclusive(b"mine")
        assert asked[0][0] == "POST" and asked[0][1]["ifGenerationMatch"] == "0"
        return
    assert file.create_exclusive(b"mine") and not file.create_exclusive(b"yours") and file.keeps_first(b"mine")
    assert not file.create_exclusive(large) and file.read_bytes() == b"mine"


@pytest.mark.parametrize("layout", ["nested", "flat"])
def test_a_job_gives_the_rows_that_it_gives_on_a_disk(bucket: str, layout: str, tmp_path: Path) -> None:
    for shard in range(3):
        rows = candidate_rows(4, 25, first=4 * shard)
        write(tmp_path / "in" / f"{shard}.parquet", nested(rows) if layout == "nested" else rows)
    place = locate(f"{bucket}/in")
    for path in (tmp_path / "in").iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    keys: dict[str, Any] = {"input__layout": layout, "output__top_k": 5}
    run(job(tmp_path / "in", tmp_path / "out", **keys), local=True)
    there = job(f"{bucket}/in/*.parquet", f"{bucket}/out", output__latest=f"{bucket}/LATEST", **keys)
    assert run(there, local=True).pairs == 300
    found = [pq.read_table(pa.BufferReader(one)) for one in parts(f"{bucket}/out")]
    assert pa.concat_tables(found) == rows_of(tmp_path / "out")
    assert read_latest(locate(f"{bucket}/LATEST")) == f"{bucket}/out"
    assert run(there, local=True).units == 0 and verify(f"{bucket}/out").problems == []


def parts(output: str) -> list[bytes]:
    return [locate(f"{output}/*").at(file.path).read_bytes() for file in list_files(locate(f"{output}/part-*.parquet"))]


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_actors_have_the_credentials(azurite: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", azurite)
    fsspec.get_filesystem_class("abfs").clear_instance_cache()
    bucket = f"abfs://bucket-{time.monotonic_ns()}"
    fsspec.filesystem("abfs").mkdir(bucket.removeprefix("abfs://"))
    path = write(tmp_path / "0.parquet", nested(candidate_rows(8, 10)))
    locate(f"{bucket}/in/0.parquet").write_bytes(path.read_bytes())
    assert run(job(f"{bucket}/in/*.parquet", f"{bucket}/out", input__layout="nested")).pairs == 80
    assert verify(f"{bucket}/out").problems == []


def test_what_is_not_there_is_said_without_the_key(azurite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", azurite)
    fsspec.get_filesystem_class("abfs").clear_instance_cache()
    with pytest.raises((InputError, StorageError), match="no-such-bucket") as error:
        run(job("abfs://no-such-bucket/in/*.parquet", "abfs://no-such-bucket/out"), local=True)
    assert KEY[:20] not in str(error.value)


def _errors() -> Iterator[tuple[Exception, bool | None]]:
    """What libraries raise, and whether it may pass: None is where the store has answered before."""
    from azure.core import exceptions as azure
    from gcsfs.retry import HttpError

    def answer(status: int) -> azure.HttpResponseError:
        error = azure.HttpResponseError("it says so")
        error.status_code = status
        return error

    yield answer(503), True
    yield answer(500), True
    yield answer(429), True
    yield answer(403), False
    yield answer(409), False
    yield azure.ServiceRequestError("nobody there"), None
    yield azure.ServiceResponseError("broken off"), True
    yield HttpError({"code": 503, "message": "busy"}), True
    yield HttpError({"code": 400, "message": "no"}), False
    yield aiohttp.ServerDisconnectedError(), True


@pytest.mark.parametrize("reached", [True, False])
def test_what_may_pass_is_waited_for(reached: bool) -> None:
    for error, passes in _errors():
        assert may_pass(error, reached) is (reached if passes is None else passes), error
        with pytest.raises(StorageError, match="here: storage failed"), storage_errors("s3://here"):
            raise error


def test_a_store_whose_package_is_missing_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(protocol: str) -> type:
        raise ImportError("Install adlfs to access Azure Datalake Gen2 and Azure Blob Storage")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(StorageError, match=r"abfs://b/x: cannot open this kind of location: Install adlfs"):
        locate("abfs://b/x")


Cli = Callable[..., tuple[int, str, str]]


@pytest.mark.skipif("HF_HUB_OFFLINE" in os.environ, reason="the hub is switched off")
def test_a_hub_that_is_away_is_storage(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    raw = job("hf://datasets/someone/queries/*.parquet", tmp_path / "out").model_dump(exclude={"limit"})
    (file := tmp_path / "job.yaml").write_text(json.dumps(raw))
    code, _, said = cli("run", file, "--local")
    assert code == 6, said


def test_nothing_is_written_to_a_hub(tmp_path: Path) -> None:
    for key in ("output__path", "output__latest", "input__stage"):
        with pytest.raises(ConfigError, match=r"hf:// is for inputs"):
            job(tmp_path, **{"output": tmp_path, key: "hf://datasets/me/x"})
