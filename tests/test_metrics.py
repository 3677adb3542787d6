"""What Prometheus gets: every series with the sums of the receipts, each unit once, and as the page and the dashboard
say."""

import json
import re
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import qwen3_reranker
from conftest import candidate_rows, job, write
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

import batch_rerank.job.metrics as module
import batch_rerank.job.run as run_module
from batch_rerank.job.metrics import BOUNDARIES, COUNTS, METRICS, OF_THE_JOB, Metrics, phases
from batch_rerank.job.run import run
from batch_rerank.store.receipts import Receipt, SetAside

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "batch_rerank.json").read_text(encoding="utf-8"))
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
SECONDS = 240.0
"""How long a report may be on its way: Ray makes one a second here, on a machine that may be busy."""


def scrape() -> list[Sample]:
    """All samples of this node's endpoint, as Prometheus parses them."""
    import ray

    (node,) = ray.nodes()  # type: ignore[no-untyped-call]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=60) as answer:
        text = answer.read().decode()
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def ours(output: object, done: Callable[[list[Sample]], bool]) -> list[Sample]:
    """The samples of one job, once they are `done`, or as they are when time is up."""
    deadline = time.monotonic() + SECONDS
    while True:
        found = [sample for sample in scrape() if sample.labels.get("output") == str(output)]
        if done(found) or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def total(samples: list[Sample], name: str, **labels: str) -> float:
    fitting = [one for one in samples if one.name == f"ray_{name}" and labels.items() <= one.labels.items()]
    return sum(one.value for one in fitting)


def receipts_of(output: Path) -> list[Receipt]:
    return [Receipt.from_json(path.read_bytes(), path) for path in (output / "_manifest/receipts").iterdir()]


def check(samples: list[Sample], receipts: list[Receipt]) -> None:
    """Every number of the samples is that of the receipts."""
    assert total(samples, "batch_rerank_units_total") == len(receipts)
    for name, field in COUNTS.items():
        assert total(samples, f"{name}_total") == sum(getattr(one, field) for one in receipts), name
    for receipt in receipts:
        for phase in phases(receipt):
            own = sum(phases(one)[phase] for one in receipts if one.actor == receipt.actor)
            found = total(samples, "batch_rerank_actor_seconds_total", actor=receipt.actor, phase=phase)
            assert found == pytest.approx(own, abs=1e-4)
    met = [one for one in receipts if one.scorer]
    steps = {
        "wait": [one.wait_seconds for one in met],
        "encode": [one.encode_seconds for one in met],
        "score": [one.seconds for one in met],
        "commit": [one.write_seconds for one in receipts],
    }
    for step, seconds in steps.items():
        assert total(samples, "batch_rerank_unit_seconds_count", step=step) == len(seconds)
        for bound in BOUNDARIES:
            found = total(samples, "batch_rerank_unit_seconds_bucket", step=step, le=str(bound))
            assert found == sum(one <= bound for one in seconds), (step, bound)
    for actor in {one.actor for one in met}:
        assert total(samples, "batch_rerank_units_waiting", actor=actor) == 0
        assert any(one.labels.get("actor") == actor for one in samples if one.name == "ray_batch_rerank_units_waiting")


def all_units(count: int) -> Callable[[list[Sample]], bool]:
    def done(samples: list[Sample]) -> bool:
        commits = total(samples, "batch_rerank_unit_seconds_count", step="commit")
        return total(samples, "batch_rerank_units_total") == commits == count

    return done


