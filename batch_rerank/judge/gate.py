"""Whether scores may be published: each condition of a gate, what was found, and the rows behind what does not hold.

A measure is its mean over the queries of the qrels, as in `evaluate`. A loss is judged for non-inferiority: the lower
end of what the paired difference may be, one-sided 95 % of a seeded bootstrap, must not be below what is allowed; so a
loss that is too large is not let through because few queries could not show it. Agreement is over the queries that both
outputs have, with ties as in `compare`.
"""

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from batch_rerank.conditions import Condition, Level, measure_of
from batch_rerank.errors import ConfigError
from batch_rerank.judge.compare import resampled
from batch_rerank.judge.evaluate import Qrels, Sums, paired
from batch_rerank.judge.matched import Agreed, Held, agreed, passes_over
from batch_rerank.judge.rankings import Ranking
from batch_rerank.store.verdict import FAILED, HELD, PASSED_OVER, Judged

BEHIND = 100
"""Rows that are named behind a condition that does not hold."""

ONE_SIDED = 5.0
"""Percentile of the resampled differences that is their lower end."""

Conditions = Sequence[tuple[Level, Condition]]
Row = dict[str, Any]


@dataclass(frozen=True)
class Shares:
    """Counts of receipts, of `rows_in` candidates; rows: the first rows behind one of them."""

    counts: Mapping[str, int]
    rows: Callable[[str], list[Row]]


def judge(
    conditions: Conditions, new: Ranking, old: Ranking | None, qrels: Qrels | None, shares: Shares
) -> list[Judged]:
    """Each condition in its turn. Those about an earlier output are passed over where `old` is None.

    Raises ConfigError where the qrels, or the earlier output, are of other queries, and StorageError.
    """
    wanted = [condition for _, condition in conditions if old is not None or not condition.needs_earlier]
    seen = _Seen(wanted, qrels or {})
    seen.look(new, old)
    lines = []
    for level, condition in conditions:
        if condition not in wanted:
            lines.append(Judged(condition.text, level, PASSED_OVER, said="no earlier output"))
            continue
        found = _share(condition, shares) if condition.kind == "share" else seen.found(condition)
        holds = condition.holds(found.value)
        rows = [] if holds else found.rows()
        lines.append(Judged(condition.text, level, HELD if holds else FAILED, found.value, found.said, rows))
    return lines


@dataclass(frozen=True)
class _Found:
    value: float | None
    said: str
    rows: Callable[[], list[Row]]


def _share(condition: Condition, shares: Shares) -> _Found:
    count, of = shares.counts[condition.name], shares.counts["rows_in"]
    share = count / of if of else 0.0
    return _Found(share, f"{share:.4g}, {count:,} of {of:,} candidates", lambda: shares.rows(condition.name))


class _Seen:
    """What one look at the rankings shows for some conditions."""

    def __init__(self, conditions: Sequence[Condition], qrels: Qrels) -> None:
        self._qrels = qrels
        measures = [one for one in conditions if one.needs_qrels]
        losses = [one for one in measures if one.kind == "loss"]
        self._new, self._old = _sums(measures, qrels), _sums(losses, qrels)
        self._agreements = [_Mean(one) for one in conditions if one.kind == "agreement"]
        self._depths = sorted({one.depth for one in conditions if one.depth})
        self._common = 0

    def look(self, new: Ranking, old: Ranking | None) -> None:
        """Read both, once or as often as memory makes it necessary."""
        here, there = _watched(new.tables(), self._new), _watched(old.tables(), self._old) if old else iter(())
        if old is not None and self._agreements:
            passes, tolerance = passes_over(new.rows, old.rows), max(new.tolerance, old.tolerance)
            for number in range(passes):
                if number:
                    here, there = new.tables(), old.tables()
                self._match(Held(there, number, passes), Held(here, number, passes), tolerance)
            if not self._common:
                raise ConfigError(f"gate.against: {old.name} and {new.name} have no query in common; expected some")
        _measured(here, self._new, "gate.qrels", new.name, self._qrels)
        _measured(there, self._old, "gate.qrels", old.name if old else "", self._qrels)

    def _match(self, old: Held, new: Held, tolerance: float) -> None:
        for query in old:
            if query in new:
                found = agreed(query, old, new, tolerance, self._depths)
                self._common += 1
                for mean in self._agreements:
                    mean.add(query, found, self._depths, tolerance)

    def found(self, condition: Condition) -> _Found:
        """What there is to say of a condition."""
        if condition.kind == "measure":
            assert self._new is not None
            return _mean(condition, self._new, self._qrels)
        if condition.kind == "loss":
            assert self._new is not None and self._old is not None
            return _loss(condition.name, self._old, self._new)
        mean = next(one for one in self._agreements if one.condition == condition)
        return mean.found(self._common)


