"""What receipts keep of a unit's distribution is what its scores say, and adds up."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import candidate_rows, job, rows_of, write

from batch_rerank.job.run import run
from batch_rerank.judge.agreement import kendall, overlap, rbo
from batch_rerank.report.histograms import moments
from batch_rerank.score.shape import shape_of
from batch_rerank.store.filesystem import locate
from batch_rerank.store.shapes import PLACES, SCORES, TOKENS, Mover, Shape, from_text, together

MODEL: Any = SimpleNamespace(relevance="sigmoid", relevance_scale=1.0)


def unit(lengths: list[int], seed: int, failed: float = 0.0, ties: bool = False, ranks: str = "in order") -> Any:
    """A scored unit of queries with so many candidates; some rows have an error."""
    random = np.random.default_rng(seed)
    rows = sum(lengths)
    error = random.random(rows) < failed
    rank = np.concatenate([np.arange(1, n + 1) for n in lengths])
    if ranks == "shuffled":
        rank = np.concatenate([random.permutation(n) * 3 + 5 for n in lengths])
    scores = random.normal(0, 4, rows - int(error.sum())).astype(np.float32)
    table = {
        "query_index": pa.array(np.repeat(np.arange(len(lengths)), lengths), pa.int32()),
        "first_stage_rank": pa.array(rank, pa.int32()),
        "error": pa.array(["text is null" if one else None for one in error], pa.string()),
    }
    return SimpleNamespace(
        rows=pa.table(table),
        scores=np.round(scores) if ties else scores,
        n_tokens=random.integers(1, 9000, len(scores)).astype(np.int32),
    )


def shape(one: Any) -> Shape:
    found = from_text(shape_of(one, MODEL))
    assert found is not None
    return found


def orders(one: Any) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of each query its rows by the first stage and by score, the slow way, and the scores of its rows."""
    kept = [row for row, error in enumerate(one.rows["error"].to_pylist()) if error is None]
    index, rank = one.rows["query_index"].to_pylist(), one.rows["first_stage_rank"].to_pylist()
    score = dict(zip(kept, one.scores.tolist(), strict=True))
    found = []
    for query in sorted({index[row] for row in kept}):
        rows = [row for row in kept if index[row] == query]
        before = sorted(rows, key=lambda row: (rank[row], row))
        place = {row: at for at, row in enumerate(before)}
        after = sorted(rows, key=lambda row: (-score[row], place[row]))
        found.append((np.array(before), np.array(after), score))
    return found


@pytest.mark.parametrize("case", range(12))
def test_places_and_agreement_are_those_of_two_sorted_lists(case: int) -> None:
    random = np.random.default_rng(case)
    lengths = random.integers(1, 60, 7).tolist() if case % 3 else [1, 2, 11, 10, 300]
    one = unit(lengths, case, failed=0.3 * (case % 2), ties=case % 4 == 0, ranks=("in order", "shuffled")[case % 2])
    found, expected = shape(one), orders(one)
    moves, best = [], []
    for before, after, score in expected:
        was, now = ({row: at for at, row in enumerate(rows.tolist())} for rows in (before, after))
        moves += [was[row] - now[row] for row in was]
        top = max(was, key=lambda row: (was[row] - now[row], -now[row]))
        if was[top] > now[top]:
            best.append((was[top] - now[top], Mover(top, was[top] + 1, now[top] + 1, float(f"{score[top]:.9g}"))))
    bins, counts = np.unique(PLACES.of(np.array(moves)), return_counts=True)
    assert found.places == dict(zip(bins.tolist(), counts.tolist(), strict=True))
    deep = [overlap(a, b, 10) for a, b, _ in expected if len(a) > 10]
    several = [rbo(a, b) for a, b, _ in expected if len(a) > 1]
    assert (sum(found.overlap.values()), sum(found.rbo.values())) == (len(deep), len(several))
    assert found.overlap_total == pytest.approx(sum(deep), rel=1e-5)
    assert found.rbo_total == pytest.approx(sum(several), rel=1e-5)
    if len(several) <= 4 and max(lengths) <= 256:
        assert found.taus == len(several)
        assert found.tau_total == pytest.approx(sum(kendall(b, a) for a, b, _ in expected if len(a) > 1), abs=1e-5)
    distances = sorted((distance for distance, _ in best), reverse=True)[:5]
    assert [one.before - one.after for one in found.up] == distances
    assert all((one.before - one.after, one) in best for one in found.up)
    assert all(one.before < one.after for one in found.down)


