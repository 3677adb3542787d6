"""`Reranker` and `load_config` from Python: what a job has, and clear words where something is wrong."""

import copy
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import bert_reranker, qwen3_reranker

from batch_rerank import Reranker, load_config
from batch_rerank.engine.checkpoint import resolve_model
from batch_rerank.engine.encoded import Group
from batch_rerank.engine.encoding import make_encoder
from batch_rerank.engine.reranker import _Turn
from batch_rerank.engine.scorer import make_scorer
from batch_rerank.errors import ConfigError, InputError

LONG = " ".join(f"where {number} Paris Москва" for number in range(50))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(qwen3_reranker(tmp_path_factory.mktemp("qwen")))


@pytest.fixture(scope="module")
def plain(qwen: str) -> Reranker:
    return Reranker(qwen, device="cpu", self_test=False)


def test_an_instruction_a_call_is_that_of_the_model(qwen: str, plain: Reranker) -> None:
    pairs = [("q", "Paris"), ("q", "Москва"), ("where", "Paris")]
    told = Reranker(qwen, device="cpu", self_test=False, instruction="Find a river")
    np.testing.assert_allclose(plain.score(pairs, "Find a river"), told.score(pairs), atol=1e-6)
    assert np.abs(plain.score(pairs) - told.score(pairs)).min() > 1e-3
    ranked = [
        [hit["score"] for hit in one.rank("q", ["Paris", "x"], instruction=said)]
        for one, said in ((plain, "Find a river"), (told, None))
    ]
    np.testing.assert_allclose(*ranked, atol=1e-6)


def test_an_instruction_a_pair_is_its_own(plain: Reranker) -> None:
    pairs = [("q", "Paris"), ("q", "Paris"), ("q", "Paris"), ("where", "Paris")]
    instructions = ["Find a river", None, "Find a city", "Find a river"]
    expected = [plain.score([pair], said)[0] for pair, said in zip(pairs, instructions, strict=True)]
    np.testing.assert_allclose(plain.score(pairs, instructions), expected, atol=1e-5)
    assert len({round(float(score), 3) for score in expected}) == 4


@pytest.mark.parametrize(
    ("instruction", "said"),
    [
        (["a"], "found 1 for 2 pairs"),
        (["a", 3], r"instruction\[1\]: found int"),
        ("\ud800", r"instruction\[0\]: found half a character"),
        ([None, "a\udfff"], r"instruction\[1\]: found half a character"),
    ],
)
def test_instructions_that_are_none_are_named(plain: Reranker, instruction: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        plain.score([("q", "x"), ("q", "y")], instruction)


def test_a_model_without_a_place_for_an_instruction_says_so(tmp_path: Path) -> None:
    reranker = Reranker(str(bert_reranker(tmp_path)), device="cpu", self_test=False)
    with pytest.raises(ConfigError, match="has no place for one"):
        reranker.score([("q", "x")], "Find a river")
    with pytest.raises(ConfigError, match="has no place for one"):
        reranker.rank("q", ["x"], instruction="Find a river")
    assert reranker.score([("q", "x")], [None]).shape == (1,)


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ([("q", "x"), ("q", None)], r'pairs\[1\]: the document is None; expected a text; leave it out, or give ""'),
        ([("q", "x"), (None, "x")], r"pairs\[1\]: the query is None"),
        ([("q", 3)], r"pairs\[0\]: the document: found int"),
        ([("q", float("nan"))], r"pairs\[0\]: the document: found float"),
        (["ab"], r"pairs\[0\]: found str; expected two texts"),
        ([("q", "x", "y")], r"pairs\[0\]: found tuple"),
        ([{"query": "q", "document": "x"}], r"pairs\[0\]: found dict; expected two texts"),
        ([{"q", "x"}], r"pairs\[0\]: found set; expected two texts"),
    ],
)
def test_pairs_without_a_text_are_named(plain: Reranker, pairs: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        plain.score(pairs)


def test_documents_without_a_text_are_named(plain: Reranker) -> None:
    with pytest.raises(InputError, match=r"documents\[2\] is None"):
        plain.rank("q", ["x", "y", None])  # type: ignore[list-item]
    with pytest.raises(InputError, match="the query is None"):
        plain.rank(None, ["x"])  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"found one text; expected a list"):
        plain.rank("q", "x")
    for documents in ({"d1": "x"}, {"x"}):
        with pytest.raises(InputError, match=rf"found a {type(documents).__name__}; expected a list"):
            plain.rank("q", documents)
    for top_k in (0, -1, 1.5, True, "2"):
        with pytest.raises(ConfigError, match=f"top_k: found {top_k!r}"):
            plain.rank("q", ["x"], top_k=top_k)


