"""The engine at its edges: nothing to score, no tokens, groups of one, a document before its query, 3,000 tokens, eight
bits, texts that break a model. Every score is that of the plain forward, one pair at a time."""

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import job, rows_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from batch_rerank.engine.attention import Cuts, Kernel, attend, kernel_for
from batch_rerank.engine.checkpoint import ModelSpec, resolve_model
from batch_rerank.engine.encoded import Encoded, Group
from batch_rerank.engine.encoding import make_encoder
from batch_rerank.engine.memory import TokenBudget
from batch_rerank.engine.models import causal_model, classification_model
from batch_rerank.engine.packing import filled, own_tokens, prefix_of
from batch_rerank.engine.reference import Reference
from batch_rerank.engine.scorer import BiEncoderScorer, PairScorer, Scorer, make_scorer
from batch_rerank.engine.selftest import self_test
from batch_rerank.engine.tokens import load_tokenizer
from batch_rerank.engine.work import Arithmetic, Work
from batch_rerank.job.run import run
from batch_rerank.score.poison import MOST_POISON
from batch_rerank.score.steps import NO_TOKENS, Done, EncodedUnit, LoadedScorer, score_unit
from batch_rerank.score.timesheet import Timesheet

DOCUMENT_FIRST = {"middle": "{document}\nQuery: {query}", "suffix": "<|im_end|>", "true_token": "yes"}
TEMPLATES = {
    "document first": DOCUMENT_FIRST,
    "biased": "mxbai-rerank-v2",
    "decoder's head": "qwen3-reranker",
    "both ways": "pair",
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 16,
    "long_factor": [6.0 + i for i in range(16)],
    "original_max_position_embeddings": 150,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "longrope": {"rope_parameters": LONGROPE, "rope_theta": None},
    "both ways": {"is_causal": False},
}
BUILDERS = {
    "causal": checkpoints.qwen3_reranker,
    "document first": checkpoints.qwen3_reranker,
    "biased": checkpoints.qwen2_reranker,
    "decoder's head": checkpoints.qwen3_seq_cls,
    "longrope": checkpoints.qwen3_reranker,
    "both ways": checkpoints.qwen3_seq_cls,
    "xlmr": checkpoints.xlmr_reranker,
    "bert": checkpoints.bert_reranker,
    "modernbert": checkpoints.modernbert_reranker,
    "embedding": checkpoints.qwen3_embedding,
    "mean": checkpoints.bert_embedding,
}


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelSpec]:
    """A checkpoint of every kind, which reads 4,000 tokens where it can."""
    found = {}
    for name, build in BUILDERS.items():
        directory = build(tmp_path_factory.mktemp(name.replace(" ", "-")))
        checkpoints.rewrite(directory / "config.json", **CONFIGS.get(name, {}))
        template: Any = TEMPLATES.get(name, "auto")
        longest = resolve_model(str(directory), template=template).max_length
        found[name] = resolve_model(str(directory), template=template, max_length=min(longest, 4000))
    return found


def scorer_of(spec: ModelSpec, budget: int = 4096, forward: Any = "auto") -> Scorer:
    return make_scorer(spec, "cpu", budget, forward)


def plain(spec: ModelSpec, scorer: Scorer, groups: list[Group]) -> np.ndarray:
    assert scorer.network is not None
    return Reference(spec, scorer.network).scores([(g.query, d) for g in groups for d in g.documents])


@pytest.mark.parametrize("name", BUILDERS)
def test_nothing_to_score_is_no_scores(specs: dict[str, ModelSpec], name: str) -> None:
    spec = specs[name]
    encoder, scorer = make_encoder(spec), scorer_of(spec)
    for groups in ([], [Group("q", [])], [Group("q", []), Group("r", [])]):
        assert scorer.score(encoder.encode(groups)).shape == (0,)


@pytest.mark.parametrize("name", ["embedding", "mean"])
def test_texts_that_are_all_remembered_get_the_same_scores_again(specs: dict[str, ModelSpec], name: str) -> None:
    encoder, scorer = make_encoder(specs[name]), scorer_of(specs[name])
    encoded = encoder.encode([Group("Paris?", ["Paris", "Moscow"]), Group("Paris?", ["Moscow"])])
    first = scorer.score(encoded)
    np.testing.assert_array_equal(scorer.score(encoded), first)
    assert first[1] == first[2]


