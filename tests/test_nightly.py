"""docs/nightly.md is true: its files and commands, in their order, in one empty directory."""

import re
from pathlib import Path

import kuberay
import yaml
from test_docs import BLOCK, ROOT, bash

PAGE = (ROOT / "docs/nightly.md").read_text(encoding="utf-8")
MARKED = re.compile(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", re.DOTALL)
RUN = [match["code"] for match in BLOCK.finditer(PAGE) if match["mark"] == "run"]


def test_the_week_runs_as_written(tmp_path: Path) -> None:
    for name, content in MARKED.findall(PAGE):
        (tmp_path / name).write_text(content)
    told = []
    for script in RUN:
        done = bash(script, tmp_path)
        assert done.returncode == 0, done.stderr
        told.append(done.stdout + done.stderr)
    first, second, bad, despite, back, cleaned = told
    assert "not there yet" in first and "4,000 scored" in first
    assert "3,960 pairs reused" in second and "40 scored: 40 with new or changed documents" in second
    assert "overlap" in second
    assert "overlap@10 >= 0.8: found 0.5" in bad and "exit code 7" in bad
    assert "short texts are wanted" in despite and "published" in back
    assert "LATEST.json names it" in cleaned
    assert sorted(path.name for path in (tmp_path / "reranked").iterdir() if (path / "_SUCCESS").exists()) == [
        "2026-11-02"
    ]


@kuberay.needed
def test_the_schedule_is_what_kuberay_takes() -> None:
    (given,) = [yaml.safe_load(match["code"]) for match in BLOCK.finditer(PAGE) if "RayCronJob" in match["code"]]
    assert kuberay.problems(given) == []
