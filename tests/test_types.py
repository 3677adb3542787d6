"""Arrow types that writers use: read like plain ones, or refused by name."""

from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import candidate_rows, job, nested, rows_of, scored_only

from batch_rerank.errors import InputError
from batch_rerank.input import canonical
from batch_rerank.input.carried import carried_type
from batch_rerank.job.run import run
from batch_rerank.publish.nested import flat
from batch_rerank.publish.verify import verify

TEXTS = [
    pa.large_string(),
    pa.string_view(),
    pa.dictionary(pa.int32(), pa.string()),
    pa.dictionary(pa.int8(), pa.large_string()),
]
LISTS = [pa.large_list, lambda item: pa.list_(item, 3)]


def output_of(table: pa.Table, folder: Path, layout: str, **keys: Any) -> pa.Table:
    folder.mkdir()
    views = any("string_view" in str(field.type) for field in table.schema)  # pyarrow cannot write slices of those
    pq.write_table(table, folder / "in.parquet", row_group_size=None if views else 2 if layout == "nested" else 5)
    run(job(folder / "in.parquet", folder / "out", input__layout=layout, **keys), local=True)
    assert verify(str(folder / "out")).problems == []
    return rows_of(folder / "out").replace_schema_metadata()


@pytest.mark.parametrize("kind", TEXTS, ids=str)
@pytest.mark.parametrize("layout", ["flat", "nested"])
def test_every_kind_of_text_reads_like_a_string(layout: str, kind: pa.DataType, tmp_path: Path) -> None:
    if layout == "nested" and kind == pa.string_view():
        pytest.skip("pyarrow 26 cannot write string_view inside lists")
    rows = [{**row, "title": "t"} for row in candidate_rows(5, 3)]
    plain = pa.Table.from_pylist(nested(rows) if layout == "nested" else rows)
    fields = [field.with_type(of_kind(field.type, kind)) for field in plain.schema]
    expected = output_of(plain, tmp_path / "plain", layout, output__passthrough=["lang"])
    found = output_of(plain.cast(pa.schema(fields)), tmp_path / "other", layout, output__passthrough=["lang"])
    assert found.cast(expected.schema) == expected


def of_kind(given: pa.DataType, kind: pa.DataType) -> pa.DataType:
    """A type with each string in it replaced."""
    if pa.types.is_list(given):
        item = given.value_type
        return pa.list_(pa.struct([field.with_type(of_kind(field.type, kind)) for field in item]))
    return kind if pa.types.is_string(given) else given


@pytest.mark.parametrize("number", range(len(LISTS)))
def test_every_kind_of_list_reads_like_a_list(number: int, tmp_path: Path) -> None:
    plain = pa.Table.from_pylist(nested(candidate_rows(5, 3)))
    expected = output_of(plain, tmp_path / "plain", "nested")
    kind = LISTS[number](plain.schema.field("candidates").type.value_type)
    table = plain.set_column(2, "candidates", plain["candidates"].cast(kind))
    assert output_of(table, tmp_path / "other", "nested") == expected


@pytest.mark.parametrize(
    "ids",
    [[Decimal(7)] * 4, [1.5] * 4, [b"q"] * 4, [True] * 4, [["q"]] * 4],
    ids=["decimal", "float", "binary", "bool", "list"],
)
def test_ids_that_are_no_ids_are_refused(ids: list[Any], tmp_path: Path) -> None:
    table = pa.Table.from_pylist(candidate_rows(1, 4)).set_column(0, "query_id", pa.array(ids))
    with pytest.raises(InputError, match=r"column 'query_id' is .*, expected a string or an integer"):
        output_of(table, tmp_path / "out", "flat")


def test_a_null_candidate_is_named_by_its_row(tmp_path: Path) -> None:
    rows = nested(candidate_rows(3, 2))
    rows[1]["candidates"][1] = None
    with pytest.raises(InputError, match="row 1: doc_id is null"):
        output_of(pa.Table.from_pylist(rows), tmp_path / "out", "nested")


def test_null_lists_and_empty_row_groups_are_passed_over(tmp_path: Path) -> None:
    rows = nested(candidate_rows(3, 2))
    rows[1]["candidates"] = None
    table = pa.Table.from_pylist(rows)
    with pq.ParquetWriter(tmp_path / "in.parquet", table.schema) as writer:
        for part in (table.slice(0, 0), table.slice(0, 1), table.slice(0, 0), table.slice(1), table.slice(0, 0)):
            writer.write_table(part)
    run(job(tmp_path / "in.parquet", tmp_path / "out", input__layout="nested"), local=True)
    assert rows_of(tmp_path / "out")["query_id"].to_pylist() == ["q0", "q0", "q2", "q2"]
    assert verify(str(tmp_path / "out")).problems == []


