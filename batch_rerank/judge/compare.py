"""Two outputs query by query: what moved, by how much, and whether the judgements see it."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from batch_rerank.errors import InputError, StorageError
from batch_rerank.judge.agreement import Float64
from batch_rerank.judge.evaluate import DEFAULT_MEASURES, paired, read_qrels, sums_of
from batch_rerank.judge.matched import Held, agreed, passes_over
from batch_rerank.judge.rankings import Ranking, published
from batch_rerank.publish.output import Place, open_output
from batch_rerank.store.manifest import Manifest
from batch_rerank.store.plans import Plan
from batch_rerank.store.verdict import why_unfinished

DEPTHS = (1, 10, 100)
MOVED = 10
"""Queries that are named."""

RESAMPLES, SEED = 2000, 0
LOSS = 0.01
"""Of a measure: how many queries it takes to see it is told."""


@dataclass(frozen=True)
class Moved:
    """A query that moved: its agreement, and its first documents there and here."""

    query_id: str
    rbo: float
    old: list[str]
    new: list[str]


@dataclass(frozen=True)
class Judged:
    """A measure over the judged queries that at least one output has; the other's value is zero where it lacks one.
    low, high: 95 % of the paired bootstrap of the mean difference; queries_to_see_a_loss: of 0.01 with a power of 0.8,
    None where nothing varies; queries: over how many; in_neither: judged queries that are in none of the two."""

    old: float
    new: float
    difference: float
    low: float
    high: float
    queries_to_see_a_loss: int | None
    queries: int
    in_neither: int


@dataclass(frozen=True)
class Comparison:
    """Means over the queries that both outputs have, None where there is none. tau: of the documents of a query that
    both have; shift: new score minus old of those pairs; gained and lost: documents that only one of them has;
    `differing`: fields of the two jobs, and output.top_k, empty where they are the same."""

    queries: int
    only_old: int
    only_new: int
    overlap: dict[str, float | None]
    rbo: float | None
    tau: float | None
    pairs: int
    gained: int
    lost: int
    shift_mean: float
    shift_mean_absolute: float
    shift_largest: float
    tolerance: float
    differing: list[str]
    moved: list[Moved]
    judged: dict[str, Judged] = field(default_factory=dict)


def compare(
    old: Place, new: Place, *, qrels: str | None = None, measures: Sequence[str] = (), tolerance: float | None = None
) -> Comparison:
    """Compare two finished outputs over the queries that they share. `tolerance`: scores that near tie; by the dtype of
    the coarser of the two jobs if None.

    Raises StorageError where one is not finished, and what `evaluate` raises.
    """
    (one, plan), (other, other_plan) = _opened(old), _opened(new)
    there, here = published(one, plan), published(other, other_plan)
    sums = _Sums(max(there.tolerance, here.tolerance) if tolerance is None else tolerance)
    passes = passes_over(there.rows, here.rows)
    for number in range(passes):
        sums.take(Held(there.tables(), number, passes), Held(here.tables(), number, passes))
    fields, others = plan.fingerprint_fields, other_plan.fingerprint_fields
    differing = [name for name in sorted({*fields, *others}) if fields.get(name) != others.get(name)]
    cuts = [found and found.fields.get("top_k") for found in (one.read_publication(), other.read_publication())]
    differing += ["output.top_k"] if cuts[0] != cuts[1] else []
    judged = {} if qrels is None else _judged(there, here, qrels, measures or DEFAULT_MEASURES)
    return sums.comparison(differing, judged)


def _opened(place: Place) -> tuple[Manifest, Plan]:
    manifest, plan = open_output(place)
    if not manifest.success.exists():
        raise StorageError(f"{manifest.root}: {why_unfinished(manifest)}, then compare")
    return manifest, plan


class _Sums:
    def __init__(self, tolerance: float) -> None:
        self._tolerance = tolerance
        self._queries = self._only_old = self._only_new = self._pairs = self._gained = self._lost = 0
        self._overlap, self._rbo = np.zeros(len(DEPTHS)), 0.0
        self._taus = self._tau = 0.0
        self._shift = self._absolute = self._largest = 0.0
        self._moved: list[tuple[float, int, Moved]] = []

    def take(self, old: Held, new: Held) -> None:
        """More queries, all of which are in these."""
        shared = [query for query in old if query in new]
        self._only_old += len(old) - len(shared)
        self._only_new += len(new) - len(shared)
        for query in shared:
            self._add(query, old, new)

    def _add(self, query: str, old: Held, new: Held) -> None:
        found = agreed(query, old, new, self._tolerance, DEPTHS)
        self._queries += 1
        self._overlap += found.overlap
        self._rbo += found.rbo
        if not np.isnan(found.tau):
            self._taus, self._tau = self._taus + 1, self._tau + found.tau
        self._pairs += len(found.shift)
        self._gained += found.gained
        self._lost += found.lost
        self._shift += float(found.shift.sum())
        self._absolute += float(np.abs(found.shift).sum())
        self._largest = max(self._largest, float(np.abs(found.shift).max(initial=0.0)))
        if found.rbo < 1 - 1e-12:
            least = (-found.rbo, -self._queries, Moved(query, found.rbo, found.old[:3], found.new[:3]))
            (heapq.heappush if len(self._moved) < MOVED else heapq.heappushpop)(self._moved, least)

    def comparison(self, differing: list[str], judged: dict[str, Judged]) -> Comparison:
        """The means."""
        queries, pairs = self._queries, max(1, self._pairs)
        return Comparison(
            queries=queries,
            only_old=self._only_old,
            only_new=self._only_new,
            overlap={
                str(depth): float(value) / queries if queries else None
                for depth, value in zip(DEPTHS, self._overlap, strict=True)
            },
            rbo=self._rbo / queries if queries else None,
            tau=self._tau / self._taus if self._taus else None,
            pairs=self._pairs,
            gained=self._gained,
            lost=self._lost,
            shift_mean=self._shift / pairs,
            shift_mean_absolute=self._absolute / pairs,
            shift_largest=self._largest,
            tolerance=self._tolerance,
            differing=differing,
            moved=[moved for _, _, moved in sorted(self._moved, key=lambda one: (one[2].rbo, -one[1]))],
            judged=judged,
        )


def _judged(old: Ranking, new: Ranking, qrels: str, measures: Sequence[str]) -> dict[str, Judged]:
    read = read_qrels(qrels)
    before, now = (sums_of(ranking.tables(), read, measures) for ranking in (old, new))
    if not before.queries and not now.queries:
        raise InputError(
            f"{qrels}: none of its {len(read):,} queries is in {old.name} or {new.name}, e.g. {next(iter(read))!r}; "
            "expected judgements of these queries, by their query_id"
        )
    judged = {}
    for name in before.seen:
        values = np.array(list(paired(before, now, name).values()))
        differences = values[:, 1] - values[:, 0]
        low, high = bootstrap(differences)
        deviation = float(differences.std(ddof=1)) if len(differences) > 1 else 0.0
        # normal approximation, two-sided 5 %, power 80 %: (1.960 + 0.842) standard errors
        needed = int(np.ceil(((1.959964 + 0.841621) * deviation / LOSS) ** 2)) if deviation else None
        means = values.mean(axis=0).tolist()
        found = (means[0], means[1], float(differences.mean()), low, high, needed)
        judged[name] = Judged(*found, queries=len(values), in_neither=len(read) - len(values))
    return judged


def bootstrap(differences: Float64) -> tuple[float, float]:
    """95 % of the means of resampled paired differences: percentiles."""
    low, high = np.percentile(resampled(differences), [2.5, 97.5]).tolist()
    return low, high


def resampled(differences: Float64) -> Float64:
    """float64[RESAMPLES], means of resampled paired differences, seeded; a few resamples at a time."""
    random = np.random.default_rng(SEED)
    at_once = max(1, 10_000_000 // len(differences))
    means = [
        differences[random.integers(0, len(differences), (min(at_once, RESAMPLES - done), len(differences)))].mean(
            axis=1
        )
        for done in range(0, RESAMPLES, at_once)
    ]
    return np.concatenate(means)