def test_a_unit_of_nulls_ends(tmp_path: Path, specs: dict[str, ModelSpec]) -> None:
    rows = [{"query_id": str(q), "query": "what?", "doc_id": str(d), "text": None} for q in range(3) for d in range(4)]
    rows[-1]["text"] = "one that is scored"
    schema = pa.schema([(name, pa.string()) for name in rows[0]])
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "in.parquet")
    for name, spec in {"none": None, **specs}.items():
        if name not in ("none", "causal", "mean"):
            continue
        model = {"name": spec.name, "kind": "auto"} if spec else {"name": "none", "kind": "checksum"}
        output = tmp_path / name
        config = job(tmp_path / "in.parquet", output, input__unit_pairs=4, scoring__max_failed_rows=1.0)
        config = config.model_copy(update={"model": config.model.model_copy(update=model)})
        assert run(config, local=True).totals.null_texts == 11
        table = rows_of(output)
        assert table["error"].to_pylist().count("text is null") == 11
        assert table["score"].null_count == 11


@pytest.mark.parametrize("budget", [64, 4096])
def test_a_document_before_its_query_is_scored_like_any_other(specs: dict[str, ModelSpec], budget: int) -> None:
    """A group of one shared nothing with itself: beside a group of three it had no keys."""
    spec = specs["document first"]
    groups = [Group("what is it?", ["one alone"]), Group("where?", ["first of three", "second", "third\n"])]
    encoder = make_encoder(spec)
    encoded = encoder.encode(groups)
    assert encoder.way == "apart"  # type: ignore[attr-defined]
    scorer = scorer_of(spec, budget)
    scores = scorer.score(encoded)
    np.testing.assert_allclose(scores, plain(spec, scorer, groups), atol=1e-4)
    assert len(set(scores.tolist())) == 4


def test_a_query_behind_text_that_joins_its_document_keeps_the_ids_of_the_whole(specs: dict[str, ModelSpec]) -> None:
    spec = resolve_model(
        specs["causal"].name,
        template={"middle": "Judge {document} yes? {query} no", "suffix": "<|im_end|>", "true_token": "yes"},
        max_length=64,
    )
    encoder = make_encoder(spec)
    groups = [Group(q, ["ends in spaces  ", "x", "long " * 60, ""]) for q in ("what is it?", "", "river " * 60)]
    encoded = encoder.encode(groups)
    tokenizer = Tokenizer.from_file(str(Path(spec.directory) / "tokenizer.json"))
    own = own_tokens(encoded, np.arange(12))
    prefixes = prefix_of(encoded, np.arange(12))
    for pair, (query, document) in enumerate((g.query, d) for g in groups for d in g.documents):
        found = [*encoded.segment(prefixes[pair]), *own[pair]]
        whole = tokenizer.encode(f"Judge {document} yes? {query} no<|im_end|>", add_special_tokens=False).ids
        assert len(found) == encoded.n_tokens[pair] <= 64
        assert (found == whole) == (not encoded.truncated[pair]), (query, document)
        assert found[-4:] == whole[-4:]
    assert encoded.truncated.tolist() == [False, False, True, False] * 2 + [True] * 4


@pytest.mark.parametrize("template", ["pair", "{query}{document}", "{document}\nQuery: {query}"])
def test_groups_without_a_prefix_keep_their_own_scores_beside_others(tmp_path: Path, template: str) -> None:
    """They stand last in a pack: their scores went to the pairs that had been asked for in their place."""
    if template == "pair":
        spec = resolve_model(str(checkpoints.qwen3_seq_cls(tmp_path)), template="pair")
    else:
        own = {"middle": template, "suffix": "<|im_end|>", "true_token": "yes"}
        spec = resolve_model(str(checkpoints.qwen3_reranker(tmp_path)), template=own)
    groups = [
        Group("", ["Paris", "river river"]),
        Group("what is the capital of France?", ["Paris", "", "where"]),
        Group("x", ["", "yes no"]),
        Group("", ["capital"]),
        Group("where?", ["Moscow"]),
    ]
    encoder, scorer = make_encoder(spec), scorer_of(spec)
    scores = scorer.score(encoder.encode(groups))
    readable = ~np.isnan(scores)
    padded = scorer_of(spec, forward="padded").score(encoder.encode(groups))
    np.testing.assert_allclose(scores, padded, atol=1e-4)
    np.testing.assert_allclose(scores[readable], plain(spec, scorer, groups)[readable], atol=1e-4)
    assert len(set(scores[readable].round(4).tolist())) > 5


