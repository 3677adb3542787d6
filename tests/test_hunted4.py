"""Defects that were looked for in what is new: models in stores, the operator, nodes that leave, plans of what is
left; and later in pointers, comparisons, ranges and instructions."""

import datetime
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checkpoints import bert_reranker, qwen3_reranker
from conftest import Killed, candidate_rows, job, rows_of, write

import batch_rerank.job.watch as watch_module
import batch_rerank.ray_data as ray_data
import batch_rerank.store.mirror as mirror_module
from batch_rerank import Reranker
from batch_rerank.config import parse_config
from batch_rerank.engine.checkpoint import resolve_model
from batch_rerank.engine.encoded import Group
from batch_rerank.engine.encoding import make_encoder
from batch_rerank.errors import (
    BatchRerankError,
    BudgetError,
    ConfigError,
    ConflictError,
    InputError,
    ModelError,
    StorageError,
    UnfinishedError,
)
from batch_rerank.estimate.forecast import Forecast, nothing_to_score
from batch_rerank.estimate.ranges import Range, distinct, lognormal
from batch_rerank.input.contents import contents
from batch_rerank.input.stage_place import _newest
from batch_rerank.job.estimate import Estimate, deadline_seconds
from batch_rerank.job.republish import refuse_other_scores, republish
from batch_rerank.job.run import run
from batch_rerank.job.watch import Watch
from batch_rerank.judge.compare import compare
from batch_rerank.publish.output import Place
from batch_rerank.ray_data import Rerank
from batch_rerank.score.plan import configured_model
from batch_rerank.score.poison import PoisonedUnitError
from batch_rerank.score.steps import EncodedUnit, LoadedScorer, Member, score_unit
from batch_rerank.score.weights import mirror_model
from batch_rerank.store.failures import denied, input_errors
from batch_rerank.store.fetch import Fetched
from batch_rerank.store.filesystem import File, _file, locate
from batch_rerank.store.latest import read_latest
from batch_rerank.store.manifest import Manifest
from batch_rerank.store.plans import Unit

FREE = {"name": "none", "kind": "checksum"}


def three_pieces(monkeypatch: pytest.MonkeyPatch) -> pa.Table:
    """A batch that the operator scores in three pieces."""
    monkeypatch.setattr(ray_data, "unit_pairs", lambda *given: 1)
    candidates = [{"doc_id": "d", "text": "t"}]
    return pa.Table.from_pylist([{"query_id": str(i), "query": "q", "candidates": candidates} for i in range(3)])


