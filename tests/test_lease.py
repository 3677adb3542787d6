"""One job per output: who holds it, who takes it over, and what a job does that has lost it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from conftest import candidate_rows, job, rows_of, write

from batch_rerank.errors import ConflictError
from batch_rerank.job.run import run
from batch_rerank.publish.verify import verify
from batch_rerank.store import lease as leases
from batch_rerank.store.filesystem import Location, locate
from batch_rerank.store.lease import Holder, _latest, hold

SLOW_JOB = """
import sys, time
import batch_rerank.score.steps as steps
from batch_rerank.cli import app
score = steps.LoadedScorer.score
def slowly(self, encoded):
    time.sleep(0.1)
    return score(self, encoded)
steps.LoadedScorer.score = slowly
app(sys.argv[1:])
"""


def elsewhere(root: Location, epoch: int = 1, **changes: object) -> Location:
    """A lease whose holder lives on another machine."""
    holder = {"id": "x", "host": "far", "machine": "m", "pid": 7, "process": "1", "since": "2026-01-01T00:00:00Z"}
    location = root / f"_manifest/lease/{epoch}"
    location.write_bytes(Holder(**(holder | changes)).to_json())  # type: ignore[arg-type]
    return location


def test_a_second_job_stops_at_once_and_says_who_holds_the_output(flat_shards: Path, tmp_path: Path) -> None:
    root = locate(str(tmp_path / "out"))
    with hold(root, 60):
        started = time.monotonic()
        with pytest.raises(ConflictError, match=rf"process {os.getpid()} on .* since 20\d\d-.*Z\); expected one job"):
            run(job(flat_shards, tmp_path / "out"), local=True)
        assert time.monotonic() - started < 5
    assert run(job(flat_shards, tmp_path / "out"), local=True).units == 6


def test_a_store_that_was_away_is_no_silence_of_the_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits was held up in its first look for longer than the lease; so was the holder, which beats soon after."""
    root, looks = locate(str(tmp_path)), []

    def slow(root: Location) -> tuple[int, bytes] | None:
        looks.append(1)
        if len(looks) == 2:
            time.sleep(1.5)
        if len(looks) == 6:
            elsewhere(root, counter=1)
        return _latest(root)

    elsewhere(root)
    monkeypatch.setattr("batch_rerank.store.lease._latest", slow)
    with pytest.raises(ConflictError, match="process 7 on far"), hold(root, 1):
        pass


def test_a_holder_elsewhere_is_alive_as_soon_as_its_counter_moves(tmp_path: Path) -> None:
    root = locate(str(tmp_path))
    elsewhere(root)
    beat = threading.Timer(0.3, lambda: elsewhere(root, counter=1))
    beat.start()
    started = time.monotonic()
    with pytest.raises(ConflictError, match="process 7 on far"), hold(root, 5):
        pass
    assert 0.2 < time.monotonic() - started < 3
    beat.join()


def test_a_silent_holder_elsewhere_is_taken_over_after_its_time(tmp_path: Path) -> None:
    root = locate(str(tmp_path))
    elsewhere(root)
    started = time.monotonic()
    with hold(root, 1):
        assert time.monotonic() - started >= 1
        assert (tmp_path / "_manifest/lease/2").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"id": 1}', b"\xff"])
def test_a_damaged_lease_counts_as_a_silent_holder(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "_manifest/lease").mkdir(parents=True)
    (tmp_path / "_manifest/lease/4").write_bytes(content)
    with hold(locate(str(tmp_path)), 1):
        assert (tmp_path / "_manifest/lease/5").exists()


def test_a_released_lease_is_taken_at_once(tmp_path: Path) -> None:
    root = locate(str(tmp_path))
    for _ in range(3):
        with hold(root, 60):
            pass
    assert sorted(path.name for path in (tmp_path / "_manifest/lease").iterdir()) == ["1", "2", "3"]