def test_a_place_of_a_mover_is_the_row_of_its_unit() -> None:
    rows = {"query_index": [0] * 4, "first_stage_rank": [4, 3, 2, 1], "error": [None, "x", None, None]}
    table = pa.table({**rows, "error": pa.array(rows["error"], pa.string())})
    one: Any = SimpleNamespace(rows=table, scores=np.array([5, 1, 2], np.float32), n_tokens=np.ones(3, np.int32))
    assert shape(one).up == (Mover(0, 3, 1, 5.0),)
    assert shape(one).down == (Mover(3, 1, 2, 2.0),)


def test_moments_and_bins_are_exact_counts() -> None:
    one = unit([50, 50], 3)
    found = shape(one)
    assert found.count == 100 and sum(found.scores.values()) == sum(found.tokens.values()) == 100
    assert found.least == pytest.approx(float(one.scores.min())) and found.most == pytest.approx(
        float(one.scores.max())
    )
    assert found.total == pytest.approx(float(one.scores.sum(dtype=np.float64)), rel=1e-5)
    for bin_, count in found.scores.items():
        low, high = SCORES.edges(bin_)
        inside = (one.scores >= low) & (one.scores < high) if bin_ > 0 else (one.scores > low) & (one.scores <= high)
        assert int(inside.sum()) == count
    assert sum(found.relevance.values()) == 100


@pytest.mark.parametrize(
    "scores", [np.linspace(0.98, 0.981, 1000), np.linspace(20, 20.01, 1000), np.full(9, 12.345678)]
)
def test_a_narrow_distribution_keeps_its_deviation(scores: np.typing.NDArray[np.float64]) -> None:
    """Cosines are: of moments with few digits the difference of squares is nothing but rounding."""
    plain = scores.astype(np.float32)
    wide = plain.astype(np.float64)
    made = Shape(
        scores={SCORES.of(plain)[0].item(): len(plain)},
        count=len(plain),
        total=float(wide.sum()),
        squares=float(np.square(wide).sum()),
        least=float(plain.min()),
        most=float(plain.max()),
    )
    read = from_text(made.to_text())
    assert read is not None and np.float32(read.least) == plain.min() and np.float32(read.most) == plain.max()
    told = moments(together([read] * 3))
    assert told["deviation"] == pytest.approx(wide.std(), rel=1e-4, abs=1e-6)
    assert told["mean"] == pytest.approx(wide.mean(), rel=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e-3, 1.0, 12.0, 1e4, 1e30])
def test_scores_of_any_scale_have_a_bin_that_holds_them(scale: float) -> None:
    values = (np.random.default_rng(0).normal(0, scale, 500)).astype(np.float32)
    bins = SCORES.of(values)
    for value, bin_ in zip(values.tolist(), bins.tolist(), strict=True):
        low, high = SCORES.edges(bin_)
        assert low <= value <= high
        if abs(value) > 1e-7:
            assert high - low <= abs(value) / 3.9
    assert np.array_equal(SCORES.of(-values), -bins)


def test_bins_are_fixed_for_ever() -> None:
    values = np.array([0, 1e-9, 0.01, 0.3, 0.99, 1, 10.6, -10.6, 3.4e38], np.float32)
    assert SCORES.of(values).tolist() == [0, 0, 70, 90, 112, 113, 166, -166, 2160]
    assert (
        PLACES.of(np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 12, -5])).tolist()
        == PLACES.of(np.array([0, 1, 2, 3, 4, 4, 6, 6, 8, 8, 12, -4])).tolist()
    )
    assert TOKENS.edges(int(TOKENS.of(np.array([256]))[0])) == (256.0, 320.0)


def test_shapes_add_up_in_any_order_and_come_back_from_text() -> None:
    shapes = [shape(unit([30, 12, 1], seed)) for seed in range(4)]
    one, other = together(shapes), together([together(shapes[2:]), together(shapes[:2])])
    assert one.scores == other.scores and one.places == other.places and one.count == other.count == 172
    assert one.total == pytest.approx(other.total)
    assert from_text(shapes[0].to_text()) == shapes[0]
    assert together([]).count == 0 and from_text(Shape().to_text()) is None


