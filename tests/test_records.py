"""Records on storage are somebody's bytes: whatever stands there, nothing outside the output is touched, and what
cannot be understood ends in one of our errors."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import candidate_rows, job, rows_of, scored_only, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batch_rerank.errors import BatchRerankError, ConfigError, StorageError
from batch_rerank.input.notes import Note
from batch_rerank.job.run import run
from batch_rerank.judge.evaluate import evaluate
from batch_rerank.publish.output import Place
from batch_rerank.publish.status import status_of_output
from batch_rerank.publish.verify import verify
from batch_rerank.score.attempts import Attempts
from batch_rerank.store.filesystem import locate
from batch_rerank.store.manifest import Manifest
from batch_rerank.store.plans import Plan
from batch_rerank.store.receipts import Receipt
from batch_rerank.store.records import Mark, parse
from batch_rerank.store.verdict import Verdict

Cli = Callable[..., tuple[int, str, str]]
UNIT = "00000-00000"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    run(job(write(tmp_path / "in.parquet", candidate_rows(4, 25)), tmp_path / "out"), local=True)
    return tmp_path / "out"


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize("verb", [("verify", "--repair"), ("verify",), ("status",)])
def test_a_unit_whose_id_is_a_path_touches_nothing_outside(
    verb: tuple[str, ...], output: Path, tmp_path: Path, cli: Cli
) -> None:
    (tmp_path / "victim").mkdir()
    precious = [tmp_path / "victim" / name for name in ("precious.parquet", "precious.json")]
    for file in precious:
        file.write_text("precious")
    (output / "part-..").mkdir()
    edit(output / "_manifest/plan.json", lambda plan: plan["units"][0].__setitem__(0, "../../../victim/precious"))
    code, _, shown = cli(verb[0], output, *verb[1:])
    assert code == 6 and "not a plan (units.0.0: " in shown
    assert all(file.read_text() == "precious" for file in precious)


PLANS: list[Any] = [
    None,
    5,
    [],
    "plan",
    {},
    {"manifest_version": 1},
    {"manifest_version": "1"},
    {"manifest_version": 2},
    {"manifest_version": 1, "fingerprint": 1, "config": {}, "shards": [], "units": []},
    {"manifest_version": 1, "fingerprint": "f", "config": [], "shards": [], "units": []},
    {"manifest_version": 1, "fingerprint": "f", "config": {}, "shards": [], "units": []},
    {"manifest_version": 1, "fingerprint": "f", "config": {"stage": True}, "shards": [], "units": []},
    {"manifest_version": 1, "fingerprint": "f", "config": {}, "shards": [], "units": [["00000-00000", 0, 0, 1, 1, 1]]},
]


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: json.dumps(plan)[:60])
def test_a_plan_of_another_shape_ends_in_one_of_our_errors(
    plan: object, output: Path, tmp_path: Path, cli: Cli
) -> None:
    (output / "_manifest/plan.json").write_text(json.dumps(plan))
    (tmp_path / "qrels").write_text("q0 0 d0 1\n")
    for arguments in (
        ("status", output),
        ("verify", output),
        ("verify", output, "--repair"),
        ("evaluate", "--run", output, "--qrels", tmp_path / "qrels"),
    ):
        code, _, shown = cli(*arguments)
        assert code in (0, 6) and "Traceback" not in shown, shown
    with pytest.raises(BatchRerankError):
        run(job(tmp_path / "in.parquet", output), local=True)


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a lease of 1e9 seconds": (lambda p: p["config"]["cluster"].update(lease_seconds=1e9), "cluster.lease_seconds"),
    "no cluster": (lambda p: p["config"].update(cluster=7), "cluster"),
    "a layout of a later version": (lambda p: p["config"]["output"].update(layout="heap"), "written by batch_rerank 0"),
    "a unit twice": (lambda p: p["units"].append(p["units"][-1]), "a unit stands twice"),
    "units that overlap": (lambda p: p["units"][1].__setitem__(2, 0), "overlaps another"),
    "units out of order": (lambda p: p["units"].reverse(), "out of order"),
    "a unit beyond its shard": (lambda p: p["units"][-1].__setitem__(3, 10**9), "beyond its shard"),
    "a unit of no shard": (lambda p: p["units"][-1].__setitem__(1, 9), "beyond its shard"),
    "a negative row": (lambda p: p["units"][0].__setitem__(2, -1), "greater than or equal to 0"),
    "a shard on the net": (lambda p: p["shards"][0].__setitem__(0, "http://10.0.0.1/x"), "expected a local path"),
    "a shard through a cache": (
        lambda p: p["shards"][0].__setitem__(0, "simplecache::s3://a/b"),
        "expected a local path",
    ),
    "a shard in an archive": (lambda p: p["shards"][0].__setitem__(0, "zip://a"), "expected a local path"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_plan_that_planning_does_not_make(name: str, output: Path, cli: Cli) -> None:
    change, message = CHANGES[name]
    edit(output / "_manifest/plan.json", change)
    code, _, shown = cli("verify", output, "--repair")
    assert code == 6 and message in shown, shown


def test_a_plan_keeps_to_what_it_knows_of_another_versions_fields(output: Path) -> None:
    edit(output / "_manifest/plan.json", lambda plan: plan.update(invented={"later": 1}))
    edit(output / "_manifest/plan.json", lambda plan: plan.pop("notes"))
    assert verify(str(output)).problems == []


def test_an_input_from_where_a_plan_may_not_read_is_refused_before_it_is_planned_for(tmp_path: Path) -> None:
    plan = json.loads(Path(run_plan(tmp_path)).read_text())
    url = "http://host/x.parquet"
    with pytest.raises(StorageError, match="expected a local path"):
        Plan.from_json(json.dumps({**plan, "shards": [[url, *plan["shards"][0][1:]]]}).encode(), "here")
    made = Plan.from_json(json.dumps(plan).encode(), "here")
    object.__setattr__(made.shards[0], "url", url)
    with pytest.raises(ConfigError, match="expected a local path"):
        Manifest(locate(str(tmp_path / "new"))).write_plan(made)


def run_plan(tmp_path: Path) -> Path:
    run(job(write(tmp_path / "in.parquet", candidate_rows(4, 25)), tmp_path / "made"), local=True)
    return tmp_path / "made/_manifest/plan.json"


@pytest.mark.parametrize(
    "change",
    [
        lambda receipt: receipt.update(invented=[1], later={"a": 2}),
        lambda receipt: [receipt.pop(name) for name in ("scorer", "seconds", "self_test", "etag", "storage_retries")],
    ],
    ids=["newer", "older"],
)
def test_a_receipt_of_another_version_costs_no_scored_unit(
    change: Callable[[dict[str, Any]], object], output: Path, tmp_path: Path
) -> None:
    for receipt in (output / "_manifest/receipts").iterdir():
        edit(receipt, change)
    (output / "_SUCCESS").unlink()
    assert run(job(tmp_path / "in.parquet", output), local=True).units == 0
    assert verify(str(output)).problems == []


def test_a_score_file_of_a_version_that_counted_less_is_adopted(output: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    scored_only(job(tmp_path / "in.parquet", tmp_path / "scored"))
    part = tmp_path / "scored" / f"_work/{UNIT}.parquet"
    table = pq.read_table(part)
    metadata = dict(table.schema.metadata)
    counts = json.loads(metadata[b"batch_rerank.counts"])
    del counts["engine_failed"]
    metadata[b"batch_rerank.counts"] = json.dumps({**counts, "invented": 3}).encode()
    pq.write_table(table.replace_schema_metadata(metadata), part, compression="none")
    theirs = hashlib.sha256(part.read_bytes()).hexdigest()
    (tmp_path / f"scored/_manifest/receipts/{UNIT}.json").unlink()
    assert run(job(tmp_path / "in.parquet", tmp_path / "scored"), local=True).units == 1
    assert json.loads((tmp_path / f"scored/_manifest/receipts/{UNIT}.json").read_text())["sha256"] == theirs
    assert verify(str(tmp_path / "scored")).problems == []


HOSTILE_LEASES = [
    b"null",
    b'{"id": "x", "host": "\\u001b[2J", "machine": "", "pid": 1, "process": "", "since": ""}',
    b'{"id": "x", "host": "h", "machine": "m", "pid": "../..", "process": "", "since": ""}',
    b"[" * 10_000,
]


@pytest.mark.parametrize("content", HOSTILE_LEASES)
def test_a_lease_of_another_shape_counts_as_silent_and_odd_names_are_passed_over(content: bytes, output: Path) -> None:
    folder = output / "_manifest/lease"
    for name in ("٣", "9" * 40, "x", "007", "-1"):
        (folder / name).write_text("{}")
    (folder / "2").write_bytes(content)
    edit(output / "_manifest/plan.json", lambda plan: plan["config"]["cluster"].update(lease_seconds=1))
    assert verify(str(output), repair=True).problems == []
    assert (folder / "3").exists()


@pytest.mark.parametrize("content", [b"null", b"{}", b"\xff", b'{"units": ["../../x"], "loading": false}'])
def test_an_actors_diary_of_another_shape_is_begun_anew(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    attempts = Attempts(locate(str(tmp_path / "a.json")), restarted=True)
    assert attempts.begin(UNIT) is None and attempts.tries(UNIT) == 1


def test_files_of_others_stay(output: Path, tmp_path: Path) -> None:
    """Below the output, other programs have files that look a little like ours."""
    theirs = [
        "editor.tmp",
        ".swap.tmp",
        "sub/part.tmp",
        "sub/.0123456789abcdef0123456789abcdef.tmp",
        "_manifest/attempts/notes.txt",
        "_manifest/attempts/../notes.json",
        "_manifest/failures/what-we-saw.json",
        "run.trec",
    ]
    for name in theirs:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text("theirs")
    ours = ["." + "a" * 32 + ".tmp", "_manifest/receipts/." + "b" * 32 + ".tmp", "_manifest/attempts/0af3.json"]
    for name in ours:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text("ours")
    (output / f"_manifest/receipts/{UNIT}.json").unlink()
    run(job(tmp_path / "in.parquet", output), local=True)
    assert [name for name in theirs if not (output / name).exists()] == []
    assert [name for name in ours if (output / name).exists()] == []


def test_a_manifest_that_is_a_link_to_elsewhere_removes_nothing_there(output: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (output / "_manifest").rename(elsewhere)
    (output / "_manifest").symlink_to(elsewhere)
    before = {path: path.read_bytes() for path in elsewhere.glob("receipts/*")}
    (output / "part-00000.parquet").unlink()
    with pytest.raises(StorageError, match="do not show in a listing"):
        run(job(tmp_path / "in.parquet", output), local=True)
    assert before.keys() <= {*elsewhere.glob("receipts/*")}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)


def mutated(value: Any, data: st.DataObject) -> Any:
    """A record with one of its values, at any depth, replaced, removed or doubled."""
    where, key = None, None
    inner = value
    while isinstance(inner, dict | list) and inner and (where is None or data.draw(st.booleans())):
        where, key = inner, data.draw(st.sampled_from([*inner] if isinstance(inner, dict) else [*range(len(inner))]))
        inner = inner[key]
    assert where is not None
    kind = data.draw(st.sampled_from(["replace", "remove", "double"]))
    if kind == "replace":
        where[key] = data.draw(JSON | st.sampled_from(["../../x", "/etc/passwd", 10**30, -1, 1e300, float("nan")]))
    elif kind == "remove":
        del where[key]
    elif isinstance(where, list):
        where.append(where[key])
    return value


RECORDS = [
    *("plan.json", "status.json", f"receipts/{UNIT}.json", "lease/1", "../_SUCCESS", f"damaged/{UNIT}.json"),
    *(
        "publication.json",
        "gate.json",
        "parts/00000.json",
        "scores/00000.json",
        "damaged/part-00000.json",
        "damaged/scores-00000.json",
    ),
    "receipts/rolled-00000.jsonl",
]


@settings(
    max_examples=250,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_any_record_in_any_place_ends_in_our_errors_and_touches_nothing_else(data: st.DataObject, output: Path) -> None:
    manifest, outside = output / "_manifest", output.parent / "outside.json"
    outside.write_text("kept")
    (manifest / "damaged").mkdir(exist_ok=True)
    edit_lease(manifest)
    file = manifest / data.draw(st.sampled_from(RECORDS))
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    if data.draw(st.booleans()) or not file.exists():
        file.write_bytes(data.draw(st.binary(max_size=30) | JSON.map(lambda value: json.dumps(value).encode())))
    else:
        file.write_text(json.dumps(mutated(json.loads(file.read_text()), data)))
    try:
        for call in (status, check, mend):
            try:
                call(output)
            except BatchRerankError as error:
                assert str(error)
        assert outside.read_text() == "kept"
        assert all(path.exists() for path in before if path not in (output / "_SUCCESS", file))
    finally:
        for path in [path for path in output.rglob("*") if path.is_file()]:
            if path not in before:
                path.unlink()
        for path, content in before.items():
            path.write_bytes(content)


def edit_lease(manifest: Path) -> None:
    """A fast lease, so that a damaged one is waited for a second only."""
    edit(manifest / "plan.json", lambda plan: plan["config"]["cluster"].update(lease_seconds=1))


def status(output: Path) -> None:
    status_of_output(Place(str(output)))


def check(output: Path) -> None:
    verify(str(output), output_only=True)


def mend(output: Path) -> None:
    verify(str(output), repair=True)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(content=st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_a_record_or_a_value_error(content: bytes) -> None:
    for read in (
        lambda: Plan.from_json(content, "here"),
        lambda: Receipt.from_json(content, "here"),
        lambda: Note.from_bytes(content, 0, 1),
        lambda: parse(Mark, content),
        lambda: parse(Verdict, content),
    ):
        try:
            read()
        except (StorageError, ValueError) as error:
            assert str(error)


def test_evaluate_reads_no_unit_of_another_name(output: Path, tmp_path: Path) -> None:
    (tmp_path / "qrels").write_text("q0 0 d0 1\n")
    edit(output / "_manifest/plan.json", lambda plan: plan["units"][0].__setitem__(0, "../x"))
    with pytest.raises(StorageError, match="not a plan"):
        evaluate(str(output), str(tmp_path / "qrels"))
    assert len(rows_of(output)) == 100


def test_an_output_of_an_earlier_version_names_it_and_a_stage_of_one_is_used(tmp_path: Path) -> None:
    from test_stage import given_as, job_of

    config = job_of(given_as("beir", tmp_path / "in"), tmp_path / "out")
    run(config, local=True)
    for place in (tmp_path / "out", tmp_path / "out-stage"):
        edit(place / "_manifest/plan.json", lambda plan: plan.update(manifest_version=1))
    for call in (status, check):
        with pytest.raises(StorageError, match=r"written by batch_rerank 0\.1\.0, whose output has no score files"):
            call(tmp_path / "out")
    assert verify(str(tmp_path / "out-stage")).problems == []
    stage = config.input.model_copy(update={"stage": str(tmp_path / "out-stage")})
    again = config.model_copy(
        update={"input": stage, "output": config.output.model_copy(update={"path": str(tmp_path / "other")})}
    )
    run(again, local=True)
    assert len(rows_of(tmp_path / "other")) == len(rows_of(tmp_path / "out"))
