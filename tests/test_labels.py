"""Exports end to end: what each target gets, exactly once whatever dies, and every bad input by its name."""

import json
import math
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import Killed, Row, job, nested, scored_only, write

import batch_rerank.labels.export as export_module
import batch_rerank.labels.part as part_module
import batch_rerank.labels.plan as plan_module
from batch_rerank.calls import in_turn
from batch_rerank.errors import ConfigError, ConflictError, InputError
from batch_rerank.job.run import run
from batch_rerank.job.staging import on_ray
from batch_rerank.label_settings import LAYOUTS, Labels
from batch_rerank.labels.export import Exported, dry_run, export
from batch_rerank.labels.targets import WRITERS, lists_of
from batch_rerank.labels.texts import held_out
from batch_rerank.publish.output import Place

FORMS = [(to, layout) for to, layouts in LAYOUTS.items() for layout in layouts]
QUERIES, CANDIDATES = 12, 25


def corpus_rows(queries: int = QUERIES, candidates: int = CANDIDATES) -> list[Row]:
    """Flat rows; a document has one text under all queries. Line ends of many kinds in the texts."""
    return [
        {
            "query_id": f"q{q}",
            "query": f"what is {q}?",
            "doc_id": f"d{(q * 5 + d) % 60}",
            "text": f"text\u2028of {(q * 5 + d) % 60}\nends \u0085 größe 北京 " + "x" * ((q * 5 + d) % 60),
        }
        for q in range(queries)
        for d in range(candidates)
    ]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished output of 12 queries in 3 shards and several units."""
    directory = tmp_path_factory.mktemp("labels")
    rows = nested(corpus_rows())
    for shard in range(3):
        write(directory / "in" / f"{shard}.parquet", rows[4 * shard : 4 * shard + 4], row_group_size=3)
    run(job(directory / "in", directory / "out", input__layout="nested"), local=True)
    return directory / "out"


def labels(path: Path, to: str = "flagembedding", **keys: Any) -> Labels:
    given = {"negatives": {"ranks": (3, None), "per_query": 5}, "held_out": 0.3, "file_bytes": 1}
    return Labels(to=to, path=str(path), **{**given, **keys})


def exported(output: Path, path: Path, to: str = "flagembedding", **keys: Any) -> Exported:
    return export(Place(str(output)), labels(path, to, **keys), in_turn)


def content(path: Path) -> dict[str, bytes]:
    """What readers see, and the sidecars."""
    found = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    return {name: data for name, data in found.items() if not name.startswith("_manifest/") and name != "_SUCCESS"}


def table(path: Path, folder: str) -> pa.Table:
    return pa.concat_tables([pq.read_table(file) for file in sorted((path / folder).glob("*.parquet"))])


def lines(path: Path, folder: str, ending: str = "jsonl") -> list[str]:
    files = sorted((path / folder).glob(f"*.{ending}"))
    return [line for file in files for line in file.read_text("utf-8").split("\n")[:-1]]


def chosen(path: Path) -> dict[str, list[Row]]:
    """The record of what was chosen, by query, in the order of the lists."""
    found: dict[str, list[Row]] = {}
    for row in table(path, "_labels").to_pylist():
        found.setdefault(row["query_id"], []).append(row)
    return found


# ---- what each target gets


@pytest.mark.parametrize(("to", "layout"), FORMS)
def test_no_target_gets_an_empty_list_a_nan_or_an_id_without_its_text(
    to: str, layout: str, output: Path, tmp_path: Path
) -> None:
    done = exported(output, tmp_path, to, layout=layout)
    assert done.counts["labelled_queries"] == QUERIES and 0 < done.counts["held_out_queries"] < QUERIES
    texts = {row["doc_id"]: row["text"] for row in corpus_rows()}
    record = chosen(tmp_path)
    assert len(record) == QUERIES and all(len(rows) == 6 for rows in record.values())
    for folder in ("train", "heldout"):
        for file in sorted((tmp_path / folder).iterdir()):
            assert file.stat().st_size > 0 and file.stem.count(".") == 0
            if file.suffix == ".parquet":
                _check_values(pq.read_table(file).to_pylist())
            elif file.suffix == ".jsonl":
                text = file.read_text("utf-8")
                assert text.splitlines() == text.split("\n")[:-1], "a reader by str.splitlines cuts a line in two"
                _check_values([json.loads(line) for line in text.splitlines()])
    if layout == "tables":
        queries = table(tmp_path, "queries").to_pylist()
        documents = table(tmp_path, "documents").to_pylist()
        train = table(tmp_path, "train").to_pylist() + table(tmp_path, "heldout").to_pylist()
        assert {one["query_id"] for one in queries} == {one["query_id"] for one in train}
        assert {one["document_id"]: one["text"] for one in documents} == {
            name: texts[name] for one in train for name in one["document_ids"]
        }
        assert len({one["document_id"] for one in documents}) == len(documents), "each text once"
        assert table(tmp_path, "documents").column_names == ["document_id", "text"]
        assert not (tmp_path / "_work").exists() or not list((tmp_path / "_work").iterdir())


def _check_values(value: Any) -> None:
    assert value not in ([], "", None)
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else []:
        if one != "":  # Tevatron's titles
            _check_values(one)
    assert not isinstance(value, float) or math.isfinite(value)


def test_lists_have_the_positive_first_and_the_teachers_scores(output: Path, tmp_path: Path) -> None:
    exported(output, tmp_path, "sentence-transformers")
    texts = {row["doc_id"]: row["text"] for row in corpus_rows()}
    scores = {(row["query_id"], row["doc_id"]): row["score"] for row in table(output, ".").to_pylist()}
    record = {f"what is {name[1:]}?": rows for name, rows in chosen(tmp_path).items()}
    for row in table(tmp_path, "train").to_pylist() + table(tmp_path, "heldout").to_pylist():
        mine = record[row["query"]]
        assert row["docs"] == [texts[one["doc_id"]] for one in mine]
        assert row["labels"] == [scores[one["query_id"], one["doc_id"]] for one in mine]
        assert row["labels"][0] == max(row["labels"])
        assert [one["role"] for one in mine] == ["positive", *["negative"] * 5]


def test_margins_tuples_and_pairs_are_of_the_same_choice(output: Path, tmp_path: Path) -> None:
    for layout in ("listwise", "margin", "n-tuple", "pairs"):
        exported(output, tmp_path / layout, "sentence-transformers", layout=layout, scale="logit", held_out=0)
    lists = table(tmp_path / "listwise", "train").to_pylist()
    margins, tuples, pairs = (table(tmp_path / name, "train").to_pylist() for name in ("margin", "n-tuple", "pairs"))
    flat = [(row["query"], doc, label) for row in lists for doc, label in zip(row["docs"], row["labels"], strict=True)]
    assert flat == [(row["query"], row["answer"], row["label"]) for row in pairs]
    assert list(margins[0]) == ["query", "positive", "negative", "label"]
    for number, row in enumerate(margins):
        of, place = lists[number // 5], number % 5 + 1
        assert (row["query"], row["positive"], row["negative"]) == (of["query"], of["docs"][0], of["docs"][place])
        assert row["label"] == pytest.approx(of["labels"][0] - of["labels"][place], abs=1e-6)
    for of, row in zip(lists, tuples, strict=True):
        assert [row["positive"], *(row[f"negative_{n}"] for n in range(1, 6))] == of["docs"]
        assert row["label"] == of["labels"]


def test_the_default_scales_are_what_the_readers_expect(output: Path, tmp_path: Path) -> None:
    for number, (to, layout, scale) in enumerate(
        [
            ("sentence-transformers", "pairs", "probability"),
            ("pylate", "tables", "minmax"),
            ("flagembedding", "lists", "logit"),
        ]
    ):
        done = exported(output, tmp_path / str(number), to, layout=layout)
        assert done.about["scale"] == scale
        values = table(tmp_path / str(number), "_labels")["label"].to_numpy()
        assert (values.min() < 0 and values.max() > 1) if scale == "logit" else 0 <= values.min() <= values.max() <= 1


def test_a_lightning_ir_run_has_one_column_of_each_name_that_its_reader_takes(output: Path, tmp_path: Path) -> None:
    exported(output, tmp_path, "lightning-ir")
    names = table(tmp_path, "train").column_names
    assert names == ["query_id", "doc_id", "rank", "score", "query", "text"]
    assert [name for name in names if "score" in name] == ["score"] and [n for n in names if "rank" in n] == ["rank"]
    for rows in _by_query(table(tmp_path, "train").to_pylist()):
        assert [row["rank"] for row in rows] == list(range(1, 7))
        assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)


def _by_query(rows: list[Row]) -> list[list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["query_id"], []).append(row)
    return list(found.values())


def test_trec_qrels_have_the_teachers_order_or_bins(output: Path, tmp_path: Path) -> None:
    exported(output, tmp_path / "a", "trec", held_out=0)
    exported(output, tmp_path / "b", "trec", held_out=0, scale="probability", grades=[0.1, 0.5])
    order, bins = ([line.split() for line in lines(tmp_path / name, "train", "qrels")] for name in "ab")
    run_ = [line.split() for line in lines(tmp_path / "b", "train", "run")]
    assert [int(fields[3]) for fields in order[:6]] == [6, 5, 4, 3, 2, 1]
    expected = [int(float(fields[4]) >= np.float32(0.1)) + int(float(fields[4]) >= 0.5) for fields in run_]
    assert [int(fields[3]) for fields in bins] == expected and set(expected) == {0, 1, 2}


def test_scores_that_tie_fall_from_rank_to_rank_in_a_trec_run() -> None:
    """trec_eval orders ties by their ids, downwards: the run would be read in another order than its ranks."""
    rows = pa.table(
        {
            "query_id": ["q", "q", "q", "r", "r"],
            "doc_id": ["a", "b", "c", "a", "b"],
            "rank": pa.array([1, 3, 2, 1, 2], pa.int32()),
            "role": pa.array([1, 0, 0, 1, 0], pa.int8()),
            "label": pa.array([1, 1, 1, 0, 0], pa.float32()),
        }
    )
    content = WRITERS["trec", "run"](lists_of(rows), Labels(to="trec", path="x"), "here")
    run = [line.split() for line in content["run"]]
    assert [fields[2] for fields in run] == ["a", "c", "b", "a", "b"]
    scores = [np.float32(fields[4]) for fields in run]
    assert scores[0] == 1 > scores[1] > scores[2] > 0.9999 and scores[3] == 0 > scores[4] > -1e-30


def test_an_instruction_goes_where_the_reader_looks_for_it(tmp_path: Path) -> None:
    rows = [{**row, "instruction": "find it" if row["query_id"] == "q1" else None} for row in corpus_rows(3)]
    write(tmp_path / "in" / "0.parquet", rows)
    run(job(tmp_path / "in", tmp_path / "out"), local=True)
    exported(tmp_path / "out", tmp_path / "fe", held_out=0)
    prompts = [json.loads(line)["query_prompt"] for line in lines(tmp_path / "fe", "train")]
    assert prompts == ["", "find it", ""], "in all lines or in none"
    exported(tmp_path / "out", tmp_path / "ms", "ms-swift", held_out=0)
    told = [json.loads(line)["messages"] for line in lines(tmp_path / "ms", "train")]
    assert [len(one) for one in told] == [1, 2, 1] and told[1][0] == {"role": "system", "content": "find it"}


# ---- the split


def test_the_same_query_under_two_ids_is_on_one_side_and_added_data_moves_nothing() -> None:
    queries = [f"query {number}" for number in range(2000)]
    first = held_out(queries, 0.2)
    assert 300 < first.sum() < 500
    assert held_out(["new one", *queries], 0.2)[1:].tolist() == first.tolist()
    assert held_out([f"  QUERY   {number}" for number in range(2000)], 0.2).tolist() == first.tolist()
    composed = [f"Größe é {number}" for number in range(500)]
    decomposed = [unicodedata.normalize("NFD", query) for query in composed]
    assert held_out(decomposed, 0.5).tolist() == held_out(composed, 0.5).tolist() and decomposed != composed
    assert not held_out(queries, 0).any() and (held_out(queries, 0.3) | first == held_out(queries, 0.3)).all()


# ---- what is dropped


def test_every_dropped_document_is_in_the_sidecar_with_its_reason_and_margin(tmp_path: Path) -> None:
    rows = corpus_rows(4)
    rows[3]["text"], rows[4]["text"], rows[5]["text"] = None, "", "  "
    rows[30]["text"] = rows[31]["text"] = rows[32]["text"] = "three of one text"
    write(tmp_path / "in" / "0.parquet", rows)
    run(job(tmp_path / "in", tmp_path / "out", scoring__max_failed_rows=0.5), local=True)
    done = exported(tmp_path / "out", tmp_path / "x", false_negatives={"margin": 2.0}, negatives={"ranks": (1, None)})
    gone = table(tmp_path / "x", "_dropped").to_pylist()
    assert {(one["doc_id"], one["reason"]) for one in gone} >= {
        ("d3", "no score"),
        ("d4", "empty text"),
        ("d5", "empty text"),
    }
    near = [one for one in gone if one["reason"] == "false negative"]
    assert near and all(one["margin"] < 2 and one["score"] > one["positive_score"] - 2 for one in near)
    assert done.counts["dropped: false negative"] == len(near)
    kept = [row for rows in chosen(tmp_path / "x").values() for row in rows if row["role"] == "negative"]
    dropped = {(one["query_id"], one["doc_id"]) for one in gone}
    assert not dropped & {(row["query_id"], row["doc_id"]) for row in kept}


def test_a_dry_run_counts_what_each_threshold_would_drop_and_writes_nothing(output: Path, tmp_path: Path) -> None:
    found = dry_run(Place(str(output)), labels(tmp_path / "x", negatives={"ranks": (2, 20), "per_query": 5}), in_turn)
    assert not (tmp_path / "x").exists()
    rows = _by_query(table(output, ".").to_pylist())
    for row in found.about["thresholds"]:
        count = 0
        for query in rows:
            best, others = query[0], query[1:20]
            if row["filter"] == "margin":
                count += sum(one["score"] > best["score"] - row["value"] for one in others)
            else:
                p = [1 / (1 + math.exp(-one["score"])) for one in (best, *others)]
                count += sum(one > row["value"] * p[0] for one in p[1:])
        assert row["dropped"] == count, row
    assert found.counts["pool" if "pool" in found.counts else "pairs"] == QUERIES * 19
    assert any(row["dropped"] for row in found.about["thresholds"])


# ---- exactly once


def test_an_export_that_is_there_is_not_made_again(output: Path, tmp_path: Path) -> None:
    first = exported(output, tmp_path)
    before = content(tmp_path)
    again = exported(output, tmp_path)
    assert again.again and not first.again
    assert (again.counts, again.rows, content(tmp_path)) == (first.counts, first.rows, before)
    assert json.loads((tmp_path / "_SUCCESS").read_text())["counts"] == first.counts


@pytest.mark.parametrize("layout", ["listwise", "tables"])
@pytest.mark.parametrize(("step", "after"), [("create", 0), ("create", 4), ("commit", 0), ("commit", 3), ("_mark", 0)])
def test_killed_anywhere_and_run_again_it_equals_an_undisturbed_export(
    step: str, after: int, layout: str, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported(output, tmp_path / "whole", "sentence-transformers", layout=layout)
    left = [after]

    def dying(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            left[0] -= 1
            made = None if step == "_mark" else original(*given, **named)
            if left[0] < 0:
                raise Killed
            return made

        return call

    with monkeypatch.context() as patch:
        for module in (part_module, export_module):
            if hasattr(module, step):
                patch.setattr(module, step, dying(getattr(module, step)))
        with pytest.raises(Killed):
            exported(output, tmp_path / "killed", "sentence-transformers", layout=layout)
        assert not (tmp_path / "killed" / "_SUCCESS").exists()
    exported(output, tmp_path / "killed", "sentence-transformers", layout=layout)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_a_file_that_is_gone_is_made_again_and_the_mark_does_not_stand_meanwhile(output: Path, tmp_path: Path) -> None:
    exported(output, tmp_path, "pylate")
    before = content(tmp_path)
    victim = next((tmp_path / "train").iterdir())
    victim.write_bytes(b"half")
    done = exported(output, tmp_path, "pylate")
    assert not done.again and content(tmp_path) == before


def test_a_paused_export_that_wakes_behind_its_successor_changes_nothing(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sleeps between a file and its receipt while another takes over, ends, and is read."""
    original, seen = part_module.commit, []

    def sleeping(root: Any, name: str, receipt: Any, epoch: int) -> Any:
        if not seen:
            seen.append(name)
            lease = tmp_path / "_manifest" / "lease" / str(epoch)
            lease.write_text(lease.read_text().replace('"released": false', '"released": true'))
            exported(output, tmp_path)
            seen.append(content(tmp_path))
        return original(root, name, receipt, epoch)

    monkeypatch.setattr(part_module, "commit", sleeping)
    with pytest.raises(ConflictError, match="taken this output over"):
        exported(output, tmp_path)
    assert content(tmp_path) == seen[1] and (tmp_path / "_SUCCESS").exists()


