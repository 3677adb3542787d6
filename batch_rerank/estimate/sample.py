"""Which units are read to count a plan: all where that is little, else a seeded sample, by what reading them costs."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np

from batch_rerank.input.shards import STREAM_BYTES
from batch_rerank.store.plans import Plan, Unit


@dataclass(frozen=True)
class Budget:
    """How much is read. text: bytes that are tokenised, about, of which units have parts where they are large; read:
    bytes that are decoded to come to them, at most; least and most: units."""

    text: float = 24 * 2**20
    read: float = 6 * 2**30
    least: int = 40
    most: int = 400


SAMPLED = Budget()
ALL = Budget(text=float("inf"), read=float("inf"))


@dataclass(frozen=True)
class Cluster:
    """Units that are sampled together: `units` are read, of `among` that could have been."""

    units: tuple[Unit, ...]
    among: int


@dataclass(frozen=True)
class Sample:
    """Clusters of a plan, drawn at random without replacement from `population` of them. whole: nothing is left; share:
    of each unit's queries that is counted."""

    clusters: tuple[Cluster, ...]
    population: int
    whole: bool = False
    share: float = 1.0

    @property
    def units(self) -> list[Unit]:
        """All that are read, in the plan's order."""
        return sorted((unit for one in self.clusters for unit in one.units), key=lambda unit: unit.id)


def choose(plan: Plan, seed: int, budget: Budget) -> Sample | None:
    """A sample of a plan's units; None where not even a few can be read within the budget.

    Units are drawn one by one where the row groups that they lie in can be decoded up to them within the budget. Large
    row groups cannot: then some are drawn, and several units in each, and a cluster is a row group.
    """
    units = plan.units
    groups = _row_groups(plan)
    sizes = [_bytes_of(unit, groups) for unit in units]
    if (sum(sizes) <= budget.text or len(units) == 1) and _reading(units, groups) <= budget.read:
        return Sample(tuple(Cluster((unit,), 1) for unit in units), len(units), whole=True)
    rng = np.random.default_rng(seed)
    wanted = int(budget.text / max(1.0, sum(sizes) / max(1, len(units))))
    n = min(len(units), max(budget.least, min(budget.most, wanted)))
    drawn = [units[at] for at in sorted(rng.choice(len(units), n, replace=False).tolist())]
    share = min(1.0, budget.text / max(1.0, n * sum(sizes) / max(1, len(units))))
    if _reading(drawn, groups) <= budget.read:
        return Sample(tuple(Cluster((unit,), 1) for unit in drawn), len(units), share=share)
    found = _by_row_group(plan, groups, rng, n, budget)
    return found and replace(found, share=share)


@dataclass(frozen=True)
class _Groups:
    """Of a shard: the row at which each row group ends, its rows and bytes."""

    ends: list[int]
    rows: list[int]
    sizes: list[int]

    def of(self, row: int) -> int:
        return min(int(np.searchsorted(self.ends, row, side="right")), len(self.ends) - 1)


def _row_groups(plan: Plan) -> list[_Groups]:
    return [
        _Groups(
            list(accumulate(rows for rows, _ in shard.row_groups)),
            [rows for rows, _ in shard.row_groups],
            [size for _, size in shard.row_groups],
        )
        for shard in plan.shards
    ]


def _bytes_of(unit: Unit, groups: Sequence[_Groups]) -> float:
    """Of a unit's rows, by the mean of the row group that it begins in."""
    of_shard = groups[unit.shard]
    if not of_shard.ends:
        return 0.0
    group = of_shard.of(unit.start)
    return (unit.stop - unit.start) * of_shard.sizes[group] / max(1, of_shard.rows[group])


def _reading(units: Sequence[Unit], groups: Sequence[_Groups]) -> float:
    """Bytes that are decoded to come to some units: small row groups whole, large ones up to the last unit in them."""
    last: dict[tuple[int, int], int] = defaultdict(int)
    for unit in units:
        of_shard = groups[unit.shard]
        if not of_shard.ends:
            continue
        for group in range(of_shard.of(unit.start), of_shard.of(max(unit.start, unit.stop - 1)) + 1):
            start = of_shard.ends[group] - of_shard.rows[group]
            reached = min(unit.stop - start, of_shard.rows[group])
            last[unit.shard, group] = max(last[unit.shard, group], reached)
    total = 0.0
    for (shard, group), reached in last.items():
        size, rows = groups[shard].sizes[group], groups[shard].rows[group]
        total += size if size <= STREAM_BYTES else size * reached / max(1, rows)
    return total


def _by_row_group(
    plan: Plan, groups: Sequence[_Groups], rng: np.random.Generator, n: int, budget: Budget
) -> Sample | None:
    members: dict[tuple[int, int], list[Unit]] = defaultdict(list)
    for unit in plan.units:
        members[unit.shard, groups[unit.shard].of(unit.start)].append(unit)
    places = list(members)
    order = rng.permutation(len(places)).tolist()
    mean = sum(groups[shard].sizes[group] for shard, group in places) / len(places)
    affordable = max(1, int(budget.read / max(1.0, mean)))
    each = max(1, -(-n // min(affordable, len(places))))
    clusters: list[Cluster] = []
    spent = 0.0
    for at in order:
        of_group = members[places[at]]
        chosen = sorted(rng.choice(len(of_group), min(each, len(of_group)), replace=False).tolist())
        cluster = Cluster(tuple(of_group[index] for index in chosen), len(of_group))
        spent += _reading(cluster.units, groups)
        if spent > budget.read:
            break
        clusters.append(cluster)
        if sum(len(one.units) for one in clusters) >= n:
            break
    return Sample(tuple(clusters), len(places)) if len(clusters) > 1 else None
