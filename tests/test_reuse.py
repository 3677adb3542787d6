"""Reuse: a pair that was scored before is not scored again, and no score is ever that of another pair or recipe."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from checkpoints import qwen3_reranker
from conftest import Killed, Row, candidate_rows, job, nested, rows_of, scored_only, write

import batch_rerank.score.bundles as bundles
from batch_rerank.config import JobConfig
from batch_rerank.errors import ConflictError, ModelError
from batch_rerank.job.run import Summary, run
from batch_rerank.publish.clean import clean
from batch_rerank.publish.output import Place
from batch_rerank.publish.verify import verify
from batch_rerank.score.earlier import MOST_OUTPUTS
from batch_rerank.score.reuse import Index, asked_groups
from batch_rerank.store.filesystem import Location
from batch_rerank.store.kept import PAIR, index_of, to_bytes
from batch_rerank.store.manifest import sha256
from batch_rerank.store.receipts import Totals

Cli = Callable[..., tuple[int, str, str]]
NO_AUDIT = {"reuse__audit": 0.0}


def corpus(queries: int = 12, candidates: int = 10, first: int = 0) -> list[Row]:
    """Texts that BEIR's joining with a title leaves as they are."""
    return [{**row, "text": row["text"].strip()} for row in candidate_rows(queries, candidates, first)]


def shards(folder: Path, rows: list[Row], each: int = 40) -> Path:
    for number, start in enumerate(range(0, len(rows), each)):
        write(folder / f"{number:03d}.parquet", rows[start : start + each])
    return folder


def night(given: Path, output: Path, earlier: Path | str | list[str], **keys: Any) -> Summary:
    told = earlier if isinstance(earlier, list) else str(earlier)
    return run(job(given, output, reuse__from=told, **keys), local=True)


def by_pair(output: Path) -> dict[tuple[str, str], float]:
    columns = (rows_of(output)[name].to_pylist() for name in ("query_id", "doc_id", "score"))
    return {(query, doc): score for query, doc, score in zip(*columns, strict=True)}


def as_if_alone(output: Path, given: Path, scratch: Path, **keys: Any) -> None:
    """An output is what a job that reuses nothing makes."""
    shutil.rmtree(scratch, ignore_errors=True)
    run(job(given, scratch, **keys), local=True)
    assert rows_of(output).replace_schema_metadata() == rows_of(scratch).replace_schema_metadata()


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """The first night: 120 pairs of 12 queries."""
    run(job(shards(tmp_path / "in", corpus()), tmp_path / "first"), local=True)
    return tmp_path / "first"


# ---- what is the same is found wherever it stands


def renamed(rows: list[Row]) -> list[Row]:
    return [{**row, "query_id": f"x{row['query_id']}", "doc_id": f"y{row['doc_id']}"} for row in rows]


def turned(rows: list[Row]) -> list[Row]:
    queries = nested(rows)
    random.Random(0).shuffle(queries)
    return [
        {**candidate, "query_id": query["query_id"], "query": query["query"]}
        for query in queries
        for candidate in query["candidates"][::-1]
    ]


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        (renamed, {}),
        (turned, {}),
        (turned, {"input__unit_pairs": 7}),
        (list, {"output__top_k": 3, "output__layout": "nested"}),
        (list, {"scoring__token_budget": 64, "cluster__actors": 1}),
        (list, {"output__passthrough": ["lang"], "output__include_text": True, "output__trec_run": True}),
    ],
)
def test_ids_order_shards_and_the_output_do_not_matter(
    change: Callable[[list[Row]], list[Row]], keys: dict[str, Any], first: Path, tmp_path: Path
) -> None:
    given = shards(tmp_path / "again", change(corpus()), each=50)
    summary = night(given, tmp_path / "second", first, **keys)
    assert (summary.totals.reused, summary.totals.new_queries, summary.totals.new_documents) == (120, 0, 0)
    as_if_alone(tmp_path / "second", given, tmp_path / "own", **keys)
    assert verify(str(tmp_path / "second")).problems == []


