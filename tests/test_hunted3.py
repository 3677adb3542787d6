"""What was once wrong without a word, the third time: what `publish` and `clean` say they did, and gates that came
late."""

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Killed, job, rows_of, scored_only
from test_gate import AGAINST, Nights, nights  # noqa: F401  (a fixture)

import batch_rerank.job.republish as republishing
from batch_rerank.errors import ConflictError, GateError
from batch_rerank.job.republish import republish
from batch_rerank.job.run import run
from batch_rerank.publish.output import Place
from batch_rerank.publish.verify import verify
from batch_rerank.store.filesystem import Location
from batch_rerank.store.lease import Lease

Cli = Callable[..., tuple[int, str, str]]


def killed(*_: object) -> None:
    raise Killed


# ---- publish says what it did


def test_what_is_published_already_is_said_to_be(flat_shards: Path, tmp_path: Path, cli: Cli) -> None:
    out, latest = tmp_path / "out", tmp_path / "LATEST"
    run(job(flat_shards, out, output__latest=str(latest)), local=True)
    code, told, error = cli("publish", out, "--local", "--json")
    assert code == 0 and "already published; nothing to do: 300 rows" in error
    assert f"output.latest: {latest} names it already" in error
    assert json.loads(told)["stood"] is True
    (out / "_SUCCESS").unlink()
    assert "Z published: 300 rows" in cli("publish", out, "--local")[2]


def test_a_pointer_that_is_gone_is_written_again(flat_shards: Path, tmp_path: Path, cli: Cli) -> None:
    out, latest = tmp_path / "out", tmp_path / "LATEST"
    run(job(flat_shards, out, output__latest=str(latest)), local=True)
    latest.unlink()
    assert f"output.latest: {latest} names it now" in cli("publish", out, "--local")[2]
    assert json.loads(latest.read_text())["path"] == str(out)


def test_a_pointer_that_names_another_is_left_with_a_word(flat_shards: Path, tmp_path: Path, cli: Cli) -> None:
    out, newer, latest = tmp_path / "out", tmp_path / "newer", tmp_path / "LATEST"
    for output in (out, newer):
        run(job(flat_shards, output, output__latest=str(latest)), local=True)
    said = cli("publish", out, "--local")[2]
    assert f"{latest} names {newer} and stays; batch-rerank publish JOB, with the job file, moves it" in said
    config = job(flat_shards, out, output__latest=str(latest))
    done = republish(Place(str(out), {}, config), local=True)
    assert done.latest == f"{latest} names it now, and named {newer} before"
    assert json.loads(latest.read_text())["path"] == str(out)


def test_a_pointer_that_is_none_of_ours_is_left_with_a_word(flat_shards: Path, tmp_path: Path, cli: Cli) -> None:
    out, latest = tmp_path / "out", tmp_path / "LATEST"
    run(job(flat_shards, out, output__latest=str(latest)), local=True)
    latest.write_text("theirs")
    code, _, said = cli("publish", out, "--local")
    assert code == 0 and "names something that is no pointer of ours and stays" in said
    assert latest.read_text() == "theirs"


# ---- gates


def test_a_gate_that_came_with_a_resume_is_judged_by_whoever_publishes(nights: Nights, cli: Cli) -> None:  # noqa: F811
    output = scored_only(nights.job("two"))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr("batch_rerank.job.run.pass_gate", killed)
        run(nights.job("two", gate=AGAINST), local=True)
    assert json.loads(cli("status", output, "--json")[1])["gate"] == "not judged yet"
    code, _, error = cli("publish", output, "--local")
    assert code == 7 and "overlap@10 >= 0.95: found" in error
    assert not (output / "_SUCCESS").exists() and nights.live == "one"
    with pytest.raises(GateError):
        republish(Place(str(output)), local=True)
    assert nights.recorded("two")["lines"][0]["rows"]


