"""Bad input: the exit code, and a message that says where, what was found, what was expected and what to do.

Each case also checks that no `_SUCCESS` is left and that the input has not changed.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import candidate_rows, nested, write

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def attempt(tmp_path: Path, cli: Cli) -> Callable[..., tuple[int, str]]:
    """Run a job over `tmp_path/in` as a user would; gives the exit code and stderr."""

    def run(layout: str = "flat", **sections: Any) -> tuple[int, str]:
        raw: dict[str, Any] = {
            "input": {"layout": layout, "path": f"{tmp_path}/in/*.parquet"},
            "output": {"path": f"{tmp_path}/out"},
            "model": {"name": "none", "kind": "checksum"},
            "cluster": {"gpus_per_actor": 0},
        }
        for name, values in sections.items():
            raw[name] = {**raw.get(name, {}), **values}
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(raw))
        before = _digests(tmp_path / "in")
        code, _, error = cli("run", tmp_path / "job.yaml", "--local")
        assert "Traceback" not in error
        assert error.endswith(f"exit code {code}\n")
        assert not (tmp_path / "out" / "_SUCCESS").exists()
        assert _digests(tmp_path / "in") == before
        return code, " ".join(error.split())

    return run


def _digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.glob("*")}


def test_a_missing_column_is_named_with_what_is_there_and_an_alias(tmp_path: Path, attempt: Any) -> None:
    rows = [{"qid": "q", "query": "?", "doc_id": "d", "passage": "x"}]
    write(tmp_path / "in" / "a.parquet", rows)
    code, error = attempt()
    assert code == 3
    for part in ("a.parquet", "'query_id' is missing", "{query_id: qid}", "'text' is missing", "{text: passage}"):
        assert part in error


def test_a_missing_candidate_field_is_named(tmp_path: Path, attempt: Any) -> None:
    write(tmp_path / "in" / "a.parquet", [{"query_id": "q", "query": "?", "candidates": [{"docid": "d", "text": "x"}]}])
    code, error = attempt("nested")
    assert code == 3
    assert "'candidates.doc_id' is missing" in error
    assert "{doc_id: docid}" in error


@pytest.mark.parametrize(
    ("column", "value", "expected"),
    [
        ("text", 3, "column 'text' is int64, expected a string"),
        ("query_id", 1.5, "column 'query_id' is double, expected a string or an integer"),
        ("score", "high", "column 'score' is string, expected a number"),
        ("rank", 1.5, "column 'rank' is double, expected an integer"),
    ],
)
def test_a_wrongly_typed_column_is_named(
    column: str, value: object, expected: str, tmp_path: Path, attempt: Any
) -> None:
    write(tmp_path / "in" / "a.parquet", [{**candidate_rows(1, 1)[0], column: value}])
    code, error = attempt()
    assert code == 3
    assert expected in error


def test_candidates_that_are_no_list_of_structs(tmp_path: Path, attempt: Any) -> None:
    write(tmp_path / "in" / "a.parquet", [{"query_id": "q", "query": "?", "candidates": ["d1", "d2"]}])
    code, error = attempt("nested")
    assert code == 3
    assert "expected a list of structs" in error


def test_a_zero_byte_file(tmp_path: Path, attempt: Any) -> None:
    write(tmp_path / "in" / "a.parquet", candidate_rows(1, 1))
    (tmp_path / "in" / "b.parquet").touch()
    code, error = attempt()
    assert code == 3
    assert "b.parquet: the file has 0 bytes; expected Parquet" in error


def test_no_shard_matches(tmp_path: Path, attempt: Any) -> None:
    (tmp_path / "in").mkdir()
    code, error = attempt()
    assert code == 3
    assert f"{tmp_path}/in/*.parquet': no shard matches" in error


@pytest.mark.parametrize("damage", [lambda data: data[:-200], lambda data: data[:-8] + b"\xff\xff\xff\x0fPAR1"])
def test_an_unreadable_footer(damage: Callable[[bytes], bytes], tmp_path: Path, attempt: Any) -> None:
    path = write(tmp_path / "in" / "a.parquet", candidate_rows(4, 10))
    path.write_bytes(damage(path.read_bytes()))
    code, error = attempt()
    assert code == 3
    assert "a.parquet: the Parquet footer cannot be read" in error


@pytest.mark.parametrize("column", ["doc_id", "text"])
def test_a_damaged_data_page(column: str, tmp_path: Path, attempt: Any) -> None:
    path = tmp_path / "in" / "a.parquet"
    path.parent.mkdir()
    table = pa.Table.from_pylist(candidate_rows(4, 50))
    pq.write_table(table, path, write_page_checksum=True, use_dictionary=False)
    group = pq.ParquetFile(path).metadata.row_group(0)
    chunk = next(group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema == column)
    data = bytearray(path.read_bytes())
    data[chunk.data_page_offset + chunk.total_compressed_size - 10] ^= 0xFF
    path.write_bytes(data)
    code, error = attempt()
    assert code == 3
    assert "a.parquet" in error
    assert "cannot be read" in error


def test_text_that_is_not_utf8(tmp_path: Path, attempt: Any) -> None:
    table = pa.Table.from_pylist(candidate_rows(1, 2)).drop_columns(["text"])
    bad = pa.Array.from_buffers(pa.string(), 2, pa.array([b"\xff\xfe", b"ok"], pa.binary()).buffers())
    (tmp_path / "in").mkdir()
    pq.write_table(table.append_column("text", bad), tmp_path / "in" / "a.parquet")
    code, error = attempt()
    assert code == 3
    assert "a.parquet" in error


def test_a_document_twice_under_one_query(tmp_path: Path, attempt: Any) -> None:
    rows = candidate_rows(2, 3)
    rows[5]["doc_id"] = rows[3]["doc_id"]
    write(tmp_path / "in" / "a.parquet", rows)
    code, error = attempt()
    assert code == 3
    assert "a.parquet: query_id 'q1' has doc_id 'd0' 2 times (rows 3 and 5)" in error


def test_a_document_twice_under_one_nested_query(tmp_path: Path, attempt: Any) -> None:
    rows = nested(candidate_rows(2, 3))
    rows[1]["candidates"][2]["doc_id"] = "d0"
    write(tmp_path / "in" / "a.parquet", rows)
    code, error = attempt("nested")
    assert code == 3
    assert "query_id 'q1' has doc_id 'd0' 2 times" in error


def test_one_query_id_with_two_queries(tmp_path: Path, attempt: Any) -> None:
    rows = candidate_rows(1, 3)
    rows[2]["query"] = "something else"
    write(tmp_path / "in" / "a.parquet", rows)
    code, error = attempt()
    assert code == 3
    assert "query_id 'q0' has two values of query: 'something else' and 'what is alpha 0'" in error


def test_a_nested_query_in_two_shards(tmp_path: Path, attempt: Any) -> None:
    rows = candidate_rows(2, 4)
    for name, part in {"a": rows[:6], "b": rows[6:]}.items():
        write(tmp_path / "in" / f"{name}.parquet", nested(part))
    code, error = attempt("nested")
    assert code == 3
    assert "query_id 'q1' stands in two places" in error
    assert "a.parquet row" in error
    assert "b.parquet row 0" in error


@pytest.mark.parametrize("column", ["query_id", "doc_id"])
def test_a_null_id(column: str, tmp_path: Path, attempt: Any) -> None:
    rows = candidate_rows(2, 2)
    rows[3][column] = None
    write(tmp_path / "in" / "a.parquet", rows)
    code, error = attempt()
    assert code == 3
    assert f"row 3: {column} is null" in error


def test_more_failed_rows_than_the_limit_end_with_exit_1_and_a_higher_limit_finishes(
    tmp_path: Path, attempt: Any, cli: Cli
) -> None:
    rows = candidate_rows(2, 5)
    rows[0]["text"] = None
    write(tmp_path / "in" / "a.parquet", rows)
    code, error = attempt(scoring={"max_failed_rows": 0.05})
    assert code == 1
    assert "1 of 10 rows failed (0 null queries, 1 null texts, 0 in the engine)" in error
    code, _, error = cli("run", tmp_path / "job.yaml", "--local", "--set", "scoring.max_failed_rows=0.1")
    assert code == 0
    assert "nothing to score: all 1 units were done already; publishing is done now" in error
    assert (tmp_path / "out" / "_SUCCESS").exists()


def test_an_unknown_key_and_other_errors_are_reported_together(tmp_path: Path, attempt: Any) -> None:
    write(tmp_path / "in" / "a.parquet", candidate_rows(1, 1))
    code, error = attempt(output={"topk": 5, "top_k": 0}, model={"kind": "magic"}, extra={"a": 1})
    assert code == 2
    assert "4 error(s)" in error
    assert "output.topk: unknown key (value 5); is top_k meant?" in error
    assert "output.top_k: found 0; input should be greater than or equal to 1" in error
    assert "kind: found 'magic'" in error
    assert "extra: unknown key; remove it or correct its name" in error


def test_a_value_that_fits_no_choice_is_one_error(tmp_path: Path, attempt: Any) -> None:
    code, error = attempt(cluster={"actors": "two"}, scoring={"token_budget": 0})
    assert code == 2
    assert "2 error(s)" in error
    assert "cluster.actors: found 'two'; input should be a valid integer" in error
    assert "scoring.token_budget: found 0; input should be 'auto' or: found 0" in error


NUMBERS = (
    "output.top_k",
    "output.file_bytes",
    "input.unit_pairs",
    "input.max_missing",
    "model.max_length",
    "scoring.max_failed_units",
    "cluster.actors",
    "cluster.actors.min",
    "cluster.gpus_per_actor",
    "cost.max_usd",
    "labels.seed",
    "labels.negatives.ranks",
)


@pytest.mark.parametrize("key", NUMBERS)
def test_a_truth_value_is_no_number(key: str, tmp_path: Path, attempt: Any) -> None:
    """`top_k: yes` kept one candidate of each query."""
    write(tmp_path / "in" / "a.parquet", candidate_rows(1, 2))
    section, *names = key.split(".")
    value: Any = [True, 9] if key.endswith("ranks") else True
    for name in reversed(names):
        value = {name: value}
    code, error = attempt(**{section: value})
    assert code == 2 and f"{key}: found true; expected a number" in error


def test_a_missing_section(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "job.yaml").write_text("input: {layout: flat, path: x}\n")
    code, _, error = cli("run", tmp_path / "job.yaml")
    assert code == 2
    assert "output: missing" in error
    assert "model: missing" in error


def test_job_files_that_are_no_jobs(tmp_path: Path, cli: Cli) -> None:
    assert cli("run", tmp_path / "absent.yaml")[0] == 2
    for content in ("- a list\n", "a: [unclosed\n", ""):
        (tmp_path / "job.yaml").write_text(content)
        code, _, error = cli("run", tmp_path / "job.yaml")
        assert code == 2
        assert "job.yaml" in error


@pytest.mark.parametrize("override", ["model.max_length", "=3", "model..name=x", "input.path.deep=x"])
def test_an_override_that_is_none(override: str, tmp_path: Path, attempt: Any, cli: Cli) -> None:
    write(tmp_path / "in" / "a.parquet", candidate_rows(1, 1))
    attempt(model={"kind": "magic"})
    code, _, error = cli("run", tmp_path / "job.yaml", "--set", override)
    assert code == 2
    assert f"--set {override.partition('=')[0]!r}" in error


def test_an_output_that_belongs_to_another_job_names_the_fields(tmp_path: Path, cli: Cli, attempt: Any) -> None:
    write(tmp_path / "in" / "a.parquet", candidate_rows(2, 5))
    attempt(model={"kind": "magic"})  # writes the job file; the kind is mended below
    arguments = ["run", tmp_path / "job.yaml", "--local", "--set", "model.kind=checksum"]
    assert cli(*arguments)[0] == 0
    parts = {path: path.read_bytes() for path in (tmp_path / "out").glob("part-*")}
    code, _, error = cli(*arguments, "--set", "output.top_k=2", "--set", "model.max_length=100")
    assert code == 4
    assert "differs in model.max_length" in error and "model.max_length: there 8192, here 100" in error
    code, _, error = cli(*arguments, "--set", "output.top_k=2")
    assert code == 4
    assert "top_k: there null, here 2" in error and "batch-rerank publish JOB" in error
    assert {path: path.read_bytes() for path in (tmp_path / "out").glob("part-*")} == parts
    assert (tmp_path / "out" / "_SUCCESS").exists()


def test_an_output_with_files_that_no_plan_describes(tmp_path: Path, attempt: Any) -> None:
    write(tmp_path / "in" / "a.parquet", candidate_rows(1, 1))
    write(tmp_path / "out" / "part-0.parquet", candidate_rows(1, 1))
    code, error = attempt()
    assert code == 4
    assert "holds 1 Parquet file(s) that no plan describes" in error


def test_an_output_that_cannot_be_written(tmp_path: Path, attempt: Any) -> None:
    write(tmp_path / "in" / "a.parquet", candidate_rows(1, 1))
    (tmp_path / "file").write_text("not a directory")
    code, error = attempt(output={"path": f"{tmp_path}/file/out"})
    assert code == 6
    assert f"{tmp_path}/file/out" in error


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_without_the_right_to_write(tmp_path: Path, attempt: Any) -> None:
    write(tmp_path / "in" / "a.parquet", candidate_rows(1, 1))
    (tmp_path / "locked").mkdir(mode=0o500)
    code, error = attempt(output={"path": f"{tmp_path}/locked/out"})
    assert code == 6
    assert "not permitted" in error


def test_a_model_directory_without_weights(tmp_path: Path, attempt: Any) -> None:
    write(tmp_path / "in" / "a.parquet", candidate_rows(1, 1))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"]}')
    code, error = attempt(model={"name": f"{tmp_path}/model", "kind": "auto"})
    assert code == 5
    assert "found no weights; expected *.safetensors" in error


def test_a_model_that_is_nowhere(tmp_path: Path, attempt: Any) -> None:
    write(tmp_path / "in" / "a.parquet", candidate_rows(1, 1))
    code, error = attempt(model={"name": f"{tmp_path}/absent", "kind": "auto"})
    assert code == 5
    assert "no such directory" in error


def test_a_passed_through_column_that_is_not_there(tmp_path: Path, attempt: Any) -> None:
    write(tmp_path / "in" / "a.parquet", candidate_rows(1, 1))
    code, error = attempt(output={"passthrough": ["langs"]})
    assert code == 3
    assert "output.passthrough names 'langs', which is not there; found ['doc_id', 'lang'" in error


def test_passed_through_columns_of_two_types(tmp_path: Path, attempt: Any) -> None:
    write(tmp_path / "in" / "a.parquet", candidate_rows(1, 1))
    write(tmp_path / "in" / "b.parquet", [{**row, "lang": 3} for row in candidate_rows(1, 1, first=1)])
    code, error = attempt(output={"passthrough": ["lang"]})
    assert code == 3
    assert "expected one type in all shards" in error


def test_a_shard_that_changes_while_the_job_runs(tmp_path: Path) -> None:
    from conftest import job

    from batch_rerank.errors import InputError
    from batch_rerank.job.run_local import run_local
    from batch_rerank.score.plan import make_plan

    path = write(tmp_path / "in.parquet", candidate_rows(4, 25))
    config = job(path, tmp_path / "out")
    plan, model = make_plan(config)
    receipts = run_local(config, model, plan, frozenset())
    next(receipts)
    write(path, candidate_rows(4, 25))
    with pytest.raises(InputError, match="changed since the plan"):
        list(receipts)