def test_on_ray_it_equals_one_process(
    output: Path, tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "SMALL_PAIRS", 0)
    config = job(output.parent / "in", output)
    exported(output, tmp_path / "local", "flagembedding")
    export(Place(str(output)), labels(tmp_path / "ray", "flagembedding"), on_ray(config))
    assert content(tmp_path / "ray") == content(tmp_path / "local")


# ---- where the scores come from


def test_what_was_published_serves_where_scores_were_not_kept(output: Path, tmp_path: Path) -> None:
    exported(output, tmp_path / "scores", "pylate")
    for top_k in (None, 20):
        keys = {"output__keep_scores": False, "output__top_k": top_k, "input__layout": "nested"}
        place = tmp_path / f"out-{top_k}"
        run(job(output.parent / "in", place, **keys), local=True)
        given = {"negatives": {"ranks": (3, top_k), "per_query": 5}}
        exported(place, tmp_path / f"parts-{top_k}", "pylate", **given)
    assert content(tmp_path / "parts-None") == content(tmp_path / "scores")
    assert all(row["rank"] <= 20 for rows in chosen(tmp_path / "parts-20").values() for row in rows)


def test_what_top_k_has_cut_is_named_with_how_to_get_it(output: Path, tmp_path: Path) -> None:
    keys = {"output__keep_scores": False, "output__top_k": 10, "input__layout": "nested"}
    run(job(output.parent / "in", tmp_path / "out", **keys), local=True)
    with pytest.raises(InputError, match=r"10 best candidates.*all candidates.*keep_scores: true"):
        exported(tmp_path / "out", tmp_path / "x")
    kept = {"output__top_k": 10, "input__layout": "nested"}
    run(job(output.parent / "in", tmp_path / "kept", **kept), local=True)
    exported(tmp_path / "kept", tmp_path / "x")
    assert max(row["rank"] for rows in chosen(tmp_path / "x").values() for row in rows) > 10