@pytest.mark.parametrize("layout", ["nested", "run", "beir"])
def test_another_layout_of_the_same_texts_is_found(layout: str, first: Path, tmp_path: Path) -> None:
    rows, folder = corpus(), tmp_path / "other"
    folder.mkdir()
    if layout == "nested":
        write(folder / "0.parquet", nested(rows))
        keys: dict[str, Any] = {"input__layout": "nested"}
    else:
        lines = [f"{row['query_id']} Q0 {row['doc_id']}-{row['query_id']} 1 {row['score']} x" for row in rows]
        (folder / "run.trec").write_text("\n".join(lines) + "\n")
        queries = {row["query_id"]: {"_id": row["query_id"], "text": row["query"]} for row in rows}
        documents = [{"_id": f"{row['doc_id']}-{row['query_id']}", "text": row["text"], "title": ""} for row in rows]
        for name, values in (("queries", queries.values()), ("corpus", documents)):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
        keys = {"input__layout": layout, "input__run": str(folder / "run.trec")}
        if layout == "run":
            keys |= {f"input__{name}": str(folder / f"{name}.jsonl") for name in ("queries", "corpus")}
            keys["input__path"] = None
    summary = night(folder, tmp_path / "second", first, **keys)
    assert summary.totals.reused == 120
    ours = sorted(score for score in by_pair(tmp_path / "second").values())
    assert ours == sorted(by_pair(first).values())


def test_a_night_hands_on_all_its_scores_and_the_one_before_can_go(first: Path, tmp_path: Path) -> None:
    rows = corpus(14)
    night(shards(tmp_path / "in2", rows), tmp_path / "second", first, **NO_AUDIT)
    shutil.rmtree(first)
    summary = night(shards(tmp_path / "in3", renamed(rows)), tmp_path / "third", tmp_path / "second")
    assert (summary.totals.reused, summary.reuse) == (
        140,
        {"outputs": [str(tmp_path / "second")], "passed_over": {}},
    )


def test_several_outputs_serve_and_what_one_lacks_another_has(tmp_path: Path) -> None:
    for name, start in (("2026-01", 0), ("2026-02", 6)):
        run(job(shards(tmp_path / f"in-{name}", corpus(6, first=start)), tmp_path / f"out/{name}"), local=True)
    given = shards(tmp_path / "both", corpus())
    assert night(given, tmp_path / "a", str(tmp_path / "out/2026-*")).totals.reused == 120
    listed = [str(tmp_path / "out/2026-02"), str(tmp_path / "out/2026-01")]
    summary = night(given, tmp_path / "b", listed)
    assert summary.totals.reused == 120
    as_if_alone(tmp_path / "b", given, tmp_path / "own")
    receipts = [json.loads(path.read_text()) for path in (tmp_path / "b/_manifest/receipts").glob("*.json")]
    assert {name for receipt in receipts for name in receipt["reused_from"]} == set(listed)


# ---- what is not the same is scored


@pytest.mark.parametrize("column", ["text", "query", "title", "instruction"])
def test_one_byte_of_a_text_is_another_pair(column: str, tmp_path: Path) -> None:
    rows = [{**row, "title": "t", "instruction": "i"} for row in corpus()]
    keys: dict[str, Any] = {"model__name": "none", "model__kind": "checksum"}
    run(job(shards(tmp_path / "in", rows), tmp_path / "first", **keys), local=True)
    rows[55][column] += "."
    if column in ("query", "instruction"):
        rows = [{**row, column: rows[55][column]} if row["query_id"] == "q5" else row for row in rows]
    given = shards(tmp_path / "in2", rows)
    totals = night(given, tmp_path / "second", tmp_path / "first").totals
    if column in ("text", "title"):
        assert (totals.reused, totals.new_queries, totals.new_documents) == (119, 0, 1)
    elif column == "query":
        assert (totals.reused, totals.new_queries, totals.new_documents) == (110, 10, 0)
    as_if_alone(tmp_path / "second", given, tmp_path / "own", **keys)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen3_reranker(tmp_path_factory.mktemp("model"))


def of_model(model: Path, **keys: Any) -> dict[str, Any]:
    return {"model__name": str(model), "model__kind": "auto", "model__max_length": 256, **keys}


def another_weight(model: Path) -> None:
    (file,) = model.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(bytes(data))


def another_tokenizer(model: Path) -> None:
    told = json.loads((model / "tokenizer.json").read_text())
    told["model"]["merges"].pop()
    (model / "tokenizer.json").write_text(json.dumps(told))


