"""The operator in a Ray Data pipeline of one's own gives what a job gives, for rows and blocks of any form."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checkpoints import bert_reranker
from conftest import candidate_rows, job, nested, rows_of, write

from batch_rerank.config import parse_config
from batch_rerank.engine.encoded import Encoded
from batch_rerank.engine.packing import Float32
from batch_rerank.errors import BatchRerankError, ConfigError, InputError, ModelError, UnfinishedError
from batch_rerank.job.run import run
from batch_rerank.ray_data import Rerank
from batch_rerank.schema import OUTPUT_NAMES
from batch_rerank.score.steps import LoadedScorer

pytestmark = [
    pytest.mark.filterwarnings("ignore:(?s).*deprecated:DeprecationWarning"),  # Ray Data's, of its own settings
    pytest.mark.filterwarnings("ignore:The minimum number of concurrent actors"),
]
PAGE = Path(__file__).parent.parent / "docs" / "ray-data.md"
FREE = {"name": "none", "kind": "checksum"}
Row = dict[str, Any]


def query(name: str, *texts: str | None, **more: Any) -> Row:
    candidates = [{"doc_id": f"{name}-{i}", "text": text} for i, text in enumerate(texts)]
    return {"query_id": name, "query": f"what is {name}", "candidates": candidates, **more}


def ranked(rows: list[Row] | pa.Table, **settings: Any) -> list[Row]:
    """The rows that the free scorer's operator gives for one batch, in this process."""
    batch = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows)
    return pa.concat_tables(list(Rerank(FREE, **settings)(batch))).to_pylist()


def of_job(tmp_path: Path, rows: list[Row], model: Row, **keys: Any) -> pa.Table:
    """What a job gives for the same rows."""
    path = write(tmp_path / "in" / "0.parquet", rows)
    found = job(path, tmp_path / "out", input__layout="nested", output__layout="nested", **keys)
    raw = found.model_dump() | {"model": model}
    run(parse_config(raw, "test"), local=True)
    return rows_of(tmp_path / "out")


def test_a_batch_is_what_the_job_writes(tmp_path: Path) -> None:
    rows = nested(candidate_rows(7, 30))
    keys = {"output__top_k": 5, "output__include_text": True, "output__passthrough": ["lang"]}
    expected = of_job(tmp_path, rows, FREE, **keys)
    operator = Rerank(FREE, top_k=5, include_text=True, passthrough=["lang"])
    found = pa.concat_tables(list(operator(pa.Table.from_pylist(rows))))
    assert found.schema.equals(expected.schema.remove_metadata())
    assert found.to_pylist() == expected.to_pylist()
    assert [field.name for field in found.schema.field("candidates").type.value_type][:9] == list(OUTPUT_NAMES[1:])


@pytest.mark.usefixtures("local_ray", "one_thread")
def test_a_pipeline_on_ray_gives_what_a_job_gives(tmp_path: Path) -> None:
    import ray

    model = bert_reranker(tmp_path / "model")
    rows = nested(candidate_rows(12, 20))
    rows[3]["candidates"][4]["text"] = None
    settings = {"name": str(model), "max_length": 64}
    scoring = {"long_documents": "chunk", "chunk_overlap": 8}
    in_job = {f"scoring__{key}": value for key, value in scoring.items()}
    expected = of_job(tmp_path, rows, settings, output__top_k=10, **in_job)
    dataset = ray.data.from_items(rows, override_num_blocks=3).map_batches(
        Rerank,
        fn_constructor_kwargs={"model": settings, "top_k": 10, "scoring": scoring},
        batch_format="pyarrow",
        batch_size=5,
        compute=ray.data.ActorPoolStrategy(size=1),
    )
    found = {row["query_id"]: row["candidates"] for row in dataset.take_all()}
    assert set(found) == {row["query_id"] for row in rows}
    for row in expected.to_pylist():
        assert [one.pop("doc_id") for one in found[row["query_id"]]] == [one.pop("doc_id") for one in row["candidates"]]
        for one, other in zip(found[row["query_id"]], row["candidates"], strict=True):
            for name in ("score", "relevance_score"):
                assert one.pop(name) == pytest.approx(other.pop(name), abs=1e-5)
            assert one == other


