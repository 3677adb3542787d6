"""Passed-through columns: of any name, the names that the code uses itself among them."""

import ast
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import job, rows_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import batch_rerank
from batch_rerank.errors import InputError
from batch_rerank.job.run import run
from batch_rerank.publish.verify import verify
from batch_rerank.schema import CHUNK_OFFSET, OUTPUT_NAMES

QUERIES, CANDIDATES = 3, 4
ROWS = QUERIES * CANDIDATES
REFUSED = {*OUTPUT_NAMES, CHUNK_OFFSET, "text"}
"""Columns that the output has itself: the job file says so."""


def names_in_the_code() -> list[str]:
    """Every short string of the code without a space: whatever it may call a column is among them."""
    found = set()
    for path in Path(batch_rerank.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and 0 < len(node.value) <= 40:
                found.add(node.value)
    return sorted(name for name in found if "\n" not in name and " " not in name)


OURS = names_in_the_code()


def flat(names: list[str], scattered: bool = False) -> pa.Table:
    """Flat candidates; each column of `names` that is not one of ours has a value that tells its row and column."""
    order = [row * 5 % ROWS for row in range(ROWS)] if scattered else [*range(ROWS)]
    data: dict[str, list[Any]] = {
        "query_id": [f"q{row // CANDIDATES}" for row in order],
        "query": [f"what {row // CANDIDATES}" for row in order],
        "doc_id": [f"d{row % CANDIDATES}" for row in order],
        "text": [f"text {row}" for row in order],
    }
    data |= {name: [f"{name}/{row}" for row in order] for name in names if name not in data}
    if "instruction" in names:
        data["instruction"] = [f"judge {row // CANDIDATES}" for row in order]
    return pa.table(data)


def as_nested(table: pa.Table) -> pa.Table:
    """The same candidates, every column but the query's a field of the candidate."""
    of_query = ("query_id", "query", "instruction")
    rows = table.to_pylist()
    groups = [rows[start : start + CANDIDATES] for start in range(0, ROWS, CANDIDATES)]
    return pa.Table.from_pylist(
        [
            {
                **{name: group[0][name] for name in of_query if name in group[0]},
                "candidates": [{name: row[name] for name in row if name not in of_query} for row in group],
            }
            for group in groups
        ]
    )


def passed(table: pa.Table, names: list[str], folder: Path, layout: str = "flat", **keys: Any) -> pa.Table:
    """The verified output of a job that passes these columns through."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / "in.parquet")
    config = job(folder / "in.parquet", folder / "out", input__layout=layout, output__passthrough=names, **keys)
    summary = run(config, local=True)
    assert verify(summary.output).problems == []
    return rows_of(folder / "out")


def check(output: pa.Table, table: pa.Table, names: list[str]) -> None:
    """Every candidate is there once, with the values that it has in the input."""
    assert output.column_names[-len(names) :] == names
    expected = {(row["query_id"], row["doc_id"]): row for row in table.to_pylist()}
    rows = output.to_pylist()
    assert len(rows) == len(expected)
    for row in rows:
        given = expected.pop((row["query_id"], row["doc_id"]))
        assert {name: row[name] for name in names} == {name: given[name] for name in names}


@pytest.mark.parametrize("layout", ["flat", "scattered", "nested"])
def test_a_column_may_have_any_name_that_the_code_uses(layout: str, tmp_path: Path) -> None:
    refused = REFUSED | ({"title"} if layout == "scattered" else set())
    names = [name for name in OURS if name not in refused]
    assert {"query_index", "unit", "row", "candidates", "+", "query", "instruction"} < set(names)
    table = flat(names, layout == "scattered")
    given = as_nested(table) if layout == "nested" else table
    check(passed(given, names, tmp_path, "nested" if layout == "nested" else "flat"), table, names)


@settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(st.sampled_from(OURS) | st.text(max_size=8), min_size=1, max_size=6, unique=True),
    layout=st.sampled_from(["flat", "nested"]),
    top_k=st.sampled_from([None, 2]),
)
def test_passed_through_columns_change_nothing_else(
    names: list[str], layout: str, top_k: int | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    names = [name for name in names if name not in REFUSED]
    folder = tmp_path_factory.mktemp("any")
    table = flat(names)
    given = as_nested(table) if layout == "nested" else table
    with_them = passed(given, names, folder / "with", layout, output__top_k=top_k)
    without = passed(given, [], folder / "without", layout, output__top_k=top_k)
    plain = list(OUTPUT_NAMES)
    assert with_them.select(plain).replace_schema_metadata() == without.select(plain).replace_schema_metadata()
    assert len(with_them) == QUERIES * (top_k or CANDIDATES)


def test_query_and_instruction_are_passed_through_as_the_file_has_them(tmp_path: Path) -> None:
    table = flat(["instruction", "question"])
    names = ["query", "instruction"]
    renamed = {"input__columns": {"query": "question2"}}
    table = table.append_column("question2", pa.array([f"other {row // CANDIDATES}" for row in range(ROWS)]))
    check(passed(table, names, tmp_path / "a", **renamed), table, names)
    query = as_nested(table.drop_columns(["question", "question2"]))
    check(passed(query, names, tmp_path / "b", "nested"), table, names)


def test_the_list_of_candidates_is_not_passed_through(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"output\.passthrough names 'candidates', the list of candidates"):
        passed(as_nested(flat([])), ["candidates"], tmp_path, "nested")