def ends(call: Any, seconds: float = 10) -> bool:
    """Whether a call returns."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def test_a_batch_that_waits_for_its_reader_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, operator = three_pieces(monkeypatch), Rerank(FREE)
    waiting = operator(batch)
    next(waiting)
    assert ends(lambda: list(operator(batch)), 5)
    assert len(list(waiting)) == 2


def test_a_batch_that_failed_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, operator = three_pieces(monkeypatch), Rerank(FREE)
    score = ray_data.score_unit

    def poisoned(*given: Any, **keys: Any) -> Any:
        raise PoisonedUnitError("as if many raised")

    monkeypatch.setattr(ray_data, "score_unit", poisoned)
    with pytest.raises(UnfinishedError) as kept:
        list(operator(batch))
    monkeypatch.setattr(ray_data, "score_unit", score)
    assert ends(lambda: list(operator(batch)), 5)
    assert kept.value


def test_how_a_model_is_reached_makes_no_other_scores_and_is_not_shown(tmp_path: Path) -> None:
    place, secret = "s3://bucket/model", "canary-secret-4711"
    reached = {
        "model__name": place,
        "model__storage_options": {"secret": secret},
        "model__cache_dir": str(tmp_path),
        "model__cache_bytes": 1,
    }
    one, other = (job("in", tmp_path, **keys) for keys in (reached, {"model__name": place}))
    manifest = Manifest(locate(str(tmp_path)))
    for asked, stored in ((one, other), (other, one)):
        refuse_other_scores(manifest, asked, stored)
    with pytest.raises(ConflictError, match=r"model\.name") as refused:
        refuse_other_scores(manifest, one, job("in", tmp_path, model__name="s3://bucket/other"))
    assert secret not in str(refused.value) and "cache_dir" not in str(refused.value)


@pytest.mark.parametrize("replacing", [False, True])
def test_a_copy_on_a_disk_is_no_model_until_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replacing: bool
) -> None:
    models, copy = [bert_reranker(tmp_path / name) for name in ("one", "two")], str(tmp_path / "copy")
    (models[1] / "config.json").write_text((models[1] / "config.json").read_text() + " ")
    given: dict[str, Any] = {"revision": None, "allow_pickle": False, "replacing": replacing}
    if replacing:
        mirror_model(str(models[0]), copy, **given)
    put = mirror_module._put

    def until(*arguments: Any) -> str:
        if arguments[0].name == ("config.json" if replacing else "tokenizer.json"):  # weights are there
            raise Killed
        return put(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(mirror_module, "_put", until)
        mirror_model(str(models[1]), copy, **given)
    with pytest.raises(ModelError, match="a copy that is not finished; expected _MIRROR; wait for"):
        resolve_model(copy)
    mirror_model(str(models[1]), copy, **given)
    assert resolve_model(copy).identity == resolve_model(str(models[1])).identity


def test_a_directory_has_no_revision_to_copy(tmp_path: Path) -> None:
    model = bert_reranker(tmp_path / "one")
    with pytest.raises(ConfigError, match=r"--revision 'v2': .* is a directory here"):
        mirror_model(str(model), str(tmp_path / "copy"), revision="v2", allow_pickle=False, replacing=False)


def test_what_is_scored_is_published_whatever_it_has_cost(tmp_path: Path) -> None:
    config = job("in", tmp_path, cost__max_gpu_hours=1.0, cluster__gpus_per_actor=1)
    Estimate(config, None, nothing_to_score(config, [], 10**9), []).check_budget(spent=2.0)
    some = Forecast(1, 1, seconds=Range.exact(1.0), actor_seconds=Range.exact(1.0))
    with pytest.raises(BudgetError):
        Estimate(config, None, some, []).check_budget(spent=2.0)


def test_a_process_that_was_stopped_has_waited_for_nothing_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, looks = [0.0], [0]

    def wait(seconds: float) -> bool:
        looks[0] += 1
        clock[0] += seconds + (100_000 if looks[0] == 3 else 0)  # stopped here, and woken later
        return looks[0] > 8

    monkeypatch.setattr(watch_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    watch = Watch(lambda: "", seconds=100, poll=1.0, limit=600)
    monkeypatch.setattr(watch, "_ended", SimpleNamespace(wait=wait, is_set=lambda: True))
    watch._watch()
    assert watch.stuck is None and looks[0] == 9


def test_a_refusal_is_one_in_the_words_of_every_store() -> None:
    from azure.core.exceptions import HttpResponseError

    azure = HttpResponseError("AuthorizationPermissionMismatch")
    azure.status_code = 403
    for said in (PermissionError("Access Denied"), OSError("Forbidden: bucket/x\nno storage.objects.create"), azure):
        with pytest.raises(StorageError) as error, input_errors("gs://bucket/x"):
            raise said
        assert denied(error.value), said
    with pytest.raises(StorageError) as error, input_errors("gs://bucket/x"):
        raise ConnectionResetError
    assert not denied(error.value)


def test_a_folder_that_cannot_be_listed_has_no_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["_stage-0123456789abcdef", "_stage-fedcba9876543210"]
    for time, name in enumerate(names):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time, time))
    (tmp_path / "other").mkdir()
    assert _newest(str(tmp_path)) == names[::-1]
    assert _newest(str(tmp_path / "absent")) == []

    def refused(folder: str) -> Any:
        raise PermissionError

    monkeypatch.setattr(os, "scandir", refused)
    assert _newest(str(tmp_path)) == []


def test_a_deadline_without_end_is_none() -> None:
    with pytest.raises(ConfigError, match="no time that can be told"):
        deadline_seconds("9" * 400 + "h", datetime.datetime.now())


def test_a_file_of_the_hub_has_its_contents_version() -> None:
    told = {"name": "datasets/me/x/run.jsonl", "size": 3, "type": "file", "lfs": None, "last_commit": None}
    one, other = (_file({**told, "blob_id": blob}) for blob in ("3e2f5b", "77aa01"))
    assert one.version != other.version and not one.version.startswith("mtime:")


def test_where_nothing_says_when_a_file_was_written_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "run.jsonl").write_text("new")
    url, file = str(tmp_path / "run.jsonl"), File(str(tmp_path / "run.jsonl"), 3, "mtime:")
    with pytest.raises(InputError, match="changed since the plan"):  # read, and then held against the listing
        contents([(url, file)], {(url, 3, "mtime:"): "sha256:old"}, {})


def test_half_a_character_is_named(tmp_path: Path) -> None:
    reranker = Reranker(str(bert_reranker(tmp_path)), device="cpu", self_test=False)
    with pytest.raises(InputError, match=r"pairs\[1\]: the document: found half a character \('\\ud800' at 2\)"):
        reranker.score([("q", "d"), ("q", "d \ud800")])
    with pytest.raises(InputError, match="instruction: found int"):
        reranker.rank("q", ["d"], instruction=5)  # type: ignore[arg-type]


def test_a_copy_does_not_become_a_part_of_its_source(tmp_path: Path) -> None:
    model = bert_reranker(tmp_path / "one")
    before = resolve_model(str(model)).identity
    with pytest.raises(ConfigError, match="which would be another model with it"):
        mirror_model(str(model), str(model / "copy"), revision=None, allow_pickle=False, replacing=False)
    assert resolve_model(str(model)).identity == before


@pytest.mark.parametrize("bundled", [False, True])
def test_requests_repeated_for_weights_and_for_texts_are_both_counted(bundled: bool, tmp_path: Path) -> None:
    """The first unit of an actor has both in one count of its receipt."""
    config = job(tmp_path / "in", tmp_path / "out", cluster__gpus_per_actor=0, cluster__cpus_per_actor=1)
    scorer = LoadedScorer(config, configured_model(config))
    scorer._fetched = Fetched(tmp_path, size=100, seconds=1.0, retries=3)
    rows = pa.table({"doc_id": ["a", "b"], "error": pa.nulls(2, pa.string())})
    encoded = make_encoder(scorer.model).encode([Group("what", ["one", "two"])])
    texts = {"storage_retries": 2}
    unit = Unit("00000-00000", 0, 0, 1, 1, 2)
    members = (Member(unit, 2, 0, texts),) if bundled else ()
    scored = score_unit(EncodedUnit(unit, rows, encoded, 0, {} if bundled else texts, members=members), scorer)
    about = scored.members[0].about if bundled else scored.about
    assert (about["storage_retries"], about["fetched_bytes"]) == (5, 100)


@pytest.mark.parametrize("name", ["in/0.parquet", "notes.txt", "out/part-00000.parquet", "in/new.parquet", "folder"])
def test_the_pointer_to_the_latest_output_takes_the_place_of_no_other_file(name: str, tmp_path: Path) -> None:
    """Before anything is scored; what stands there stays as it is."""
    write(tmp_path / "in" / "0.parquet", candidate_rows(2, 5))
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "folder").mkdir()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    config = job(tmp_path / "in" / "*.parquet", tmp_path / "out", output__latest=str(tmp_path / name))
    with pytest.raises(BatchRerankError, match=r"output\.latest|folder"):
        run(config, local=True)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and "_manifest" not in str(path)}
    assert after == before


@pytest.mark.parametrize(
    ("given", "latest"),
    [("in", "in/new.parquet"), ("link/*", "in/new"), ("in/*.parquet", "link/new.parquet"), ("link", "in/new.parquet")],
)
def test_a_pointer_that_would_be_read_as_input_is_refused_under_each_of_its_names(
    given: str, latest: str, tmp_path: Path
) -> None:
    write(tmp_path / "in" / "0.parquet", candidate_rows(2, 5))
    (tmp_path / "link").symlink_to("in")
    with pytest.raises(ConfigError, match=r"takes in output\.latest"):
        run(job(tmp_path / given, tmp_path / "out", output__latest=str(tmp_path / latest)), local=True)
    assert not (tmp_path / "out" / "_SUCCESS").exists()


def test_what_a_pointer_does_not_touch_it_does_not_refuse(tmp_path: Path) -> None:
    """It may lie beside shards; a sample moves none; a wrong glob is told as one."""
    given = write(tmp_path / "in" / "0.parquet", candidate_rows(3, 5)).parent
    latest = given / "LATEST.json"
    for _ in range(2):
        run(job(given, tmp_path / "out", output__latest=str(latest)), local=True)
    assert '"rows": 15' in latest.read_text()
    latest.write_text("theirs")
    sample = parse_config({**job(given, tmp_path / "sample", output__latest=str(latest)).model_dump(), "limit": 2}, "t")
    run(sample, local=True)
    assert latest.read_text() == "theirs"
    latest.write_text('{"path": "elsewhere", "rows": "many"}')
    assert read_latest(locate(str(latest))) == "elsewhere"
    with pytest.raises(InputError, match="not a glob"):
        run(job(given / "a**.parquet", tmp_path / "other", output__latest=str(latest)), local=True)


def test_an_output_is_published_by_its_path_though_its_input_is_out_of_reach(tmp_path: Path) -> None:
    given, out = write(tmp_path / "in" / "0.parquet", candidate_rows(2, 5)), tmp_path / "out"
    run(job(given, out, output__latest=str(tmp_path / "LATEST.json")), local=True)
    (out / "_SUCCESS").unlink()
    with pytest.MonkeyPatch.context() as patch:

        def reach(url: str, *rest: Any) -> Any:
            if "in/0.parquet" in url:
                raise StorageError("the input needs credentials that a job file has")
            return locate(url, *rest)

        patch.setattr("batch_rerank.input.places.locate", reach)
        republish(Place(str(out)), local=True)
    assert (out / "_SUCCESS").exists()


@pytest.mark.parametrize("name", ["notes.txt", "out/LATEST.json", "in/0.parquet"])
def test_a_publisher_refuses_a_pointer_before_it_withdraws(name: str, tmp_path: Path) -> None:
    given, out = write(tmp_path / "in" / "0.parquet", candidate_rows(2, 5)), tmp_path / "out"
    (tmp_path / "notes.txt").write_text("mine")
    run(job(given, out), local=True)
    before = {path: path.read_bytes() for path in [given, *out.glob("*")] if path.is_file()}
    other = job(given, out, output__top_k=1, output__latest=str(tmp_path / name))
    with pytest.raises(BatchRerankError, match=r"output\.latest"):
        republish(Place(str(out), {}, other), local=True)
    assert {path: path.read_bytes() for path in [given, *out.glob("*")] if path.is_file()} == before


def test_outputs_without_rows_are_compared(tmp_path: Path) -> None:
    candidate = pa.struct({"doc_id": pa.string(), "text": pa.string()})
    empty = {"query_id": ["q0"], "query": ["x"], "candidates": pa.array([[]], pa.list_(candidate))}
    (tmp_path / "empty").mkdir()
    pq.write_table(pa.table(empty), tmp_path / "empty" / "0.parquet")
    write(tmp_path / "in" / "0.parquet", candidate_rows(2, 5))
    run(job(tmp_path / "empty", tmp_path / "none", input__layout="nested"), local=True)
    run(job(tmp_path / "in", tmp_path / "some"), local=True)
    for old, new in (("none", "some"), ("some", "none"), ("none", "none")):
        compared = compare(Place(str(tmp_path / old)), Place(str(tmp_path / new)))
        assert compared.queries == 0


def test_a_skewed_range_stays_as_wide_as_it_was_beside_a_small_second_cause() -> None:
    spread = Range(30_010, 112_538, 400_000, 3_139_163).spread(0.05)
    assert spread.p50 == 112_538
    assert spread.low == pytest.approx(30_010, rel=0.01)
    assert spread.p90 == pytest.approx(400_000, rel=0.01) and spread.high == pytest.approx(3_139_163, rel=0.01)
    assert lognormal(10.0, 0.3).spread(0.4).high == pytest.approx(lognormal(10.0, 0.5).high)
    assert Range(0, 5, 6, 9).spread(0.1).high > 9


def test_a_sample_whose_first_half_has_no_text_is_counted() -> None:
    nothing = np.empty(0, np.uint64)
    assert distinct([nothing, np.arange(5, dtype=np.uint64)], 50).low == 5


@pytest.mark.parametrize("order", [[0, 1, 2], [1, 0, 2]])
def test_an_instruction_is_its_querys_also_where_its_own_row_has_no_text(order: list[int], tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"query_id": "q", "query": "x", "instruction": "find it", "doc_id": "d0", "text": None},
        {"query_id": "q", "query": "x", "instruction": None, "doc_id": "d1", "text": "foo"},
        {"query_id": "r", "query": "x", "instruction": None, "doc_id": "d1", "text": "foo"},
    ]
    model = {"model__name": str(qwen3_reranker(tmp_path / "model")), "model__kind": "auto", "model__max_length": 128}
    given = write(tmp_path / "in.parquet", [rows[at] for at in order])
    config = job(given, tmp_path / "out", scoring__max_failed_rows=1.0, **model)
    run(config, local=True)
    scores = {(row["query_id"], row["doc_id"]): row["score"] for row in rows_of(tmp_path / "out").to_pylist()}
    reranker = Reranker(model["model__name"], max_length=128)
    expected = [*reranker.score([("x", "foo")], "find it"), *reranker.score([("x", "foo")])]
    assert [scores["q", "d1"], scores["r", "d1"]] == pytest.approx(expected, abs=1e-4)
    assert abs(expected[0] - expected[1]) > 1e-2
