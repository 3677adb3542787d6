"""What an export is held against: the texts that were scored, the scores that there are, and what it may not leave."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Row, job, nested, write
from test_labels import chosen, corpus_rows, exported, labels, table

import batch_rerank.labels.plan as plan_module
from batch_rerank.calls import in_turn
from batch_rerank.config import JobConfig
from batch_rerank.errors import ConfigError, ConflictError, InputError, StorageError
from batch_rerank.job.run import run
from batch_rerank.labels.census import Census
from batch_rerank.labels.export import dry_run, export
from batch_rerank.labels.plan import _digest, cut, prepare
from batch_rerank.labels.scale import advised
from batch_rerank.labels.scores import Opened, open_scores
from batch_rerank.publish.output import Place


def plainly(path: Path, rows: list[Row]) -> None:
    """A shard whose footer says nothing of its texts, so that a letter may change and the footer not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, compression=None, write_statistics=False, use_dictionary=False)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(("column", "what"), [("text", "the document's text"), ("query", "the query")])
def test_a_text_that_is_not_the_one_that_was_scored_is_no_label(
    column: str, what: str, keep: bool, tmp_path: Path
) -> None:
    """The shard has the size and the footer that it had."""
    rows, shard = corpus_rows(6), tmp_path / "in" / "0.parquet"
    plainly(shard, rows)
    run(job(tmp_path / "in", tmp_path / "out", output__keep_scores=keep), local=True)
    exported(tmp_path / "out", tmp_path / "as scored")
    size = shard.stat().st_size
    plainly(shard, [{**row, column: "T" + str(row[column])[1:]} if row["query_id"] == "q3" else row for row in rows])
    assert shard.stat().st_size == size
    if not keep:  # then nobody knows what was scored
        exported(tmp_path / "out", tmp_path / "x")
        return
    with pytest.raises(InputError, match=rf"0\.parquet: unit .*query_id 'q3', doc_id '.*': {what} is not the one"):
        exported(tmp_path / "out", tmp_path / "x")
    assert not (tmp_path / "x" / "_SUCCESS").exists()


def test_an_instruction_on_a_row_without_a_text_was_not_read(tmp_path: Path) -> None:
    """Nor is it now: the query is the one that was scored."""
    rows = [{**row, "instruction": None} for row in corpus_rows(3, 10)]
    rows[0] |= {"text": None, "instruction": "never read"}
    rows[10] |= {"instruction": "find it"}
    write(tmp_path / "in" / "0.parquet", rows)
    run(job(tmp_path / "in", tmp_path / "out", scoring__max_failed_rows=0.5), local=True)
    done = exported(tmp_path / "out", tmp_path / "x", negatives={"ranks": (2, None), "per_query": 3})
    assert done.counts["labelled_queries"] == 3


def test_hashes_are_those_of_each_unit_wherever_its_scores_lie(tmp_path: Path) -> None:
    """Gathered, and before that in a file each: pairs without a score have none, and shift nobody else's."""
    rows = [{**row, "text": None if row["doc_id"] in ("d3", "d7") else row["text"]} for row in corpus_rows(12)]
    write(tmp_path / "in" / "0.parquet", rows)
    run(job(tmp_path / "in", tmp_path / "out", input__unit_pairs=50, scoring__max_failed_rows=0.5), local=True)
    assert len(list((tmp_path / "out" / "_scores").glob("*.parquet"))) == 1
    done = exported(tmp_path / "out", tmp_path / "x", max_dropped_queries=0.9)
    assert done.counts["dropped: no score"] > 2 and done.counts["labelled_queries"] > 6


def test_a_teachers_score_of_another_text_is_none(tmp_path: Path) -> None:
    rows = corpus_rows(6)
    write(tmp_path / "in" / "0.parquet", rows)
    run(job(tmp_path / "in", tmp_path / "out"), local=True)
    write(tmp_path / "other" / "0.parquet", [{**row, "text": "new"} if row["doc_id"] == "d9" else row for row in rows])
    run(job(tmp_path / "other", tmp_path / "second", output__include_text=True), local=True)
    other = sum(row["doc_id"] == "d9" for row in rows)
    given: dict[str, Any] = {"teachers": {"outputs": str(tmp_path / "second")}}
    with pytest.raises(InputError, match=rf"{other} of 150 scored candidates .* or one of another text"):
        exported(tmp_path / "out", tmp_path / "x", **given)
    given["teachers"]["max_missing"] = 0.1
    done = exported(tmp_path / "out", tmp_path / "x", **given)
    assert done.counts["teachers_missing"] == done.counts["dropped: a teacher has no score"] == other
    given["teachers"]["max_missing"] = 0.0  # a limit holds for what is there already, too
    with pytest.raises(InputError, match="max_missing"):
        exported(tmp_path / "out", tmp_path / "x", **given)


