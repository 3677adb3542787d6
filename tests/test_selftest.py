"""Every check of the self-test passes on a healthy model and catches its own fault, each injected here."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import (
    bert_embedding,
    bert_reranker,
    gemma_reranker,
    gte_reranker,
    jina_reranker,
    modernbert_reranker,
    qwen2_reranker,
    qwen3_embedding,
    qwen3_reranker,
    rewrite,
    xlmr_reranker,
)
from conftest import job
from safetensors.torch import load_file, save_file

from batch_rerank.engine import encoding, models
from batch_rerank.engine.canaries import canaries, few_tokens
from batch_rerank.engine.checkpoint import ModelSpec, resolve_model
from batch_rerank.engine.encoded import Encoded, Group
from batch_rerank.engine.encoding import make_encoder
from batch_rerank.engine.known import GOLDEN, KNOWN_TEMPLATES, PLANETS, Golden, KnownTemplate
from batch_rerank.engine.packing import own_tokens
from batch_rerank.engine.reference import Reference, in_float32
from batch_rerank.engine.scorer import Scorer, make_scorer
from batch_rerank.engine.selftest import RIGHT_WEIGHTS, SelfTest, rendered, self_test, unit_fault
from batch_rerank.engine.templates import TEMPLATES
from batch_rerank.errors import ModelError
from batch_rerank.job.selftest import run_self_test
from batch_rerank.score.steps import EncodedUnit, score_unit
from batch_rerank.store.plans import Unit
from batch_rerank.store.receipts import Receipt

Copy = Callable[[str], Path]
BUILDERS = {
    "qwen": qwen3_reranker,
    "qwen-untied": lambda path: qwen3_reranker(path, tied=False),
    "qwen-embedding": qwen3_embedding,
    "xlmr": xlmr_reranker,
    "bert": bert_reranker,
    "modernbert": modernbert_reranker,
    "minilm": bert_embedding,
    "bge": lambda path: bert_embedding(path, "cls"),
    "jina": jina_reranker,
    "gte": gte_reranker,
    "qwen2": qwen2_reranker,
    "gemma": gemma_reranker,
}
TEMPLATE = {"qwen2": "mxbai-rerank-v2", "gemma": "bge-reranker-v2-gemma"}  # of the others: auto
CAUSAL = ["load", "weights", "answers", "template", "head", "tokens", "canaries", "packs", "order", "spread"]
SHORT = {"max_length": 512}  # Qwen3-Embedding's 40,960 tokens take a second to tokenise


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: build(tmp_path_factory.mktemp("originals") / name) for name, build in BUILDERS.items()}


@pytest.fixture
def copy(originals: dict[str, Path], tmp_path: Path) -> Copy:
    """A copy of a good checkpoint, to damage."""
    return lambda name: Path(shutil.copytree(originals[name], tmp_path / name))


def loaded(directory: Path, forward: Any = "auto", **settings: Any) -> tuple[ModelSpec, Scorer]:
    spec = resolve_model(str(directory), **{**SHORT, **settings})
    return spec, make_scorer(spec, forward=forward)


def result_of(directory: Path, forward: Any = "auto", **settings: Any) -> SelfTest:
    return self_test(*loaded(directory, forward, **settings))


def verb(directory: Path, **keys: Any) -> SelfTest:
    """What `batch-rerank selftest` finds, the load included."""
    return run_self_test(job("none", "none", model__name=str(directory), model__kind="auto", **keys)).shown


def failed(result: SelfTest) -> dict[str, str]:
    return {check.name: check.seen for check in result.checks if not check.passed}


def edit_weights(directory: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(directory / "model.safetensors")
    edit(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


# ---- healthy models


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", BUILDERS)
def test_a_healthy_model_passes_in_every_dtype(originals: dict[str, Path], name: str, dtype: str) -> None:
    result = result_of(originals[name], dtype=dtype, template=TEMPLATE.get(name, "auto"))
    assert failed(result) == {}
    assert result.passed
    assert result.largest_difference is not None
    assert (result.largest_difference < 1e-4) == (dtype == "float32"), "bf16 is rounded, and the slow path is not"


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("instruction", [None, "judge {query} by its code"])
def test_every_template_is_known_and_passes(originals: dict[str, Path], template: str, instruction: str | None) -> None:
    if TEMPLATES[template].instruction is None:
        instruction = None
    name = {"bge-reranker-v2-gemma": "gemma", "mxbai-rerank-v2": "qwen2"}.get(template, "qwen")
    result = result_of(originals[name], template=template, instruction=instruction)
    assert failed(result) == {}
    assert {"template", "answers"} < {check.name for check in result.checks}


def test_the_result_names_its_checks_and_what_it_cannot_know(originals: dict[str, Path]) -> None:
    result = result_of(originals["qwen"])
    assert [check.name for check in result.checks] == CAUSAL
    assert result.not_checked == (RIGHT_WEIGHTS,)
    assert result.summary().startswith(f"self-test passed: {', '.join(CAUSAL)}; 30 pairs differ from the slow")
    assert "not checked: whether these are the weights that were meant" in result.summary()
    assert "\n" not in result.summary()


def test_a_wrong_but_healthy_checkpoint_is_not_found_and_the_result_says_so(copy: Copy) -> None:
    directory = copy("qwen-untied")
    edit_weights(directory, lambda weights: weights["lm_head.weight"].neg_())
    assert result_of(directory).passed
    assert RIGHT_WEIGHTS in result_of(directory).not_checked


def test_a_max_length_that_leaves_the_canaries_alike_does_not_fail_them(originals: dict[str, Path]) -> None:
    result = result_of(originals["qwen"], max_length=81)
    assert failed(result) == {}
    assert any(thing.startswith("order and spread of the scores: max_length 81") for thing in result.not_checked)


def test_a_model_that_reads_in_chunks_is_tested_on_cut_texts(originals: dict[str, Path]) -> None:
    result = result_of(originals["bert"], max_length=64, chunk_overlap=8)
    assert failed(result) == {}
    assert "where the chunks of long documents begin and end" in result.not_checked


def test_a_template_of_which_nothing_is_known_is_said_to_be_unchecked(
    originals: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(KNOWN_TEMPLATES, "qwen3-reranker")
    result = result_of(originals["qwen"])
    assert failed(result) == {}
    assert any("template 'qwen3-reranker'" in thing for thing in result.not_checked)


def test_the_free_scorer_has_nothing_to_test() -> None:
    result = run_self_test(job("none", "none")).shown
    assert (result.passed, result.checks) == (True, ())
    assert "no model" in result.not_checked[0]


@pytest.mark.parametrize(
    ("name", "max_length"), [("qwen", 4096), ("qwen-embedding", 4096), ("xlmr", 1024), ("bert", 512)]
)
def test_canaries_are_long_many_and_in_several_packs(originals: dict[str, Path], name: str, max_length: int) -> None:
    spec, scorer = loaded(originals[name], max_length=max_length)
    assert scorer.network is not None
    tried = canaries(Reference(spec, scorer.network).tokenizer, spec.max_length)
    encoded = make_encoder(spec).encode(tried.groups)
    lengths = np.diff(encoded.offsets)[encoded.document]
    assert set(np.diff(encoded.starts).tolist()) == {1, 2, 3, 4, 48}
    assert len(set(zip(*map(np.ndarray.tolist, (encoded.group_of_pair(), encoded.document)), strict=True))) == 66
    far, near = lengths[-1], lengths[-3]
    assert 600 <= near <= 700 or near > 0.6 * max_length
    assert 2000 <= far <= 2100 or encoded.n_tokens[-1] >= max_length
    assert far - near > 100 or max_length == 512
    many = slice(*encoded.starts[-3:-1])
    prefix = len(encoded.segment(int(encoded.prefix[-2])))
    own = sum(map(len, own_tokens(encoded, np.arange(many.start, many.stop))))
    assert own > 2 * (few_tokens(encoded) - prefix), "no two packs hold the largest group"
    assert {many.start, many.stop - 1} < set(tried.judged.tolist())


# ---- faults of the checkpoint


@pytest.mark.parametrize(("name", "part"), [("xlmr", "classifier.out_proj"), ("bert", "classifier"), ("qwen", "model")])
def test_a_zeroed_head_does_not_load(copy: Copy, name: str, part: str) -> None:
    directory = copy(name)
    edit_weights(directory, lambda weights: [value.zero_() for key, value in weights.items() if key.startswith(part)])
    assert "every weight of its scoring head is 0" in failed(verb(directory))["load"]


@pytest.mark.parametrize("name", ["qwen-untied", "xlmr"])
def test_a_head_zeroed_in_memory_is_found(originals: dict[str, Path], name: str) -> None:
    spec, scorer = loaded(originals[name])
    network: Any = scorer.network
    (network.lm_head if name == "qwen-untied" else network.classifier.out_proj).weight.data.zero_()
    assert "constant" in failed(self_test(spec, scorer))["head"]


def test_a_missing_key_does_not_load(copy: Copy) -> None:
    directory = copy("xlmr")
    edit_weights(directory, lambda weights: weights.pop("classifier.out_proj.weight"))
    assert "1 missing keys: classifier.out_proj.weight" in failed(verb(directory))["load"]


@pytest.mark.parametrize("name", ["qwen", "xlmr", "minilm", "qwen-embedding"])
def test_nan_weights_are_named_and_their_scores_refused(copy: Copy, name: str) -> None:
    directory = copy(name)
    key = (
        next(key for key in load_file(directory / "model.safetensors") if key.endswith("q_proj.weight"))
        if (name.startswith("qwen"))
        else "embeddings.LayerNorm.weight"
    )
    edit_weights(directory, lambda weights: [w.fill_(float("nan")) for k, w in weights.items() if k.endswith(key)])
    found = failed(result_of(directory))
    assert "NaN or infinity in 1 of" in found["weights"]
    assert key in found["weights"]
    assert "NaN or infinity" in found["canaries"]


def test_a_cut_safetensors_file_does_not_load(copy: Copy) -> None:
    weights = copy("xlmr") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "cut short" in failed(verb(weights.parent))["load"]


def test_an_embedding_checkpoint_forced_to_be_causal_does_not_load(originals: dict[str, Path]) -> None:
    config = job("none", "none", model__name=str(originals["qwen-embedding"]), model__kind="causal")
    assert "files say 'bi_encoder'" in failed(run_self_test(config).shown)["load"]


def test_an_answer_of_two_tokens_does_not_load(copy: Copy) -> None:
    directory = copy("qwen")
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    merges = [merge for merge in tokenizer["model"]["merges"] if "".join(merge) != "yes"]
    rewrite(directory / "tokenizer.json", model={**tokenizer["model"], "merges": merges})
    assert "the answer 'yes' is 2 tokens" in failed(verb(directory))["load"]


def test_a_tokenizer_that_ends_every_text_twice(copy: Copy) -> None:
    directory = copy("qwen-embedding")
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    template = tokenizer["post_processor"]["processors"][1]
    template["single"].append(template["single"][-1])
    rewrite(directory / "tokenizer.json", post_processor=tokenizer["post_processor"])
    assert "twice" in failed(result_of(directory))["tokens"]


@pytest.mark.parametrize("name", ["xlmr", "bert"])
def test_a_model_that_does_not_read_its_text_scores_all_alike(copy: Copy, name: str) -> None:
    directory = copy(name)
    dense = {"xlmr": "classifier.dense.weight", "bert": "bert.pooler.dense.weight"}[name]
    edit_weights(directory, lambda weights: weights[dense].zero_())
    assert "all 66 scores are" in failed(result_of(directory))["spread"]


def test_saturated_scores(copy: Copy) -> None:
    directory = copy("qwen-untied")
    edit_weights(directory, lambda weights: weights["lm_head.weight"].mul_(1e6))
    assert "all 66 scores are saturated" in failed(result_of(directory))["spread"]


def test_cosines_that_are_all_one(copy: Copy) -> None:
    directory = copy("bge")
    edit_weights(directory, lambda weights: weights["encoder.layer.1.output.LayerNorm.weight"].mul_(1e-6))
    assert "all 66" in failed(result_of(directory))["spread"]


# ---- faults of this program


def test_yes_and_no_swapped_in_our_extraction(originals: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    right = models.answer_tokens
    monkeypatch.setattr(models, "answer_tokens", lambda *given: right(*given)[::-1])
    assert list(failed(result_of(originals["qwen"]))) == ["canaries", "order"]


@pytest.mark.parametrize("field", ["prefix", "middle", "suffix"])
def test_a_newline_lost_from_the_template(
    originals: dict[str, Path], monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    right = TEMPLATES["qwen3-reranker"]
    text = getattr(right, field)
    before, after = (text[0] if field == "middle" else text).rsplit("\n", 1)
    wrong: Any = (before + after,) if field == "middle" else before + after
    monkeypatch.setitem(TEMPLATES, "qwen3-reranker", replace(right, **{field: wrong}))
    assert "sha256" in failed(result_of(originals["qwen"]))["template"]


def test_a_newline_lost_between_the_template_and_the_ids(
    originals: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = encoding.CausalEncoder

    def stripped(tokenizer: Any, template: Any, *rest: Any) -> Any:
        return right(tokenizer, replace(template, suffix=template.suffix[:-1]), *rest)

    monkeypatch.setattr(encoding, "CausalEncoder", stripped)
    assert {"tokens", "canaries"} <= set(failed(result_of(originals["qwen"])))


def test_a_vocabulary_that_gives_the_template_other_ids(
    originals: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, scorer = loaded(originals["qwen"])
    assert scorer.network is not None
    reference = Reference(spec, scorer.network)
    parts = rendered(TEMPLATES["qwen3-reranker"], str(TEMPLATES["qwen3-reranker"].instruction))
    ids = tuple(i for part in parts for i in reference.tokenizer.encode(part, add_special_tokens=False).ids)
    end = {"<|im_end|>": reference.tokenizer.token_to_id("<|im_end|>")}
    digest = KNOWN_TEMPLATES["qwen3-reranker"].sha256
    monkeypatch.setitem(KNOWN_TEMPLATES, "qwen3-reranker", KnownTemplate(digest, end, ids))
    assert failed(result_of(originals["qwen"])) == {}
    monkeypatch.setitem(KNOWN_TEMPLATES, "qwen3-reranker", KnownTemplate(digest, end, (*ids[:-1], 0)))
    assert list(failed(result_of(originals["qwen"]))) == ["template"]


@pytest.mark.parametrize("name", ["qwen-embedding", "minilm", "xlmr", "bert"])
def test_an_end_token_put_twice(originals: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    right = encoding.special_ids

    def doubled(probe: Any, n_sequences: int) -> Any:
        *rest, end = right(probe, n_sequences)
        return [*rest, np.concatenate([end, end[-1:]])]

    monkeypatch.setattr(encoding, "special_ids", doubled)
    monkeypatch.setattr(encoding.PairEncoder, "_assert_layout", lambda self: None)
    assert "expected" in failed(result_of(originals[name]))["tokens"]


@pytest.mark.parametrize("name", ["qwen", "qwen-embedding", "modernbert", "minilm"])
def test_padding_on_the_wrong_side(originals: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    right = models.padded

    def left(rows: Any, device: str) -> Any:
        ids, lengths = right(rows, device)
        shifts = (ids.shape[1] - lengths).tolist()
        return torch.stack([row.roll(shift) for row, shift in zip(ids, shifts, strict=True)]), lengths

    assert failed(result_of(originals[name], "padded")) == {}, "the padded path is right by itself"
    monkeypatch.setattr(models, "padded", left)
    assert "canaries" in failed(result_of(originals[name], "padded"))


@pytest.mark.parametrize("name", ["qwen", "qwen-embedding"])
def test_an_answer_read_one_position_early(
    originals: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    right = models.last
    monkeypatch.setattr(models, "last", lambda hidden, lengths: right(hidden, lengths - 1))
    assert "canaries" in failed(result_of(originals[name], "padded"))


def test_positions_of_packed_documents_that_start_anew(
    originals: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = models.as_pack

    def restarted(groups: Any, device: str) -> Any:
        pack = right(groups, device)
        documents = [np.arange(len(document)) for _, own in groups for document in own]
        shared = pack.prefixes.at[-1]
        anew = torch.cat([pack.positions[:shared], torch.from_numpy(np.concatenate(documents))])
        return replace(pack, positions=anew)

    monkeypatch.setattr(models, "as_pack", restarted)
    assert "canaries" in failed(result_of(originals["qwen"]))


def test_a_pooling_of_another_kind(originals: dict[str, Path]) -> None:
    spec, scorer = loaded(originals["minilm"])
    assert failed(self_test(spec, scorer)) == {}
    assert "canaries" in failed(self_test(replace(spec, pooling="cls"), make_scorer(spec)))


def test_a_slow_path_that_cannot_run_is_a_failure_not_a_crash(
    originals: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: Any) -> Any:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(Reference, "scores", broken)
    assert failed(result_of(originals["qwen"])) == {"canaries": "RuntimeError: no kernel"}


# ---- published scores


def test_published_scores_are_compared(originals: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    spec, scorer = loaded(originals["qwen"], instruction="the job's own, which published scores know nothing of")
    asked = replace(PLANETS, instruction=TEMPLATES["qwen3-reranker"].instruction)
    scores = tuple(scorer.score(make_encoder(spec).encode([asked])).tolist())
    monkeypatch.setitem(GOLDEN, spec.name, Golden("a card", "qwen3-reranker", scores))
    result = self_test(spec, scorer)
    assert result.passed
    assert [check.name for check in result.checks][-1] == "golden"
    assert result.not_checked == ()
    monkeypatch.setitem(GOLDEN, spec.name, Golden("a card", "qwen3-reranker", (scores[0] + 0.02, *scores[1:])))
    assert list(failed(self_test(spec, scorer))) == ["golden"]


def test_published_scores_are_not_compared_where_max_length_cuts_their_texts(
    originals: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, scorer = loaded(originals["xlmr"], max_length=32)
    monkeypatch.setitem(GOLDEN, spec.name, Golden("a card", "pair", (0.0,) * 4))
    result = self_test(spec, scorer)
    assert result.passed
    assert any("max_length 32 cuts their texts" in thing for thing in result.not_checked)


def test_the_known_template_is_the_model_cards_text() -> None:
    """Written out once more, so that template and digest cannot be wrong together."""
    import hashlib

    card = [
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n',
        "<Instruct>: Given a web search query, retrieve relevant passages that answer the query\n<Query>: query\n"
        "<Document>: document",
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ]
    other = [card[0], "<Instruct>: instruction\n<Query>: query\n<Document>: document", card[2]]
    known_template = KNOWN_TEMPLATES["qwen3-reranker"]
    assert hashlib.sha256("\0".join([*card, *other]).encode()).hexdigest() == known_template.sha256
    assert len(known_template.ids) == 39 + 26 + 9
    assert known_template.ids[-9:] == (151645, 198, 151644, 77091, 198, 151667, 271, 151668, 271)


# ---- the slow path


@pytest.mark.parametrize("name", ["qwen", "xlmr", "minilm"])
def test_the_slow_path_computes_in_float32_and_leaves_the_model_as_it_was(
    originals: dict[str, Path], name: str
) -> None:
    pairs = [("red", "blue"), ("a", ""), ("what is it?", "the capital of France")]
    spec, scorer = loaded(originals[name], dtype="bfloat16")
    assert scorer.network is not None
    before = {key: value.clone() for key, value in scorer.network.state_dict().items()}
    scores = Reference(spec, scorer.network).scores(pairs)
    after = scorer.network.state_dict()
    assert all(after[key].dtype == value.dtype and torch.equal(after[key], value) for key, value in before.items())
    wide = scorer.network.float()  # the same, already rounded, weights
    np.testing.assert_allclose(scores, Reference(spec, wide).scores(pairs), rtol=0, atol=1e-6)


def test_weights_are_put_back_where_a_forward_raises(
    originals: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, scorer = loaded(originals["qwen"], dtype="bfloat16")
    network: Any = scorer.network
    widened = []

    def broken(hidden: torch.Tensor) -> torch.Tensor:
        widened.append(output.weight.dtype)
        raise RuntimeError("no kernel")

    output = network.model.layers[1].self_attn.o_proj
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no kernel"), in_float32(network):
        patch.setattr(output, "forward", broken)
        network(input_ids=torch.tensor([[1, 2, 3]]))
    assert widened == [torch.float32]
    assert {weight.dtype for weight in network.parameters()} == {torch.bfloat16}
    assert network(input_ids=torch.tensor([[1, 2, 3]])).logits.dtype == torch.bfloat16, "no hook stays"


# ---- units


@pytest.fixture(scope="module")
def spec(originals: dict[str, Path]) -> ModelSpec:
    return resolve_model(str(originals["qwen"]), max_length=256)


def encoded(spec: ModelSpec, documents: list[str], query: str = "q") -> Encoded:
    return make_encoder(spec).encode([Group(query, documents)])


@pytest.mark.parametrize(
    ("score", "seen"), [(0.5, "all 40 scores are 0.5"), (float("nan"), "40 of 40 scores are NaN"), (90, "are 90")]
)
def test_a_unit_of_equal_scores_is_a_fault_from_32_distinct_sequences_on(
    spec: ModelSpec, score: float, seen: str
) -> None:
    scores = np.full(40, score, np.float32)
    fault = unit_fault(spec, encoded(spec, [f"text {i % 32}" for i in range(40)]), scores)
    assert fault is not None
    assert seen in fault
    assert "32 of its sequences are distinct" in fault
    assert unit_fault(spec, encoded(spec, [f"text {i % 31}" for i in range(40)]), scores) is None
    assert unit_fault(spec, encoded(spec, [f"{'long ' * 300}{i}" for i in range(40)]), scores) is None, "cut alike"
    assert unit_fault(replace(spec, kind="checksum"), encoded(spec, [str(i) for i in range(40)]), scores) is None


def test_a_unit_of_saturated_scores_is_a_fault(spec: ModelSpec) -> None:
    texts = encoded(spec, [str(i) for i in range(40)])
    assert "saturated" in str(unit_fault(spec, texts, np.linspace(20, 40, 40, dtype=np.float32)))
    assert unit_fault(spec, texts, np.linspace(10, 40, 40, dtype=np.float32)) is None
    assert unit_fault(spec, texts, np.linspace(-40, -20, 40, dtype=np.float32)) is None, "all irrelevant is no fault"
    assert unit_fault(replace(spec, relevance="none"), texts, np.linspace(20, 40, 40, dtype=np.float32)) is None


def test_cosines_of_one_are_a_fault_and_others_are_none(spec: ModelSpec) -> None:
    sentences = replace(spec, kind="bi_encoder", relevance="none", normalize=True)
    texts = encoded(spec, [str(i) for i in range(40)])
    ones = np.linspace(1 - 8e-6, 1, 40, dtype=np.float32)
    assert "all 40 cosines are 1" in str(unit_fault(sentences, texts, ones))
    assert unit_fault(sentences, texts, np.linspace(0.9, 1, 40, dtype=np.float32)) is None


def test_pairs_without_memory_are_left_out_of_the_judgement(spec: ModelSpec) -> None:
    texts = encoded(spec, [str(i) for i in range(40)])
    scores = np.linspace(0, 1, 40, dtype=np.float32)
    scores[:3] = np.nan
    assert unit_fault(spec, texts, scores) is None
    scores[3:] = 0.25
    assert "all 37 scores are 0.25" in str(unit_fault(spec, texts, scores))


class Constant:
    """A loaded scorer that has gone wrong after its self-test."""

    tag = self_test = fallback = ""

    def __init__(self, model: ModelSpec) -> None:
        self.model = model

    def score(self, encoded: Encoded) -> np.ndarray:
        return np.full(len(encoded.document), -1.5, np.float32)

    def device_lost(self) -> bool:
        return False


def test_a_unit_with_a_fault_stops_the_job_with_its_name(spec: ModelSpec) -> None:
    import pyarrow as pa

    unit = EncodedUnit(Unit("00003-00017", 3, 0, 40, 1, 40), pa.table({}), encoded(spec, list(map(str, range(40)))), 0)
    with pytest.raises(ModelError, match=r"unit 00003-00017: all 40 scores are -1\.5, though 40 of its") as caught:
        score_unit(unit, Constant(spec))  # type: ignore[arg-type]
    assert caught.value.exit_code == 5


def test_a_receipt_without_a_self_test_can_be_read() -> None:
    counts = "size rows_in rows_out queries scored failed null_texts null_queries empty_texts truncated tokens seconds"
    texts = "unit fingerprint part sha256 scorer"
    older = {**dict.fromkeys(counts.split(), 1), **dict.fromkeys(texts.split(), "x"), "unit": "00000-00000"}
    read = Receipt.from_json(json.dumps(older).encode(), "here")
    assert (read.self_test, read.fallback) == ("", "")
    newer = {**older, "fallback": "no kernel", "of_a_later_version": [1]}
    assert Receipt.from_json(json.dumps(newer).encode(), "here").fallback == "no kernel"


# ---- the verb


def job_file(directory: Path, model: Path) -> Path:
    path = directory / "job.yaml"
    path.write_text(
        f"input: {{layout: flat, path: {directory}/none/*.parquet}}\noutput: {{path: {directory}/out}}\n"
        f"model: {{name: {model}, max_length: 256}}\ncluster: {{gpus_per_actor: 0, cpus_per_actor: 2}}\n"
    )
    return path


def test_the_verb_prints_each_check_and_needs_no_input(
    originals: dict[str, Path], tmp_path: Path, cli: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, err = cli("selftest", job_file(tmp_path, originals["qwen"]))
    assert (code, out) == (0, "")
    lines = err.splitlines()
    assert [line.split()[:2] for line in lines[:-3]] == [["passed", name] for name in CAUSAL]
    assert lines[-3] == f"not checked: {RIGHT_WEIGHTS}"
    assert lines[-2].startswith("packed forward: self-test passed: load, ")
    assert lines[-2].endswith("; this one is used")
    assert lines[-1].startswith("padded forward: self-test passed: load, ")
    assert "is used" not in lines[-1]
    assert not (tmp_path / "out").exists()


def test_the_verb_ends_with_5_and_the_failed_check(
    copy: Copy, tmp_path: Path, cli: Callable[..., tuple[int, str, str]]
) -> None:
    directory = copy("bert")
    edit_weights(directory, lambda weights: weights["bert.pooler.dense.weight"].zero_())
    code, out, err = cli("selftest", job_file(tmp_path, directory), "--json")
    assert code == 5
    result = json.loads(out)
    assert (result["passed"], result["used"]) == (False, None)
    assert list(result["forwards"]) == ["packed", "padded"]
    assert [check["name"] for check in result["checks"] if not check["passed"]] == ["spread"]
    assert "FAILED  spread    all 66 scores are" in err
    assert "the self-test failed: spread" in err


def test_the_verb_reports_a_model_that_does_not_load(
    copy: Copy, tmp_path: Path, cli: Callable[..., tuple[int, str, str]]
) -> None:
    directory = copy("bert")
    edit_weights(directory, lambda weights: weights.pop("classifier.weight"))
    code, _, err = cli("selftest", job_file(tmp_path, directory))
    assert code == 5
    assert "FAILED  load" in err
    assert "classifier.weight" in err


def test_the_verb_leaves_wrong_settings_to_exit_code_2(
    originals: dict[str, Path], tmp_path: Path, cli: Callable[..., tuple[int, str, str]]
) -> None:
    code, _, err = cli("selftest", job_file(tmp_path, originals["qwen"]), "--set", "model.max_length=80")
    assert code == 2
    assert "takes 80 tokens" in err
