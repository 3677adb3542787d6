"""Pairs that make the engine raise and units that kill their actor cost themselves and nothing else."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import candidate_rows, job, rows_of, write

from batch_rerank.engine.encoded import Encoded, Group
from batch_rerank.engine.encoding import ByteEncoder
from batch_rerank.engine.packing import Float32
from batch_rerank.engine.scorer import ChecksumScorer, Result
from batch_rerank.engine.work import Arithmetic
from batch_rerank.errors import ModelError, UnfinishedError
from batch_rerank.job.run import run
from batch_rerank.publish.verify import verify
from batch_rerank.score.attempts import MOST_DEATHS, MOST_LOADS, Attempts
from batch_rerank.score.poison import MOST_POISON, DeviceLostError, PoisonedUnitError, Trial, score_around
from batch_rerank.score.steps import Done, LoadedScorer
from batch_rerank.score.timesheet import Timesheet
from batch_rerank.store.filesystem import locate

BAD = b"poison"
SCORE = LoadedScorer.score


def encoded_of(groups: int, documents: int, bad: set[int]) -> Encoded:
    texts = [f"{BAD.decode() if pair in bad else 'text'} {pair}" for pair in range(groups * documents)]
    whole = [Group(f"query {g}", texts[g * documents : (g + 1) * documents]) for g in range(groups)]
    return ByteEncoder(512).encode(whole)


def raising(encoded: Encoded, error: type[Exception] = RuntimeError) -> Float32:
    if any(bytes(encoded.segment(index)).startswith(BAD) for index in encoded.document):
        raise error("cannot score this\nmore")
    return ChecksumScorer().score(encoded)


def alive() -> bool:
    return False


class Life:
    """A process whose device is lost with the first pair that raises."""

    lost = False

    def score(self, encoded: Encoded) -> Float32:
        try:
            return raising(encoded)
        except RuntimeError:
            self.lost = True
            raise


@pytest.mark.parametrize("bad", [{0}, {59}, {7, 8, 9, 31}, set(range(3, 3 + MOST_POISON))])
def test_exactly_the_bad_pairs_are_found_and_the_others_scored_as_without_them(bad: set[int]) -> None:
    encoded = encoded_of(6, 10, bad)
    scores, errors = score_around(raising, encoded, None, alive)
    assert errors == dict.fromkeys(sorted(bad), "engine: RuntimeError: cannot score this")
    expected = ChecksumScorer().score(encoded)
    expected[sorted(bad)] = np.nan
    np.testing.assert_array_equal(scores, expected)


def test_a_unit_of_bad_pairs_is_set_aside_and_the_models_own_complaint_stops_the_job() -> None:
    encoded = encoded_of(6, 10, set(range(0, 60, 2)))
    with pytest.raises(PoisonedUnitError, match=f"{MOST_POISON + 1} pairs raised, .* RuntimeError: cannot"):
        score_around(raising, encoded, None, alive)
    with pytest.raises(ModelError):
        score_around(lambda part: raising(part, ModelError), encoded, None, alive)
    with pytest.raises(ModelError):  # fewer pairs than that, all of them
        score_around(lambda part: raising(part, ModelError), encoded_of(1, 3, {0, 1, 2}), None, alive)


def test_a_bad_query_and_a_bad_document_are_two_texts() -> None:
    words = [f"text {d}" for d in range(40)]
    encoded = ByteEncoder(512).encode([Group(f"query {g}", words) for g in range(40)])
    bad = {pair for pair in range(1600) if pair // 40 == 7 or pair % 40 == 3}

    def score(part: Encoded) -> Float32:
        documents = [bytes(part.segment(index)) for index in part.document]
        queries = [bytes(part.segment(index)) for index in part.prefix[part.group_of_pair()]]
        if any(document == b"text 3" for document in documents) or any(b"query 7\n" in query for query in queries):
            raise RuntimeError("cannot score this")
        return ChecksumScorer().score(part)

    scores, errors = score_around(score, encoded, None, alive, by_text=True)
    assert set(errors) == bad == set(np.flatnonzero(np.isnan(scores)).tolist())
    with pytest.raises(PoisonedUnitError):
        score_around(score, encoded, None, alive)


def test_a_device_that_another_unit_lost_is_held_against_no_pair() -> None:
    encoded = encoded_of(1, 1, {0})
    trial = Trial.of(encoded)
    with pytest.raises(DeviceLostError):
        score_around(raising, encoded, trial, lambda: True, alone=False)
    assert (trial.todo, trial.errors) == ([(0, 1)], {})
    with pytest.raises(DeviceLostError):
        score_around(raising, encoded, trial, lambda: True)
    assert (trial.todo, trial.errors) == ([], {0: "engine: RuntimeError: cannot score this"})


@pytest.mark.parametrize("bad", [{17}, {0, 1, 58}])
def test_halving_goes_on_in_the_next_process_where_a_bad_pair_takes_the_device_with_it(bad: set[int]) -> None:
    encoded = encoded_of(6, 10, bad)
    trial, lives = Trial.of(encoded), 1
    while True:
        life = Life()
        try:
            scores, errors = score_around(life.score, encoded, trial, lambda life=life: life.lost)  # type: ignore[misc]
            break
        except DeviceLostError:
            trial = Trial(list(trial.todo), dict(trial.errors))  # as the diary brings it over
            lives += 1
            assert lives < 30
    assert sorted(errors) == sorted(bad)
    expected = ChecksumScorer().score(encoded)
    expected[sorted(bad)] = np.nan
    np.testing.assert_array_equal(scores, expected)


def test_an_actors_diary_tells_its_next_life_what_it_died_of(tmp_path: Path) -> None:
    location = locate(str(tmp_path / "actor.json"))
    first = Attempts(location, restarted=False)
    assert first.begin("good") is None
    first.end("good")
    assert first.begin("bad") is None
    first._writer.shutdown()  # what a process that is killed a moment later has written
    for _ in range(MOST_DEATHS - 1):
        assert Attempts(location, restarted=True).begin("bad") is None
    last = Attempts(location, restarted=True)
    assert last.begin("bad") == "its actor died 2 times while scoring it (killed, or a crash in native code)"
    assert last.begin("good") is None
    last.leave("good", Trial([(0, 4)], {5: "engine: lost"}))
    after = Attempts(location, restarted=True)
    assert after.trial("good") == Trial([(0, 4)], {5: "engine: lost"})
    assert (after.begin("good"), after.tries("good")) == (None, 2)


def test_of_two_units_at_once_the_one_that_kills_is_found_and_the_other_is_not_set_aside(tmp_path: Path) -> None:
    location = locate(str(tmp_path / "actor.json"))
    first = Attempts(location, restarted=False)
    assert (first.begin("bad"), first.begin("beside it"), first.careful) == (None, None, False)
    first._writer.shutdown()
    second = Attempts(location, restarted=True)
    assert second.careful, "one at a time"
    assert second.begin("beside it") is None
    second.end("beside it")
    assert second.begin("bad") is None
    third = Attempts(location, restarted=True)
    assert third.begin("bad") == "its actor died 2 times while scoring it (killed, or a crash in native code)"
    assert third.begin("beside it") is None


class Device:
    """A scorer that notes what is begun while another unit is awaited."""

    def __init__(self) -> None:
        self.begun, self.together, self.second = 0, threading.Event(), threading.Barrier(2, timeout=120)

    def start(self, encoded: Encoded, begun: Callable[[], None]) -> Result:
        begun()
        self.begun += 1

        def result() -> Float32:
            self.second.wait()  # nobody gets here before the other unit is begun
            return ChecksumScorer().score(encoded)

        return Result(result)


def test_a_unit_is_begun_while_another_is_awaited_and_no_second_is_counted_twice() -> None:
    loaded: Any = object.__new__(LoadedScorer)
    loaded._scorer, loaded._turn, loaded.sheet = Device(), threading.Lock(), Timesheet()
    loaded.sheet.loaded()
    loaded._arithmetic, loaded._done = Arithmetic(0.0, 0.0, shared=True, causal=True), Done()
    encoded = encoded_of(2, 3, set())

    def unit() -> dict[str, float]:
        with loaded.sheet.unit():
            np.testing.assert_array_equal(loaded.score(encoded), ChecksumScorer().score(encoded))
            return dict(loaded.sheet.take())

    with ThreadPoolExecutor(2) as pool:
        taken = [done.result() for done in [pool.submit(unit), pool.submit(unit)]]
    assert loaded._scorer.begun == 2
    spent = sum(one["load_seconds"] + one["wait_seconds"] + one["seconds"] for one in taken)
    assert spent == pytest.approx(max(one["age_seconds"] for one in taken), abs=1e-5)


def test_a_model_that_kills_its_process_is_loaded_three_times(tmp_path: Path) -> None:
    location = locate(str(tmp_path / "actor.json"))
    for life in range(MOST_LOADS):
        assert Attempts(location, restarted=life > 0).load() is None
    assert Attempts(location, restarted=True).load() == (
        "the process died 3 times while loading it (killed, mostly for its memory)"
    )
    survivor = Attempts(locate(str(tmp_path / "other.json")), restarted=False)
    for _ in range(5):
        assert survivor.load() is None
        survivor.loaded()
        survivor = Attempts(locate(str(tmp_path / "other.json")), restarted=True)


def poisoned_shard(tmp_path: Path, bad: dict[int, str]) -> Path:
    rows = candidate_rows(40, 10)
    for row, text in bad.items():
        rows[row]["text"] = text
    return write(tmp_path / "in.parquet", rows)


def test_a_bad_pair_is_a_row_with_its_error_and_a_resume_tries_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = poisoned_shard(tmp_path, {123: "poison"})
    config = job(shard, tmp_path / "out", scoring__max_failed_rows=0)
    monkeypatch.setattr(LoadedScorer, "score", lambda self, encoded: raising(encoded))
    with pytest.raises(UnfinishedError, match=r"1 of 400 rows failed \(.*, 1 in the engine\)"):
        run(config, local=True)
    rows = pa.concat_tables([pq.read_table(file) for file in (tmp_path / "out/_work").iterdir()])
    failed = rows.filter(pc.is_valid(rows["error"])).to_pylist()
    assert [(row["query_id"], row["doc_id"], row["score"], row["error"]) for row in failed] == [
        ("q12", "d3", None, "engine: RuntimeError: cannot score this")
    ]
    assert (failed[0]["query_hash"], failed[0]["n_tokens"]) != (None, 0), "known, but not scored"
    failures = list((tmp_path / "out/_manifest/failures").iterdir())
    assert json.loads(failures[0].read_text())["rows"] == [
        {"query_id": "q12", "doc_id": "d3", "error": "engine: RuntimeError: cannot score this"}
    ]
    monkeypatch.setattr(LoadedScorer, "score", SCORE)
    again = run(config, local=True)
    assert (again.units, again.totals.failed) == (1, 0)
    assert not failures[0].exists()
    run(job(shard, tmp_path / "undisturbed"), local=True)
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "undisturbed")
    assert verify(str(tmp_path / "out")).problems == []


def test_bad_pairs_under_the_limit_are_counted_and_the_job_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoadedScorer, "score", lambda self, encoded: raising(encoded))
    config = job(poisoned_shard(tmp_path, {3: "poison", 123: "poison"}), tmp_path / "out", output__top_k=3)
    summary = run(config, local=True)
    assert (summary.totals.engine_failed, summary.totals.failed) == (2, 2)
    assert verify(str(tmp_path / "out")).problems == []
    assert len(list((tmp_path / "out/_manifest/failures").iterdir())) == 2
    assert run(config, local=True).units == 0  # a finished job is finished


def test_a_bad_unit_is_set_aside_named_and_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = poisoned_shard(tmp_path, dict.fromkeys(range(120, 160), "poison"))
    monkeypatch.setattr(LoadedScorer, "score", lambda self, encoded: raising(encoded))
    config = job(shard, tmp_path / "out")
    with pytest.raises(UnfinishedError, match=r"1 of 10 units did not finish: 00000-00003 \(17 pairs raised"):
        run(config, local=True)
    assert len(list((tmp_path / "out/_work").iterdir())) == 9
    assert json.loads((tmp_path / "out/_manifest/failures/00000-00003.json").read_text())["tries"] == 1
    with pytest.raises(UnfinishedError, match=r"1 units could not be scored, .*scoring\.max_failed_units = 0"):
        run(job(shard, tmp_path / "out", scoring__max_failed_units=0), local=True)
    monkeypatch.setattr(LoadedScorer, "score", SCORE)
    assert run(config, local=True).units == 1
    assert verify(str(tmp_path / "out")).problems == []


FAULTS = """
import os, sys
if os.environ.get("POISON"):
    import importlib.abc, importlib.machinery
    class Hook(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name != "batch_rerank.score.steps":
                return None
            sys.meta_path.remove(self)
            spec = importlib.machinery.PathFinder.find_spec(name, path)
            run = spec.loader.exec_module
            def exec_module(module):
                run(module)
                score = module.LoadedScorer.score
                def wrapped(self, encoded):
                    texts = [bytes(encoded.segment(index)) for index in encoded.document]
                    if any(text.startswith(b"raise") for text in texts):
                        self.broken = True
                        raise RuntimeError("device-side assert")
                    if any(text.startswith(b"kill") for text in texts):
                        os.kill(os.getpid(), 9)
                    return score(self, encoded)
                module.LoadedScorer.score = wrapped
                if os.environ["POISON"] == "lost":
                    module.LoadedScorer.device_lost = lambda self: getattr(self, "broken", False)
            spec.loader.exec_module = exec_module
            return spec
    sys.meta_path.insert(0, Hook())
"""


@pytest.mark.parametrize("kind", [pytest.param("lost", marks=pytest.mark.slow), "kill"])
def test_on_ray_a_bad_pair_is_found_across_processes_and_a_killer_is_set_aside(kind: str, tmp_path: Path) -> None:
    (tmp_path / "hooks").mkdir()
    (tmp_path / "hooks/sitecustomize.py").write_text(FAULTS)
    shard = poisoned_shard(tmp_path, {123: "raise" if kind == "lost" else "kill"})
    raw = job(shard, tmp_path / "out", cluster__actors=1).model_dump()
    del raw["limit"]
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(raw))
    paths = [str(tmp_path / "hooks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "POISON": kind, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "batch_rerank.cli", "run", str(tmp_path / "job.yaml")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    scored = {path.stem for path in (tmp_path / "out/_work").glob("*.parquet")}
    if kind == "lost":
        assert done.returncode == 0, done.stderr
        rows = rows_of(tmp_path / "out")
        failed = rows.filter(pc.is_valid(rows["error"])).select(["query_id", "doc_id", "error"]).to_pylist()
        assert failed == [{"query_id": "q12", "doc_id": "d3", "error": "engine: RuntimeError: device-side assert"}]
        assert "1 pairs the engine could not score" in done.stderr
        assert verify(str(tmp_path / "out")).problems == []
        return
    assert done.returncode == 1, done.stderr
    assert "unit 00000-00003 is set aside after 2 tries: its actor died 2 times while scoring it" in done.stderr
    assert "1 of 10 units did not finish: 00000-00003 (its actor died 2 times" in done.stderr
    assert len(scored) == 9 and "00000-00003" not in scored
    environment["POISON"] = ""  # the fault is gone: the same command finishes the job
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0, again.stderr
    assert "resuming: 9 of 10 units are done" in again.stderr
    assert verify(str(tmp_path / "out")).problems == []
    assert len(rows_of(tmp_path / "out")) == 400
