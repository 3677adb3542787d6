"""A plan's estimate against what a run counts, its intervals against the truth, deadlines, and bad input."""

import datetime
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import yaml
from conftest import Row, candidate_rows, job, nested, write

from batch_rerank.config import JobConfig, parse_config
from batch_rerank.errors import ConfigError
from batch_rerank.estimate import tally as tally_module
from batch_rerank.estimate.count import Counted, count_units
from batch_rerank.estimate.forecast import Forecast, forecast
from batch_rerank.estimate.ranges import Range, distinct, student
from batch_rerank.estimate.rates import Known, Rate
from batch_rerank.estimate.sample import ALL, Budget, Sample, choose
from batch_rerank.estimate.tally import Tally, tally
from batch_rerank.job.ahead import plan_job
from batch_rerank.job.estimate import deadline_seconds, estimate
from batch_rerank.job.run import run
from batch_rerank.score.plan import make_plan
from batch_rerank.store.plans import Unit

Cli = Callable[..., tuple[int, str, str]]


def odd_rows(queries: int = 12, candidates: int = 9) -> list[Row]:
    """Repeats, texts that are cut, null and empty ones, and a query without a text."""
    rows = candidate_rows(queries, candidates)
    for at, row in enumerate(rows):
        if at % 11 == 3:
            row["text"] = f"{row['doc_id']} " + "long words and more of them " * 30
        if at % 13 == 5:
            row["text"] = ""
        if at % 17 == 7:
            row["text"] = None
        if row["query_id"] == "q5":
            row["query"] = None
    rows[3]["text"] = rows[2]["text"] = rows[1]["text"]
    return rows


BUILDERS: dict[str, Callable[[Path], Path]] = {
    "causal": checkpoints.qwen3_reranker,
    "cross-encoder": checkpoints.xlmr_reranker,
    "decoder with a head": checkpoints.qwen3_seq_cls,
    "bi-encoder": checkpoints.bert_embedding,
}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", [*BUILDERS, "checksum", "chunks"])
def test_an_exact_plan_is_what_the_run_counts(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "in.parquet", nested(odd_rows()), row_group_size=5)
    keys: dict[str, Any] = {"input__layout": "nested", "input__unit_pairs": 30, "scoring__max_failed_rows": 1}
    if kind in BUILDERS:
        template = {"model__template": "qwen3-reranker"} if kind == "decoder with a head" else {}
        keys |= {"model__name": str(BUILDERS[kind](tmp_path / "m")), "model__kind": "auto", **template}
    keys["model__max_length"] = 300 if kind in ("checksum", "chunks") else 120
    if kind == "chunks":
        keys |= {"scoring__long_documents": "chunk", "scoring__chunk_overlap": 20}
    config = job(path, tmp_path / "out", **keys)
    ahead = plan_job(config, local=True)
    assert ahead.model is not None
    found = estimate(ahead.config, ahead.plan, ahead.model, budget=ALL, local=True).tally
    totals = run(config, local=True).totals
    assert found is not None and found.exact
    told = (found.pairs, found.scored, found.failed, found.tokens, found.truncated, found.computed_tokens)
    counted = (totals.rows_in, totals.scored, totals.failed, totals.tokens, totals.truncated, totals.computed_tokens)
    assert [one if isinstance(one, int) else one.p50 for one in told] == list(counted)
    assert all(one.certain for one in told if isinstance(one, Range))
    assert found.flop.p50 == pytest.approx(totals.flop, rel=1e-6)
    assert (totals.flop > 0) == (kind in BUILDERS)
    assert totals.truncated or kind == "chunks"
    texts = {row["text"] for row in odd_rows() if row["text"] is not None and row["query"] is not None}
    assert found.documents.p50 == len(texts) and found.repeats.p50 == totals.scored - len(texts)


def test_reused_pairs_are_counted_as_the_run_counts_them(tmp_path: Path) -> None:
    rows = candidate_rows(6, 10)
    run(job(write(tmp_path / "a.parquet", rows), tmp_path / "first"), local=True)
    rows[4]["text"] += "!"
    rows[40]["text"] += "?"
    reuse = {"reuse__from": str(tmp_path / "first"), "reuse__audit": 0}
    config = job(write(tmp_path / "b.parquet", rows), tmp_path / "second", **reuse)
    ahead = plan_job(config, local=True)
    assert ahead.model is not None and ahead.earlier is not None
    found = estimate(ahead.config, ahead.plan, ahead.model, budget=ALL, reuse=ahead.earlier.reuse).tally
    totals = run(config, local=True).totals
    assert found is not None and found.reused.p50 == totals.reused == 58
    assert (found.tokens.p50, found.computed_tokens.p50) == (totals.tokens, totals.computed_tokens)