@pytest.mark.parametrize("column", ["instruction", "title", "rank", "score"])
def test_an_optional_column_that_comes_and_goes_is_said(column: str, tmp_path: Path, logged: list[str]) -> None:
    value: Any = {"instruction": "judge", "title": "t", "rank": 5, "score": 1.0}[column]
    plain = [{key: row[key] for key in ("query_id", "query", "doc_id", "text")} for row in candidate_rows(4, 3)]
    with_it = [{**row, column: value} for row in plain[6:]]
    (tmp_path / "in").mkdir()
    pq.write_table(pa.Table.from_pylist(plain[:6]), tmp_path / "in" / "0.parquet")
    pq.write_table(pa.Table.from_pylist(with_it), tmp_path / "in" / "1.parquet")
    run(job(tmp_path / "in", tmp_path / "out"), local=True)
    assert f"column {column!r} is in 1 of 2 shards, e.g. not in {tmp_path}/in/0.parquet: read without it" in logged
    assert verify(str(tmp_path / "out")).problems == []


UUIDS = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"0" * 16] * 6, pa.binary(16)))
EACH = pa.array(range(7), pa.int32())
ODD = {
    "string_view": pa.array(["a", None] * 3, pa.string_view()),
    "binary_view": pa.array([b"a", None] * 3, pa.binary_view()),
    "decimals": pa.array([Decimal("1.5"), None] * 3, pa.decimal256(50, 2)),
    "dictionary": pa.array(["a", "b"] * 3, pa.large_string()).dictionary_encode(),
    "empty_dictionary": pa.array([None] * 6, pa.dictionary(pa.int8(), pa.string())),
    "structs": pa.array([{"a": None, "b": [None, {"c": None}]}, None] * 3),
    "struct_of_dictionary": pa.StructArray.from_arrays([pa.array(["x", "y"] * 3).dictionary_encode()], ["d"]),
    "lists_of_nulls": pa.array([[None], None] * 3, pa.list_(pa.null())),
    "list_view": pa.array([[1], None] * 3, pa.list_view(pa.int8())),
    "map": pa.array([[("a", 1)], None] * 3, pa.map_(pa.string(), pa.int32())),
    "nulls": pa.nulls(6),
    "half": pa.array([1.0, None] * 3, pa.float16()),
    "duration": pa.array([1, None] * 3, pa.duration("ns")),
    "uuid": UUIDS,
    "json": pa.ExtensionArray.from_storage(pa.json_(), pa.array(["{}"] * 6)),
    "struct_of_uuid": pa.StructArray.from_arrays([UUIDS, pa.array(range(6))], ["u", "k"]),
    "list_of_uuid": pa.ListArray.from_arrays(EACH, UUIDS),
    "map_of_uuid": pa.MapArray.from_arrays(EACH, pa.array(["a"] * 6), UUIDS),
    "lists_of_lists_of_uuid": pa.ListArray.from_arrays(EACH, pa.ListArray.from_arrays(EACH, UUIDS)),
    "tensor": pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((6, 2, 2), np.float32)),
}


@pytest.mark.parametrize("layout", ["flat", "nested"])
def test_every_type_is_passed_through(layout: str, tmp_path: Path) -> None:
    table = pa.Table.from_pylist(candidate_rows(2, 3))
    for name, values in ODD.items():
        table = table.append_column(name, values)
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in/a.parquet")
    run(job(tmp_path / "in", tmp_path / "out", output__passthrough=list(ODD), output__layout=layout), local=True)
    assert verify(str(tmp_path / "out")).problems == []
    (part,) = (tmp_path / "out").glob("*.parquet")
    assert flat(pq.read_table(part).slice(0, 0)).column_names[-len(ODD) :] == list(ODD)


@pytest.mark.parametrize("column", ["text", "doc_id", "score", "title"])
def test_what_cannot_be_read_is_refused_by_name(column: str, tmp_path: Path) -> None:
    kinds = ["binary_view", "decimals", "structs", "lists_of_nulls", "list_view", "map", "duration", "uuid"]
    for name in kinds:
        table = pa.Table.from_pylist(candidate_rows(2, 3))
        table = table.drop_columns([column] if column in table.column_names else []).append_column(column, ODD[name])
        pq.write_table(table, tmp_path / "a.parquet")
        with pytest.raises(InputError, match=column):
            run(job(tmp_path / "a.parquet", tmp_path / "out"), local=True)