@pytest.mark.usefixtures("local_ray")
def test_what_is_wrong_with_a_model_or_a_setting_ends_the_pipeline_with_its_message() -> None:
    import ray

    dataset = ray.data.from_items([query("a", "x")]).map_batches(
        Rerank,
        fn_constructor_kwargs={"model": FREE, "top_k": 0},
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=1),
    )
    with pytest.raises(Exception, match=r"ConfigError: Rerank: 1 error\(s\) in the job\n  output.top_k: found 0"):
        dataset.take_all()


@pytest.mark.usefixtures("local_ray")
@pytest.mark.slow
def test_another_batch_format_is_told_what_to_give() -> None:
    import ray

    dataset = ray.data.from_items([query("a", "x")]).map_batches(
        Rerank, fn_constructor_kwargs={"model": FREE}, compute=ray.data.ActorPoolStrategy(size=1)
    )
    with pytest.raises(Exception, match=re.escape('batch_format="pyarrow"')):
        dataset.take_all()


def test_rows_keep_their_order_and_lists_without_candidates_stay() -> None:
    rows = [
        query("b", "x"),
        query("empty"),
        query("a", "y", "z"),
        {**query("none"), "candidates": None},
        query("b", "x"),
    ]
    found = ranked(rows)
    assert [row["query_id"] for row in found] == ["b", "empty", "a", "none", "b"]
    assert [len(row["candidates"]) for row in found] == [1, 0, 2, 0, 1]
    assert found[0] == found[4], "a query may come again: its rows are ranked each for itself"


def test_what_cannot_be_scored_is_an_error_in_its_row() -> None:
    rows = [query("a", "x", None, ""), {**query("b", "x"), "query": None}]
    a, b = (row["candidates"] for row in ranked(rows))
    assert [(one["doc_id"], one["error"]) for one in a][-1] == ("a-1", "text is null")
    assert [one["error"] for one in b] == ["query is null"]
    assert [one["score"] is None for one in (*a, *b)] == [False, False, True, True]


@pytest.mark.parametrize(
    "rows",
    [
        [query("a"), query("b")],
        [{**query("a"), "candidates": None}],
        [{**query("a", None, None), "query": None, "instruction": None}],
        [{**query("a"), "candidates": [None]}],
        [query("a", "x", instruction=None)],
        [{**query("a"), "candidates": [{"doc_id": 7, "text": "x", "title": None, "score": None, "rank": None}]}],
    ],
)
def test_blocks_that_say_no_type_have_the_columns_of_others(rows: list[Row]) -> None:
    operator = Rerank(FREE)
    (found,) = operator(pa.Table.from_pylist(rows))
    (other,) = operator(pa.Table.from_pylist([query("a", "x")]))
    assert found.schema.equals(other.schema)
    assert len(found) == len(rows)


def test_a_batch_without_rows_has_the_columns() -> None:
    operator = Rerank(FREE, passthrough=["lang"], include_text=True)
    batch = pa.Table.from_pylist(nested(candidate_rows(1, 2)))
    (expected,) = operator(batch)
    for empty in (batch.slice(0, 0), batch.schema.empty_table()):
        (found,) = operator(empty)
        assert found.schema.equals(expected.schema)
        assert len(found) == 0


def test_passed_through_columns_of_a_block_without_candidates_are_null() -> None:
    (found,) = Rerank(FREE, passthrough=["lang"])(pa.Table.from_pylist([query("a")]))
    assert found.schema.field("candidates").type.value_type.field("lang").type == pa.null()


