"""Plans, budgets and comparisons where they were wrong without a word: none, one, twice, interrupted, resumed."""

import datetime
import json
import math
import time
import zoneinfo
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import yaml
from checkpoints import bert_reranker
from conftest import candidate_rows, job, nested, scored_only, write
from test_estimate import gpu_job, whole

from batch_rerank.config import JobConfig
from batch_rerank.engine.work import Arithmetic
from batch_rerank.estimate.forecast import forecast
from batch_rerank.estimate.ranges import totals
from batch_rerank.estimate.rates import Known, Rate, find_rates, shape_of
from batch_rerank.estimate.sample import Budget
from batch_rerank.job import actual
from batch_rerank.job.ahead import plan_job
from batch_rerank.job.bench import bench
from batch_rerank.job.estimate import deadline_seconds, estimate
from batch_rerank.job.run import run
from batch_rerank.job.spend import Spend
from batch_rerank.score.plan import configured_model
from batch_rerank.store.receipts import Totals

Cli = Callable[..., tuple[int, str, str]]
LITTLE = Budget(text=1, read=float("inf"), least=2, most=3)


@pytest.fixture
def given(tmp_path: Path) -> Path:
    return write(tmp_path / "in.parquet", candidate_rows(20, 20))


def rate_for(config: JobConfig, path: Path, **more: Any) -> None:
    """A bench beside an output."""
    ahead = plan_job(config, local=True)
    assert ahead.model is not None
    given = {"work_per_second": 1e4, "local": True, "source": "bench", **more}
    rate = Rate(shape_of(ahead.model), ahead.model.dtype, ahead.config.cluster.device, **given)
    Path(f"{path}-bench.json").write_text(json.dumps({"rate": rate.__dict__}))


# ---- what GPUs have cost


def gpus(path: Path) -> JobConfig:
    return job(path, path.parent / "out", cluster__gpus_per_actor=0.5, cluster__cpus_per_actor=1)


