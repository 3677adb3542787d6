"""What becomes a label: positives, fair negatives, and what is dropped, from arrays."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from batch_rerank.label_settings import Labels
from batch_rerank.labels.choose import (
    EQUAL_SCORES,
    FALSE_NEGATIVE,
    NEGATIVE,
    NO_POSITIVE,
    NO_SCORE,
    POSITIVE,
    SAME_TEXT,
    TOO_FEW,
    UNSCORED,
    Choice,
    Scored,
    choose,
    draws_of,
)
from batch_rerank.labels.scale import advised, probabilities, saturated_count, scaled, spread_of


def labels(**keys: Any) -> Labels:
    return Labels(to="flagembedding", path="x", **{"negatives": {"ranks": (1, None), "per_query": 4}, **keys})


def scored(lists: list[list[float]], grades: list[list[int]] | None = None, ids: list[str] | None = None) -> Scored:
    """Queries with the scores of their candidates, best anywhere; sigmoid is the map to probabilities."""
    query = np.repeat(np.arange(len(lists)), [len(one) for one in lists])
    score = np.array([value for one in lists for value in one], np.float64)
    rank = np.empty(len(score), np.int64)
    for number in range(len(lists)):
        mine = np.flatnonzero(query == number)
        rank[mine[np.argsort(-np.nan_to_num(score[mine], nan=-np.inf), kind="stable")]] = np.arange(len(mine)) + 1
    flat = [value for one in grades for value in one] if grades else [-1] * len(score)
    return Scored(
        query=query,
        score=score,
        probability=1 / (1 + np.exp(-score)),
        rank=rank,
        grade=np.array(flat, np.int64),
        reason=np.where(np.isnan(score), NO_SCORE, 0).astype(np.int8),
        text=np.arange(len(score)),
        draws=draws_of(ids or [f"q{number}" for number in range(len(lists))], 0),
    )


def negatives(choice: Choice) -> list[int]:
    return [row for row in choice.rows.tolist() if choice.role[row] == NEGATIVE]


def test_every_prefix_of_a_list_is_a_fair_sample_of_all_ranks() -> None:
    """6 of 17 candidates, 6,000 queries of seeded draws: each candidate is among the first k of a list k/17 of the
    times. 102 shares within 5 standard deviations: a false alarm once in 17,000 seeds."""
    rows, many, candidates, wanted = [], 6000, 17, 6
    choice = choose(
        scored([[100.0, *range(candidates, 0, -1)]] * many, ids=[f"query {number}" for number in range(many)]),
        labels(negatives={"ranks": (2, None), "per_query": wanted}),
    )
    rows = np.array(negatives(choice)).reshape(many, wanted) % (candidates + 1) - 1
    assert all(len(set(one)) == wanted for one in rows.tolist())
    for first in range(1, wanted + 1):
        share = first / candidates
        seen = np.bincount(rows[:, :first].ravel(), minlength=candidates) / many
        assert np.abs(seen - share).max() < 5 * math.sqrt(share * (1 - share) / many), first


def test_the_first_half_of_a_list_is_spread_over_all_ranks() -> None:
    """Not only on average: of 8 from 80, the first 4 are from 4 different quarters, whatever is drawn."""
    many = 300
    choice = choose(
        scored([[1000.0, *range(80, 0, -1)]] * many, ids=[f"query {number}" for number in range(many)]),
        labels(negatives={"ranks": (2, None), "per_query": 8}),
    )
    rows = np.array(negatives(choice)).reshape(many, 8) % 81 - 1
    gaps = np.diff(np.sort(rows[:, :4], axis=1), axis=1)
    assert gaps.min() >= 10, "two of the first four are neighbours"


def test_what_is_drawn_for_a_query_does_not_depend_on_the_others() -> None:
    lists = [[float(value) for value in np.random.default_rng(n).permutation(30)] for n in range(6)]
    together = choose(scored(lists), labels())
    for number, one in enumerate(lists):
        alone = choose(scored([one], ids=[f"q{number}"]), labels())
        assert [row - 30 * number for row in together.rows.tolist() if row // 30 == number] == alone.rows.tolist()


def test_another_seed_draws_others() -> None:
    rows = scored([[float(value) for value in range(100)]])
    assert draws_of(["q"], 1).tolist() != draws_of(["q"], 2).tolist()
    assert len(set(negatives(choose(rows, labels())))) == 4


@pytest.mark.parametrize("best", [8.0, 0.5, -0.5, -8.0])
def test_a_margin_means_the_same_above_and_below_zero(best: float) -> None:
    rows = scored([[best, best - 0.9, best - 1.1, best - 5, best - 6]])
    choice = choose(rows, labels(false_negatives={"margin": 1.0}))
    assert choice.reason.tolist() == [0, FALSE_NEGATIVE, 0, 0, 0]


def test_a_share_is_of_the_probability_and_not_of_the_logit() -> None:
    """Below zero 0.95 of the logit -2 is -1.9, above the positive itself: nothing would ever be dropped."""
    choice = choose(scored([[-2.0, -2.02, -2.2, -6.0]]), labels(false_negatives={"share": 0.95}))
    assert choice.reason.tolist() == [0, FALSE_NEGATIVE, 0, 0]
    assert choose(scored([[-2.0, -2.02, -2.2, -6.0]]), labels()).reason.tolist() == [0, 0, 0, 0]


def test_what_is_judged_irrelevant_is_no_false_negative_and_what_is_relevant_no_negative() -> None:
    given = {"positives": {"qrels": "judged"}, "false_negatives": {"margin": 1.0}}
    choice = choose(scored([[3.0, 2.9, 2.8, 2.7, -4.0]], [[1, 0, -1, 2, -1]]), labels(**given))
    assert choice.role.tolist() == [POSITIVE, NEGATIVE, 0, 0, NEGATIVE]
    assert choice.reason.tolist() == [0, 0, FALSE_NEGATIVE, 0, 0]


def test_positives_are_judged_or_the_teachers_best_above_a_floor_or_both() -> None:
    rows = scored([[3.0, 2.0, 1.0, 0.0, -1.0, -2.0]], [[-1, 0, -1, 1, -1, -1]])

    def positives(**keys: Any) -> list[int]:
        choice = choose(rows, labels(positives={"per_query": 2, **keys}))
        return [row for row in choice.rows.tolist() if choice.role[row] == POSITIVE]

    assert positives(qrels="x") == [3]
    assert positives() == [0, 1]
    assert positives(floor=2.5) == [0]
    assert positives(**{"from": "both", "qrels": "x"}) == [3, 0], "judged first; what is judged irrelevant never"


@pytest.mark.parametrize(
    ("scores", "why"),
    [
        ([], None),
        ([math.nan, math.nan], UNSCORED),
        ([1.0], EQUAL_SCORES),
        ([1.0, 1.0, 1.0], EQUAL_SCORES),
        ([2.0, math.nan, 1.0], 0),
        ([2.0, 1.9], TOO_FEW),
    ],
)
def test_queries_without_a_signal_are_left_out_with_the_reason(scores: list[float], why: int | None) -> None:
    choice = choose(scored([scores] if scores else []), labels(false_negatives={"margin": 0.5}))
    assert choice.query_reason.tolist() == ([] if why is None else [why])
    assert (len(choice.rows) == 0) == (why != 0)


def test_a_query_without_a_positive_is_left_out() -> None:
    choice = choose(scored([[1.0, 2.0], [3.0, 1.0]]), labels(positives={"floor": 2.5}))
    assert choice.query_reason.tolist() == [NO_POSITIVE, 0]
    assert choice.rows.tolist() == [2, 3]


def test_a_negative_with_the_text_of_a_positive_is_dropped() -> None:
    rows = scored([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    rows.text[:] = [7, 7, 8, 9, 8, 7]  # type: ignore[index]
    choice = choose(rows, labels())
    assert choice.reason.tolist() == [0, SAME_TEXT, 0, 0, 0, 0]
    assert negatives(choice) == [2, *sorted(negatives(choice)[1:], key=lambda row: negatives(choice).index(row))]


def test_a_margin_is_of_log_odds_where_scores_are_longer() -> None:
    """zerank's relevance is sigmoid(score / 5): 10 and 7.9 are 0.42 of log-odds apart."""
    rows = replace(scored([[10.0, 7.9, -0.1]]), odds=5.0)
    choice = choose(
        rows, labels(false_negatives={"margin": 2.0}, negatives={"ranks": (1, None), "per_query": 1, "least": 1})
    )
    assert choice.reason.tolist() == [0, FALSE_NEGATIVE, 0]


