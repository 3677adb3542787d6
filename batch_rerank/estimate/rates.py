"""How fast a model was: what `bench` measured and finished runs found, read back for plans.

A bench is a file beside the output (`<output>-bench.json`); what a run found lies in its output
(`_manifest/actual.json`).
"""

import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from batch_rerank.config import JobConfig
from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.engine.work import Arithmetic
from batch_rerank.errors import BatchRerankError
from batch_rerank.store.filesystem import Location, has_magic, list_files, locate, storage_errors
from batch_rerank.store.held import ACTUAL
from batch_rerank.store.latest import read_latest
from batch_rerank.store.records import Count, Line, Seconds, parse

log = logging.getLogger("batch_rerank")

UNTRIED = 0.05
"""Relative standard deviation of a rate that has not been tried: what repeats of one job differ by on a machine."""


@dataclass(frozen=True)
class Rate:
    """What one actor does. shape: of the model, `shape_of`; device: cpu or cuda, card: its name; threads: of an actor,
    0 where Ray has chosen them.

    work_per_second: FLOP (tokens of a free scorer) in a second of scoring; utilisation: share of an actor's time,
    from its first unit to its last, in which it scores, 0 to 1; startup_seconds: until actors score, Ray and the load
    of the model included; publish_rows_per_second: 0 where unknown; spread: relative standard deviation between units;
    predicted_seconds, actual_seconds: of the run that found it, 0 where nothing was predicted; source: bench or run;
    local: without Ray; at: when, UTC.
    """

    shape: Line
    dtype: Line
    device: Line
    work_per_second: Seconds
    card: Line = ""
    threads: Count = 0
    utilisation: Seconds = 1.0
    startup_seconds: Seconds = 0.0
    publish_rows_per_second: Seconds = 0.0
    spread: Seconds = UNTRIED
    predicted_seconds: Seconds = 0.0
    actual_seconds: Seconds = 0.0
    source: Line = ""
    local: bool = False
    at: Line = ""

    @property
    def error(self) -> float | None:
        """By how much the run took longer than predicted, as a share of the prediction; None where nothing was."""
        if not self.predicted_seconds or not self.actual_seconds:
            return None
        return self.actual_seconds / self.predicted_seconds - 1


@dataclass(frozen=True)
class _Holder:
    """What has a rate in it, whatever else it has."""

    rate: Rate | None = None


@dataclass(frozen=True)
class Known:
    """A rate and where it was found."""

    rate: Rate
    where: str


def shape_of(model: ModelSpec) -> str:
    """What decides how much a token costs, not what the weights are."""
    arithmetic = Arithmetic.of(model)
    return f"{model.kind} {arithmetic.per_token:.0f} FLOP a token, {arithmetic.per_key:.0f} a key"


def knows_flop(model: ModelSpec) -> bool:
    """Whether work can be told in FLOP here: without the weights' headers it is told in tokens, also of those who have
    them."""
    return Arithmetic.of(model).per_token > 0


def bench_location(config: JobConfig) -> Location:
    """Where a job's bench is written: the same place for a sample as for the whole."""
    whole = config.output.path.rstrip("/").removesuffix(f"-limit-{config.limit}")
    return locate(f"{whole}-bench.json", config.output.storage_options)


def try_bench_location(config: JobConfig) -> None:
    """Write where a bench will, before its minute is spent; an earlier one stays. Raises StorageError."""
    location = bench_location(config)
    with storage_errors(location):
        try:
            earlier = location.read_bytes()
        except FileNotFoundError:
            earlier = b"{}"
        location.write_bytes(earlier)


def write_bench(config: JobConfig, rate: Rate, more: dict[str, object]) -> Location:
    """Write what a bench found. Raises StorageError."""
    location = bench_location(config)
    with storage_errors(location):
        location.write_bytes(json.dumps({"rate": asdict(rate), **more}, indent=1).encode())
    return location


def find_rates(config: JobConfig, model: ModelSpec, local: bool) -> list[Known]:
    """The rates of this model's shape, dtype and kind of device that a job knows of; those of jobs that ran as this one
    does, with Ray or without, first, and the newest first among them. What cannot be read is named and passed over."""
    shape, own = shape_of(model), config.cluster.cpus_per_actor
    found = []
    for location in _places(config):
        rate = _read(location)
        if rate is None or not rate.work_per_second:
            continue
        if (rate.shape, rate.dtype, rate.device) != (shape, model.dtype, config.cluster.device):
            continue
        if rate.device == "cpu" and rate.threads and own not in ("auto", rate.threads):
            log.info(
                "%s: its rate is of actors with %d threads, these have %s; passed over", location, rate.threads, own
            )
            continue
        asked = config.cluster.accelerator_type
        if asked is not None and rate.card and not is_card(rate.card, asked):  # a run on any GPU does not know its card
            log.info("%s: its rate is of %s, these are %s; passed over", location, rate.card, asked)
            continue
        found.append(Known(rate, str(location)))
    return sorted(found, key=lambda one: (one.rate.local == local, one.rate.at), reverse=True)


def is_card(card: str, accelerator: str) -> bool:
    """Whether a card, by the name that its driver gives it, is one that Ray calls so: "NVIDIA A100-SXM4-80GB" is A100
    and A100-80G, and no A10. Of what follows the first word those with a number count: Ray's AMD names have a form."""
    words = re.split(r"[^a-z0-9]+", card.lower())
    first, *more = re.split(r"[^a-z0-9]+", accelerator.lower())
    numbered = [one for one in more if re.search(r"\d", one)]
    return first in words and all(any(word.startswith(one) for word in words) for one in numbered)


def _read(location: Location) -> Rate | None:
    try:
        with storage_errors(location):
            try:
                return parse(_Holder, location.read_bytes()).rate
            except FileNotFoundError:
                return None
    except (ValueError, BatchRerankError) as error:
        log.warning("%s: no rate can be read from it (%s); passed over", location, error)
        return None


def _places(config: JobConfig) -> Iterator[Location]:
    options = config.output.storage_options
    yield bench_location(config)
    outputs = [config.output.path, *_named(config)]
    for place in dict.fromkeys(outputs):
        yield from _actuals(place, config)
    for place in [] if config.cost is None else config.cost.places:
        yield from _actuals(place, config)
        if place.endswith(".json"):
            pattern = locate(place, options)
            try:
                with storage_errors(pattern):
                    yield from (pattern.at(file.path) for file in list_files(pattern))
            except BatchRerankError as error:
                log.warning("cost.rates: %s", error)


def _named(config: JobConfig) -> Sequence[str]:
    """Outputs that a job names anyway."""
    found = [place for place in (config.reuse.places if config.reuse else ()) if place != "latest"]
    if config.output.latest is not None:
        try:
            newest = read_latest(locate(config.output.latest, config.output.storage_options))
        except BatchRerankError as error:
            log.warning("output.latest: %s", error)
            newest = None
        found += [newest] if newest else []
    return found


def _actuals(place: str, config: JobConfig) -> Iterator[Location]:
    pattern = locate(f"{place.rstrip('/')}/{ACTUAL}", config.output.storage_options)
    if not has_magic(place):
        yield pattern
        return
    try:
        with storage_errors(pattern):
            files = list_files(pattern)
    except BatchRerankError as error:
        log.warning("%s", error)
        return
    yield from (pattern.at(file.path) for file in files)
