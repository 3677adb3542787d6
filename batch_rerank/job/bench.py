"""A minute of a job on one actor: how fast this model scores this text on this device. Writes no score."""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from statistics import fmean, pstdev
from typing import Any

import numpy as np

from batch_rerank.config import JobConfig
from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.engine.encoding import make_encoder
from batch_rerank.engine.packing import read_segments
from batch_rerank.engine.work import Arithmetic
from batch_rerank.errors import ConfigError, InputError
from batch_rerank.estimate.rates import Rate, knows_flop, shape_of, try_bench_location, write_bench
from batch_rerank.estimate.sample import Budget, choose
from batch_rerank.job.actual import processor
from batch_rerank.job.ahead import plan_job
from batch_rerank.job.run_local import one_ahead
from batch_rerank.score.read_unit import ReadRange, read_range
from batch_rerank.score.score_file import serialise
from batch_rerank.score.steps import EncodedUnit, LoadedScorer, encode_unit, score_unit
from batch_rerank.store.plans import Plan, Unit

log = logging.getLogger("batch_rerank")

SECONDS = 60.0
TRIED = (1.0, 0.5, 2.0, 0.25)
"""Token budgets that are tried, as multiples of the one that the job has."""

READ = Budget(text=256 * 2**20, read=2 * 2**30, least=16, most=400)
SMALLEST = 512
"""Tokens of a batch that is tried."""

SEED = 1
"""Other units than a plan samples, so that its error shows."""


@dataclass(frozen=True)
class Bench:
    """What was found. seconds: of scoring, all that is around it included; matrix_flop: FLOP/s of large products in the
    model's dtype, 0 where they were not measured; budgets: FLOP/s (tokens/s of a free scorer) by tokens of a batch;
    extra: seconds of what a run does not do."""

    load_seconds: float
    test_seconds: float
    seconds: float
    pairs: int
    tokens: int
    computed_tokens: int
    flop: float
    busy: float
    units: int
    spread: float
    matrix_flop: float
    budgets: dict[int, float]
    extra: float
    card: str
    fallback: str

    def json(self) -> dict[str, Any]:
        """For `--json` and the file."""
        rate = self.busy or 1.0
        share = self.flop / rate / self.matrix_flop if self.matrix_flop and self.flop else None
        return {
            **asdict(self),
            "budgets": {str(tokens): pace for tokens, pace in self.budgets.items()},
            "pairs_per_second": self.pairs / self.seconds,
            "tokens_per_second": self.tokens / self.seconds,
            "share_of_matrix_rate": share,
            "best_budget": max(self.budgets, key=self.budgets.__getitem__) if self.budgets else None,
        }


