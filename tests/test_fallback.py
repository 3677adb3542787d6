"""A packed forward that fails or raises gives way to the padded one: loudly, counted, and only if that one passes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import bert_reranker, modernbert_reranker, qwen3_reranker
from conftest import job
from safetensors.torch import load_file, save_file

import batch_rerank
from batch_rerank import Reranker
from batch_rerank.engine import decoder, encoder
from batch_rerank.errors import ModelError
from batch_rerank.job.selftest import run_self_test

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bert_reranker(tmp_path_factory.mktemp("bert") / "model")


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that gives each sequence the result of another."""
    right = encoder.Packed.logits
    monkeypatch.setattr(encoder.Packed, "logits", lambda self, *rows: right(self, *rows).flip(0))


def settings(directory: Path, **keys: Any) -> dict[str, Any]:
    return {"model__name": str(directory), "model__kind": "auto", **keys}


def test_a_packed_forward_that_scores_wrong_is_padded_once_said_and_right(
    bert: Path, broken: None, logged: list[str]
) -> None:
    reranker = Reranker(str(bert))
    assert reranker.tested is not None
    assert reranker.tested.passed
    assert reranker.fallback.startswith("the packed forward's self-test failed: canaries: 30 pairs differ")
    (line,) = [line for line in logged if "padded" in line]
    assert reranker.fallback in line
    padded = Reranker(str(bert), forward="padded")
    pairs = [("what is it", "a river"), ("what is it", "the capital of France")]
    assert reranker.score(pairs).tolist() == padded.score(pairs).tolist()
    assert padded.fallback == "model.forward is padded"


