"""The gate of a job file: what must hold of scores before they are published, a line for each condition.

`nDCG@10 >= 0.60`             a measure of ir_measures, its mean over the queries of the qrels
`nDCG@10 loss <= 0.01`        what it has lost against the earlier output, with a confidence of 95 %
`failed <= 0.001`             a share of the candidates
`overlap@10 >= 0.5`           agreement with the earlier output, over the queries that both have
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from batch_rerank.errors import ConfigError, lines_of
from batch_rerank.sections import Place, Section

if TYPE_CHECKING:
    import ir_measures

LATEST = "latest"
"""Stands for the output that `output.latest` names."""

SHARES = ("failed", "null_texts", "null_queries", "engine_failed", "empty_texts", "truncated", "reused")
"""Counts of receipts that are judged as shares of the candidates."""

AGREEMENTS = {"rbo": (0.0, 1.0), "tau": (-1.0, 1.0), "shifted": (0.0, 1.0)}
"""Beside overlap@k, with the least and the greatest value. shifted: share of the pairs that both outputs have whose
scores are further apart than noise."""

FORM = "nDCG@10 >= 0.60, nDCG@10 loss <= 0.01, failed <= 0.001, overlap@10 >= 0.5, rbo >= 0.8"
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_CONDITION = re.compile(rf"\s*(?P<name>\S.*?)(?P<loss>\s+loss)?\s*(?P<sign>[<>]=)\s*(?P<bound>{_NUMBER})\s*")
_OVERLAP = re.compile(r"overlap@([1-9]\d{0,5})")

Level = Literal["error", "warn"]
Kind = Literal["measure", "loss", "share", "agreement"]


@dataclass(frozen=True)
class Condition:
    """A condition, as it was written and as it is understood. name: of the measure in ir_measures' own spelling, of the
    share, or of the agreement; depth: of overlap@depth, else 0."""

    text: str
    kind: Kind
    name: str
    at_least: bool
    bound: float
    depth: int = 0

    def holds(self, found: float | None) -> bool:
        """Whether a value is as it must be; what could not be measured is not."""
        if found is None:
            return False
        return found >= self.bound if self.at_least else found <= self.bound

    @property
    def needs_qrels(self) -> bool:
        """Whether it is about judgements."""
        return self.kind in ("measure", "loss")

    @property
    def needs_earlier(self) -> bool:
        """Whether it is about an earlier output."""
        return self.kind in ("loss", "agreement")


def parse_condition(text: str) -> Condition:
    """A condition from its line. Raises ConfigError that says what was expected."""
    match = _CONDITION.fullmatch(text)
    if match is None:
        raise ConfigError(f"found {text[:80]!r}; expected a name, <= or >=, and a number, e.g. {FORM}")
    name, at_least, bound = match["name"], match["sign"] == ">=", float(match["bound"])
    if match["loss"]:
        if at_least:
            raise ConfigError(f"found {text[:80]!r}; a loss has a most: expected <=, e.g. nDCG@10 loss <= 0.01")
        return Condition(text, "loss", str(measure_of(name)), False, _within(text, bound, 0, 1))
    if name in SHARES:
        return Condition(text, "share", name, at_least, _within(text, bound, 0, 1))
    if name in AGREEMENTS:
        return Condition(text, "agreement", name, at_least, _within(text, bound, *AGREEMENTS[name]))
    if overlap := _OVERLAP.fullmatch(name):
        return Condition(text, "agreement", name, at_least, _within(text, bound, 0, 1), int(overlap[1]))
    try:
        return Condition(text, "measure", str(measure_of(name)), at_least, bound)
    except ConfigError as error:
        known = ", ".join(("overlap@k", *AGREEMENTS, *SHARES))
        raise ConfigError(f"{error}, or one of {known}") from None


def _within(text: str, bound: float, least: float, most: float) -> float:
    if not least <= bound <= most:
        raise ConfigError(f"found {text[:80]!r}; expected a number from {least:g} to {most:g} (a share, not percent)")
    return bound


def measure_of(name: str) -> "ir_measures.Measure":
    """A measure by its name, tried on one judgement: some need a package or a parameter. Raises ConfigError."""
    import ir_measures  # not at the top: most jobs have no gate

    try:
        measure = ir_measures.parse_measure(name)
        list(ir_measures.iter_calc([measure], {"q": {"d": 1}}, {"q": {"d": 1.0}}))
    except Exception as error:  # any: its providers raise what they like
        reason = lines_of(error)[0][:200]
        raise ConfigError(
            f"measure {name[:80]!r} is not known, or not to be had ({reason}); expected names as in ir_measures, e.g. "
            "nDCG@10, RR@10, AP"
        ) from None
    return measure


def looks_deeper(name: str, top_k: int | None) -> bool:
    """Whether a measure looks at ranks that an output of `top_k` has not: what was cut counts as not found."""
    if top_k is None:
        return False
    cutoff = measure_of(name).params.get("cutoff")
    return cutoff is None or cutoff > top_k


def _checked(text: str) -> str:
    try:
        parse_condition(text)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return text


Line = Annotated[str, AfterValidator(_checked)]


class Gate(Section):
    """What is judged between the last score and publishing. `qrels`: judgements, TREC or BEIR, for measures. `against`:
    latest, the output that output.latest names, or an output's path. `error`: conditions; one that does not hold keeps
    scores from being published (exit 7). `warn`: conditions; one that does not hold is said."""

    qrels: Place | None = None
    against: Place | None = None
    error: list[Line] = Field(default=[])
    warn: list[Line] = Field(default=[])

    @model_validator(mode="after")
    def _whole(self) -> "Gate":
        problems = [] if self.conditions else ["error, warn: no condition; expected one at least"]
        for _, condition in self.conditions:
            if condition.needs_qrels and self.qrels is None:
                problems.append(f"{condition.text!r} needs judgements; set gate.qrels")
            if condition.needs_earlier and self.against is None:
                problems.append(f"{condition.text!r} needs an earlier output; set gate.against")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def conditions(self) -> list[tuple[Level, Condition]]:
        """All conditions, in their order, errors first."""
        levels: tuple[tuple[Level, list[str]], ...] = (("error", self.error), ("warn", self.warn))
        return [(level, parse_condition(text)) for level, texts in levels for text in texts]
