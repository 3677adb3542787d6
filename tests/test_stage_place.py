"""Where a stage is that no job names: every job of the same sources finds it, none writes where it may not, and those
of earlier versions stay in use."""

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import job, rows_of, write
from test_stage import corpus, given_as, jsonl, queries

import batch_rerank.input.stage as stage_module
from batch_rerank.config import Input, JobConfig
from batch_rerank.errors import ConflictError
from batch_rerank.input import contents
from batch_rerank.job.ahead import plan_job
from batch_rerank.job.republish import republish
from batch_rerank.job.run import run
from batch_rerank.job.staging import stage as stage_input
from batch_rerank.publish.clean import clean
from batch_rerank.publish.output import Place
from batch_rerank.publish.verify import verify
from batch_rerank.store.filesystem import Location, list_files, locate
from batch_rerank.store.lease import hold


def unnamed(given: dict[str, Any], output: Path | str, **keys: Any) -> JobConfig:
    """A job of the free scorer whose stage has no name."""
    return job("-", output, **keys).model_copy(update={"input": Input.model_validate({"unit_pairs": 40, **given})})


def stages(folder: Path) -> list[Path]:
    return sorted(folder.glob("_stage-*"))


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    return given_as("beir", tmp_path / "in")


@pytest.mark.parametrize("layout", ["beir", "run of Parquet", "scattered flat"])
def test_another_output_anywhere_finds_the_stage_of_the_same_sources(
    layout: str, tmp_path: Path, logged: list[str]
) -> None:
    given = given_as(layout, tmp_path / "in")
    run(unnamed(given, tmp_path / "a" / "out"), local=True)
    run(unnamed(given, tmp_path / "b" / "other"), local=True)
    folder = {"beir": "in", "run of Parquet": "in/run", "scattered flat": "in/s"}[layout]
    (stage,) = stages(tmp_path / folder)
    assert [message for message in logged if message.startswith(f"staged already at {stage}")]
    assert rows_of(tmp_path / "a" / "out").equals(rows_of(tmp_path / "b" / "other"))
    assert verify(str(stage)).problems == []
    assert not list(tmp_path.rglob("*-stage"))


def test_sources_that_change_get_a_stage_of_their_own(given: dict[str, Any], tmp_path: Path) -> None:
    run(unnamed(given, tmp_path / "monday"), local=True)
    jsonl(tmp_path / "in" / "corpus.jsonl", [*corpus(), {"_id": "new", "text": "more"}])
    run(unnamed(given, tmp_path / "tuesday"), local=True)
    assert len(stages(tmp_path / "in")) == 2
    with pytest.raises(ConflictError, match=r"differs in input\.corpus(.|\n)*here, and not what was staged"):
        run(unnamed(given, tmp_path / "monday"), local=True)
    assert len(stages(tmp_path / "in")) == 2


def test_no_stage_is_written_under_the_name_of_other_sources(given: dict[str, Any], tmp_path: Path) -> None:
    monday = unnamed(given, tmp_path / "monday")
    run(monday, local=True)
    (stage,) = stages(tmp_path / "in")
    clean(Place(str(stage)), "all")
    old = (tmp_path / "in" / "corpus.jsonl").read_bytes()
    jsonl(tmp_path / "in" / "corpus.jsonl", [*corpus(), {"_id": "new", "text": "more"}])
    with pytest.raises(ConflictError):
        run(monday, local=True)
    (tmp_path / "in" / "corpus.jsonl").write_bytes(old)
    assert run(unnamed(given, tmp_path / "tuesday"), local=True).counts["queries"] == 12
    assert (stage / "_SUCCESS").exists()


def test_a_folder_of_any_name_has_its_stage(tmp_path: Path) -> None:
    given = given_as("beir", tmp_path / "ü %20 #1")
    run(unnamed(given, tmp_path / "out"), local=True)
    run(unnamed(given, tmp_path / "other"), local=True)
    assert len(stages(tmp_path / "ü %20 #1")) == 1


def test_untouched_files_are_not_read_again_to_find_their_stage(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage_input(unnamed(given, tmp_path / "one"), local=True)
    hashed: list[str] = []
    check = contents.check_unchanged

    def note(location: Location, file: Any) -> None:
        hashed.append(location.path)
        check(location, file)

    monkeypatch.setattr(contents, "check_unchanged", note)
    assert stage_input(unnamed(given, tmp_path / "two"), local=True).reused
    assert hashed == []
    os.utime(tmp_path / "in" / "corpus.jsonl", (1, 1))
    assert stage_input(unnamed(given, tmp_path / "two"), local=True).reused
    assert hashed == [str(tmp_path / "in" / "corpus.jsonl")]


def test_a_stage_where_earlier_versions_had_it_is_used(
    given: dict[str, Any], tmp_path: Path, logged: list[str]
) -> None:
    named = {**given, "stage": str(tmp_path / "out-stage")}
    run(unnamed(named, tmp_path / "out"), local=True)
    summary = run(unnamed(given, tmp_path / "out"), local=True)
    assert summary.units == 0
    stage_input(unnamed(named, tmp_path / "new"), local=True)
    found = stage_input(unnamed(given, tmp_path / "out-limit-3", output__top_k=2), local=True)
    assert not found.reused, "another output does not know that place"
    assert stage_input(unnamed(given, tmp_path / "out"), local=True).place == str(tmp_path / "out-stage")


def test_one_of_other_sources_there_is_left_and_named(given: dict[str, Any], tmp_path: Path, logged: list[str]) -> None:
    stage_input(unnamed({**given, "stage": str(tmp_path / "out-stage")}, tmp_path / "out"), local=True)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out-stage").rglob("*")}
    jsonl(tmp_path / "in" / "queries.jsonl", [*queries(), {"_id": "new", "text": "more"}])
    found = stage_input(unnamed(given, tmp_path / "out"), local=True)
    assert found.place == str(stages(tmp_path / "in")[0])
    assert f"{tmp_path}/out-stage holds the stage of other sources, and stays" in logged
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out-stage").rglob("*")} == before


def test_where_the_sources_may_not_be_written_it_goes_beside_the_output(
    given: dict[str, Any], tmp_path: Path, logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path / "in") and access(path, mode))
    found = stage_input(unnamed(given, tmp_path / "outs" / "one"), local=True)
    assert found.place == str(stages(tmp_path / "outs")[0])
    assert f"staged beside the output, as {tmp_path}/in may not be written" in logged
    assert stages(tmp_path / "in") == []
    assert stage_input(unnamed(given, tmp_path / "outs" / "two"), local=True).reused


