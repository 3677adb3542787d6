"""How far two rankings of one query agree. Rankings are arrays of whole numbers that name documents, best first.

Scores that lie within a tolerance of each other are ties: bfloat16 scores differ with the batch that they were computed
in, and what such noise turns has not moved. So before anything is compared `settled` orders ties alike in both.
"""

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]

SMALL = 64
"""Documents whose inversions are counted pair by pair."""


def settled(documents: Int64, scores: Float64, other: Int64, tolerance: float) -> Int64:
    """A ranking with its ties in the order of another one. Documents tie with the best of their group as long as their
    scores are within `tolerance` of it, so that a long chain of small steps is no tie. Those that the other lacks, and
    those without a score (NaN), stay behind in their order."""
    if tolerance <= 0 or len(documents) < 2:
        return documents
    place = np.full(int(max(documents.max(), other.max(initial=0))) + 1, len(other), np.int64)
    place[other] = np.arange(len(other))
    groups = np.zeros(len(documents), np.int64)
    first, group = scores[0], 0
    for index, score in enumerate(scores.tolist()):
        if not first - score <= tolerance:  # NaN ties with nothing
            first, group = score, group + 1
        groups[index] = group
    return documents[np.lexsort((np.arange(len(documents)), place[documents], groups))]


def overlap(one: Int64, other: Int64, depth: int) -> float:
    """Share of the first `depth` documents that two rankings have in common, 0 to 1; of all where both are shorter."""
    depth = min(depth, max(len(one), len(other)))
    return len(np.intersect1d(one[:depth], other[:depth], assume_unique=True)) / depth if depth else 1.0


def rbo(one: Int64, other: Int64, p: float = 0.9) -> float:
    """Rank-biased overlap, extrapolated: RBO_EXT of Webber, Moffat and Zobel (2010), equation 32, which allows for
    lists of different lengths. 0 to 1; 1 for two empty lists, 0 where one is."""
    short, long = sorted((one, other), key=len)
    s, n = len(short), len(long)
    if not n:
        return 1.0
    if not s:
        return 0.0
    size = int(max(short.max(), long.max())) + 1
    seen_short, seen_long = np.full(size, n + 1, np.int64), np.full(size, n + 1, np.int64)
    seen_short[short], seen_long[long] = np.arange(1, s + 1), np.arange(1, n + 1)
    both = np.maximum(seen_short, seen_long)  # the depth at which a document is in both
    common = np.cumsum(np.bincount(both[both <= n], minlength=n + 1))[1:].astype(np.float64)
    depth = np.arange(1, n + 1, dtype=np.float64)
    weight = p**depth
    agreed = (common / depth * weight).sum()
    beyond = depth > s
    agreed += (common[s - 1] * (depth[beyond] - s) / (s * depth[beyond]) * weight[beyond]).sum()
    rest = ((common[-1] - common[s - 1]) / n + common[s - 1] / s) * p**n
    return float((1 - p) / p * agreed + rest)


def kendall(one: Int64, other: Int64) -> float:
    """Kendall's tau of the documents that are in both, which do not tie: -1 to 1; NaN for fewer than two."""
    size = int(max(one.max(initial=0), other.max(initial=0))) + 1
    place = np.full(size, -1, np.int64)
    place[other] = np.arange(len(other))
    found = place[one]
    found = found[found >= 0]
    pairs = len(found) * (len(found) - 1) / 2
    return 1 - 2 * inversions(found) / pairs if pairs else float("nan")


def inversions(values: Int64) -> int:
    """How many pairs of distinct numbers stand the wrong way round."""
    return _sort(values)[0]


def _sort(values: Int64) -> tuple[int, Int64]:
    if len(values) <= SMALL:
        later = values[:, None] > values
        return int(np.triu(later, 1).sum()), np.sort(values)
    middle = len(values) // 2
    (count, left), (more, right) = _sort(values[:middle]), _sort(values[middle:])
    between = len(left) * len(right) - int(np.searchsorted(left, right).sum())
    return count + more + between, np.sort(np.concatenate([left, right]), kind="stable")
