"""Killed anywhere and started again: the same rows, nothing scored twice that was committed, nothing lost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml
from checkpoints import bert_reranker
from conftest import Killed, candidate_rows, job, rows_of, scored_only, write

import batch_rerank.store.filesystem as filesystem
from batch_rerank.errors import StorageError
from batch_rerank.job.run import run
from batch_rerank.publish.verify import verify
from batch_rerank.store.manifest import Manifest
from batch_rerank.store.scan import scan


def test_a_finished_job_has_nothing_to_do(flat_shards: Path, tmp_path: Path) -> None:
    run(job(flat_shards, tmp_path / "out"), local=True)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("part-*")}
    again = run(job(flat_shards, tmp_path / "out"), local=True)
    assert (again.units, again.resumed_units) == (0, 6)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("part-*")} == times


def test_a_finished_job_loads_no_model_and_writes_nothing(flat_shards: Path, tmp_path: Path, logged: list[str]) -> None:
    model = {"model__name": str(bert_reranker(tmp_path / "model")), "model__kind": "auto", "model__max_length": 128}
    config = job(flat_shards, tmp_path / "out", **model)
    first = run(config, local=True)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert any(message.startswith("self-test passed") for message in logged)
    logged.clear()
    again = run(config, local=True)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == files
    assert not any(message.startswith("self-test") for message in logged)
    assert (again.totals, again.units) == (first.totals, 0)


def test_a_job_that_was_stopped_after_its_mark_puts_its_status_right(flat_shards: Path, tmp_path: Path) -> None:
    run(job(flat_shards, tmp_path / "out"), local=True)
    status = tmp_path / "out" / "_manifest" / "status.json"
    status.write_text(status.read_text().replace('"done"', '"running"'))
    run(job(flat_shards, tmp_path / "out"), local=True)
    assert json.loads(status.read_text())["state"] == "done"


def test_settings_that_change_no_score_may_change_between_runs(flat_shards: Path, tmp_path: Path) -> None:
    run(job(flat_shards, tmp_path / "out"), local=True)
    other = job(
        flat_shards,
        tmp_path / "out",
        input__unit_pairs=10,
        scoring__token_budget=64,
        scoring__max_failed_rows=0.5,
        cluster__actors=1,
        cluster__prefetch_units=4,
    )
    assert run(other, local=True).units == 0


@pytest.mark.parametrize("lost", ["receipt", "score file", "score file cut short"])
def test_only_the_unit_that_lost_a_file_is_scored_again(lost: str, flat_shards: Path, tmp_path: Path) -> None:
    run(job(flat_shards, tmp_path / "undisturbed"), local=True)
    out = scored_only(job(flat_shards, tmp_path / "out"))
    assert not list(out.glob("*.parquet")), "readers see nothing before it is published"
    file, receipt = out / "_work" / "00001-00000.parquet", out / "_manifest" / "receipts" / "00001-00000.json"
    if lost == "receipt":
        receipt.unlink()
    elif lost == "score file":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-20])
    assert verify(str(out)).problems
    again = run(job(flat_shards, out), local=True)
    assert (again.units, again.resumed_units) == (1, 5)
    assert rows_of(out) == rows_of(tmp_path / "undisturbed")
    assert verify(str(out)).problems == []


@pytest.mark.parametrize("lost", ["receipt", "part", "part cut short", "part's receipt", "scores"])
def test_a_finished_output_that_lost_a_file_is_mended_with_what_is_there(
    lost: str, flat_shards: Path, tmp_path: Path
) -> None:
    out, config = tmp_path / "out", job(flat_shards, tmp_path / "out", output__file_bytes=1)
    run(config, local=True)
    before = {part.name: part.read_bytes() for part in out.glob("part-*")}
    assert len(before) == 6
    part = out / "part-00002.parquet"
    lose = {
        "receipt": (out / "_manifest/receipts/00001-00000.json").unlink,
        "part": part.unlink,
        "part cut short": lambda: part.write_bytes(part.read_bytes()[:-20]),
        "part's receipt": (out / "_manifest/parts/00002.json").unlink,
        "scores": (out / "_scores/00002.parquet").unlink,
    }
    lose[lost]()
    again = run(config, local=True)
    assert again.units == (lost == "receipt")
    assert {part.name: part.read_bytes() for part in out.glob("part-*")} == before
    assert verify(str(out)).problems == []


def test_scores_that_were_not_kept_are_made_again_where_their_part_is_lost(flat_shards: Path, tmp_path: Path) -> None:
    config = job(flat_shards, tmp_path / "out", output__file_bytes=1, output__keep_scores=False)
    run(config, local=True)
    assert not (tmp_path / "out/_scores").exists() and not list((tmp_path / "out/_work").glob("*"))
    assert run(config, local=True).units == 0
    before = rows_of(tmp_path / "out")
    (tmp_path / "out/part-00002.parquet").unlink()
    assert run(config, local=True).units == 1
    assert rows_of(tmp_path / "out") == before


@pytest.mark.parametrize("step", ["score file", "receipt"])
def test_killed_before_a_files_creation_reruns_only_that_unit(
    step: str, flat_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(job(flat_shards, tmp_path / "undisturbed"), local=True)
    create = filesystem.Location.create_exclusive
    created: list[str] = []

    def create_until_the_third(self: filesystem.Location, data: bytes) -> bool:
        if "/_work/" in self.path if step == "score file" else "/receipts/" in self.path:
            created.append(self.name)
            if len(created) == 3:
                raise Killed
        return create(self, data)

    monkeypatch.setattr(filesystem.Location, "create_exclusive", create_until_the_third)
    with pytest.raises(Killed):
        run(job(flat_shards, tmp_path / "out"), local=True)
    monkeypatch.undo()
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    again = run(job(flat_shards, tmp_path / "out"), local=True)
    assert (again.units, again.resumed_units) == (4, 2)
    undisturbed = rows_of(tmp_path / "undisturbed")
    assert rows_of(tmp_path / "out") == undisturbed
    assert verify(str(tmp_path / "out")).problems == []


def test_a_late_attempt_adopts_the_score_file_that_is_there(flat_shards: Path, tmp_path: Path) -> None:
    out = scored_only(job(flat_shards, tmp_path / "out"))
    file = out / "_work/00000-00000.parquet"
    # another attempt's file of the same unit: same rows, other scores, as GPUs make them
    table = pq.read_table(file)
    scores = pc.add(table["score"], 0.5).cast("float32")
    pq.write_table(table.set_column(table.column_names.index("score"), "score", scores), file)
    (out / "_manifest" / "receipts" / "00000-00000.json").unlink()
    run(job(flat_shards, out), local=True)
    first = rows_of(out).slice(0, len(table)).sort_by([("query_id", "ascending"), ("first_stage_rank", "ascending")])
    assert sorted(first["score"].to_pylist()) == sorted(scores.to_pylist())
    assert verify(str(out)).problems == []


def test_a_score_file_of_another_job_is_not_adopted(flat_shards: Path, tmp_path: Path) -> None:
    other = scored_only(job(flat_shards, tmp_path / "other", model__max_length=64))
    out = scored_only(job(flat_shards, tmp_path / "out"))
    (out / "_manifest" / "receipts" / "00000-00000.json").unlink()
    (out / "_work/00000-00000.parquet").write_bytes((other / "_work/00000-00000.parquet").read_bytes())
    with pytest.raises(StorageError, match=r"00000-00000\.parquet: exists and is another job's"):
        run(job(flat_shards, out), local=True)
    assert not (out / "_SUCCESS").exists()


def start(arguments: list[str], log: Path) -> "subprocess.Popen[bytes]":
    with log.open("wb") as stderr:
        return subprocess.Popen(
            [sys.executable, "-m", "batch_rerank.cli", *arguments],
            stderr=stderr,
            start_new_session=True,
            # a shell's background jobs ignore Ctrl-C, and so would what these tests start if they run in one
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


def wait_for(condition: "object", process: "subprocess.Popen[bytes]", seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert process.poll() is None, "the job ended before the test could disturb it"
        assert time.monotonic() < deadline, "the job did not get so far in time"
        time.sleep(0.02)


@pytest.fixture
def long_job(tmp_path: Path) -> Path:
    """A job file of 300 units: long enough to be disturbed in the middle."""
    for shard in range(6):
        write(tmp_path / "in" / f"{shard}.parquet", candidate_rows(50, 10, first=50 * shard))
    raw = job(tmp_path / "in", tmp_path / "out", input__unit_pairs=10).model_dump()
    del raw["limit"]
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.mark.parametrize("local", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["local", "ray"])
@pytest.mark.parametrize(
    ("sent", "code", "state"),
    [(signal.SIGKILL, -9, "running"), (signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 130, "interrupted")],
)
def test_a_job_stopped_by_a_signal_resumes_to_the_same_rows(
    sent: signal.Signals, code: int, state: str, local: bool, long_job: Path, tmp_path: Path
) -> None:
    arguments = ["run", str(long_job), *(["--local"] if local else [])]
    process = start(arguments, tmp_path / "log")
    receipts = tmp_path / "out" / "_manifest" / "receipts"
    wait_for(lambda: receipts.exists() and len(list(receipts.glob("*.json"))) >= 20, process)
    os.kill(process.pid, sent)
    assert process.wait(240) == code
    wait_for_silence(receipts)  # Ray's workers outlive a killed driver for a moment
    committed = len(list(receipts.glob("*.json")))
    assert 20 <= committed < 300
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    assert json.loads((tmp_path / "out" / "_manifest" / "status.json").read_text())["state"] == state
    if code == 130:
        assert (tmp_path / "log").read_text().rstrip().endswith("exit code 130")

    from batch_rerank.config import load_config

    again = run(load_config(long_job), local=True)
    assert again.resumed_units == committed
    run(load_config(long_job, [f"output.path={tmp_path / 'undisturbed'}"]), local=True)
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "undisturbed")
    assert verify(str(tmp_path / "out")).problems == []


def wait_for_silence(receipts: Path, seconds: float = 2.0) -> None:
    count, since = -1, time.monotonic()
    while time.monotonic() - since < seconds:
        now = len(list(receipts.glob("*.json")))
        if now != count:
            count, since = now, time.monotonic()
        time.sleep(0.1)


def test_the_manifest_lists_each_unit_once(flat_shards: Path, tmp_path: Path) -> None:
    from batch_rerank.store.filesystem import locate

    run(job(flat_shards, tmp_path / "out"), local=True)
    manifest = Manifest(locate(str(tmp_path / "out")))
    plan = manifest.read_plan()
    assert plan is not None
    found = scan(manifest, plan)
    assert [receipt.unit for receipt in found.committed] == [f"0000{s}-0000{u}" for s in range(3) for u in range(2)]
    assert found.broken == {}