def test_a_query_longer_than_max_length_leaves_the_others_their_scores(tmp_path: Path) -> None:
    spec = resolve_model(str(checkpoints.qwen3_reranker(tmp_path)), template="ctxl-rerank-v2", max_length=96)
    groups = [Group("river " * 200, ["Paris", "Moscow"]), Group("where?", ["Paris", "Moscow rises"])]
    encoded = make_encoder(spec).encode(groups)
    scores, padded = (scorer_of(spec, forward=forward).score(encoded) for forward in ("packed", "padded"))
    np.testing.assert_allclose(scores, padded, atol=1e-4)
    assert encoded.truncated.tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    ("labels", "template"), [(1, "qwen3-reranker"), (2, "qwen3-reranker"), (2, "pair"), (2, "zerank")]
)
def test_a_decoders_classification_head_passes_its_self_test(tmp_path: Path, labels: int, template: str) -> None:
    spec = resolve_model(str(checkpoints.qwen3_seq_cls(tmp_path, labels)), template=template)
    result = self_test(spec, scorer_of(spec))
    assert result.passed, result.summary()


def test_control_tokens_of_an_instruction_are_escaped_too(specs: dict[str, ModelSpec]) -> None:
    spec = resolve_model(specs["causal"].name, escape=True)
    plain_ids, hostile = (
        make_encoder(spec).encode([Group("q", ["d"], f"be kind{end}")]) for end in ("", " <|im_end|>")
    )
    end = load_tokenizer(Path(spec.directory)).token_to_id("<|im_end|>")
    assert [int((encoded.tokens == end).sum()) for encoded in (plain_ids, hostile)] == [1, 1]


def test_a_query_that_breaks_costs_the_rows_of_a_unit_that_is_its_own(specs: dict[str, ModelSpec]) -> None:
    encoded = make_encoder(specs["mean"]).encode([Group("what river?", [f"{' x' * n} Paris" for n in range(48)])])
    rows = pa.table({"doc_id": [str(i) for i in range(48)], "error": pa.nulls(48, pa.string())})
    scored = score_unit(EncodedUnit(None, rows, encoded, 0), Broken(specs["mean"], "river", True))  # type: ignore[arg-type]
    assert scored.rows["error"].null_count == 0
    assert len(scored.scores) == 0


def test_a_long_row_leaves_the_rows_beside_it_as_they_are(specs: dict[str, ModelSpec]) -> None:
    """transformers takes one set of longrope frequencies for a whole batch: short rows moved by up to 1.9."""
    spec = specs["longrope"]
    encoder, scorer = make_encoder(spec), scorer_of(spec)
    assert "longrope" in str(scorer.fallback)
    documents = ["Paris", "river " * 10, "where " * 300, "x", "rise " * 500]
    scores = scorer.score(encoder.encode([Group("what?", documents)]))
    alone = np.concatenate([scorer.score(encoder.encode([Group("what?", [document])])) for document in documents])
    np.testing.assert_allclose(scores, alone, atol=1e-5)
    np.testing.assert_allclose(scores, plain(spec, scorer, [Group("what?", documents)]), atol=1e-4)


@pytest.mark.parametrize("labels", [1, 2])
def test_a_decoders_classification_head_reads_the_last_position_of_any_batch(tmp_path: Path, labels: int) -> None:
    """Padded with id 0 it read another: a score depended on its batch by 0.14."""
    spec = resolve_model(str(checkpoints.qwen3_seq_cls(tmp_path, labels)), template="qwen3-reranker")
    encoder, scorer = make_encoder(spec), scorer_of(spec)
    assert scorer.fallback is None
    groups = [Group("what?", ["Paris", "river " * 40, "!", ""]), Group("where?", ["Paris"])]
    scores = scorer.score(encoder.encode(groups))
    alone = [scorer.score(encoder.encode([Group(g.query, [d])]))[0] for g in groups for d in g.documents]
    np.testing.assert_allclose(scores, alone, atol=1e-5)
    np.testing.assert_allclose(scores, plain(spec, scorer, groups), atol=1e-4)
    padded = scorer_of(spec, forward="padded").score(encoder.encode(groups))
    np.testing.assert_allclose(scores, padded, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["xlmr", "bert", "modernbert"])
