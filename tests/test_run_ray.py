"""The Ray job: equal to the oracle, one load an actor, threads set on purpose, errors without tracebacks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
from checkpoints import qwen3_reranker
from conftest import candidate_rows, job, rows_of, write
from safetensors.torch import load_file, save_file

from batch_rerank.errors import InputError, ModelError
from batch_rerank.job.run import run
from batch_rerank.job.verify import verify

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.mark.parametrize("layout", ["flat", "nested"])
def test_ray_and_the_local_loop_write_the_same_bytes(
    layout: str, flat_shards: Path, nested_shards: Path, tmp_path: Path
) -> None:
    keys: dict[str, Any] = {"input__layout": layout, "output__passthrough": ["lang"], "output__include_text": True}
    shards = {"nested": nested_shards, "flat": flat_shards}[layout]
    run(job(shards, tmp_path / "ray", **keys))
    run(job(shards, tmp_path / "local", **keys), local=True)
    parts = sorted((tmp_path / "local").glob("part-*"))
    assert len(parts) >= 6
    for part in parts:
        assert (tmp_path / "ray" / part.name).read_bytes() == part.read_bytes()
    assert verify(str(tmp_path / "ray")).problems == []


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


def test_an_actor_takes_the_threads_that_are_asked_for(model: Path, flat_shards: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"model__name": str(model), "model__kind": "auto", "model__max_length": 256}
    config = job(flat_shards, tmp_path / "out", **keys, cluster__actors=1, cluster__cpus_per_actor=2)
    run(config)
    receipts = (tmp_path / "out" / "_manifest" / "receipts").glob("*")
    assert all("threads=2" in json.loads(path.read_text())["scorer"] for path in receipts)


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
    assert sum("batches are padded, which is slower: model.forward is padded" in message for message in logged) == 1
    assert summary.totals.padded_units == summary.units == len(receipts)


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


def test_growing_pools_of_actors_are_taken(flat_shards: Path, tmp_path: Path) -> None:
    run(job(flat_shards, tmp_path / "out", cluster__actors={"min": 1, "max": 2}))
    assert pc.sum(pc.is_valid(rows_of(tmp_path / "out")["score"])).as_py() == 300