@pytest.mark.parametrize(
    "text",
    ["", "scores", "scores=x:1", "scores=99999:1", "moments=1", "up=1,2", "scores=1:-4", "a b c", "scores=1:1" * 900],
)
def test_what_is_no_shape_of_ours_is_none(text: str) -> None:
    assert from_text(text) is None


def test_one_candidate_and_equal_scores_move_nobody() -> None:
    alone = shape(unit([1], 0))
    assert alone.places == {0: 1} and not alone.rbo and not alone.overlap and not alone.up and not alone.down
    same = unit([40], 0)
    same.scores = np.full(40, -3.0, np.float32)
    found = shape(same)
    assert found.places == {0: 40} and found.rbo_total == pytest.approx(1) and found.tau_total == 1
    assert list(found.scores.values()) == [40]


def test_a_unit_of_many_scores_keeps_a_small_shape() -> None:
    big = unit([100] * 200, 1)
    text = shape_of(big, MODEL)
    assert len(text) < 1600 and text.isascii() and text.isprintable()
    none = unit([5], 0, failed=1.1)
    assert shape_of(none, MODEL) == ""


def test_every_receipt_of_a_job_has_it_and_they_add_up_to_the_output(flat_shards: Path, tmp_path: Path) -> None:
    config = job(flat_shards, tmp_path / "out")
    run(config, local=True)
    receipts = [
        json.loads(line)
        for path in (tmp_path / "out/_manifest/receipts").iterdir()
        for line in path.read_text().splitlines()
    ]
    whole = together(one for receipt in receipts if (one := from_text(receipt["shape"])))
    rows = rows_of(tmp_path / "out")
    assert whole.count == len(rows) == 300
    assert whole.total == pytest.approx(float(np.sum(rows["score"].to_numpy(), dtype=np.float64)), rel=1e-4)
    bins, counts = np.unique(SCORES.of(rows["score"].to_numpy()), return_counts=True)
    assert whole.scores == dict(zip(bins.tolist(), counts.tolist(), strict=True))
    moved = rows["first_stage_rank"].to_numpy() - rows["rank"].to_numpy()
    bins, counts = np.unique(PLACES.of(moved), return_counts=True)
    assert whole.places == dict(zip(bins.tolist(), counts.tolist(), strict=True))


def test_reused_units_have_it_too(flat_shards: Path, tmp_path: Path) -> None:
    run(job(flat_shards, tmp_path / "first"), local=True)
    run(job(flat_shards, tmp_path / "second", reuse__from=str(tmp_path / "first")), local=True)
    shapes = [
        {
            receipt["unit"]: receipt["shape"]
            for path in sorted((tmp_path / name / "_manifest/receipts").iterdir())
            for receipt in map(json.loads, path.read_text().splitlines())
        }
        for name in ("first", "second")
    ]
    assert shapes[0] == shapes[1] and all(shapes[0].values())


def test_a_file_that_another_attempt_has_committed_keeps_its_own(flat_shards: Path, tmp_path: Path) -> None:
    from batch_rerank.store.commit import commit, footer
    from batch_rerank.store.manifest import Manifest

    write(tmp_path / "x.parquet", candidate_rows(1, 1))
    manifest, counts = Manifest(locate(str(tmp_path / "out"))), {"rows_out": 1}
    bodies = []
    for said in ("scores=1:1", "scores=2:1"):
        sink = pa.BufferOutputStream()
        table = pa.table({"a": [1]}).replace_schema_metadata(footer("f", "00000-00000", counts, shape=said))
        pq.write_table(table, sink)
        bodies.append(sink.getvalue().to_pybytes())
    first = commit(manifest, "00000-00000", bodies[0], "f", counts, shape="scores=1:1")
    (tmp_path / "out/_manifest/receipts/00000-00000.json").unlink()
    late = commit(manifest, "00000-00000", bodies[1], "f", counts, shape="scores=2:1")
    assert (first.shape, late.shape) == ("scores=1:1", "scores=1:1")
