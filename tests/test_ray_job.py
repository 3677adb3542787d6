"""`ray job submit` against a real head with token authentication, as the README's commands do it.

The whole checkout is submitted: Ray leaves out what .gitignore names, .git and .venv, so `--working-dir .` is small.
The head is ended by its process ids; `ray stop` would end every Ray on the machine.
"""

import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import candidate_rows, job, nested, rows_of, write

from batch_rerank.job.run import run
from batch_rerank.publish.verify import verify

REPOSITORY = Path(__file__).parent.parent
PORTS = (
    "--port",
    "--dashboard-port",
    "--dashboard-agent-listen-port",
    "--dashboard-agent-grpc-port",
    "--runtime-env-agent-port",
    "--metrics-export-port",
    "--ray-client-server-port",
)


@dataclass(frozen=True)
class Head:
    """A running head node."""

    process: subprocess.Popen[bytes]
    url: str
    token: str
    metrics: str
    temporary: Path
    environment: dict[str, str]

    def submit(self, *arguments: object, name: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """`ray job submit --working-dir . -- python jobs/rerank.py ARGUMENTS` at the top of the repository."""
        command = ["ray", "job", "submit", "--submission-id", name, "--working-dir", "."]
        command += ["--", "python", "jobs/rerank.py", *map(str, arguments)]
        return self.run(command, **environment)

    def run(self, command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
        """A command of Ray's at the top of the repository."""
        return subprocess.run(
            command,
            cwd=REPOSITORY,
            env={**self.environment, "RAY_API_SERVER_ADDRESS": self.url, **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )

    def get(self, path: str, token: str | None = None) -> Any:
        """An answer of the job server's REST API."""
        headers = {"Authorization": f"Bearer {token or self.token}"}
        with urllib.request.urlopen(urllib.request.Request(self.url + path, headers=headers), timeout=60) as answer:
            return json.load(answer)

    def log(self, name: str) -> list[str]:
        """The lines of a job's log."""
        lines: list[str] = self.get(f"/api/jobs/{name}/logs")["logs"].splitlines()
        return lines

    def survivors(self) -> list[int]:
        """Processes of this head's session that still run."""
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if session(pid) == self.process.pid]

    def end(self) -> None:
        """End every process of the session, the head first."""
        deadline = time.monotonic() + 60
        while (found := self.survivors()) and time.monotonic() < deadline:
            for pid in sorted(found):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        self.process.wait(60)


def session(pid: int) -> int | None:
    """The session of a living process: a head's workers have process groups of their own, but the head's session."""
    try:
        state, _, _, found = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:4]
    except OSError:
        return None
    return None if state == "Z" else int(found)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [taken.getsockname()[1] for taken in sockets]
    for taken in sockets:
        taken.close()
    return ports


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    temporary = Path(
        tempfile.mkdtemp(prefix="br", dir="/tmp")
    )  # short: the paths of Ray's sockets have 107 bytes at most
    token = secrets.token_hex(32)
    (temporary / "token").write_text(token)
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
        "HOME": str(temporary),  # the user's own ~/.ray is neither read nor written
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # the job's python is this one
        "RAY_AUTH_MODE": "token",
        "RAY_worker_niceness": "0",
        "RAY_AUTH_TOKEN_PATH": str(temporary / "token"),
    }
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    command = ["ray", "start", "--head", "--block", "--num-cpus=4", "--object-store-memory=200000000"]
    command += ["--include-dashboard=true", "--disable-usage-stats", f"--temp-dir={temporary}/ray"]
    command += [f"{option}={port}" for option, port in ports.items()]
    with (temporary / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    metrics = f"http://127.0.0.1:{ports['--metrics-export-port']}/metrics"
    running = Head(process, f"http://127.0.0.1:{ports['--dashboard-port']}", token, metrics, temporary, environment)
    try:
        wait_for_the_job_server(running)
        yield running
    finally:
        running.end()
        shutil.rmtree(temporary, ignore_errors=True)


def wait_for_the_job_server(head: Head) -> None:
    deadline = time.monotonic() + 180
    while True:
        try:
            assert head.get("/api/jobs/") == []
            return
        except OSError:
            if time.monotonic() > deadline or head.process.poll() is not None:
                pytest.fail(f"no job server:\n{(head.temporary / 'log').read_text()}")
            time.sleep(0.2)


@dataclass(frozen=True)
class Submitted:
    """A job that was submitted and has finished."""

    file: Path
    result: subprocess.CompletedProcess[str]
    folder: Path


@pytest.fixture(scope="module")
def submitted(head: Head, tmp_path_factory: pytest.TempPathFactory) -> Submitted:
    """Three nested shards of 4 queries with 25 candidates each, submitted."""
    folder = tmp_path_factory.mktemp("job")
    for shard in range(3):
        write(folder / "in" / f"{shard}.parquet", nested(candidate_rows(4, 25, first=4 * shard)))
    file = folder / "job.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "input": {"layout": "nested", "path": f"{folder}/in/*.parquet", "unit_pairs": 40},
                "output": {"path": f"{folder}/submitted", "file_bytes": 1},
                "model": {"name": "none", "kind": "checksum"},
                "cluster": {"actors": 2, "gpus_per_actor": 0},
            }
        )
    )
    return Submitted(file, head.submit(file, "--set", "output.top_k=20", name="whole"), folder)


def test_a_submitted_job_ends_with_a_verified_output(head: Head, submitted: Submitted) -> None:
    assert submitted.result.returncode == 0, submitted.result.stderr
    assert head.get("/api/jobs/whole")["status"] == "SUCCEEDED"
    assert (submitted.folder / "submitted" / "_SUCCESS").is_file()
    verdict = verify(f"{submitted.folder}/submitted")
    assert (verdict.problems, verdict.candidates, verdict.rows) == ([], 300, 240)


def test_its_log_has_the_summary(head: Head, submitted: Submitted) -> None:
    log = untimed(head.log("whole"))
    assert "3 shards, 12 queries, 300 pairs, 6 units" in log
    assert "240 rows from 300 candidates; no text was cut, and no row failed" in log
    assert f"output: {submitted.folder}/submitted" in log[-2:]  # a report may follow


def untimed(log: list[str]) -> list[str]:
    """Lines of the job's own, without the time that each begins with."""
    return [re.sub(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ ", "", line) for line in log]


def test_its_log_has_no_line_of_rays_core(head: Head, submitted: Submitted) -> None:
    """That of constructor arguments in the object store, which Ray Data's actors always have."""
    assert [line for line in head.log("whole") if "core_worker" in line or "constructor arg" in line] == []


def test_its_log_has_the_progress_in_plain_lines(head: Head, submitted: Submitted) -> None:
    line = r"6/6 units  300/300 pairs  [\d,]+ pairs/s  [\d,]+ tokens/s  computing \d+% of the time  ETA 0:00"
    assert [entry for entry in untimed(head.log("whole")) if re.fullmatch(line, entry)]


def test_its_counters_are_at_the_heads_endpoint_when_its_driver_has_ended(head: Head, submitted: Submitted) -> None:
    """A driver reports every 10 seconds, and what is left when it ends: else short jobs would never be seen."""
    mine = f'output="{submitted.folder}/submitted"'
    deadline = time.monotonic() + 180
    while True:
        with urllib.request.urlopen(head.metrics, timeout=60) as answer:
            lines = [line for line in answer.read().decode().splitlines() if mine in line]
        found = {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines}
        if found.get("ray_batch_rerank_pairs_total") == 300 or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    assert found["ray_batch_rerank_pairs_total"] == 300
    assert found["ray_batch_rerank_units_total"] == 6


def test_its_parts_are_those_of_the_local_loop_byte_for_byte(submitted: Submitted) -> None:
    folder = submitted.folder
    keys: dict[str, Any] = {"input__layout": "nested", "output__top_k": 20, "output__file_bytes": 1}
    run(job(f"{folder}/in/*.parquet", folder / "local", **keys), local=True)
    parts = {part.name: part.read_bytes() for part in (folder / "local").glob("part-*")}
    assert len(parts) == 6
    assert {part.name: part.read_bytes() for part in (folder / "submitted").glob("part-*")} == parts
    assert len(rows_of(folder / "submitted")) == 240


def test_its_units_were_scored_by_workers_of_this_head(head: Head, submitted: Submitted) -> None:
    receipts = [json.loads(path.read_text()) for path in (submitted.folder / "submitted/_manifest/receipts").iterdir()]
    scorers = {receipt["scorer"].split()[0].rpartition(":")[2] for receipt in receipts}  # host:pid device …
    workers = {
        path.stem.rpartition("-")[2] for path in (head.temporary / "ray/session_latest/logs").glob("worker-*.out")
    }
    assert len(receipts) == 6
    assert scorers <= workers


def test_the_upload_is_the_repository_without_what_git_ignores(head: Head, submitted: Submitted) -> None:
    (upload,) = (head.temporary / "ray/session_latest/runtime_resources/working_dir_files").glob("_ray_pkg_*/")
    names = {path.name for path in upload.iterdir()}
    assert {"batch_rerank", "jobs", "pyproject.toml"} <= names
    assert not names & {".git", ".venv", "demo-data", ".mypy_cache"}
    assert sum(path.stat().st_size for path in upload.rglob("*")) < 20 * 2**20


@pytest.mark.slow
def test_the_same_submission_again_has_nothing_to_do(head: Head, submitted: Submitted) -> None:
    again = head.submit(submitted.file, "--set", "output.top_k=20", name="again")
    assert again.returncode == 0, again.stderr
    assert "nothing to do: all 6 units were done already" in untimed(head.log("again"))


@pytest.mark.slow
def test_the_readmes_line_resumes_as_it_is_written(head: Head, submitted: Submitted) -> None:
    (line,) = re.findall(r"^ray job submit .*$", (REPOSITORY / "README.md").read_text(), re.MULTILINE)
    assert "jobs/rerank.yaml --set cluster.actors=8" in line
    file = submitted.folder / "readme.yaml"
    file.write_text(submitted.file.read_text().replace("/submitted", "/readme"))
    logs = []
    for _ in range(2):
        done = head.run(shlex.split(line.replace("jobs/rerank.yaml", str(file)).replace("actors=8", "actors=2")))
        assert done.returncode == 0, done.stdout + done.stderr
        logs.append(done.stdout + done.stderr)
    assert "nothing to do" not in logs[0]
    assert "nothing to do: all 6 units were done already" in logs[1]


def test_a_broken_job_file_fails_and_the_last_line_has_the_exit_code(head: Head, submitted: Submitted) -> None:
    broken = submitted.folder / "broken.yaml"
    broken.write_text(submitted.file.read_text().replace("layout: nested", "layout: nestled"))
    result = head.submit(broken, name="broken")
    assert result.returncode == 1, "what ray job submit says of every failure"
    info = head.get("/api/jobs/broken")
    assert (info["status"], info["driver_exit_code"]) == ("FAILED", 2)
    log = head.log("broken")
    assert any("input.layout: found 'nestled'" in line for line in log)
    assert log[-1] == "exit code 2"


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"RAY_AUTH_MODE": "disabled"}, "Missing authentication token"),
        ({"RAY_AUTH_TOKEN": "0" * 64}, "Invalid authentication token"),
    ],
)
@pytest.mark.slow
def test_a_submission_without_the_token_is_refused(
    head: Head, submitted: Submitted, environment: dict[str, str], reason: str
) -> None:
    result = head.submit(submitted.file, name="stranger", **environment)
    assert result.returncode != 0
    assert reason in result.stderr
    with pytest.raises(urllib.error.HTTPError, match="404"):
        head.get("/api/jobs/stranger")


# The last test: it ends the head


def test_a_head_ends_by_its_process_ids_without_ray_stop(head: Head) -> None:
    assert len(head.survivors()) > 3
    head.end()
    assert head.survivors() == []
    with pytest.raises(OSError):
        head.get("/api/jobs/")
