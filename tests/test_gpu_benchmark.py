"""`make gpu`, rehearsed on a CPU with tiny shapes where nothing is installed but torch and transformers."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_imports import UNINSTALL

ROOT = Path(__file__).parent.parent
ABSENT = ("ray", "pyarrow", "fsspec", "pydantic")


def gpu(program: Path, directory: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, result and last line of the benchmark in a Python that lacks packages, its own processes' too."""
    (directory / "sitecustomize.py").write_text(UNINSTALL.format(absent=ABSENT))
    out = directory / "result.json"
    command = [sys.executable, str(program), "--device", "cpu", "--small", "--out", str(out), *arguments]
    environment = {**os.environ, "PYTHONPATH": f"{directory}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert out.exists(), done.stderr
    return done.returncode, json.loads(out.read_text()), done.stdout.splitlines()[-1]


def test_every_step_runs_and_parity_is_proven(tmp_path: Path) -> None:
    code, result, last = gpu(ROOT / "benchmarks" / "gpu.py", tmp_path)
    steps = ("card", "ceilings", "parity", "halving", "kernels", "0.6b", "4b", "8b")
    assert {name: result[name].get("error") for name in steps} == dict.fromkeys(steps), result
    assert (code, result["faults"], json.loads(last)) == (0, [], result)
    assert set(result["card"]["work"]["0.6b"]) >= {"flop_per_token_and_layer", "bytes_per_token_and_layer"}
    assert result["ceilings"]["best_matrix_tflops"] > 0
    for name in ("document first", "xlm-r", "bi-encoder, last"):
        paths = result["parity"][name]
        assert {f"{dtype}, {path}" for dtype in ("float32", "bfloat16") for path in ("padded", "packed")} < set(paths)
        assert all(path["passed"] for path in paths.values())
        assert ("float8, packed" in paths) == (name == "document first")
    assert result["halving"]["tokens_at_the_end"] < result["halving"]["asked_tokens"]
    assert {"rotate", "add_norm", "swiglu", "merge", "attention over 76"} < set(result["kernels"]["8b"])
    for name, goal in {"0.6b": 0.55, "4b": 0.75, "8b": 0.82}.items():
        assert (result[name]["goal_share"], result[name]["fallback"]) == (goal, None)
        for tokens in (65, 233):
            row = result[name][f"documents of {tokens}"]
            keys = {"pairs_per_s", "tokens_per_s", "share_of_matrix_rate", "goal_times", "others"}
            assert keys < set(row)
            assert any("padded" in other for other in row["others"])
            assert result[name]["float8"][f"documents of {tokens}"]["times_as_fast_as_bfloat16"]


def test_a_step_that_fails_is_recorded_and_does_not_end_the_others(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks")  # without tests/checkpoints.py, which parity needs
    code, result, _ = gpu(tmp_path / "benchmarks" / "gpu.py", tmp_path, "--steps", "parity", "card")
    assert code == 1
    assert "checkpoints.py" in result["parity"]["error"]
    assert result["faults"] == ["parity: not passed"]
    assert "error" not in result["card"]


@pytest.fixture(scope="module")
def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("gpu", ROOT / "benchmarks" / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_step_that_hangs_is_ended(benchmark: Any, tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert benchmark.wait(child, tmp_path / "x.done", time.monotonic()) == "not finished in time"
    finally:
        child.communicate()  # its input ends
    said = benchmark.wait(child, tmp_path / "x.done", time.monotonic() + 240)
    assert said == "the process ended with exit code 1"


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"parity": {"passed": True}, "halving": {"passed": True}, "4b": {"passed": True}}, []),
        ({"parity": {"passed": False}}, ["parity: not passed"]),
        ({"halving": {"error": "not finished in time"}}, ["halving: not passed"]),
        ({"card": {}, "0.6b": {"passed": False}}, ["0.6b: failed"]),
        ({"8b": {"error": "out of memory"}}, []),
    ],
)
def test_what_is_a_fault(benchmark: Any, found: dict[str, Any], expected: list[str]) -> None:
    assert benchmark.faults(found) == expected
