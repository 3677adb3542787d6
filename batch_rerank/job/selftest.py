"""A job's model tested on this machine, without the job's input: both of its forwards, and which a job would use."""

from dataclasses import dataclass

from batch_rerank.config import JobConfig
from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.engine.encoding import make_encoder
from batch_rerank.engine.scorer import make_scorer
from batch_rerank.engine.selftest import SelfTest, not_loaded, self_test
from batch_rerank.errors import ModelError
from batch_rerank.job.devices import settle, this_machine
from batch_rerank.score.plan import configured_model
from batch_rerank.score.steps import placed, token_budget


@dataclass(frozen=True)
class ForwardTests:
    """Self-tests by forward, packed and padded; a model that does not load, or the free scorer, has one.

    used: the one that a job scores with, None where it would end; absent: what the packed
    forward lacks, or why there is none, else empty
    """

    forwards: dict[str, SelfTest]
    used: str | None
    absent: str = ""

    @property
    def passed(self) -> bool:
        """Whether a job would score with this model."""
        return self.used is not None

    @property
    def shown(self) -> SelfTest:
        """The checks to show: of the forward that is used, else of the first."""
        return self.forwards[self.used] if self.used else next(iter(self.forwards.values()))


def run_self_test(config: JobConfig) -> ForwardTests:
    """Load a job's model as one of its actors would, and test it. What is wrong with the model is in the result.

    Raises ConfigError.
    """
    config = settle(config, this_machine(), actors=1)
    try:
        model = configured_model(config)
        make_encoder(model)
        model, _ = placed(config, model)
        if model.kind == "checksum":
            return _judged({"padded": self_test(model, make_scorer(model))}, "auto", "it is free")
        tests, absent = _tests(config, model)
    except ModelError as error:
        return ForwardTests({"load": not_loaded(error)}, None)
    return _judged(tests, config.model.forward, absent)


def _tests(config: JobConfig, model: ModelSpec) -> tuple[dict[str, SelfTest], str]:
    device, budget = config.cluster.device, token_budget(config)
    scorer = make_scorer(model, device, budget)
    result, wanting = self_test(model, scorer), scorer.fallback or ""
    if not scorer.packed:
        return {"padded": result}, wanting
    if model.dtype == "float8":  # the padded forward has none
        return {"packed": result}, wanting
    del scorer  # one copy of the weights at a time
    return {"packed": result, "padded": self_test(model, make_scorer(model, device, budget, "padded"))}, wanting


def _judged(tests: dict[str, SelfTest], forward: str, absent: str) -> ForwardTests:
    allowed = ("packed", "padded") if forward == "auto" else (forward,)
    used = next((name for name in allowed if name in tests and tests[name].passed), None)
    return ForwardTests(tests, used, absent)
