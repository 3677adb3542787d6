"""A report says how an output stands, whatever state it is in, and disturbs nobody who reads it."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.dataset as ds
import pytest
import yaml
from conftest import Killed, candidate_rows, nested, scored_only, write
from conftest import job as job_without

import batch_rerank.job.republish as republish_module
import batch_rerank.report.write as report_write
from batch_rerank.config import JobConfig
from batch_rerank.errors import GateError, UnfinishedError
from batch_rerank.job.republish import republish
from batch_rerank.job.run import run
from batch_rerank.publish.output import Place
from batch_rerank.publish.verify import verify
from batch_rerank.report.histograms import scores_of
from batch_rerank.report.page import page
from batch_rerank.report.text import shown
from batch_rerank.report.timeline import timeline
from batch_rerank.report.write import report
from batch_rerank.store.filesystem import locate
from batch_rerank.store.lease import hold
from batch_rerank.store.receipts import Receipt
from batch_rerank.store.shapes import SCORES, Shape

Cli = Callable[..., tuple[int, str, str]]
Json = dict[str, Any]


def job(input_path: Path, output: Path, **keys: Any) -> JobConfig:
    return job_without(input_path, output, **{"output__report": True, **keys})


@pytest.fixture(autouse=True)
def _time_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_write, "LEAST_SECONDS", 60)  # texts of movers, also on a busy machine


@pytest.fixture
def config(flat_shards: Path, tmp_path: Path) -> JobConfig:
    return job(flat_shards, tmp_path / "out")


@pytest.fixture
def output(config: JobConfig) -> Path:
    assert run(config, local=True).report == f"{config.output.path}/_report/report.html"
    return Path(config.output.path)


def told(output: Path) -> Json:
    content: Json = json.loads((output / "_report/report.json").read_text())
    assert page((output / "_report/report.json").read_bytes()) == (output / "_report/report.html").read_bytes()
    return content


def asked(cli: Cli, *arguments: object) -> Json:
    code, out, error = cli("report", *arguments, "--json")
    assert code == 0, error
    content: Json = json.loads(out)
    assert content["report"]["bytes"] == Path(content["report"]["html"]).stat().st_size
    return content


def test_the_numbers_are_those_of_the_job(output: Path, config: JobConfig) -> None:
    content = told(output)
    assert content["verdict"] == {
        "tone": "good",
        "line": "Finished and published: 300 pairs of 12 queries.",
        "notes": [],
    }
    assert content["counts"]["rows_in"] == content["counts"]["rows_out"] == content["scores"]["count"] == 300
    assert sum(content["scores"]["counts"]) == pytest.approx(300)
    assert sum(count for _, _, count in content["tokens"]["bins"]) == 300
    assert sum(count for _, _, count in content["places"]) == sum(content["relevance"]) == 300
    assert (content["agreement"]["overlap_queries"], content["agreement"]["rbo_queries"]) == (12, 12)
    rows = ds.dataset(output).to_table().to_pandas()
    top, first = (rows[rows[name] <= 10] for name in ("rank", "first_stage_rank"))
    both = len(top.merge(first, on=["query_id", "doc_id"]))
    assert content["agreement"]["overlap_at_10"] == pytest.approx(both / 120)
    assert content["planned"]["planned"]["pairs"] == content["planned"]["actual"]["pairs"] == 300
    assert content["measures"] is None and content["gate"] is None
    assert (
        content["provenance"]["fingerprint"] == json.loads((output / "_manifest/plan.json").read_text())["fingerprint"]
    )


def test_movers_are_rows_of_the_output_with_their_texts(output: Path) -> None:
    movers = told(output)["movers"]
    assert len(movers["rows"]) == 20 and movers["note"] == ""
    rows = ds.dataset(output).to_table().to_pandas().set_index(["query_id", "doc_id"])
    texts = {(row["query_id"], row["doc_id"]): row for row in candidate_rows(12, 25)}
    for one in movers["rows"]:
        row = rows.loc[one["query_id"], one["doc_id"]]
        assert (one["before"], one["after"]) == (row["first_stage_rank"], row["rank"])
        assert one["score"] == pytest.approx(row["score"], rel=1e-7)
        assert (one["query"], one["text"]) == tuple(
            texts[one["query_id"], one["doc_id"]][name] for name in ("query", "text")
        )
    assert [one["after"] < one["before"] for one in movers["rows"]] == [True] * 10 + [False] * 10
    farthest = (rows["first_stage_rank"] - rows["rank"]).groupby("query_id").max().sort_values(ascending=False)
    assert movers["rows"][0]["before"] - movers["rows"][0]["after"] == farthest.iloc[0]


def test_readers_and_verbs_do_not_see_it(output: Path, cli: Cli) -> None:
    assert (output / "_report/report.html").exists()
    assert len(pd.read_parquet(output)) == len(ds.dataset(output).to_table()) == 300
    assert verify(str(output)).problems == []
    code, out, _ = cli("clean", output, "--dry-run", "--json")
    (taken,) = json.loads(out)
    assert code == 0 and taken["takes"]["report"]["files"] == 2 and taken["takes"]["others"]["files"] == 0
    assert cli("clean", output, "--all")[0] == 0
    assert [path for path in output.rglob("*") if path.is_file()] == []


def test_it_is_the_same_every_time(output: Path, cli: Cli) -> None:
    before = told(output)
    first = asked(cli, output)
    content = told(output)
    assert asked(cli, output)["scores"] == first["scores"] and told(output) == content
    assert {**content, "movers": None} == {**before, "movers": None}
    assert content["movers"]["rows"] == before["movers"]["rows"]


def test_another_publication_has_another_report(
    output: Path, config: JobConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = told(output)

    def job_of(top_k: int) -> Place:
        other = config.model_copy(update={"output": config.output.model_copy(update={"top_k": top_k})})
        return Place(str(output), {}, other)

    assert republish(job_of(5), local=True).report is not None
    second = told(output)
    assert second["publication"] != first["publication"] and second["counts"]["rows_out"] == 60

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(republish_module, "finish", killed)
        republish(job_of(3), local=True)
    assert not list((output / "_report").iterdir()), "it spoke of a publication that is gone"
    assert report(Place(str(output))).content["verdict"]["tone"] in ("bad", "open")


def test_what_is_made_again_takes_the_report_with_it(output: Path, config: JobConfig) -> None:
    (output / "part-00000.parquet").write_bytes(b"damaged")
    assert verify(str(output), repair=True).repaired
    assert report(Place(str(output))).content["verdict"]["tone"] == "bad"
    assert run(config, local=True).report
    assert told(output)["verdict"]["tone"] == "good"


def test_scores_that_are_not_published_are_said_to_be(config: JobConfig, cli: Cli) -> None:
    content = asked(cli, scored_only(config))
    assert "all pairs are scored and not published" in content["verdict"]["line"]
    assert content["counts"]["rows_out"] is None and content["scores"]["count"] == 300
    assert "not yet" in Path(content["report"]["html"]).read_text()


def test_a_run_at_work_is_said_to_be(config: JobConfig, cli: Cli) -> None:
    out = scored_only(config)
    for name in list((out / "_manifest/receipts").iterdir())[:2]:
        name.unlink()
    status = out / "_manifest/status.json"
    status.write_text(json.dumps({**json.loads(status.read_text()), "state": "running"}))
    with hold(locate(str(out))):
        content = asked(cli, out)
    assert content["verdict"]["tone"] == "open" and "Still running" in content["verdict"]["line"]
    assert asked(cli, out)["verdict"]["line"].startswith("The last run"), "its holder has let go"


def test_a_failed_run_ends_with_a_report_of_why(flat_shards: Path, tmp_path: Path) -> None:
    rows = [
        {**row, "text": None if index % 10 == 0 else row["text"]} for index, row in enumerate(candidate_rows(4, 25))
    ]
    write(tmp_path / "bad/0.parquet", rows)
    with pytest.raises(UnfinishedError):
        run(job(tmp_path / "bad", tmp_path / "out"), local=True)
    content = told(tmp_path / "out")
    assert content["verdict"]["tone"] == "bad" and "failed with exit code 1" in content["verdict"]["line"]
    assert any("rows failed" in note for note in content["verdict"]["notes"])
    assert content["failures"]["null_texts"] == content["counts"]["failed"] == 10
    assert content["scores"]["count"] == 90


def test_a_gate_that_refuses_is_in_it(output: Path, flat_shards: Path, tmp_path: Path) -> None:
    raw = job(flat_shards, tmp_path / "other", model__max_length=20).model_dump(by_alias=True, exclude={"limit"})
    raw["gate"] = {"against": str(output), "error": ["overlap@10 >= 0.99"], "warn": ["truncated <= 0.5"]}
    other = JobConfig.model_validate(raw)
    with pytest.raises(GateError):
        run(other, local=True)
    content = told(tmp_path / "other")
    assert content["verdict"]["line"].startswith("Held back by its gate") and content["verdict"]["tone"] == "bad"
    assert [line["state"] for line in content["gate"]["lines"]] == ["failed", "failed"]
    republish(Place(str(tmp_path / "other")), local=True, despite="<to see>")
    content = told(tmp_path / "other")
    assert (
        content["verdict"]["tone"] == "warn" and "Published despite the gate: <to see>" in content["verdict"]["notes"]
    )


def test_an_output_without_candidates_has_one(tmp_path: Path, cli: Cli) -> None:
    rows = [{**row, "candidates": []} for row in nested(candidate_rows(3, 1))]
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "in").mkdir()
    full = pa.Table.from_pylist(nested(candidate_rows(1, 1))).schema
    pq.write_table(pa.Table.from_pylist(rows, full), tmp_path / "in/0.parquet")
    run(job(tmp_path / "in", tmp_path / "out", input__layout="nested"), local=True)
    content = asked(cli, tmp_path / "out")
    assert "nothing to score" in content["verdict"]["line"]
    assert (content["scores"], content["places"], content["movers"]["rows"]) == (None, None, [])


def without_shapes(output: Path) -> None:
    for path in (output / "_manifest/receipts").iterdir():
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("\n".join(json.dumps({k: v for k, v in line.items() if k != "shape"}) for line in lines))


def test_receipts_of_an_earlier_version_leave_the_distributions_unknown(output: Path, cli: Cli) -> None:
    without_shapes(output)
    content = asked(cli, output)
    assert (
        content["counts"]["rows_in"] == 300 and content["scores"] is None and content["shapes"] == {"units": 0, "of": 6}
    )
    html = (output / "_report/report.html").read_text()
    assert "these receipts have no distributions" in html and content["verdict"]["tone"] == "good"


def test_an_output_of_another_version_is_said_to_be(output: Path, cli: Cli) -> None:
    plan = output / "_manifest/plan.json"
    for version in (1, 99):
        plan.write_text(json.dumps({**json.loads(plan.read_text()), "manifest_version": version}))
        content = asked(cli, output)
        assert "another version" in content["verdict"]["line"], version
        assert any("batch_rerank" in note for note in content["verdict"]["notes"])


def test_what_is_no_output_gets_no_report(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "data").mkdir()
    code, _, error = cli("report", tmp_path / "data")
    assert code == 6 and "expected the output" in error and not list((tmp_path / "data").iterdir())
    code, _, error = cli("report", tmp_path / "gone", "--set", "output.path=x")
    assert code == 2


def test_damaged_records_are_unknown_and_not_the_end(output: Path, cli: Cli) -> None:
    (output / "_manifest/gate.json").write_text("{")
    (output / "_manifest/failures").mkdir(exist_ok=True)
    (output / "_manifest/failures/00000-00000.json").write_text('{"rows": [1]}')
    (output / "_manifest/status.json").write_text("[]")
    content = asked(cli, output)
    assert "gate.json" in content["gate"]["problem"] and content["failures"]["engine"] == []
    assert content["counts"]["rows_in"] == 300


def test_measures_stand_beside_the_first_stages(output: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "qrels").write_text("".join(f"q{query} 0 d{query} 1\n" for query in range(12)) + "other 0 d1 1\n")
    content = asked(cli, output, "--qrels", tmp_path / "qrels")
    measured = content["measures"]
    assert (measured["queries"], measured["missing"]) == (13, 1)
    (ndcg, _, _) = measured["rows"]
    code, out, _ = cli("evaluate", "--run", output, "--qrels", tmp_path / "qrels", "--json")
    evaluated = json.loads(out)
    assert code == 0 and (ndcg["before"], ndcg["after"]) == (
        evaluated["before"]["nDCG@10"],
        evaluated["after"]["nDCG@10"],
    )
    assert (
        ndcg["better"] + ndcg["worse"] + ndcg["even"] == 13
        and ndcg["low"] <= ndcg["after"] - ndcg["before"] <= ndcg["high"]
    )


def test_judgements_that_match_nothing_are_no_measure(
    output: Path, config: JobConfig, tmp_path: Path, cli: Cli
) -> None:
    (tmp_path / "qrels").write_text("other 0 d1 1\n")
    measured = asked(cli, output, "--qrels", tmp_path / "qrels")["measures"]
    assert "none of its 1 queries is in" in measured["problem"] and "rows" not in measured
    (tmp_path / "qrels").write_text("q1 0 elsewhere 1\n")
    measured = asked(cli, output, "--qrels", tmp_path / "qrels")["measures"]
    assert "no judged document" in measured["problem"]
    (tmp_path / "qrels").write_text("nonsense\n")
    before = (output / "_report/report.json").read_bytes()
    assert cli("report", output, "--qrels", tmp_path / "qrels")[0] == 3
    assert (output / "_report/report.json").read_bytes() == before
    shutil.rmtree(output)
    (tmp_path / "qrels").write_text("q1 0 d1 1\n")
    out = scored_only(config)
    assert "has not finished" in asked(cli, out, "--qrels", tmp_path / "qrels")["measures"]["problem"]


def test_an_earlier_output_is_laid_beside_it(output: Path, flat_shards: Path, tmp_path: Path, cli: Cli) -> None:
    run(job(flat_shards, tmp_path / "short", model__max_length=9), local=True)
    content = asked(cli, tmp_path / "short", "--against", output)
    assert len(content["scores"]["earlier"]) == len(content["scores"]["counts"])
    assert sum(content["scores"]["earlier"]) == pytest.approx(300)
    assert content["earlier"]["counts"]["truncated"] == 0 < content["counts"]["truncated"]
    without_shapes(output)
    content = asked(cli, tmp_path / "short", "--against", output)
    assert "earlier version" in content["earlier"]["problem"] and "earlier" not in content["scores"]
    content = asked(cli, tmp_path / "short", "--against", tmp_path / "gone")
    assert "no _manifest/plan.json" in content["earlier"]["problem"]


def test_a_night_is_laid_beside_the_one_that_latest_named(flat_shards: Path, tmp_path: Path) -> None:
    pointer = str(tmp_path / "LATEST.json")
    run(job(flat_shards, tmp_path / "one", output__latest=pointer), local=True)
    assert told(tmp_path / "one")["earlier"] is None
    run(job(flat_shards, tmp_path / "two", output__latest=pointer), local=True)
    content = told(tmp_path / "two")
    assert content["earlier"]["output"] == str(tmp_path / "one")
    assert content["scores"]["earlier"] == content["scores"]["counts"]


def test_a_report_that_cannot_be_made_fails_no_job(
    config: JobConfig, logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("of ours")

    monkeypatch.setattr(report_write, "gather", broken)
    summary = run(config, local=True)
    assert summary.report is None and summary.totals.rows_out == 300
    assert verify(summary.output).problems == []
    assert "the report could not be made: RuntimeError: of ours" in logged


def test_it_can_be_left_out_or_put_elsewhere(flat_shards: Path, tmp_path: Path, cli: Cli) -> None:
    summary = run(job(flat_shards, tmp_path / "out", output__report=False), local=True)
    assert summary.report is None and not (tmp_path / "out/_report").exists()
    content = asked(cli, tmp_path / "out", "--to", tmp_path / "here")
    assert {path.name for path in (tmp_path / "here").iterdir()} == {"report.json", "report.html"}
    assert content["report"]["html"] == str(tmp_path / "here/report.html") and not (tmp_path / "out/_report").exists()


def test_without_the_input_movers_have_their_ids(output: Path, flat_shards: Path, cli: Cli) -> None:
    before = told(output)["movers"]["rows"]
    shutil.rmtree(flat_shards)
    movers = asked(cli, output)["movers"]
    assert "could not be read again" in movers["note"]
    assert [(one["query_id"], one["doc_id"]) for one in movers["rows"]] == [
        (one["query_id"], one["doc_id"]) for one in before
    ]
    shutil.rmtree(output / "_scores")
    movers = asked(cli, output)["movers"]
    assert len(movers["rows"]) == 20 and "doc_id" not in movers["rows"][0]
    assert cli("report", output, "--score-movers")[0] == 3


def test_movers_are_scored_again_by_the_command_that_is_shown(output: Path, tmp_path: Path, cli: Cli) -> None:
    movers = told(output)["movers"]
    assert movers["command"] == f"batch-rerank report {output} --score-movers"
    code, out, _ = cli("report", output, "--score-movers", "--json")
    again = json.loads(out)["movers"]
    assert code == 0 and len(again) == 20
    for one, other in zip(movers["rows"], again, strict=True):
        assert (one["query_id"], one["doc_id"], one["score"]) == (other["query_id"], other["doc_id"], other["kept"])
        assert other["computed"] == pytest.approx(other["kept"], rel=1e-6)
    plan = output / "_manifest/plan.json"
    raw = json.loads(plan.read_text())
    raw["model"]["identity"] = "another"
    plan.write_text(json.dumps(raw))
    code, _, error = cli("report", output, "--score-movers")
    assert code == 5 and "expected the same checkpoint" in error


def test_a_plan_is_held_against_what_happened(output: Path) -> None:
    planned = {
        "planned": {"pairs": 300, "seconds": {"low": 1, "p50": 2.0, "high": 4}, "usd": None},
        "actual": {"pairs": 300, "seconds": 3.0, "usd": 0.5},
        "reasons": ["slower by <b>one half</b>"],
    }
    record = output / "_manifest/actual.json"
    record.write_text(json.dumps(planned))
    made = report(Place(str(output)))
    html = Path(made.html).read_text()
    assert made.content["planned"] == planned
    for said in ("2 (1 to 4)", "+50.0%", "+0.0%", "unknown", "&lt;b&gt;one half"):
        assert said in html
    for damaged in ("{", "[]", '{"planned": 3}'):
        record.write_text(damaged)
        assert "no plan’s estimate" in Path(report(Place(str(output))).html).read_text()


def receipt(number: int, at: int, seconds: float, actor: str, pairs: int = 100, **more: Any) -> Receipt:
    stamp = f"2026-01-01T{at // 3600:02d}:{at // 60 % 60:02d}:{at % 60:02d}Z"
    given = {"scored": pairs, "rows_in": pairs, "at": stamp, "scorer": actor, "device": "cuda", **more}
    return Receipt(f"{number:05d}", "f", "p", 1, "s", seconds=seconds, **given)


def test_time_idle_and_gaps_are_what_the_receipts_say() -> None:
    busy = [receipt(at, 1000 + at, 10, "a:1 cuda") for at in range(10, 110, 10)]
    idle = [receipt(at, 1000 + at, 5, "b:2 cuda", pairs=30) for at in range(10, 110, 10)]
    late = [receipt(500, 9000, 10, "a:1 cuda")]
    found = timeline([*busy, *idle, *late, receipt(600, 9000, 0, "", reused=100)])
    assert found is not None
    assert [one["name"] for one in found["actors"]] == ["a:1 · cuda", "b:2 · cuda"]
    assert [one["idle_share"] for one in found["actors"]] == [0.0, pytest.approx(1 - 50 / 95, abs=1e-3)]
    assert [gap["seconds"] for gap in found["gaps"]] == [9000 - 10 - 1100] and found["seconds"] == 110
    assert (found["reused_units"], found["reused_pairs"]) == (1, 100)
    widths = [stop - start for start, stop in zip(found["edges"][::2], found["edges"][1::2], strict=True)]
    seconds = [110 * width / sum(widths) for width in widths]
    assert sum(rate * one for rate, one in zip(found["rate"], seconds, strict=True)) == pytest.approx(1400, rel=0.01)
    assert timeline([receipt(1, 5, 1, "")]) is None and timeline([]) is None


def test_time_of_very_many_resumes_is_still_drawn() -> None:
    found = timeline([receipt(at, 5 + 700 * at, 2, "a:1 cpu") for at in range(90)])
    assert found is not None and len(found["rate"]) == 96 and found["gap_marks"] == []
    assert timeline([receipt(1, 5, 0.0, "a:1 cpu")]) is not None


def test_a_page_stays_small_whatever_the_output(output: Path, tmp_path: Path) -> None:
    content = told(output)
    seeded = random.Random(0)
    many = [receipt(n, seeded.randrange(80_000), 30, f"{'host' * 15}{n % 2000}:1 cuda") for n in range(20_000)]
    content["time"] = timeline(many)
    assert content["time"]["others"] == 2000 - 32
    worst = "\u202e\x01<&\"'" * 120
    for one in content["movers"]["rows"]:
        one.update(
            {name: {"start": worst[:most], "characters": 10**9} for name, most in (("query", 300), ("text", 700))}
        )
        one.update({name: {"start": worst[:200], "characters": 10**6} for name in ("query_id", "doc_id")})
    content["failures"]["engine"] = [{"cause": worst[:400], "rows": 9, "query_id": worst[:200], "doc_id": "d"}] * 12
    html = page(json.dumps(content).encode())
    assert len(html) < 2**20 and b"\x01" not in html and "\u202e".encode() not in html


def test_a_unit_with_hostile_and_huge_ids_makes_a_small_report(tmp_path: Path) -> None:
    rows = [
        {**row, "doc_id": row["doc_id"] + "\x1b<b>" * 5000, "text": row["text"] * 9000} for row in candidate_rows(2, 9)
    ]
    write(tmp_path / "in/0.parquet", rows)
    run(job(tmp_path / "in", tmp_path / "out"), local=True)
    assert (tmp_path / "out/_report/report.html").stat().st_size < 200_000
    assert told(tmp_path / "out")["movers"]["rows"][0]["doc_id"]["characters"] > 20_000


@pytest.mark.parametrize("least, most", [(-8.0, 8.0), (0.3, 0.9), (-3.0, -3.0), (0.0, 0.0), (1e-6, 2e-6), (-1e9, 5.0)])
def test_a_histogram_loses_no_score(least: float, most: float) -> None:
    import numpy as np

    values = np.random.default_rng(0).uniform(least, most, 5000).astype(np.float32)
    bins, counts = np.unique(SCORES.of(values), return_counts=True)
    shape = Shape(
        scores=dict(zip(bins.tolist(), counts.tolist(), strict=True)),
        count=5000,
        total=float(values.sum(dtype=np.float64)),
        squares=float((values.astype(np.float64) ** 2).sum()),
        least=float(values.min()),
        most=float(values.max()),
    )
    found = scores_of(shape, None)
    assert found is not None and sum(found["counts"]) == pytest.approx(5000, abs=0.5)
    assert found["low"] <= values.max() and found["low"] + found["width"] * len(found["counts"]) >= found["median"]
    assert len(found["counts"]) <= 60


def test_what_nobody_sees_is_shown() -> None:
    assert shown("a\u202e<b>\x00\n\ud800") == (
        '<bdi>a<span class="esc">\\u202e</span>&lt;b&gt;<span class="esc">\\x00</span>\n'
        '<span class="esc">\\ud800</span></bdi>'
    )
    assert shown("می\u200cخواهم") == "<bdi>می\u200cخواهم</bdi>"


def test_the_verb_takes_a_job_file(config: JobConfig, tmp_path: Path, cli: Cli) -> None:
    raw = config.model_dump(mode="json", exclude={"limit", "reuse", "gate"})
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(raw))
    assert cli("run", tmp_path / "job.yaml", "--local", "--limit", 3)[0] == 0
    content = asked(cli, tmp_path / "job.yaml", "--limit", 3)
    assert content["counts"]["queries"] == 3 and content["output"].endswith("out-limit-3")
    assert content["movers"]["command"] == f"batch-rerank report {tmp_path / 'job.yaml'} --score-movers"
