"""What a plan comes to: counts of some of its units as totals of them all, certain or as ranges."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from batch_rerank.config import JobConfig
from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.engine.work import Arithmetic, Work
from batch_rerank.estimate.count import Counted, Remembering, count_units
from batch_rerank.estimate.ranges import Range, distinct, totals
from batch_rerank.estimate.sample import Sample
from batch_rerank.score.reuse import Reuse
from batch_rerank.store.plans import Plan

MEASURES = ("scored", "failed", "tokens", "truncated", "reused", "computed_tokens", "flop", "unit_texts")


@dataclass(frozen=True)
class Tally:
    """Totals of a plan. scored: pairs that get a score, reused ones among them; failed: rows with a null text or query;
    tokens, truncated: as receipts count them; computed_tokens, flop: what a model computes (engine/work.py); documents:
    distinct texts of documents; repeats: pairs whose document's text an earlier pair has. Pairs are certain."""

    pairs: int
    units: int
    units_read: int
    exact: bool
    scored: Range
    failed: Range
    tokens: Range
    truncated: Range
    reused: Range
    computed_tokens: Range
    flop: Range
    documents: Range

    @property
    def repeats(self) -> Range:
        """Pairs whose document stands in an earlier pair."""
        most = self.scored.p50
        one = self.documents
        ninety = most - one.low if not one.certain else most - one.p50
        return Range(most - one.high, most - one.p50, ninety, most - one.low).within(0, most)

    def json(self) -> dict[str, Any]:
        """For `--json`."""
        names = ("scored", "failed", "tokens", "truncated", "reused", "computed_tokens", "documents", "repeats")
        told = {name: getattr(self, name).json(whole=True) for name in names}
        return {
            "pairs": self.pairs,
            **told,
            "flop": self.flop.json(),
            "exact": self.exact,
            "units_read": self.units_read,
        }


def tally(
    config: JobConfig,
    model: ModelSpec,
    plan: Plan,
    sample: Sample,
    actors: int,
    reuse: Reuse | None = None,
    seed: int = 0,
) -> Tally:
    """Count a sample and say what the plan comes to. Raises what `count_units` raises."""
    rows: dict[str, list[float]] = {}
    texts, remembering = {}, None
    remembered = [Work(), Work()]
    if model.kind == "bi_encoder" and sample.whole:
        remembering = [Remembering(model, 1), Remembering(model, actors)]
    for one in count_units(config, model, plan, sample.units, reuse, sample.share, seed):
        rows[one.unit.id] = _row(one)
        texts[one.unit.id] = one.texts if sample.whole else np.unique(one.texts)
        for at, memory in enumerate(remembering or ()):
            remembered[at] += memory.add(one)
        if sample.whole and len(texts) >= 64:
            texts = {"": np.unique(np.concatenate(list(texts.values())))}
    of_units = [[rows[unit.id] for unit in cluster.units] for cluster in sample.clusters]
    weights = [cluster.among / len(cluster.units) for cluster in sample.clusters]
    y = np.array([np.sum(of, 0) * weight for of, weight in zip(of_units, weights, strict=True)]).reshape(
        -1, len(MEASURES)
    )
    x = np.array([sum(unit.pairs for unit in one.units) * w for one, w in zip(sample.clusters, weights, strict=True)])
    if sample.whole:
        found = [Range.exact(value) for value in y.sum(0).tolist()]
        documents = Range.exact(len(np.unique(np.concatenate(list(texts.values()))))) if texts else Range.exact(0)
    else:
        certain = sample.share == 1 and all(weight == 1 for weight in weights)
        found = totals(y, x.astype(np.float64), plan.pairs, sample.population, certain)
        drawn = [texts[unit.id] for cluster in sample.clusters for unit in cluster.units]
        seen = [drawn[at] for at in np.random.default_rng(seed).permutation(len(drawn))]  # neighbours are alike
        documents = distinct(seen, found[-1].p50)  # of a unit each text once
    named = dict(zip(MEASURES, found, strict=True))
    unit_texts = named.pop("unit_texts")
    for name in ("scored", "failed", "truncated", "reused"):
        named[name] = named[name].within(0, plan.pairs)
    named["reused"] = Range.exact(0) if reuse is None else named["reused"]
    token = Arithmetic.of(model).per_token  # 0 of a free scorer, which has no FLOP however many units
    for name, most in (("computed_tokens", named["tokens"].high), ("flop", named["tokens"].high * token)):
        if not named[name].p50:  # all that was read is reused; what may not be is counted in pairs
            named[name] = named[name].times(most / max(1, plan.pairs))
    if remembering is not None:
        alone, dealt = remembered
        named["computed_tokens"] = _between(alone.tokens, dealt.tokens, named["computed_tokens"].p50, actors)
        named["flop"] = _between(alone.flop, dealt.flop, named["flop"].p50, actors)
    elif model.kind == "bi_encoder":
        each = distinct(seen, unit_texts.p50 / actors)
        share = min(1.0, actors * each.p50 / max(1.0, unit_texts.p50)), documents.low / max(1.0, unit_texts.p50)
        for name in ("computed_tokens", "flop"):
            named[name] = _remembered(named[name], *share)
    return Tally(
        pairs=plan.pairs,
        units=len(plan.units),
        units_read=len(rows),
        exact=sample.whole,
        documents=documents,
        **named,
    )


def _row(one: Counted) -> list[float]:
    """A unit's measures; what was counted of a part of it stands for the whole."""
    times = one.unit.pairs / max(1, one.pairs)
    texts = len(np.unique(one.texts))
    counts = (
        one.scored,
        one.failed,
        one.tokens,
        one.truncated,
        one.reused,
        one.computed.tokens,
        one.computed.flop,
        texts,
    )
    return [value * times for value in counts]


def _between(one: float, dealt: float, apart: float, actors: int) -> Range:
    """What bi-encoders compute: `one` actor that remembers all, `actors` that get units in turn, and units apart."""
    if actors == 1 or one == apart:
        return Range.exact(one)
    return Range(one, dealt, max(dealt, (dealt + apart) / 2), apart)


def _remembered(apart: Range, share: float, least: float) -> Range:
    """What bi-encoders compute of a plan that is sampled, from what its units compute apart."""
    p50 = apart.p50 * share
    return Range(min(p50, apart.low * min(share, least)), p50, (p50 * apart.high) ** 0.5, apart.high)
