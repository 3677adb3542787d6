"""Two outputs compared: agreement by independent definitions, ties that are noise, and judgements."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ir_measures
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import candidate_rows, job, scored_only, write
from hypothesis import given, settings
from hypothesis import strategies as st

import batch_rerank.judge.matched as matched
from batch_rerank.errors import InputError
from batch_rerank.job.run import run
from batch_rerank.judge.agreement import inversions, kendall, overlap, rbo, settled
from batch_rerank.judge.compare import bootstrap, compare
from batch_rerank.publish.output import Place

Cli = Callable[..., tuple[int, str, str]]
LISTS = st.permutations(range(9)).map(list)


def numbers(values: list[int]) -> np.ndarray:
    return np.array(values, np.int64)


def rbo_by_its_definition(one: list[int], other: list[int], p: float) -> float:
    """Equation 32 with sets, term by term."""
    short, long = sorted((one, other), key=len)
    s, n = len(short), len(long)
    x = [len(set(short[:d]) & set(long[:d])) for d in range(n + 1)]
    first = sum(x[d] / d * p**d for d in range(1, n + 1))
    second = sum(x[s] * (d - s) / (s * d) * p**d for d in range(s + 1, n + 1))
    return (1 - p) / p * (first + second) + ((x[n] - x[s]) / n + x[s] / s) * p**n


@settings(max_examples=200, deadline=None, derandomize=True)
@given(one=LISTS, other=LISTS, cut=st.integers(1, 9), p=st.sampled_from([0.5, 0.9, 0.98]))
def test_rbo_is_its_definition(one: list[int], other: list[int], cut: int, p: float) -> None:
    assert rbo(numbers(one[:cut]), numbers(other), p) == pytest.approx(rbo_by_its_definition(one[:cut], other, p))
    assert rbo(numbers(other), numbers(one[:cut]), p) == pytest.approx(rbo(numbers(one[:cut]), numbers(other), p))
    assert rbo(numbers(one), numbers(one), p) == pytest.approx(1)


def test_rbo_of_known_lists() -> None:
    assert rbo(numbers([1, 2, 3]), numbers([3, 2, 1]), 0.9) == pytest.approx(0.855)
    assert rbo(numbers([1, 2]), numbers([3, 4]), 0.9) == 0
    assert (rbo(numbers([]), numbers([])), rbo(numbers([1]), numbers([]))) == (1, 0)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(one=st.permutations(range(200)), other=st.permutations(range(150)))
def test_kendall_is_scipys(one: list[int], other: list[int]) -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy is no dependency of ours; it is not installed")
    common = [document for document in one if document in set(other)]
    expected = stats.kendalltau([common.index(d) for d in range(150)], [other.index(d) for d in range(150)]).statistic
    assert kendall(numbers(one), numbers(other)) == pytest.approx(expected)
    assert inversions(numbers(one)) == sum(a > b for i, a in enumerate(one) for b in one[i:])


def test_agreement_of_little() -> None:
    assert np.isnan(kendall(numbers([1]), numbers([1]))) and np.isnan(kendall(numbers([1, 2]), numbers([3, 4])))
    assert kendall(numbers([0, 1, 2]), numbers([2, 1, 0])) == -1
    assert overlap(numbers([1, 2, 3]), numbers([3, 9, 1]), 2) == 0
    assert overlap(numbers([1, 2, 3]), numbers([3, 9, 1]), 10) == pytest.approx(2 / 3)
    assert overlap(numbers([]), numbers([]), 10) == 1


def test_near_scores_tie_and_chains_of_steps_do_not() -> None:
    other = numbers([0, 1, 2, 3])
    assert settled(numbers([1, 0, 3, 2]), np.array([1.0, 0.999, 0.5, 0.4999]), other, 0.01).tolist() == [0, 1, 2, 3]
    assert settled(numbers([3, 2, 1, 0]), np.array([1.0, 0.994, 0.988, 0.982]), other, 0.01).tolist() == [2, 3, 0, 1]
    assert settled(numbers([1, 0]), np.array([np.nan, np.nan]), other, 0.01).tolist() == [1, 0]
    assert settled(numbers([1, 0]), np.array([1.0, 1.0]), other, 0).tolist() == [1, 0]
    assert settled(numbers([9, 1, 0]), np.array([1.0, 1.0, 1.0]), other, 0.1).tolist() == [0, 1, 9]


@pytest.fixture
def outputs(flat_shards: Path, tmp_path: Path) -> tuple[Path, Path]:
    """An output, and another of the same scores but for two queries."""
    for name in ("old", "new"):
        run(job(flat_shards, tmp_path / name, output__file_bytes=1), local=True)
    return tmp_path / "old", tmp_path / "new"


def change(output: Path, by: Callable[[dict[str, object]], dict[str, object]]) -> None:
    """Rewrite the rows of an output, ranked again by their scores."""
    for part in output.glob("*.parquet"):
        table = pq.read_table(part)
        rows = sorted(
            enumerate(map(by, table.to_pylist())), key=lambda one: (one[0] // 25, -float(str(one[1]["score"])))
        )
        pq.write_table(pa.Table.from_pylist([row for _, row in rows], schema=table.schema), part)


def test_equal_outputs_have_not_moved(outputs: tuple[Path, Path], tmp_path: Path, cli: Cli) -> None:
    code, out, _ = cli("compare", *outputs, "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["queries"], found["pairs"], found["gained"], found["lost"]) == (12, 300, 0, 0)
    assert found["overlap"] == {"1": 1, "10": 1, "100": 1} and found["tau"] == 1
    assert found["rbo"] == pytest.approx(1) and found["moved"] == [] and found["shift_largest"] == 0
    code, out, error = cli("compare", *outputs)
    assert code == 0 and "overlap@10" in out and "12 queries in both" in error


def test_what_moved_is_named_and_measured(outputs: tuple[Path, Path]) -> None:
    old, new = outputs
    change(new, lambda row: {**row, "score": -float(str(row["score"]))} if row["query_id"] == "q7" else row)
    found = compare(Place(str(old)), Place(str(new)))
    assert [moved.query_id for moved in found.moved] == ["q7"]
    assert found.moved[0].old == [
        str(d) for d in pq.read_table(old / "part-00003.parquet")["doc_id"][25:28].to_pylist()
    ]
    assert found.tau == pytest.approx((11 - 1) / 12)
    assert found.overlap["100"] == 1 and found.overlap["1"] == pytest.approx(11 / 12)
    assert found.shift_largest > 0.1


def test_noise_below_the_tolerance_moves_nothing(outputs: tuple[Path, Path]) -> None:
    old, new = outputs
    noise = np.random.default_rng(0)
    change(new, lambda row: {**row, "score": float(str(row["score"])) + float(noise.uniform(-4e-4, 4e-4))})
    loose = compare(Place(str(old)), Place(str(new)), tolerance=1e-3)
    assert loose.rbo == pytest.approx(1) and loose.tau == 1 and loose.moved == []
    assert 0 < loose.shift_largest < 5e-4


def test_other_candidates_top_k_layouts_and_passes_are_compared(
    flat_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(job(flat_shards, tmp_path / "old"), local=True)
    (flat_shards / "2.parquet").unlink()
    write(flat_shards / "3.parquet", candidate_rows(1, 30, first=20))
    run(job(flat_shards, tmp_path / "new", output__top_k=10, output__layout="nested"), local=True)
    found = compare(Place(str(tmp_path / "old")), Place(str(tmp_path / "new")))
    assert (found.queries, found.only_old, found.only_new) == (8, 4, 1)
    assert (found.gained, found.lost, found.pairs) == (0, 8 * 15, 80)
    assert found.overlap["10"] == 1 and found.differing == ["input.shards", "output.top_k"]
    monkeypatch.setattr(matched, "HELD_ROWS", 40)
    again = compare(Place(str(tmp_path / "old")), Place(str(tmp_path / "new")))
    assert (again.queries, again.only_old, again.only_new, again.lost) == (8, 4, 1, 120)
    assert again.rbo == pytest.approx(found.rbo)


def test_judgements_are_those_of_ir_measures(outputs: tuple[Path, Path], tmp_path: Path) -> None:
    old, new = outputs
    change(new, lambda row: {**row, "score": -float(str(row["score"]))} if row["query_id"] in ("q1", "q2") else row)
    qrels = {f"q{query}": {f"d{query}": 1, f"d{query + 5}": 2} for query in range(12)}
    lines = [f"{query} 0 {document} {grade}\n" for query, found in qrels.items() for document, grade in found.items()]
    (tmp_path / "qrels").write_text("".join(lines))
    # parts were rewritten: their ranks too, which evaluate goes by
    for part in new.glob("*.parquet"):
        table = pq.read_table(part)
        ranks = pa.array([1 + index % 25 for index in range(len(table))], pa.int32())
        pq.write_table(table.set_column(table.column_names.index("rank"), "rank", ranks), part)
    judged = compare(Place(str(old)), Place(str(new)), qrels=str(tmp_path / "qrels")).judged["nDCG@10"]
    means = []
    for output in outputs:
        scored: dict[str, dict[str, float]] = {}
        for row in pa.concat_tables([pq.read_table(part) for part in output.glob("*.parquet")]).to_pylist():
            scored.setdefault(row["query_id"], {})[row["doc_id"]] = row["score"]
        means.append(ir_measures.calc_aggregate([ir_measures.nDCG @ 10], qrels, scored)[ir_measures.nDCG @ 10])
    assert [judged.old, judged.new] == pytest.approx(means, abs=1e-6)
    assert judged.difference == pytest.approx(means[1] - means[0]) and judged.low <= judged.difference <= judged.high
    assert judged.queries_to_see_a_loss and judged.queries_to_see_a_loss > 12
    assert (judged.queries, judged.in_neither) == (12, 0)
    with (tmp_path / "qrels").open("a") as file:  # queries that neither has change nothing
        file.writelines(f"past{number} 0 d1 1\n" for number in range(500))
    more = compare(Place(str(old)), Place(str(new)), qrels=str(tmp_path / "qrels")).judged["nDCG@10"]
    assert more == replace(judged, in_neither=500)
    (tmp_path / "others").write_text("past1 0 d1 1\n")
    with pytest.raises(InputError, match="none of its 1 queries is in"):
        compare(Place(str(old)), Place(str(new)), qrels=str(tmp_path / "others"))


def test_the_interval_is_a_bootstraps() -> None:
    random = np.random.default_rng(1)
    differences = random.normal(0.01, 0.1, 400)
    low, high = bootstrap(differences)
    assert bootstrap(differences) == (low, high)
    expected = 1.96 * differences.std() / 20
    assert high - low == pytest.approx(2 * expected, rel=0.1) and low < differences.mean() < high
    assert bootstrap(np.zeros(3)) == (0, 0)


def test_what_cannot_be_compared(outputs: tuple[Path, Path], flat_shards: Path, tmp_path: Path, cli: Cli) -> None:
    scored_only(job(flat_shards, tmp_path / "scored"))
    code, _, error = cli("compare", outputs[0], tmp_path / "scored")
    assert code == 6 and "no _SUCCESS, the job has not finished" in error
    assert cli("compare", outputs[0], tmp_path / "absent")[0] == 6
    assert cli("compare", *outputs, "--qrels", tmp_path / "absent")[0] == 3


def test_judging_two_outputs_reads_neither_input(flat_shards: Path, tmp_path: Path) -> None:
    for name in ("old", "new"):
        run(job(flat_shards, tmp_path / name, output__top_k=5), local=True)
    shutil.rmtree(flat_shards)
    (tmp_path / "qrels").write_text("q1 0 d1 1\n")
    found = compare(Place(str(tmp_path / "old")), Place(str(tmp_path / "new")), qrels=str(tmp_path / "qrels"))
    assert found.judged["RR@10"].difference == 0