@pytest.mark.parametrize("candidates", [[], None])
def test_a_block_without_candidates_has_the_columns_that_are_renamed(candidates: Any) -> None:
    operator = Rerank(FREE, columns={"score": "bm25", "rank": "at", "title": "name"}, passthrough=["name"])
    full = [{"doc_id": "d", "text": "x", "name": "t", "bm25": 2.0, "at": 1}]
    (found,) = operator(pa.Table.from_pylist([{**query("a"), "candidates": candidates}]))
    (other,) = operator(pa.Table.from_pylist([{**query("a"), "candidates": full}]))
    assert found.schema.equals(other.schema)
    assert found["candidates"].to_pylist() == [[]]


def test_columns_have_the_names_that_are_given() -> None:
    row = {"qid": 3, "question": "q", "docs": [{"pid": 1, "passage": "x"}, {"pid": 2, "passage": "y"}]}
    names = {"query_id": "qid", "query": "question", "candidates": "docs", "doc_id": "pid", "text": "passage"}
    (found,) = ranked([row], columns=names)
    assert found["query_id"] == "3"
    assert {one["doc_id"] for one in found["candidates"]} == {"1", "2"}


def of_candidates(rows: pa.Table, name: str, values: pa.Array) -> pa.Table:
    """The rows with another field in each candidate."""
    lists = rows["candidates"].combine_chunks()
    fields = [*(lists.values.field(number) for number in range(lists.values.type.num_fields)), values]
    structs = pa.StructArray.from_arrays(fields, [*(field.name for field in lists.values.type), name])
    return rows.set_column(2, "candidates", pa.ListArray.from_arrays(lists.offsets, structs))


def test_a_null_list_may_span_candidates() -> None:
    rows = pa.Table.from_pylist(nested(candidate_rows(3, 2)))
    lists = rows["candidates"].combine_chunks()
    spanning = pa.ListArray.from_arrays(lists.offsets, lists.values, mask=pa.array([False, True, False]))
    (found,) = Rerank(FREE)(rows.set_column(2, "candidates", spanning))
    assert [len(one) for one in found["candidates"].to_pylist()] == [2, 0, 2]
    (expected,) = Rerank(FREE)(rows)
    assert found["candidates"].to_pylist()[2] == expected["candidates"].to_pylist()[2]


@pytest.mark.parametrize(
    "values",
    [
        pa.DictionaryArray.from_arrays(pa.array([0, 1, 0, None], pa.int8()), pa.array(["a", None])),
        pa.RunEndEncodedArray.from_arrays(pa.array([1, 2, 3, 4], pa.int32()), pa.array(["a", None, "a", None])),
    ],
)
def test_dictionaries_with_nulls_and_runs_are_passed_through(values: pa.Array) -> None:
    rows = of_candidates(pa.Table.from_pylist(nested(candidate_rows(2, 2))), "kind", values)
    pieces = pa.concat_tables([rows.slice(0, 1), rows.slice(1)])
    (found,) = Rerank(FREE, passthrough=["kind"])(pieces)
    kinds = [one["kind"] for row in found["candidates"].to_pylist() for one in sorted(row, key=lambda c: c["doc_id"])]
    assert kinds == ["a", None, "a", None]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_texts_and_ids_of_other_arrow_types_are_read(kind: pa.DataType) -> None:
    rows = pa.Table.from_pylist([query("a", "x", "y"), query("b", "z")])
    other = rows
    for index, name in enumerate(("query_id", "query")):
        other = other.set_column(index, name, rows[name].cast(kind))
    lists = pa.large_list(pa.struct([("doc_id", pa.large_string()), ("text", pa.large_string())]))
    other = other.set_column(2, "candidates", rows["candidates"].cast(lists))
    assert ranked(other) == ranked(rows)


