"""The package as users get it: a wheel, in an environment of its own, far from the repository."""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from conftest import candidate_rows, write

import batch_rerank

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves a `build` folder where it builds, and puts what is there into the wheel."""
    copy, built = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (copy / name).write_bytes((ROOT / name).read_bytes())
    for path in sources():
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        (copy / path).write_bytes((ROOT / path).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(built), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(built.glob("*.whl"))


def sources() -> list[Path]:
    package = ROOT / "batch_rerank"
    return [path.relative_to(ROOT) for path in package.rglob("*") if path.suffix == ".py" or path.name == "py.typed"]


def test_a_wheel_has_every_module_the_licence_and_the_mark_of_a_typed_package(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {str(path) for path in sources()} == {name for name in names if name.startswith("batch_rerank/")}
    assert "batch_rerank/py.typed" in names
    assert f"batch_rerank-{batch_rerank.__version__}.dist-info/licenses/LICENSE" in names


def test_a_job_runs_from_a_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    """The dependencies are the ones of this environment, by a path; its own package is not on that path."""
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    site = next(environment.glob("lib/python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    install = [sys.executable, "-m", "pip", "--python", str(environment / "bin/python"), "install", "--quiet"]
    subprocess.run([*install, "--no-deps", "--no-index", str(wheel)], check=True)

    def said(*command: str) -> str:
        inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(
            [str(environment / "bin" / command[0]), *command[1:]],
            cwd=tmp_path,
            env=inherited,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = said("python", "-c", "import batch_rerank; print(batch_rerank.__file__)").strip()
    assert Path(where).is_relative_to(environment)
    version = f"batch-rerank {batch_rerank.__version__}\n"
    assert said("batch-rerank", "--version") == said("python", "-m", "batch_rerank", "--version") == version
    write(tmp_path / "in" / "0.parquet", candidate_rows(2, 5))
    job = {
        "input": {"layout": "flat", "path": "in"},
        "output": {"path": "out"},
        "model": {"name": "none", "kind": "checksum"},
        "cluster": {"gpus_per_actor": 0},
    }
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    assert json.loads(said("batch-rerank", "run", "job.yaml", "--local", "--json"))["pairs"] == 10
    assert (tmp_path / "out" / "_SUCCESS").exists()