def test_a_packed_forward_that_cannot_be_set_up_is_padded(
    bert: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    def no_kernel(*given: Any) -> None:
        raise RuntimeError("no kernel image is available\nfor execution")

    monkeypatch.setattr(encoder.Packed, "__init__", no_kernel)
    reason = "the forward could not be set up: RuntimeError: no kernel image is available for execution"
    assert Reranker(str(bert)).fallback == reason
    assert sum("padded" in line for line in logged) == 1
    with pytest.raises(ModelError, match="no kernel image"):
        Reranker(str(bert), forward="packed")


def test_a_packed_forward_that_raises_when_it_runs_is_padded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_kernel(*given: Any) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(decoder.Packed, "last_hidden", no_kernel)
    reranker = Reranker(str(qwen3_reranker(tmp_path / "qwen")), max_length=512)
    assert reranker.fallback.endswith("canaries: RuntimeError: no kernel image is available")


def test_packed_insisted_on_does_not_give_way(bert: Path, broken: None, tmp_path: Path, logged: list[str]) -> None:
    with pytest.raises(ModelError, match="self-test failed: canaries"):
        Reranker(str(bert), forward="packed")
    assert not [line for line in logged if "padded" in line]
    with pytest.raises(ModelError, match="'modernbert' has no packed forward"):
        Reranker(str(modernbert_reranker(tmp_path / "modern")), forward="packed", max_length=256)


def test_where_both_fail_the_error_says_both(bert: Path, broken: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from batch_rerank.engine import models

    right = models.padded
    monkeypatch.setattr(models, "padded", lambda rows, device: right([row[::-1] for row in rows], device))
    with pytest.raises(ModelError, match=r"self-test failed: canaries.*; and the packed forward's self-test failed"):
        Reranker(str(bert))


def test_what_is_wrong_with_the_model_itself_loads_it_once(bert: Path, tmp_path: Path, logged: list[str]) -> None:
    directory = bert_reranker(tmp_path / "model")
    weights = load_file(directory / "model.safetensors")
    weights["bert.pooler.dense.weight"].zero_()
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="all 66 scores are"):
        Reranker(str(directory))
    assert logged == []


def test_the_self_test_can_be_left_out(bert: Path, broken: None) -> None:
    reranker = Reranker(str(bert), self_test=False)
    assert (reranker.tested, reranker.fallback) == (None, "")


def test_a_fallback_is_in_receipts_summary_and_status(
    bert: Path, broken: None, flat_shards: Path, tmp_path: Path, logged: list[str], cli: Cli
) -> None:
    config = job(flat_shards, tmp_path / "out", **settings(bert))
    summary = batch_rerank.run(config, local=True)
    assert summary.totals.units == summary.totals.padded_units == 6
    receipts = [json.loads(path.read_text()) for path in (tmp_path / "out/_manifest/receipts").iterdir()]
    (reason,) = {receipt["fallback"] for receipt in receipts}
    assert reason.startswith("the packed forward's self-test failed: canaries")
    assert sum("padded" in line for line in logged) == 1
    code, out, err = cli("status", tmp_path / "out", "--json")
    assert (code, json.loads(out)["units_padded"]) == (0, 6)
    (tmp_path / "job.yaml").write_text(config.model_dump_json(exclude={"limit"}))
    code, out, err = cli("run", tmp_path / "job.yaml", "--local", "--json")
    assert (code, json.loads(out)["totals"]["padded_units"]) == (0, 6)
    assert "6 units scored by the slower padded forward" in err


def test_packed_insisted_on_ends_a_job_with_5(
    bert: Path, broken: None, flat_shards: Path, tmp_path: Path, cli: Cli
) -> None:
    config = job(flat_shards, tmp_path / "out", **settings(bert, model__forward="packed"))
    (tmp_path / "job.yaml").write_text(config.model_dump_json(exclude={"limit"}))
    code, _, err = cli("run", tmp_path / "job.yaml", "--local")
    assert code == 5
    assert "self-test failed: canaries" in err


def test_a_model_without_a_packed_forward_is_counted_too(flat_shards: Path, tmp_path: Path) -> None:
    model = modernbert_reranker(tmp_path / "model")
    config = job(flat_shards, tmp_path / "out", **settings(model, model__max_length=256))
    assert batch_rerank.run(config, local=True).totals.padded_units == 6
    receipts = [json.loads(path.read_text()) for path in (tmp_path / "out/_manifest/receipts").iterdir()]
    assert {r["fallback"] for r in receipts} == {"the architecture 'modernbert' has no packed forward"}


def test_another_forward_is_the_same_job(flat_shards: Path, tmp_path: Path) -> None:
    first = batch_rerank.run(job(flat_shards, tmp_path / "out", model__forward="padded"), local=True)
    again = batch_rerank.run(job(flat_shards, tmp_path / "out"), local=True)
    assert (first.fingerprint, again.units) == (again.fingerprint, 0)


def test_the_verb_shows_both_forwards(bert: Path, broken: None, tmp_path: Path, cli: Cli) -> None:
    config = job("none", tmp_path / "out", **settings(bert))
    (tmp_path / "job.yaml").write_text(config.model_dump_json(exclude={"limit"}))
    code, out, err = cli("selftest", tmp_path / "job.yaml", "--json")
    assert code == 0
    found = json.loads(out)
    assert (found["used"], found["passed"]) == ("padded", True)
    assert {name: result["passed"] for name, result in found["forwards"].items()} == {"packed": False, "padded": True}
    packed, padded = err.splitlines()[-2:]
    assert packed.startswith("packed forward: self-test failed: canaries")
    assert padded.startswith("padded forward: self-test passed")
    assert padded.endswith("; this one is used")
    code, _, err = cli("selftest", tmp_path / "job.yaml", "--set", "model.forward=packed")
    assert code == 5
    assert "the self-test failed: canaries" in err


def test_the_verb_says_why_there_is_no_packed_forward(tmp_path: Path) -> None:
    model = modernbert_reranker(tmp_path / "model")
    for forward, used in (("auto", "padded"), ("packed", None), ("padded", "padded")):
        keys = settings(model, model__max_length=256, model__forward=forward)
        found = run_self_test(job("none", "none", **keys))
        assert (found.used, list(found.forwards)) == (used, ["padded"])
        assert found.absent == "the architecture 'modernbert' has no packed forward"


def test_small_models_are_tested_in_a_second(bert: Path) -> None:
    """Processor time of one thread, so that a busy machine does not fail it; with room for a slow one."""
    import time

    torch.set_num_threads(1)
    spent = []
    for test in (True, False, True, False):
        started = time.process_time()
        Reranker(str(bert), self_test=test)
        spent.append(time.process_time() - started)
    assert min(spent[::2]) - min(spent[1::2]) < 2