def test_the_texts_of_a_staged_input_are_found(tmp_path: Path) -> None:
    rows = corpus_rows(6)
    write(tmp_path / "in" / "0.parquet", rows[::2] + rows[1::2])  # scattered
    run(job(tmp_path / "in", tmp_path / "out"), local=True)
    exported(tmp_path / "out", tmp_path / "x", "pylate")
    texts = {row["doc_id"]: row["text"] for row in rows}
    documents = table(tmp_path / "x", "documents").to_pylist()
    assert documents and all(one["text"] == texts[one["document_id"]] for one in documents)


def test_an_input_that_changed_or_is_gone_is_named(tmp_path: Path) -> None:
    write(tmp_path / "in" / "0.parquet", corpus_rows(6))
    run(job(tmp_path / "in", tmp_path / "out"), local=True)
    write(tmp_path / "in" / "0.parquet", corpus_rows(7))
    with pytest.raises(InputError, match=r"0\.parquet: changed since the plan.*\n.*have it back as it was"):
        exported(tmp_path / "out", tmp_path / "x")
    (tmp_path / "in" / "0.parquet").unlink()
    with pytest.raises(InputError, match=r"0\.parquet: not found"):
        exported(tmp_path / "out", tmp_path / "y")
    assert not (tmp_path / "x" / "_SUCCESS").exists()


