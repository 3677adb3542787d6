"""What is said of an output whose parts are not all there, and of what is done beside those that are."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import job

from batch_rerank.job.run import run
from batch_rerank.publish.output import Place
from batch_rerank.publish.status import status_of_output

Cli = Callable[..., tuple[int, str, str]]
Break = Callable[[Path], None]


def job_file(tmp_path: Path, shards: Path, **keys: Any) -> Path:
    config = job(shards, tmp_path / "out", output__file_bytes=1, output__report=False, **keys)
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(exclude={"limit"})))
    return path


def gone(output: Path) -> None:
    (output / "part-00001.parquet").unlink()


def cut(output: Path) -> None:
    part = output / "part-00001.parquet"
    part.write_bytes(part.read_bytes()[:-1])


def another(output: Path) -> None:
    """Its receipt and its mark name another content."""
    mark = json.loads((output / "_SUCCESS").read_text())
    mark["parts"][1]["sha256"] = "0" * 64
    (output / "_SUCCESS").write_text(json.dumps(mark))


@pytest.mark.parametrize("broken", [gone, cut, another])
def test_an_output_without_all_its_parts_is_not_published(
    broken: Break, flat_shards: Path, tmp_path: Path, cli: Cli
) -> None:
    file, output = job_file(tmp_path, flat_shards), tmp_path / "out"
    assert cli("run", file, "--local")[0] == 0
    assert status_of_output(Place(str(output)))["success"] is True
    assert "and published" in cli("plan", file, "--local")[2]
    broken(output)
    assert status_of_output(Place(str(output)))["success"] is False
    told = cli("plan", file, "--local")[2]
    assert "6 of 6 units are scored already; what follows" in told and "and published" not in told
    code, _, error = cli("report", output)
    assert code == 0, error
    report = json.loads((output / "_report/report.json").read_text())
    assert report["verdict"]["tone"] == "bad" and report["counts"]["rows_out"] is None
    assert "has been taken back, or is damaged" in report["verdict"]["line"]
    code, _, error = cli("run", file, "--local")
    assert code == 0 and "nothing to score: all 6 units were done already; publishing is done now" in error
    assert status_of_output(Place(str(output)))["success"] is True
    code, _, error = cli("run", file, "--local")
    assert code == 0 and "nothing to do: all 6 units were done already" in error


def test_what_is_done_beside_is_said(flat_shards: Path, tmp_path: Path, cli: Cli) -> None:
    file = job_file(tmp_path, flat_shards)
    run(job(flat_shards, tmp_path / "out", output__file_bytes=1, output__report=False), local=True)
    parts = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.parquet")}
    steps = [
        ("nothing to do", []),
        ("its TREC run was written", ["output.trec_run=true"]),
        ("nothing to do", ["output.trec_run=true"]),
        ("its scores were removed", ["output.keep_scores=false"]),
        ("nothing to do", ["output.keep_scores=false"]),
    ]
    for said, keys in steps:
        code, out, error = cli("publish", file, "--local", "--json", *[part for key in keys for part in ("--set", key)])
        assert code == 0 and f"already published; {said}: 300 rows" in error
        assert json.loads(out)["beside"] == ([] if said == "nothing to do" else [said])
    assert not list((tmp_path / "out/_scores").glob("*")) and (tmp_path / "out/_run.trec").exists()
    assert parts == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.parquet")}
