"""What was once wrong without a word, the second time: what `clean` removes, and late writers that take back."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import Killed, candidate_rows, job, rows_of, scored_only, write
from test_stage import given_as, job_of

import batch_rerank.publish.clean as cleaning
from batch_rerank.errors import ConflictError
from batch_rerank.job import republish as republishing
from batch_rerank.job.republish import model_of, republish
from batch_rerank.job.run import run
from batch_rerank.publish.clean import clean
from batch_rerank.publish.output import Place
from batch_rerank.publish.parts import publish_part
from batch_rerank.publish.publish import _works
from batch_rerank.publish.verify import verify
from batch_rerank.store.bookkeeping import mark_done
from batch_rerank.store.filesystem import File, Location, locate
from batch_rerank.store.lease import Lease, _latest, hold
from batch_rerank.store.manifest import Manifest
from batch_rerank.store.scan import scan

Cli = Callable[..., tuple[int, str, str]]


# ---- what a pointer names


@pytest.mark.parametrize("spelling", ["{}/", "/{}", "{}/.", "{}/../out", "link", "file://{}"])
def test_an_output_is_named_however_its_path_is_spelled(spelling: str, flat_shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(job(flat_shards, out, output__latest=str(tmp_path / "LATEST")), local=True)
    (tmp_path / "link").symlink_to(out)
    given = str(tmp_path / "link") if spelling == "link" else spelling.format(out)
    said = clean(Place(given), "all")
    assert "names it" in said.kept and (out / "_SUCCESS").exists()


def test_a_pointer_with_a_relative_name_is_found_from_anywhere(
    flat_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    run(job(flat_shards, out, output__latest="LATEST"), local=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    said = clean(Place(str(out)), "all")
    assert "names it" in said.kept and (out / "_SUCCESS").exists()


def test_the_pointer_of_who_published_last_counts(flat_shards: Path, tmp_path: Path) -> None:
    """The plan knows the pointer of the job that has planned, and another has published since."""
    out, latest = tmp_path / "out", tmp_path / "LATEST"
    run(job(flat_shards, out), local=True)
    republish(Place(str(out), {}, job(flat_shards, out, output__latest=str(latest))), local=True)
    assert json.loads(latest.read_text())["path"] == str(out)
    assert "names it" in clean(Place(str(out)), "all").kept


def test_a_finished_job_that_is_given_a_pointer_leaves_it_and_publishing_moves_it(
    flat_shards: Path, tmp_path: Path
) -> None:
    """Else an old night that is run again would take the pointer from a newer one."""
    out, latest = tmp_path / "out", tmp_path / "LATEST"
    config = job(flat_shards, out, output__latest=str(latest))
    run(job(flat_shards, out), local=True)
    run(config, local=True)
    assert not latest.exists()
    assert republish(Place(str(out), {}, config), local=True).stood
    assert json.loads(latest.read_text())["path"] == str(out)


# ---- what clean removes


@pytest.mark.parametrize("gone", ["part-00000.parquet", "_manifest/parts/00000.json"])
def test_scores_are_kept_while_a_part_lacks(gone: str, flat_shards: Path, tmp_path: Path) -> None:
    """`_SUCCESS` is there, and somebody has removed a part: its scores are all that is left of its rows."""
    out = tmp_path / "out"
    config = job(flat_shards, out)
    run(config, local=True)
    before = rows_of(out)
    (out / gone).unlink()
    clean(Place(str(out)), "scores")
    assert (out / "_scores/00000.parquet").exists()
    assert run(config, local=True).units == 0 and rows_of(out) == before


def test_parts_that_are_not_ours_stay(flat_shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(job(flat_shards, out), local=True)
    write(out / "part-00099.parquet", candidate_rows(1, 1))
    said = clean(Place(str(out)), "all")
    assert (out / "part-00099.parquet").exists() and said.takes["others"].files == 1


def while_waiting(act: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Something happens between the first look of `clean` and its lease, for which it may wait a minute."""

    @contextmanager
    def waited(root: Location, seconds: float) -> Iterator[Lease]:
        act()
        with hold(root, seconds) as lease:
            yield lease

    monkeypatch.setattr(cleaning, "hold", waited)


