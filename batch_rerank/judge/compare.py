"""Two outputs query by query: what moved, by how much, and whether the judgements see it."""

import heapq
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batch_rerank.errors import StorageError
from batch_rerank.input.layouts import run_starts
from batch_rerank.judge.agreement import kendall, overlap, rbo, settled
from batch_rerank.judge.evaluate import DEFAULT_MEASURES, evaluate
from batch_rerank.publish.output import Place, open_output
from batch_rerank.publish.read_parts import read_part
from batch_rerank.store.manifest import PUBLICATION, Manifest
from batch_rerank.store.plans import Plan

DEPTHS = (1, 10, 100)
MOVED = 10
"""Queries that are named."""

HELD_ROWS = 10_000_000
"""Rows of an output that are held at once: more queries are compared in several passes, by a hash of their ids."""

TOLERANCE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 4e-2}
"""Differences of scores that are noise, by what they were computed in: twice what another batch was seen to change."""

RESAMPLES, SEED = 2000, 0
LOSS = 0.01
"""Of a measure: how many queries it takes to see it is told."""

COLUMNS = ["query_id", "doc_id", "score"]


@dataclass(frozen=True)
class Moved:
    """A query that moved: its agreement, and its first documents there and here."""

    query_id: str
    rbo: float
    old: list[str]
    new: list[str]


@dataclass(frozen=True)
class Judged:
    """A measure over the queries of the qrels. low, high: 95 % of the paired bootstrap of the mean difference;
    queries_to_see_a_loss: of 0.01 with a power of 0.8, None where nothing varies."""

    old: float
    new: float
    difference: float
    low: float
    high: float
    queries_to_see_a_loss: int | None