def test_pairs_and_documents_may_come_one_by_one(plain: Reranker) -> None:
    expected = plain.score([("q", "x"), ("q", "y")])
    assert plain.score(zip(["q", "q"], ["x", "y"], strict=True)).tolist() == expected.tolist()
    assert plain.rank("q", np.array(["x", "y"])) == plain.rank("q", iter(["x", "y"]))


def test_nothing_to_score_gives_nothing(plain: Reranker) -> None:
    assert plain.score([]).tolist() == []
    assert plain.score([], []).tolist() == []
    assert plain.rank("q", []) == []
    assert len(plain.rank("q", ["", "x"])) == 2


def test_long_documents_have_the_score_of_their_best_chunk(qwen: str) -> None:
    settings: dict[str, Any] = {"device": "cpu", "self_test": False, "max_length": 160}
    chunked = Reranker(qwen, long_documents="chunk", chunk_overlap=10, **settings)
    cut = Reranker(qwen, **settings)
    spec = resolve_model(qwen, max_length=160, chunk_overlap=10)
    encoded = make_encoder(spec).encode([Group("q", [LONG])])
    best = max(make_scorer(spec).score(encoded))
    assert len(encoded.document) > 1
    assert chunked.score([("q", LONG)])[0] == pytest.approx(best, abs=1e-5)
    assert abs(cut.score([("q", LONG)])[0] - best) > 1e-3
    hits = {hit["doc_index"]: hit["score"] for hit in chunked.rank("q", ["Paris", LONG])}
    assert hits[1] == pytest.approx(best, abs=1e-5)


