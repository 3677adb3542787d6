"""Measures before and after, against values computed by hand."""

import errno
import io
import json
import math
import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from conftest import candidate_rows, job, rows_of, write

import batch_rerank.judge.evaluate as module
from batch_rerank.errors import ConfigError, InputError, StorageError
from batch_rerank.job.run import run
from batch_rerank.judge.evaluate import evaluate, read_qrels
from batch_rerank.publish.read_parts import read_part
from batch_rerank.store.failures import is_damage
from batch_rerank.store.filesystem import Location, locate

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    run(job(write(tmp_path / "in.parquet", candidate_rows(3, 20)), tmp_path / "out"), local=True)
    return tmp_path / "out"


def relevant_at(output: Path, query_id: str, rank: int) -> str:
    """The document that the output has at a rank."""
    rows = rows_of(output)
    found = rows.filter(pc.and_(pc.equal(rows["query_id"], query_id), pc.equal(rows["rank"], rank)))
    return str(found["doc_id"][0].as_py())


def test_before_and_after_by_hand(output: Path, tmp_path: Path) -> None:
    second = relevant_at(output, "q0", 2)
    position = int(second.removeprefix("d")) + 1  # the input's order is d0, d1, …
    qrels = tmp_path / "qrels.txt"
    qrels.write_text(f"q0 0 {second} 1\n")
    result = evaluate(str(output), str(qrels), ["RR@10", "nDCG@10", "R@20"])
    assert result.after == pytest.approx({"RR@10": 1 / 2, "nDCG@10": 1 / math.log2(3), "R@20": 1.0})
    assert result.before["RR@10"] == pytest.approx(1 / position if position <= 10 else 0)


def test_a_query_missing_from_the_run_counts_as_zero(output: Path, tmp_path: Path) -> None:
    first = relevant_at(output, "q0", 1)
    qrels = tmp_path / "qrels.txt"
    qrels.write_text(f"q0 0 {first} 1\nnot-there 0 d1 1\n")
    result = evaluate(str(output), str(qrels), ["RR@10"])
    assert (result.queries, result.queries_missing) == (2, 1)
    assert result.after == {"RR@10": 0.5}
    assert result.after_by_query == {"RR@10": {"q0": 1.0, "not-there": 0.0}}


def test_trec_and_beir_qrels_read_the_same(tmp_path: Path) -> None:
    (tmp_path / "trec").write_text("q1 0 d1 2\nq1 Q0 d2 0\n\nq2 0 d3 1\n")
    (tmp_path / "beir.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t0\nq2\td3\t1\n")
    expected = {"q1": {"d1": 2, "d2": 0}, "q2": {"d3": 1}}
    assert read_qrels(str(tmp_path / "trec")) == read_qrels(str(tmp_path / "beir.tsv")) == expected


def test_top_k_does_not_lower_the_first_stage(tmp_path: Path) -> None:
    path = write(tmp_path / "in.parquet", candidate_rows(3, 20))
    run(job(path, tmp_path / "all"), local=True)
    run(job(path, tmp_path / "top", output__top_k=2), local=True)
    (tmp_path / "qrels").write_text("".join(f"q{n} 0 d{n} 1\n" for n in range(3)))
    whole, cut = (evaluate(str(tmp_path / name), str(tmp_path / "qrels"), ["RR@10"]) for name in ("all", "top"))
    assert whole.before == cut.before == pytest.approx({"RR@10": (1 + 1 / 2 + 1 / 3) / 3})


def test_the_command_prints_a_table_or_json(output: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "qrels").write_text("q0 0 d0 1\n")
    code, out, error = cli("evaluate", "--run", output, "--qrels", tmp_path / "qrels")
    assert code == 0
    assert all(name in out for name in ("nDCG@10", "RR@10", "R@10", "before", "after"))
    assert "1 judged queries" in error
    code, out, _ = cli("evaluate", "--run", output, "--qrels", tmp_path / "qrels", "AP", "--json", "--per-query")
    assert code == 0
    assert list(json.loads(out)["after_by_query"]) == ["AP"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("q1 0 d1\n", "line 1: found 'q1 0 d1', expected qid 0 docid relevance"),
        ("q1 0 d1 1\nq1 0 d2 high\n", "line 2: found 'q1 0 d2 high'"),
        ("query-id\tcorpus-id\tscore\nq1 d1 1\n", "line 2: found 'q1 d1 1', expected query-id, corpus-id, score"),
        ("", "no judgements"),
        ("q1 0 d1 1099511627776\n", "line 1: found 'q1 0 d1 1099511627776'"),
        ("q1 0 d1 1\nq1 0 d1 1\nq1 0 d1 0\n", "line 3: judges document 'd1' of query 'q1' a second time, 0 after 1"),
    ],
)
def test_bad_qrels_name_the_line(content: str, message: str, output: Path, tmp_path: Path) -> None:
    (tmp_path / "qrels").write_text(content)
    with pytest.raises(InputError, match=message.replace("(", "\\(")):
        evaluate(str(output), str(tmp_path / "qrels"))