# ---- several teachers


@pytest.fixture(scope="module")
def second(output: Path) -> Path:
    """An output with the same scores over the same candidates in another shard, in units of another size."""
    place = output.parent / "second"
    write(output.parent / "second-in" / "0.parquet", nested(corpus_rows()))
    run(job(output.parent / "second-in", place, input__layout="nested", input__unit_pairs=100), local=True)
    return place


def test_two_teachers_of_the_same_scores_agree(output: Path, second: Path, tmp_path: Path) -> None:
    exported(output, tmp_path / "one", scale="minmax")
    for combine in ("zscore", "mean", "rank"):
        given = {"teachers": {"outputs": str(second), "combine": combine}, "scale": "minmax"}
        exported(output, tmp_path / combine, **given)
        one, two = (chosen(tmp_path / name) for name in ("one", combine))
        assert [[r["doc_id"] for r in rows] for rows in two.values()] == [
            [r["doc_id"] for r in rows] for rows in one.values()
        ]
        assert all(r["disagreement"] == pytest.approx(0, abs=1e-6) for rows in two.values() for r in rows)
        if combine != "rank":
            for mine, theirs in zip(one.values(), two.values(), strict=True):
                assert [r["label"] for r in theirs] == pytest.approx([r["label"] for r in mine], abs=1e-5)


