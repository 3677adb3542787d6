"""The decoder as GPUs compute it, on CPU tensors, against the decoder as CPUs do. Here `kernels.py` computes with its
plain forms; test_kernels.py runs this file again in Triton's interpreter."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    GemmaConfig,
    GemmaModel,
    LlamaConfig,
    LlamaModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
)

from batch_rerank.engine import kernels
from batch_rerank.engine.decoder import Pack, Packed
from batch_rerank.engine.models import as_pack

SIZES = {
    "vocab_size": 300,
    "hidden_size": 80,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
BODIES: dict[str, tuple[type, Any]] = {
    "norms of queries and keys": (Qwen3Model, Qwen3Config(**SIZES)),
    "biases": (Qwen2Model, Qwen2Config(**SIZES)),
    "neither": (LlamaModel, LlamaConfig(**SIZES)),
    "another activation, norms from 1": (GemmaModel, GemmaConfig(**SIZES)),
}


def body_of(name: str) -> Any:
    """A random body: no weight, norm or bias at its usual start."""
    torch.manual_seed(0)
    model, config = BODIES[name]
    body = model(config)
    for parameter in body.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2 + (parameter.dim() == 1)
    return body.eval()


def packed_groups(*groups: tuple[int, list[int]]) -> Pack:
    """Groups of random ids: the length of the prefix, those of its documents."""
    random = np.random.default_rng(0)
    drawn = [
        (random.integers(0, 300, prefix), [random.integers(0, 300, n) for n in documents])
        for prefix, documents in groups
    ]
    return as_pack(drawn, "cpu")


PACKS = {
    "few": packed_groups((3, [2, 1]), (0, [2]), (4, [1])),
    "groups, one without a prefix": packed_groups((5, [3, 1, 9]), (0, [4, 2]), (17, [1])),
    "no prefix": packed_groups((0, [7, 1])),
    "one token": packed_groups((0, [1])),
}
"""The interpreter gets the few."""


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("name", BODIES)
@torch.inference_mode()
def test_the_fused_forward_is_the_cpus(name: str, pack: str) -> None:
    assert kernels.use(torch.ones(1)) == kernels.INTERPRETED, "the kernels run where they can"
    body = body_of(name)
    expected = Packed(body, "cpu").last_hidden(PACKS[pack])
    torch.testing.assert_close(Packed(body, "cpu", fused=True).last_hidden(PACKS[pack]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BODIES)
@torch.inference_mode()
def test_in_bfloat16_the_fused_forward_is_as_near_to_float32_as_the_cpus(name: str) -> None:
    pack = PACKS["groups, one without a prefix"]
    body = body_of(name).bfloat16()
    errors = [Packed(body, "cpu", fused=fused).last_hidden(pack).float() for fused in (False, True)]
    exact = Packed(body.float(), "cpu").last_hidden(pack)
    plain, fused = (float((error - exact).norm() / exact.norm()) for error in errors)
    assert fused < 0.05
    assert fused < 2 * plain  # how a CPU rounds between its steps is its own: 0.9 to 1.5 were seen