def test_qrels_that_are_not_there_and_measures_that_are_none(output: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="absent: not found"):
        evaluate(str(output), str(tmp_path / "absent"))
    (tmp_path / "qrels").write_text("q0 0 d0 1\n")
    with pytest.raises(ConfigError, match="measure 'nope@10' is not known"):
        evaluate(str(output), str(tmp_path / "qrels"), ["nope@10"])


def test_an_unfinished_output_is_not_evaluated(output: Path, tmp_path: Path) -> None:
    (output / "_SUCCESS").unlink()
    (tmp_path / "qrels").write_text("q0 0 d0 1\n")
    with pytest.raises(InputError, match="has not finished"):
        evaluate(str(output), str(tmp_path / "qrels"))


def test_some_parts_at_a_time_give_what_all_at_once_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "in.parquet", candidate_rows(30, 20))
    (tmp_path / "qrels").write_text("".join(f"q{n} 0 d{n % 20} {1 + n % 3}\n" for n in range(0, 30, 2)))
    for name, keys in {"all": {}, "top": {"output__top_k": 3}}.items():
        run(job(path, tmp_path / name, **keys), local=True)
        whole = evaluate(str(tmp_path / name), str(tmp_path / "qrels"))
        with monkeypatch.context() as patched:
            patched.setattr(module, "ROWS_AT_ONCE", 1)
            parts = evaluate(str(tmp_path / name), str(tmp_path / "qrels"))
        assert parts.after_by_query == whole.after_by_query and parts.before_by_query == whole.before_by_query
        assert parts.after == whole.after and parts.before == whole.before
        assert (parts.queries, parts.queries_missing) == (15, 0)
        sums = evaluate(str(tmp_path / name), str(tmp_path / "qrels"), per_query=False)
        assert sums.after == whole.after and not any(sums.after_by_query.values())


@pytest.mark.parametrize("top_k", [None, 3])
def test_the_numbers_are_the_same_whoever_computes_them_and_whatever_ends_first(
    top_k: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "in.parquet", candidate_rows(30, 20))
    (tmp_path / "qrels").write_text("".join(f"q{n} 0 d{n % 20} {1 + n % 3}\n" for n in range(0, 34, 2)))
    keys = {"output__top_k": top_k, "output__file_bytes": 1, "input__unit_pairs": 60}
    run(job(path, tmp_path / "out", **keys), local=True)
    here = evaluate(str(tmp_path / "out"), str(tmp_path / "qrels"))
    monkeypatch.setattr(module, "SMALL_BYTES", 0)
    asked: list[int] = []

    def elsewhere(calls: Iterable[Callable[[Any], Any]], shared: Any = None) -> Iterator[Any]:
        sent = [pickle.dumps(call) for call in calls]
        asked.append(len(sent))
        return (pickle.loads(call)(shared) for call in reversed(sent))

    there = evaluate(str(tmp_path / "out"), str(tmp_path / "qrels"), on=lambda config: elsewhere)
    assert asked == [10 if top_k is None else 11]
    assert there == here and there.queries_missing == 2
    assert list(there.after_by_query["RR@10"]) == list(here.after_by_query["RR@10"])


def test_only_some_rows_are_held_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 1000)
    qrels = {str(query): {"1": 1} for query in range(5000)}
    sums = module.Sums([module.measure_of("RR@10")], qrels)
    held = []
    for start in range(0, 5000, 50):
        query = np.repeat(np.arange(start, start + 50), 10).astype(str)
        rank = np.tile(np.arange(1, 11), 50)
        sums.add(pa.table({"query_id": query, "doc_id": rank.astype(str), "rank": rank}), "rank")
        held.append(sum(map(len, sums._run.values())))
    assert max(held) <= 1000
    sums.calculate()
    assert (sums.queries, sums.means()) == (5000, {"RR@10": pytest.approx(1.0)})