def test_scores_stay_of_what_another_job_withdraws_meanwhile(
    flat_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run(job(flat_shards, out), local=True)

    def withdrawn() -> None:
        def stop(*_: object) -> None:
            raise Killed

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(republishing, "finish", stop)
            republish(Place(str(out), {}, job(flat_shards, out, output__top_k=2)), local=True)

    while_waiting(withdrawn, monkeypatch)
    clean(Place(str(out)), "scores")
    assert not (out / "_SUCCESS").exists() and (out / "_scores/00000.parquet").exists()


def test_what_a_pointer_names_meanwhile_stays(
    flat_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, latest = tmp_path / "out", tmp_path / "LATEST"
    run(job(flat_shards, out, output__latest=str(latest)), local=True)
    told = latest.read_bytes()
    latest.unlink()
    while_waiting(lambda: latest.write_bytes(told), monkeypatch)
    assert "names it" in clean(Place(str(out)), "all").kept and (out / "_SUCCESS").exists()


def test_another_job_that_has_taken_the_place_meanwhile_stays(
    flat_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run(job(flat_shards, out), local=True)
    other = write(tmp_path / "other/0.parquet", candidate_rows(2, 3))

    def replaced() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(cleaning, "hold", hold)
            clean(Place(str(out)), "all")
        run(job(other, out), local=True)

    while_waiting(replaced, monkeypatch)
    with pytest.raises(ConflictError):
        clean(Place(str(out)), "all")
    assert len(rows_of(out)) == 6 and verify(str(out)).problems == []


def test_the_lease_of_a_job_that_follows_stays(
    flat_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the output between the end of the lease of `clean` and the removal of that."""
    out = tmp_path / "out"
    run(job(flat_shards, out), local=True)
    release, following = Lease.release, []

    def released(self: Lease) -> None:
        release(self)
        if not following:
            following.append(Lease(self._root, 60))
            following[0].take()

    monkeypatch.setattr(Lease, "release", released)
    clean(Place(str(out)), "all")
    try:
        with pytest.raises(ConflictError), hold(locate(str(out)), 60):
            pass
    finally:
        release(following[0])


def test_a_paused_job_whose_output_is_removed_does_not_finish_it(
    flat_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It wakes behind its last look at the units, long after `clean --all` took its lease over."""
    out, latest = tmp_path / "out", tmp_path / "LATEST"
    config = job(flat_shards, out, output__file_bytes=1, output__latest=str(latest))
    import batch_rerank.publish.publish as publishing

    done = publishing.mark_done

    def paused(*arguments: Any) -> None:
        with monkeypatch.context() as patch:  # the holder is of another machine, and silent
            patch.setattr(Lease, "_wait_for_silence", lambda *_: None)
            clean(Place(str(out)), "all")
        done(*arguments)

    monkeypatch.setattr(publishing, "mark_done", paused)
    with pytest.raises(ConflictError):
        run(config, local=True)
    assert not (out / "_SUCCESS").exists() and not latest.exists()


@pytest.mark.parametrize("what", ["scores", "all"])
@pytest.mark.parametrize("at", range(0, 24, 3))
def test_a_clean_that_is_killed_is_taken_up_by_a_run_and_by_a_clean(
    what: Any, at: int, flat_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    config = job(flat_shards, out, output__file_bytes=9000, output__trec_run=True)
    run(config, local=True)
    before = rows_of(out)
    remove, count = Location.remove_seen, []

    def killed(self: Location, seen: File) -> bool:
        count.append(1)
        if len(count) > at:
            raise Killed
        return remove(self, seen)

    monkeypatch.setattr(cleaning, "REMOVALS", 1)
    monkeypatch.setattr(Location, "remove_seen", killed)
    with suppress(Killed):
        clean(Place(str(out)), what)
    monkeypatch.undo()
    run(config, local=True)
    assert rows_of(out) == before and verify(str(out)).problems == []
    clean(Place(str(out)), "all")
    assert not [path for path in out.rglob("*") if path.is_file()]


@pytest.mark.xfail(strict=True, reason="a stage does not know who reads it")
def test_a_stage_that_an_unfinished_output_reads_stays(tmp_path: Path) -> None:
    scored_only(job_of(given_as("beir", tmp_path / "in"), tmp_path / "out"))
    assert clean(Place(str(tmp_path / "out-stage")), "all").kept


def test_scores_that_are_not_kept_go_without_what_is_not_ours(flat_shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(job(flat_shards, out), local=True)
    (out / "_scores/notes.txt").write_text("theirs")
    config = job(flat_shards, out, output__keep_scores=False)
    run(config, local=True)
    assert [path.name for path in (out / "_scores").iterdir()] == ["notes.txt"]
    before = (out / "_manifest/status.json").stat().st_mtime_ns
    assert run(config, local=True).units == 0  # finished: nothing is written
    assert (out / "_manifest/status.json").stat().st_mtime_ns == before


# ---- late writers


def test_a_late_worker_takes_no_part_back_that_its_successor_made(
    flat_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was paused while it made its part; the job was taken over, and its successor has published the same."""
    out = tmp_path / "out"
    config = job(flat_shards, out, output__file_bytes=1)
    run(config, local=True)
    manifest = Manifest(locate(str(out)))
    plan = manifest.read_plan()
    assert plan is not None
    found = scan(manifest, plan)
    assert found.publication is not None
    with hold(manifest.root, 60):
        pass  # the successor
    (work,) = _works(found.publication, plan, found, [0], _latest(manifest.root)[0] - 1)  # type: ignore[index]
    with pytest.raises(ConflictError):
        publish_part(work, config, model_of(plan))
    assert len(rows_of(out)) == 300 and verify(str(out)).problems == []


def test_a_late_worker_takes_back_what_it_wrote_and_not_what_took_its_place(
    flat_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was paused between the creation of its part and its look at it."""
    out = tmp_path / "out"
    config = job(flat_shards, out, output__file_bytes=1)
    run(config, local=True)
    manifest = Manifest(locate(str(out)))
    plan = manifest.read_plan()
    assert plan is not None
    found = scan(manifest, plan)
    assert found.publication is not None
    (work,) = _works(found.publication, plan, found, [0], _latest(manifest.root)[0])  # type: ignore[index]
    (out / "part-00000.parquet").unlink()
    create, asked = Location.create_exclusive, []

    def paused(self: Location, data: bytes) -> bool:
        created = create(self, data)
        if self.name == "part-00000.parquet" and not asked:
            asked.append(1)
            republish(Place(str(out), {}, job(flat_shards, out, output__top_k=2)), local=True)
        return created

    monkeypatch.setattr(Location, "create_exclusive", paused)
    with pytest.raises(ConflictError):
        publish_part(work, config, model_of(plan))
    assert len(rows_of(out)) == 24 and verify(str(out)).problems == []


def test_a_late_driver_takes_back_its_mark_and_not_its_successors(
    flat_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was paused between the creation of `_SUCCESS` and its look at it."""
    out = tmp_path / "out"
    config = job(flat_shards, out)
    run(config, local=True)
    manifest = Manifest(locate(str(out)))
    plan, mark = manifest.read_plan(), manifest.read_mark()
    assert plan is not None and mark is not None
    (out / "_SUCCESS").unlink()
    create, asked = Location.create_exclusive, []

    def paused(self: Location, data: bytes) -> bool:
        created = create(self, data)
        if self.name == "_SUCCESS" and not asked:
            asked.append(1)
            republish(Place(str(out), {}, job(flat_shards, out, output__top_k=2)), local=True)
        return created

    class Late:
        id = "late"

        def check(self) -> None:
            if asked:
                raise ConflictError("taken over")

    monkeypatch.setattr(Location, "create_exclusive", paused)
    with pytest.raises(ConflictError):
        mark_done(manifest, plan, mark, Late())  # type: ignore[arg-type]
    assert verify(str(out)).problems == [] and (out / "_SUCCESS").exists()


# ---- publishing again


@pytest.mark.parametrize(
    "keys", [{"input__candidates_per_query": 3}, {"input__max_missing": 0.5}], ids=["other", "same"]
)
def test_what_was_staged_otherwise_is_not_published_as_this_jobs(keys: dict[str, Any], tmp_path: Path) -> None:
    config = job_of(given_as("beir", tmp_path / "in"), tmp_path / "out")
    run(config, local=True)
    changed = config.model_copy(
        update={
            "input": config.input.model_copy(update={name.removeprefix("input__"): v for name, v in keys.items()}),
            "output": config.output.model_copy(update={"top_k": 5}),
        }
    )
    if "input__max_missing" in keys:
        assert republish(Place(str(tmp_path / "out"), {}, changed), local=True).again
        return
    with pytest.raises(ConflictError, match="candidates_per_query"):
        republish(Place(str(tmp_path / "out"), {}, changed), local=True)


@pytest.mark.parametrize("name", ["plain", "with [1]"])
def test_a_staged_output_is_published_again_wherever_it_lies(name: str, tmp_path: Path) -> None:
    config = job_of(given_as("beir", tmp_path / "in"), tmp_path / name / "out")
    run(config, local=True)
    changed = config.model_copy(update={"output": config.output.model_copy(update={"top_k": 5})})
    assert republish(Place(str(tmp_path / name / "out"), {}, changed), local=True).again


def test_a_sample_published_again_moves_no_pointer(flat_shards: Path, tmp_path: Path) -> None:
    latest = tmp_path / "LATEST"
    config = job(flat_shards, tmp_path / "out", output__latest=str(latest), output__top_k=9)
    config = config.model_copy(update={"limit": 2})
    run(config, local=True)
    republish(Place(config.output.path), local=True)
    changed = config.model_copy(update={"output": config.output.model_copy(update={"top_k": 5})})
    republish(Place(config.output.path, {}, changed), local=True)
    assert not latest.exists()


def test_an_older_output_that_is_published_as_it_was_takes_no_pointer(flat_shards: Path, tmp_path: Path) -> None:
    latest = tmp_path / "LATEST"
    for name in ("older", "newer"):
        run(job(flat_shards, tmp_path / name, output__latest=str(latest)), local=True)
    assert not republish(Place(str(tmp_path / "older")), local=True).again
    assert json.loads(latest.read_text())["path"] == str(tmp_path / "newer")


@pytest.mark.xfail(strict=True, reason="a plan keeps the places of its first run")
def test_an_output_whose_input_has_moved_is_verified_and_published_again(flat_shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(job(flat_shards, out), local=True)
    flat_shards.rename(tmp_path / "moved")
    assert run(job(tmp_path / "moved", out), local=True).units == 0
    moved = job(tmp_path / "moved", out, output__top_k=2)
    assert verify(Place(str(out), {}, moved)).problems == []
    assert republish(Place(str(out), {}, moved), local=True).again