def test_the_share_that_is_missing_is_of_all_scores_and_not_of_those_that_agree(tmp_path: Path) -> None:
    rows = corpus_rows(6)
    write(tmp_path / "in" / "0.parquet", rows)
    run(job(tmp_path / "in", tmp_path / "out"), local=True)
    fewer = [{**row, "query": f"{row['query']}!"} for row in rows if row["doc_id"] != "d9"]
    write(tmp_path / "other" / "0.parquet", fewer)
    run(job(tmp_path / "other", tmp_path / "second"), local=True)
    missing = len(rows) - len(fewer)
    given = {"outputs": str(tmp_path / "second"), "max_missing": (missing + 0.5) / 150, "max_disagreement": 0.2}
    done = exported(
        tmp_path / "out",
        tmp_path / "x",
        teachers=given,
        max_dropped_queries=1,
        negatives={"ranks": (1, None), "per_query": 5, "least": 1},
    )
    assert done.counts["dropped: teachers disagree"] > 20 and done.counts["teachers_missing"] == missing


def test_what_only_another_teacher_has_is_counted_once_a_part(tmp_path: Path) -> None:
    """Though the part begins with a unit whose queries have no candidates."""
    rows = nested(corpus_rows(6))
    empty = [{**rows[0], "query_id": f"e{number}", "candidates": []} for number in range(3)]
    write(tmp_path / "in" / "0.parquet", [*empty, *rows])
    config = job(tmp_path / "in", tmp_path / "out", input__layout="nested", input__unit_pairs=1)
    run(config, local=True)
    more = [{**row, "candidates": [*row["candidates"], {"doc_id": "extra", "text": "x"}]} for row in rows]
    write(tmp_path / "other" / "0.parquet", more)
    run(job(tmp_path / "other", tmp_path / "second", input__layout="nested"), local=True)
    given = {"teachers": {"outputs": str(tmp_path / "second")}, "file_bytes": 10**8}
    assert exported(tmp_path / "out", tmp_path / "x", **given).counts["teachers_extra"] == 6


def test_a_damaged_part_is_no_source_of_labels(tmp_path: Path) -> None:
    write(tmp_path / "in" / "0.parquet", corpus_rows(6))
    run(job(tmp_path / "in", tmp_path / "out", output__keep_scores=False), local=True)
    (part,) = (tmp_path / "out").glob("part-*.parquet")
    data = bytearray(part.read_bytes())
    data[len(data) // 3] ^= 1
    part.write_bytes(data)
    with pytest.raises(StorageError, match=r"part-00000\.parquet: not what its receipt says"):
        exported(tmp_path / "out", tmp_path / "x")


def test_an_output_that_was_scored_again_is_another_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    receipts = [SimpleNamespace(unit=f"0-{number}", sha256=str(number)) for number in range(3)]
    told = [
        _digest(cast(Opened, SimpleNamespace(found=SimpleNamespace(committed=found))))
        for found in (receipts, receipts[::-1], [*receipts[:2], SimpleNamespace(unit="0-2", sha256="other")])
    ]
    assert told[0] == told[1] != told[2]
    write(tmp_path / "in" / "0.parquet", corpus_rows(6))
    run(job(tmp_path / "in", tmp_path / "out"), local=True)
    exported(tmp_path / "out", tmp_path / "x")
    assert exported(tmp_path / "out", tmp_path / "x").again
    monkeypatch.setattr(plan_module, "_digest", lambda output: "other scores")
    with pytest.raises(ConflictError, match="holds another export, which differs in scores"):
        exported(tmp_path / "out", tmp_path / "x")


def test_parts_are_small_where_several_teachers_are_brought_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "in" / "0.parquet", corpus_rows(12))
    run(job(tmp_path / "in", tmp_path / "out", input__unit_pairs=25), local=True)
    monkeypatch.setattr(plan_module, "TAUGHT_PAIRS", 50)
    output = open_scores(Place(str(tmp_path / "out")), None)
    alone, taught = (
        cut(output, labels(tmp_path / "x", file_bytes=10**9, teachers=one)) for one in (None, {"outputs": "other"})
    )
    assert len(alone) == 1 and taught == [(first, first + 1) for first in range(0, 12, 2)]


