"""What an export would choose and drop, from scores alone: before anything is written, and all of `--dry-run`.

Only what texts rule out (empty ones, those of a positive) is not known here; there is little of it.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.label_settings import Labels
from batch_rerank.labels.choose import DOCUMENT_REASONS, NEGATIVE, POSITIVE, QUERY_REASONS, Choice, choose
from batch_rerank.labels.rows import Qrels, UnitRows, Work, unit_rows
from batch_rerank.labels.scale import Spread, probabilities, saturated_count, spread_of

MARGINS = {"logit": (0.0, 0.5, 1.0, 2.0, 3.0, 5.0), "other": (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)}
"""Thresholds that are tried: of log-odds, and of cosines, z-scores and shares of ranks."""

SHARES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)

Threshold = tuple[str, float]


@dataclass
class Census:
    """Sums over parts. spreads: float32[n_queries with scores], probable: the same of probabilities; dropped and short:
    of each threshold, negatives that it would drop and queries that would have too few; pool: negatives without any
    threshold; saturated: None where scores have no probabilities."""

    counts: Counter[str] = field(default_factory=Counter)
    spreads: list[npt.NDArray[np.float32]] = field(default_factory=list)
    probable: list[npt.NDArray[np.float32]] = field(default_factory=list)
    saturated: int | None = None
    dropped: Counter[Threshold] = field(default_factory=Counter)
    short: Counter[Threshold] = field(default_factory=Counter)

    def add(self, other: "Census") -> None:
        """Count another part."""
        self.counts.update(other.counts)
        self.spreads += other.spreads
        self.probable += other.probable
        if other.saturated is not None:
            self.saturated = (self.saturated or 0) + other.saturated
        self.dropped.update(other.dropped)
        self.short.update(other.short)

    @property
    def spread(self) -> Spread:
        """Over all queries."""
        spreads = np.concatenate([np.empty(0, np.float32), *self.spreads])
        return spread_of(spreads, self.saturated, self.counts["scored"])

    def temperature(self, scale: str) -> float:
        """Advised for labels of a scale: by how far those of a query lie apart, which with min-max is 1."""
        if scale != "probability":
            return self.spread.temperature if scale == "logit" else 1.0
        return spread_of(np.concatenate([np.empty(0, np.float32), *self.probable]), None, 0).temperature

    @property
    def thresholds(self) -> list[dict[str, float | str]]:
        """A row for each threshold that was tried."""
        pool, queries = max(1, self.counts["pool"]), max(1, self.counts["queries_with_positive"])
        return [
            {
                "filter": kind,
                "value": value,
                "dropped": self.dropped[kind, value],
                "share": round(self.dropped[kind, value] / pool, 6),
                "queries_short": self.short[kind, value],
                "queries_short_share": round(self.short[kind, value] / queries, 6),
            }
            for kind, value in sorted(self.dropped)
        ]


def take_census(work: Work, labels: Labels, model: ModelSpec, qrels: Qrels) -> Census:
    """Of a part. Raises what `unit_rows` raises."""
    found = Census()
    for rows in unit_rows(work, labels, model, qrels):
        _count(found, rows, choose(rows.scored, labels), labels, model)
    return found


def _count(found: Census, rows: UnitRows, choice: Choice, labels: Labels, model: ModelSpec) -> None:
    scored = rows.scored
    usable = scored.reason == 0
    with_scores = np.isfinite(choice.low)
    found.counts.update(rows.counts)
    found.counts.update(counts_of(choice))
    found.counts["scored"] += int(usable.sum())
    found.spreads.append((choice.high - choice.low)[with_scores].astype(np.float32))
    if scored.probability is not None:
        found.saturated = (found.saturated or 0) + saturated_count(scored.probability[usable])
        low, high = (probabilities(one[with_scores], model) for one in (choice.low, choice.high))
        assert low is not None and high is not None, "the scores have probabilities"
        found.probable.append((high - low).astype(np.float32))
    good = np.isfinite(choice.positive) & (choice.low < choice.high)
    pool = choice.pool & good[scored.query]
    found.counts["pool"] += int(pool.sum())
    found.counts["queries_with_positive"] += int(good.sum())
    query, score = scored.query[pool], scored.score[pool]
    believed = scored.grade[pool] >= 0
    tried: list[tuple[Threshold, npt.NDArray[np.bool_]]] = []
    for margin in margins_of(labels, scored.probability is not None):
        tried.append((("margin", margin), score > (choice.positive - margin * scored.odds)[query]))
    if scored.probability is not None:
        positive = probabilities(choice.positive, model)
        assert positive is not None, "the scores have probabilities"
        for share in sorted({*SHARES, *([] if (own := labels.false_negatives.share) is None else [own])}):
            tried.append((("share", share), scored.probability[pool] > (share * positive)[query]))
    for threshold, suspect in tried:
        gone = suspect & ~believed
        left = np.bincount(query[~gone], minlength=len(good))
        found.dropped[threshold] += int(gone.sum())
        found.short[threshold] += int((good & (left < labels.least)).sum())


def margins_of(labels: Labels, logits: bool) -> Iterable[float]:
    """The margins that are tried, with that of the settings."""
    own = labels.false_negatives.margin
    return sorted({*MARGINS["logit" if logits else "other"], *([] if own is None else [own])})


def counts_of(choice: Choice) -> Counter[str]:
    """What was chosen, and what was dropped by reason."""
    left_out = np.bincount(choice.query_reason, minlength=len(QUERY_REASONS))
    dropped = np.bincount(choice.reason, minlength=len(DOCUMENT_REASONS))
    counts = Counter({f"dropped: {name}": int(dropped[n]) for n, name in enumerate(DOCUMENT_REASONS) if n})
    counts.update({f"left out: {name}": int(left_out[n]) for n, name in enumerate(QUERY_REASONS) if n})
    counts["labelled_queries"] = int(left_out[0])
    counts["positives"] = int((choice.role == POSITIVE).sum())
    counts["negatives"] = int((choice.role == NEGATIVE).sum())
    return counts
