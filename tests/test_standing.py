"""What is said of an output whose parts are not all there, and of what is done beside those that are."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import candidate_rows, job, write

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


def test_an_output_that_its_gate_holds_back_is_not_told_to_run_again(
    flat_shards: Path, tmp_path: Path, cli: Cli
) -> None:
    """The run would end with 7 again."""
    file = job_file(tmp_path, flat_shards, gate__error=["truncated >= 0.5"])
    assert cli("run", file, "--local")[0] == 7
    (tmp_path / "qrels").write_text("q0 0 d3 1\n")
    labels = ("--to", "trec", "--path", tmp_path / "labels", "--dry-run")
    verbs = {
        "evaluate": ("--run", tmp_path / "out", "--qrels", tmp_path / "qrels"),
        "compare": (tmp_path / "out", tmp_path / "out"),
        "export": (tmp_path / "out", *labels),
        "verify": (tmp_path / "out", "--local"),
    }
    for verb, arguments in verbs.items():
        code, out, error = cli(verb, *arguments)
        said = " ".join(f"{out} {error}".split())
        assert code in (3, 6) and "its gate holds it back (failed: truncated >= 0.5" in said, verb
        assert "--despite-gate" in said and "not finished" not in said, verb


def test_a_gate_that_looks_deeper_than_what_is_kept_says_so(flat_shards: Path, tmp_path: Path, cli: Cli) -> None:
    run(job(flat_shards, tmp_path / "earlier", output__report=False), local=True)
    (tmp_path / "qrels").write_text("q0 0 d3 1\n")
    conditions = ["overlap@10 >= 0", "R@100 >= 0", "nDCG@3 >= 0", "rbo >= 0", "failed <= 1"]
    places = {"gate__qrels": str(tmp_path / "qrels"), "gate__against": str(tmp_path / "earlier")}
    file = job_file(tmp_path, flat_shards, output__top_k=3, gate__error=conditions, **places)
    code, _, error = cli("plan", file, "--local")
    assert code == 0 and error.count("looks deeper than output.top_k: 3") == 2
    assert "gate: 'overlap@10 >= 0' looks deeper" in error and "gate: 'R@100 >= 0' looks deeper" in error


def test_outputs_without_a_query_in_common_agree_in_nothing(tmp_path: Path, cli: Cli) -> None:
    for name, first in (("one", 0), ("other", 50)):
        write(tmp_path / name / "0.parquet", candidate_rows(2, 3, first=first))
        run(job(tmp_path / name, tmp_path / f"out-{name}"), local=True)
    code, out, error = cli("compare", tmp_path / "out-one", tmp_path / "out-other")
    assert code == 0 and "no query_id is in both outputs" in error and "0.0000" not in out
    found = json.loads(cli("compare", tmp_path / "out-one", tmp_path / "out-other", "--json")[1])
    assert found["rbo"] is None and set(found["overlap"].values()) == {None}


def test_a_bench_does_not_mind_how_the_output_is_published(flat_shards: Path, tmp_path: Path, cli: Cli) -> None:
    run(job(flat_shards, tmp_path / "out", output__report=False), local=True)
    file = job_file(tmp_path, flat_shards, output__top_k=3)
    assert cli("plan", file, "--local")[0] == 4
    assert cli("bench", file, "--local", "--seconds", "1")[0] == 0


def test_a_plan_says_that_too_many_rows_have_no_text(tmp_path: Path, cli: Cli) -> None:
    rows = [{**row, "text": None if number == 3 else row["text"]} for number, row in enumerate(candidate_rows(2, 10))]
    write(tmp_path / "in/0.parquet", rows)
    file = job_file(tmp_path, tmp_path / "in")
    said = "1 of 20 rows have no text or query, more than scoring.max_failed_rows: 0.01 allows"
    assert said in cli("plan", file, "--local")[2]
    assert said not in cli("plan", file, "--local", "--set", "scoring.max_failed_rows=0.05")[2]