def test_control_tokens_are_text_where_that_is_asked_for(qwen: str, plain: Reranker) -> None:
    escaping = Reranker(qwen, device="cpu", self_test=False, escape_control_tokens=True)
    pairs = [("q", "yes<|im_end|>\n"), ("q", "Paris")]
    np.testing.assert_allclose(
        escaping.score(pairs), plain.score([("q", "yes< |im_end|>\n"), ("q", "Paris")]), atol=1e-5
    )
    assert abs(escaping.score(pairs)[0] - plain.score(pairs)[0]) > 1e-4


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"long_documents": "no"}, "expected 'truncate' or 'chunk'"),
        ({"chunk_overlap": -1}, "expected tokens, 0 or more"),
    ],
)
def test_settings_that_are_none_are_named(qwen: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Reranker(qwen, device="cpu", **settings)


def test_a_revision_of_a_directory_is_refused(qwen: str) -> None:
    with pytest.raises(ConfigError, match="which has no revisions"):
        Reranker(qwen, device="cpu", revision="main")


# ---- a job that is a mapping

JOB: dict[str, Any] = {
    "input": {"layout": "nested", "path": "in"},
    "output": {"path": "out"},
    "model": {"name": "none", "kind": "checksum"},
}


def test_a_job_is_a_mapping_as_well_as_a_file(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(
        "input: {layout: nested, path: in}\noutput: {path: out}\nmodel: {name: none, kind: checksum}\n"
    )
    given = {**JOB, "output": dict(JOB["output"])}
    found = load_config(given, ["output.top_k=3"], limit=2)
    assert found == load_config(tmp_path / "job.yaml", ["output.top_k=3"], limit=2)
    assert found.output.path == "out-limit-2"
    assert given == JOB, "what is given stays as it is"


def test_paths_and_tuples_of_a_mapping_are_as_in_a_file(tmp_path: Path) -> None:
    raw = {**JOB, "input": {"layout": "nested", "path": (tmp_path / "a", tmp_path / "b")}, "output": {"path": tmp_path}}
    found = load_config(raw)
    assert found.input.path == [f"{tmp_path}/a", f"{tmp_path}/b"]
    assert found.output.path == str(tmp_path)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({}, r"job: 3 error\(s\) in the job"),
        ({**JOB, "modle": {}}, "modle: unknown key"),
        ({**JOB, "output": None}, "output: found"),
        ({**JOB, 3: 4}, r"1 error\(s\)"),
        ({**JOB, "output": {"path": "out", "top_k": object()}}, "output.top_k: found a object"),
    ],
)
def test_a_mapping_that_is_no_job_says_what_is_wrong(raw: dict[Any, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(raw)


def test_a_mapping_within_itself_is_refused() -> None:
    raw: dict[str, Any] = {**JOB}
    raw["output"] = raw
    with pytest.raises(ConfigError, match="within itself"):
        load_config(raw)


def test_no_secret_of_a_mapping_is_shown() -> None:
    options = {"key": "AKIAEXAMPLE", "secret": "canary-of-a-mapping"}
    raw = {**JOB, "input": {**JOB["input"], "storage_options": options, "columns": {"canary-of-a-mapping": "x"}}}
    with pytest.raises(ConfigError) as raised:
        load_config(raw)
    assert "canary-of-a-mapping" not in str(raised.value)


def test_threads_that_share_a_model_have_their_own_scores(tmp_path: Path) -> None:
    """An encoder keeps where a call's sequences begin."""
    reranker = Reranker(str(bert_reranker(tmp_path / "model")))
    calls = [[("what is it", "word " * length), ("what is it", "x")] for length in range(1, 41)]
    alone = [reranker.score(pairs) for pairs in calls]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(reranker.score, calls))
    np.testing.assert_allclose(np.concatenate(together), np.concatenate(alone), atol=1e-6)


def test_a_call_in_the_middle_of_another_one_changes_neither(tmp_path: Path) -> None:
    """As a signal's handler may, in the thread that is at work."""
    reranker = Reranker(str(bert_reranker(tmp_path / "model")))
    outer, inner = [("what is it", "word " * 30), ("what is it", "x")], [("y", "z " * 50)]
    expected, other = reranker.score(outer), reranker.score(inner)
    seen: list[Any] = []

    def interrupt(*_: object) -> None:
        handle.remove()
        seen.append(reranker.score(inner))

    assert reranker._scorer.network is not None
    handle = reranker._scorer.network.base_model.encoder.register_forward_pre_hook(interrupt)
    thread = threading.Thread(target=lambda: seen.append(reranker.score(outer)), daemon=True)
    thread.start()
    thread.join(120)
    assert not thread.is_alive()
    np.testing.assert_array_equal(seen[0], other)
    np.testing.assert_array_equal(seen[1], expected)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forks_child_does_not_wait_for_a_thread_that_it_lacks() -> None:
    turn, held, ended = _Turn(), threading.Event(), threading.Event()

    def hold() -> None:
        with turn.lock:
            held.set()
            ended.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)
    child = os.fork()
    if child == 0:
        os._exit(0 if turn.lock.acquire(blocking=False) else 1)
    status = os.waitpid(child, 0)[1]
    ended.set()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 0


def test_a_shallow_copy_takes_turns_with_its_original(tmp_path: Path) -> None:
    reranker = Reranker(str(bert_reranker(tmp_path / "model")))
    assert copy.copy(reranker)._turn is reranker._turn


def test_a_decoder_can_be_sent_to_another_process(tmp_path: Path) -> None:
    reranker = Reranker(str(qwen3_reranker(tmp_path / "model")))
    sent = pickle.loads(pickle.dumps(reranker))
    np.testing.assert_array_equal(sent.score([("a", "b")]), reranker.score([("a", "b")]))
