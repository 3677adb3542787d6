"""Long documents in chunks: every token is in one, a document has the score of its best, and the output says which."""

import itertools
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from checkpoints import bert_embedding, qwen3_reranker, xlmr_reranker
from conftest import write

from batch_rerank import Reranker
from batch_rerank.config import parse_config
from batch_rerank.engine.checkpoint import resolve_model
from batch_rerank.engine.encoded import Group
from batch_rerank.engine.encoding import make_encoder
from batch_rerank.engine.packing import best_chunks
from batch_rerank.engine.scorer import make_scorer
from batch_rerank.errors import ConfigError
from batch_rerank.job.run import run
from batch_rerank.publish.verify import verify

LONG = " ".join(f"where {number} Paris Москва" for number in range(50))
BUILDERS = {"qwen": qwen3_reranker, "xlmr": xlmr_reranker, "minilm": bert_embedding}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: build(tmp_path_factory.mktemp(name)) for name, build in BUILDERS.items()}


@pytest.mark.parametrize("name", [*BUILDERS, "checksum"])
def test_chunks_cover_a_document_and_share_the_overlap(directories: dict[str, Path], name: str) -> None:
    settings = {"kind": "checksum"} if name == "checksum" else {}
    model = str(directories.get(name, "none"))
    spec = resolve_model(model, max_length=160, chunk_overlap=10, **settings)
    groups = [Group("q", ["short", LONG]), Group("none", []), Group("another query", [LONG, "", LONG])]
    encoded = make_encoder(spec).encode(groups)
    whole = make_encoder(resolve_model(model, **settings)).encode([Group("q", [LONG])])
    assert encoded.chunks is not None
    assert set(encoded.chunks.owner.tolist()) == set(range(5))
    assert not encoded.truncated.any()
    assert encoded.n_tokens.max() <= 160 * (2 if name == "minilm" else 1)
    group = encoded.group_of_pair()
    assert [int(group[encoded.chunks.owner == owner][0]) for owner in range(5)] == [0, 0, 2, 2, 2]
    around = 2 if name == "minilm" else 0  # [CLS] and [SEP]
    expected = whole.segment(whole.document[0])[around // 2 : len(whole.segment(whole.document[0])) - around // 2]
    for owner in (1, 2):
        chunks = np.flatnonzero(encoded.chunks.owner == owner)
        assert len(chunks) > 1
        ids = [encoded.segment(encoded.document[i])[: encoded.kept[i]] for i in chunks]
        ids = [part[around // 2 : len(part) - around // 2] for part in ids]
        for (a, b), start in zip(itertools.pairwise(ids), encoded.chunks.offset[chunks][1:], strict=True):
            assert a[-10:].tolist() == b[:10].tolist()
            assert start % (len(ids[0]) - 10) == 0
        joined = np.concatenate([ids[0], *(part[10:] for part in ids[1:])])
        assert joined.tolist() == expected.tolist()


@pytest.mark.parametrize("name", BUILDERS)
def test_a_document_has_the_score_of_its_best_chunk(directories: dict[str, Path], name: str) -> None:
    spec = resolve_model(str(directories[name]), max_length=160, chunk_overlap=10)
    encoded = make_encoder(spec).encode([Group("where is Paris?", [LONG, "short"])])
    scores = make_scorer(spec).score(encoded)
    best = best_chunks(encoded, scores)
    assert encoded.chunks is not None
    of_long = scores[encoded.chunks.owner == 0]
    assert len(of_long) > 1
    assert best.scores.tolist() == [of_long.max(), scores[-1]]
    assert best.offset is not None
    assert best.offset.tolist() == [int(encoded.chunks.offset[of_long.argmax()]), 0]
    assert best.n_tokens[0] == encoded.n_tokens[:-1].sum()
    assert best.truncated.tolist() == [False, False]


def test_short_documents_score_as_without_chunks(directories: dict[str, Path]) -> None:
    documents = ["Paris", "", "Москва"]
    plain = Reranker(str(directories["qwen"]), device="cpu").score([("q", document) for document in documents])
    spec = resolve_model(str(directories["qwen"]), chunk_overlap=80)
    encoded = make_encoder(spec).encode([Group("q", documents)])
    np.testing.assert_allclose(best_chunks(encoded, make_scorer(spec).score(encoded)).scores, plain, atol=1e-5)


def test_where_only_the_overlap_fits_the_document_is_cut(directories: dict[str, Path]) -> None:
    spec = resolve_model(str(directories["xlmr"]), max_length=64, chunk_overlap=60)
    encoded = make_encoder(spec).encode([Group("q", [LONG])])
    assert encoded.truncated.tolist() == [True]


def test_a_template_that_cannot_be_split_refuses_chunks(directories: dict[str, Path]) -> None:
    glued = {"middle": "Query {query} the{document} yes?", "true_token": "yes"}
    spec = resolve_model(str(directories["qwen"]), template=glued, chunk_overlap=80)
    with pytest.raises(ConfigError, match=r"scoring.long_documents: found 'chunk'"):
        make_encoder(spec)


def test_a_job_writes_the_first_token_of_the_best_chunk(tmp_path: Path) -> None:
    rows = [
        {"query_id": "a", "query": "q", "candidates": [{"doc_id": "1", "text": LONG}, {"doc_id": "2", "text": None}]},
        {"query_id": "b", "query": "q", "candidates": [{"doc_id": "3", "text": "x"}]},
    ]
    write(tmp_path / "in" / "0.parquet", rows)
    job = {
        "input": {"layout": "nested", "path": f"{tmp_path}/in"},
        "output": {"path": f"{tmp_path}/out"},
        "model": {"name": "none", "kind": "checksum", "max_length": 200},
        "scoring": {"long_documents": "chunk", "chunk_overlap": 20, "max_failed_rows": 1},
        "cluster": {"gpus_per_actor": 0},
    }
    run(parse_config(job, "job"), local=True)
    (part,) = (tmp_path / "out").glob("part-*.parquet")
    table = pq.read_table(part)
    offsets = dict(zip(table["doc_id"].to_pylist(), table["chunk_offset"].to_pylist(), strict=True))
    assert offsets["2"] is None
    assert offsets["3"] == 0
    assert offsets["1"] is not None
    assert dict(zip(table["doc_id"].to_pylist(), table["n_tokens"].to_pylist(), strict=True))["1"] > len(LONG)
    assert not verify(f"{tmp_path}/out").problems
    with_other = parse_config({**job, "scoring": {"long_documents": "truncate", "max_failed_rows": 1}}, "job")
    with pytest.raises(Exception, match=r"scoring.chunk_overlap"):
        run(with_other, local=True)
