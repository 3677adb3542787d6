"""The pages are true: the quickstart's commands in their order in an empty directory, those of operations on an output,
every verb, option and key that any page names, and every figure of tuning."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import typer
from conftest import candidate_rows, job, rows_of, write
from test_docs import BLOCK, ROOT, VERBS, bash

from batch_rerank import errors
from batch_rerank.cli import app
from batch_rerank.config import JobConfig
from batch_rerank.job.run import run
from batch_rerank.schema import OUTPUT

PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
MARKED = re.compile(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", re.DOTALL)


def blocks(page: str, mark: str) -> list[str]:
    return [match["code"] for match in BLOCK.finditer(PAGES[page]) if match["mark"] == mark]


def test_the_quickstart_runs_as_written(tmp_path: Path) -> None:
    for name, content in MARKED.findall(PAGES["quickstart"]):
        (tmp_path / name).write_text(content)
    done = bash("\n".join(blocks("quickstart", "run")), tmp_path)
    assert done.returncode == 0, done.stderr
    (shown,) = blocks("quickstart", "output")
    printed = [line.split() for line in done.stdout.splitlines()]
    for line in shown.splitlines()[1:-1]:  # between the head and "…"
        _, query, rank, document, score, place = line.split()
        (same,) = [one for one in printed if one[1:4] + one[5:] == [query, rank, document, place]]
        assert float(score) == pytest.approx(float(same[4]), abs=0.02)
    assert re.search(r"RR@10 +│ \S+ │ 1\.0000", done.stdout)
    assert "nothing to do" in done.stderr and re.search(r"reused +66 pairs", done.stderr)
    assert (tmp_path / "reranked/_report/report.html").exists()
    assert rows_of(tmp_path / "reranked").num_rows == 6


def test_what_the_quickstart_installs_is_there() -> None:
    (script,) = blocks("quickstart", "needs: pip")
    (extra,) = re.findall(r"'\.\[(\w+)\]'", script)
    assert extra in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert (ROOT / "constraints.txt").exists()


def test_the_commands_of_operations_run_as_written(tmp_path: Path) -> None:
    write(tmp_path / "in/0.parquet", candidate_rows(4, 25))
    run(job(tmp_path / "in", tmp_path / "nightly"), local=True)
    for script in blocks("operations", "run"):
        done = bash(script, tmp_path)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "nightly/_SUCCESS").exists()


def test_operations_has_every_exit_code() -> None:
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", PAGES["operations"], re.MULTILINE)}
    assert listed == {0, 130} | {cls.exit_code for cls in errors.BatchRerankError.__subclasses__()}


@pytest.mark.parametrize("page", PAGES)
def test_verbs_options_and_keys_of_a_page_exist(page: str) -> None:
    commands: Any = typer.main.get_command(app)
    for verb, rest in re.findall(r"\bbatch-rerank (\w+)([^`\n]*)", PAGES[page]):
        assert verb in VERBS or verb.isupper(), verb
        known = {option for one in commands.commands.get(verb, commands).params for option in one.opts}
        assert set(re.findall(r"(?<!\S)--[\w-]+", rest)) <= {*known, "--help"}, f"{verb}{rest}"
    schema = JobConfig.model_json_schema()
    for section, key in re.findall(rf"`({'|'.join(schema['properties'])})\.(?!yaml|json)(\w+)", PAGES[page]):
        assert key in schema["$defs"][section.capitalize()]["properties"], f"{section}.{key}"


def test_the_figures_of_tuning_come_from_the_results() -> None:
    def of(name: str) -> Any:
        return json.loads((ROOT / "benchmarks/results" / f"{name}.json").read_text())

    engine, reuse, free, real = of("engine-cpu"), of("reuse-model"), of("pipeline-free"), of("pipeline-real")
    published, kept, stage = of("publish"), of("reuse-free"), of("stage-scale")
    shared = {name: engine[name]["computed_tokens"] / engine[name]["pairs"] for name in ("causal", "passages")}
    seconds = [f"{stage[f'stage_{size}_candidates']['seconds']:.0f}" for size in (10**6, 3 * 10**6, 10**7)]
    said = (
        f"took {100 * reuse['second_share_of_the_scoring_time']:.1f} % of the first one's scoring time, and "
        f"{100 * reuse['second_without_audit_share_of_the_scoring_time']:.1f} % without",
        f"10 million pairs again in {published['publish_again']['publish']:.0f} s",
        f"CoSQA's {engine['causal']['tokens_per_pair']} tokens a pair {shared['causal']:.1f} were computed",
        f"with {engine['passages']['tokens_per_pair']} tokens {shared['passages']:.1f}.",
        f"{engine['bf16']['times_as_fast']:.2f} times as fast as float32",
        f"differ by {engine['bf16']['largest_difference']} at most",
        f"{engine['causal']['times_as_fast']:.2f} times CrossEncoder on CoSQA",
        f"{engine['passages']['times_as_fast']:.2f} times on passages",
        f"{engine['encoder']['times_as_fast']:.2f} times for an encoder",
        f"{real['1_threads']['ray_pairs_per_s']['median']:.0f} pairs/s with one thread and "
        f"{real['2_threads']['ray_pairs_per_s']['median']:.0f} with two",
        f"{free['ray_pairs_per_s_units_of_600']['median']:,.0f} pairs/s pass through Ray in units of 600",
        f"{free['ray_pairs_per_s_units_of_2000']['median']:,.0f} in units of 2,000",
        f"parts of {published['bytes_a_pair']['parts']} bytes a pair, and kept scores of {kept['scores_bytes_a_pair']} "
        f"({kept['kept_bytes_a_pair']} of them",
        f"{seconds[0]}, {seconds[1]} and {seconds[2]} s for 1, 3 and 10 million candidates",
    )
    assert [one for one in said if one not in PAGES["tuning"]] == []
    assert f"{kept['scores_bytes_a_pair']} bytes a pair with 100-byte texts" in PAGES["operations"]


def test_the_columns_of_an_output_have_the_types_that_are_told(tmp_path: Path) -> None:
    write(tmp_path / "in/0.parquet", candidate_rows(2, 5))
    run(job(tmp_path / "in", tmp_path / "out"), local=True)
    types = {field.name: field.type for field in rows_of(tmp_path / "out").schema}
    assert types == {name: pa.type_for_alias(kind) for name, (kind, _) in OUTPUT.items()}
