"""`model.dtype: float8` without a GPU: the rounding and the products, what of a model is rounded, who may have it, and
the self-test that judges it. The products run through torch's own operator, which CPUs have too."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
from conftest import candidate_rows, job, write
from safetensors.torch import load_file, save_file
from test_devices import GPU_BOX
from test_fused import BODIES, PACKS, body_of

from batch_rerank.config import parse_config
from batch_rerank.engine import float8, tested
from batch_rerank.engine.canaries import moved
from batch_rerank.engine.checkpoint import ModelSpec, resolve_model
from batch_rerank.engine.decoder import Packed
from batch_rerank.engine.float8 import FEWEST_ROWS, Rowwise, product, quantise, quantised
from batch_rerank.engine.scorer import make_scorer
from batch_rerank.engine.selftest import self_test
from batch_rerank.errors import ConfigError, ModelError
from batch_rerank.job.devices import settle
from batch_rerank.score.plan import make_plan

pytestmark = pytest.mark.usefixtures("one_thread")
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# ---- rounding and products


def test_an_element_moves_by_a_sixteenth_of_itself_at_most() -> None:
    rows = torch.randn(50, 96).bfloat16() * torch.logspace(-20, 20, 50)[:, None].bfloat16()
    rounded, scale = quantise(rows)
    assert (rounded.dtype, scale.dtype, scale.shape) == (torch.float8_e4m3fn, torch.float32, (50, 1))
    largest = rows.float().abs().amax(1, keepdim=True)
    error = (rounded.float() * scale - rows.float()).abs()
    normal = scale > float8.SMALLEST_SCALE
    assert normal.sum() > 30
    # e4m3 has 3 bits behind the first, and below 2^-6 steps of 2^-9
    allowed = torch.maximum(rows.float().abs() / 16, largest / 448 * 2**-10)
    assert (error <= allowed * 1.0001)[normal[:, 0]].all()
    assert (error <= largest)[~normal[:, 0]].all()
    assert error.sum() > 0


def test_a_rows_rounding_is_its_own() -> None:
    rows = torch.randn(6, 32)
    alone = [quantise(row[None]) for row in rows]
    rows[3] *= 1e4
    together, scale = quantise(rows)
    for at in (0, 1, 2, 4, 5):
        assert torch.equal(together[at].float(), alone[at][0][0].float())
        assert scale[at] == alone[at][1][0]


def test_a_row_of_zeros_gives_zeros_and_one_that_is_not_finite_gives_nan() -> None:
    rows = torch.randn(5, 32)
    rows[1], rows[2, 3], rows[3, 4] = 0, NAN, INF
    found = product(rows, quantised(torch.randn(16, 32), None))
    assert found[[0, 4]].isfinite().all()
    assert not found[1].any()
    assert found[[2, 3]].isnan().all()


@pytest.mark.parametrize("rows", [1, 40, FEWEST_ROWS + 1])
@pytest.mark.parametrize("biased", [False, True])
def test_torchs_operator_gives_what_plain_operations_do(
    monkeypatch: pytest.MonkeyPatch, rows: int, biased: bool
) -> None:
    """What a GPU is asked for: few rows are filled up, which no row may notice."""
    inputs = torch.randn(rows, 64).bfloat16()
    weight, bias = torch.randn(48, 64).bfloat16(), torch.randn(48).bfloat16() if biased else None
    weights = quantised(weight, bias)
    plain = product(inputs, weights)
    given: list[int] = []
    multiply = torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", lambda a, b, **more: given.append(len(a)) or multiply(a, b, **more))
    torch.testing.assert_close(float8._scaled_product(inputs, weights), plain, rtol=2**-7, atol=1e-3)
    assert given == [max(rows, FEWEST_ROWS)]
    exact = torch.nn.functional.linear(inputs.float(), weight.float(), None if bias is None else bias.float())
    of_it = (plain.float() - exact).norm() / exact.norm()
    assert 0.01 < of_it < 0.05, "an error of both roundings, 2.6 % each"


def test_a_weight_that_gpus_cannot_multiply_is_refused() -> None:
    with pytest.raises(ModelError, match=r"weight of \[24, 32\]; expected multiples of 16; set model.dtype to bfl"):
        quantised(torch.ones(24, 32), None)


# ---- what of a model is rounded


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", BODIES)
@torch.inference_mode()
def test_all_layers_but_the_last_are_rounded_and_the_model_stays(name: str, fused: bool) -> None:
    body = body_of(name).bfloat16()
    before = {key: weight.clone() for key, weight in body.state_dict().items()}
    pack = PACKS["groups, one without a prefix"]
    plain = Packed(body, "cpu", fused=fused).last_hidden(pack).float()
    packed = Packed(body, "cpu", fused=fused, float8=True)
    of_it = (packed.last_hidden(pack).float() - plain).norm() / plain.norm()
    assert 0.005 < of_it < 0.3
    first, last = (
        [block.query_key_value, block.output, block.down, block.gate_up or block.gate, block.gate_up or block.up]
        for block in packed._blocks
    )
    assert all(isinstance(weights, Rowwise) for weights in first)
    assert not any(isinstance(weights, Rowwise) for weights in last)
    assert all(torch.equal(weight, before[key]) for key, weight in body.state_dict().items())


@torch.inference_mode()
def test_a_model_of_one_layer_has_nothing_to_round() -> None:
    body = body_of("biases").bfloat16()
    del body.layers[1:]
    plain, rounded = (Packed(body, "cpu", float8=asked).last_hidden(PACKS["few"]) for asked in (False, True))
    assert torch.equal(plain, rounded)


# ---- who may have it


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    built: dict[str, str] = {}

    def directory(builder: str) -> str:
        if builder not in built:
            built[builder] = str(getattr(checkpoints, builder)(tmp_path_factory.mktemp(builder)))
        return built[builder]

    return directory


def on_gpu(directory: str, **given: Any) -> ModelSpec:
    return resolve_model(directory, dtype="float8", device="cuda", **given)


@pytest.mark.parametrize(
    ("builder", "given", "said"),
    [
        (
            "qwen3_reranker",
            {"device": "cpu"},
            "float8, which needs a GPU of compute capability 8.9 or later",
        ),
        ("xlmr_reranker", {"device": "cuda"}, "kind sequence_classification and architecture 'xlm-roberta'; expected"),
        ("qwen3_embedding", {"device": "cuda"}, "kind bi_encoder and architecture 'qwen3'; expected a decoder"),
    ],
)
def test_float8_is_for_decoders_on_gpus(directories: Callable[[str], str], builder: str, given: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve_model(directories(builder), dtype="float8", **given)


def test_a_padded_forward_has_none(directories: Callable[[str], str]) -> None:
    raw = {"input": {"layout": "flat", "path": "in"}, "output": {"path": "out"}}
    with pytest.raises(ConfigError, match="float8, which only the packed forward has; set forward to auto"):
        parse_config({**raw, "model": {"name": "x", "dtype": "float8", "forward": "padded"}}, "test")
    spec = on_gpu(directories("qwen3_reranker"))
    with pytest.raises(ModelError, match=r"float8, which model .* has not here: model.forward is padded; set bfloat16"):
        make_scorer(spec, "cpu", 500, "padded")


def test_an_architecture_without_a_packed_forward_has_none(tmp_path: Path) -> None:
    directory = checkpoints.qwen3_reranker(tmp_path)
    checkpoints.rewrite(directory / "config.json", use_bidirectional_attention=True)
    with pytest.raises(ModelError, match=r"float8, which model .* has not here: its attention looks both ways; set bf"):
        make_scorer(on_gpu(str(directory)), "cpu", 500)


@pytest.mark.parametrize(
    ("capability", "hip", "said"),
    [((8, 0), None, r"float8, but this GPU \(compute capability 8.0\) has none; set bf"), ((9, 4), "6.2", "ROCm")],
)
def test_gpus_without_it_are_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, directories: Callable[[str], str], capability: Any, hip: Any, said: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    with pytest.raises(ConfigError, match=said):
        make_scorer(on_gpu(directories("qwen3_reranker")), "cuda")


def test_it_is_another_job_than_bfloat16(directories: Callable[[str], str], tmp_path: Path) -> None:
    shard = write(tmp_path / "in.parquet", candidate_rows(2, 3))
    prints = set()
    for dtype in ("bfloat16", "float8"):
        model = {"model__name": directories("qwen3_reranker"), "model__kind": "auto", "model__dtype": dtype}
        asked = job(shard, tmp_path / "out", **model, model__max_length=128, cluster__gpus_per_actor=1)
        plan, _ = make_plan(settle(asked, GPU_BOX))
        assert plan.model["dtype"] == dtype
        prints.add(plan.fingerprint)
    assert len(prints) == 2


# ---- the self-test


@pytest.fixture(scope="module")
def steady(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    """A random model whose score is made in its last layer: the others add little to what they are given."""
    directory = checkpoints.qwen3_reranker(tmp_path_factory.mktemp("steady"))
    file = directory / "model.safetensors"
    weights = load_file(file)
    last = max(int(name.split(".")[2]) for name in weights if name.startswith("model.layers."))
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")) and f".{last}." not in name:
            weights[name] *= 0.005
    save_file(weights, file, {"format": "pt"})
    return on_gpu(str(directory))


def test_a_model_that_bears_it_passes_and_what_it_changes_is_said(steady: ModelSpec) -> None:
    result = self_test(steady, make_scorer(steady, "cpu"))
    assert result.passed, result.summary()
    assert "; float8: scores move by 0." in result.summary()
    assert "pairs of documents are turned" in result.summary()
    exact = self_test(replace(steady, dtype="bfloat16"), make_scorer(replace(steady, dtype="bfloat16"), "cpu"))
    assert "float8" not in exact.summary()
    assert (result.largest_difference or 0) > (exact.largest_difference or 1)


def test_a_model_that_does_not_ends_the_job_and_is_not_scored_in_bfloat16(directories: Callable[[str], str]) -> None:
    """Of random weights every layer's rounding reaches the score: the tolerance of bfloat16 does not take it."""
    spec = on_gpu(directories("qwen2_reranker"), template="mxbai-rerank-v2")
    with pytest.raises(ModelError, match=r"canaries: .*; float8: scores move by .*; set model.dtype to bfloat16$"):
        tested.tested_scorer(spec, "cpu")
    assert tested.tested_scorer(replace(spec, dtype="bfloat16"), "cpu").scorer.packed


def test_what_it_changes_is_counted_within_queries() -> None:
    slow = np.array([0, 1, 2, 5, 4], np.float32)
    fast = np.array([0, 2, 1, 1, 4], np.float32)
    group = np.array([0, 0, 0, 1, 1])
    assert slow.std() == pytest.approx(1.8547, abs=1e-3)
    expected = "scores move by 2.2 of their standard deviation at most and 0.65 on average, and 2 of 4 pairs of"
    assert moved(fast, slow, group).startswith(expected)
