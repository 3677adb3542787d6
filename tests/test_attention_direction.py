"""Which way a decoder's attention looks: what config.json says is computed and proven at load, or refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import bert_embedding, gemma3_embedding, qwen3_embedding, qwen3_reranker, qwen3_seq_cls, rewrite
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Lfm2Config,
    Lfm2ForCausalLM,
)

from batch_rerank.engine.architecture import DECODERS, looks_both_ways
from batch_rerank.engine.checkpoint import resolve_model
from batch_rerank.engine.decoder import FAMILIES
from batch_rerank.engine.loading import load
from batch_rerank.engine.reference import Reference
from batch_rerank.engine.reranker import Reranker
from batch_rerank.errors import ModelError

FLAGS: list[dict[str, Any]] = [{"is_causal": False}, {"use_bidirectional_attention": True}]
PAIRS = [("where is Paris?", "in France"), ("where is Paris?", "The capital of France is Paris. " * 9), ("a", "b")]


@pytest.mark.parametrize(
    ("config", "both"),
    [
        ({}, False),
        ({"is_causal": True, "use_bidirectional_attention": False}, False),
        ({"is_causal": None, "use_bidirectional_attention": None}, False),
        ({"use_bidirectional_attention": "vision"}, False),  # Gemma 4: images only
        ({"is_causal": False}, True),
        ({"use_bidirectional_attention": True}, True),
        ({"architectures": ["LlamaBidirectionalForSequenceClassification"]}, True),
    ],
)
def test_what_the_config_says(config: dict[str, Any], both: bool) -> None:
    assert looks_both_ways(config) is both


def test_every_architecture_that_is_packed_as_a_decoder_is_known_as_one() -> None:
    assert set(FAMILIES) < set(DECODERS)


def hidden(model: Any, ids: torch.Tensor, both: bool) -> torch.Tensor:
    """float32[tokens, hidden] of one sequence, under a mask that is made here and not by transformers."""
    length = ids.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool)
    mask = (allowed if both else allowed.tril())[None, None]
    with torch.no_grad():
        output: torch.Tensor = model(input_ids=ids, attention_mask={"full_attention": mask}).last_hidden_state[0]
    return output


@pytest.mark.parametrize("flags", [*FLAGS, {}])
def test_attention_looks_where_the_config_says(tmp_path: Path, flags: dict[str, Any]) -> None:
    directory = qwen3_embedding(tmp_path)
    rewrite(directory / "config.json", **flags)
    spec = resolve_model(str(directory))
    model = load(AutoModel, spec, "cpu")
    reranker = Reranker(str(directory), device="cpu")
    reference = Reference(spec, model)
    vectors = [
        [hidden(model, torch.tensor([tokens.ids]), both=bool(flags))[-1] for tokens in reference.read(*pair)]
        for pair in PAIRS
    ]
    expected = [float(torch.cosine_similarity(query, document, dim=0)) for query, document in vectors]
    np.testing.assert_allclose(reference.scores(PAIRS), expected, atol=1e-5)
    np.testing.assert_allclose(reranker.score(PAIRS), expected, atol=1e-5)  # with rows of other lengths beside


@pytest.mark.parametrize("flags", FLAGS)
def test_a_classification_head_on_a_decoder_that_looks_both_ways(tmp_path: Path, flags: dict[str, Any]) -> None:
    directory = qwen3_seq_cls(tmp_path)
    rewrite(directory / "config.json", **flags)
    model: Any = load(AutoModelForSequenceClassification, resolve_model(str(directory), template="pair"), "cpu")
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        logit = model(input_ids=ids).logits[0]
    torch.testing.assert_close(logit, model.score(hidden(model.model, ids, both=True)[-1]))


def test_gemma_3_looks_both_ways_by_itself_and_keeps_its_window(tmp_path: Path) -> None:
    directory = gemma3_embedding(tmp_path)
    plain = AutoModel.from_pretrained(directory, dtype=torch.float32)
    loaded = load(AutoModel, resolve_model(str(directory)), "cpu")
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        a, b = (model(input_ids=ids).last_hidden_state for model in (plain, loaded))
        c = loaded(input_ids=ids.clone().index_fill_(1, torch.tensor([39]), 50)).last_hidden_state
    assert torch.equal(a, b)
    assert not torch.equal(b[0, 0], c[0, 0])  # through the layer without a window
    Reranker(str(directory), device="cpu").score(PAIRS)


def test_an_encoder_that_is_a_decoder_is_computed_as_one(tmp_path: Path) -> None:
    directory = bert_embedding(tmp_path)
    rewrite(directory / "config.json", is_decoder=True)
    model = load(AutoModel, resolve_model(str(directory)), "cpu")
    with torch.no_grad():
        first = [model(input_ids=torch.tensor([[5, 6, last]])).last_hidden_state[0, 0] for last in (7, 8)]
    assert torch.equal(*first)


def test_a_model_that_cannot_look_both_ways_is_refused(tmp_path: Path) -> None:
    """LFM2's convolutions see what came before, whatever its config asks for."""
    directory = qwen3_reranker(tmp_path)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = Lfm2Config(vocab_size=2000, num_hidden_layers=1, layer_types=["conv"], **sizes)
    Lfm2ForCausalLM(config).save_pretrained(directory)
    load(AutoModelForCausalLM, resolve_model(str(directory), template="qwen3-reranker"), "cpu")
    rewrite(directory / "config.json", use_bidirectional_attention=True)
    with pytest.raises(ModelError, match="expected the first position of Lfm2ForCausalLM to see the last one"):
        load(AutoModelForCausalLM, resolve_model(str(directory), template="qwen3-reranker"), "cpu")
