"""What a night's log looks like: verbs that last say when, those that answer at once do not."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import candidate_rows, write

TIMED = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ) \S")


def test_lines_of_a_run_begin_with_the_time_and_the_exit_code_stands_alone(
    tmp_path: Path, cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "in" / "0.parquet", candidate_rows(2, 5))
    raw = {
        "input": {"layout": "flat", "path": str(tmp_path / "in")},
        "output": {"path": str(tmp_path / "out"), "report": False},
        "model": {"name": "none", "kind": "checksum"},
        "cluster": {"gpus_per_actor": 0},
    }
    job = tmp_path / "job.yaml"
    job.write_text(json.dumps(raw))
    monkeypatch.setenv("TZ", "Asia/Kolkata")
    time.tzset()
    before = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    code, _, log = cli("run", str(job), "--local")
    assert code == 0
    times = [TIMED.match(line) for line in log.splitlines()]
    assert times and all(times), log
    found = [match[1] for match in times if match]
    assert found == sorted(found) and before <= found[0] <= found[-1], "UTC, wherever the machine stands"
    code, _, shown = cli("status", str(tmp_path / "out"))
    assert code == 0 and not any(TIMED.match(line) for line in shown.splitlines())
    code, _, log = cli("run", str(job), "--local", "--set", "output.top_k=0")
    last = log.splitlines()[-1]
    assert code == 2 and TIMED.match(log.splitlines()[0]) and last == "exit code 2", log


@pytest.fixture(autouse=True)
def same_zone(monkeypatch: pytest.MonkeyPatch):
    """The zone is this process's: it is put back after monkeypatch has put back its variable."""
    yield
    monkeypatch.undo()
    time.tzset()