def test_positives_have_each_text_once() -> None:
    rows = scored([[5.0, 4.0, 3.0, 2.0, 1.0], [5.0, 4.0, 3.0, 2.0, 1.0]])
    rows.text[:] = [7, 7, 8, 9, 10, 7, 8, 7, 9, 10]  # type: ignore[index]
    choice = choose(rows, labels(positives={"per_query": 2}))
    assert np.flatnonzero(choice.role == POSITIVE).tolist() == [0, 2, 5, 6]
    assert choice.reason.tolist() == [0, SAME_TEXT, 0, 0, 0, 0, 0, SAME_TEXT, 0, 0]


@pytest.mark.parametrize("second", [2.0, math.nan])
def test_a_negative_with_the_text_of_a_relevant_document_that_is_not_chosen_is_dropped(second: float) -> None:
    """Two are judged to be relevant and one may be chosen; the other one's text is relevant as well, scored or not."""
    rows = scored([[3.0, second, 1.0, 0.0]], grades=[[1, 1, -1, -1]])
    rows.text[:] = [5, 7, 7, 8]  # type: ignore[index]
    choice = choose(rows, labels(positives={"from": "qrels", "qrels": "x", "per_query": 1}))
    assert choice.reason.tolist() == [0, NO_SCORE if math.isnan(second) else 0, SAME_TEXT, 0]
    assert negatives(choice) == [3]