@pytest.mark.parametrize("layout", ["flat", "run"])
def test_labels_among_the_sources_of_a_staged_job_are_refused(layout: str, tmp_path: Path) -> None:
    rows, data = corpus_rows(4), tmp_path / "data"
    given: dict[str, Any] = {"layout": layout}
    if layout == "flat":
        write(data / "0.parquet", rows[::2] + rows[1::2])  # scattered
        given["path"] = f"{data}/**/*.parquet"
    else:
        data.mkdir()
        (data / "a.run").write_text(
            "".join(f"{r['query_id']} Q0 {r['doc_id']} {n} {-n} t\n" for n, r in enumerate(rows))
        )
        documents = {row["doc_id"]: {"_id": row["doc_id"], "text": row["text"]} for row in rows}
        queries = {row["query_id"]: {"_id": row["query_id"], "text": row["query"]} for row in rows}
        for name, found in (("corpus", documents), ("queries", queries)):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in found.values()))
        given |= {"run": f"{data}/**/*.run", **{one: str(tmp_path / f"{one}.jsonl") for one in ("corpus", "queries")}}
    config = JobConfig.model_validate(
        {
            "input": given,
            "output": {"path": str(tmp_path / "out")},
            "model": {"name": "none", "kind": "checksum"},
            "cluster": {"gpus_per_actor": 0},
        }
    )
    run(config, local=True)
    place = Place(str(tmp_path / "out"), {}, config)
    with pytest.raises(ConfigError, match="its next run would read labels"):
        export(place, labels(data / "labels", "trec" if layout == "run" else "flagembedding"), in_turn)
    assert not (data / "labels").exists()


def test_labels_that_texts_rule_out_leave_nothing_for_a_reader(tmp_path: Path) -> None:
    rows = [
        {**row, "text": "" if n % 25 and int(row["query_id"][1:]) < 4 else row["text"]}
        for n, row in enumerate(corpus_rows(6))
    ]
    write(tmp_path / "in" / "0.parquet", rows)
    run(job(tmp_path / "in", tmp_path / "out", input__unit_pairs=25), local=True)
    with pytest.raises(InputError, match=r"4 of 6 queries would be left out[^\n]*\n.*what was written is removed"):
        exported(tmp_path / "out", tmp_path / "x")
    left = [os.path.relpath(path, tmp_path / "x") for path in (tmp_path / "x").rglob("*") if path.is_file()]
    assert left and all(name.startswith(("_manifest/labels.json", "_manifest/lease")) for name in left)
    done = exported(tmp_path / "out", tmp_path / "x", max_dropped_queries=0.7)
    assert done.counts["labelled_queries"] == 2 and len(chosen(tmp_path / "x")) == 2


def test_judgements_below_the_cut_of_an_output_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "in" / "0.parquet", corpus_rows(6))
    run(job(tmp_path / "in", tmp_path / "out", output__keep_scores=False, output__top_k=10), local=True)
    (tmp_path / "qrels").write_text("".join(f"q{n} 0 {corpus_rows(6)[25 * n]['doc_id']} 1\n" for n in range(6)))
    given = {
        "positives": {"from": "both", "qrels": str(tmp_path / "qrels")},
        "negatives": {"ranks": (2, 10), "per_query": 3},
    }
    exported(tmp_path / "out", tmp_path / "x", **given)
    assert "has the 10 best candidates of each query and no others" in caplog.text


def test_the_advised_temperature_is_for_the_labels_as_they_are(tmp_path: Path) -> None:
    """A query's labels lie 1 apart where they are min-max, however near or far its scores are."""
    census = Census(spreads=[np.full(9, 40.0, np.float32)], probable=[np.full(9, 0.5, np.float32)])
    assert census.temperature("logit") == advised(40, 40) > 2
    assert (census.temperature("minmax"), census.temperature("probability")) == (1.0, advised(0.5, 0.5))
    write(tmp_path / "in" / "0.parquet", corpus_rows(6))
    run(job(tmp_path / "in", tmp_path / "out"), local=True)
    found = {
        scale: dry_run(Place(str(tmp_path / "out")), labels(tmp_path / "x", scale=scale), in_turn).about["temperature"]
        for scale in ("logit", "minmax", "probability")
    }
    assert found["minmax"] == 1.0 and found["probability"] < 1 and found["logit"] == 1.0
    assert prepare(Place(str(tmp_path / "out")), labels(tmp_path / "x", scale="minmax"), in_turn).scale == "minmax"
    assert table(tmp_path / "out", ".").num_rows == 150
