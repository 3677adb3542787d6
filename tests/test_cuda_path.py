"""The GPU path on a machine without a GPU: which kernel is chosen and what is said, a dry run on fake CUDA tensors that
finds every wrong device, dtype and hidden wait, and the kernel's results emulated on a CPU."""

import inspect
import itertools
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.attention import varlen
from torch.overrides import TorchFunctionMode
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from batch_rerank.engine.attention import Kernel, kernel_for
from batch_rerank.engine.checkpoint import ModelSpec, resolve_model
from batch_rerank.engine.encoded import Encoded, Group
from batch_rerank.engine.encoding import make_encoder
from batch_rerank.engine.float8 import Rowwise
from batch_rerank.engine.loading import load
from batch_rerank.engine.models import ClassificationModel, DecoderModel, EmbeddingModel
from batch_rerank.engine.packing import filled
from batch_rerank.engine.scorer import make_scorer
from batch_rerank.errors import ConfigError

DOCUMENT_FIRST = {"middle": "{document}\nQuery: {query}", "suffix": "<|im_end|>", "true_token": "yes"}
DEVICE = "cuda:0"  # without a number fake tensors ask a GPU which it is
GROUPS = [
    Group("where is Paris?", [f"{i} Paris river " * (1 + i % 7) for i in range(20)]),
    Group("one", ["alone"]),
    Group("where is Москва?", ["Москва " * 150, "x", "x", ""]),
]
BUILDERS: dict[str, tuple[Callable[..., Path], Any]] = {
    "causal": (checkpoints.qwen3_reranker, "auto"),
    "document first": (checkpoints.qwen3_reranker, DOCUMENT_FIRST),
    "biased": (checkpoints.qwen2_reranker, "mxbai-rerank-v2"),
    "gemma": (checkpoints.gemma_reranker, "bge-reranker-v2-gemma"),
    "xlmr": (checkpoints.xlmr_reranker, "auto"),
    "bert": (checkpoints.bert_reranker, "auto"),
    "gte": (checkpoints.gte_reranker, "auto"),
    "modernbert": (checkpoints.modernbert_reranker, "auto"),
    "embedding": (checkpoints.qwen3_embedding, "auto"),
    "mean": (checkpoints.bert_embedding, "auto"),
}


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], ModelSpec]:
    directories = {name: build(tmp_path_factory.mktemp("model")) for name, (build, _) in BUILDERS.items()}
    for name in ("xlmr", "bert", "gte", "mean"):
        checkpoints.rewrite(directories[name] / "config.json", num_attention_heads=2)  # of 24, which the kernel takes
    return lambda name, dtype: resolve_model(
        str(directories[name]), template=BUILDERS[name][1], dtype=dtype, device="cuda"
    )


def gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "capability", "name", "said"),
    [
        ("cpu", torch.float32, 128, None, "cpu", None),
        ("cpu", torch.bfloat16, 80, None, "cpu", None),
        ("cuda", torch.bfloat16, 128, (9, 0), "varlen", None),
        ("cuda:1", torch.float16, 64, (8, 0), "varlen", None),
        ("cuda", torch.bfloat16, 256, (10, 0), "varlen", None),
        ("cuda", torch.bfloat16, 288, (9, 0), "plain", "its heads are of 288"),
        ("cuda", torch.bfloat16, 36, (9, 0), "plain", "its heads are of 36"),
        ("cuda", torch.float32, 128, (9, 0), "plain", "packed sequences of float32"),
        ("cuda", torch.float16, 128, (7, 5), "plain", "compute capability 7.5, the kernel needs 8.0"),
        ("xpu", torch.bfloat16, 128, None, "plain", "device xpu has no kernel"),
    ],
)
def test_which_kernel_computes_attention(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    dtype: torch.dtype,
    head_dim: int,
    capability: Any,
    name: str,
    said: Any,
) -> None:
    gpu(monkeypatch, capability)
    found = kernel_for(device, dtype, head_dim)
    assert found.name == name
    assert (found.reason is None) if said is None else (said in (found.reason or ""))


def test_builds_of_torch_without_the_kernel_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "hip", "6.2")
        assert "ROCm" in str(kernel_for("cuda", torch.bfloat16, 128).reason)
    with monkeypatch.context() as patch:
        patch.delattr(varlen, "varlen_attn")
        assert "has no varlen_attn" in str(kernel_for("cuda", torch.bfloat16, 128).reason)
    with monkeypatch.context() as patch:
        patch.setattr(varlen, "varlen_attn", lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale: None)
        assert "varlen_attn has no return_aux, window_size" in str(kernel_for("cuda", torch.bfloat16, 128).reason)
    with monkeypatch.context() as patch:
        patch.setattr(varlen, "varlen_attn", varlen_2_11)
        assert kernel_for("cuda", torch.bfloat16, 128) == Kernel("varlen")


