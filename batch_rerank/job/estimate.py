"""A job's plan with what it comes to: counts, seconds, money. Nothing is written, and no accelerator is touched."""

import datetime
import logging
import re
from dataclasses import dataclass
from typing import Any

from batch_rerank.config import JobConfig
from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.errors import BudgetError, ConfigError
from batch_rerank.estimate.forecast import Forecast, duration, forecast, nothing_to_score
from batch_rerank.estimate.ranges import Range
from batch_rerank.estimate.rates import Known, find_rates
from batch_rerank.estimate.sample import SAMPLED, Budget, choose
from batch_rerank.estimate.tally import Tally, tally
from batch_rerank.score.reuse import Reuse
from batch_rerank.sections import Cost
from batch_rerank.store.plans import Plan

log = logging.getLogger("batch_rerank")

QUICK = Budget(text=2 * 2**20, read=128 * 2**20, least=8, most=16)
"""What a run reads before it begins, to be held against what it finds: a second or two."""


@dataclass(frozen=True)
class Estimate:
    """tally: None where it would take more reading than the budget allows; rates: the newest first."""

    config: JobConfig
    tally: Tally | None
    forecast: Forecast
    rates: list[Known]

    @property
    def price(self) -> float | None:
        """USD of a GPU hour, None where the job does not say."""
        return None if self.config.cost is None else self.config.cost.usd_per_gpu_hour

    def json(self) -> dict[str, Any]:
        """Each a number, or low, p50, p90, high where it is uncertain, or None where it is unknown."""
        found, seconds = self.tally, self.forecast
        usd, hours = seconds.usd(self.price), seconds.gpu_hours
        counts = found.json() if found else dict.fromkeys(("pairs", "tokens", "truncated", "computed_tokens"))
        return {
            **counts,
            "seconds": _json(seconds.seconds),
            "gpu_hours": _json(hours),
            "usd": _json(usd),
            **seconds.json(),
            "rate": None if not self.rates else {"from": self.rates[0].where, "at": self.rates[0].rate.at},
        }

    def check_budget(self, spent: float = 0.0) -> None:
        """Raise BudgetError where a job will, half of the time, cost more than it may. spent: GPU hours of earlier
        runs."""
        cost, hours = self.config.cost, self.forecast.gpu_hours
        most = None if cost is None else cost.most_gpu_hours
        if cost is None or most is None:
            return
        if hours is None:
            log.warning(
                "cost: what this job takes is not known (no rate of this model on this device; see batch-rerank bench);"
                " it is stopped where it reaches %s",
                limits_of(cost),
            )
            return
        if hours.p50 and hours.p50 + spent > most:  # what is scored already is published whatever it has cost
            usd = self.forecast.usd(self.price)
            money = "" if usd is None else f", {usd.p50:,.2f} USD (p90 {usd.p90:,.2f})"
            raise BudgetError(
                f"{self.config.output.path}: the plan needs {hours.p50:,.3g} GPU hours (p90 {hours.p90:,.3g}){money}"
                f"{f', and {spent:,.3g} are spent' if spent else ''}; "
                f"expected at most {limits_of(cost)}; raise the limit, take a smaller model, fewer "
                "candidates or a shorter max_length, or reuse earlier scores",
                self.json(),
            )


def limits_of(cost: Cost) -> str:
    """The limits of a cost section in words."""
    told = {"cost.max_usd": cost.max_usd, "cost.max_gpu_hours": cost.max_gpu_hours}
    return " and ".join(f"{name}: {value:g}" for name, value in told.items() if value is not None)


def estimate(
    config: JobConfig,
    plan: Plan,
    model: ModelSpec,
    *,
    budget: Budget = SAMPLED,
    seed: int = 0,
    reuse: Reuse | None = None,
    local: bool = False,
    published: int | None = None,
) -> Estimate:
    """What a settled job comes to. budget: of reading; ALL for all; published: rows, where they are not those of the
    plan's units.
    Raises InputError and StorageError."""
    actors = 1 if local else max(1, min(config.cluster.max_actors, len(plan.units)))
    sample = choose(plan, seed, budget)
    rates = find_rates(config, model, local)
    if not plan.units:
        return Estimate(config, _nothing(), nothing_to_score(config, rates, published or 0), rates)
    if sample is None:
        return Estimate(config, None, Forecast(actors, config.cluster.gpus), rates)
    found = tally(config, model, plan, sample, actors, reuse, seed)
    return Estimate(config, found, forecast(config, found, rates, actors, published), rates)


def unknown() -> dict[str, None]:
    """What `Estimate.json` always has, of a job whose input is not there yet."""
    names = ("pairs", "tokens", "truncated", "computed_tokens", "seconds", "gpu_hours", "usd")
    return dict.fromkeys(names)


def _nothing() -> Tally:
    zero = Range.exact(0)
    return Tally(0, 0, 0, True, zero, zero, zero, zero, zero, zero, zero, zero)


