"""The whole job in this process: layouts, columns, sampling, counts."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checkpoints import bert_reranker
from conftest import candidate_rows, job, nested, rows_of, scored_only, write
from safetensors.torch import load_file, save_file

from batch_rerank.config import parse_config
from batch_rerank.errors import ModelError
from batch_rerank.job.run import run
from batch_rerank.publish.verify import verify


def test_nested_and_flat_give_the_same_rows(flat_shards: Path, nested_shards: Path, tmp_path: Path) -> None:
    run(job(flat_shards, tmp_path / "a"), local=True)
    run(job(nested_shards, tmp_path / "b", input__layout="nested"), local=True)
    assert rows_of(tmp_path / "a").replace_schema_metadata() == rows_of(tmp_path / "b").replace_schema_metadata()
    assert verify(str(tmp_path / "a")).problems == verify(str(tmp_path / "b")).problems == []


def test_the_output_has_the_documented_schema_and_order(flat_shards: Path, tmp_path: Path) -> None:
    run(job(flat_shards, tmp_path / "out", output__passthrough=["lang"]), local=True)
    rows = rows_of(tmp_path / "out")
    assert [(field.name, str(field.type)) for field in rows.schema] == [
        ("query_id", "string"),
        ("doc_id", "string"),
        ("rank", "int32"),
        ("score", "float"),
        ("relevance_score", "float"),
        ("first_stage_rank", "int32"),
        ("first_stage_score", "float"),
        ("n_tokens", "int32"),
        ("truncated", "bool"),
        ("error", "string"),
        ("lang", "string"),
    ]
    assert rows["query_id"].to_pylist() == [f"q{query}" for query in range(12) for _ in range(25)]
    assert rows["rank"].to_pylist() == [*range(1, 26)] * 12
    first = rows.slice(0, 25).to_pylist()
    assert [row["score"] for row in first] == sorted((row["score"] for row in first), reverse=True)
    row = next(row for row in first if row["doc_id"] == "d4")
    assert (row["first_stage_rank"], row["first_stage_score"], row["lang"]) == (5, 21.0, "beta")
    metadata = pq.read_schema(next((tmp_path / "out").glob("part-*.parquet"))).metadata
    assert {b"batch_rerank.model", b"batch_rerank.fingerprint", b"batch_rerank.template"} <= set(metadata)


def test_units_hold_whole_queries_and_file_names_are_deterministic(flat_shards: Path, tmp_path: Path) -> None:
    out = scored_only(job(flat_shards, tmp_path / "out"))
    files = sorted((out / "_work").glob("*.parquet"))
    assert [file.name for file in files] == [
        f"0000{shard}-0000{unit}.parquet" for shard in range(3) for unit in range(2)
    ]
    for file in files:
        assert pq.read_metadata(file).num_rows == 50
        assert pq.read_metadata(file).num_row_groups == 1
    run(job(flat_shards, out), local=True)
    assert [part.name for part in out.glob("*.parquet")] == ["part-00000.parquet"]


def test_top_k_cuts_after_ranking_and_verify_knows(flat_shards: Path, tmp_path: Path) -> None:
    run(job(flat_shards, tmp_path / "all"), local=True)
    run(job(flat_shards, tmp_path / "top", output__top_k=3), local=True)
    everything = rows_of(tmp_path / "all")
    best = everything.filter(pa.compute.less_equal(everything["rank"], 3)).replace_schema_metadata()
    assert rows_of(tmp_path / "top").replace_schema_metadata() == best
    assert verify(str(tmp_path / "top")).problems == []


def test_include_text_carries_the_text_that_was_scored(tmp_path: Path) -> None:
    rows = [{"query_id": "q", "query": "?", "doc_id": "d", "title": "A title ", "text": "and a text"}]
    run(job(write(tmp_path / "in.parquet", rows), tmp_path / "out", output__include_text=True), local=True)
    assert rows_of(tmp_path / "out")["text"].to_pylist() == ["A title  and a text"]


def test_limit_takes_the_first_queries_into_an_output_of_its_own(flat_shards: Path, tmp_path: Path) -> None:
    whole = job(flat_shards, tmp_path / "out")
    run(whole, local=True)
    limited = parse_config({**whole.model_dump(), "limit": 5}, "test")
    summary = run(limited, local=True)
    assert summary.output == f"{tmp_path}/out-limit-5"
    sampled = rows_of(summary.output).replace_schema_metadata()
    assert sampled == rows_of(tmp_path / "out").slice(0, 5 * 25).replace_schema_metadata()
    assert verify(summary.output).problems == []


def test_renamed_columns_integer_ids_and_dictionary_columns(tmp_path: Path) -> None:
    rows = [{"qid": 7, "query": "a", "pid": 40 + n, "passage": "x" * n} for n in range(3)]
    table = pa.Table.from_pylist(rows)
    table = table.set_column(1, "query", table["query"].dictionary_encode())
    pq.write_table(table, tmp_path / "in.parquet")
    columns = {"query_id": "qid", "doc_id": "pid", "text": "passage"}
    run(job(tmp_path / "in.parquet", tmp_path / "out", input__columns=columns), local=True)
    out = rows_of(tmp_path / "out")
    assert set(out["query_id"].to_pylist()) == {"7"}
    assert sorted(out["doc_id"].to_pylist()) == ["40", "41", "42"]


@pytest.mark.parametrize("layout", ["flat", "nested"])
def test_ranks_that_repeat_are_told_apart_by_scores_as_they_are(layout: str, tmp_path: Path) -> None:
    """One float32 has room for both scores."""
    rows = [{**row, "rank": 1, "score": 20.12345601 + 7e-8 * number} for number, row in enumerate(candidate_rows(1, 4))]
    write(tmp_path / "in.parquet", rows if layout == "flat" else nested(rows))
    run(job(tmp_path / "in.parquet", tmp_path / "out", input__layout=layout), local=True)
    ranks = {row["doc_id"]: row["first_stage_rank"] for row in rows_of(tmp_path / "out").to_pylist()}
    assert ranks == {"d0": 4, "d1": 3, "d2": 2, "d3": 1}


def test_the_inputs_rank_is_the_first_stage_rank(tmp_path: Path) -> None:
    rows = [{"query_id": "q", "query": "?", "doc_id": f"d{n}", "text": str(n), "rank": 10 - n} for n in range(3)]
    run(job(write(tmp_path / "in.parquet", rows), tmp_path / "out"), local=True)
    ranks = {row["doc_id"]: row["first_stage_rank"] for row in rows_of(tmp_path / "out").to_pylist()}
    assert ranks == {"d0": 10, "d1": 9, "d2": 8}


def test_zero_row_shards_and_queries_without_candidates_are_counted_and_passed_over(tmp_path: Path) -> None:
    rows = nested(candidate_rows(2, 3))
    rows.insert(1, {"query_id": "empty", "query": "nothing", "candidates": []})
    rows.insert(2, {"query_id": "null", "query": "nothing", "candidates": None})
    write(tmp_path / "in" / "0.parquet", rows)
    schema = pq.read_schema(tmp_path / "in" / "0.parquet")
    pq.write_table(schema.empty_table(), tmp_path / "in" / "1.parquet")
    summary = run(job(tmp_path / "in", tmp_path / "out", input__layout="nested"), local=True)
    assert summary.counts == {"shards": 2, "zero_row_shards": 1, "queries": 4, "queries_without_candidates": 2}
    assert summary.totals.rows_out == 6
    assert verify(summary.output).problems == []


def test_only_zero_row_shards_end_well_with_no_rows(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(candidate_rows(1, 1)).slice(0, 0), tmp_path / "in.parquet")
    summary = run(job(tmp_path / "in.parquet", tmp_path / "out"), local=True)
    assert summary.totals.rows_out == 0
    assert (tmp_path / "out" / "_SUCCESS").exists()


def test_null_texts_and_null_queries_become_error_rows_that_rank_last(tmp_path: Path) -> None:
    rows = candidate_rows(3, 4)
    rows[1]["text"] = None
    for row in rows[4:8]:
        row["query"] = None
    path = write(tmp_path / "in.parquet", rows)
    summary = run(job(path, tmp_path / "out", scoring__max_failed_rows=0.5), local=True)
    out = rows_of(tmp_path / "out").to_pylist()
    assert (summary.totals.null_texts, summary.totals.null_queries, summary.totals.failed) == (1, 4, 5)
    bad = next(row for row in out if row["query_id"] == "q0" and row["doc_id"] == "d1")
    expected = {"rank": 4, "score": None, "relevance_score": None, "n_tokens": 0, "error": "text is null"}
    assert {key: bad[key] for key in expected} == expected
    assert [row["error"] for row in out if row["query_id"] == "q1"] == ["query is null"] * 4
    assert [row["doc_id"] for row in out if row["query_id"] == "q1"] == ["d0", "d1", "d2", "d3"]
    assert verify(summary.output).problems == []


def test_an_empty_text_is_scored_and_counted(tmp_path: Path) -> None:
    rows = candidate_rows(1, 3)
    rows[0]["text"] = ""
    summary = run(job(write(tmp_path / "in.parquet", rows), tmp_path / "out"), local=True)
    assert summary.totals.empty_texts == 1
    assert all(row["score"] is not None for row in rows_of(tmp_path / "out").to_pylist())


def test_truncated_pairs_are_counted_and_flagged(tmp_path: Path) -> None:
    rows = candidate_rows(1, 2)
    rows[0]["text"] = "x" * 500
    config = job(write(tmp_path / "in.parquet", rows), tmp_path / "out", model__max_length=200)
    assert run(config, local=True).totals.truncated == 1
    flags = {row["doc_id"]: (row["truncated"], row["n_tokens"]) for row in rows_of(tmp_path / "out").to_pylist()}
    assert flags["d0"] == (True, 200)
    assert flags["d1"][0] is False


def test_an_instruction_column_partly_null_falls_back_to_the_jobs(tmp_path: Path) -> None:
    rows = candidate_rows(2, 3)
    for row, instruction in zip(rows, ["judge code"] * 3 + [None] * 3, strict=True):
        row["instruction"] = instruction
    explicit = [{**row, "instruction": row["instruction"] or ""} for row in rows]
    run(job(write(tmp_path / "a.parquet", rows), tmp_path / "a"), local=True)
    run(job(write(tmp_path / "b.parquet", explicit), tmp_path / "b"), local=True)
    run(job(write(tmp_path / "c.parquet", candidate_rows(2, 3)), tmp_path / "c"), local=True)
    a, b, c = (rows_of(tmp_path / name).replace_schema_metadata() for name in "abc")
    assert a == b
    assert a.slice(0, 3) != c.slice(0, 3)
    assert a.slice(3) == c.slice(3)


@pytest.mark.parametrize("layout", ["nested", "flat"])
def test_a_passed_through_column_of_a_candidate_stays_with_it(
    layout: str, flat_shards: Path, nested_shards: Path, tmp_path: Path
) -> None:
    shards = {"nested": nested_shards, "flat": flat_shards}[layout]
    run(job(shards, tmp_path / "out", input__layout=layout, output__passthrough=["lang"]), local=True)
    expected = {row["doc_id"]: row["lang"] for row in candidate_rows(1, 25)}
    assert all(row["lang"] == expected[row["doc_id"]] for row in rows_of(tmp_path / "out").to_pylist())


def test_a_passed_through_column_of_a_query_is_repeated(tmp_path: Path) -> None:
    rows = [{**query, "market": query["query_id"].upper()} for query in nested(candidate_rows(3, 2))]
    path = write(tmp_path / "in.parquet", rows)
    run(job(path, tmp_path / "out", input__layout="nested", output__passthrough=["market"]), local=True)
    assert rows_of(tmp_path / "out")["market"].to_pylist() == ["Q0", "Q0", "Q1", "Q1", "Q2", "Q2"]


def test_the_self_test_is_logged_before_the_first_unit_and_kept_in_every_receipt(
    flat_shards: Path, tmp_path: Path, logged: list[str]
) -> None:
    model = bert_reranker(tmp_path / "model")
    config = job(flat_shards, tmp_path / "out", model__name=str(model), model__kind="auto", model__max_length=128)
    run(config, local=True)
    assert [message.startswith("self-test passed: load, weights, ") for message in logged].count(True) == 1
    tested = next(i for i, message in enumerate(logged) if message.startswith("self-test"))
    assert tested < next(i for i, message in enumerate(logged) if " units  " in message)
    receipts = [json.loads(path.read_text()) for path in (tmp_path / "out" / "_manifest" / "receipts").glob("*")]
    assert {receipt["self_test"] for receipt in receipts} == {logged[tested]}


def test_a_model_that_fails_its_self_test_scores_nothing(flat_shards: Path, tmp_path: Path) -> None:
    model = bert_reranker(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["bert.pooler.dense.weight"].zero_()  # loads, and scores everything alike
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    config = job(flat_shards, tmp_path / "out", model__name=str(model), model__kind="auto", model__max_length=128)
    with pytest.raises(ModelError, match="self-test failed: spread: all 66 scores are"):
        run(config, local=True)
    assert json.loads((tmp_path / "out" / "_manifest" / "status.json").read_text())["exit_code"] == 5
    assert not list((tmp_path / "out").glob("part-*"))