def test_a_passed_verdict_does_not_stand_for_a_stricter_gate(nights: Nights) -> None:  # noqa: F811
    output = scored_only(nights.job("two", gate={"error": ["failed <= 0"]}))
    assert nights.recorded("two")["passed"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr("batch_rerank.job.run.pass_gate", killed)
        run(nights.job("two", gate=AGAINST), local=True)
    with pytest.raises(GateError):
        republish(Place(str(output)), local=True)


def test_a_gate_that_is_awaited_and_holds_lets_through(nights: Nights, cli: Cli) -> None:  # noqa: F811
    output = scored_only(nights.job("two"))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr("batch_rerank.job.run.pass_gate", killed)
        run(nights.job("two", gate={"error": ["failed <= 0"]}), local=True)
    assert cli("publish", output, "--local")[0] == 0
    assert nights.recorded("two")["passed"] and nights.recorded("two")["gate"] is None


def test_a_reason_is_of_one_publication(nights: Nights, cli: Cli) -> None:  # noqa: F811
    """Who gave it was killed between the verdict and publishing: the next one has to give theirs."""
    with pytest.raises(GateError):
        run(nights.job("two", gate=AGAINST), local=True)
    output = nights.directory / "two"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(republishing, "finish", killed)
        republish(Place(str(output)), local=True, despite="just a try")
    assert nights.recorded("two")["despite"] == "just a try"
    assert cli("publish", output, "--local")[0] == 7
    assert nights.recorded("two")["despite"] == ""
    assert cli("publish", output, "--local", "--despite-gate", "meant")[0] == 0
    assert nights.recorded("two")["despite"] == "meant"


# ---- clean, and what is left


def test_an_error_at_one_output_hides_nothing_of_the_others(flat_shards: Path, tmp_path: Path, cli: Cli) -> None:
    for name in ("a", "c"):
        run(job(flat_shards, tmp_path / name), local=True)
    outputs = [tmp_path / "a", tmp_path / "none", tmp_path / "c"]
    code, out, error = cli("clean", *outputs, "--scores", "--json")
    assert code == 6 and "1 of 3 outputs could not be looked at or cleaned" in error
    first, second, third = json.loads(out)
    assert first["removed"]["scores"]["files"] > 0 and third["removed"]["scores"]["files"] > 0
    assert (second["output"], second["exit_code"]) == (str(outputs[1]), 6) and "no _manifest/plan.json" in second[
        "error"
    ]
    code, out, error = cli("clean", *outputs)
    assert code == 6 and all(str(output) in error for output in outputs)


def test_nothing_is_left_of_the_working_files(flat_shards: Path, tmp_path: Path) -> None:
    run(job(flat_shards, tmp_path / "out"), local=True)
    assert sorted(os.listdir(tmp_path / "out")) == ["_SUCCESS", "_manifest", "_scores", "part-00000.parquet"]


# ---- late writers that are interrupted: a lost lease wakes its driver with an interrupt


def late(name: str, out: Path, flat_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on whoever creates this file is paused before it until another has published in fewer parts, and is
    interrupted as it wakes."""
    create, asked = Location.create_exclusive, []

    def paused(self: Location, data: bytes) -> bool:
        mine = self.name == name and self.path.startswith(str(out)) and not asked
        if mine:
            asked.append(1)
            republish(Place(str(out), {}, job(flat_shards, out, output__top_k=2)), local=True)
            if name == "_SUCCESS":  # and a third has begun to publish otherwise
                self.remove()
        created = create(self, data)
        if mine:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        return created

    monkeypatch.setattr(Location, "create_exclusive", paused)
    monkeypatch.setattr(Lease, "_wait_for_silence", lambda *_: None)


@pytest.mark.parametrize("name", ["part-00003.parquet", "_SUCCESS"])
def test_an_interrupt_keeps_nobody_from_taking_back(
    name: str, flat_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    config = job(flat_shards, out, output__file_bytes=1)
    late(name, out, flat_shards, monkeypatch)
    with pytest.raises((ConflictError, KeyboardInterrupt)):
        run(config, local=True)
    monkeypatch.undo()
    assert (out / "_SUCCESS").exists() == (name != "_SUCCESS")
    assert [path.name for path in sorted(out.glob("part-*"))] == ["part-00000.parquet"]
    republish(Place(str(out), {}, job(flat_shards, out, output__top_k=2)), local=True)
    assert verify(str(out)).problems == [] and rows_of(out)["rank"].to_pylist() == [1, 2] * 12


def test_a_ray_that_does_not_start_is_no_traceback(
    flat_shards: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy machine: Ray's own limits for its processes are passed."""
    import ray

    def too_late(**_: object) -> None:
        raise Exception("The current node timed out during startup.\nMore of it.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", too_late)
    monkeypatch.setattr(ray, "shutdown", lambda: None)  # there may be the session's own
    file = tmp_path / "job.json"
    file.write_text(job(flat_shards, tmp_path / "out").model_dump_json(exclude={"limit"}))
    code, _, error = cli("run", file)
    assert code == 1 and "no Ray could be started" in error and "timed out during startup.; expected" in error
    assert "More of it" not in error and not (tmp_path / "out/_SUCCESS").exists()