# ---- samples


def skewed(path: Path, queries: int = 400) -> Path:
    """Lengths that differ from query to query by orders of magnitude, and from place to place."""
    rng = random.Random(0)
    rows = []
    for query in range(queries):
        length = int(rng.lognormvariate(3, 1)) + query // 40
        for document in range(rng.randint(1, 12)):
            text = f"{rng.randrange(3000)} " * rng.randint(1, max(2, length))
            rows.append({"query_id": f"q{query}", "query": f"{query}", "doc_id": f"d{document}", "text": text})
    return write(path, rows, row_group_size=500)


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> tuple[JobConfig, Any, Any, dict[str, Counted]]:
    root = tmp_path_factory.mktemp("skewed")
    config = job(skewed(root / "in.parquet"), root / "out", input__unit_pairs=10, model__max_length=600)
    plan, model = make_plan(config)
    return config, plan, model, {one.unit.id: one for one in count_units(config, model, plan, plan.units)}


def sampled(
    counted: tuple[JobConfig, Any, Any, dict[str, Counted]], seed: int, budget: Budget, monkeypatch: pytest.MonkeyPatch
) -> tuple[Sample, Tally]:
    """A tally of a sample whose units were counted before."""
    config, plan, model, known = counted

    def looked_up(config: Any, model: Any, plan: Any, units: Sequence[Unit], *_: Any) -> Iterator[Counted]:
        return (known[unit.id] for unit in units)

    monkeypatch.setattr(tally_module, "count_units", looked_up)
    sample = choose(plan, seed, budget)
    assert sample is not None
    return sample, tally(config, model, plan, sample, 1)


