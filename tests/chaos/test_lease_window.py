"""A driver that is stopped between its last look at the lease and a removal, and wakes when its successor has finished:
it removes nothing of the successor's."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import candidate_rows, job

from batch_rerank.config import load_config
from batch_rerank.job.run import run
from batch_rerank.publish.verify import verify
from batch_rerank.store.filesystem import locate
from chaos.harness import FAULTS, REPOSITORY, Chaos
from chaos.servers import Moto

LEASE = ["cluster.lease_seconds=1"]


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def wait_until(condition: Callable[[], bool], process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "it ended before it came to the step"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def state(output: Path) -> dict[str, tuple[bytes, int, int]]:
    """Everything but the leases: content, inode and time of writing."""
    files = [path for path in output.rglob("*") if path.is_file() and path.parent.name != "lease"]
    return {str(path): (path.read_bytes(), path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


@pytest.fixture(scope="module")
def chaos(tmp_path_factory: pytest.TempPathFactory) -> Chaos:
    return Chaos.make(tmp_path_factory.mktemp("window"), 4, shards=2)[0]


ASIDE = r"\.[0-9a-f]{32}\.tmp$"
STEPS = {
    "before the look at _SUCCESS": ("remove", "^_SUCCESS$", 1),
    "after the look at _SUCCESS": ("rename", f"^{ASIDE}", 1),
    "before the look at a part": ("remove", "^part-", 1),
    "after the look at a part": ("rename", f"^{ASIDE}", 2),
    "before the look at a receipt": ("remove", "/parts/[^.]", 1),
    "after the look at a receipt": ("rename", f"^_manifest/parts/{ASIDE}", 1),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_stopped_holder_removes_nothing_of_its_successor(step: str, chaos: Chaos) -> None:
    operation, match, nth = STEPS[step]
    name = step.replace(" ", "-")
    torn = sorted(chaos.expected)[0]
    run(load_config(chaos.folder / "job.yaml", [f"output.path={chaos.output(name)}"]), local=True)
    (chaos.output(name) / torn).write_bytes(chaos.expected[torn][:-20])
    stop = {"operation": operation, "when": "before", "match": match, "nth": nth, "action": "SIGSTOP"}
    first = chaos.start(name, [stop], sets=LEASE)
    try:
        wait_until(lambda: is_stopped(first.process.pid), first.process)
        second = run(load_config(chaos.folder / "job.yaml", [f"output.path={chaos.output(name)}", *LEASE]), local=True)
        assert second.units == 0, "it is published again from the scores"
        done = state(chaos.output(name))
        assert str(chaos.output(name) / "_SUCCESS") in done
    finally:
        first.process.send_signal(signal.SIGCONT)
    ended = first.wait()
    assert ended.code == 4 and "another job has taken this output over" in ended.log, ended.log
    if operation == "rename":  # moved aside, looked at, moved back: another time of change, and the same file
        assert {path: (data, inode) for path, (data, inode, _) in state(chaos.output(name)).items()} == {
            path: (data, inode) for path, (data, inode, _) in done.items()
        }
    else:
        assert state(chaos.output(name)) == done
    chaos.check_done(name)


def test_a_stopped_repair_removes_nothing_of_a_successor(chaos: Chaos) -> None:
    """`verify --repair` notes what is damaged before it withdraws `_SUCCESS`, so a successor mends the same parts."""
    output, torn = chaos.output("repair"), sorted(chaos.expected)[0]
    run(load_config(chaos.folder / "job.yaml", [f"output.path={output}", *LEASE]), local=True)
    data = bytearray(chaos.expected[torn])
    data[len(data) // 3] ^= 1
    (output / torn).write_bytes(data)
    stop = {"operation": "remove", "when": "before", "match": "^_SUCCESS$", "action": "SIGSTOP"}
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(FAULTS), str(REPOSITORY)]),
        "BATCH_RERANK_FAULTS": json.dumps({"root": str(output), "faults": [stop]}),
    }
    command = [sys.executable, "-m", "batch_rerank.cli", "verify", str(output), "--repair"]
    first = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: is_stopped(first.pid), first)
        assert run(load_config(chaos.folder / "job.yaml", [f"output.path={output}", *LEASE]), local=True).units == 0
        done = state(output)
    finally:
        first.send_signal(signal.SIGCONT)
    shown = first.communicate(timeout=60)[0].decode()
    assert first.returncode == 4 and "another job has taken this output over" in shown, shown
    assert state(output) == done
    chaos.check_done("repair")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    with Moto() as server:
        for key, value in server.environment.items():
            monkeypatch.setenv(key, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        locate("s3://bucket").fs.mkdir("bucket")
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(candidate_rows(4, 10)), sink)
        locate("s3://bucket").fs.pipe_file("bucket/in.parquet", sink.getvalue().to_pybytes())
        raw = job("s3://bucket/in.parquet", "s3://bucket/out", input__unit_pairs=10, output__file_bytes=1).model_dump()
        del raw["limit"]
        raw["cluster"]["lease_seconds"] = 1
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(raw))
        yield "bucket"


@pytest.mark.parametrize("match", ["^_SUCCESS$", "^part-", "/parts/"])
def test_on_s3_a_removal_is_of_the_object_that_was_seen(match: str, bucket: str, tmp_path: Path) -> None:
    fs = locate(f"s3://{bucket}").fs
    run(load_config(tmp_path / "job.yaml"), local=True)
    torn = f"{bucket}/out/part-00001.parquet"
    fs.pipe_file(torn, fs.cat_file(torn)[:-20])
    stop = {"operation": "delete", "when": "before", "match": match, "action": "SIGSTOP"}
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(FAULTS), str(REPOSITORY)]),
        "BATCH_RERANK_FAULTS": json.dumps({"root": f"{bucket}/out", "faults": [stop]}),
    }
    command = [sys.executable, "-m", "batch_rerank.cli", "run", str(tmp_path / "job.yaml"), "--local"]
    first = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: is_stopped(first.pid), first)
        assert run(load_config(tmp_path / "job.yaml"), local=True).units == 0
        done = {path: fs.info(path)["ETag"] for path in fs.find(f"{bucket}/out") if "/lease/" not in path}
        assert f"{bucket}/out/_SUCCESS" in done
    finally:
        first.send_signal(signal.SIGCONT)
    shown = first.communicate(timeout=120)[0].decode()
    assert first.returncode == 4, shown
    assert {path: fs.info(path)["ETag"] for path in fs.find(f"{bucket}/out") if "/lease/" not in path} == done
    assert verify(f"s3://{bucket}/out").problems == []
