"""Packs hold every pair once within the budget; memory that runs out halves it; no way of packing changes a score."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest
import torch
from checkpoints import modernbert_reranker, qwen3_reranker, rewrite, xlmr_reranker
from transformers import AutoModelForCausalLM

from batch_rerank.engine.checkpoint import resolve_model
from batch_rerank.engine.encoded import Encoded, Group
from batch_rerank.engine.encoding import make_encoder
from batch_rerank.engine.memory import SMALLEST, TokenBudget, choose_budget
from batch_rerank.engine.models import DecoderModel, causal_model, classification_model
from batch_rerank.engine.packing import LONG, Index, distinct_pairs, filled, long_apart, own_tokens, shared_packs
from batch_rerank.engine.scorer import PairScorer, make_scorer
from batch_rerank.engine.work import Work
from batch_rerank.score.steps import EncodedUnit, score_unit
from batch_rerank.score.timesheet import Timesheet

GROUPS = [
    Group("where is Paris?", [f"{i} Paris " * (1 + i % 7) for i in range(60)]),
    Group("one", ["alone"]),
    Group("none", []),
    Group("where is Москва?", ["Москва " * 200, "x", "x", ""]),
    Group("where is Paris?", ["0 Paris ", "new"]),
]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen3_reranker(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def encoded(qwen: Path) -> Encoded:
    return make_encoder(resolve_model(str(qwen))).encode(GROUPS)


def test_equal_pairs_have_one_representative(encoded: Encoded) -> None:
    representative = distinct_pairs(encoded)
    assert representative[62] == representative[63] == 62, "x twice"
    assert representative[65] == 0, "the same query in another group, the same document"
    assert len(set(representative.tolist())) == len(representative) - 2


@pytest.mark.parametrize("budget", [1, 200, 500, 10**6])
def test_packs_hold_every_pair_once_within_the_budget(encoded: Encoded, budget: int) -> None:
    pairs = np.unique(distinct_pairs(encoded))
    packs = list(shared_packs(encoded, pairs, budget))
    assert sorted(np.concatenate(packs).tolist()) == pairs.tolist()
    prefix = encoded.prefix[encoded.group_of_pair()]
    lengths = np.diff(encoded.offsets)
    for pack in packs:
        own = encoded.n_tokens[pack] - lengths[prefix[pack]]
        tokens = int(own.sum() + lengths[np.unique(prefix[pack])].sum())
        assert tokens <= budget or len(pack) == 1
        assert np.count_nonzero(np.diff(prefix[pack])) == len(np.unique(prefix[pack])) - 1, "a prefix's pairs adjoin"


def test_a_query_that_needs_several_packs_is_spread_evenly(encoded: Encoded) -> None:
    first = np.arange(60)
    sizes = [int(encoded.kept[pack].sum()) for pack in shared_packs(encoded, first, 500)]
    assert len(sizes) > 2
    assert min(sizes) > 0.6 * max(sizes)


def test_runs_without_padding_keep_the_order() -> None:
    lengths = np.array([5, 5, 20, 1, 1, 1], np.int32)
    assert [run.tolist() for run in filled(lengths, 10)] == [[0, 1], [2], [3, 4, 5]]
    assert list(filled(np.empty(0, np.int32), 10)) == []


def test_long_sequences_are_packed_apart_from_short_ones() -> None:
    assert [part.tolist() for part in long_apart(np.array([5, 8000, LONG, LONG + 1, 0]))] == [[0, 2, 4], [1, 3]]
    assert [part.tolist() for part in long_apart(np.array([5, 1]))] == [[0, 1]]
    assert [part.tolist() for part in long_apart(np.array([5000]))] == [[0]]
    assert long_apart(np.array([], np.int32)) == []


@pytest.mark.parametrize("build", [qwen3_reranker, xlmr_reranker])
def test_a_gpus_kernel_gets_long_pairs_in_packs_of_their_own(tmp_path: Path, build: object) -> None:
    spec = resolve_model(str(build(tmp_path)))  # type: ignore[operator]
    documents = ["Paris " * n for n in (3, 990, 1600, 8, 2000, 1)]
    groups = [Group("where?", documents), Group("what?", documents[:3])]
    encoded = make_encoder(spec).encode(groups)
    model = (causal_model if spec.kind == "causal" else classification_model)(spec, "cpu")
    whole = PairScorer(model, TokenBudget(4096)).score(encoded)
    path: Any = model._decoder if isinstance(model, DecoderModel) else model._encoder
    path.long_apart = True
    packs = list(model.split(encoded, np.arange(9), 4096))
    assert sorted(np.concatenate(packs).tolist()) == list(range(9))
    own = np.diff(encoded.offsets)[encoded.document]
    assert all((own[pack] > 1024).all() or (own[pack] < 1024).all() for pack in packs)
    np.testing.assert_allclose(PairScorer(model, TokenBudget(4096)).score(encoded), whole, atol=1e-5)


class Device:
    """A device whose memory holds so many tokens."""

    def __init__(self, lengths: list[int], tokens: int) -> None:
        self.lengths, self.tokens, self.tried = np.array(lengths, np.int32), tokens, 0

    def split(self, items: Index, budget: int) -> Iterator[Index]:
        return (items[run] for run in filled(self.lengths[items], budget))

    def compute(self, items: Index) -> torch.Tensor:
        self.tried += 1
        if self.lengths[items].sum() > self.tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.from_numpy(items.astype(np.float32))


def test_memory_that_runs_out_halves_the_budget_for_good(caplog: pytest.LogCaptureFixture) -> None:
    device = Device([10] * 40, tokens=100)
    budget = TokenBudget(400)
    with caplog.at_level(logging.WARNING, "batch_rerank"):
        items, results = budget.start(np.arange(40), device.split, device.compute)()
    assert budget.tokens == 100
    assert sorted(items.tolist()) == results[np.argsort(items)].tolist() == list(range(40))
    assert [record.getMessage() for record in caplog.records] == [
        "memory ran out: the token budget is halved to 200",
        "memory ran out: the token budget is halved to 100",
    ]
    device.tried = 0
    budget.start(np.arange(40), device.split, device.compute)()
    assert device.tried == 4


def test_an_item_that_does_not_fit_alone_is_left_out_and_the_others_are_not() -> None:
    device = Device([10, 10, 500, 10], tokens=100)
    items, _ = TokenBudget(50).start(np.arange(4), device.split, device.compute)()
    assert sorted(items.tolist()) == [0, 1, 3]


def test_other_errors_are_not_taken_for_memory() -> None:
    def compute(items: Index) -> torch.Tensor:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        TokenBudget(10).start(np.arange(2), Device([1, 1], 9).split, compute)


def test_a_pair_that_memory_is_too_small_for_becomes_an_error_row(
    qwen: Path, encoded: Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = causal_model(resolve_model(str(qwen)), "cpu")
    whole = PairScorer(model, TokenBudget(4096)).score(encoded)
    scores = DecoderModel.scores

    def small(self: DecoderModel, encoded: Encoded, pairs: Index) -> torch.Tensor:
        if encoded.n_tokens[pairs].sum() > 250:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return scores(self, encoded, pairs)

    monkeypatch.setattr(DecoderModel, "scores", small)

    class Loaded:
        about: ClassVar[dict[str, str]] = {}
        sheet = Timesheet()
        model = resolve_model(str(qwen))

        def score(self, encoded: Encoded) -> np.ndarray:
            return PairScorer(model, TokenBudget(4096)).score(encoded)

        def device_lost(self) -> bool:
            return False

        def computed(self) -> Work:
            return Work()

        def fetched(self) -> dict[str, int]:
            return {}

    rows = pa.table({"doc_id": [str(i) for i in range(67)], "error": pa.nulls(67, pa.string())})
    scored = score_unit(EncodedUnit(None, rows, encoded, 0), Loaded())  # type: ignore[arg-type]
    errors = scored.rows["error"].to_pylist()
    long = int(encoded.n_tokens[61])
    assert errors[61] == f"out of memory: a sequence of {long} tokens does not fit; lower max_length"
    assert [error for error in errors if error] == [errors[61]]
    np.testing.assert_allclose(scored.scores, np.delete(whole, 61), rtol=0, atol=1e-5)


def test_the_budget_comes_from_free_memory(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = causal_model(resolve_model(str(qwen)), "cpu").model
    assert choose_budget(model, "cpu") == 4096
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_AVPHYS_PAGES": 2000, "SC_PAGE_SIZE": 4096}[name])
    assert SMALLEST <= choose_budget(model, "cpu") < 4096
    monkeypatch.setattr("os.sysconf", lambda name: 1)
    assert choose_budget(model, "cpu") == SMALLEST


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("build", [qwen3_reranker, xlmr_reranker])
def test_packed_and_padded_agree(tmp_path: Path, build: object, dtype: str) -> None:
    spec = resolve_model(str(build(tmp_path)), dtype=dtype)  # type: ignore[operator]
    encoded = make_encoder(spec).encode(GROUPS)
    kind = causal_model if spec.kind == "causal" else classification_model
    packed, padded = (
        PairScorer(kind(spec, "cpu", forward), TokenBudget(500)).score(encoded) for forward in ("packed", "padded")
    )
    difference = np.abs(packed - padded)
    assert difference.max() < (1e-4 if dtype == "float32" else 0.25)
    assert difference.mean() < (1e-5 if dtype == "float32" else 0.1)


def test_a_model_without_a_packed_forward_is_padded_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = resolve_model(str(modernbert_reranker(tmp_path)))
    with caplog.at_level(logging.WARNING, "batch_rerank"):
        make_scorer(spec)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "batches are padded" in line
    assert "'modernbert' has no packed forward" in line


def test_a_sliding_window_is_never_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = qwen3_reranker(tmp_path)
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
    rewrite(directory / "config.json", **window)
    spec = resolve_model(str(directory))
    encoded = make_encoder(spec).encode(GROUPS[:1])
    with caplog.at_level(logging.WARNING, "batch_rerank"):
        scores = make_scorer(spec).score(encoded)
    assert "sliding window" in caplog.text
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = np.concatenate([encoded.segment(encoded.prefix[0]), *own_tokens(encoded, np.array([0]))]).tolist()
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, -1]
    tokenizer_ids = [model.config.vocab_size and make_encoder(spec)._tokenizer.token_to_id(t) for t in ("yes", "no")]  # type: ignore[attr-defined]
    assert scores[0] == pytest.approx(float(logits[tokenizer_ids[0]] - logits[tokenizer_ids[1]]), abs=1e-4)
