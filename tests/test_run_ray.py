"""The Ray job: equal to the oracle, one load an actor, threads set on purpose, errors without tracebacks."""

import json
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from operator import add, truediv
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
import yaml
from checkpoints import qwen3_reranker
from conftest import candidate_rows, job, rows_of, write
from safetensors.torch import load_file, save_file

from batch_rerank.errors import ConfigError, InputError, ModelError, UnfinishedError
from batch_rerank.job import cluster, finish, run_ray
from batch_rerank.job.run import run
from batch_rerank.job.staging import on_ray
from batch_rerank.job.watch import Heartbeat, Watch
from batch_rerank.publish.verify import verify
from batch_rerank.score.plan import make_plan
from batch_rerank.store.filesystem import locate
from batch_rerank.store.manifest import Manifest

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.mark.parametrize("layout", ["flat", pytest.param("nested", marks=pytest.mark.slow)])
def test_ray_and_the_local_loop_write_the_same_bytes(
    layout: str, flat_shards: Path, nested_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts, and the gathered scores, made on Ray where there is much to publish."""
    monkeypatch.setattr(finish, "SMALL_BYTES", 0)
    keys: dict[str, Any] = {"input__layout": layout, "output__passthrough": ["lang"], "output__include_text": True}
    keys |= {"output__file_bytes": 1, "output__layout": layout}
    shards = {"nested": nested_shards, "flat": flat_shards}[layout]
    run(job(shards, tmp_path / "ray", **keys))
    run(job(shards, tmp_path / "local", **keys), local=True)
    names = [path.relative_to(tmp_path / "local") for path in sorted((tmp_path / "local").rglob("*.parquet"))]
    assert len([name for name in names if name.name.startswith("part-")]) >= 6
    assert len([name for name in names if name.parts[0] == "_scores"]) >= 6
    for name in names:
        assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    monkeypatch.setattr("batch_rerank.publish.verify.SMALL_BYTES", 0)
    assert verify(str(tmp_path / "ray"), on=on_ray) == verify(str(tmp_path / "local"))


def test_null_rows_and_top_k_survive_the_way_through_ray(tmp_path: Path) -> None:
    rows = candidate_rows(6, 5)
    rows[3]["text"] = None
    for row in rows[10:15]:
        row["query"] = None
    path = write(tmp_path / "in.parquet", rows)
    keys: dict[str, Any] = {"output__top_k": 4, "scoring__max_failed_rows": 0.5}
    summary = run(job(path, tmp_path / "ray", **keys))
    run(job(path, tmp_path / "local", **keys), local=True)
    assert summary.totals.failed == 6
    assert rows_of(tmp_path / "ray") == rows_of(tmp_path / "local")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen3_reranker(tmp_path_factory.mktemp("model"))


def test_a_real_model_scores_as_in_the_local_loop_loaded_once_an_actor_with_its_own_threads(
    model: Path, flat_shards: Path, tmp_path: Path
) -> None:
    keys: dict[str, Any] = {
        "model__name": str(model),
        "model__kind": "auto",
        "model__max_length": 256,
        "input__unit_pairs": 25,
        "cluster__cpus_per_actor": 1,
    }
    run(job(flat_shards, tmp_path / "ray", **keys))
    run(job(flat_shards, tmp_path / "local", **keys), local=True)
    by_pair = [
        rows_of(tmp_path / name).sort_by([("query_id", "ascending"), ("doc_id", "ascending")])
        for name in ("ray", "local")
    ]
    assert by_pair[0].select(["query_id", "doc_id"]) == by_pair[1].select(["query_id", "doc_id"])
    scores = [table["score"].to_numpy() for table in by_pair]
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-4)
    assert len(np.unique(scores[0].round(3))) > 100
    receipts = [json.loads(path.read_text()) for path in (tmp_path / "ray" / "_manifest" / "receipts").glob("*")]
    tags = {receipt["scorer"] for receipt in receipts}
    assert len(receipts) == 12
    assert 1 <= len(tags) <= 2, "two actors, each loads once"
    assert all(" cpu threads=1 load=" in tag for tag in tags)


@pytest.mark.slow
def test_an_actor_takes_the_threads_that_are_asked_for(model: Path, flat_shards: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"model__name": str(model), "model__kind": "auto", "model__max_length": 256}
    config = job(flat_shards, tmp_path / "out", **keys, cluster__actors=1, cluster__cpus_per_actor=2)
    run(config)
    receipts = (tmp_path / "out" / "_manifest" / "receipts").glob("*")
    assert all("threads=2" in json.loads(path.read_text())["scorer"] for path in receipts)


@pytest.mark.slow
def test_the_driver_logs_one_self_test_and_one_fallback_of_its_two_actors(
    model: Path, flat_shards: Path, tmp_path: Path, logged: list[str]
) -> None:
    keys: dict[str, Any] = {"model__name": str(model), "model__kind": "auto", "model__max_length": 256}
    summary = run(job(flat_shards, tmp_path / "out", **keys, model__forward="padded", input__unit_pairs=25))
    tests = [message for message in logged if message.startswith("self-test passed: load, weights")]
    receipts = [json.loads(path.read_text()) for path in (tmp_path / "out" / "_manifest" / "receipts").glob("*")]
    assert len(tests) == 1
    assert tests[0] in {receipt["self_test"] for receipt in receipts}
    assert all(receipt["self_test"].startswith("self-test passed") for receipt in receipts)
    assert {receipt["fallback"] for receipt in receipts} == {"model.forward is padded"}
    assert sum("not the fastest forward: model.forward is padded" in message for message in logged) == 1
    assert summary.totals.padded_units == summary.units == len(receipts)


@pytest.mark.slow
def test_a_failed_self_test_comes_back_as_itself(tmp_path: Path, flat_shards: Path) -> None:
    broken = qwen3_reranker(tmp_path / "broken", tied=False)
    weights = load_file(broken / "model.safetensors")
    weights["lm_head.weight"] *= 1e6
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    config = job(flat_shards, tmp_path / "out", model__name=str(broken), model__kind="auto", model__max_length=256)
    with pytest.raises(ModelError, match="self-test failed: spread: all 66 scores are saturated"):
        run(config)
    assert json.loads((tmp_path / "out" / "_manifest" / "status.json").read_text())["exit_code"] == 5
    assert not list((tmp_path / "out").glob("part-*"))


@pytest.mark.slow
def test_an_error_of_the_load_comes_back_as_itself(tmp_path: Path, flat_shards: Path) -> None:
    broken = qwen3_reranker(tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    config = job(flat_shards, tmp_path / "out", model__name=str(broken), model__kind="auto", model__max_length=256)
    with pytest.raises(ModelError, match=r"1 missing keys: model\.norm\.weight"):
        run(config)
    assert json.loads((tmp_path / "out" / "_manifest" / "status.json").read_text())["exit_code"] == 5
    assert not (tmp_path / "out" / "_SUCCESS").exists()


def test_an_error_of_the_input_comes_back_as_itself(tmp_path: Path) -> None:
    rows = candidate_rows(2, 3)
    rows[5]["query"] = "something else"
    with pytest.raises(InputError, match="query_id 'q1' has two values of query"):
        run(job(write(tmp_path / "in.parquet", rows), tmp_path / "out"))
    assert not (tmp_path / "out" / "_SUCCESS").exists()


@pytest.mark.slow
def test_growing_pools_of_actors_are_taken(flat_shards: Path, tmp_path: Path) -> None:
    run(job(flat_shards, tmp_path / "out", cluster__actors={"min": 1, "max": 2}))
    assert pc.sum(pc.is_valid(rows_of(tmp_path / "out")["score"])).as_py() == 300


# ---- GPUs or CPUs


@pytest.mark.slow
def test_a_job_of_defaults_runs_on_the_cores_of_a_cluster_without_gpus(
    flat_shards: Path, tmp_path: Path, logged: list[str]
) -> None:
    auto: dict[str, Any] = {"cluster__gpus_per_actor": "auto", "cluster__cpus_per_actor": "auto"}
    summary = run(job(flat_shards, tmp_path / "out", **auto))
    assert summary.totals.scored == 300
    assert [line for line in logged if "no GPU" in line] == [
        "the cluster (4 CPUs, 0 GPUs): 2 actors, 1 CPU thread each, no GPU"
    ]


def test_gpus_that_a_cluster_of_fixed_size_lacks_end_the_job_at_once(flat_shards: Path, tmp_path: Path) -> None:
    for gpus in (1, 0.5):
        with pytest.raises(ConfigError, match=rf"gpus_per_actor: found {gpus}, but the cluster \(4 CPUs, 0 GPUs\) has"):
            run(job(flat_shards, tmp_path / "out", cluster__gpus_per_actor=gpus))
    assert json.loads((tmp_path / "out" / "_manifest" / "status.json").read_text())["exit_code"] == 2
    assert run(job(flat_shards, tmp_path / "out")).totals.scored == 300, "the free scorer has no dtype"


WITH_A_GPU = """
import sys, warnings
import ray
from batch_rerank import load_config
from batch_rerank.errors import ConfigError
from batch_rerank.job.ahead import plan_job
from batch_rerank.job.run import run
from batch_rerank.job.staging import on_ray
import logging

warnings.simplefilter("ignore")
log = logging.getLogger("batch_rerank")
log.addHandler(logging.StreamHandler(sys.stdout))
log.setLevel("INFO")
kinds = {"accelerator_type:L4": 1}
ray.init(address="local", num_cpus=4, num_gpus=1, resources=kinds, include_dashboard=False, log_to_driver=False)
file, output = sys.argv[1:]
for name, gpus, kind in (("auto", "auto", "null"), ("half", 0.5, "L4"), ("two", 2, "null"), ("H100", "auto", "H100")):
    sets = [f"output.path={output}/{name}", f"cluster.gpus_per_actor={gpus}", "cluster.actors=3"]
    sets.append(f"cluster.accelerator_type={kind}")
    try:
        print(name, "planned", plan_job(load_config(file, sets)).plan.config["cluster"]["gpus_per_actor"])
        print(name, "scored", run(load_config(file, sets)).totals.scored)
    except ConfigError as error:
        print(name, "refused", error)
"""


@pytest.mark.slow
def test_a_cluster_with_a_gpu_is_used_as_far_as_it_goes(flat_shards: Path, tmp_path: Path) -> None:
    """Ray is told of a GPU, and the free scorer does not miss it."""
    raw = job(flat_shards, tmp_path / "unused").model_dump(exclude={"limit"})
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(raw))
    command = [sys.executable, "-c", WITH_A_GPU, str(tmp_path / "job.yaml"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "the cluster (4 CPUs, 1 GPUs): 3 actors, 1 GPU each" in lines
    assert {"auto planned 1.0", "auto scored 300", "half planned 0.5", "half scored 300"} <= set(lines)
    assert "cluster.actors asks for 3: the cluster (4 CPUs, 1 GPUs) has room for 1 of 1 GPUs" in lines
    assert "cluster.actors asks for 3: the cluster (4 CPUs, 1 GPUs) has room for 2 of 0.5 L4 GPUs" in lines
    assert any(line.startswith("two refused cluster.gpus_per_actor: found 2, but the cluster (4") for line in lines)
    refused = "H100 refused cluster.accelerator_type: found 'H100', but the GPUs of the cluster (4 CPUs, 1 GPUs) are L4"
    assert any(line.startswith(refused) for line in lines)
    for name in ("auto", "half"):
        receipts = [json.loads(path.read_text()) for path in (tmp_path / name / "_manifest/receipts").iterdir()]
        assert {receipt["scorer"].split()[1] for receipt in receipts} == {"cuda"}


@pytest.mark.slow
def test_what_is_waited_for_is_told_by_stage(tmp_path: Path) -> None:
    # so many units that both actors are still needed when the first one is done: Ray lets idle ones go
    shard = write(tmp_path / "in.parquet", candidate_rows(300, 2))
    config = job(shard, tmp_path / "out", cluster__cpus_per_actor=1, input__unit_pairs=2)
    plan, model = make_plan(config)
    manifest = Manifest(locate(config.output.path))
    manifest.write_plan(plan)
    receipts = run_ray.run_ray(config, model, plan, frozenset())
    next(receipts)
    waits = run_ray._waits()
    assert len(list(islice(receipts, 200))) == 200
    kept = [len(blocks) for stage in run_ray._stages() for blocks in stage.get_stats().values()]
    assert len(kept) == 3 and max(kept) < 50, "of blocks that are done nothing is kept"
    assert len(list(receipts)) == len(plan.units) - 201
    pattern = r"read_and_encode: \d+ tasks; Score: (\d) actors alive, (\d) waited for, \d+ tasks; "
    found = re.match(
        pattern + r"rank_and_write: \d+ tasks; the cluster \(4 CPUs, 0 GPUs\), free: [\d.]+ CPUs, 0 GPUs", waits
    )
    assert found, waits
    assert int(found[1]) + int(found[2]) == 2


def test_many_ranges_are_read_by_few_tasks_in_the_same_order() -> None:
    ranges: list[Any] = list(range(103))
    tasks = run_ray.together([[one] for one in ranges], most=10)
    assert len(tasks) == 10 and max(map(len, tasks)) == 11
    assert [one for task in tasks for one in task] == ranges
    assert run_ray.together([[one] for one in ranges], most=103) == [[one] for one in ranges]
    assert run_ray.together([]) == []


def test_calls_are_made_in_groups_as_they_are_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_ray, "MOST_TASKS", 3)
    made: list[int] = []

    def calls() -> Iterator[Callable[[int], int]]:
        for number in range(7):
            made.append(number)
            yield partial(add, number)

    results = run_ray.each_on_ray(job(tmp_path, tmp_path / "out"), calls(), 10)
    first = [next(results)]
    assert len(made) == 3
    assert sorted([*first, *results]) == [10 + number for number in range(7)]


def test_a_call_that_nobody_expected_to_fail_is_not_left_out(tmp_path: Path) -> None:
    """Ray Data drops the block of such a task where it may: a verdict on the others would be good."""
    calls = [partial(truediv, 1, number) for number in (4, 2, 0, 1)]
    with pytest.raises(
        UnfinishedError, match=r"a task has failed: ZeroDivisionError: division by zero \(.*; run it again"
    ):
        list(run_ray.each_on_ray(job(tmp_path, tmp_path / "out"), calls))


def test_silence_is_broken_as_often_as_it_lasts(logged: list[str]) -> None:
    asked = threading.Semaphore(0)

    def describe() -> str:
        asked.release()
        return "Score: 0 actors alive, 1 waited for"

    with Watch(describe, seconds=0.05):
        assert all(asked.acquire(timeout=120) for _ in range(3))
    assert logged[1].endswith(" s: Score: 0 actors alive, 1 waited for")
    assert logged[1].startswith("nothing has finished for 0 s")

    def gone() -> str:
        asked.release()
        raise ConnectionError

    with Watch(gone, seconds=0.05):
        assert all(asked.acquire(timeout=120) for _ in range(2))
    assert any(line.endswith("its state cannot be read (ConnectionError)") for line in logged)


def test_a_signal_while_ray_starts_is_the_jobs_own_and_not_rays_exit() -> None:
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), cluster._own_sigterm():
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))  # as ray.init does
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_address_without_a_ray_ends_the_job_with_2(flat_shards: Path, tmp_path: Path) -> None:
    raw = job(flat_shards, tmp_path / "out", cluster__address="127.0.0.1:1").model_dump(exclude={"limit"})
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(raw))
    command = [sys.executable, "-m", "batch_rerank.cli", "run", str(tmp_path / "job.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)  # Ray's own tries go on for longer
    assert done.returncode == 2, done.stderr
    assert "error: cluster.address '127.0.0.1:1': no Ray to join there" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wait_for_what_is_gone_is_broken_off() -> None:
    never = threading.Event()
    watch = Watch(lambda: "", lambda: "the Ray process has died", poll=0.01)
    with pytest.raises(KeyboardInterrupt), watch:
        never.wait(60)
    assert watch.lost == "the Ray process has died"


def test_a_dead_ray_is_told_from_a_living_one() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as short, socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        with socket.socket(socket.AF_UNIX) as raylet:
            raylet.bind(f"{short}/raylet")
            raylet.listen()
            heartbeat = Heartbeat(f"{short}/raylet", address)
            assert heartbeat.gone() is None
        assert heartbeat.gone() == "the Ray process of this node (raylet) has died"


AFTER_RAY = """
import re, signal, sys, warnings
from batch_rerank import load_config
from batch_rerank.job.run import run
from batch_rerank.job.staging import on_ray
warnings.simplefilter("ignore")
signal.signal(signal.SIGTERM, signal.default_int_handler)
run(load_config(sys.argv[1]))
caught = int(re.search(r"SigCgt:\\s*(\\w+)", open("/proc/self/status").read())[1], 16)
print(caught >> (signal.SIGTERM - 1) & 1, signal.getsignal(signal.SIGTERM) is signal.default_int_handler)
"""


@pytest.mark.slow
def test_a_signal_after_ray_has_ended_is_still_the_jobs_own(flat_shards: Path, tmp_path: Path) -> None:
    raw = job(flat_shards, tmp_path / "out").model_dump(exclude={"limit"})
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(raw))
    command = [sys.executable, "-c", AFTER_RAY, str(tmp_path / "job.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1:] == ["1 True"], done.stderr
