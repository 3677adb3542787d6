"""Where a job reads and where it writes must not meet: refused before anything is written, the first time too."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import candidate_rows, job, write
from test_stage import given_as, job_of

from batch_rerank.config import JobConfig, parse_config
from batch_rerank.errors import ConfigError, ConflictError, InputError
from batch_rerank.input.places import refuse_overlap
from batch_rerank.job.ahead import plan_job
from batch_rerank.job.run import run
from batch_rerank.job.staging import stage
from batch_rerank.publish.verify import verify


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


def linked(tmp_path: Path) -> Path:
    """A directory of links to two shards, one under another name."""
    write(tmp_path / "real" / "a.parquet", candidate_rows(2, 3))
    write(tmp_path / "real" / "blob", candidate_rows(2, 3, first=2))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.parquet").symlink_to(tmp_path / "real" / "a.parquet")
    (tmp_path / "in" / "b.parquet").symlink_to("../real/blob")
    (tmp_path / "in" / "folder.parquet").symlink_to(tmp_path / "real")
    return tmp_path / "in"


@pytest.mark.parametrize("pattern", ["", "/*.parquet", "/**/*.parquet", "/[ab].parquet"])
def test_links_to_shards_are_shards(pattern: str, tmp_path: Path) -> None:
    config = job(f"{linked(tmp_path)}{pattern}", tmp_path / "out")
    assert run(config, local=True).totals.rows_out == 12
    assert run(config, local=True).units == 0
    os.utime(tmp_path / "real" / "blob", (1, 1))
    assert verify(str(tmp_path / "out")).problems == []


def test_a_link_to_nothing_is_an_error(tmp_path: Path) -> None:
    folder = linked(tmp_path)
    (tmp_path / "real" / "blob").unlink()
    with pytest.raises(InputError, match=r"b\.parquet: a link to .*blob, which is not there"):
        run(job(folder, tmp_path / "out"), local=True)


def test_a_file_is_read_once_whatever_it_is_called(tmp_path: Path) -> None:
    folder = linked(tmp_path)
    (tmp_path / "again").symlink_to(folder)
    names = [str(folder), f"{folder}/../in/a.parquet", str(tmp_path / "real/*.parquet"), str(tmp_path / "again")]
    raw = job(folder, tmp_path / "out").model_dump(exclude={"limit", "gate"})
    raw["input"]["path"] = names
    assert run(parse_config(raw, "test"), local=True).totals.rows_out == 12


def test_a_shard_that_is_a_link_into_the_output_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "out" / "x.parquet", candidate_rows(1, 2))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.parquet").symlink_to(tmp_path / "out" / "x.parquet")
    with pytest.raises((ConfigError, ConflictError)):
        run(job(tmp_path / "in", tmp_path / "out"), local=True)
    assert not (tmp_path / "out" / "_manifest" / "plan.json").exists()