def test_the_interval_covers_the_truth(counted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    known = counted[3].values()
    truth = {
        "tokens": sum(one.tokens for one in known),
        "truncated": sum(one.truncated for one in known),
        "computed_tokens": sum(one.computed.tokens for one in known),
    }
    assert len(counted[1].units) > 200
    covered, below = dict.fromkeys(truth, 0), 0
    for seed in range(100):
        sample, found = sampled(counted, seed, Budget(text=1, read=float("inf"), least=40, most=60), monkeypatch)
        assert not sample.whole and len(sample.units) == 40
        for name, value in truth.items():
            one: Range = getattr(found, name)
            covered[name] += one.low <= value <= one.high
        below += truth["tokens"] <= found.tokens.p90
    assert min(covered.values()) >= 93, covered
    assert 80 <= below <= 99  # p90 means that


def test_large_row_groups_are_sampled_as_they_are_read(
    counted: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("batch_rerank.estimate.sample.STREAM_BYTES", 1000)
    plan = counted[1]
    size = sum(size for _, size in plan.shards[0].row_groups)
    budget = Budget(text=1, read=size / 2, least=40, most=60)
    truth, covered = sum(one.tokens for one in counted[3].values()), 0
    for seed in range(20):
        sample, found = sampled(counted, seed, budget, monkeypatch)
        assert 1 < len(sample.clusters) < sample.population == len(plan.shards[0].row_groups)
        assert any(len(cluster.units) > 1 for cluster in sample.clusters)
        covered += found.tokens.low <= truth <= found.tokens.high
    assert covered >= 17
    assert choose(plan, 0, Budget(text=1, read=1, least=4, most=8)) is None


def test_large_units_are_counted_in_part(counted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config, _, model, _ = counted
    large = config.model_copy(update={"input": config.input.model_copy(update={"unit_pairs": 500})})
    plan, _ = make_plan(large)
    truth = tally(large, model, plan, choose(plan, 0, ALL), 1)  # type: ignore[arg-type]
    size = sum(size for _, size in plan.shards[0].row_groups)
    covered = 0
    for seed in range(20):
        sample = choose(plan, seed, Budget(text=size / 4, read=float("inf"), least=40, most=60))
        assert sample is not None and len(sample.units) == len(plan.units) and 0.2 < sample.share < 0.3
        found = tally(large, model, plan, sample, 1, seed=seed)
        assert not found.exact and found.pairs == truth.pairs
        covered += found.tokens.low <= truth.tokens.p50 <= found.tokens.high
    assert covered >= 17


def test_a_sample_of_a_free_scorer_has_no_arithmetic(counted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, found = sampled(counted, 0, Budget(text=1, read=float("inf"), least=40, most=60), monkeypatch)
    assert found.flop == Range.exact(0) and found.computed_tokens.p50 > 0
    rate = Known(Rate("s", "float32", "cuda", 100.0), "here")
    one = forecast(gpu_job(), found, [rate], 1)
    assert one.actor_seconds is not None
    assert one.actor_seconds.p50 == pytest.approx(found.computed_tokens.p50 / 100)


def test_the_same_seed_draws_the_same_units(counted: Any) -> None:
    budget = Budget(text=1, read=float("inf"), least=10, most=20)
    drawn = [[unit.id for unit in choose(counted[1], seed, budget).units] for seed in (3, 3, 4)]  # type: ignore[union-attr]
    assert drawn[0] == drawn[1] != drawn[2]


def test_what_is_distinct_is_between_what_was_seen_and_what_would_all_be_new() -> None:
    rng = np.random.default_rng(0)
    pool = [rng.integers(0, 500, 50).astype(np.uint64) for _ in range(200)]
    one = distinct(pool[:20], 10_000)
    assert one.low <= len(np.unique(np.concatenate(pool))) <= one.high and one.low <= one.p50 <= one.p90 <= one.high
    same = distinct([np.zeros(10, np.uint64)] * 4, 400)
    assert same.p50 == same.low == 1
    assert distinct([], 100) == Range.exact(0)
    assert distinct([np.arange(5, dtype=np.uint64)], 5) == Range.exact(5)


@pytest.mark.parametrize(("freedom", "value"), [(3, 3.182), (4, 2.776), (10, 2.228), (39, 2.023), (400, 1.966)])
def test_quantiles_of_students_t(freedom: int, value: float) -> None:
    assert student(0.975, freedom) == pytest.approx(value, rel=0.03 if freedom < 4 else 0.01)


# ---- time and money


def whole(tokens: float, units: int = 10) -> Tally:
    exact, zero = Range.exact, Range.exact(0)
    counts = exact(1000), zero, exact(tokens), zero, zero, exact(tokens), zero, zero
    return Tally(1000, units, units, True, *counts)


def gpu_job(**keys: Any) -> JobConfig:
    raw = {
        "input": {"layout": "flat", "path": "in"},
        "output": {"path": "out"},
        "model": {"name": "none", "kind": "checksum"},
        "cluster": {"actors": 4, "gpus_per_actor": 1, "cpus_per_actor": 1},
        **keys,
    }
    return parse_config(raw, "test")


def test_a_forecast_is_work_by_rate_and_what_is_around_it() -> None:
    rate = Rate("s", "float32", "cuda", 100.0, utilisation=0.5, startup_seconds=30, publish_rows_per_second=500)
    one = forecast(gpu_job(), whole(40_000), [Known(rate, "here")], 4)
    assert one.actor_seconds is not None and one.seconds is not None and one.gpu_hours is not None
    assert one.actor_seconds.p50 == pytest.approx(400)
    # 400 s of four actors that score half of their time, half a unit of one, start and 1,000 rows
    assert one.seconds.p50 == pytest.approx(400 / 4 / 0.5 + 400 / 10 / 2 + 30 + 2)
    assert one.gpu_hours.p50 == pytest.approx((one.seconds.p50 - 2) * 4 / 3600)
    assert one.seconds.low < one.seconds.p50 < one.seconds.p90 < one.seconds.high
    money = one.usd(3.0)
    assert money is not None and money.p50 == pytest.approx(one.gpu_hours.p50 * 3)
    assert one.actors_for(one.seconds.p50, 10, ninety=False) == 4
    more = one.actors_for(one.seconds.p50, 10, ninety=True)
    assert more is not None and more > 4
    assert one.actors_for(40, 10, ninety=False) is None  # start, tail and publishing alone are longer
    unknown = forecast(gpu_job(), whole(40_000), [], 4)
    assert (unknown.seconds, unknown.gpu_hours, unknown.usd(3.0)) == (None, None, None)
    assert Forecast(2, 0).gpu_hours == Range.exact(0)


def test_errors_of_earlier_plans_widen_the_next() -> None:
    def rates(*errors: float) -> list[Known]:
        given = {"utilisation": 1.0, "predicted_seconds": 100.0}
        return [
            Known(Rate("s", "float32", "cuda", 100.0, actual_seconds=100 * (1 + one), **given), "") for one in errors
        ]

    errors = (0.01, -0.01, 0), (0.4, 0.5, 0.3)
    sure, unsure = (forecast(gpu_job(), whole(1e6), rates(*given), 1) for given in errors)
    assert sure.seconds is not None and unsure.seconds is not None
    assert sure.seconds.high / sure.seconds.p50 < 1.1 < 1.5 < unsure.seconds.high / unsure.seconds.p50


NOW = datetime.datetime(2026, 3, 1, 22, 30, tzinfo=datetime.UTC)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("6h", 21600),
        ("90m", 5400),
        ("1h30m", 5400),
        ("45s", 45),
        ("1.5h", 5400),
        ("06:00", 7.5 * 3600),
        ("22:31", 60),
        ("22:30", 86400),
        ("2026-03-02T06:00", 7.5 * 3600),
        ("2026-03-02T06:00+00:00", 7.5 * 3600),
    ],
)
def test_deadlines(text: str, seconds: float) -> None:
    assert deadline_seconds(text, NOW) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("2026-03-01T06:00", "is past"),
        ("soon", "not a time"),
        ("", "not a time"),
        ("0h", "no time at all"),
        ("25:00", "not a time"),
        ("-6h", "not a time"),
    ],
)
def test_deadlines_that_are_none(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        deadline_seconds(text, NOW)


@pytest.mark.parametrize(
    ("cost", "told"),
    [
        ({"usd_per_gpu_hour": 0}, "cost.usd_per_gpu_hour: found 0"),
        ({"usd_per_gpu_hour": -2.5}, "cost.usd_per_gpu_hour: found -2.5"),
        ({"max_usd": 5}, "needs a price"),
        ({"max_gpu_hours": float("nan")}, "cost.max_gpu_hours"),
        ({"max_gpu_hours": float("inf")}, "cost.max_gpu_hours"),
        ({"price": 3}, "unknown key"),
    ],
)
def test_costs_that_are_none(cost: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        gpu_job(cost=cost)


def test_the_command_line_says_what_is_unknown(tmp_path: Path, cli: Cli) -> None:
    config = job(write(tmp_path / "in.parquet", candidate_rows(5, 10)), tmp_path / "out", cluster__gpus_per_actor=1)
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump({**config.model_dump(exclude={"limit"}), "cost": {"usd_per_gpu_hour": 2.5}}))
    code, out, said = cli("plan", file, "--json", "--deadline", "6h", "--local")
    found = json.loads(out)["estimate"]
    assert code == 0 and "time        unknown" in said and "batch-rerank bench" in said
    assert (found["pairs"], found["seconds"], found["gpu_hours"], found["usd"]) == (50, None, None, None)
    assert found["tokens"] == run(config, local=True).totals.tokens
    assert json.loads(out)["deadline"] == {"seconds": 21600, "actors_p50": None, "actors_p90": None, "known": False}
    code, _, said = cli("plan", file, "--deadline", "2020-01-01T00:00")
    assert code == 2 and "is past" in said
    code, out, said = cli("plan", file, "--set", "cost.usd_per_gpu_hour=0")
    assert code == 2 and "greater than 0" in said and not out


def test_an_input_without_a_pair_takes_nothing(tmp_path: Path, cli: Cli) -> None:
    rows = [{"query_id": "q", "query": "what", "candidates": []}]
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = pa.list_(pa.struct([("doc_id", pa.string()), ("text", pa.string())]))
    schema = pa.schema([("query_id", pa.string()), ("query", pa.string()), ("candidates", kind)])
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "in.parquet")
    config = job(tmp_path / "in.parquet", tmp_path / "out", input__layout="nested")
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(exclude={"limit"})))
    code, out, _ = cli("plan", file, "--json", "--local")
    assert code == 0 and json.loads(out)["estimate"]["tokens"] == 0
    code, _, said = cli("bench", file, "--local")
    assert code == 3 and "no pair to score" in said