def other_scores(place: Path, change: Callable[[Row], Row | None], rows: list[Row], tmp_path: Path) -> Path:
    """An output over changed candidates, which has other scores."""
    changed = [made for row in rows if (made := change(row)) is not None]
    write(tmp_path / f"{place.name}-in" / "0.parquet", changed)
    run(job(tmp_path / f"{place.name}-in", place), local=True)
    return place


def test_teachers_that_disagree_are_averaged_and_the_most_doubtful_documents_cut(output: Path, tmp_path: Path) -> None:
    reordered = sorted(corpus_rows(), key=lambda row: (int(row["query_id"][1:]) % 5, row["query_id"]))
    other = other_scores(tmp_path / "other", lambda row: {**row, "query": row["query"] + "!"}, reordered, tmp_path)
    given = {"teachers": {"outputs": str(other), "max_disagreement": 1.0}, "negatives": {"ranks": (1, None)}}
    done = exported(output, tmp_path / "x", **given)
    scores = [
        {(row["query_id"], row["doc_id"]): row["score"] for row in table(place, ".").to_pylist()}
        for place in (output, other)
    ]
    by_query = {name: [key for key in scores[0] if key[0] == name] for name, _ in scores[0]}
    standard = [
        {
            key: (one[key] - np.mean([one[k] for k in keys])) / np.std([one[k] for k in keys])
            for keys in by_query.values()
            for key in keys
        }
        for one in scores
    ]
    assert done.counts["dropped: teachers disagree"] == sum(
        bool(np.std([one[key] for one in standard]) > 1) for key in scores[0]
    )
    for rows in chosen(tmp_path / "x").values():
        for row in rows:
            z = [one[row["query_id"], row["doc_id"]] for one in standard]
            assert row["score"] == pytest.approx(np.mean(z), abs=1e-5)
            assert row["disagreement"] == pytest.approx(np.std(z), abs=1e-5) and row["disagreement"] <= 1