@pytest.mark.parametrize("seed", range(20))
def test_whatever_the_scores_lists_are_whole(seed: int) -> None:
    draw = np.random.default_rng(seed)
    lists = [draw.normal(0, 5, draw.integers(0, 40)) for _ in range(30)]
    lists = [np.where(draw.random(len(one)) < 0.1, np.nan, one).tolist() for one in lists]
    lists = [one for one in lists if one]
    given = labels(negatives={"ranks": (3, 20), "per_query": 5, "least": 2}, false_negatives={"margin": 1.5})
    rows = scored(lists)
    choice = choose(rows, given)
    for number in range(len(lists)):
        mine = [row for row in choice.rows.tolist() if rows.query[row] == number]
        roles = [int(choice.role[row]) for row in mine]
        if choice.query_reason[number]:
            assert not mine
            continue
        assert roles == [POSITIVE, *[NEGATIVE] * (len(mine) - 1)] and 3 <= len(mine) <= 6
        assert len(set(mine)) == len(mine) and not np.isnan(rows.score[mine]).any()
        assert all(3 <= rows.rank[row] <= 20 for row in mine[1:])
        assert all(rows.score[row] <= rows.score[mine[0]] - 1.5 for row in mine[1:])


# ---- scales


def test_scales_and_what_a_softmax_makes_of_a_spread() -> None:
    class Model:
        relevance, relevance_scale = "sigmoid", 5.0

    scores = np.array([-40.0, 0.0, 40.0])
    found = probabilities(scores, Model)  # type: ignore[arg-type]
    assert found is not None and found.tolist() == pytest.approx([1 / (1 + math.e**8), 0.5, 1 / (1 + math.e**-8)])
    assert scaled(scores, found, scores, scores, "logit").tolist() == [-40.0, 0.0, 40.0]
    low, high = np.full(3, -40.0), np.full(3, 40.0)
    assert scaled(scores, found, low, high, "minmax").tolist() == [0.0, 0.5, 1.0]
    assert scaled(scores, found, scores, scores, "minmax").tolist() == [0.0, 0.0, 0.0], "no NaN where all are equal"
    assert saturated_count(np.array([1e-7, 0.5, 1 - 1e-7])) == 2
    assert spread_of(np.empty(0, np.float32), None, 0).temperature == 1.0


@pytest.mark.parametrize(("median", "wide", "told"), [(5, 10, 1.0), (30, 166, 10.0), (0.46, 0.6, 0.1), (0, 0, 1.0)])
def test_the_advised_temperature_keeps_a_softmax_alive(median: float, wide: float, told: float) -> None:
    assert advised(median, wide) == pytest.approx(told)
    if told >= 1:
        assert np.exp(np.float32(-wide / told)) > 0
