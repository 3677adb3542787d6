"""A bench, planned against actual, and budgets: what a run has spent, and where it stops."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import yaml
from conftest import candidate_rows, job, write

from batch_rerank.config import JobConfig
from batch_rerank.errors import BudgetError
from batch_rerank.estimate.rates import Rate, find_rates, shape_of
from batch_rerank.job import actual
from batch_rerank.job.ahead import plan_job
from batch_rerank.job.bench import bench
from batch_rerank.job.estimate import estimate
from batch_rerank.job.run import run
from batch_rerank.store.filesystem import locate
from batch_rerank.store.manifest import Manifest
from batch_rerank.store.receipts import Receipt

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def given(tmp_path: Path) -> Path:
    return write(tmp_path / "in.parquet", candidate_rows(20, 20))


def tiny(tmp_path: Path, given: Path, **keys: Any) -> JobConfig:
    """A job with a model that has matrices."""
    directory = tmp_path / "model"
    if not directory.exists():
        checkpoints.xlmr_reranker(directory)
    return job(given, tmp_path / "out", model__name=str(directory), model__kind="auto", **keys)


def as_file(config: JobConfig, path: Path, **more: Any) -> Path:
    path.write_text(yaml.safe_dump({**config.model_dump(exclude={"limit"}), **more}))
    return path


@pytest.mark.usefixtures("one_thread")
def test_a_bench_is_what_the_next_plan_goes_by(tmp_path: Path, given: Path, cli: Cli) -> None:
    config = tiny(tmp_path, given)
    file = as_file(config, tmp_path / "job.yaml")
    code, out, said = cli("bench", file, "--local", "--seconds", "1", "--json")
    found = json.loads(out)
    assert code == 0 and "rate  " in said and "the best" in said
    assert found["busy"] <= found["seconds"] and found["flop"] > 0 < found["matrix_flop"]
    assert 0 < found["share_of_matrix_rate"] < 1 and found["best_budget"] in map(int, found["budgets"])
    assert found["written"] == f"{tmp_path}/out-bench.json"
    assert not (tmp_path / "out").exists(), "no score is written"
    code, out, said = cli("plan", file, "--local", "--json", "--deadline", "6h")
    plan = json.loads(out)
    assert code == 0 and f"rate        of bench {plan['estimate']['rate']['at']}" in said
    assert plan["estimate"]["rate"]["from"] == found["written"]
    pace = found["flop"] / found["busy"]
    assert plan["estimate"]["actor_seconds"]["p50"] == pytest.approx(plan["estimate"]["flop"] / pace, rel=1e-3)
    assert plan["estimate"]["seconds"]["p50"] > plan["estimate"]["actor_seconds"]["p50"]
    assert plan["deadline"]["actors_p90"] == 1 and plan["estimate"]["gpu_hours"] == 0


@pytest.mark.slow
def test_a_bench_on_ray_has_the_rates_of_an_actor(tmp_path: Path, given: Path, local_ray: None) -> None:
    config = job(given, tmp_path / "out")
    found = bench(config, seconds=1)
    assert found["pairs"] > 0 and found["startup_seconds"] > 0 and found["budgets"] == {}
    ahead = plan_job(config)
    assert ahead.model is not None
    (known,) = find_rates(config, ahead.model, local=False)
    assert (known.rate.source, known.rate.local, known.rate.device) == ("bench", False, "cpu")


def test_a_run_is_held_against_its_plan_and_feeds_the_next(tmp_path: Path, given: Path, cli: Cli) -> None:
    config = job(given, tmp_path / "out")
    file = as_file(config, tmp_path / "job.yaml")
    code, out, said = cli("run", file, "--local", "--json")
    held = json.loads(out)["held"]
    assert code == 0 and "planned: unknown" in said
    assert held == json.loads((tmp_path / "out/_manifest/actual.json").read_text())
    assert held["planned"]["seconds"] is None and held["planned"]["pairs"] == held["actual"]["pairs"] == 400
    assert held["actual"]["tokens"] == held["planned"]["tokens"]
    assert held["rate"]["work_per_second"] > 0 and held["rate"]["shape"] == shape_of(plan_job(config).model)  # type: ignore[arg-type]
    # another output, whose job names the first one
    other = as_file(job(given, tmp_path / "second"), tmp_path / "other.yaml", cost={"rates": f"{tmp_path}/o*t"})
    code, out, said = cli("run", other, "--local", "--json")
    again = json.loads(out)["held"]
    assert code == 0 and again["planned"]["rate"]["from"] == f"{tmp_path}/out/_manifest/actual.json"
    assert again["rate"]["predicted_seconds"] == pytest.approx(again["planned"]["seconds"]["p50"], rel=1e-4)
    assert "took " in said and "planned " in said and "unknown" not in said
    # and a third plan prints the error of the second
    third = as_file(job(given, tmp_path / "third"), tmp_path / "third.yaml", cost={"rates": [f"{tmp_path}/second"]})
    code, _, said = cli("plan", third, "--local")
    assert code == 0 and "history     runs against their plans: " in said
    # a finished job that is run again has nothing to say of itself but what it said
    code, out, _ = cli("run", other, "--local", "--json")
    assert json.loads(out)["held"] == again


def receipt(number: int, seconds: float, flop: float) -> Receipt:
    return Receipt(f"{number:05d}", "f", "p", 1, "s", rows_in=10, tokens=100, seconds=seconds, flop=flop, scorer="a")


def test_what_made_the_difference_adds_up(tmp_path: Path, given: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock of the test's own: 10 s of start for 4 planned, half the rate, 30 % more work, 5 s publishing."""
    config = job(given, tmp_path / "out", cluster__actors=2)
    ahead = plan_job(config)
    assert ahead.model is not None
    rate = Rate(shape_of(ahead.model), "float32", "cpu", 1.0, utilisation=1.0, startup_seconds=4.0, source="bench")
    (tmp_path / "out-bench.json").write_text(json.dumps({"rate": rate.__dict__}))
    planned = estimate(ahead.config, ahead.plan, ahead.model)
    took = planned.forecast.seconds
    assert planned.tally is not None and took is not None
    clock = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    course = actual.Course()
    course.begin(2)
    work = planned.tally.computed_tokens.p50 * 1.3
    each = work / 10
    for number in range(10):
        clock = 1010.0 + (number // 2 + 1) * each / 0.5  # two side by side, at half the rate
        course.add(receipt(number, each / 0.5, each))
    clock += 5
    course.published = clock
    told = actual.compare(planned, course, ahead.model, 0.0, local=True)
    assert course.startup == pytest.approx(10) and course.publishing == 5 and course.utilisation == pytest.approx(1)
    named = {line.rsplit(": ", 1)[0]: float(line.rsplit(": ", 1)[1].removesuffix(" s")) for line in told["reasons"]}
    assert next(
        value for name, value in named.items() if name.startswith("the rate of scoring -50.0%")
    ) == pytest.approx(work / 2, rel=0.01)
    assert next(value for name, value in named.items() if name == "work +30.0%") == pytest.approx(
        work * 0.3 / 1.3 / 2, rel=0.01
    )
    off = told["actual"]["seconds"] - took.p50
    unsaid = 10 - 4 + 5 - planned.forecast.publishing - planned.forecast.tail
    assert sum(named.values()) == pytest.approx(off, abs=abs(unsaid) + 1)
    assert told["rate"]["work_per_second"] == pytest.approx(0.5)


# ---- budgets


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """What a unit costs: the budget's clock goes by so many seconds whenever it is read."""
    step, now = [36.0], [0.0]

    def tick() -> float:
        now[0] += step[0]
        return now[0]

    class Clock:
        monotonic = staticmethod(tick)

    monkeypatch.setattr("batch_rerank.job.spend.time", Clock)
    yield step


def test_a_run_stops_at_a_units_border_and_goes_on(tmp_path: Path, given: Path, cli: Cli, seconds: list[float]) -> None:
    config = job(given, tmp_path / "out", cluster__gpus_per_actor=1, cluster__cpus_per_actor=1)
    cost = {"usd_per_gpu_hour": 100, "max_usd": 3}
    file = as_file(config, tmp_path / "job.yaml", cost=cost)
    code, _, said = cli("run", file, "--local")
    assert code == 8 and "GPU hours, 3.00 USD are spent, and 7 units are left" in said and "cost.max_usd: 3" in said
    assert not (tmp_path / "out/_SUCCESS").exists() and not list((tmp_path / "out").glob("part-*"))
    status = json.loads((tmp_path / "out/_manifest/status.json").read_text())
    assert (status["state"], status["exit_code"], status["totals"]["units"]) == ("failed", 8, 3)
    spent = status["totals"]["gpu_seconds"]
    assert spent == 4 * 36  # of a budget of 108, and a tick of the clock until the end: a unit above at most
    code, _, said = cli("run", file, "--local")
    assert code == 8 and "7 units are left" in said, "a second run does not begin another one"
    assert json.loads((tmp_path / "out/_manifest/status.json").read_text())["totals"]["gpu_seconds"] == spent
    code, out, said = cli("run", file, "--local", "--json", "--set", "cost.max_usd=300")
    told = json.loads(out)
    assert code == 0 and told["resumed_units"] == 3 and told["units"] == 7
    assert (
        told["totals"]["gpu_seconds"] >= spent + 7 * 36
        and told["held"]["actual"]["gpu_hours"] < told["totals"]["gpu_seconds"] / 3600
    )
    whole = job(given, tmp_path / "whole")
    run(whole, local=True)
    parts = [sorted(path.glob("part-*.parquet")) for path in (tmp_path / "out", tmp_path / "whole")]
    rows = [[json.loads(line) for one in some for line in _rows(one)] for some in parts]
    assert rows[0] == rows[1]


def _rows(path: Path) -> list[str]:
    import pyarrow.parquet as pq

    return [json.dumps(row) for row in pq.read_table(path).to_pylist()]


def test_a_budget_that_the_last_unit_reaches_costs_no_output(tmp_path: Path, given: Path, seconds: list[float]) -> None:
    seconds[0] = 1.0
    keys = {"cluster__gpus_per_actor": 1, "cluster__cpus_per_actor": 1, "cost__max_gpu_hours": 10 / 3600}
    summary = run(job(given, tmp_path / "out", **keys), local=True)
    assert summary.totals.units == 10 and summary.totals.gpu_seconds >= 10


def test_a_plan_that_needs_more_is_refused_before_anything_is_taken(tmp_path: Path, given: Path, cli: Cli) -> None:
    keys = {"cluster__gpus_per_actor": 1, "cluster__cpus_per_actor": 1}
    config = job(given, tmp_path / "out", **keys)
    ahead = plan_job(config)
    assert ahead.model is not None
    rate = Rate(shape_of(ahead.model), "float32", "cuda", 1.0, source="bench", local=True, startup_seconds=60)
    (tmp_path / "out-bench.json").write_text(json.dumps({"rate": rate.__dict__}))
    cost = {"usd_per_gpu_hour": 3600, "max_usd": 100}
    file = as_file(config, tmp_path / "job.yaml", cost=cost)
    for verb in ("plan", "run"):
        code, _, said = cli(verb, file, "--local", "--json")
        assert code == 8 and "the plan needs" in said and "expected at most cost.max_usd: 100" in said
        assert not list((tmp_path / "out").glob("_work/*"))
    told = cli("plan", file, "--local", "--json")[1]
    assert json.loads(told)["exit_code"] == 8 and json.loads(told)["estimate"]["usd"]["p50"] > 100
    cost = {"max_gpu_hours": 1e6}
    code, _, _ = cli("run", as_file(config, tmp_path / "job.yaml", cost=cost), "--local")
    assert code == 0


def test_what_earlier_runs_have_spent_counts(tmp_path: Path, given: Path) -> None:
    config = job(given, tmp_path / "out", cluster__gpus_per_actor=1, cluster__cpus_per_actor=1)
    manifest = Manifest(locate(config.output.path, {}))
    manifest.write_status({"state": "failed", "totals": {"gpu_seconds": 7200.0}})
    limited = job(
        given, tmp_path / "out", cluster__gpus_per_actor=1, cluster__cpus_per_actor=1, cost__max_gpu_hours=1.5
    )
    with pytest.raises(BudgetError, match=r"2 GPU hours are spent, and 10 units are left"):
        run(limited, local=True)
    manifest.write_status({"state": "failed", "totals": {"gpu_seconds": -3}})  # not ours: as if nothing were spent
    assert run(limited, local=True).totals.units == 10


def test_a_rate_that_cannot_be_read_is_named(tmp_path: Path, given: Path, cli: Cli) -> None:
    (tmp_path / "out-bench.json").write_text("{")
    (tmp_path / "bad.json").write_text('{"rate": {"shape": 3}}')
    file = as_file(job(given, tmp_path / "out"), tmp_path / "job.yaml", cost={"rates": [f"{tmp_path}/b*.json"]})
    code, _, said = cli("plan", file, "--local")
    assert code == 0 and said.count("no rate can be read from it") == 2 and "time        unknown" in said


def test_a_unit_that_cannot_be_encoded_is_set_aside_as_ever(
    tmp_path: Path, given: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    """What a plan stumbles over is the run's to deal with."""
    from batch_rerank.engine.encoded import Encoded, Group
    from batch_rerank.engine.encoding import ByteEncoder

    plain = ByteEncoder.encode

    def encode(self: ByteEncoder, groups: list[Group]) -> Encoded:
        if any(group.query.endswith(" 3") for group in groups):
            raise RuntimeError("cannot encode this")
        return plain(self, groups)

    monkeypatch.setattr(ByteEncoder, "encode", encode)
    file = as_file(job(given, tmp_path / "out"), tmp_path / "job.yaml")
    code, _, said = cli("run", file, "--local")
    assert code == 1 and "could not be estimated: cannot encode this" in said and "1 of 10 units did not finish" in said
    assert json.loads((tmp_path / "out/_manifest/status.json").read_text())["totals"]["units"] == 9


def test_a_publication_forgets_neither_what_was_spent_nor_the_rate(
    tmp_path: Path, given: Path, cli: Cli, seconds: list[float]
) -> None:
    config = job(given, tmp_path / "out", cluster__gpus_per_actor=1, cluster__cpus_per_actor=1)
    file = as_file(config, tmp_path / "job.yaml")
    code, out, _ = cli("run", file, "--local", "--json")
    spent = json.loads(out)["totals"]["gpu_seconds"]
    record = tmp_path / "out/_manifest/actual.json"
    said = record.read_bytes()
    assert code == 0 and spent > 0 and json.loads(said)["rate"]["work_per_second"] > 0

    def kept() -> float:
        status = json.loads((tmp_path / "out/_manifest/status.json").read_text())
        return float(status["totals"]["gpu_seconds"])

    assert cli("publish", file, "--local", "--set", "output.top_k=3")[0] == 0
    assert kept() == spent and record.read_bytes() == said
    code, out, _ = cli("run", file, "--local", "--json", "--set", "output.top_k=3")
    assert code == 0 and json.loads(out)["totals"]["gpu_seconds"] == spent, "a finished job"
    (tmp_path / "out/_SUCCESS").unlink()
    code, out, _ = cli("run", file, "--local", "--json", "--set", "output.top_k=3")
    assert code == 0 and json.loads(out)["units"] == 0 and kept() == spent
    assert record.read_bytes() == said and json.loads(out)["held"] == json.loads(said)
