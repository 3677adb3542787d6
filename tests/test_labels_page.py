"""docs/labels.md is true: its files and commands run in their order, and its readers where they are installed."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from test_docs import BLOCK, ROOT, bash

from batch_rerank.label_settings import LAYOUTS

PAGE = (ROOT / "docs/labels.md").read_text(encoding="utf-8")
MARKED = re.compile(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", re.DOTALL)
READS = re.compile(r"<!-- reads: ([\w, ]+) -->\n```python\n(.*?)```", re.DOTALL)
COMMANDS = [match["code"] for match in BLOCK.finditer(PAGE) if match["mark"] == "run"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("page")
    for name, content in MARKED.findall(PAGE):
        (directory / name).write_text(content)
    done = bash("\n".join(COMMANDS), directory)
    assert done.returncode == 0, done.stderr
    (directory / "told.txt").write_text(done.stdout + done.stderr)
    return directory


def test_the_commands_run_as_written(workspace: Path) -> None:
    told = (workspace / "told.txt").read_text()
    assert "100 of 100 queries would have labels" in told and "nothing to do" in told
    assert (workspace / "train.qrels").read_text().count("\n") > 500
    assert (workspace / "averaged" / "_SUCCESS").exists()


def test_every_target_has_an_example() -> None:
    told = "".join(COMMANDS) + PAGE.split("## What lies there")[0]
    assert all(re.search(rf"(--to |to: ){target}\b", told) for target in LAYOUTS)


@pytest.mark.parametrize(("packages", "code"), READS.findall(PAGE))
def test_the_readers_run_as_written(packages: str, code: str, workspace: Path) -> None:
    for package in packages.split(", "):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    done = subprocess.run([sys.executable, "-c", code], cwd=workspace, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