FEW = 100
"""Values of a file that fit an int8 index; those of two such files do not."""
SHORT, LONG = (pa.dictionary(index, pa.string()) for index in (pa.int8(), pa.int32()))


def as_it_is(values: pa.Array) -> pa.Array:
    return values


def in_list(values: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(range(len(values) + 1), pa.int32()), values)


def in_struct(values: pa.Array) -> pa.Array:
    return pa.StructArray.from_arrays([values], ["x"])


HOLDERS = [as_it_is, in_list, in_struct]


def with_values(folder: Path, columns: list[pa.Array], scattered: bool) -> Path:
    """A flat file for each column, which is called `repo`; scattered: each query has rows in every file."""
    (folder / "in").mkdir(parents=True)
    for number, values in enumerate(columns):
        query = [f"q{row % 5}" if scattered else f"q{number}-{row // 20}" for row in range(len(values))]
        ids = [f"d{number}-{row}" for row in range(len(values))]
        table = pa.table({"query_id": query, "query": query, "doc_id": ids, "text": ids, "repo": values})
        pq.write_table(table, folder / "in" / f"{number}.parquet")
    return folder / "in"


def repos(number: int, kind: pa.DataType, count: int = FEW) -> pa.Array:
    return pa.array([f"repo {number}-{row}" if row else None for row in range(count)]).cast(kind)


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("second", [SHORT, LONG], ids=["int8", "int32"])
@pytest.mark.parametrize("scattered", [False, True])
def test_categories_of_files_together_may_be_more_than_the_index_of_one_holds(
    scattered: bool, second: pa.DataType, holder: Callable[[pa.Array], pa.Array], tmp_path: Path
) -> None:
    columns = [holder(repos(0, SHORT)), holder(repos(1, second))]
    place = with_values(tmp_path, columns, scattered)
    run(job(place, tmp_path / "out", output__passthrough=["repo"]), local=True)
    assert verify(str(tmp_path / "out")).problems == []
    found = rows_of(tmp_path / "out")
    values = {f"d{number}-{row}": one for number in (0, 1) for row, one in enumerate(columns[number].to_pylist())}
    assert dict(zip(found["doc_id"].to_pylist(), found["repo"].to_pylist(), strict=True)) == values
    assert "indices=int32" in str(found["repo"].type)


def test_score_files_of_short_indices_are_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a version that kept the index of the file."""
    config = job(with_values(tmp_path, [repos(0, SHORT), repos(1, SHORT)], False), tmp_path / "out")
    config = config.model_copy(update={"output": config.output.model_copy(update={"passthrough": ["repo"]})})
    with monkeypatch.context() as patch:
        patch.setattr(canonical, "carried", as_it_is)
        scored_only(config)
    run(config, local=True)
    assert verify(str(tmp_path / "out")).problems == []
    assert len(set(rows_of(tmp_path / "out")["repo"].to_pylist())) == 2 * FEW - 1


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("kind", [pa.string_view(), pa.binary_view()], ids=str)
@pytest.mark.parametrize("scattered", [False, True])
def test_views_are_passed_through(
    scattered: bool, kind: pa.DataType, holder: Callable[[pa.Array], pa.Array], tmp_path: Path
) -> None:
    columns = [holder(repos(number, kind, 20)) for number in (0, 1)]
    run(job(with_values(tmp_path, columns, scattered), tmp_path / "out", output__passthrough=["repo"]), local=True)
    assert verify(str(tmp_path / "out")).problems == []
    found = rows_of(tmp_path / "out")
    values = {f"d{number}-{row}": one for number in (0, 1) for row, one in enumerate(columns[number].to_pylist())}
    assert dict(zip(found["doc_id"].to_pylist(), found["repo"].to_pylist(), strict=True)) == values
    assert "view" not in str(found["repo"].type)


@pytest.mark.parametrize(
    "holder", [pa.list_, pa.large_list, pa.list_view, lambda one: pa.list_(one, 2), lambda one: pa.map_(one, one)]
)
def test_every_type_that_holds_others_is_carried(holder: Callable[[pa.DataType], pa.DataType]) -> None:
    found = carried_type(holder(pa.struct([pa.field("x", SHORT, False), ("y", pa.string_view())])))
    assert "int8" not in str(found) and "view" not in str(found)
    assert "x: dictionary<values=string, indices=int32, ordered=0> not null, y: large_string" in str(found)
    assert carried_type(found) == found
    assert carried_type(holder(pa.int8())) == holder(pa.int8())
