"""Run by test_kernels.py in a process with TRITON_INTERPRET=1: the kernels on CPU tensors against their plain forms."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from triton import language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from batch_rerank.engine import float8, kernels

Tensor = torch.Tensor
torch.set_num_threads(1)  # operations on a few numbers each
DTYPES = [torch.float32, torch.bfloat16]
ROWS = [0, 1, 3, 17, 129]
HEADS = {"0.6B": (16, 8), "4B and 8B": (32, 8)}
WIDTHS = {"0.6B": (1024, 3072), "4B": (2560, 9728), "8B": (4096, 12288)}


@pytest.fixture(autouse=True)
def arithmetic_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton 3.6's interpreter cuts float32 to bfloat16 off, where every GPU rounds to the nearest; to float8
    it loses the carry and makes numbers of NaN."""
    cast = InterpreterBuilder.cast_impl

    def rounded(self: InterpreterBuilder, source: TensorHandle, to: tl.dtype) -> TensorHandle:
        if (source.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, to)
        values = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.int16)
        return TensorHandle(values.numpy().view(np.uint16), to.scalar)

    def narrowed(self: InterpreterBuilder, source: TensorHandle, to: tl.dtype, rounding: object) -> TensorHandle:
        assert (source.dtype.scalar, to.scalar) == (tl.float32, tl.float8e4nv)
        values = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.float8_e4m3fn).view(torch.uint8)
        return TensorHandle(values.numpy(), to.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fp_to_fp", narrowed)
    for name in ("cast_impl", "create_fp_trunc"):
        monkeypatch.setattr(InterpreterBuilder, name, rounded)
    with np.errstate(all="ignore"):  # infinities are met in silence too
        yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def strided(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Random rows in the middle of a wider buffer."""
    return torch.randn(rows, width + 24).to(dtype)[:, 8 : width + 8]


def same_view(tensor: Tensor) -> Tensor:
    """A copy in a buffer of its own, with the same strides."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(tensor)


def assert_equal(found: Tensor, expected: Tensor, flips: float = 0.01) -> None:
    """float32: to 1e-5. bfloat16: to two of its steps, and all but one in a hundred to the bit."""
    assert found.dtype == expected.dtype
    assert found.isfinite().all()
    steps = 1e-5 if found.dtype == torch.float32 else 2**-7
    torch.testing.assert_close(found, expected, rtol=steps, atol=steps)
    if found.dtype != torch.float32 and found.numel() > 100:
        assert (found != expected).float().mean() < flips


def assert_rotates(rows: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, normed: bool) -> None:
    joined = strided(rows, (heads + 2 * kv_heads) * dim, dtype)
    before, expected = joined.clone(), same_view(joined)
    angles = torch.rand(rows, dim) * 7
    norms = [(torch.rand(dim).add(0.5).to(dtype), epsilon) if normed else None for epsilon in (1e-6, 0.3)]
    others = (heads, kv_heads, angles.cos().to(dtype), angles.sin().to(dtype), *norms)
    kernels.rotate_(joined, *others)
    kernels.plain_rotate_(expected, *others)
    assert_equal(joined, expected)
    values = (heads + kv_heads) * dim
    assert torch.equal(joined[:, values:], before[:, values:]), "values stay"
    assert not rows or not torch.equal(joined[:, :values], before[:, :values])


def test_these_tests_run_the_kernels() -> None:
    assert kernels.INTERPRETED
    assert kernels.use(torch.ones(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normed", [True, False], ids=["normed", "bare"])
@pytest.mark.parametrize("shape", HEADS)
def test_rotation_at_the_shapes_of_models(shape: str, normed: bool, dtype: torch.dtype) -> None:
    assert_rotates(3, *HEADS[shape], 128, dtype, normed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_rotation_of_other_heads(dim: int, dtype: torch.dtype) -> None:
    assert_rotates(2, 14, 2, dim, dtype, True)


@pytest.mark.parametrize(("heads", "kv_heads"), [(7, 7), (3, 1), (5, 0), (0, 5)])
def test_rotation_of_any_number_of_heads(heads: int, kv_heads: int) -> None:
    assert_rotates(2, heads, kv_heads, 64, torch.bfloat16, True)


@pytest.mark.parametrize("rows", ROWS)
def test_rotation_of_any_number_of_rows(rows: int) -> None:
    assert_rotates(rows, 1, 1, 64, torch.bfloat16, True)


def assert_adds(rows: int, width: int, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    residual, added = strided(rows, width, dtype), strided(rows, width, dtype)
    expected, norm = same_view(residual), (torch.rand(width).to(weight_dtype), 1e-6)
    for more in (added, None):
        found = kernels.add_norm_(residual, more, norm)
        assert_equal(found, kernels.plain_add_norm_(expected, more, norm))
        assert torch.equal(residual, expected), "the sum is rounded alike"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", WIDTHS)
def test_addition_and_norm_at_the_shapes_of_models(shape: str, dtype: torch.dtype) -> None:
    assert_adds(5, WIDTHS[shape][0], dtype, dtype)


@pytest.mark.parametrize("rows", ROWS)
def test_addition_and_norm_of_any_number_of_rows(rows: int) -> None:
    assert_adds(rows, 100, torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize("width", [1, 64, 1000])
def test_addition_and_norm_with_weights_in_float32(width: int) -> None:
    assert_adds(3, width, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", WIDTHS)
def test_gated_activation_at_the_shapes_of_models(shape: str, dtype: torch.dtype) -> None:
    joined = strided(5, 2 * WIDTHS[shape][1], dtype) * 5
    assert_equal(kernels.swiglu(joined), kernels.plain_swiglu(joined))


@pytest.mark.parametrize(("rows", "inner"), [(0, 80), (1, 1), (3, 1023), (17, 1025), (129, 80)])
def test_gated_activation_of_any_size(rows: int, inner: int) -> None:
    joined = strided(rows, 2 * inner, torch.bfloat16)
    joined[:, :1] = -300.0  # exp(300) overflows float32
    found = kernels.swiglu(joined)
    assert found.shape == (rows, inner)
    assert_equal(found, kernels.plain_swiglu(joined))


@pytest.mark.parametrize("width", [64, 1000, WIDTHS["8B"][1], kernels.LONGEST_ROW + 16])
def test_rounding_to_float8(width: int) -> None:
    rows = strided(4, width, torch.bfloat16) * 3
    rows[1] = 0
    found, scale = float8.quantise(rows)
    expected, expected_scale = float8.plain_quantise(rows)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
    assert (found.float() != expected.float()).float().mean() < 0.001, "a scale's last bit moves few across a border"
    torch.testing.assert_close(found.float(), expected.float(), rtol=0.126, atol=0)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_has_a_scale_of_nan(odd: float) -> None:
    rows = strided(3, 64, torch.bfloat16)
    rows[1, 5] = odd
    _, scale = float8.quantise(rows)
    assert scale[:, 0].isnan().tolist() == [False, True, False]


def attentions(rows: int, heads: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two attentions with their log-sum-exps, [heads, rows] seen from the other side, as torch's varlen gives them."""
    own, other = torch.randn(2, rows, heads, dim).to(dtype)
    lse, other_lse = (torch.randn(heads, rows) * 4 for _ in range(2))
    return own, lse.T, other, other_lse.T


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "dim"), [(16, 128), (32, 128), (14, 64), (5, 80), (3, 256)])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_merge_in_place_and_elsewhere(rows: int, heads: int, dim: int, dtype: torch.dtype) -> None:
    own, lse, other, other_lse = attentions(rows, heads, dim, dtype)
    expected = torch.empty_like(own)
    kernels.plain_merge(own, lse, other, other_lse, expected)
    elsewhere = torch.zeros(rows + 2, heads + 1, dim, dtype=dtype)
    kernels.merge(own, lse, other, other_lse, elsewhere[1 : rows + 1, 1:])
    assert_equal(elsewhere[1 : rows + 1, 1:], expected)
    assert not elsewhere[:, 0].any()
    assert not elsewhere[[0, -1]].any(), "rows around stay"
    kernels.merge(own, lse, other, other_lse, own)
    assert_equal(own, expected)


@pytest.mark.parametrize("rows", [17, 129])
def test_merge_of_many_rows(rows: int) -> None:
    own, lse, other, other_lse = attentions(rows, 2, 64, torch.bfloat16)
    expected = torch.empty_like(own)
    kernels.plain_merge(own, lse, other, other_lse, expected)
    kernels.merge(own, lse, other, other_lse, own)
    assert_equal(own, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("merge", [kernels.merge, kernels.plain_merge], ids=["kernel", "plain"])
@pytest.mark.parametrize("none", [float("inf"), float("-inf")])
def test_a_set_without_keys_counts_for_nothing(none: float, merge: object, dtype: torch.dtype) -> None:
    own, lse, other, other_lse = attentions(4, 2, 64, dtype)
    other_lse[0], other[0] = none, float("nan")
    lse[1], own[1] = none, float("nan")
    lse[2] = other_lse[2] = none
    lse[3], other_lse[3] = -300.0, 300.0
    expected = torch.stack([own[0], other[1], own[2], other[3]])
    merge(own, lse, other, other_lse, own)  # type: ignore[operator]
    assert torch.equal(own, expected)


def test_rows_that_are_not_adjacent_are_refused() -> None:
    with pytest.raises(ValueError, match="adjacent"):
        kernels.swiglu(torch.ones(4, 6).T)
