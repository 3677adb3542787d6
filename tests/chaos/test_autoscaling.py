"""A job on a cluster that has no GPU yet: Ray's own autoscaler and its provider of nodes that are processes."""

import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import candidate_rows, job, write

from chaos.harness import REPOSITORY, end_session, surroundings

pytestmark = pytest.mark.chaos
PORT = 6379
"""The provider starts its nodes with this port of the head, whatever it is told."""

CLUSTER: dict[str, Any] = {
    "cluster_name": "fake",
    "max_workers": 2,
    "idle_timeout_minutes": 5,
    "upscaling_speed": 1.0,
    "provider": {
        "type": "fake_multinode",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    },
    "head_node_type": "ray.head.default",
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 2}, "node_config": {}, "max_workers": 0},
        "gpu": {
            "resources": {"CPU": 2, "GPU": 1, "object_store_memory": 200 * 2**20},
            "node_config": {},
            "min_workers": 0,
            "max_workers": 2,
        },
    },
    **{f"{who}setup_commands": [] for who in ("", "head_", "worker_")},
    **{f"{who}_start_ray_commands": [] for who in ("head", "worker")},
    "initialization_commands": [],
    "file_mounts": {},
    "cluster_synced_files": [],
    "auth": {},
    "docker": {},
}


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """The home of an autoscaling head that runs on `PORT`."""
    with socket.socket() as taken:
        if taken.connect_ex(("127.0.0.1", PORT)) == 0:
            pytest.skip(f"something listens on port {PORT}")
    folder = Path(tempfile.mkdtemp(prefix="br", dir="/tmp"))  # short, for Ray's sockets
    (folder / "cluster.yaml").write_text(json.dumps(CLUSTER))
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus=2", "--num-gpus=0"]
    command += [f"--port={PORT}", "--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={folder}/ray"]
    command += ["--object-store-memory=200000000", f"--autoscaling-config={folder}/cluster.yaml"]
    with (folder / "log").open("wb") as log:
        variables = {"HOME": str(folder), "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        head = subprocess.Popen(
            command, env={**surroundings(), **variables}, stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 90
        while "Ray runtime started" not in (folder / "log").read_text():
            assert head.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.2)
        yield folder
    finally:
        end_session(head.pid)
        with suppress(subprocess.TimeoutExpired):
            head.wait(10)
        shutil.rmtree(folder, ignore_errors=True)


def run_job(home: Path, folder: Path) -> "subprocess.CompletedProcess[str]":
    """A job of defaults, from a driver on the head."""
    write(folder / "in.parquet", candidate_rows(12, 10))
    raw = job(folder / "in.parquet", folder / "out", cluster__gpus_per_actor="auto").model_dump(exclude={"limit"})
    (folder / "job.yaml").write_text(yaml.safe_dump(raw))
    return subprocess.run(
        [sys.executable, "-m", "batch_rerank.cli", "run", str(folder / "job.yaml")],
        env={**surroundings(), "HOME": str(home), "RAY_ADDRESS": f"127.0.0.1:{PORT}", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_job_does_not_guess_what_an_autoscaler_can_bring(home: Path, tmp_path: Path) -> None:
    done = run_job(home, tmp_path)
    assert done.returncode == 2, done.stderr
    assert "auto, but the cluster (2 CPUs, 0 GPUs) grows by node types that cannot be read from here" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_job_waits_for_the_gpus_that_an_autoscaler_brings(home: Path, tmp_path: Path) -> None:
    shutil.copy(home / "cluster.yaml", home / "ray_bootstrap_config.yaml")  # as `ray up` leaves it
    done = run_job(home, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the cluster (2 CPUs, 0 GPUs): 2 actors, 1 GPU each" in done.stderr
    assert "has no room for an actor of 1 GPUs yet: waiting for the autoscaler" in done.stderr
    receipts = [json.loads(path.read_text()) for path in (tmp_path / "out/_manifest/receipts").iterdir()]
    assert {receipt["scorer"].split()[1] for receipt in receipts} == {"cuda"}
