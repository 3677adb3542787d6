"""Totals from a sample, with what they may be: the ratio estimator of cluster samples, its variance by the jackknife.

Both as in Cochran, Sampling Techniques (3rd ed., 1977), 6.3 and 9A: a total is (sum of y / sum of x) over the sample
times the known total of x, here the pairs; leaving out one cluster at a time shows how far that varies.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

NOMINAL = 0.985
"""Quantile whose interval covers the truth 95 times of 100 on skewed lengths: the variance is an estimate too."""

UNSURE = 1.0
"""Standard deviation of the logarithm of a total that rests on one cluster."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Range:
    """A number that is not certain: half of the time it is below p50, 90 % of the time below p90, 95 % of the time
    between low and high. A certain one has four that are equal."""

    low: float
    p50: float
    p90: float
    high: float

    @staticmethod
    def exact(value: float) -> "Range":
        """A certain number."""
        return Range(value, value, value, value)

    @property
    def certain(self) -> bool:
        """Whether nothing is uncertain."""
        return self.low == self.high

    def times(self, factor: float) -> "Range":
        """Of so many times as much."""
        return Range(self.low * factor, self.p50 * factor, self.p90 * factor, self.high * factor)

    def plus(self, value: float) -> "Range":
        """With something certain beside it."""
        return Range(self.low + value, self.p50 + value, self.p90 + value, self.high + value)

    def spread(self, relative: float) -> "Range":
        """The same, with another cause of uncertainty: a relative standard deviation that knows nothing of this one."""
        if not self.p50:
            return self
        below = self.p50 / self.low if self.low else math.inf
        given = (below, 1.96), (self.p90 / self.p50, 1.2816), (self.high / self.p50, 1.96)
        low, p90, high = (lognormal(self.p50, math.hypot(math.log(ratio) / z, relative)) for ratio, z in given)
        return Range(low.low, self.p50, p90.p90, max(p90.p90, high.high))

    def within(self, low: float, high: float) -> "Range":
        """Cut where it cannot be."""
        return Range(*(min(high, max(low, value)) for value in (self.low, self.p50, self.p90, self.high)))

    def json(self, whole: bool = False) -> Any:
        """A number, or an object of four."""

        def told(value: float) -> float:
            return round(value) if whole else float(f"{value:.6g}")

        if self.certain:
            return told(self.p50)
        return {"low": told(self.low), "p50": told(self.p50), "p90": told(self.p90), "high": told(self.high)}


def lognormal(p50: float, relative: float) -> Range:
    """Around p50, with a standard deviation of the logarithm of `relative`."""
    return Range(
        p50 * math.exp(-1.96 * relative), p50, p50 * math.exp(1.2816 * relative), p50 * math.exp(1.96 * relative)
    )


def totals(y: Floats, x: Floats, pairs: float, population: int, corrected: bool) -> list[Range]:
    """The totals of y[clusters, measures], none of them negative, over a plan of `pairs` pairs, x[clusters] being those
    of the clusters.

    corrected: every cluster was read whole, so that the share of `population` that was read is certain. The interval is
    one of the logarithm, for what texts come to is skewed; its degrees of freedom are Satterthwaite's (1946), few where
    few clusters make the variance. A symmetric one with n - 1 missed the truth 9 to 19 times of 100 on lognormal
    lengths. Of what no cluster has, up to 3 in n clusters may consist: 0.05 is about (1 - 3 / n) ** n. Clusters without
    pairs say nothing; where fewer than two have any, how far they vary is not known, and UNSURE stands for it.
    """
    y, x = y[x > 0], x[x > 0]
    n = len(x)
    if n < 2:
        shares = (y.sum(0) / x.sum()).tolist() if n else [0.0] * y.shape[1]
        return [lognormal(one * pairs, UNSURE) if one else Range(0.0, 0.0, 0.0, pairs) for one in shares]
    ratio = y.sum(0) / x.sum()
    left_out = (y.sum(0) - y) / (x.sum() - x)[:, None]
    squares = (left_out - left_out.mean(0)) ** 2
    variance = (n - 1) / n * squares.sum(0)
    freedom = squares.sum(0) ** 2 / np.maximum((squares**2).sum(0), 1e-300)
    if corrected:
        variance *= 1 - n / population
    read = y.sum(0) if corrected else np.zeros(y.shape[1])
    found = []
    for one, spread, free, least in zip(
        ratio.tolist(), np.sqrt(variance).tolist(), freedom.tolist(), read.tolist(), strict=True
    ):
        if not one:
            ninety, most = (pairs * min(1.0, -math.log(1 - share) / n) for share in (0.9, 0.95))
            found.append(Range(0.0, 0.0, ninety, most) if n < population else Range.exact(0.0))
            continue
        half, ninety = (student(share, free) * spread / one for share in (NOMINAL, 0.9))
        p50 = one * pairs
        low = max(least, p50 * math.exp(-half))
        found.append(Range(low, p50, max(least, p50 * math.exp(ninety)), max(least, p50 * math.exp(half))))
    return found


def student(share: float, freedom: float) -> float:
    """The quantile of Student's t, by the expansion of Abramowitz and Stegun (1964), 26.7.5; three degrees at least,
    where it is 3 % off at most."""
    z, v = NormalDist().inv_cdf(share), max(3, freedom)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return float(z + sum(term / v**power for power, term in enumerate(terms, 1)))


def distinct(seen: Sequence[npt.NDArray[np.uint64]], total: float) -> Range:
    """How many distinct texts there are among `total`, from the hashes of those that were read, unit by unit in an
    order that means nothing.

    low: those that were seen; high: what is new in the sample stays new; p50: the growth of the last half of the sample
    goes on (Heaps' law).
    """
    whole = np.concatenate(seen) if seen else np.empty(0, np.uint64)
    d, n = len(np.unique(whole)), len(whole)
    if n == 0 or n >= total:
        return Range.exact(d)
    half = np.concatenate(seen[: max(1, len(seen) // 2)])
    d_half, n_half = len(np.unique(half)), len(half)
    growth = math.log(d / d_half) / math.log(n / n_half) if n > n_half and d > d_half > 0 else 0.0
    high = d * total / n
    p50 = min(high, d * (total / n) ** min(1.0, growth))
    return Range(d, p50, math.sqrt(p50 * high), high)