@pytest.fixture(scope="module")
def series(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """The samples of two real jobs, a model's with pairs that fail and are cut, and one that reuses; each is held
    against its receipts here."""
    directory = tmp_path_factory.mktemp("metrics")
    rows = candidate_rows(12, 25)
    rows[7]["text"] = None
    shard = write(directory / "in" / "0.parquet", rows)
    model = str(qwen3_reranker(directory / "model"))
    keys: dict[str, Any] = {"model__name": model, "model__kind": "auto", "model__max_length": 128}
    summary = run(job(shard, directory / "model-out", **keys, cluster__cpus_per_actor=1, scoring__max_failed_rows=0.5))
    samples = ours(directory / "model-out", all_units(summary.units))
    receipts = receipts_of(directory / "model-out")
    check(samples, receipts)
    assert min(summary.totals.failed, summary.totals.truncated, summary.units) > 0
    assert {one.labels["model"] for one in samples} == {model}
    assert {one.labels["device"] for one in samples} == {"cpu"}
    for receipt in receipts:
        assert total(samples, "batch_rerank_token_budget", actor=receipt.actor) == receipt.token_budget > 0

    write(directory / "free" / "0.parquet", [row for row in rows if row["text"]])
    run(job(directory / "free", directory / "first"), local=True)
    changed = [{**row, "text": row["text"] + ("new" if i == 3 else "")} for i, row in enumerate(rows) if row["text"]]
    write(directory / "free2" / "0.parquet", changed)
    again = run(job(directory / "free2", directory / "again", reuse__from=str(directory / "first"), reuse__audit=0.0))
    reused = ours(directory / "again", all_units(again.units))
    check(reused, receipts_of(directory / "again"))
    assert 0 < again.totals.reused < again.totals.rows_in
    assert any(not receipt.scorer for receipt in receipts_of(directory / "again")), "one has met no actor"
    return samples + reused


@pytest.fixture
def counted(local_ray: None, tmp_path: Path) -> Metrics:
    """The metrics of a job that has counted nothing."""
    return Metrics(job(tmp_path / "in", tmp_path / "out"), dict)


def receipt(**fields: Any) -> Receipt:
    return Receipt("00000-00000", "f", "p", 1, "s", **fields)


def test_what_was_done_again_is_told_apart(counted: Metrics, tmp_path: Path) -> None:
    counted.count(receipt(rows_in=5, retries=2))
    counted.count(receipt(rows_in=5, storage_retries=3))
    counted.set_aside()
    found = ours(tmp_path / "out", all_units(2))
    assert total(found, "batch_rerank_retries_total", of="unit") == 2
    assert total(found, "batch_rerank_retries_total", of="storage") == 3
    assert total(found, "batch_rerank_set_aside_total") == 1
    assert total(found, "batch_rerank_pairs_total") == 10


@pytest.mark.slow
def test_every_metric_and_every_expression_of_the_dashboard_is_at_the_endpoint(
    series: list[Sample], counted: Metrics, tmp_path: Path
) -> None:
    counted.count(receipt(retries=1))
    counted.set_aside()
    samples = series + ours(tmp_path / "out", all_units(1))
    labels: dict[str, set[str]] = {}
    for sample in samples:
        labels.setdefault(sample.name, set()).update(sample.labels)
    for metric in METRICS:
        assert {*OF_THE_JOB, *metric.tags} <= labels[metric.series]
    for expression in EXPRESSIONS:
        names = re.findall(r"ray_\w+", expression)
        assert names
        asked = set(re.findall(r"(\w+)(?:=~|!=|=)", expression))
        asked |= {name for group in re.findall(r" by \(([^)]*)\)", expression) for name in group.split(", ")}
        for name in names:
            assert asked <= labels[name], expression


def test_the_page_the_dashboard_and_the_code_name_the_same() -> None:
    table = [line for line in PAGE.splitlines() if line.startswith("| `ray_")]
    assert table == [
        f"| `{one.series}` | {one.kind} | {', '.join(f'`{tag}`' for tag in one.tags)} | {one.help} |" for one in METRICS
    ]
    drawn = {name for expression in EXPRESSIONS for name in re.findall(r"ray_\w+", expression)}
    assert drawn == {one.series for one in METRICS}
    assert set(re.findall(r"ray_\w+", json.dumps(DASHBOARD["templating"]))) <= drawn
    fields = set(re.findall(r"`(\w+_seconds)`", PAGE))
    assert fields - set(Receipt.__dataclass_fields__) == {"batch_rerank_actor_seconds"}
    assert {name for name in Receipt.__dataclass_fields__ if name.endswith("_seconds")} <= fields


def test_the_dashboard_can_be_imported() -> None:
    variables = [variable["name"] for variable in DASHBOARD["templating"]["list"]]
    assert variables == ["datasource", *OF_THE_JOB]
    used = set(re.findall(r"\$(\w+)", " ".join(EXPRESSIONS)))
    assert used == {*OF_THE_JOB, "__rate_interval"}
    identities = Counter(panel["id"] for panel in DASHBOARD["panels"])
    assert set(identities.values()) == {1}
    for expression in EXPRESSIONS:
        assert expression.count("(") == expression.count(")")
        assert expression.count("{") == expression.count("}")
    placed = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    cells = Counter(
        (x, y) for at in placed for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])
    )
    assert max(cells.values()) == 1, "no panel is on another"
    assert all(at["x"] + at["w"] <= 24 for at in placed)


@pytest.mark.usefixtures("local_ray")
def test_a_receipt_that_comes_twice_is_counted_once(
    flat_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = run_module.score

    def twice(*arguments: Any) -> Iterator[Receipt | SetAside]:
        for one in real(*arguments[:6], True):  # in this process
            yield one
            yield one

    monkeypatch.setattr(run_module, "score", twice)
    summary = run(job(flat_shards, tmp_path / "out"))
    found = ours(tmp_path / "out", all_units(summary.units))
    assert total(found, "batch_rerank_pairs_total") == summary.totals.rows_in == 300
    assert total(found, "batch_rerank_unit_seconds_count", step="commit") == summary.units == 6


def test_a_job_goes_on_without_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]) -> None:
    def broken() -> dict[str, Any]:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(module, "_make", broken)
    metrics = Metrics(job(tmp_path / "in", tmp_path / "out"), dict)
    for _ in range(3):
        metrics.count(receipt(rows_in=1))
    metrics.set_aside()
    metrics.end()
    assert logged == ["metrics are off for the rest of this run: RuntimeError: no such thing"]


def test_the_local_loop_has_none(flat_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(run_module, "Metrics", refused)
    assert run(job(flat_shards, tmp_path / "out"), local=True).units == 6
