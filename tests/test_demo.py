"""The demo: a real collection, real weights, and a driver that is killed in the middle."""

import os
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import rows_of
from test_resume import start, wait_for

import batch_rerank.demo as demo
from batch_rerank.config import load_config
from batch_rerank.demo import build_collection, choose_queries, standard_library
from batch_rerank.distill import distill
from batch_rerank.errors import ConfigError
from batch_rerank.job.run import run
from batch_rerank.publish.verify import verify


def test_the_collection_is_large_enough_and_the_same_every_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    functions = list(standard_library())
    assert functions == list(standard_library())
    monkeypatch.setattr(demo, "standard_library", lambda: functions)
    assert len(functions) >= 3000
    assert len({function.doc_id for function in functions}) == len(functions)
    assert len(choose_queries(functions, 200)) == 200
    assert not any('"""' in function.code.split("\n")[1] for function in functions), "a docstring gives the answer away"
    for name in ("a", "b"):
        build_collection(tmp_path / name, 25)
    assert (tmp_path / "a" / "qrels.tsv").read_text() == (tmp_path / "b" / "qrels.tsv").read_text()
    build_collection(tmp_path / "few", 2)
    assert [pq.read_metadata(path).num_rows for path in (tmp_path / "few" / "nested").iterdir()] == [1, 1]
    nested, flat = (
        [row for path in sorted((tmp_path / "a" / layout).glob("*")) for row in pq.read_table(path).to_pylist()]
        for layout in ("nested", "flat")
    )
    assert (len(nested), len(flat)) == (25, 25 * 50)
    assert [c["doc_id"] for query in nested for c in query["candidates"]] == [row["doc_id"] for row in flat]


def test_too_many_queries_are_refused_with_the_number_there_is() -> None:
    with pytest.raises(ConfigError, match="gives 0 queries"):
        choose_queries([], 1)


@pytest.mark.chaos  # two minutes, half of them for the lease of the killed driver
def test_a_demo_killed_in_the_middle_and_started_again_gives_the_same_rows(tmp_path: Path) -> None:
    arguments = ["demo", "--queries", "20", "--dir", str(tmp_path / "demo")]
    process = start(arguments, tmp_path / "log")
    receipts = tmp_path / "demo" / "code-search-20" / "reranked-minilm-nested" / "_manifest" / "receipts"
    wait_for(lambda: receipts.exists() and list(receipts.glob("*.json")), process, seconds=120)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (receipts.parent.parent / "_SUCCESS").exists()
    again = start(arguments, tmp_path / "log")
    assert again.wait(240) == 0, (tmp_path / "log").read_text()
    assert "resuming" in (tmp_path / "log").read_text()
    config = load_config(tmp_path / "demo" / "nested.yaml", [f"output.path={tmp_path / 'undisturbed'}"])
    run(config, local=True)
    disturbed, undisturbed = (
        rows_of(path).sort_by([("query_id", "ascending"), ("doc_id", "ascending")])
        for path in (receipts.parent.parent, tmp_path / "undisturbed")
    )
    same = ["query_id", "doc_id", "first_stage_rank", "first_stage_score", "n_tokens", "truncated", "error"]
    assert disturbed.select(same) == undisturbed.select(same)
    np.testing.assert_allclose(disturbed["score"].to_numpy(), undisturbed["score"].to_numpy(), atol=1e-5)
    assert verify(str(receipts.parent.parent)).problems == []


@pytest.mark.slow
def test_a_student_learns_from_the_exported_labels(tmp_path: Path) -> None:
    rows = distill(str(tmp_path), queries=120)
    assert [row.name for row in rows] == ["BM25", "student, untrained", "student, trained", "teacher"]
    judged = (tmp_path / "distill-120" / "heldout-qrels.tsv").read_text().splitlines()[1:]
    held_out = pq.read_table(tmp_path / "distill-120" / "held-out" / "0.parquet")
    assert {line.split("\t")[0] for line in judged} == set(held_out["query_id"].to_pylist())
    assert 10 < len(judged) < 40
    assert [row.rate is None for row in rows] == [True, False, False, False]
    assert distill(str(tmp_path), queries=120) == rows, "nothing is done again"
    longer = distill(str(tmp_path), queries=120, epochs=2)
    assert [now.quality == row.quality for now, row in zip(longer, rows, strict=True)] == [True, True, False, True]