def test_eight_bits_tell_a_hundred_documents_apart(specs: dict[str, ModelSpec], name: str, dtype: str) -> None:
    """The head computed in the model's dtype, and gave 30 or 7 distinct scores."""
    spec = resolve_model(specs[name].name, dtype=dtype)
    words = ("Paris", "river", "capital", "France", "rise")
    documents = [" ".join(order) for order in itertools.permutations(words)][:100]
    groups = [Group("what is the capital?", documents)]
    scores = scorer_of(spec).score(make_encoder(spec).encode(groups))
    assert len(set(scores.tolist())) > 95
    exact = scorer_of(specs[name]).score(make_encoder(specs[name]).encode(groups))
    assert np.abs(scores - exact).max() < 0.25


class Broken:
    """A loaded bi-encoder, some of whose tokens break it."""

    def __init__(self, spec: ModelSpec, word: str, raises: bool) -> None:
        (self._token,) = load_tokenizer(Path(spec.directory)).encode(word, add_special_tokens=False).ids
        self.model, self._scorer = spec, scorer_of(spec)
        self.about: dict[str, str] = {}
        self.sheet = Timesheet()
        assert self._scorer.network is not None
        if raises:
            self._scorer.network.register_forward_pre_hook(self._refuse, with_kwargs=True)
        else:
            with torch.no_grad():
                self._scorer.network.get_input_embeddings().weight[self._token] = torch.nan

    def _refuse(self, module: Any, args: Any, kwargs: Any) -> None:
        if (kwargs["input_ids"] == self._token).any():
            raise RuntimeError("cannot read this")

    def score(self, encoded: Encoded) -> np.ndarray:
        return self._scorer.score(encoded)

    def computed(self) -> Work:
        return Work()

    def device_lost(self) -> bool:
        return False

    def fetched(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize("raises", [True, False], ids=["raises", "NaN"])
@pytest.mark.parametrize("where", ["document", "query", "both"])
def test_a_text_that_breaks_a_bi_encoder_costs_its_rows(specs: dict[str, ModelSpec], where: str, raises: bool) -> None:
    spec = specs["mean"]
    bad = {"document": {(q, 3) for q in range(4)}, "query": {(1, d) for d in range(30)}}
    bad["both"] = bad["document"] | bad["query"]
    queries = [f"what is {q}?" + (" river" if q == 1 and where != "document" else "") for q in range(4)]
    texts = [f"Paris {d}" + (" river" if d == 3 and where != "query" else "") for d in range(30)]
    assert len(bad["query"]) > MOST_POISON
    encoded = make_encoder(spec).encode([Group(query, texts) for query in queries])
    rows = pa.table({"doc_id": [str(i) for i in range(120)], "error": pa.nulls(120, pa.string())})
    scored = score_unit(EncodedUnit(None, rows, encoded, 0), Broken(spec, "river", raises))  # type: ignore[arg-type]
    errors = scored.rows["error"].to_pylist()
    assert {(pair // 30, pair % 30) for pair, error in enumerate(errors) if error} == bad[where]
    assert all(error.startswith("engine: ") for error in errors if error)
    expected = scorer_of(spec).score(encoded)
    good = [pair for pair, error in enumerate(errors) if error is None]
    np.testing.assert_allclose(scored.scores, expected[good], atol=1e-6)


def test_texts_without_a_token_are_rows_with_an_error(tmp_path: Path) -> None:
    for build in (checkpoints.xlmr_reranker, checkpoints.bert_embedding):
        directory = build(tmp_path / build.__name__)
        checkpoints.rewrite(directory / "tokenizer.json", post_processor=None)
        spec = resolve_model(str(directory))
        groups = [Group("", ["", "Paris"]), Group("where?", ["", "Paris", "", "river"])]
        encoded = make_encoder(spec).encode(groups)
        rows = pa.table({"doc_id": [str(i) for i in range(6)], "error": pa.nulls(6, pa.string())})
        loaded: Any = object.__new__(LoadedScorer)
        loaded.model, loaded._scorer, loaded._device, loaded.tag, loaded.self_test = (
            spec,
            scorer_of(spec),
            "cpu",
            "",
            "",
        )
        loaded.fallback, loaded._fetched = "", None
        loaded._turn, loaded.sheet = threading.Lock(), Timesheet()
        loaded._arithmetic, loaded._done = Arithmetic.of(spec), Done()
        errors = score_unit(EncodedUnit(None, rows, encoded, 0), loaded).rows["error"].to_pylist()
        alone = [0] if spec.kind == "sequence_classification" else [0, 1, 2, 4]
        assert [i for i, error in enumerate(errors) if error == NO_TOKENS] == alone
        assert [error for error in errors if error not in (None, NO_TOKENS)] == []


def test_sequences_of_no_tokens_are_filled_into_runs() -> None:
    for lengths in ([5, 0, 0], [0, 0], [0, 5, 0, 20, 0, 0], [0]):
        runs = list(filled(np.array(lengths, np.int32), 10))
        assert np.concatenate(runs).tolist() == list(range(len(lengths)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
def test_plain_attention_is_the_kernels_and_no_keys_weigh_nothing(dtype: torch.dtype, causal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 0, 1500, 1]
    keys = lengths if causal else [4, 2, 0, 1300]
    query = torch.randn(sum(lengths), 4, 16, generator=generator).to(dtype)
    key, value = (torch.randn(sum(keys), 2, 16, generator=generator).to(dtype) for _ in range(2))
    found = []
    for kernel in (Kernel("cpu"), Kernel("plain")):
        out = torch.full_like(query, torch.nan)
        cuts, key_cuts = Cuts.of(lengths, "cpu"), Cuts.of(keys, "cpu")
        sums = attend(query, key, value, cuts, key_cuts, 0.25, causal, out, kernel)
        found.append((out.float(), sums))
    (ours, our_sums), (theirs, their_sums) = found
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(our_sums, their_sums, atol=1e-4, rtol=1e-4)
    if not causal:
        assert (our_sums[3:1503] == -torch.inf).all()
        assert (ours[3:1503] == 0).all()


def test_the_kernel_of_a_cpu_is_torchs_own() -> None:
    assert kernel_for("cpu", torch.float32, 17) == Kernel("cpu")


TEXTS = st.integers(0, 60).flatmap(
    lambda n: st.sampled_from(["river ", "Paris? ", "where\n", "北京"]).map(lambda w: w * n)
)
LONG = st.sampled_from(["where does the river rise " * 500, "Paris " * 700])
DOCUMENTS = st.lists(st.one_of(TEXTS, TEXTS, TEXTS, LONG), max_size=5)


@pytest.fixture(scope="module")
def loaded(specs: dict[str, ModelSpec]) -> Iterator[dict[str, tuple[ModelSpec, Scorer]]]:
    yield {name: (spec, scorer_of(spec)) for name, spec in specs.items()}


@pytest.mark.parametrize("name", BUILDERS)
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(queries=st.lists(st.tuples(TEXTS, DOCUMENTS), max_size=4), budget=st.sampled_from([1, 100, 700, 4096]))
def test_no_group_length_or_budget_changes_a_score(
    loaded: dict[str, tuple[ModelSpec, Scorer]], name: str, queries: list[tuple[str, list[str]]], budget: int
) -> None:
    """float32 against the plain forward of each pair alone; zero to 3,000 tokens."""
    spec, scorer = loaded[name]
    groups = [Group(query, documents) for query, documents in queries]
    encoded = make_encoder(spec).encode(groups)
    scorer._budget.tokens = budget  # type: ignore[attr-defined]
    if isinstance(scorer, BiEncoderScorer):
        scorer._cache.clear()
    scores = scorer.score(encoded)
    expected = plain(spec, scorer, groups)
    assert len(scores) == len(expected) == sum(len(documents) for _, documents in queries)
    np.testing.assert_allclose(scores, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["causal", "document first", "xlmr"])
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(queries=st.lists(st.tuples(TEXTS, DOCUMENTS), min_size=1, max_size=3), data=st.data())
def test_eight_bits_packed_or_padded_stay_near_the_plain_float32_forward(
    specs: dict[str, ModelSpec], name: str, queries: list[tuple[str, list[str]]], data: st.DataObject
) -> None:
    spec = resolve_model(specs[name].name, template=(specs[name].causal and DOCUMENT_FIRST) or "auto", dtype="bfloat16")
    load = causal_model if spec.kind == "causal" else classification_model
    model = load(spec, "cpu", data.draw(st.sampled_from(["packed", "padded"])))
    scorer = PairScorer(model, TokenBudget(data.draw(st.sampled_from([1, 300, 4096]))))
    groups = [Group(query, documents) for query, documents in queries]
    scores, expected = scorer.score(make_encoder(spec).encode(groups)), plain(spec, scorer, groups)
    # tiny models with weights ten times a real one's: their scores spread over 20, and 8 bits cost 1 % of that
    assert np.all(np.abs(scores - expected) < 0.05 * np.maximum(10, np.abs(expected)))
