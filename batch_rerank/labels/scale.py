"""Scores as labels: logits, probabilities, or 0..1 of each query; how far they spread, and what softmax makes of it."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from batch_rerank.engine.checkpoint import ModelSpec

Float64 = npt.NDArray[np.float64]

SATURATED = 1e-6
"""A probability this near to 0 or 1 says nothing more about the order."""

WIDEST = 16.6
"""ln(2^24): the spread of logits beyond which float32 does not tell the softmax of the last from 0 beside the first."""

FLATTEST = 4.6
"""ln(100): where scores are so near that the best is hardly above the worst, the spread that a temperature makes."""

PERCENTILES = (5, 25, 50, 75, 95)


def probabilities(scores: Float64, model: ModelSpec) -> Float64 | None:
    """The model's own map to 0..1, in float64: float32 is 1 from logit 17 on. None where it has none."""
    if model.relevance == "none":
        return None
    with np.errstate(over="ignore"):
        return np.asarray(1 / (1 + np.exp(-scores / model.relevance_scale)), np.float64)


def scaled(
    scores: Float64, probability: Float64 | None, low: Float64, high: Float64, scale: str
) -> npt.NDArray[np.float32]:
    """float32[n] labels of scores. low and high: the least and the greatest score of each one's query."""
    if scale == "probability":
        assert probability is not None, "checked before anything is read"
        return probability.astype(np.float32)
    if scale == "minmax":
        width = np.where(high > low, high - low, 1.0)
        return np.asarray((scores - low) / width, np.float32)
    return scores.astype(np.float32)


@dataclass(frozen=True)
class Spread:
    """Of the queries' greatest score minus their least: percentiles; saturated: share of the scores whose probability
    is within SATURATED of 0 or 1, None without such a map; temperature: advised for a softmax over a list."""

    percentiles: dict[str, float]
    saturated: float | None
    temperature: float


def spread_of(spreads: npt.NDArray[np.float32], saturated: int | None, scored: int) -> Spread:
    """Of each query's spread, and of counts of scores."""
    if not len(spreads):
        return Spread({f"p{one}": 0.0 for one in PERCENTILES}, None if saturated is None else 0.0, 1.0)
    found = np.percentile(spreads.astype(np.float64), PERCENTILES)
    at = {f"p{one}": round(float(value), 4) for one, value in zip(PERCENTILES, found, strict=True)}
    return Spread(
        at, None if saturated is None else round(saturated / max(1, scored), 6), advised(at["p50"], at["p95"])
    )


def advised(median: float, wide: float) -> float:
    """A temperature: above 1 where the softmax of wide lists would underflow, below 1 where that of most is flat."""
    if wide > WIDEST:
        return round(wide / WIDEST, 3)
    if 0 < median < 1:
        return float(f"{median / FLATTEST:.3g}")
    return 1.0


def saturated_count(probability: Float64) -> int:
    """How many probabilities are within SATURATED of 0 or 1."""
    return int(((probability < SATURATED) | (probability > 1 - SATURATED)).sum())
