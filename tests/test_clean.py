"""`clean` says what an output takes, and removes what it is told to and nothing else."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Killed, candidate_rows, job, rows_of, scored_only, write
from test_stage import given_as, job_of

import batch_rerank.job.finish as finish
from batch_rerank.job.run import run
from batch_rerank.publish.verify import verify
from batch_rerank.store.filesystem import locate
from batch_rerank.store.lease import hold

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def output(flat_shards: Path, tmp_path: Path) -> Path:
    config = job(flat_shards, tmp_path / "out", output__latest=str(tmp_path / "LATEST.json"), output__trec_run=True)
    run(config, local=True)
    (tmp_path / "out/notes.txt").write_text("theirs")
    return tmp_path / "out"


def names(output: Path) -> set[str]:
    return {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}


def cleaned(cli: Cli, *arguments: object) -> dict[str, object]:
    code, out, _ = cli("clean", *arguments, "--json")
    assert code == 0
    (one,) = json.loads(out)
    return dict(one)


def test_every_file_is_counted_under_one_kind(output: Path, cli: Cli) -> None:
    takes = cleaned(cli, output, "--dry-run")["takes"]
    assert isinstance(takes, dict)
    assert sum(taken["files"] for taken in takes.values()) == len(names(output))
    assert sum(taken["bytes"] for taken in takes.values()) == sum(
        (output / name).stat().st_size for name in names(output)
    )
    counts = {kind: taken["files"] for kind, taken in takes.items()}
    assert (counts["mark"], counts["parts"], counts["scores"], counts["work"], counts["others"]) == (1, 2, 4, 0, 1)


def test_a_dry_run_and_a_clean_output_lose_nothing(output: Path, cli: Cli) -> None:
    before = names(output)
    for arguments in (["--dry-run", "--all", "--force"], []):
        cleaned(cli, output, *arguments)
        assert {name for name in names(output) if "lease" not in name} == {
            name for name in before if "lease" not in name
        }


def test_scores_go_when_told_and_the_output_stays(output: Path, cli: Cli, flat_shards: Path) -> None:
    before = rows_of(output)
    said = cleaned(cli, output, "--scores")
    assert "names it" in str(said["kept"]) and (output / "_scores/00000.parquet").exists()
    cleaned(cli, output, "--scores", "--force")
    assert not [name for name in names(output) if "scores" in name]
    assert rows_of(output) == before and verify(str(output)).problems == []
    assert run(job(flat_shards, output, output__trec_run=True, output__keep_scores=False), local=True).units == 0


def test_all_of_an_old_output_goes_and_what_is_not_ours_stays(output: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "LATEST.json").write_text(json.dumps({"path": str(tmp_path / "newer")}))
    other = tmp_path / "OTHER.json"
    other.write_text(json.dumps({"path": str(output)}))
    assert "OTHER.json names it" in str(cleaned(cli, output, "--all", "--latest", other)["kept"])
    cleaned(cli, output, "--all")
    assert names(output) == {"notes.txt"} and [path.name for path in output.iterdir()] == ["notes.txt"]


def test_no_folder_of_ours_is_left_and_every_other_one(output: Path, cli: Cli) -> None:
    (output / "notes.txt").unlink()
    (output / "_manifest/theirs").mkdir()
    cleaned(cli, output, "--all", "--force")
    assert [str(path.relative_to(output)) for path in output.rglob("*")] == ["_manifest", "_manifest/theirs"]


def test_the_mark_goes_first_and_the_plan_last(output: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from batch_rerank.store.manifest import Manifest

    gone: list[str] = []
    remove = Manifest.remove_seen

    def watched(self: Manifest, name: str, files: object) -> None:
        gone.append(name)
        remove(self, name, files)  # type: ignore[arg-type]

    monkeypatch.setattr(Manifest, "remove_seen", watched)
    cleaned(cli, output, "--all", "--force")
    others = [name for name in gone if not name.startswith("_manifest/lease/")]
    assert others[0] == "_SUCCESS" and others[-1] == "_manifest/plan.json"


def test_an_unfinished_output_keeps_what_a_run_goes_on_from(flat_shards: Path, tmp_path: Path, cli: Cli) -> None:
    out = scored_only(job(flat_shards, tmp_path / "out"))
    for arguments in ([], ["--scores", "--force"]):
        assert "it is not finished" in str(cleaned(cli, out, *arguments)["kept"])
    assert run(job(flat_shards, out), local=True).resumed_units == 6


def test_scores_that_are_not_gathered_yet_are_no_working_files(
    flat_shards: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(finish, "tidy", killed)
        run(job(flat_shards, tmp_path / "out"), local=True)
    cleaned(cli, tmp_path / "out")
    assert len(list((tmp_path / "out/_work").iterdir())) == 6
    assert cli("publish", tmp_path / "out", "--local")[0] == 0


def test_what_is_no_output_or_at_work_is_refused(output: Path, tmp_path: Path, cli: Cli) -> None:
    write(tmp_path / "data/part-00000.parquet", candidate_rows(1, 1))
    code, _, error = cli("clean", tmp_path / "data", "--all")
    assert code == 6 and "no _manifest/plan.json" in error
    assert (tmp_path / "data/part-00000.parquet").exists()
    with hold(locate(str(output)), 60):
        assert cli("clean", output, "--all", "--force")[0] == 4
    (tmp_path / "LATEST.json").write_text("[]")
    code, _, error = cli("clean", output, "--all")
    assert code == 4 and "not what output.latest writes" in error
    assert (output / "_SUCCESS").exists()


def test_a_stage_can_be_removed(tmp_path: Path, cli: Cli) -> None:
    run(job_of(given_as("beir", tmp_path / "in"), tmp_path / "out"), local=True)
    takes = cleaned(cli, tmp_path / "out-stage", "--all")["takes"]
    assert isinstance(takes, dict) and takes["others"]["files"] == 0
    assert names(tmp_path / "out-stage") == set()