def deadline_seconds(text: str, now: datetime.datetime) -> float:
    """Seconds until a deadline: `6h`, `90m`, `1h30m`, `45s`; a clock time (`06:00`: the next one); or a date and a time
    (`2026-12-24T06:00`), where it names no zone in that of `now`, or this machine's where that has none. Zones have
    rules, offsets have none, and clocks change. Raises ConfigError, also where it is past."""
    parts = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", text.strip())
    if parts and any(parts.groups()):
        hours, minutes, seconds = (float(part or 0) for part in parts.groups())
        total = hours * 3600 + minutes * 60 + seconds
        if 0 < total < float("inf"):
            return total
        if total:
            raise ConfigError(f"--deadline {text[:80]!r}: no time that can be told; expected e.g. 6h")
        raise ConfigError(f"--deadline {text!r}: no time at all; expected more than 0, e.g. 6h")
    if clock := re.fullmatch(r"([01]?\d|2[0-3]):([0-5]\d)", text.strip()):
        then = now.replace(hour=int(clock[1]), minute=int(clock[2]), second=0, microsecond=0, fold=0)
        left = then.timestamp() - now.timestamp()
        return left if left > 0 else (then + datetime.timedelta(days=1)).timestamp() - now.timestamp()
    try:
        then = datetime.datetime.fromisoformat(text.strip())
        left = (then if then.tzinfo else then.replace(tzinfo=now.tzinfo)).timestamp() - now.timestamp()
    except (ValueError, OverflowError):
        raise ConfigError(
            f"--deadline {text[:80]!r}: not a time; expected how long (6h, 90m), a clock time (06:00), or a date and a "
            "time (2026-12-24T06:00)"
        ) from None
    if left <= 0:
        raise ConfigError(f"--deadline {text}: is past, by {duration(-left)}; expected a time to come")
    return left


def for_deadline(found: Estimate, seconds: float) -> dict[str, Any]:
    """How many actors meet a deadline, half of the time and 90 % of it: None where no number does, or it is unknown."""
    one = found.forecast
    if one.actor_seconds is None or found.tally is None:
        return {"seconds": seconds, "actors_p50": None, "actors_p90": None, "known": False}
    most = found.tally.units  # an actor scores one unit at least
    p50, p90 = (one.actors_for(seconds, most, ninety) for ninety in (False, True))
    return {"seconds": seconds, "actors_p50": p50, "actors_p90": p90, "known": True}


def said(found: Estimate) -> list[str]:
    """An estimate in lines."""
    one, seconds = found.tally, found.forecast
    if one is None:
        lines = ["what it comes to is unknown: reading a sample takes too long; --exact reads all"]
    else:
        how = "all were read" if one.exact else f"95 %, {one.units_read:,} of {one.units:,} units were read"
        lines = [
            f"tokens      {_counted(one.tokens)} ({how})",
            f"truncated   {_counted(one.truncated)} pairs at this max_length",
            f"repeats     {_counted(one.repeats)} pairs whose document was there before",
            f"to compute  {_counted(one.computed_tokens)} tokens after shared prefixes and repeats, "
            f"{one.flop.p50:.3g} FLOP",
        ]
        if one.reused.p50:
            reuse = found.config.reuse
            audit = ", some of them computed again by reuse.audit" if reuse and reuse.audit else ""
            lines.append(f"reused      {_counted(one.reused)} pairs{audit}")
        if one.failed.p50:
            lines.append(f"null        {_counted(one.failed)} rows without a text or query")
    if one is not None and not one.units:
        return [f"time        {duration(seconds.publishing)} of publishing; nothing is left to score"]
    if seconds.seconds is None:
        return [*lines, "time        unknown: no rate of this model on this device; batch-rerank bench measures one"]
    assert seconds.actor_seconds is not None
    rate, where = found.rates[0].rate, found.rates[0].where
    took = seconds.seconds
    lines.append(
        f"time        {duration(took.p50)} (p90 {duration(took.p90)}) with {seconds.actors} "
        f"actor{'s' * (seconds.actors > 1)}, of it {duration(seconds.startup)} start and "
        f"{duration(seconds.publishing)} publishing"
    )
    if hours := seconds.gpus and seconds.gpu_hours:
        money = seconds.usd(found.price)
        cost = f", {money.p50:,.2f} USD (p90 {money.p90:,.2f})" if money else ""
        lines.append(f"GPU hours   {hours.p50:,.2f} (p90 {hours.p90:,.2f}){cost}")
    on = f" on {rate.card}" if rate.card else ""
    lines.append(f"rate        of {rate.source} {rate.at}{on}: {where}")
    errors = [f"{one.rate.error:+.0%} ({one.rate.at[:10]})" for one in found.rates if one.rate.error is not None]
    if errors:
        lines.append(f"history     runs against their plans: {', '.join(errors[:8])}")
    return lines


def _counted(one: Range) -> str:
    if one.certain:
        return f"{one.p50:,.0f}"
    return f"{one.p50:,.0f} ({one.low:,.0f} to {one.high:,.0f})"


def _json(one: Range | None) -> Any:
    return None if one is None else one.json()