@dataclass(frozen=True)
class Comparison:
    """Means over the queries that both outputs have. tau: of the documents of a query that both have; shift: new score
    minus old of those pairs; gained and lost: documents that only one of them has; `differing`: fields of the two
    jobs, empty where they are the same."""

    queries: int
    only_old: int
    only_new: int
    overlap: dict[str, float]
    rbo: float
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
    allowed = _tolerance(plan, other_plan) if tolerance is None else tolerance
    sums = _Sums(allowed)
    passes = max(1, -(-max(_rows(one), _rows(other)) // HELD_ROWS))
    for number in range(passes):
        sums.take(_Held(one, number, passes), _Held(other, number, passes))
    fields, others = plan.fingerprint_fields, other_plan.fingerprint_fields
    differing = [name for name in sorted({*fields, *others}) if fields.get(name) != others.get(name)]
    judged = {} if qrels is None else _judged(old, new, qrels, measures or DEFAULT_MEASURES)
    return sums.comparison(differing, judged)


def _opened(place: Place) -> tuple[Manifest, Plan]:
    manifest, plan = open_output(place)
    if not manifest.success.exists():
        raise StorageError(f"{manifest.root}: no _SUCCESS, it is not finished; run it to the end, then compare")
    return manifest, plan


def _tolerance(*plans: Plan) -> float:
    return max(TOLERANCE.get(str(plan.model.get("dtype")), TOLERANCE["bfloat16"]) for plan in plans)


def _rows(manifest: Manifest) -> int:
    mark = manifest.read_mark()
    return 0 if mark is None else mark.rows


class _Held:
    """The queries of an output whose ids have one hash of so many, each with its documents in the order of their
    ranks."""

    def __init__(self, manifest: Manifest, number: int, passes: int) -> None:
        tables = [_of_pass(rows, number, passes) for rows in _parts(manifest)]
        rows = pa.concat_tables(tables) if tables else pa.table({name: pa.array([], pa.string()) for name in COLUMNS})
        self._documents = rows["doc_id"].combine_chunks() if len(rows) else pa.array([], pa.string())
        self._scores = pc.cast(rows["score"], pa.float64()).to_numpy()  # NaN where null
        ids = rows["query_id"].combine_chunks()
        starts = run_starts(ids)
        names = ids.take(pa.array(starts)).to_pylist()
        self._at = dict(zip(names, zip(starts.tolist(), [*starts.tolist()[1:], len(rows)], strict=True), strict=True))

    def __iter__(self) -> Iterator[str]:
        return iter(self._at)

    def __contains__(self, query_id: str) -> bool:
        return query_id in self._at

    def __len__(self) -> int:
        return len(self._at)

    def ranking(self, query_id: str) -> tuple[list[str], "np.ndarray"]:
        """Documents, best first, and their scores, float64."""
        start, stop = self._at[query_id]
        return self._documents[start:stop].to_pylist(), self._scores[start:stop]


def _parts(manifest: Manifest) -> Iterator[pa.Table]:
    publication = manifest.read_publication()
    if publication is None:
        raise StorageError(f"{manifest.root}: _SUCCESS without {PUBLICATION}; the manifest is damaged; run it again")
    for number in range(len(publication.parts)):
        yield from read_part(manifest.part(number), COLUMNS)


def _of_pass(rows: pa.Table, number: int, passes: int) -> pa.Table:
    if passes == 1:
        return rows
    ids = rows["query_id"].combine_chunks()
    starts = run_starts(ids)
    names = ids.take(pa.array(starts)).to_pylist()
    mine = [zlib.crc32(name.encode()) % passes == number for name in names]
    lengths = np.diff(np.append(starts, len(rows)))
    return rows.filter(pa.array(np.repeat(mine, lengths)))


class _Sums:
    def __init__(self, tolerance: float) -> None:
        self._tolerance = tolerance
        self._queries = self._only_old = self._only_new = self._pairs = self._gained = self._lost = 0
        self._overlap, self._rbo = np.zeros(len(DEPTHS)), 0.0
        self._taus = self._tau = 0.0
        self._shift = self._absolute = self._largest = 0.0
        self._moved: list[tuple[float, int, Moved]] = []

    def take(self, old: _Held, new: _Held) -> None:
        """More queries, all of which are in these."""
        shared = [query for query in old if query in new]
        self._only_old += len(old) - len(shared)
        self._only_new += len(new) - len(shared)
        for query in shared:
            self._add(query, old, new)

    def _add(self, query: str, old: _Held, new: _Held) -> None:
        (there, before), (here, after) = old.ranking(query), new.ranking(query)
        number = {document: index for index, document in enumerate(there)}
        one = np.arange(len(there))
        other = np.array([number.setdefault(document, len(number)) for document in here], np.int64)
        common = other < len(there)
        shift = after[common] - before[other[common]]
        shift = shift[~np.isnan(shift)]
        other = settled(other, after, one, self._tolerance)
        one = settled(one, before, other, self._tolerance)
        agreed = rbo(one, other)
        self._queries += 1
        self._overlap += [overlap(one, other, depth) for depth in DEPTHS]
        self._rbo += agreed
        tau = kendall(one, other)
        if not np.isnan(tau):
            self._taus, self._tau = self._taus + 1, self._tau + tau
        self._pairs += len(shift)
        self._gained += int((~common).sum())
        self._lost += len(there) - int(common.sum())
        self._shift += float(shift.sum())
        self._absolute += float(np.abs(shift).sum())
        self._largest = max(self._largest, float(np.abs(shift).max(initial=0.0)))
        if agreed < 1 - 1e-12:
            least = (-agreed, -self._queries, Moved(query, agreed, there[:3], here[:3]))
            (heapq.heappush if len(self._moved) < MOVED else heapq.heappushpop)(self._moved, least)

    def comparison(self, differing: list[str], judged: dict[str, Judged]) -> Comparison:
        """The means."""
        queries, pairs = max(1, self._queries), max(1, self._pairs)
        return Comparison(
            queries=self._queries,
            only_old=self._only_old,
            only_new=self._only_new,
            overlap={str(depth): float(value) / queries for depth, value in zip(DEPTHS, self._overlap, strict=True)},
            rbo=self._rbo / queries,
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


def _judged(old: Place, new: Place, qrels: str, measures: Sequence[str]) -> dict[str, Judged]:
    results = [evaluate(place, qrels, measures).after_by_query for place in (old, new)]
    judged = {}
    for name, before in results[0].items():
        values = np.array([[before[query], results[1][name][query]] for query in before])
        differences = values[:, 1] - values[:, 0]
        low, high = bootstrap(differences)
        deviation = float(differences.std(ddof=1)) if len(differences) > 1 else 0.0
        # normal approximation, two-sided 5 %, power 80 %: (1.960 + 0.842) standard errors
        needed = int(np.ceil(((1.959964 + 0.841621) * deviation / LOSS) ** 2)) if deviation else None
        means = values.mean(axis=0).tolist()
        judged[name] = Judged(means[0], means[1], float(differences.mean()), low, high, needed)
    return judged


def bootstrap(differences: "np.ndarray") -> tuple[float, float]:
    """95 % of the means of resampled paired differences: percentiles, seeded, a few resamples at a time."""
    random = np.random.default_rng(SEED)
    at_once = max(1, 10_000_000 // len(differences))
    means = [
        differences[random.integers(0, len(differences), (min(at_once, RESAMPLES - done), len(differences)))].mean(
            axis=1
        )
        for done in range(0, RESAMPLES, at_once)
    ]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5]).tolist()
    return low, high
