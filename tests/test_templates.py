"""Templates: every built-in one is well-formed, a user's own is checked with all its errors, and its content counts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import qwen3_reranker

from batch_rerank.config import parse_config
from batch_rerank.engine.checkpoint import resolve_model
from batch_rerank.engine.encoded import Group
from batch_rerank.engine.encoding import make_encoder
from batch_rerank.engine.packing import own_tokens
from batch_rerank.engine.reranker import Reranker
from batch_rerank.engine.scorer import relevance
from batch_rerank.engine.templates import HUB_MODELS, PAIR, SENTENCE, TEMPLATES, parse_template
from batch_rerank.errors import ConfigError, ModelError

OWN: dict[str, Any] = {"middle": "Q: {query}\nD: {document}\nRelevant?", "true_token": "yes", "false_token": "no"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen3_reranker(tmp_path_factory.mktemp("qwen"))


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=list(TEMPLATES))
def test_built_in_templates_pass_the_check_of_a_users_own(template: Any) -> None:
    parsed = parse_template({key: value for key, value in vars(template).items() if value != ()})
    assert parsed == template
    assert template.source


def test_every_hub_model_names_a_template_that_exists() -> None:
    assert {model.template for model in HUB_MODELS.values()} <= {*TEMPLATES, PAIR, SENTENCE}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"middle": "Q: {query}"}, ["middle: lacks {document}"]),
        ({"middle": "D: {document}"}, ["middle: lacks {query}"]),
        ({"middle": "{query} {document} {passage}"}, ["unknown places ['{passage}']"]),
        ({"middle": "{query} {document} {document}"}, ["{document} more than once"]),
        ({"middle": "{instruction} {query} {document}"}, ["instruction: missing"]),
        ({"instructed": "{query} {document}", "instruction": ""}, ["instructed: lacks {instruction}"]),
        ({"scale": 0}, ["scale"]),
        ({"scale": float("inf")}, ["scale"]),
        ({"scale": 10**400}, ["scale"]),
        ({"scale": float("nan")}, ["scale"]),
        ({"relevance": "softmax"}, ["relevance"]),
        ({"true_token": [1], "max_length": "long", "colour": 1}, ["true_token: found [1]", "max_length", "'colour'"]),
    ],
)
def test_a_wrong_template_is_refused_with_all_its_errors(changes: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        parse_template({**OWN, **changes})
    for words in ["model.template: ", *said]:
        assert words in str(error.value)


def test_a_template_without_its_required_keys_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"middle: missing"):
        parse_template({})


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ({"true_token": "Paris Moscow"}, "is [0-9]+ tokens here"),
        ({"true_token": "yes", "false_token": "yes"}, "both answers are token"),
        ({"true_token": 10**6}, "which the tokenizer does not have"),
    ],
)
def test_an_answer_that_is_not_one_token_of_its_own_is_refused(
    directory: Path, answers: dict[str, Any], said: str
) -> None:
    spec = resolve_model(str(directory), template={**OWN, **answers})
    with pytest.raises(ModelError, match=said):
        make_encoder(spec)  # so while planning, before an accelerator is taken


def test_an_unknown_template_name_lists_the_known(directory: Path) -> None:
    with pytest.raises(ConfigError, match=r"'qwen4'; expected one of .*qwen3-reranker-eval"):
        resolve_model(str(directory), template="qwen4")


def test_max_length_below_the_template_says_what_it_takes(directory: Path) -> None:
    spec = resolve_model(str(directory), max_length=40, template="qwen3-reranker")
    with pytest.raises(ConfigError, match=r"max_length: found 40, but the template 'qwen3-reranker' takes \d+ tokens"):
        make_encoder(spec)


def test_an_own_template_scores_with_its_own_words(directory: Path) -> None:
    documents = ["Paris", "Moscow", ""]
    own = Reranker(str(directory), template=OWN, device="cpu")
    assert own.spec.template == "custom"
    encoded = make_encoder(own.spec).encode([Group("where {document}?", documents)])
    text = own_text(own, encoded)
    assert text[0].replace(" ", "") == "Q:where{document}?D:ParisRelevant?"
    scores = own.score([("where {document}?", document) for document in documents])
    card = Reranker(str(directory), device="cpu").score([("where {document}?", document) for document in documents])
    assert np.abs(scores - card).max() > 0.01


def own_text(reranker: Reranker, encoded: Any) -> list[str]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(reranker.spec.directory) / "tokenizer.json"))
    own = own_tokens(encoded, np.arange(len(encoded.document)))
    rows = [[*encoded.segment(encoded.prefix[0]), *ids] for ids in own]
    return [tokenizer.decode(row).replace("\n", "") for row in rows]


def test_relevance_is_the_sigmoid_of_the_scaled_score(directory: Path) -> None:
    spec = resolve_model(str(directory), template="zerank")
    given = relevance(spec, np.array([10.0], np.float32))
    assert given == pytest.approx(1 / (1 + np.exp(-2.0)))
    assert relevance(resolve_model(str(directory), template="ctxl-rerank-v2"), np.zeros(1, np.float32)) is None


def test_where_pairs_are_tokenised_whole_a_query_still_shares_what_all_its_pairs_begin_with(directory: Path) -> None:
    glued = {"middle": "Judge the requirements. Query {query} the{document} yes?", "true_token": "yes"}
    encoder = make_encoder(resolve_model(str(directory), template=glued))
    assert encoder.way == "whole"  # type: ignore[attr-defined]
    query = "what is the capital of France?"
    encoded = encoder.encode([Group(query, ["\nParis", "Moscow", "Moscow"]), Group("x", []), Group(query, ["Moscow"])])
    assert len(encoded.segment(encoded.prefix[0])) > 10
    assert encoded.prefix[0] == encoded.prefix[2]
    assert encoded.document[1] == encoded.document[2] == encoded.document[3]


def test_a_query_after_its_document_still_shares_what_all_pairs_begin_with(directory: Path) -> None:
    spec = resolve_model(str(directory), template="ctxl-rerank-v2")
    encoded = make_encoder(spec).encode([Group("one", ["a", "b", "b"]), Group("two", ["a"])])
    assert len(encoded.segment(encoded.prefix[0])) > 10
    assert encoded.document.tolist() == [2, 3, 3, 2] == [d + 2 for d in (0, 1, 1, 0)], (
        "and its documents, of all queries"
    )


def test_a_job_file_may_carry_its_own_template() -> None:
    job = {"input": {"layout": "flat", "path": "x"}, "output": {"path": "y"}, "model": {"name": "m", "template": OWN}}
    assert parse_config(job, "job").model.template == OWN
    wrong = {**job, "model": {"name": "m", "template": {"middle": "{query}"}}, "cluster": {"actors": 0}}
    with pytest.raises(ConfigError, match=r"(?s)2 error\(s\).*model: template: middle: lacks.*cluster.actors"):
        parse_config(wrong, "job")