def test_candidates_that_a_teacher_lacks_are_counted_and_limited(output: Path, tmp_path: Path) -> None:
    rows = [*corpus_rows(), {**corpus_rows(1)[0], "query_id": "q11", "query": "what is 11?", "doc_id": "extra"}]
    rows.sort(key=lambda row: int(row["query_id"][1:]))
    lacks = other_scores(tmp_path / "o", lambda row: None if row["doc_id"] == "d7" else row, rows, tmp_path)
    missing = sum(row["doc_id"] == "d7" for row in corpus_rows())
    with pytest.raises(InputError, match=rf"{missing} of 300 scored candidates .* \(1 of theirs"):
        exported(output, tmp_path / "x", teachers={"outputs": str(lacks)})
    done = exported(output, tmp_path / "x", teachers={"outputs": [str(lacks)], "max_missing": 0.1})
    assert done.counts["dropped: a teacher has no score"] == missing
    assert done.counts["teachers_extra"] == 1


def test_the_same_output_twice_is_no_second_teacher(output: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected another model"):
        exported(output, tmp_path, teachers={"outputs": str(output)})


def test_a_teacher_that_is_given_twice_has_no_second_voice(output: Path, second: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(second)
    with pytest.raises(ConfigError, match=r"link has the same scores as .*second; expected each once"):
        exported(output, tmp_path / "x", teachers={"outputs": [str(second), str(tmp_path / "link")]})


def test_labels_lie_in_no_teachers_output(output: Path, second: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(output)
    for inside in (second / "labels", tmp_path / "link" / "labels"):
        with pytest.raises(ConfigError, match=r"is inside the (exported output|output of a teacher)"):
            exported(output, inside, teachers={"outputs": str(second)})
        assert not inside.exists()


def test_judged_documents_that_are_no_candidates_are_counted_from_the_least_grade(output: Path, tmp_path: Path) -> None:
    (tmp_path / "qrels").write_text("q0 0 d3 2\nq0 0 gone 2\nq0 0 lost 1\n")
    given = {"positives": {"from": "both", "qrels": str(tmp_path / "qrels"), "least": 2}}
    assert dry_run(Place(str(output)), labels(tmp_path / "x", **given), in_turn).counts["judged_absent"] == 1


# ---- bad input


def test_an_unfinished_output_is_refused(flat_shards: Path, tmp_path: Path) -> None:
    place = scored_only(job(flat_shards, tmp_path / "out"))
    with pytest.raises(InputError, match="has not finished"):
        exported(place, tmp_path / "x")


def test_judgements_of_other_queries_are_refused_with_an_id_of_each(output: Path, tmp_path: Path) -> None:
    (tmp_path / "qrels").write_text("Q1 0 d1 1\n")
    with pytest.raises(InputError, match=r"judges 1 queries, none .*there 'Q1', here 'q0'"):
        exported(output, tmp_path / "x", positives={"qrels": str(tmp_path / "qrels")})
    assert not (tmp_path / "x").exists()


def test_queries_that_are_left_out_are_counted_and_a_limit_decides(output: Path, tmp_path: Path) -> None:
    (tmp_path / "qrels").write_text("q0 0 d3 1\nq1 0 d8 2\nq2 0 absent 1\nq3 0 d19 0\n")
    given = {"positives": {"qrels": str(tmp_path / "qrels")}}
    with pytest.raises(InputError, match=r"10 of 12 queries would be left out \(10 no positive\).*max_dropped_queries"):
        exported(output, tmp_path / "x", **given)
    assert not (tmp_path / "x").exists()
    done = exported(output, tmp_path / "x", **given, max_dropped_queries=0.9)
    assert (done.counts["labelled_queries"], done.counts["judged_absent"]) == (2, 1)
    gone = table(tmp_path / "x", "_dropped")
    assert pc.sum(pc.equal(gone["reason"], "no positive")).as_py() == 10


def test_too_few_negatives_are_too_few_for_readers_of_equal_lists_alone(output: Path, tmp_path: Path) -> None:
    given = {"negatives": {"ranks": (23, None), "per_query": 5}}  # 3 of 25
    with pytest.raises(InputError, match="no query has labels: 12 too few negatives"):
        exported(output, tmp_path / "x", "pylate", **given)
    assert exported(output, tmp_path / "y", **given).counts["negatives"] == 3 * QUERIES


def test_scores_that_are_all_equal_are_said_to_be(tmp_path: Path) -> None:
    rows = [{**row, "query_id": f"q{row['doc_id']}"} for row in corpus_rows(1)]  # a candidate each
    write(tmp_path / "in" / "0.parquet", rows)
    run(job(tmp_path / "in", tmp_path / "out"), local=True)
    with pytest.raises(InputError, match="no query has labels: 25 all scores equal"):
        exported(tmp_path / "out", tmp_path / "x")


def test_a_place_that_holds_something_else_is_refused(output: Path, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine.txt").write_text("kept")
    with pytest.raises(ConflictError, match=r"of no export, e\.g\. mine\.txt"):
        exported(output, tmp_path / "x")
    assert [one.name for one in (tmp_path / "x").iterdir()] == ["mine.txt"]
    exported(output, tmp_path / "y")
    with pytest.raises(ConflictError, match=r"differs in seed:\n  seed: there 0, here 1"):
        exported(output, tmp_path / "y", seed=1)
    for inside in (output / "labels", output.parent):
        with pytest.raises(ConfigError, match=r"of its own|inside the exported output"):
            exported(output, inside)


def test_labels_are_not_written_among_the_input(flat_shards: Path, tmp_path: Path) -> None:
    """A job's next run would read them, unless it names a folder, of which it reads no folders."""
    inside = flat_shards / "labels"
    run(job(flat_shards, tmp_path / "folder"), local=True)
    assert exported(tmp_path / "folder", inside).rows
    assert run(job(flat_shards, tmp_path / "again"), local=True).pairs == 300
    shutil.rmtree(inside)
    run(job(flat_shards / "**/*.parquet", tmp_path / "out"), local=True)
    with pytest.raises(ConfigError, match=r"is among what input\.path .* takes in"):
        exported(tmp_path / "out", inside)
    assert not inside.exists()
    beside = flat_shards.parent / "labels"
    assert exported(tmp_path / "out", beside).rows


def test_a_document_with_two_texts_has_no_place_in_a_table(flat_shards: Path, tmp_path: Path) -> None:
    run(job(flat_shards, tmp_path / "out"), local=True)
    for to in ("pylate", "lightning-ir"):
        with pytest.raises(InputError, match=r"doc_id 'd\d+' has different texts under different queries"):
            exported(tmp_path / "out", tmp_path / to, to)
        assert not (tmp_path / to / "_SUCCESS").exists()
    assert exported(tmp_path / "out", tmp_path / "fe").counts["labelled_queries"] == 12


def test_an_id_that_no_trec_file_can_hold_is_named(tmp_path: Path) -> None:
    write(tmp_path / "in" / "0.parquet", [{**row, "doc_id": f"a {row['doc_id']}"} for row in corpus_rows(3)])
    run(job(tmp_path / "in", tmp_path / "out"), local=True)
    with pytest.raises(InputError, match=r"doc_id 'a d\d+' is empty or has space"):
        exported(tmp_path / "out", tmp_path / "x", "trec")


def test_an_empty_query_has_no_labels(tmp_path: Path) -> None:
    rows = [{**row, "query": {"q1": "", "q2": " \t"}.get(row["query_id"], row["query"])} for row in corpus_rows(3)]
    write(tmp_path / "in" / "0.parquet", rows)
    run(job(tmp_path / "in", tmp_path / "out"), local=True)
    done = exported(tmp_path / "out", tmp_path / "x", max_dropped_queries=0.9)
    assert set(chosen(tmp_path / "x")) == {"q0"}
    assert (done.counts["left out: no scores"], done.counts["dropped: empty text"]) == (2, 2 * CANDIDATES)


@pytest.mark.parametrize("space", ["\u00a0", "\u3000", "\u2028", "\x85", "\x0b", "\x1f"])
def test_an_id_with_space_of_any_kind_is_in_no_trec_file(space: str, tmp_path: Path) -> None:
    """Readers cut lines with str.split, which takes all of these for space."""
    assert len(f"a{space}b".split()) == 2
    write(tmp_path / "in" / "0.parquet", [{**row, "doc_id": f"a{space}{row['doc_id']}"} for row in corpus_rows(2)])
    with pytest.raises(InputError, match=r"is empty or has space"):
        run(job(tmp_path / "in", tmp_path / "refused", output__trec_run=True), local=True)
    run(job(tmp_path / "in", tmp_path / "out"), local=True)
    with pytest.raises(InputError, match=r"is empty or has space"):
        exported(tmp_path / "out", tmp_path / "x", "trec")


def test_an_output_without_rows_has_no_labels(tmp_path: Path) -> None:
    schema = pa.Table.from_pylist(corpus_rows(1)).schema
    (tmp_path / "in").mkdir()
    pq.write_table(schema.empty_table(), tmp_path / "in" / "0.parquet")
    run(job(tmp_path / "in", tmp_path / "out"), local=True)
    with pytest.raises(InputError, match="no query has labels: it has no query with candidates"):
        exported(tmp_path / "out", tmp_path / "x")


# ---- the command line


def test_the_command_exports_a_job_by_its_section_and_an_output_by_options(
    output: Path, tmp_path: Path, cli: Callable[..., tuple[int, str, str]]
) -> None:
    section = {"to": "pylate", "path": str(tmp_path / "a"), "negatives": {"ranks": [3, None], "per_query": 5}}
    raw = yaml.safe_load(job(output.parent / "in", output, input__layout="nested").model_dump_json())
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({**raw, "labels": section}))
    code, out, err = cli("export", tmp_path / "job.yaml", "--local", "--json")
    assert code == 0, err
    assert json.loads(out)["counts"]["labelled_queries"] == QUERIES
    assert json.loads(out)["about"]["layout"] == "tables" and "advised temperature" in err
    given = ("--set", "labels.negatives={ranks: [3, 20], per_query: 5}")
    code, _, err = cli("export", output, "--to", "trec", "--path", tmp_path / "b", "--local", *given)
    assert code == 0 and "12 of 12 queries have labels" in err
    code, out, _ = cli("export", output, "--to", "trec", "--dry-run", "--local", *given)
    assert code == 0 and "margin" in out and "share" in out
    code, _, err = cli("export", output, "--to", "trec", "--path", tmp_path / "b", "--local", *given)
    assert code == 0 and "nothing to do" in err


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("--to", "keras", "--path", "x"), 2, "found 'keras'; expected one of sentence-transformers, flagembedding"),
        (("--to", "trec"), 2, "labels.path: missing"),
        (("--to", "trec", "--path", "x", "--set", "labels.layout=tables"), 2, "trec has run"),
        (("--to", "trec", "--path", "x", "--set", "labels.negatives.ranks=[5, 2]"), 2, "first rank, then the last"),
        (("--to", "trec", "--path", "x", "--set", "model.name=x"), 2, "expected"),
        (("--to", "trec", "--path", "x", "--set", "labels.positives.from=qrels"), 2, "set qrels to a path"),
        (("--to", "ms-swift", "--path", "x", "--set", "labels.scale=minmax"), 2, "binary labels"),
        (("--to", "trec", "--path", "x", "--set", "labels.false_negatives={margin: 1, share: 0.5}"), 2, "one of them"),
        (("--to", "pylate", "--path", "x", "--set", "labels.negatives.least=2"), 2, "lists of one length"),
        (("--to", "trec", "--path", "{foreign}"), 4, "of no export"),
        (("--to", "trec", "--path", "x", "--set", "labels.positives.qrels=absent"), 3, "absent: not found"),
    ],
)
def test_what_is_wrong_ends_with_its_exit_code_and_no_traceback(
    arguments: tuple[str, ...],
    code: int,
    told: str,
    output: Path,
    tmp_path: Path,
    cli: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "other").write_text("")
    given = [one.format(foreign=tmp_path / "foreign") if "{foreign}" in one else one for one in arguments]
    found, _, err = cli("export", output, "--local", *given)
    assert found == code and told in err and "Traceback" not in err
    assert not (tmp_path / "x").exists()


def test_a_model_without_probabilities_has_none_to_export(output: Path, tmp_path: Path) -> None:
    class Cosines:
        name, kind, relevance = "a bi-encoder", "bi_encoder", "none"

    class Opened:
        model = Cosines()

    with pytest.raises(ConfigError, match="no map to probabilities"):
        plan_module.decided(labels(tmp_path, scale="probability"), Opened())  # type: ignore[arg-type]
    pairs = labels(tmp_path, "sentence-transformers", layout="pairs")
    assert plan_module.decided(pairs, Opened()) == "minmax"  # type: ignore[arg-type]