def test_a_gpu_without_bfloat16_is_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, specs: Callable[[str, str], ModelSpec]
) -> None:
    gpu(monkeypatch, (7, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=r"model.dtype: found bfloat16, .*capability 7.0.* has none; set float16"):
        make_scorer(specs("causal", "bfloat16"), "cuda")


class WithoutCuda(TorchFunctionMode):
    """What asks for a GPU in the Python of a torch that is built without CUDA, for fake tensors too, through operators:
    tensor[...], copies, and the choice among kernels for padded attention."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__:
            return self._view(*args)
        if func is torch.Tensor.__setitem__:
            target = self._view(*args[:2])
            if isinstance(args[2], torch.Tensor):
                return torch.ops.aten.copy_.default(target, args[2])
            return target.fill_(args[2])
        if func is torch.Tensor.copy_:
            return torch.ops.aten.copy_.default(*args, **(kwargs or {}))
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, key, value = args
            return query + 0 * (key.sum() + value.sum())  # refuses other devices and gives the shape and dtype
        return func(*args, **(kwargs or {}))

    def _view(self, tensor: torch.Tensor, index: Any) -> torch.Tensor:
        parts = list(index) if isinstance(index, tuple) else [index]
        whole = [slice(None)] * (tensor.ndim - sum(part is not None and part is not ... for part in parts))
        at = parts.index(...) if any(part is ... for part in parts) else len(parts)
        parts[at : at + 1] = whole
        dim, tensors = 0, {}
        for part in parts:
            if part is None:
                tensor, dim = tensor.unsqueeze(dim), dim + 1
            elif isinstance(part, int):
                tensor = tensor.select(dim, part)
            elif isinstance(part, slice):
                start, stop, step = part.indices(tensor.shape[dim])
                tensor, dim = torch.ops.aten.slice.Tensor(tensor, dim, start, max(start, stop), step), dim + 1
            else:
                tensors[dim], dim = part, dim + 1
        if not tensors:
            return tensor
        return torch.ops.aten.index.Tensor(tensor, [tensors.get(d) for d in range(max(tensors) + 1)])


def on_cpu(spec: ModelSpec) -> Any:
    auto = {"causal": AutoModelForCausalLM, "bi_encoder": AutoModel}.get(spec.kind, AutoModelForSequenceClassification)
    return load(auto, spec, "cpu")


def on_fake_gpu(model: Any, spec: ModelSpec, forward: str) -> Any:
    """The same with fake tensors on a GPU as its weights. The modes of the caller hold."""
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE)
                    store[name] = torch.nn.Parameter(fake, False) if store is module._parameters else fake
    if spec.kind == "causal":
        direction = torch.empty(model.config.hidden_size, device=DEVICE)
        return DecoderModel(spec, model, direction, DEVICE, forward)  # type: ignore[arg-type]
    kind = EmbeddingModel if spec.kind == "bi_encoder" else ClassificationModel
    return kind(spec, model, DEVICE, forward)  # type: ignore[arg-type]


def compute(model: Any, encoded: Encoded) -> list[torch.Tensor]:
    """A unit's packs, one after the other."""
    if isinstance(model, EmbeddingModel):
        rows = [encoded.segment(index) for index in range(len(encoded.offsets) - 1)]
        lengths = np.array([len(row) for row in rows], np.int32)
        return [model.embed([rows[i] for i in run]) for run in filled(lengths, 500)]
    return [model.scores(encoded, pairs) for pairs in model.split(encoded, np.arange(len(encoded.document)), 500)]


IN_FLOAT32 = [
    pytest.param(name, forward, "float32", marks=pytest.mark.slow)
    for name, forward in itertools.product(BUILDERS, ("packed", "padded"))
]
IN_FLOAT8 = [(name, "packed", "float8") for name in ("causal", "document first", "biased", "gemma")]


@pytest.mark.parametrize(
    ("name", "forward", "dtype"),
    [*itertools.product(BUILDERS, ("packed", "padded"), ("bfloat16",)), *IN_FLOAT8, *IN_FLOAT32],
)
def test_a_unit_runs_on_a_gpu_without_waiting_for_it(
    monkeypatch: pytest.MonkeyPatch, specs: Callable[[str, str], ModelSpec], name: str, forward: str, dtype: str
) -> None:
    """Fake tensors refuse a mixture of devices, and to be read by the host: a hidden wait raises."""
    if name == "modernbert" and forward == "packed":
        forward = "auto"
    gpu(monkeypatch)
    spec = specs(name, dtype)
    encoded = make_encoder(spec).encode(GROUPS)
    network = on_cpu(spec)
    with torch.no_grad(), FakeTensorMode(), WithoutCuda():  # inference mode takes apart what fake tensors know
        model = on_fake_gpu(network, spec, forward)
        if forward == "packed":
            packed = getattr(model, "_decoder", None) or model._encoder
            assert packed._kernel.name == ("plain" if dtype == "float32" else "varlen"), packed.slower
            if spec.dtype == "float8":
                assert isinstance(packed._blocks[0].down, Rowwise)
        results = compute(model, encoded)
    assert {(result.device.type, result.dtype) for result in results} == {("cuda", torch.float32)}
    assert results


def test_the_dry_run_finds_a_wait_and_a_wrong_device() -> None:
    with FakeTensorMode():
        scores = torch.empty(3, device=DEVICE)
        with pytest.raises(DataDependentOutputException):
            scores.max().item()
        with pytest.raises(RuntimeError, match="device"):
            scores + torch.empty(3, device="cpu")


def varlen_2_11(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Any:
    """FlashAttention-2 as torch calls it, in float32: causal is aligned to the last key; the log-sum-exps are
    float32[heads, n_q], +inf where a sequence has no keys."""
    assert query.dtype == key.dtype == value.dtype
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert len(cu_seq_q) == len(cu_seq_k)
    assert int(cu_seq_q[-1]) == len(query)
    assert int(cu_seq_k[-1]) == len(key) == len(value)
    assert int(cu_seq_q.diff().max()) == max_q
    assert int(cu_seq_k.diff().max()) == max_k
    assert window_size in ((-1, 0), (-1, -1))
    groups = query.shape[1] // key.shape[1]
    output = torch.full(query.shape, torch.nan)
    sums = torch.full((query.shape[1], len(query)), torch.nan)
    for (q0, q1), (k0, k1) in zip(pairwise(cu_seq_q.tolist()), pairwise(cu_seq_k.tolist()), strict=True):
        q, k, v = (t.float().transpose(0, 1) for t in (query[q0:q1], key[k0:k1], value[k0:k1]))
        products = q @ k.repeat_interleave(groups, 0).transpose(1, 2) * scale
        if window_size == (-1, 0):
            products += torch.full(products.shape[1:], -torch.inf).triu(1 + (k1 - k0) - (q1 - q0))
        if k0 == k1:
            output[q0:q1], sums[:, q0:q1] = 0, torch.inf
            continue
        sums[:, q0:q1] = products.logsumexp(-1)
        output[q0:q1] = (products.softmax(-1) @ v.repeat_interleave(groups, 0)).transpose(0, 1)
    return output.to(query.dtype), sums


def varlen_2_13(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Any = None,
    block_table: Any = None,
    num_splits: int | None = None,
) -> Any:
    """The same with the arguments of torch 2.13, which refuses shared keys unless they are asked for."""
    assert cu_seq_k is not None
    assert enable_gqa or query.shape[1] == key.shape[1]
    given = {"return_aux": return_aux, "scale": scale, "window_size": window_size}
    return varlen_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **given)


def test_the_emulation_of_2_13_has_the_signature_of_the_torch_that_is_here() -> None:
    if not torch.__version__.startswith("2.13"):
        pytest.skip(f"torch {torch.__version__} is here, not 2.13")
    assert list(inspect.signature(varlen_2_13).parameters) == list(inspect.signature(varlen.varlen_attn).parameters)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("emulation", [varlen_2_11, varlen_2_13], ids=["torch 2.11", "torch 2.13"])
@pytest.mark.parametrize("name", [name for name in BUILDERS if name != "modernbert"])
def test_the_gpus_branch_scores_as_the_plain_forward_does(
    monkeypatch: pytest.MonkeyPatch,
    specs: Callable[[str, str], ModelSpec],
    name: str,
    emulation: Callable[..., Any],
    dtype: str,
) -> None:
    calls = SimpleNamespace(n=0)

    def counted(*args: Any, **given: Any) -> Any:
        calls.n += 1
        return emulation(*args, **given)

    counted.__signature__ = inspect.signature(emulation)  # type: ignore[attr-defined]
    monkeypatch.setattr(varlen, "varlen_attn", counted)
    spec = specs(name, dtype)
    encoded = make_encoder(spec).encode(GROUPS)
    scorer: Any = make_scorer(spec, "cpu:0", 500)  # a device that is asked for what a GPU is asked for
    packed = getattr(scorer._model, "_decoder", None) or scorer._model._encoder
    packed._kernel = Kernel("varlen")
    scores = scorer.score(encoded)
    exact = make_scorer(specs(name, "float32"), "cpu", 500, "padded").score(encoded)
    assert calls.n
    difference = np.abs(scores - exact)
    if dtype == "float32":
        assert difference.max() < 1e-4
    else:
        assert difference.max() < (0.05 if spec.kind == "bi_encoder" else 0.25)
        assert difference.mean() < (0.02 if spec.kind == "bi_encoder" else 0.1)