def test_many_rows_are_ranked_piece_by_piece() -> None:
    rows = pa.Table.from_pylist(nested(candidate_rows(30, 25)))
    pieces = list(Rerank(FREE)(rows))
    assert len(pieces) > 3
    assert pa.concat_tables(pieces).to_pylist() == [one for row in rows.to_pylist() for one in ranked([row])]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"query_id": "a", "query": "q"}], "column 'candidates' is missing"),
        ([{"query_id": "a", "query": "q", "candidates": ["x"]}], "expected a list of structs"),
        ([{"query_id": "a", "query": 3, "candidates": [{"doc_id": "1", "text": "x"}]}], "column 'query' is int64"),
        ([{**query("a"), "candidates": [{"doc_id": "1", "text": "x", "rank": 2**40}]}], "int32 ranks"),
    ],
)
def test_rows_of_another_form_are_an_input_error(rows: list[Row], said: str) -> None:
    with pytest.raises(InputError, match=said):
        ranked(rows)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"top_k": 0}, "output.top_k: found 0"),
        ({"scoring": {"long_documents": "no"}}, "scoring.long_documents"),
        ({"scoring": {"max_failed_rows": 0.5}}, "a pipeline has no such limit"),
        ({"columns": {"txt": "text"}}, "columns: unknown"),
        ({"passthrough": ["score"]}, "are columns of the output itself"),
    ],
)
def test_settings_that_are_none_are_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Rerank(FREE, **settings)


def test_a_model_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(BatchRerankError, match="kind: found 'what'"):
        Rerank({**FREE, "kind": "what"})
    with pytest.raises(ModelError, match="nothing"):
        Rerank(tmp_path / "nothing")


def test_a_text_that_raises_costs_its_pair_alone(breaking: Callable[[str], None]) -> None:
    breaking("bad")
    (found,) = ranked([query("a", "x", "bad", "y")])
    assert [one["error"] for one in found["candidates"]] == [None, None, "engine: RuntimeError: cannot score this"]


def test_where_all_raises_the_batch_ends(breaking: Callable[[str], None]) -> None:
    breaking("")
    with pytest.raises(UnfinishedError, match=r"could not be scored: 2 pairs raised.*max_errored_blocks"):
        ranked([query("a", "x", "y")])


@pytest.fixture
def breaking(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes the engine raise at documents that begin with a text."""
    score = LoadedScorer.score

    def begin(text: str) -> None:
        def raising(self: LoadedScorer, encoded: Encoded) -> Float32:
            if any(bytes(encoded.segment(index)).startswith(text.encode()) for index in encoded.document):
                raise RuntimeError("cannot score this")
            return score(self, encoded)

        monkeypatch.setattr(LoadedScorer, "score", raising)

    return begin


def test_two_threads_at_once_give_the_same_rows() -> None:
    from concurrent.futures import ThreadPoolExecutor

    operator = Rerank(FREE)
    batches = [pa.Table.from_pylist(nested(candidate_rows(6, 20, first=first))) for first in range(0, 48, 6)]
    expected = [pa.concat_tables(list(operator(batch))) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda batch: pa.concat_tables(list(operator(batch))), batches))
    assert all(one.equals(other) for one, other in zip(found, expected, strict=True))


def test_what_it_gives_is_written_and_read_by_parquet(tmp_path: Path) -> None:
    tables = list(Rerank(FREE)(pa.Table.from_pylist([query("a", "x", None), query("b")])))
    pq.write_table(pa.concat_tables(tables), tmp_path / "0.parquet")
    assert pq.read_table(tmp_path / "0.parquet").num_rows == 2


@pytest.mark.usefixtures("local_ray")
def test_the_pages_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"<!-- run -->\n```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    exec(code, {})
    assert re.search(r"q1 \[\(1, 'd\d', -?\d", capsys.readouterr().out)


def test_the_page_names_the_arguments_and_columns() -> None:
    text = PAGE.read_text(encoding="utf-8")
    arguments = list(inspect.signature(Rerank).parameters)
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == arguments
    assert all(f"`{name}`" in text for name in OUTPUT_NAMES)
