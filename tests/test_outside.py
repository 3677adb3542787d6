"""What comes from outside: no secret is ever shown, no job file is a bomb, and ids are data on a terminal too."""

import gzip
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import yaml
from conftest import candidate_rows, job, nested, write
from rich.errors import MarkupError

import batch_rerank.errors as errors
from batch_rerank import job_file, outside
from batch_rerank.config import load_config, parse_config
from batch_rerank.errors import BatchRerankError, ConfigError, InputError, StorageError, as_value, from_value
from batch_rerank.job.run import run
from batch_rerank.outside import hide, problem_of, shown, shown_id, without_secrets
from batch_rerank.store.filesystem import input_errors, locate, storage_errors

Cli = Callable[..., tuple[int, str, str]]
CANARY = "caNary-4711/x+y"


@pytest.fixture(autouse=True)
def nothing_hidden_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test hides stays visible in the next."""
    monkeypatch.setattr(outside, "_hidden", set())
    monkeypatch.setattr(outside, "_pattern", None)


def job_text(tmp_path: Path, **keys: Any) -> str:
    write(tmp_path / "in/a.parquet", candidate_rows(2, 3))
    return yaml.safe_dump(job(tmp_path / "in", tmp_path / "out", **keys).model_dump(exclude={"limit", "gate"}))


# ---- secrets


ERRORS = [one for _, one in inspect.getmembers(errors, inspect.isclass) if issubclass(one, BatchRerankError)]


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize(
    "text",
    [
        f"s3://me:{CANARY}@bucket/x: not found",
        f"'http://me:{CANARY}@host:9000/a b' and http://{CANARY.replace('/', '')}@host",
        f"https://host/x?sv=1&sig={CANARY}&z=1",
        f"https://host/x?X-Amz-Signature={CANARY}",
        f"Invalid mode: {CANARY!r}",
    ],
)
def test_no_error_of_any_kind_has_a_secret_in_it(kind: type[BatchRerankError], text: str) -> None:
    hide({"config_kwargs": {"retries": [CANARY]}})
    for error in (kind(text), from_value(as_value(kind(text)))):
        assert CANARY not in str(error) and "4711" not in str(error) + repr(error)
    assert issubclass(kind, BatchRerankError) and len(ERRORS) >= 10


def test_what_is_no_secret_is_shown() -> None:
    hide({"key": "ab", "anon": True, "max": 100, "config_kwargs": {"s3": {"addressing_style": "path"}}, "x": None})
    text = "s3://bucket/a@b: 100 rows; check the path; abc"
    assert without_secrets(text) == text
    hide({"secret": "bucket-key"})
    assert without_secrets("bucket-key2 bucket-key") == "bucket-key2 ***"


HEAD = "input: {{layout: flat, path: x}}\n"
TAIL = "output: {{path: x}}\nmodel: {{name: x}}\n"
BROKEN = [
    "input: {{storage_options: {{secret: {c}}}\noutput: [",
    "input:\n  storage_options:\n    secret: {c}\n   key: 1\n",
    "input:\n  storage_options:\n    secret: *{c}\n",
    "input:\n  storage_options:\n    secret: !{c} x\n",
    'input:\n  storage_options:\n    secret: "{c}\\q"\n',
    "input:\n  storage_options: {{secret: {c}, secret: {c}}}\n",
    "input:\n  storage_options: {{{c}: 1, {c}: 1}}\n",
    "input:\n  storage_options: {{secret: !!int {c}}}\n",
    "input:\n  storage_options: {{secret: !!timestamp {c}}}\n",
    "input:\n  storage_options: {{secret: 2026-99-99, key: {c}}}\n",
    "input:\n\tstorage_options: {c}\n",
    "input: {c}\noutput: x\nmodel: y\n",
    "input: |\n  path: x\n  storage_options: {{secret: {c}}}\n" + TAIL,
    "input: [{{storage_options: {{secret: {c}}}}}]\n" + TAIL,
    "input: {{layout: flat, path: x, storage_options: {c}}}\n" + TAIL,
    "input: {{layout: flat, path: x, storage_options: [{c}]}}\n" + TAIL,
    "input: {{layout: flat, path: x, storage_option: {{secret: {c}}}}}\n" + TAIL,
    "input: {{layout: flat, path: x, secret: {c}}}\n" + TAIL,
    "input: {{layout: flat, path: 's3://me:{c}@b/x'}}\n" + TAIL,
    "input: {{layout: flat, path: ['s3://b/x', 's3://me:{c}@b/x']}}\n" + TAIL,
    HEAD + "output: {{path: 's3://me:{c}@b/x', latest: 's3://:{c}@b/x'}}\nmodel: {{name: x}}\n",
    "input: {{layout: flat, path: x}}\noutput: {{path: x}}\nmodel: {{name: x}}\n"
    "reuse: {{from: 's3://me:{c}@b/x'}}\ngate: {{qrels: 's3://me:{c}@b/x', error: [RR >= 0]}}\n",
    "input: {{layout: flat, path: x, storage_options: {{secret: [{c}], key: {{a: {c}}}, use_ssl: {c}}}}}\n"
    "output: {{path: x}}\nmodel: {{name: x}}\n",
    "input: {{layout: flat, path: x, storage_options: {{client_kwargs: {c}}}}}\n" + TAIL,
    HEAD + TAIL + "cluster: {{address: {{secret: {c}}}}}\n",
]


@pytest.mark.parametrize("content", BROKEN)
def test_no_line_of_a_job_file_and_no_option_is_shown(content: str, tmp_path: Path, cli: Cli) -> None:
    secret = CANARY.replace("/x+y", "")  # an alias may not have the others
    (tmp_path / "job.yaml").write_text(content.format(c=secret))
    code, out, error = cli("plan", tmp_path / "job.yaml")
    if content == "input: {c}\noutput: x\nmodel: y\n":  # no option: what stands where a section must is shown
        assert code == 2
        return
    assert code == 2 and "4711" not in out + error, error
    assert "job.yaml" in error and "Traceback" not in error


@pytest.mark.parametrize(
    "override",
    [
        "{c}",
        "input.path.x={c}",
        "output.path=s3://me:{c}@b/x",
        "input.storage_options={c}",
        "input.storage_options.secret={c}: [",
        "input.storage_options.secret.x.y={c}: {c}: {c}",
        "input.storage_options.key=!!int {c}",
        "input.storage_options.no_such={c}",
        "input.storage_options.endpoint_url={c}",
        "input.storage_options.config_kwargs={{no_such: {c}}}",
        "input.storage_options.config_kwargs={{retries: {{mode: {c}}}}}",
    ],
)
def test_no_override_is_repeated(override: str, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "job.yaml").write_text(job_text(tmp_path, input__path="s3://bucket/x"))
    code, out, error = cli("plan", tmp_path / "job.yaml", "--set", override.format(c="caNary-4711"))
    assert code == 2 and "4711" not in out + error, error


@pytest.mark.parametrize("verb", ["status", "verify", "publish", "clean", "run", "plan"])
def test_no_path_with_a_password_is_repeated(verb: str, cli: Cli) -> None:
    code, out, error = cli(verb, f"s3://me:{CANARY}@bucket/out")
    assert code == 2 and "4711" not in out + error


@pytest.mark.parametrize(
    "error",
    [
        OSError(5, f"no answer from http://me:{CANARY}@host"),
        PermissionError(f"key {CANARY} is not known"),
        FileNotFoundError(CANARY),
        OSError(CANARY),
    ],
)
def test_what_a_store_says_is_shown_without_its_options(error: OSError) -> None:
    hide({"key": CANARY})
    with pytest.raises(StorageError) as caught, storage_errors(f"s3://b/{CANARY}"):
        raise error
    assert "4711" not in str(caught.value)


def test_no_config_shows_its_options(tmp_path: Path) -> None:
    config = job(tmp_path, tmp_path / "out", input__storage_options={"secret": CANARY})
    assert CANARY not in repr(config) + str(config) + config.model_dump_json()


def test_logs_are_cleaned_too(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def speak(*_: object) -> None:
        import logging

        logging.getLogger("batch_rerank").warning("from http://me:%s@host \x1b[31m%s", CANARY, "red\x07")
        raise StorageError("over")

    monkeypatch.setattr("batch_rerank.publish.status.status_of_output", speak)
    code, _, error = cli("status", tmp_path)
    assert code == 6 and "4711" not in error and "\x1b" not in error and "\x07" not in error and "[31mred" in error


# ---- job files that are bombs


def bomb(levels: int, line: str) -> str:
    return "a0: &a0 {k0: 1, k1: 1}\n" + "".join(line.format(n=n, b=n - 1) for n in range(1, levels))


BOMBS = {
    "aliases": bomb(12, "a{n}: &a{n} [*a{b}, *a{b}, *a{b}, *a{b}, *a{b}, *a{b}, *a{b}, *a{b}]\n"),
    "merges": bomb(30, "a{n}: &a{n} {{<<: [*a{b}, *a{b}, *a{b}]}}\n"),
    "in itself": "input: &a {storage_options: *a}\n",
    "deep": "input: " + "[" * 3000 + "]" * 3000,
    "nulls": "\0" * 100,
    "options": bomb(9, "a{n}: &a{n} [*a{b}, *a{b}, *a{b}, *a{b}, *a{b}, *a{b}, *a{b}, *a{b}]\n")
    + "input: {layout: flat, path: x, storage_options: {client_kwargs: {a: *a8}}}\n",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_job_file_that_is_a_bomb_is_one_short_error(name: str, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "job.yaml").write_text(BOMBS[name])
    code, _, error = cli("plan", tmp_path / "job.yaml")
    assert code == 2 and "Traceback" not in error and len(error) < 500


def test_a_job_file_has_a_size(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, error = cli("plan", "/dev/zero")
    assert code == 2 and f"more than {job_file.MOST_BYTES:,} bytes" in error
    monkeypatch.setattr(job_file, "MOST_BYTES", 100)
    (tmp_path / "job.yaml").write_text(job_text(tmp_path))
    with pytest.raises(ConfigError, match="more than 100 bytes"):
        load_config(tmp_path / "job.yaml")


@pytest.mark.parametrize("key", ["input.unit_bytes", "input.unit_pairs", "output.top_k", "scoring.token_budget"])
@pytest.mark.parametrize("value", ["1" + "0" * 400, "-1" + "0" * 400, "1e400", ".inf"])
def test_a_number_that_nothing_can_hold_is_refused(key: str, value: str, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "job.yaml").write_text(job_text(tmp_path))
    code, _, error = cli("plan", tmp_path / "job.yaml", "--set", f"{key}={value}")
    assert code == 2 and "Traceback" not in error and key in error


@pytest.mark.parametrize(
    "options",
    [
        *[
            {"key": 5},
            {"secret": ["x"]},
            {"anon": "yes"},
            {"client_kwargs": "x"},
            {"config_kwargs": [1]},
            {"token": 1.5},
        ],
        *[{"client_kwargs": {"region_name": {"a": 1}}}, {"config_kwargs": {"retries": 5}}, {"no_such": 1}, {1: 2}],
    ],
    ids=str,
)
def test_options_of_wrong_types_are_refused(options: dict[str, Any], tmp_path: Path, cli: Cli) -> None:
    raw = yaml.safe_load(job_text(tmp_path, input__path="s3://bucket/x"))
    raw["input"]["storage_options"] = options
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(raw))
    code, _, error = cli("plan", tmp_path / "job.yaml")
    assert code == 2 and "Traceback" not in error and "storage_options" in error


# ---- texts that are bombs


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("what", ["zeros", "a line", "many lines and a long one"])
def test_a_line_has_an_end(what: str, packed: bool, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from batch_rerank.input import text_files

    monkeypatch.setattr(text_files, "LINE_BYTES", 10_000)
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 1_000)
    good = "".join(json.dumps({"_id": f"d{n}", "text": "x" * 50}) + "\n" for n in range(100)).encode()
    data = {"zeros": bytes(100_000), "a line": b'{"_id": "d0", "text": "' + b"x" * 100_000 + b'"}\n'}.get(what)
    data = good + b'{"_id": "e", "text": "' + b"x" * 30_000 + b'"}\n' + good if data is None else data
    name = "corpus.jsonl.gz" if packed else "corpus.jsonl"
    (tmp_path / name).write_bytes(gzip.compress(data) if packed else data)
    (tmp_path / "queries.jsonl").write_text('{"_id": "q", "text": "what"}\n')
    (tmp_path / "run").write_text("q d0 1.0\n")
    given = {
        "input": {"layout": "run", "run": str(tmp_path / "run"), "queries": str(tmp_path / "queries.jsonl")},
        "output": {"path": str(tmp_path / "out")},
        "model": {"name": "none", "kind": "checksum"},
        "cluster": {"gpus_per_actor": 0},
    }
    given["input"]["corpus"] = str(tmp_path / name)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(given))
    code, _, error = cli("run", tmp_path / "job.yaml", "--local")
    assert code == 3 and "a line of more than 10,000 bytes, from byte" in error and name in error


# ---- ids on a terminal

ODD = ["[/]", "[bold]x", "\x1b]0;owned\x07", "a\nb", "[link=http://x]y[/link]", "\u202egnp"]


def test_ids_are_data_on_a_terminal(tmp_path: Path, cli: Cli) -> None:
    rows = [
        {**row, "query_id": query, "doc_id": f"{row['doc_id']}[/]"} for query in ODD for row in candidate_rows(1, 3)
    ]
    write(tmp_path / "in/a.parquet", rows)
    for name, budget in (("out", {}), ("other", {"output__top_k": 2})):
        run(job(tmp_path / "in", tmp_path / name, **budget), local=True)
    (tmp_path / "qrels.tsv").write_text(
        "query-id\tcorpus-id\tscore\n" + "".join(f"{query}\td0[/]\t1\n" for query in ODD if "\n" not in query)
    )
    try:
        code, out, error = cli(
            "evaluate", "--run", tmp_path / "out", "--qrels", tmp_path / "qrels.tsv", "--per-query", "RR"
        )
    except MarkupError:
        pytest.fail("an id is parsed")
    assert code == 0 and "[/]" in out and "[bold]x" in out and "[link=http://x]y" in out
    assert not {"\x1b", "\x07", "\u202e"} & set(out + error)
    code, out, error = cli("compare", tmp_path / "out", tmp_path / "other")
    assert code == 0 and not {"\x1b", "\x07", "\u202e"} & set(out + error)


@pytest.mark.parametrize(
    "arguments", [["[/]"], ["run", "[/]"], ["run", "x.yaml", "--[/]"], ["status", "[/red]\x1b[31m"]]
)
def test_arguments_are_data_too(arguments: list[str], cli: Cli) -> None:
    code, out, error = cli(*arguments)
    assert code in (2, 6) and "\x1b[31m" not in out + error


def test_what_is_shown() -> None:
    assert shown("a\x1b[0m\nb\t\u202e") == "a�[0m\nb\t�" and shown_id("a\nb") == "a�b"


# ---- places

NO_PLACES = [
    "memory://x/y", "http://host/x.parquet", "data:,x", "data://x", "reference://x", "zip://a.zip", "simplecache::s3://b/x",
    "zip://x.parquet::s3://b/a.zip", "ftp://host/x", "git://x", "file://a::s3://b/x", "s3://b/x::gs://c", "gopher://x",
    "HTTP://host/x", "local+s3://x", "dask://x", "jupyter://x",
]  # fmt: skip


@pytest.mark.parametrize("place", [place for place in NO_PLACES if place != "data:,x"])
@pytest.mark.parametrize("key", ["input.path", "output.path", "output.latest", "input.stage"])
def test_a_place_of_another_kind_is_refused(key: str, place: str, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "job.yaml").write_text(job_text(tmp_path))
    code, _, error = cli("plan", tmp_path / "job.yaml", "--set", f"{key}={json.dumps(place)}")
    assert code == 2 and key in error and "Traceback" not in error
    with pytest.raises(StorageError):
        locate(place)
    assert problem_of(place)


@pytest.mark.parametrize("folder", ["a::b", "simplecache::x", "data:,x", "x@y:z", "c:", "x//a:b@c"])
def test_a_name_stays_a_name(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / folder / "in/a::b.parquet", candidate_rows(2, 3))
    monkeypatch.chdir(tmp_path)
    config = parse_config(
        {
            "input": {"layout": "flat", "path": f"{folder}/in"},
            "output": {"path": f"{folder}/out"},
            "model": {"name": "none", "kind": "checksum"},
            "cluster": {"gpus_per_actor": 0},
        },
        "test",
    )
    assert run(config, local=True).totals.rows_out == 6
    assert (tmp_path / folder / "out/_SUCCESS").exists()


# ---- whose fault it is, and what to do


def test_a_store_that_lets_nobody_in_is_not_the_inputs_fault(
    tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    (tmp_path / "job.yaml").write_text(job_text(tmp_path, input__path="s3://bucket/x"))
    code, _, error = cli("plan", tmp_path / "job.yaml")
    assert code == 6 and "credentials" in error
    options = {"key": "a-key", "secret": "a-secret", "endpoint_url": "http://127.0.0.1:9"}
    text = job_text(tmp_path, input__path="s3://bucket/x", input__storage_options=options)
    raw = yaml.safe_load(text)
    raw["input"]["storage_options"] = options
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(raw))
    code, _, error = cli("plan", tmp_path / "job.yaml")
    assert code == 6 and "a-key" not in error


def test_a_local_path_gets_no_advice_about_buckets(tmp_path: Path) -> None:
    for where in (tmp_path / "x", f"file://{tmp_path}/x"):
        with pytest.raises(InputError) as caught, input_errors(where):
            raise FileNotFoundError
        assert "check the path" in str(caught.value) and "S3" not in str(caught.value)
    with pytest.raises(InputError, match="AWS_ENDPOINT_URL"), input_errors("s3://bucket/x"):
        raise FileNotFoundError


def test_another_layout_is_suggested_where_the_columns_have_it(tmp_path: Path, cli: Cli) -> None:
    write(tmp_path / "nested/a.parquet", nested(candidate_rows(2, 3)))
    (tmp_path / "job.yaml").write_text(job_text(tmp_path, input__path=str(tmp_path / "nested")))
    code, _, error = cli("plan", tmp_path / "job.yaml")
    assert code == 3 and "this looks like input.layout: nested" in error
    code, _, error = cli("plan", tmp_path / "job.yaml", "--set", "input.layout=nested")
    assert code == 0
    code, _, error = cli(
        "plan", tmp_path / "job.yaml", "--set", "input.layout=nested", "--set", f"input.path={tmp_path / 'in'}"
    )
    assert code == 3 and "this looks like input.layout: flat" in error


def test_the_evaluation_of_a_sample_says_first_that_it_is_one(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "job.yaml").write_text(job_text(tmp_path))
    assert cli("run", tmp_path / "job.yaml", "--local", "--limit", "1")[0] == 0
    (tmp_path / "qrels").write_text("q0 0 d0 1\nq1 0 d0 1\n")
    arguments = ["--qrels", tmp_path / "qrels", "RR"]
    code, _, error = cli("evaluate", "--run", tmp_path / "out-limit-1", *arguments)
    assert code == 0 and error.startswith(
        "this is a sample of 1 queries, and the means are over all 2 judged ones: 1 of"
    )
    assert cli("run", tmp_path / "job.yaml", "--local")[0] == 0
    assert "sample" not in cli("evaluate", "--run", tmp_path / "out", *arguments)[2]


@pytest.mark.parametrize("verb", ["status", "fetch", "plan"])
def test_a_name_that_is_too_long_for_a_file_is_no_file(verb: str, tmp_path: Path, cli: Cli) -> None:
    """Nor is it a traceback."""
    long, job_file = "n" * 300, tmp_path / "job.yaml"
    keys = {"input": {"layout": "flat", "path": str(tmp_path)}, "output": {"path": str(tmp_path / "out")}}
    job_file.write_text(yaml.safe_dump({**keys, "model": {"name": long}, "cluster": {"gpus_per_actor": 0}}))
    arguments = {"status": [long], "fetch": [long, tmp_path / "copy"], "plan": [job_file, "--local"]}
    code, _, error = cli(verb, *arguments[verb])
    assert code in (5, 6) and long in error and "Traceback" not in error