def test_a_store_that_refuses_is_believed(
    given: dict[str, Any], tmp_path: Path, logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a policy of a bucket's prefix does, which nothing shows before the first write."""
    create = Location.create_exclusive

    def refusing(self: Location, data: bytes) -> bool:
        if self.path.startswith(f"{tmp_path}/in/"):
            raise PermissionError("Access Denied")
        return create(self, data)

    monkeypatch.setattr(Location, "create_exclusive", refusing)
    run(unnamed(given, tmp_path / "outs" / "one"), local=True)
    (stage,) = stages(tmp_path / "outs")
    (said,) = (message for message in logged if "not permitted" in message)
    assert said.endswith(f"the stage goes beside the output, to {stage}")
    assert run(unnamed(given, tmp_path / "outs" / "two"), local=True).counts["queries"] == 12
    assert stages(tmp_path / "outs") == [stage]


def test_sources_within_the_output_do_not_draw_the_stage_in(tmp_path: Path) -> None:
    given = given_as("beir", tmp_path / "all")
    given["run"] = given["run"].replace("bm25.run", "*.run")
    assert plan_job(unnamed(given, tmp_path / "all" / "out"), local=True).plan.counts["queries"] == 12
    run(unnamed(given, tmp_path / "all" / "out"), local=True)
    assert len(stages(tmp_path / "all")) == 1


def test_two_jobs_at_once_make_one_stage(given: dict[str, Any], tmp_path: Path, logged: list[str]) -> None:
    place = Path(stage_input(unnamed(given, tmp_path / "one"), local=True).place)
    clean(Place(str(place)), "all")
    assert stages(tmp_path / "in") == [] or not (place / "_manifest" / "plan.json").exists()
    found: list[Any] = []
    with hold(locate(str(place)), 1):
        second = threading.Thread(
            target=lambda: found.append(
                stage_input(unnamed(given, tmp_path / "two", cluster__lease_seconds=1), local=True)
            )
        )
        second.start()
        deadline = time.monotonic() + 60
        while not any("is waited for" in message for message in logged):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not found
    second.join()
    assert found[0].place == str(place)
    assert verify(str(place)).problems == []


def test_jobs_of_one_stage_agree_on_when_one_of_them_is_silent(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = stage_input(unnamed(given, tmp_path / "one", cluster__lease_seconds=300), local=True)
    (Path(first.place) / "_SUCCESS").unlink()
    held: list[float] = []
    monkeypatch.setattr(stage_module, "hold", lambda root, seconds: held.append(seconds) or hold(root, seconds))
    stage_input(unnamed(given, tmp_path / "two", cluster__lease_seconds=1), local=True)
    assert held == [300], "who beats every 25 s is not silent after 1 s"


def test_an_output_outlives_its_stage(given: dict[str, Any], tmp_path: Path, logged: list[str]) -> None:
    config = unnamed(given, tmp_path / "out")
    run(config, local=True)
    expected = rows_of(tmp_path / "out")
    (stage,) = stages(tmp_path / "in")
    assert clean(Place(str(tmp_path / "out")), "work").kept == ""
    assert (stage / "_SUCCESS").exists()
    clean(Place(str(stage)), "all")
    fewer = config.model_copy(update={"output": config.output.model_copy(update={"top_k": 2})})
    assert republish(Place(str(tmp_path / "out"), {}, fewer), local=True).again
    assert any("the stage is gone" in message for message in logged)
    republish(Place(str(tmp_path / "out"), {}, config), local=True)
    assert rows_of(tmp_path / "out").equals(expected)
    assert run(config, local=True).units == 0
    assert (stage / "_SUCCESS").exists(), "made again where the output has it from"


def test_wildcards_of_other_jobs_pass_over_stages(tmp_path: Path) -> None:
    given = given_as("run of Parquet", tmp_path / "in")
    run(unnamed(given, tmp_path / "out"), local=True)
    assert len(stages(tmp_path / "in" / "run")) == 1
    nested = write(tmp_path / "in" / "run" / "other" / "0.parquet", [{"x": 1}])
    for pattern in ("in/run/**/*.parquet", "in/run/*/*.parquet"):
        found = {file.path for file in list_files(locate(f"{tmp_path}/{pattern}"))}
        assert str(nested) in found
        assert not [path for path in found if "_stage-" in path]
    (stage,) = stages(tmp_path / "in" / "run")
    assert list_files(locate(f"{stage}/part-*.parquet")), "but one that is named is read"


def test_a_damaged_stage_of_others_is_no_hindrance(given: dict[str, Any], tmp_path: Path) -> None:
    other = tmp_path / "in" / "_stage-0123456789abcdef" / "_manifest"
    other.mkdir(parents=True)
    (other / "plan.json").write_text("{")
    assert not stage_input(unnamed(given, tmp_path / "out"), local=True).reused