def test_a_second_pass_does_not_forget_what_the_first_has_cost(given: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, counted = 0.0, Totals(gpu_seconds=7.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    spend = Spend(gpus(given), counted)
    spend.begin(4)
    clock = 100.0
    spend.begin(2)  # units that were set aside together are tried alone
    clock = 110.0
    spend.end()
    assert counted.gpu_seconds == 7 + 4 * 0.5 * 100 + 2 * 0.5 * 10


def test_an_interrupted_run_has_cost_what_it_held(tmp_path: Path, given: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    monkeypatch.setattr("batch_rerank.job.spend.time", type("Clock", (), {"monotonic": lambda: clock}))

    def interrupted(*given: Any) -> Any:
        nonlocal clock
        given[-1](1)
        clock = 500.0
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr("batch_rerank.job.run.score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(gpus(given), local=True)
    status = json.loads((tmp_path / "out/_manifest/status.json").read_text())
    assert (status["state"], status["totals"]["gpu_seconds"]) == ("interrupted", 250)


# ---- none and one


@pytest.mark.parametrize(("y", "x"), [([[3.0]], [10.0]), ([[3.0], [0.0]], [10.0, 0.0]), ([[0.0], [0.0]], [0.0, 0.0])])
def test_clusters_with_nothing_to_compare_give_numbers(y: Any, x: Any) -> None:
    (one,) = totals(np.array(y), np.array(x), sum(x), 2, corrected=False)
    assert all(math.isfinite(value) for value in (one.low, one.p50, one.p90, one.high))
    assert 0 <= one.low <= one.p50 <= one.p90 <= one.high


def test_one_large_unit_is_read_whole(tmp_path: Path, given: Path) -> None:
    ahead = plan_job(job(given, tmp_path / "out", input__unit_pairs=1000), local=True)
    assert ahead.model is not None and len(ahead.plan.units) == 1
    found = estimate(ahead.config, ahead.plan, ahead.model, budget=LITTLE, local=True).tally
    assert found is not None and found.exact and found.tokens.p50 > 0


def test_units_without_a_pair_are_sampled_as_others(tmp_path: Path) -> None:
    empty: list[dict[str, Any]] = [{"query_id": f"e{at}", "query": "what", "candidates": []} for at in range(3)]
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = pa.list_(pa.struct([("doc_id", pa.string()), ("text", pa.string())]))
    schema = pa.schema([("query_id", pa.string()), ("query", pa.string()), ("candidates", kind)])
    paths = [tmp_path / "nested" / f"{name}.parquet" for name in "abc"]
    paths[0].parent.mkdir()
    rows = nested(candidate_rows(2, 20))
    rows = [
        {**row, "candidates": [{k: one[k] for k in ("doc_id", "text")} for one in row["candidates"]]} for row in rows
    ]
    for path, some in zip(paths, (rows, empty[:2], empty[2:]), strict=True):
        pq.write_table(pa.Table.from_pylist(some, schema), path)
    ahead = plan_job(job(paths[0].parent, tmp_path / "other", input__layout="nested"), local=True)
    assert ahead.model is not None and [unit.pairs for unit in ahead.plan.units] == [40, 0, 0]
    for seed in range(6):
        found = estimate(ahead.config, ahead.plan, ahead.model, budget=LITTLE, seed=seed, local=True)
        json.dumps(found.json(), allow_nan=False)


def test_a_comparison_with_a_plan_of_no_time_is_said() -> None:
    value = {"planned": {"seconds": 0.0}, "actual": {"seconds": 1.5}, "reasons": []}
    assert actual.said(value).startswith("took 1.5 s, planned 0.0 s")


def test_a_comparison_that_fails_costs_no_finished_job(
    tmp_path: Path, given: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def compare(*given: Any, **more: Any) -> Any:
        raise ZeroDivisionError("none")

    monkeypatch.setattr(actual, "compare", compare)
    summary = run(job(given, tmp_path / "out"), local=True)
    assert summary.totals.units == 10 and summary.held is None and (tmp_path / "out/_SUCCESS").exists()
    assert json.loads((tmp_path / "out/_manifest/status.json").read_text())["state"] == "done"
    assert "could not be held against its plan" in caplog.text


# ---- rates


@pytest.mark.usefixtures("one_thread")
def test_a_bench_of_one_unit_has_a_rate_also_of_a_model_that_remembers_texts(tmp_path: Path, given: Path) -> None:
    model = str(checkpoints.bert_embedding(tmp_path / "m"))
    config = job(given, tmp_path / "out", model__name=model, model__kind="auto", input__unit_pairs=1000)
    found = bench(config, local=True, seconds=0.01)
    assert found["units"] == 1 and found["flop"] > 0
    assert json.loads((tmp_path / "out-bench.json").read_text())["rate"]["work_per_second"] > 0


@pytest.mark.usefixtures("one_thread")
def test_a_driver_without_the_weights_compares_tokens_with_tokens(
    tmp_path: Path, given: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot know the matrices; the actors, which have the weights, count them."""
    model = str(checkpoints.xlmr_reranker(tmp_path / "m"))
    config = job(given, tmp_path / "out", model__name=model, model__kind="auto")
    ahead = plan_job(config, local=True)
    assert ahead.model is not None
    whole_rate = Arithmetic.of(ahead.model)
    monkeypatch.setattr("batch_rerank.engine.work.matrix_parameters", lambda directory: 0)
    blind = Arithmetic.of(ahead.model)
    assert blind.per_token == 0 < whole_rate.per_token and blind.of_texts(np.array([5])).flop == 0
    monkeypatch.setattr("batch_rerank.score.steps.Arithmetic.of", lambda spec: whole_rate)
    with monkeypatch.context() as patch:
        patch.setattr("batch_rerank.estimate.count.Arithmetic.of", lambda spec: blind)
        patch.setattr("batch_rerank.job.run.knows_flop", lambda model: False)
        held = run(config, local=True).held
    assert held is not None
    actually = held["actual"]
    expected = actually["computed_tokens"] / actually["actor_seconds"]
    assert held["rate"]["work_per_second"] == pytest.approx(expected, rel=0.02)


def test_a_rate_of_other_threads_is_passed_over(tmp_path: Path, given: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = job(given, tmp_path / "out", cluster__cpus_per_actor=1)
    ahead = plan_job(config, local=True)
    assert ahead.model is not None
    for threads, known in ((8, False), (1, True), (0, True)):
        rate_for(config, tmp_path / "out", threads=threads)
        found = estimate(ahead.config, ahead.plan, ahead.model, local=True)
        assert (found.forecast.seconds is not None) == known
    caplog.clear()
    rate_for(config, tmp_path / "out", threads=8)
    with caplog.at_level("INFO"):
        estimate(ahead.config, ahead.plan, ahead.model, local=True)
    assert "of actors with 8 threads" in caplog.text


def test_a_sample_runs_bench_serves_the_whole(tmp_path: Path, given: Path) -> None:
    rate_for(job(given, tmp_path / "out"), tmp_path / "out")
    raw = job(given, f"{tmp_path}/out-limit-3")
    ahead = plan_job(raw.model_copy(update={"limit": 3}), local=True)
    assert ahead.model is not None
    assert estimate(ahead.config, ahead.plan, ahead.model, local=True).forecast.seconds is not None


def test_other_numbers_of_actors_have_their_own_tail() -> None:
    rate = Rate("s", "float32", "cuda", 100.0, startup_seconds=3)
    by_one, by_four = (forecast(gpu_job(), whole(40_000), [Known(rate, "")], actors) for actors in (1, 4))
    for one, other in ((by_one.with_actors(4), by_four), (by_four.with_actors(1), by_one)):
        assert one.seconds is not None and other.seconds is not None
        assert one.tail == other.tail and one.seconds.p50 == pytest.approx(other.seconds.p50)


def test_a_resumed_run_publishes_all(tmp_path: Path, given: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is planned of it, and the rate that it finds, are of the whole output."""
    one = forecast(gpu_job(), whole(1000), [Known(Rate("s", "float32", "cuda", 1.0), "")], 1, published=700_000)
    assert one.publishing == pytest.approx(10)
    clock = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    config = job(given, tmp_path / "out")
    ahead = plan_job(config, local=True)
    assert ahead.model is not None
    course = actual.Course(pairs=10, first=1.0, last=2.0, busy=1.0, work=5.0)
    course.published, course.published_rows = 4.0, 4000
    planned = estimate(ahead.config, replace(ahead.plan, units=ahead.plan.units[:1]), ahead.model, local=True)
    told = actual.compare(planned, course, ahead.model, 0.0, local=True)
    assert told["rate"]["publish_rows_per_second"] == 2000


def test_a_plan_is_of_what_is_left(tmp_path: Path, given: Path, cli: Cli) -> None:
    config = job(given, tmp_path / "out", cluster__gpus_per_actor=0)
    rate_for(config, tmp_path / "out")
    (file := tmp_path / "job.yaml").write_text(yaml.safe_dump(config.model_dump(exclude={"limit"})))

    def planned() -> tuple[dict[str, Any], str]:
        code, out, said = cli("plan", file, "--local", "--exact", "--json")
        assert code == 0, said
        return json.loads(out), said

    whole, said = planned()
    assert whole["done_units"] == 0 and "already" not in said
    scored_only(config)
    lost = [unit[0] for unit in whole["units"][:2]]
    for unit in lost:
        (tmp_path / f"out/_manifest/receipts/{unit}.json").unlink()
    rest, said = planned()
    assert rest["done_units"] == len(whole["units"]) - 2 and "scored already; what follows is the rest" in said
    pairs = sum(unit[5] for unit in whole["units"][:2])
    assert rest["estimate"]["pairs"] == pairs < whole["estimate"]["pairs"]
    assert rest["estimate"]["publish_seconds"] == whole["estimate"]["publish_seconds"], "all is published"
    run(config, local=True)
    nothing, said = planned()
    assert "already and published" in said and "nothing is left to score" in said
    assert nothing["estimate"]["seconds"] == nothing["estimate"]["tokens"] == nothing["estimate"]["pairs"] == 0


# ---- clocks


@pytest.mark.parametrize(
    ("now", "text", "hours"),
    [
        ("2026-03-28T22:00", "06:00", 7),
        ("2026-10-24T22:00", "06:00", 9),
        ("2026-10-24T22:00", "2026-10-25T06:00", 9),
        ("2026-03-28T22:00", "2026-03-29T06:00+02:00", 7),
    ],
)
def test_a_clock_time_over_a_change_of_clocks(now: str, text: str, hours: float) -> None:
    zone = zoneinfo.ZoneInfo("Europe/Berlin")
    begun = datetime.datetime.fromisoformat(now).replace(tzinfo=zone)
    assert deadline_seconds(text, begun) == hours * 3600


def test_a_clock_time_is_this_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        assert deadline_seconds("06:00", datetime.datetime(2026, 3, 28, 22)) == 7 * 3600
    finally:
        monkeypatch.undo()
        time.tzset()


# ---- places


def test_a_bench_that_cannot_be_written_does_not_begin(
    tmp_path: Path, given: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from batch_rerank.job import bench as module

    (tmp_path / "out-bench.json").mkdir()
    config = job(given, tmp_path / "out", cluster__gpus_per_actor=0)
    (file := tmp_path / "job.yaml").write_text(yaml.safe_dump(config.model_dump(exclude={"limit"})))
    monkeypatch.setattr(module, "measure", lambda *_: pytest.fail("a minute is spent"))
    code, _, said = cli("bench", file, "--local")
    assert code == 6 and "out-bench.json" in said


@pytest.mark.parametrize(
    ("card", "accelerator", "same"),
    [
        ("NVIDIA H100 80GB HBM3", "H100", True),
        ("NVIDIA A100-SXM4-80GB", "A100", True),
        ("NVIDIA A100-SXM4-80GB", "A100-80G", True),
        ("NVIDIA A100-SXM4-80GB", "A100-40G", False),
        ("NVIDIA A100-SXM4-80GB", "A10", False),
        ("NVIDIA L40S", "L40", False),
        ("NVIDIA L4", "L4", True),
        ("Tesla T4", "T4", True),
        ("AMD Instinct MI300X", "AMD-Instinct-MI300X-OAM", True),
        ("AMD Instinct MI250X", "AMD-Instinct-MI300X-OAM", False),
        ("", "L4", True),  # of a run on any GPU
    ],
)
def test_a_rate_of_another_card_is_not_this_jobs(
    card: str, accelerator: str, same: bool, given: Path, tmp_path: Path, logged: list[str]
) -> None:
    keys = {"cluster__gpus_per_actor": 1, "cluster__cpus_per_actor": 1, "cluster__accelerator_type": accelerator}
    config = job(given, tmp_path / "out", **keys)
    model = configured_model(config)
    rate = Rate(shape_of(model), model.dtype, "cuda", 1e4, card=card, source="bench")
    (tmp_path / "out-bench.json").write_text(json.dumps({"rate": rate.__dict__}))
    assert bool(find_rates(config, model, local=False)) == same
    assert any(f"these are {accelerator}; passed over" in line for line in logged) != same


def test_what_no_sampled_unit_computes_the_rest_may(tmp_path: Path) -> None:
    """A night that reuses all of its sample: its FLOP were exactly 0, so any budget and any deadline held."""
    model = bert_reranker(tmp_path / "model")
    given = write(tmp_path / "in.parquet", candidate_rows(200, 4), row_group_size=40)
    keys = {"model__name": str(model), "model__kind": "auto", "model__max_length": 64, "input__unit_pairs": 8}
    run(job(given, tmp_path / "first", **keys), local=True)
    config = job(given, tmp_path / "second", reuse__from=str(tmp_path / "first"), **keys)
    ahead = plan_job(config, local=True)
    assert ahead.model is not None and ahead.earlier is not None
    rate_for(config, tmp_path / "second", work_per_second=1e9)
    budget = Budget(text=1, read=float("inf"), least=10, most=10)
    found = estimate(ahead.config, ahead.plan, ahead.model, budget=budget, reuse=ahead.earlier.reuse, local=True)
    assert found.tally is not None and found.forecast.seconds is not None
    flop, all_of_it = found.tally.flop, found.tally.tokens.p50 * Arithmetic.of(ahead.model).per_token
    assert (found.tally.reused.p50, found.tally.reused.high) == (800, 800)
    assert flop.p50 == 0 and 0.1 * all_of_it < flop.p90 < flop.high < 0.5 * all_of_it
    assert found.forecast.seconds.p50 < found.forecast.seconds.p90 < found.forecast.seconds.high


def test_batch_sizes_are_tried_no_longer_than_asked(tmp_path: Path) -> None:
    """Each was tried on a whole unit, however long one takes: 154 s of `--seconds 5`. The job's own comes first."""
    model = bert_reranker(tmp_path / "model")
    given = write(tmp_path / "in.parquet", candidate_rows(4, 4))
    config = job(given, tmp_path / "out", model__name=str(model), model__kind="auto", model__max_length=64)
    budgets = bench(config, local=True, seconds=1e-9)["budgets"]
    assert len(budgets) == 1
    assert set(bench(config, local=True, seconds=1)["budgets"]) > set(budgets)
