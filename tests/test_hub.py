"""Hub ids, without a hub: a cache as huggingface_hub lays it out, and no network."""

import shutil
from pathlib import Path

import pytest
from checkpoints import qwen3_reranker

from batch_rerank import Reranker
from batch_rerank.engine.checkpoint import resolve_model
from batch_rerank.errors import ModelError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Qwen/Qwen3-Reranker-0.6B in a cache: tiny weights in the real layout."""
    repository = tmp_path / "hub" / "models--Qwen--Qwen3-Reranker-0.6B"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(qwen3_reranker(tmp_path / "built"), snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return snapshot


def test_a_hub_id_is_pinned_to_its_commit(cached: Path) -> None:
    spec = resolve_model("Qwen/Qwen3-Reranker-0.6B")
    assert (spec.revision, spec.identity, spec.template) == (COMMIT, f"commit:{COMMIT}", "qwen3-reranker")
    for revision in (None, COMMIT, "main"):
        reranker = Reranker("Qwen/Qwen3-Reranker-0.6B", revision=revision, max_length=256, self_test=False)
        assert (reranker.spec.revision, reranker.score([("q", "d")]).shape) == (COMMIT, (1,))
    with pytest.raises(ModelError, match="could not be fetched"):
        Reranker("Qwen/Qwen3-Reranker-0.6B", revision="v2")


def test_a_plan_does_not_need_the_weights_but_a_scorer_does(cached: Path) -> None:
    (cached / "model.safetensors").unlink()
    assert resolve_model("Qwen/Qwen3-Reranker-0.6B").kind == "causal"
    with pytest.raises(ModelError, match="found no weights"):
        Reranker("Qwen/Qwen3-Reranker-0.6B")


def test_a_hub_id_that_cannot_be_fetched_says_so(cached: Path) -> None:
    with pytest.raises(ModelError, match="'no/such-model' is no directory here and could not be fetched from the hub"):
        resolve_model("no/such-model")