def _sums(conditions: Sequence[Condition], qrels: Qrels) -> Sums | None:
    names = dict.fromkeys(one.name for one in conditions)
    return Sums([measure_of(name) for name in names], qrels) if names else None


def _watched(tables: Iterator[pa.Table], sums: Sums | None) -> Iterator[pa.Table]:
    for rows in tables:
        if sums is not None:
            sums.add(rows, "rank")
        yield rows


def _measured(rest: Iterator[pa.Table], sums: Sums | None, key: str, name: str, qrels: Qrels) -> None:
    """Take what has not been read yet into the sums."""
    if sums is None:
        return
    for _ in rest:
        pass
    sums.calculate()
    if not sums.queries:
        raise ConfigError(
            f"{key}: none of its {len(qrels):,} queries is in {name}, e.g. {next(iter(qrels))!r}; expected judgements "
            "of these queries, by their query_id"
        )


def _mean(condition: Condition, sums: Sums, qrels: Qrels) -> _Found:
    values = sums.by_query[condition.name]
    mean = float(np.mean(list(values.values())))
    missing = len(qrels) - sums.queries
    lacks = f", {missing:,} of which are not in the output" if missing else ""

    def rows() -> list[Row]:
        worst = sorted(values, key=lambda query: values[query], reverse=not condition.at_least)
        return [
            {"query_id": query, condition.name: values[query]}
            for query in worst[:BEHIND]
            if not condition.holds(values[query])
        ]

    return _Found(mean, f"{mean:.4f} over {len(values):,} judged queries{lacks}", rows)


def _loss(name: str, old: Sums, new: Sums) -> _Found:
    pairs = paired(old, new, name)
    differences = np.array([now - before for before, now in pairs.values()])
    lower = float(np.percentile(resampled(differences), ONE_SIDED))
    least = f"a loss of up to {0.0 - lower:.4f}" if lower <= 0 else f"a gain of {lower:.4f} at least"
    missing = len(old.qrels) - len(pairs)
    lacks = f"; {missing:,} more are in neither output" if missing else ""
    said = f"{least} ({differences.mean():+.4f} on average over {len(differences):,} judged queries{lacks})"

    def rows() -> list[Row]:
        worst = sorted(pairs, key=lambda query: pairs[query][1] - pairs[query][0])[:BEHIND]
        lost = {query: pairs[query] for query in worst if pairs[query][1] < pairs[query][0]}
        return [
            {"query_id": query, f"{name} before": before, f"{name} now": now} for query, (before, now) in lost.items()
        ]

    return _Found(0.0 - lower, said, rows)


@dataclass
class _Mean:
    """The mean of an agreement over queries, and the queries that are worst. shifted: over pairs, not queries."""

    condition: Condition
    _sum: float = 0.0
    _of: int = 0
    _worst: list[tuple[float, int, Row]] = field(default_factory=list)

    def add(self, query: str, one: Agreed, depths: Sequence[int], tolerance: float) -> None:
        """A query."""
        name = self.condition.name
        if name == "shifted":
            sum_, of = float((np.abs(one.shift) > tolerance).sum()), len(one.shift)
        else:
            depth = self.condition.depth
            sum_, of = one.overlap[depths.index(depth)] if depth else one.rbo if name == "rbo" else one.tau, 1
        if not of or np.isnan(sum_):
            return
        self._sum, self._of, value = self._sum + sum_, self._of + of, sum_ / of
        if not self.condition.holds(value):
            row = {"query_id": query, name: value, "before": one.old[:3], "now": one.new[:3]}
            entry = (-value if self.condition.at_least else value, -self._of, row)
            (heapq.heappush if len(self._worst) < BEHIND else heapq.heappushpop)(self._worst, entry)

    def found(self, common: int) -> _Found:
        """The mean, over queries that both have."""
        if not self._of:
            return _Found(None, f"nothing in {common:,} common queries that it is defined for", list)
        mean = self._sum / self._of
        what = f"{self._of:,} common pairs" if self.condition.name == "shifted" else f"{self._of:,} common queries"
        return _Found(mean, f"{mean:.4f} over {what}", lambda: [row for *_, row in sorted(self._worst, reverse=True)])