MINE = {"middle": "{query}\n{document}", "true_token": "yes", "false_token": "no"}
RECIPES: dict[str, tuple[dict[str, Any], Callable[[Path], None] | None, str]] = {
    "weight": ({}, another_weight, "model.identity"),
    "tokenizer": ({}, another_tokenizer, "model.identity"),
    "template": ({"model__template": {**MINE, "suffix": " "}}, None, "model.template"),
    "instruction": ({"model__instruction": "Find code."}, None, "model.instruction"),
    "max_length": ({"model__max_length": 255}, None, "model.max_length"),
    "dtype": ({"model__dtype": "bfloat16"}, None, "model.dtype"),
    "chunking": ({"scoring__long_documents": "chunk"}, None, "scoring.chunk_overlap"),
    "escape": ({"scoring__escape_control_tokens": True}, None, "scoring.escape_control_tokens"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_another_recipe_gives_no_score(name: str, model: Path, tmp_path: Path) -> None:
    changes, change, told = RECIPES[name]
    ours = shutil.copytree(model, tmp_path / "model")
    given = shards(tmp_path / "in", corpus(3, 5))
    run(job(given, tmp_path / "first", **of_model(ours)), local=True)
    if change:
        change(ours)
    keys = of_model(ours) | changes
    summary = night(given, tmp_path / "second", tmp_path / "first", **keys)
    assert summary.totals.reused == 0 and summary.reuse is not None and summary.reuse["outputs"] == []
    assert told in summary.reuse["passed_over"][str(tmp_path / "first")]
    as_if_alone(tmp_path / "second", given, tmp_path / "own", **keys)


def test_chunks_and_cut_texts_are_reused_with_all_that_is_said_of_them(model: Path, tmp_path: Path) -> None:
    rows = corpus(3, 6)
    for row in rows[::2]:
        row["text"] = " ".join(f"{row['text']} {number}" for number in range(40))
    given = shards(tmp_path / "in", rows)
    of = {
        chunked: of_model(
            model,
            model__max_length=160,
            scoring__long_documents="chunk" if chunked else "truncate",
            scoring__chunk_overlap=8,
        )
        for chunked in (True, False)
    }
    for chunked, keys in of.items():
        run(job(given, tmp_path / f"first-{chunked}", **keys), local=True)
    for chunked, keys in of.items():
        summary = night(
            shards(tmp_path / "in2", turned(rows)),
            tmp_path / f"second-{chunked}",
            [str(tmp_path / "first-True"), str(tmp_path / "first-False")],
            **keys,
        )
        assert summary.totals.reused == 18
        pairs = [("query_id", "ascending"), ("doc_id", "ascending")]
        one, other = (rows_of(tmp_path / f"{name}-{chunked}").sort_by(pairs) for name in ("first", "second"))
        told = ["score", "n_tokens", "truncated", *(["chunk_offset"] if chunked else [])]
        assert one.select(told).replace_schema_metadata() == other.select(told).replace_schema_metadata()
        assert any(one["chunk_offset" if chunked else "truncated"].to_pylist())
        shutil.rmtree(tmp_path / "in2")


# ---- nights in a row


def nights(seed: int) -> Iterator[list[Row]]:
    """Ten nights: documents change, come and go, queries too, and all of them move."""
    chance = random.Random(seed)
    queries = nested(corpus(20, 8))
    for number in range(10):
        for query in chance.sample(queries, 4):
            candidates = query["candidates"]
            candidates[chance.randrange(len(candidates))]["text"] += f" v{number}"
            if chance.random() < 0.5 and len(candidates) > 2:
                candidates.pop(chance.randrange(len(candidates)))
            candidates.append({**candidates[0], "doc_id": f"n{number}", "text": f"new {number} {chance.random()}"})
        if number % 3 == 2:
            queries.pop(chance.randrange(len(queries)))
            queries += nested(corpus(1, 5, first=100 + number))
        chance.shuffle(queries)
        yield [
            {**candidate, "query_id": query["query_id"], "query": query["query"]}
            for query in queries
            for candidate in query["candidates"]
        ]


def killed_at(where: str, time: int) -> Callable[[Location, bytes], bool]:
    create, seen = Location.create_exclusive, []

    def killed(self: Location, data: bytes) -> bool:
        seen.append(where in self.path)
        if seen[-1] and sum(seen) == time:
            raise Killed
        return create(self, data)

    return killed


def ten_nights(tmp_path: Path, same: Callable[[Path, Path], None], monkeypatch: pytest.MonkeyPatch, **keys: Any) -> int:
    reused = 0
    keys = {"output__latest": str(tmp_path / "LATEST.json"), "output__top_k": 6, **keys}
    for number, rows in enumerate(nights(7)):
        given = shards(tmp_path / f"in{number}", rows, each=30 + number)
        config = job(given, tmp_path / f"out{number}", reuse__from="latest", **keys)
        if number == 5:  # killed between the receipts of two units
            with monkeypatch.context() as patch, pytest.raises(Killed):
                patch.setattr(Location, "create_exclusive", killed_at("/receipts/", 3))
                run(config, local=True)
        totals = run(config, local=True).totals
        assert totals.rows_in == len(rows)
        reused += totals.reused
        run(
            job(
                given,
                tmp_path / f"full{number}",
                output__top_k=6,
                **{k: v for k, v in keys.items() if k.startswith(("model", "scoring"))},
            ),
            local=True,
        )
        same(tmp_path / f"out{number}", tmp_path / f"full{number}")
        if number:
            clean(Place(str(tmp_path / f"out{number - 1}")), "all")  # the night before can go
    return reused


def test_ten_nights_are_ten_full_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def same(one: Path, other: Path) -> None:
        assert rows_of(one).replace_schema_metadata() == rows_of(other).replace_schema_metadata()
        assert verify(str(one)).problems == []

    assert ten_nights(tmp_path, same, monkeypatch) > 1000


@pytest.mark.slow
def test_ten_nights_of_a_float32_model_are_within_rounding(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def same(one: Path, other: Path) -> None:
        ours, theirs = by_pair(one), by_pair(other)
        assert len(ours.keys() & theirs.keys()) >= 0.98 * len(theirs)  # top_k cuts between equals
        for pair in ours.keys() & theirs.keys():
            assert ours[pair] == pytest.approx(theirs[pair], abs=1e-4)

    assert ten_nights(tmp_path, same, monkeypatch, **of_model(model)) > 1000


# ---- what an earlier output has lost


def break_one(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-30] ^= 0x40
    file.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("name", "change", "unreadable"),
    [
        ("_scores/00000.pairs.npy", break_one, 10),
        ("_scores/00000.pairs.npy", lambda file: file.write_bytes(file.read_bytes()[:-25]), None),
        ("_scores/00000.pairs.npy", lambda file: file.unlink(), None),
        ("_scores/00000.queries.npy", break_one, None),
        ("_scores/00000.queries.npy", lambda file: file.unlink(), None),
        ("_manifest/scores/00000.json", lambda file: file.write_text("{}"), None),
    ],
)
def test_what_is_damaged_or_gone_is_scored(
    name: str, change: Callable[[Path], object], unreadable: int | None, first: Path, tmp_path: Path
) -> None:
    change(first / name)
    given = shards(tmp_path / "again", turned(corpus()))
    totals = night(given, tmp_path / "second", first).totals
    if unreadable is None:
        assert totals.reused == 0
    else:
        assert (totals.reused, totals.unreadable) == (120 - unreadable, unreadable)
    as_if_alone(tmp_path / "second", given, tmp_path / "own")


def test_scores_that_go_while_they_are_read_are_scored(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, seen = Location.read_range, []

    def then_gone(self: Location, start: int, stop: int) -> bytes:
        seen.append("/_scores/" in self.path)
        if sum(seen) == 2 and seen[-1]:
            shutil.rmtree(first)
        return read(self, start, stop)

    def none(*_: object, **__: object) -> None:
        raise RuntimeError("an estimate would read them before")

    given = shards(tmp_path / "again", turned(corpus()))
    with monkeypatch.context() as patch:
        patch.setattr("batch_rerank.job.run.estimate", none)
        patch.setattr(Location, "read_range", then_gone)
        totals = night(given, tmp_path / "second", first).totals
    assert 0 < totals.reused < 120 and totals.unreadable == 120 - totals.reused
    as_if_alone(tmp_path / "second", given, tmp_path / "own")


def test_rows_without_a_score_are_not_kept(tmp_path: Path) -> None:
    rows = corpus()
    rows[3]["text"] = None
    rows = [{**row, "query": None} if row["query_id"] == "q4" else row for row in rows]
    given = shards(tmp_path / "in", rows)
    keys = {"scoring__max_failed_rows": 1}
    run(job(given, tmp_path / "first", **keys), local=True)
    totals = night(given, tmp_path / "second", tmp_path / "first", **keys).totals
    assert (totals.reused, totals.failed, totals.new_documents, totals.new_queries) == (109, 11, 0, 0)
    as_if_alone(tmp_path / "second", given, tmp_path / "own", **keys)


# ---- trust


def plant(output: Path, add: float) -> None:
    """Other scores, with all their checksums."""
    file = output / "_scores/00000.pairs.npy"
    pairs, index = np.load(file), np.load(output / "_scores/00000.queries.npy")
    pairs["score"] += np.float32(add)
    hashes = np.zeros(len(pairs), np.uint64)
    for query, start, count, _ in index.tolist():
        hashes[start : start + count] = query
    made = {"pairs": to_bytes(pairs), "queries": to_bytes(index_of(hashes, pairs))}
    receipt = json.loads((output / "_manifest/scores/00000.json").read_text())
    for name, data in made.items():
        (output / f"_scores/00000.{name}.npy").write_bytes(data)
        receipt[f"{name}_sha256"] = sha256(data)
    (output / "_manifest/scores/00000.json").write_text(json.dumps(receipt))


def test_the_audit_sees_scores_that_are_not_the_models(model: Path, tmp_path: Path) -> None:
    rows = corpus(6, 10)
    keys = of_model(model)
    run(job(shards(tmp_path / "in", rows), tmp_path / "first", **keys), local=True)
    rows[7]["text"] += " changed"
    given = shards(tmp_path / "in2", rows)
    totals = night(given, tmp_path / "good", tmp_path / "first", **keys).totals
    assert totals.audited == 39 and totals.audit_difference < 1e-4  # all of the one unit that had something new
    plant(tmp_path / "first", 0.01)
    with pytest.raises(ModelError, match=r"39 of its reused scores were .* differ by 1\.00e-02 at most"):
        night(given, tmp_path / "bad", tmp_path / "first", **keys)
    assert not (tmp_path / "bad/_SUCCESS").exists()
    assert not list((tmp_path / "bad/_work").glob("00000-00000*"))
    trusted = night(given, tmp_path / "trusted", tmp_path / "first", **keys, **NO_AUDIT).totals
    assert (trusted.audited, trusted.reused) == (0, 59)


def test_the_audited_are_few_and_the_same_each_time(first: Path, tmp_path: Path) -> None:
    rows = [{**row, "text": f"{row['text']} {number}"} for number, row in enumerate(candidate_rows(300, 20))]
    run(job(shards(tmp_path / "big", rows, 2000), tmp_path / "base", input__unit_pairs=2000), local=True)
    for row in rows[::1000]:
        row["text"] += "!"
    given = shards(tmp_path / "big2", rows, 2000)
    totals = [
        night(given, tmp_path / name, tmp_path / "base", input__unit_pairs=2000, reuse__audit=0.05).totals
        for name in ("a", "b")
    ]
    assert totals[0].audited == totals[1].audited and 250 <= totals[0].audited <= 350
    assert totals[0].new_documents == 6


# ---- actors get only what is left


def test_a_night_without_a_change_loads_no_model(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = shards(tmp_path / "in", corpus(4, 5))
    run(job(given, tmp_path / "first", **of_model(model)), local=True)
    monkeypatch.setattr("batch_rerank.job.run_local.LoadedScorer", None)
    assert (
        night(
            shards(tmp_path / "in2", renamed(corpus(4, 5))), tmp_path / "b", tmp_path / "first", **of_model(model)
        ).totals.reused
        == 20
    )


def test_what_is_left_of_many_units_is_scored_together(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = corpus()
    for row in rows[::20]:
        row["text"] += "!"
    sizes: list[int] = []
    encode = bundles._encode

    def counted(pending: Any, encoder: Any) -> Any:
        made = encode(pending, encoder)
        sizes.append(len(made.encoded.document))
        return made

    monkeypatch.setattr(bundles, "_encode", counted)
    given = shards(tmp_path / "in2", rows)
    totals = night(given, tmp_path / "second", first, **NO_AUDIT, input__unit_pairs=10).totals
    assert sizes == [6] and totals.new_documents == 6  # one of every second unit
    as_if_alone(tmp_path / "second", given, tmp_path / "own")


def test_queries_with_none_of_their_documents_left_are_not_encoded() -> None:
    from batch_rerank.engine.encoded import Group

    groups = [Group("a", ["1", "2"]), Group("b", ["3"]), Group("c", []), Group("d", ["4", "5"], "i")]
    asked = np.array([True, False, False, False, True])
    assert asked_groups(groups, asked) == [Group("a", ["1"]), Group("d", ["5"], "i")]
    assert asked_groups([], np.empty(0, bool)) == []


def test_an_index_of_none_finds_none() -> None:
    empty = np.empty(0, np.uint32)
    index = Index([], np.empty(0, np.uint64), np.empty(0, np.uint16), empty, empty, empty)
    assert index.of(np.array([1, 2], np.uint64)).tolist() == []
    assert len(index_of(np.empty(0, np.uint64), np.empty(0, PAIR))) == 0


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("with_model", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["free", "model"])
def test_a_night_on_ray_is_the_same(with_model: bool, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    rows = corpus(20, 10)
    keys: dict[str, Any] = {"input__unit_pairs": 20}
    if with_model:
        keys |= of_model(request.getfixturevalue("model"))
    run(job(shards(tmp_path / "in", rows), tmp_path / "first", **keys), local=True)
    for row in rows[::37]:
        row["text"] += " changed"
    given = shards(tmp_path / "in2", rows)
    config = job(given, tmp_path / "ray", reuse__from=str(tmp_path / "first"), **keys, **NO_AUDIT)
    summary = run(config)
    assert (summary.totals.reused, summary.totals.new_documents) == (194, 6)
    night(given, tmp_path / "local", tmp_path / "first", **keys, **NO_AUDIT)
    ours, theirs = by_pair(tmp_path / "ray"), by_pair(tmp_path / "local")
    assert ours.keys() == theirs.keys() and all(ours[key] == pytest.approx(theirs[key], abs=1e-4) for key in ours)
    receipts = [json.loads(path.read_text()) for path in (tmp_path / "ray/_manifest/receipts").glob("*.json")]
    assert sum(receipt["scorer"] == "" for receipt in receipts) == 4  # whole units that were known
    again = run(
        job(shards(tmp_path / "in3", renamed(rows)), tmp_path / "none", reuse__from=str(tmp_path / "ray"), **keys)
    )
    assert again.totals.reused == 200
    receipts = [json.loads(path.read_text()) for path in (tmp_path / "none/_manifest/receipts").glob("*.json")]
    assert {receipt["scorer"] for receipt in receipts} == {""}


# ---- the command line, and what users get wrong


def job_file(path: Path, config: JobConfig, **reuse: Any) -> Path:
    raw = config.model_dump(exclude={"limit"}) | ({"reuse": reuse} if reuse else {})
    path.write_text(yaml.safe_dump(raw))
    return path


def test_the_command_line_says_what_was_reused(first: Path, tmp_path: Path, cli: Cli) -> None:
    rows = corpus()
    rows[0]["text"] += "!"
    given = shards(tmp_path / "in2", rows)
    file = job_file(tmp_path / "job.yaml", job(given, tmp_path / "second"), **{"from": str(first), "audit": 0})
    code, out, error = cli("plan", file, "--json")
    assert code == 0 and "reused      119 pairs" in error
    assert json.loads(out)["estimate"]["reused"] == 119
    assert not (tmp_path / "second").exists()
    code, out, error = cli("run", file, "--local", "--json")
    told = json.loads(out)
    assert code == 0 and (told["reused"], told["scored"]) == (119, 1)
    assert told["reuse"] == {"outputs": [str(first)], "passed_over": {}}
    assert "119 pairs reused; 1 scored: 1 with new or changed documents" in error


def test_what_cannot_serve_is_named(first: Path, tmp_path: Path, cli: Cli) -> None:
    given = shards(tmp_path / "in2", corpus())
    unfinished = scored_only(job(given, tmp_path / "unfinished"))
    run(job(given, tmp_path / "bare", output__keep_scores=False), local=True)
    old = shutil.copytree(first, tmp_path / "old")
    rewrite_plan(old, manifest_version=1)
    newer = shutil.copytree(first, tmp_path / "newer")
    rewrite_plan(newer, manifest_version=9)
    listed = [str(place) for place in (unfinished, tmp_path / "bare", old, newer, first)]
    summary = night(given, tmp_path / "second", listed)
    assert summary.totals.reused == 120 and summary.reuse is not None
    assert summary.reuse["outputs"] == [str(first)]
    reasons = [summary.reuse["passed_over"][place] for place in listed[:4]]
    for reason, said in zip(reasons, ("not finished", "keeps no scores", "0.1.0", "another version"), strict=True):
        assert said in reason or "use that version" in reason


def rewrite_plan(output: Path, **fields: Any) -> None:
    file = output / "_manifest/plan.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("nowhere", "no _manifest/plan.json there"),
        ("out", "is this job's own output.path"),
        ("latest", "the job has no output.latest"),
    ],
)
def test_a_place_that_is_a_mistake_ends_the_job_before_it_begins(
    place: str, said: str, first: Path, tmp_path: Path, cli: Cli
) -> None:
    given = shards(tmp_path / "in2", corpus())
    if place == "out":
        shutil.copytree(first, tmp_path / "out")
        given = tmp_path / "in"
        (tmp_path / "out/_SUCCESS").unlink()
    told = "latest" if place == "latest" else str(tmp_path / place)
    file = job_file(tmp_path / "job.yaml", job(given, tmp_path / "out"), **{"from": told})
    for verb in (("plan", file), ("run", file, "--local")):
        code, _, error = cli(*verb)
        assert code == 2 and said in error
    assert place == "out" or not (tmp_path / "out").exists()


def test_the_first_night_has_nothing_to_reuse(tmp_path: Path) -> None:
    given = shards(tmp_path / "in", corpus())
    keys = {"output__latest": str(tmp_path / "LATEST.json")}
    assert night(given, tmp_path / "a", "latest", **keys).totals.reused == 0
    assert night(given, tmp_path / "b", str(tmp_path / "x*")).totals.reused == 0
    assert night(given, tmp_path / "c", "latest", **keys).totals.reused == 120
    (tmp_path / "LATEST.json").write_text("[]")
    with pytest.raises(ConflictError, match="not what output"):
        night(given, tmp_path / "d", "latest", **keys)


def test_the_newest_of_many_outputs_serve(first: Path, tmp_path: Path) -> None:
    for number in range(MOST_OUTPUTS + 2):
        copy = shutil.copytree(first, tmp_path / f"many/{number:02d}")
        status = copy / "_manifest/status.json"
        told = json.loads(status.read_text()) | {"updated_at": f"2026-01-{20 - number:02d}T00:00:00Z"}
        status.write_text(json.dumps(told))
    summary = night(shards(tmp_path / "again", corpus()), tmp_path / "many/99", str(tmp_path / "many/*"))
    assert summary.reuse is not None
    assert summary.reuse["outputs"] == [str(tmp_path / f"many/{number:02d}") for number in range(MOST_OUTPUTS)]
    assert set(summary.reuse["passed_over"]) == {str(tmp_path / f"many/{number:02d}") for number in (8, 9)}
    assert summary.totals.reused == 120


def test_what_is_reused_is_counted_of_a_resumed_run_too(first: Path, tmp_path: Path) -> None:
    given = shards(tmp_path / "again", turned(corpus()))
    work = scored_only(job(given, tmp_path / "second", reuse__from=str(first)))
    (work / "_work/00001-00000.parquet").unlink()
    summary = night(given, tmp_path / "second", first)
    assert isinstance(summary.totals, Totals) and (summary.units, summary.totals.reused) == (1, 120)


def test_bytes_of_a_pair() -> None:
    assert PAIR.itemsize == 21
