"""Three real test collections with their BM25 runs go in as BEIR folders and come out scored by the demo's weights.

Their folder is named by the environment variable DATA: cosqa, xquad-r-zh and medquad-liveqa-gov, each with
corpus.jsonl, queries.jsonl, bm25.top100.run and qrels.tsv.
"""

import os
from pathlib import Path

import pytest
import yaml

from batch_rerank.config import load_config
from batch_rerank.demo import packaged_model
from batch_rerank.job.run import run
from batch_rerank.judge.evaluate import evaluate
from batch_rerank.publish.verify import verify

DATA = Path(os.environ.get("DATA", "/nonexistent"))
pytestmark = [
    pytest.mark.skipif(not DATA.is_dir(), reason="the environment variable DATA names no folder of test collections"),
    pytest.mark.chaos,  # minutes
]


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("cosqa", 0.3734, (0.54, 0.56)),
        ("xquad-r-zh", 0.8600, (0.0, 0.5)),  # an English model reads Chinese
        ("medquad-liveqa-gov", 0.9372, (0.0, 1.0)),
    ],
)
def test_a_real_collection_is_scored(name: str, before: float, after: tuple[float, float], tmp_path: Path) -> None:
    settings = {
        "input": {
            "layout": "beir",
            "path": str(DATA / name),
            "run": str(DATA / name / "bm25.top100.run"),
            "stage": str(tmp_path / "stage"),  # not into the folder of the collections
        },
        "output": {"path": str(tmp_path / "out"), "trec_run": True},
        "model": {"name": packaged_model()},
        "cluster": {"gpus_per_actor": 0, "cpus_per_actor": 2},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(settings))
    run(load_config(tmp_path / "job.yaml"), local=True)
    assert verify(str(tmp_path / "out")).problems == []
    found = evaluate(str(tmp_path / "out"), str(DATA / name / "qrels.tsv"), ["nDCG@10"])
    assert found.before["nDCG@10"] == pytest.approx(before, abs=0.001)
    assert after[0] <= found.after["nDCG@10"] <= after[1]