@pytest.mark.parametrize("column", ["doc_id", "rank", "first_stage_rank"])
@pytest.mark.parametrize("layout", ["flat", "nested"])
def test_a_damaged_page_of_what_is_measured_is_no_measure(column: str, layout: str, tmp_path: Path) -> None:
    """One bit of it, in the values or in what holds them."""
    given = write(tmp_path / "in.parquet", candidate_rows(3, 20))
    run(job(given, tmp_path / "out", output__layout=layout), local=True)
    (tmp_path / "qrels").write_text("q0 0 d3 1\nq1 0 d7 1\n")
    expected = evaluate(str(tmp_path / "out"), str(tmp_path / "qrels"), ["AP"])
    part = tmp_path / "out" / "part-00000.parquet"
    whole = part.read_bytes()
    group = pq.ParquetFile(part).metadata.row_group(0)
    chunks = {group.column(index).path_in_schema: group.column(index) for index in range(group.num_columns)}
    chunk = next(chunk for path, chunk in chunks.items() if path.split(".")[-1] == column)
    end = (chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size
    for at in range(end - 8, end):  # the end of its last page
        part.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(
            StorageError, match=r"part-00000.parquet: cannot be read .* see batch-rerank verify --repair"
        ):
            evaluate(str(tmp_path / "out"), str(tmp_path / "qrels"), ["AP"])
    part.write_bytes(whole)
    assert evaluate(str(tmp_path / "out"), str(tmp_path / "qrels"), ["AP"]) == expected


@pytest.mark.parametrize("layout", ["flat", "nested"])
def test_a_damaged_footer_is_a_storage_error_whatever_arrow_makes_of_it(layout: str, tmp_path: Path) -> None:
    """Names that are no UTF-8, or another column's: no traceback, and no column that is missing without a word."""
    given = write(tmp_path / "in.parquet", candidate_rows(2, 3))
    run(job(given, tmp_path / "out", output__layout=layout), local=True)
    part, columns = tmp_path / "out" / "part-00000.parquet", ["query_id", "doc_id", "rank", "score"]
    whole = part.read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    for name, other in (("rank", b"r\xff\xffk"), ("doc_id", b"doc_ID")):
        part.write_bytes(whole[:footer] + whole[footer:].replace(name.encode(), other))
        with pytest.raises(StorageError, match=r"cannot be read .* see batch-rerank verify --repair"):
            list(read_part(locate(str(part)), columns))


@pytest.mark.parametrize("raised", [OSError(errno.EIO, "no answer"), ConnectionResetError("no answer")])
def test_a_store_that_is_away_in_the_middle_of_a_part_is_no_damage(
    raised: OSError, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = locate(str(output / "part-00000.parquet"))
    data = part.read_bytes()

    class Away(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() < len(data) // 2:  # the footer has come
                raise raised
            return super().read(size)

    monkeypatch.setattr(Location, "open", lambda self: Away(data))
    with pytest.raises(StorageError, match="storage failed: no answer"):
        list(read_part(part, ["rank"]))
    assert not is_damage(raised)


@pytest.mark.parametrize(("top_k", "deeper"), [(None, []), (10, ["AP", "R@100"]), (5, ["nDCG@10", "AP", "R@100"])])
def test_measures_that_look_deeper_than_top_k_are_said(
    top_k: int | None, deeper: list[str], tmp_path: Path, cli: Callable[..., tuple[int, str, str]]
) -> None:
    """The first stage has all its candidates, the reranked run has not: their difference is the cut's too."""
    given = write(tmp_path / "in.parquet", candidate_rows(3, 20))
    run(job(given, tmp_path / "out", output__top_k=top_k), local=True)
    (tmp_path / "qrels").write_text("q0 0 d3 1\nq1 0 d7 1\n")
    asked = ("evaluate", "--run", tmp_path / "out", "--qrels", tmp_path / "qrels", "nDCG@10", "AP", "R@100", "RR@5")
    code, _, error = cli(*asked, "--local")
    assert code == 0 and ("deeper than output.top_k" in error) == bool(deeper)
    assert f"{', '.join(deeper)}: deeper than output.top_k: {top_k}, by which" in error or not deeper
    code, out, _ = cli(*asked, "--local", "--json")
    assert (json.loads(out)["top_k"], json.loads(out)["deeper"]) == (top_k, deeper)


def test_judgements_of_other_queries_are_an_error(output: Path, tmp_path: Path) -> None:
    """A table of zeros with exit 0 looks like a bad model."""
    (tmp_path / "qrels").write_text("other-7 0 d3 1\n")
    with pytest.raises(InputError, match=r"qrels: none of its 1 queries is in .*, e.g. 'other-7'"):
        evaluate(str(output), str(tmp_path / "qrels"))
