"""The README is true: its commands run as written, its keys, verbs, columns and figures are the program's."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from batch_rerank import errors
from batch_rerank.cli import app
from batch_rerank.config import JobConfig, load_config
from batch_rerank.schema import OUTPUT_NAMES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"(?:<!-- (?P<mark>[a-z: ]+) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)```", re.DOTALL)
BLOCKS = [(match["mark"] or "", match["language"], match["code"]) for match in BLOCK.finditer(README)]
VERBS = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}


def marked(mark: str, language: str) -> list[str]:
    return [code for found, kind, code in BLOCKS if (found, kind) == (mark, language)]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which a small demo has run; its collection stands at the name that the README's commands have."""
    directory = tmp_path_factory.mktemp("readme")
    (directory / "demo-data" / "code-search-2").mkdir(parents=True)
    (directory / "demo-data" / "code-search-200").symlink_to("code-search-2")
    done = bash("batch-rerank demo --queries 2", directory)
    assert done.returncode == 0, done.stderr
    return directory


def bash(script: str, directory: Path) -> "subprocess.CompletedProcess[str]":
    """Run a script with this interpreter's commands first on the path, as an activated environment has them."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "80"}
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=directory, env=environment, capture_output=True, text=True
    )


def test_every_block_is_run_checked_or_marked_with_what_it_needs() -> None:
    known = {"", "run", "file", "output: demo", "needs: hub", "needs: terminal", "needs: cluster", "needs: aws"}
    assert {mark for mark, _, _ in BLOCKS} <= known
    assert [code for mark, language, code in BLOCKS if not mark] == ["make demo\n"]
    assert "$(BIN)/batch-rerank demo" in (ROOT / "Makefile").read_text()


@pytest.mark.slow
def test_the_demos_output_has_the_shape_and_the_promise_that_is_shown(tmp_path: Path) -> None:
    """By the command that `make demo` calls."""
    done = bash("batch-rerank demo", tmp_path)
    assert done.returncode == 0, done.stderr
    shown, printed = marked("output: demo", "text")[0], done.stdout
    for text in (shown, printed):
        values = {
            name: (float(before), float(after))
            for name, before, after in re.findall(r"│ (\S+) +│ ([\d.]+) +│ ([\d.]+) +│", text)
        }
        assert list(values) == ["nDCG@10", "RR@10", "R@10"]
        assert all(after > before + 0.05 for before, after in values.values())
        assert "10,000 pairs on Ray" in text
        assert re.search(r"a second night, 3 functions changed: 9,9\d\d pairs reused, \d\d scored", text)
        assert "ranked rows (verified): " in text


@pytest.mark.parametrize("script", marked("run", "bash"))
def test_the_shell_commands_run_as_written(script: str, workspace: Path) -> None:
    done = bash(script, workspace)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", marked("run", "python"))
def test_the_python_code_runs_as_written(script: str, workspace: Path) -> None:
    done = subprocess.run([sys.executable, "-c", script], cwd=workspace, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_job_files_are_valid(tmp_path: Path) -> None:
    for code in marked("file", "yaml"):
        (tmp_path / "job.yaml").write_text(code)
        assert load_config(tmp_path / "job.yaml").cluster.max_actors == 8
    assert load_config(ROOT / "jobs" / "rerank.yaml").model.name == "Qwen/Qwen3-Reranker-8B"


def test_what_needs_more_than_this_machine_names_commands_and_files_that_exist() -> None:
    blocks = [code for mark, _, code in BLOCKS if mark.startswith("needs: ")]
    assert len(blocks) == 4
    text = "".join(blocks)
    for file in ("jobs/rerank.py", "jobs/rerank.yaml", "cluster.yaml"):
        assert file in text
        assert (ROOT / file).exists()
    overrides = re.findall(r"--set (\S+)", text)
    assert overrides
    load_config(ROOT / "jobs" / "rerank.yaml", overrides)
    ray = shutil.which("ray", path=str(Path(sys.executable).parent))
    assert ray
    for verb in sorted(set(re.findall(r"^ray (job \w+|[\w-]+)", text, re.MULTILINE))):
        subprocess.run([ray, *verb.split(), "--help"], check=True, capture_output=True)


def test_verbs_of_the_readme_exist_and_the_reverse() -> None:
    named = set(re.findall(r"batch-rerank (\w+)", README)) | set(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE))
    assert {"run", "plan", "status", "verify", "evaluate", "models"} <= named & VERBS
    assert VERBS - {"demo"} <= named
    assert set(re.findall(r"batch-rerank (\w+)", README)) <= VERBS


def test_keys_of_the_readme_exist() -> None:
    for section, key in re.findall(r"`(input|output|model|scoring|cluster)\.(?!yaml)(\w+)", README):
        annotation = JobConfig.model_fields[section].annotation
        assert annotation is not None
        assert key in annotation.model_fields, f"{section}.{key}"


def test_the_output_table_is_the_schema() -> None:
    table = README.split("### Output")[1].split("Then `text`")[0]
    named = re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in table.splitlines() if "|" in line))
    assert named == list(OUTPUT_NAMES)


def test_the_exit_codes_are_the_errors() -> None:
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", README, re.MULTILINE)}
    assert listed == {0, 130} | {cls.exit_code for cls in errors.BatchRerankError.__subclasses__()}


def test_figures_come_from_the_results() -> None:
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "figures.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert done.stdout.strip() in README


def test_decisions_name_results_that_exist() -> None:
    text = (ROOT / "docs" / "decisions.md").read_text()
    named = set(re.findall(r"`benchmarks/results/([\w.-]+)`", text))
    assert named
    for name in named:
        assert json.loads((ROOT / "benchmarks" / "results" / name).read_text())["benchmark"]


def test_ci_runs_the_readmes_test_command() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    assert "make test" in README
    assert "make check" in ci
    assert "make test" in ci
    assert yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_every_test_that_the_reliability_page_names_exists() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text)
    assert len(named) > 25
    for file, test in named:
        content = (ROOT / file).read_text(encoding="utf-8")
        assert not test or f"def {test}(" in content, f"{file}::{test}"


def test_every_command_that_starts_or_uses_ray_keeps_token_authentication_on() -> None:
    blocks = [code for _, language, code in BLOCKS if language == "bash" and re.search(r"\bray (start|job)\b", code)]
    assert len(blocks) >= 2
    assert all(code.startswith("export RAY_AUTH_MODE=token\n") for code in blocks)
    documents = [ROOT / "cluster.yaml", *ROOT.glob("docs/*.md"), *ROOT.glob("jobs/*"), ROOT / "README.md"]
    for document in documents:
        assert "RAY_AUTH_MODE=disabled" not in document.read_text(encoding="utf-8"), document
