"""How a checkpoint is asked and read follows from its own files, and what they leave open is asked for."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import (
    INSTRUCTION,
    bert_reranker,
    qwen3_embedding,
    qwen3_reranker,
    qwen3_seq_cls,
    rewrite,
    xlmr_reranker,
)

from batch_rerank.engine.architecture import rope_regime
from batch_rerank.engine.checkpoint import ModelSpec, resolve_model
from batch_rerank.engine.encoded import Group
from batch_rerank.engine.encoding import make_encoder
from batch_rerank.engine.kinds import with_instruction
from batch_rerank.engine.templates import HUB_MODELS, TEMPLATES
from batch_rerank.errors import BatchRerankError, ConfigError, ModelError

OWN: dict[str, Any] = {"middle": "question: {query}\npassage: {document}", "suffix": "\n"}


def refused(error: type[BatchRerankError], directory: Path, *parts: str, **settings: Any) -> None:
    with pytest.raises(error) as caught:
        resolve_model(str(directory), **settings)
    assert [part for part in parts if part not in str(caught.value)] == [], caught.value


def ids_of(spec: ModelSpec, query: str, document: str, instruction: str | None = None) -> list[int]:
    """The ids of a pair, as the encoder lays them out."""
    encoded = make_encoder(spec).encode([Group(query, [document], instruction)])
    kept = encoded.segment(encoded.document[0])[: encoded.kept[0]]
    return [*encoded.segment(encoded.prefix[0]).tolist(), *kept.tolist(), *encoded.tail.tolist()]


# ---- decoders with a classification head


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen3_seq_cls(tmp_path_factory.mktemp("converted"))


@pytest.fixture
def two_labels(tmp_path: Path) -> Path:
    return qwen3_seq_cls(tmp_path, labels=2)


def test_a_decoders_classification_head_is_asked_for_its_template(converted: Path) -> None:
    refused(ConfigError, converted, "model.template: not known", "Qwen3ForSequenceClassification", "'qwen3-reranker'")
    refused(ConfigError, converted, "found 'chatml'", "'pair'", "'qwen3-reranker'", template="chatml")


def test_a_decoders_classification_head_takes_a_causal_template_without_answers(converted: Path) -> None:
    spec = resolve_model(str(converted), template="qwen3-reranker")
    assert (spec.kind, spec.template, spec.labels) == ("sequence_classification", "qwen3-reranker", 1)
    assert (spec.relevance, spec.max_length) == ("sigmoid", 8192)
    assert spec.causal is not None
    assert (spec.causal.true_token, spec.causal.middle) == (None, TEMPLATES["qwen3-reranker"].middle)


def test_a_converted_reranker_reads_the_ids_of_the_one_it_was_made_from(converted: Path, tmp_path: Path) -> None:
    original = resolve_model(str(qwen3_reranker(tmp_path)))
    spec = resolve_model(str(converted), template="qwen3-reranker")
    for instruction in (None, "find code"):
        ids = ids_of(spec, "where is Paris?", "in France", instruction)
        assert ids == ids_of(original, "where is Paris?", "in France", instruction)
    other = resolve_model(str(converted), template="qwen3-reranker", instruction="find code")
    assert ids_of(other, "q", "d") == ids_of(spec, "q", "d", "find code") != ids_of(spec, "q", "d")


def test_a_template_of_the_jobs_own_needs_an_answer_only_where_a_token_answers(converted: Path, tmp_path: Path) -> None:
    spec = resolve_model(str(converted), template=OWN)
    assert (spec.template, spec.relevance) == ("custom", "sigmoid")
    assert ids_of(spec, "a", "b")
    refused(ConfigError, qwen3_reranker(tmp_path), "true_token: missing in 'custom'", "logit of a token", template=OWN)


def test_a_decoders_classification_head_may_be_trained_on_the_plain_pair(converted: Path) -> None:
    spec = resolve_model(str(converted), template="pair")
    assert (spec.template, spec.causal, spec.instruction) == ("pair", None, None)
    refused(ConfigError, converted, "'pair' has no place for one", template="pair", instruction="be brief")


def test_an_encoders_classification_head_has_the_pair_and_no_other_template(tmp_path: Path) -> None:
    refused(ConfigError, bert_reranker(tmp_path), "with an encoder takes 'pair'", template="qwen3-reranker")


def test_a_head_on_an_architecture_that_is_not_known_is_asked_for_its_template(tmp_path: Path) -> None:
    directory = xlmr_reranker(tmp_path)
    rewrite(directory / "config.json", model_type="funnel")
    refused(ConfigError, directory, "model.template: not known")
    assert resolve_model(str(directory), template="pair").template == "pair"


def test_conversions_known_by_their_hub_id_have_their_template() -> None:
    for size in ("0.6B", "4B", "8B"):
        assert HUB_MODELS[f"tomaarsen/Qwen3-Reranker-{size}-seq-cls"].template == "qwen3-reranker"


@pytest.mark.parametrize("names", [None, {"0": "no", "1": "yes"}, {"0": "Not relevant", "1": "RELEVANT"}])
def test_two_labels_are_no_and_yes(two_labels: Path, names: dict[str, str] | None) -> None:
    rewrite(two_labels / "config.json", id2label=names, label2id=None)
    spec = resolve_model(str(two_labels), template="qwen3-reranker")
    assert (spec.labels, spec.relevance) == (2, "sigmoid")


@pytest.mark.parametrize(
    "changes",
    [
        {"id2label": {"0": "yes", "1": "no"}},
        {"id2label": {"0": "relevant", "1": "not relevant"}},
        {"id2label": {"0": "entailment", "1": "contradiction"}},
        {"problem_type": "multi_label_classification"},
    ],
)
def test_two_labels_that_are_not_no_and_yes_are_refused(two_labels: Path, changes: dict[str, Any]) -> None:
    rewrite(two_labels / "config.json", **changes)
    refused(ModelError, two_labels, "expected 0 for no and 1 for yes", template="qwen3-reranker")


def test_more_labels_and_two_of_an_encoder_are_refused(two_labels: Path, tmp_path: Path) -> None:
    rewrite(two_labels / "config.json", id2label={"0": "a", "1": "b", "2": "c"})
    refused(ModelError, two_labels, "with 3 labels, expected 1", template="qwen3-reranker")
    bert = bert_reranker(tmp_path / "bert")
    rewrite(bert / "config.json", id2label={"0": "no", "1": "yes"})
    refused(ModelError, bert, "with 2 labels, expected 1")


def test_an_identity_activation_means_that_a_logit_is_no_relevance(converted: Path, tmp_path: Path) -> None:
    directory = qwen3_seq_cls(tmp_path)
    identity = {"activation_fn": "torch.nn.modules.linear.Identity"}
    rewrite(directory / "config.json", sentence_transformers=identity)
    assert resolve_model(str(directory), template="qwen3-reranker").relevance == "none"


# ---- the stored prompts of bi-encoders

PROMPTS = [
    f"Instruct: {INSTRUCTION}\nQuery:",
    f"Instruct: {INSTRUCTION}\nQuery: ",
    f"Instruct: {INSTRUCTION}\nQuery:\n",
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_another_instruction_keeps_every_other_byte_of_the_stored_prompt(prompt: str) -> None:
    assert with_instruction(prompt, INSTRUCTION) == prompt
    assert with_instruction(prompt, "find code") == prompt.replace(INSTRUCTION, "find code")
    assert with_instruction(prompt, None) == prompt
    assert with_instruction("query: ", "find code") == "query: "


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_query_is_read_after_the_prompt_as_it_is_stored(tmp_path: Path, prompt: str) -> None:
    from sentence_transformers import SentenceTransformer

    from batch_rerank.engine.reference import Reference
    from batch_rerank.engine.reranker import Reranker

    directory = qwen3_embedding(tmp_path, prompt)
    queries, document = ["where is Paris?", "rank items"], "The capital of France is Paris."
    plain = SentenceTransformer(str(directory), device="cpu", model_kwargs={"dtype": "float32"})
    for instruction in (INSTRUCTION, "find code"):
        stored = prompt.replace(INSTRUCTION, instruction)
        expected = plain.encode(queries, prompt=stored) @ plain.encode_document(document)
        reranker = Reranker(str(directory), device="cpu", instruction=instruction)
        scores = reranker.score([(query, document) for query in queries])
        np.testing.assert_allclose(scores, expected, atol=1e-5)
        reference = Reference(reranker.spec, plain[0].auto_model)
        np.testing.assert_allclose(reference.scores([(query, document) for query in queries]), expected, atol=1e-5)


def test_what_sentence_transformers_saves_today_is_read_as_what_it_saved_before(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    before, after = qwen3_embedding(tmp_path / "before"), tmp_path / "after"
    SentenceTransformer(str(before), device="cpu", model_kwargs={"dtype": "float32"}).save(str(after))
    assert json.loads((after / "1_Pooling" / "config.json").read_text())["pooling_mode"] == "lasttoken"
    old, new = resolve_model(str(before)), resolve_model(str(after))
    same = dict.fromkeys(("name", "directory", "identity"), "")
    assert replace(old, **same) == replace(new, **same)
    rewrite(after / "1_Pooling" / "config.json", pooling_mode=["lasttoken", "mean"])
    refused(ModelError, after, "found pooling ['lasttoken', 'mean']")


# ---- rotary positions that depend on the length of a batch


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({}, None),
        ({"rope_scaling": None, "rope_theta": 1e6}, None),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}}, None),
        ({"rope_parameters": {"rope_type": "llama3", "original_max_position_embeddings": 32}}, None),
        ({"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 32}}, 32),
        ({"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 4096}, 4096),
        ({"rope_scaling": {"type": "su", "long_factor": []}, "original_max_position_embeddings": 4096}, 4096),
        ({"rope_scaling": {"rope_type": "longrope"}, "max_position_embeddings": 512}, 512),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}, "sliding_attention": None}}, None),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "longrope", "original_max_position_embeddings": 8}}},
            8,
        ),
    ],
)
def test_the_length_above_which_rows_have_other_frequencies(config: dict[str, Any], length: int | None) -> None:
    assert rope_regime(config) == length


def test_the_regime_of_a_file_and_of_its_transformers_config_are_one(tmp_path: Path) -> None:
    from transformers import AutoConfig

    directory = qwen3_reranker(tmp_path)
    factors = {"short_factor": [1.0] * 16, "long_factor": [4.0] * 16, "original_max_position_embeddings": 64}
    rewrite(directory / "config.json", rope_scaling={"type": "longrope", "factor": 2.0, **factors})
    config = AutoConfig.from_pretrained(directory)
    assert rope_regime(config.to_dict()) == rope_regime(json.loads((directory / "config.json").read_text())) == 64


def test_a_row_at_the_length_of_the_regime_is_a_short_one(tmp_path: Path) -> None:
    """transformers' own comparison: a batch of 64 tokens has the short frequencies, one of 65 the long ones."""
    import torch
    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 64}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, **factors}
    config = Qwen3Config(head_dim=16, max_position_embeddings=128, rope_parameters=rope)
    rotary, x = Qwen3RotaryEmbedding(config), torch.zeros(1, 1)
    cosines = {n: rotary(x, torch.arange(n)[None])[0][0, :64] for n in (63, 64, 65, 128)}
    assert torch.equal(cosines[64][:63], cosines[63])
    assert torch.equal(cosines[128], cosines[65])
    assert not torch.equal(cosines[64], cosines[65])


def test_dynamic_frequencies_are_used_only_where_they_are_steady(tmp_path: Path) -> None:
    directory = qwen3_reranker(tmp_path)
    dynamic = {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 2048}
    rewrite(directory / "config.json", rope_scaling=dynamic)
    assert resolve_model(str(directory)).max_length == 2048
    refused(ConfigError, directory, "found 4096", "32 to 2048", max_length=4096)
    rewrite(directory / "config.json", rope_scaling={"type": "dynamic", "factor": 2.0})
    assert resolve_model(str(directory), max_length=40960).max_length == 40960