def test_of_two_challengers_one_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = locate(str(tmp_path))
    elsewhere(root, released=True)
    create = Location.create_exclusive

    def create_second(self: Location, data: bytes) -> bool:
        elsewhere(root, epoch=2, host="faster")
        return create(self, data)

    monkeypatch.setattr(Location, "create_exclusive", create_second)
    with pytest.raises(ConflictError, match="on faster"), hold(root, 60):
        pass


def test_the_wall_clock_decides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = locate(str(tmp_path))
    with hold(root, 1):
        monkeypatch.setattr(leases.time, "time", lambda: 0.0)
        time.sleep(0.5)
    elsewhere(root, epoch=2)
    monkeypatch.setattr(leases.time, "time", lambda: 4e9)
    started = time.monotonic()
    with hold(root, 1):
        assert time.monotonic() - started >= 1


def test_a_job_that_lost_its_lease_repairs_nothing_and_writes_no_success(
    flat_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    create = Location.create_exclusive

    def take_over(self: Location, data: bytes) -> bool:
        if self.name == "00001-00001.json":
            elsewhere(locate(str(out)), epoch=2)
        return create(self, data)

    monkeypatch.setattr(Location, "create_exclusive", take_over)
    with pytest.raises(ConflictError, match=r"another job has taken this output over \(lease 2\)"):
        run(job(flat_shards, out), local=True)
    assert not (out / "_SUCCESS").exists()
    assert json.loads((out / "_manifest/status.json").read_text())["state"] == "running"
    assert json.loads((out / "_manifest/lease/2").read_text())["host"] == "far"


def test_a_paused_driver_is_replaced_and_stops_when_it_wakes(tmp_path: Path) -> None:
    for shard in range(4):
        write(tmp_path / "in" / f"{shard}.parquet", candidate_rows(15, 10, first=15 * shard))
    raw = job(tmp_path / "in", tmp_path / "out", input__unit_pairs=10, cluster__lease_seconds=1).model_dump()
    del raw["limit"]
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(raw))
    command = [sys.executable, "-c", SLOW_JOB, "run", str(path), "--local"]
    with (tmp_path / "first").open("wb") as log:
        first = subprocess.Popen(command, stderr=log, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    receipts = tmp_path / "out/_manifest/receipts"
    deadline = time.monotonic() + 240
    while not (receipts.exists() and len(list(receipts.iterdir())) >= 5):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    first.send_signal(signal.SIGSTOP)
    with (tmp_path / "second").open("wb") as log:
        second = subprocess.Popen(command, stderr=log)
    while not (tmp_path / "out/_manifest/lease/2").exists():
        assert second.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    first.send_signal(signal.SIGCONT)
    assert first.wait(240) == 4
    assert "another job has taken this output over" in (tmp_path / "first").read_text()
    assert second.wait(240) == 0
    run(job(tmp_path / "in", tmp_path / "undisturbed", input__unit_pairs=10), local=True)
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "undisturbed")
    assert verify(str(tmp_path / "out")).problems == []


@pytest.mark.parametrize(("step", "write"), [("link", "create_exclusive"), ("replace", "write_bytes")])
def test_a_write_whose_temporary_file_a_successor_removed_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, write: str
) -> None:
    real, removed = getattr(os, step), []

    def remove_first(temporary: str, path: str) -> None:
        if not removed:
            removed.append(temporary)
            os.unlink(temporary)
        real(temporary, path)

    monkeypatch.setattr(os, step, remove_first)
    getattr(locate(str(tmp_path / "part")), write)(b"rows")
    assert removed and [file.name for file in tmp_path.iterdir()] == ["part"]
    assert (tmp_path / "part").read_bytes() == b"rows"


def test_a_process_may_have_any_name() -> None:
    """The system cuts names after 15 bytes, in the middle of a character."""
    name = b"caf\xc3"
    code = f"import ctypes, sys; ctypes.CDLL(None).prctl(15, {name!r}, 0, 0, 0); print(1, flush=True); sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    assert name in Path(f"/proc/{process.pid}/stat").read_bytes()
    assert leases._started(process.pid)
    process.communicate(b"")
