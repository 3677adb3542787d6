"""What `status` says of a run that is at work, has ended, or has died, and that it takes a job file."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import candidate_rows, job, write
from test_lease import SLOW_JOB, elsewhere

from batch_rerank.job.run import run
from batch_rerank.publish.output import Place
from batch_rerank.publish.status import status_of_output
from batch_rerank.store.filesystem import locate

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    write(tmp_path / "in.parquet", candidate_rows(50, 10))
    raw = job(tmp_path / "in.parquet", tmp_path / "out", input__unit_pairs=10, cluster__lease_seconds=1).model_dump()
    del raw["limit"]
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(raw))
    return tmp_path / "job.yaml"


def test_a_killed_run_is_not_running(job_file: Path, tmp_path: Path, cli: Cli) -> None:
    process = subprocess.Popen([sys.executable, "-c", SLOW_JOB, "run", str(job_file), "--local"])
    status, receipts = tmp_path / "out/_manifest/status.json", tmp_path / "out/_manifest/receipts"
    deadline = time.monotonic() + 240
    while not (receipts.exists() and len(list(receipts.iterdir())) >= 5):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    found = status_of_output(Place(str(tmp_path / "out")))
    assert found["state"] == "running" and f"process {process.pid} on " in str(found["message"])
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert json.loads(status.read_text())["state"] == "running"
    code, shown, _ = cli("status", tmp_path / "out", "--json")
    found = json.loads(shown)
    assert (code, found["state"], found["success"]) == (0, "killed", False)
    assert f"process {process.pid} on " in found["message"]


def said_running(output: Path) -> None:
    status = output / "_manifest/status.json"
    status.write_text(json.dumps({**json.loads(status.read_text()), "state": "running", "exit_code": None}))


def test_a_run_elsewhere_is_known_by_its_counter(job_file: Path, tmp_path: Path) -> None:
    run(job(tmp_path / "in.parquet", tmp_path / "out", input__unit_pairs=10, cluster__lease_seconds=1), local=True)
    said_running(tmp_path / "out")
    root = locate(str(tmp_path / "out"))
    elsewhere(root, 2)
    silent = status_of_output(Place(str(tmp_path / "out")))
    assert silent["state"] == "silent" and "process 7 on far since 2026-01-01T00:00:00Z" in str(silent["message"])
    beats = threading.Thread(target=lambda: [elsewhere(root, 2, counter=n) and time.sleep(0.02) for n in range(50)])
    beats.start()
    assert status_of_output(Place(str(tmp_path / "out")))["state"] == "running"
    beats.join()
    elsewhere(root, 2, released=True)
    assert status_of_output(Place(str(tmp_path / "out")))["state"] == "ended"


def test_a_finished_run_has_its_start_its_time_and_its_rate(job_file: Path, tmp_path: Path, cli: Cli) -> None:
    run(job(tmp_path / "in.parquet", tmp_path / "out", input__unit_pairs=10), local=True)
    written = json.loads((tmp_path / "out/_manifest/status.json").read_text())
    assert written["started_at"] <= written["updated_at"]
    assert 0 < written["seconds"] < 60 and written["pairs_per_second"] == pytest.approx(
        500 / written["seconds"], rel=0.5
    )
    code, _, shown = cli("status", job_file)
    assert code == 0
    for name in ("started at", "pairs per second", "seconds"):
        assert name in shown
    kept = ("started_at", "seconds", "pairs_per_second")
    assert cli("publish", job_file, "--local", "--set", "output.top_k=3")[0] == 0
    after = json.loads((tmp_path / "out/_manifest/status.json").read_text())
    assert after["state"] == "done" and [after[name] for name in kept] == [written[name] for name in kept]


def test_a_status_that_is_somebodys_bytes_moves_no_cursor(job_file: Path, tmp_path: Path, cli: Cli) -> None:
    run(job(tmp_path / "in.parquet", tmp_path / "out", input__unit_pairs=10), local=True)
    status = tmp_path / "out/_manifest/status.json"
    status.write_text(json.dumps({"state": "failed", "message": "\x1b[2Jgone"}))
    code, _, shown = cli("status", tmp_path / "out")
    assert code == 0 and "gone" in shown and "\x1b" not in shown


def test_the_verbs_take_the_job_file_and_its_options(job_file: Path, tmp_path: Path, cli: Cli) -> None:
    assert cli("run", job_file, "--local", "--limit", 3)[0] == 0
    (tmp_path / "qrels").write_text("q0 0 d0 1\n")
    assert cli("verify", job_file, "--limit", 3)[0] == 0
    assert cli("status", job_file, "--limit", 3)[0] == 0
    assert cli("evaluate", "--run", job_file, "--limit", 3, "--qrels", tmp_path / "qrels")[0] == 0
    assert cli("verify", job_file)[0] == 6
    assert cli("verify", job_file, "--set", f"output.path={tmp_path / 'out-limit-3'}")[0] == 0
    code, _, shown = cli("status", tmp_path / "out-limit-3", "--set", "output.path=x")
    assert code == 2 and "for a job file" in shown
    raw = yaml.safe_load(job_file.read_text())
    raw["output"]["storage_options"] = {"no_such_option": 1}  # a local filesystem refuses it, so it has arrived
    job_file.write_text(yaml.safe_dump(raw))
    assert cli("status", job_file, "--limit", 3)[0] in (0, 6)
