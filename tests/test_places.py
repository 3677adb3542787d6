"""Where a job reads and where it writes must not meet: refused before anything is written, the first time too."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import candidate_rows, job, write
from test_stage import given_as, job_of

from batch_rerank.config import JobConfig
from batch_rerank.errors import ConfigError
from batch_rerank.input.places import refuse_overlap
from batch_rerank.job.ahead import plan_job
from batch_rerank.job.run import run
from batch_rerank.job.staging import stage


@pytest.mark.parametrize(
    ("pattern", "output"),
    [
        ("{dir}/**/*.parquet", "{dir}/out"),
        ("{dir}/**/*.parquet", "{dir}/a/b/out"),
        ("{dir}/*/*.parquet", "{dir}/out"),
        ("{dir}/**", "{dir}/out"),
        ("{dir}/o*/part-*", "{dir}/out"),
        ("{dir}/a/../**/*.parquet", "{dir}/out"),
        ("{link}/**/*.parquet", "{dir}/out"),
        ("{dir}/**/*.parquet", "{link}/out"),
        ("{dir}/**/*.parquet", "{dir}/a/../out"),
        ("{dir}", "{link}"),
        ("{dir}", "{dir}/a/.."),
        ("{dir}/a", "{dir}"),
        ("{dir}/a/0.parquet", "{link}"),
    ],
)
def test_an_input_that_takes_in_the_output_is_refused_at_once(pattern: str, output: str, tmp_path: Path) -> None:
    write(tmp_path / "dir" / "a" / "0.parquet", candidate_rows(2, 3))
    write(tmp_path / "dir" / "0.parquet", candidate_rows(2, 3, first=2))
    (tmp_path / "link").symlink_to(tmp_path / "dir")
    names = {"dir": str(tmp_path / "dir"), "link": str(tmp_path / "link")}
    config = job(pattern.format(**names), output.format(**names))
    before = sorted(tmp_path.rglob("*"))
    verbs: list[Callable[[JobConfig], Any]] = [plan_job, lambda config: run(config, local=True)]
    for verb in verbs:
        with pytest.raises(ConfigError, match=r"input\.path '.*' (takes|lies) in output\.path"):
            verb(config)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("pattern", "output"),
    [
        ("{dir}", "{dir}/out"),
        ("{dir}/*.parquet", "{dir}/out"),
        ("{dir}/**/[0-9].parquet", "{dir}/out"),
        ("{dir}/*/0.parquet", "{dir}/a-out"),
        ("{dir}/a/*.parquet", "{dir}/a2"),
        ("{dir}/**/*.parquet", "{dir}-out"),
    ],
)
def test_an_input_beside_the_output_is_read_again_and_again(pattern: str, output: str, tmp_path: Path) -> None:
    write(tmp_path / "dir" / "a" / "0.parquet", candidate_rows(2, 3))
    write(tmp_path / "dir" / "0.parquet", candidate_rows(2, 3, first=2))
    config = job(pattern.format(dir=tmp_path / "dir"), output.format(dir=tmp_path / "dir"))
    first = run(config, local=True)
    second = run(config, local=True)
    assert (second.units, second.fingerprint) == (0, first.fingerprint)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"corpus": "{dir}/**/*.jsonl", "stage": "{dir}/../dir/staged"}, None),
        ({"corpus": "{dir}/**", "stage": "{dir}/staged"}, r"input\.corpus '.*' takes in (input\.stage|output\.path)"),
        ({"run": "{dir}/**", "stage": "{dir}/../staged"}, r"input\.run '.*' takes in output\.path"),
        ({"run": "{dir}/s*/**", "stage": "{link}/staged"}, r"input\.run '.*' takes in input\.stage"),
        ({"stage": "{link}/out/stage"}, "lie in each other"),
        ({"stage": "{dir}/out/../out"}, "lie in each other"),
        ({"stage": "{link}"}, "lie in each other|lies in input.stage"),
    ],
)
def test_a_stage_that_its_sources_take_in_is_refused(keys: dict[str, str], message: str | None, tmp_path: Path) -> None:
    given = given_as("run of JSONL", tmp_path / "dir")
    (tmp_path / "link").symlink_to(tmp_path / "dir")
    names = {"dir": str(tmp_path / "dir"), "link": str(tmp_path / "link")}
    given |= {key: value.format(**names) for key, value in keys.items()}
    if message is None:
        given["corpus"] = given["corpus"].replace("*.jsonl", "corpus.jsonl")
        stage(job_of(given, tmp_path / "dir" / "out"), local=True)
        assert stage(job_of(given, tmp_path / "dir" / "out"), local=True).reused
        return
    with pytest.raises(ConfigError, match=message):
        stage(job_of(given, tmp_path / "dir" / "out"), local=True)
    assert not list(tmp_path.rglob("_manifest"))


def test_a_file_that_is_a_link_into_the_stage_is_refused(tmp_path: Path) -> None:
    given = given_as("run of JSONL", tmp_path / "dir")
    (tmp_path / "stage").mkdir()
    os.rename(given["corpus"], tmp_path / "stage" / "corpus.jsonl")
    Path(given["corpus"]).symlink_to(tmp_path / "stage" / "corpus.jsonl")
    with pytest.raises(ConfigError, match=r"lies in input\.stage|holds files of the input"):
        stage(job_of(given | {"stage": str(tmp_path / "stage")}, tmp_path / "out"), local=True)


@pytest.mark.parametrize(
    ("pattern", "output", "refused"),
    [
        ("s3://bucket/in/**/*.parquet", "s3://bucket/in/out", True),
        ("s3://bucket/**/*.parquet", "s3://bucket/out", True),
        ("s3://bucket/*/*.parquet", "s3a://bucket/out", True),
        ("s3://bucket/in/*.parquet", "s3://bucket/in/out", False),
        ("s3://bucket/**/*.parquet", "s3://other/out", False),
        ("s3://bucket/**/*.parquet", "/bucket/out", False),
    ],
)
def test_patterns_in_a_bucket(pattern: str, output: str, refused: bool) -> None:
    """Names are compared, nothing is asked of the store."""
    config = job(pattern, output)
    if refused:
        with pytest.raises(ConfigError, match="takes in"):
            refuse_overlap(config)
    else:
        refuse_overlap(config)