def bench(config: JobConfig, *, local: bool = False, seconds: float = SECONDS) -> dict[str, Any]:
    """Measure, write what was found beside the output, and return it. Raises what a run would raise before its first
    unit, and InputError where there is nothing to score."""
    ahead = plan_job(config, local=local, anew=True)
    if ahead.model is None:
        raise ConfigError("the input is not staged yet; batch-rerank stage, then bench")
    if not ahead.plan.pairs:
        raise InputError("no pair to score in the input; expected some to measure with")
    try_bench_location(ahead.config)
    sample = choose(ahead.plan, SEED, READ)
    units = sample.units if sample is not None else ahead.plan.units[:1]
    order = np.random.default_rng(SEED).permutation(len(units)).tolist()
    chosen = [units[at] for at in order]
    asked = time.monotonic()
    found: Bench
    if local:
        found, settled = measure(ahead.config, ahead.model, ahead.plan, chosen, seconds), ahead.config
    else:
        from batch_rerank.job.cluster import on_actor

        call = partial(measure, model=ahead.model, plan=_without_units(ahead.plan), units=chosen, seconds=seconds)
        found, settled = on_actor(ahead.config, call)
    startup = time.monotonic() - asked - found.seconds - found.extra
    rate = Rate(
        shape=shape_of(ahead.model),
        dtype=ahead.model.dtype,
        device=settled.cluster.device,
        card=found.card,
        threads=settled.cluster.threads,
        work_per_second=(found.flop if knows_flop(ahead.model) else found.computed_tokens) / found.busy,
        utilisation=min(1.0, found.busy / found.seconds),
        startup_seconds=round(max(0.0, startup), 3),
        spread=found.spread,
        source="bench",
        local=local,
        at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
    place = write_bench(ahead.config, rate, {"bench": found.json()})
    return {**found.json(), "startup_seconds": rate.startup_seconds, "written": str(place)}


def _without_units(plan: Plan) -> Plan:
    """What travels to an actor."""
    return replace(plan, units=[], notes=[])


def measure(config: JobConfig, model: ModelSpec, plan: Plan, units: Sequence[Unit], seconds: float) -> Bench:
    """In the process of an actor: load, test, try token budgets, then score units until the time is over."""
    scorer = LoadedScorer(config, model)
    model = scorer.model  # where it is on this machine
    began = time.monotonic()
    matrix = matrix_rate(model, config.cluster.device)
    encoded = _encoded(config, model, plan, units)
    first = next(encoded)
    budgets = _budgets(scorer, model, first, seconds)
    with scorer.sheet.unit():
        score_unit(first, scorer)  # what a process does once is the start's, not the rate's
    scorer.forget()
    scorer.computed()
    started = time.monotonic()
    abouts, pairs, tokens, paces = [], 0, 0, []
    for unit in one_ahead(chain([first], encoded)):
        with scorer.sheet.unit():
            scored = score_unit(unit, scorer)
        serialise(scored, {})
        pairs, tokens = pairs + len(scored.rows), tokens + int(scored.n_tokens.sum())
        abouts.append(scored.about)
        work = scored.about["flop"] or scored.about["computed_tokens"]
        if work and scored.about["seconds"]:
            paces.append(work / scored.about["seconds"])
        if time.monotonic() - started >= seconds:
            break
    ended = time.monotonic()
    return Bench(
        load_seconds=round(scorer.load_seconds, 3),
        test_seconds=round(scorer.test_seconds, 3),
        seconds=ended - started,
        busy=max(1e-6, sum(about["seconds"] for about in abouts)),
        units=len(abouts),
        pairs=pairs,
        tokens=tokens,
        computed_tokens=sum(about["computed_tokens"] for about in abouts),
        flop=sum(about["flop"] for about in abouts),
        spread=pstdev(paces) / fmean(paces) if paces else 0.0,
        matrix_flop=matrix,
        budgets=budgets,
        extra=started - began,
        card=card_of(config.cluster.device),
        fallback=scorer.fallback,
    )


def _encoded(config: JobConfig, model: ModelSpec, plan: Plan, units: Sequence[Unit]) -> Iterator[EncodedUnit]:
    encoder = make_encoder(model)
    for unit in units:
        for read in read_range(ReadRange(plan.shards[unit.shard], [unit]), config, model):
            yield encode_unit(read, encoder)


def _budgets(scorer: LoadedScorer, model: ModelSpec, unit: EncodedUnit, seconds: float) -> dict[int, float]:
    """The rate of one unit with several token budgets, until the time is over; nothing for a free scorer, which has
    none. Those that its memory is too small for are halved by the engine, and slower for it."""
    own = scorer.token_budget
    if own is None:
        return {}
    work, encoded = Arithmetic.of(model), unit.encoded
    by_text = model.kind == "bi_encoder"
    done = work.of_texts(np.diff(encoded.offsets)[read_segments(encoded)]) if by_text else work.of_pairs(encoded)
    found: dict[int, float] = {}
    began = time.monotonic()
    for factor in TRIED:
        if found and time.monotonic() - began >= seconds:
            took = (time.monotonic() - began) / len(found)
            log.info("a unit takes %.0f s: %d of %d batch sizes were tried", took, len(found), len(TRIED))
            break
        tokens = max(SMALLEST, int(own * factor))
        score = scorer.under(tokens)
        started = time.monotonic()
        score(encoded)
        found[tokens] = done.flop / max(1e-9, time.monotonic() - started)
    return dict(sorted(found.items()))


def matrix_rate(model: ModelSpec, device: str) -> float:
    """FLOP/s of a large matrix product in the model's dtype, the best of several; 0 for a free scorer and for float8,
    which torch multiplies in other ways."""
    if model.kind == "checksum" or model.dtype == "float8":
        return 0.0
    import torch

    size = 1024 if device == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=getattr(torch, model.dtype))
    best = 0.0
    for _ in range(10):
        started = time.perf_counter()
        a @ a
        if device != "cpu":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def card_of(device: str) -> str:
    """The name of what this process scores on."""
    if device == "cpu":
        return processor()
    import torch

    return str(torch.cuda.get_device_name())
