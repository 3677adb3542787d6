"""The kernels without a GPU: right in Triton's interpreter, and compiled ahead for each architecture that packs."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from batch_rerank.engine import float8, kernels

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (it has wheels for Linux on x86-64)"
)
SHARED = {80: 163, 89: 99, 90: 227, 100: 227}
"""KiB of shared memory that a block may have, by compute capability (CUDA C++ programming guide, table of features)."""


@needs_triton
def test_kernels_equal_their_plain_forms() -> None:
    """Each alone, and all in the decoder."""
    tests = [str(Path(__file__).with_name(name)) for name in ("interpreted_kernels.py", "test_fused.py")]
    command = [sys.executable, "-m", "pytest", *tests, "-p", "no:cacheprovider", "-k", "interpreted or few"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


def test_plain_forms_run_where_triton_is_absent(tmp_path: Path) -> None:
    (tmp_path / "triton.py").write_text("raise ImportError")
    check = (
        "import torch; from batch_rerank.engine import kernels as k; x = torch.ones(2, 8); assert not k.use(x); "
        "assert k.triton is None; assert torch.equal(k.swiglu(x), k.plain_swiglu(x)); "
        "print(k.missing(torch.device('cuda'), x.dtype))"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    command = [sys.executable, "-c", check]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.stdout == "Triton is not installed\n", done.stderr
    assert "plain operations do, slower" in done.stderr


def test_a_machine_that_cannot_launch_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    kernels.missing.cache_clear()
    reasons = {kernels.missing(torch.device("cuda"), torch.bfloat16) for _ in range(3)}
    assert len(reasons) == 1
    assert all(reasons)
    assert len(caplog.records) == 1
    kernels.missing.cache_clear()


def test_plain_forms_are_transformers_own() -> None:
    """The norm to the bit in bfloat16; the rotation, which rounds once and not three times, in float32."""
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        hidden = torch.randn(9, 128).to(dtype)
        norm = Qwen3RMSNorm(128, 1e-5).to(dtype)
        torch.nn.init.uniform_(norm.weight)
        ours = kernels.plain_add_norm_(hidden.clone(), None, (norm.weight.detach(), 1e-5))
        assert torch.equal(ours, norm(hidden))
        gemma = GemmaRMSNorm(128, 1e-5).to(dtype)
        torch.nn.init.normal_(gemma.weight)
        ours = kernels.plain_add_norm_(hidden.clone(), None, (1 + gemma.weight.detach().float(), 1e-5))
        assert torch.equal(ours, gemma(hidden))
    joined, angles = torch.randn(5, 4 * 16), torch.rand(5, 16) * 7
    query, key = joined.view(5, 4, 16).transpose(0, 1).clone().split([2, 1, 1])[:2]
    cos, sin = angles.cos(), angles.sin()
    expected = torch.cat([t.transpose(0, 1).flatten(1) for t in apply_rotary_pos_emb(query, key, cos, sin, 0)], 1)
    kernels.plain_rotate_(joined, 2, 1, cos, sin, None, None)
    torch.testing.assert_close(joined[:, :48], expected)


def launches() -> dict[str, tuple[Any, tuple[Any, ...], int]]:
    """Kernel, arguments and warps of what the functions launch at representative sizes, on tensors without memory."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    found: dict[str, tuple[Any, tuple[Any, ...], int]] = {}
    name = ""

    def record(kernel: Any, grid: object, on: object, *arguments: Any, warps: int) -> None:
        found[name] = kernel, arguments, warps

    with pytest.MonkeyPatch.context() as patch:  # only to see what would be launched
        patch.setattr(kernels, "use", lambda tensor: True)
        patch.setattr(kernels, "launch", record)
        norm = (empty(128), 1e-6)
        name = "rotate, normed"
        kernels.rotate_(empty(9, 48 * 128), 32, 8, empty(9, 128), empty(9, 128), norm, norm)
        name = "rotate, bare, heads of 80"
        kernels.rotate_(empty(9, 48 * 80), 32, 8, empty(9, 80), empty(9, 80), None, None)
        name = "add and norm, 4096"
        kernels.add_norm_(empty(9, 4096), empty(9, 4096), (empty(4096), 1e-6))
        name = "norm, longest row"
        kernels.add_norm_(empty(9, kernels.LONGEST_ROW), None, (empty(kernels.LONGEST_ROW), 1e-6))
        name = "gated activation"
        kernels.swiglu(empty(9, 2 * 12288))
        name = "rounding to float8, 12288"
        float8.quantise(empty(9, 12288))
        name = "merge"
        sums = (empty(32, 9, dtype=torch.float32).T, empty(32, 9, dtype=torch.float32).T)
        kernels.merge(empty(9, 32, 128), sums[0], empty(9, 32, 128), sums[1], empty(9, 32, 128))
    return found


@needs_triton
@pytest.mark.parametrize("capability", SHARED)
def test_kernels_compile_without_spills(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    for name, (kernel, arguments, warps) in launches().items():
        if "float8" in name and capability < 89:  # it has none
            continue
        compiled = ahead(kernel, arguments, warps, capability)
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        registers, stack, local = resources(cubin)
        print(f"{name}, {capability}: {registers} registers, {compiled.metadata.shared} B of shared memory")
        assert (stack, local) == (0, 0), f"{name}: registers spill"
        assert registers * 32 * warps <= 65536, f"{name}: a block's registers fit"
        assert compiled.metadata.shared <= SHARED[capability] * 1024, name
        assert not re.search(r"(ld|st)\.local", compiled.asm["ptx"]), name


POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.float8_e4m3fn: "*fp8e4nv",
}


def ahead(kernel: Any, arguments: tuple[Any, ...], warps: int, capability: int) -> Any:
    """A kernel compiled for these arguments as a launch would compile it: 16 divides pointers and most strides."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for index, (parameter, value) in enumerate(zip(kernel.params, arguments, strict=True)):
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


def resources(cubin: Path) -> tuple[int, int, int]:
    """Registers a thread, bytes of stack (spilled registers live there) and of local memory of a compiled kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    shown = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", shown)
    assert found, shown
    registers, stack, local = map(int, found.groups())
    return registers, stack, local
