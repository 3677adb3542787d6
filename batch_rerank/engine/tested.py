"""A model as it may score: loaded, self-tested, and where its packed forward is at fault, padded instead.

A packed forward rests on kernels that a driver or a library may change over night. One that fails gives way to the
plain padded one, loudly, and only if that one passes: slower scores are better than none, wrong ones are not.
"""

import gc
import logging
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.engine.scorer import Scorer, make_scorer
from batch_rerank.engine.selftest import SelfTest, self_test
from batch_rerank.errors import BatchRerankError, ModelError

if TYPE_CHECKING:
    from batch_rerank.engine.models import Forward

log = logging.getLogger("batch_rerank")

OF_THE_FORWARD = {"canaries", "packs", "order"}
"""Checks that hold the forward against another computation: one that fails them may give way."""

WITH_IT = {"spread", "golden"}
"""Checks that may fail with those. Alone they speak of the model, as do all others."""


@dataclass(frozen=True)
class Tested:
    """A scorer; its self-test, None where there was none, and how many seconds that took; why it
    pads or is slower than it might be, else empty."""

    scorer: Scorer
    result: SelfTest | None
    seconds: float
    fallback: str


def tested_scorer(
    spec: ModelSpec, device: str, token_budget: int | None = None, forward: "Forward" = "auto", test: bool = True
) -> Tested:
    """Load a model and self-test it; with `forward` auto, padded where packed fails or raises.

    Raises ModelError where the model does not load, no forward that is allowed passes, or the packed one is insisted
    on and there is none; and what make_scorer raises.
    """
    if spec.dtype == "float8" and forward == "auto":
        forward = "packed"  # the padded one would score in bfloat16, which is another job
    first = _try(spec, device, token_budget, forward, test)
    if isinstance(first, Tested):
        return first
    gc.collect()  # the weights are loaded anew: the packed forward has joined some of them, and hooked into modules
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()
    log.error("model %s: %s; its batches are padded, which is slower, if that forward passes", spec.name, first)
    try:
        second = _try(spec, device, token_budget, "padded", test)
    except ModelError as error:
        raise ModelError(f"{error}; and {first}") from error
    assert isinstance(second, Tested)
    return replace(second, fallback=first)


def _try(spec: ModelSpec, device: str, token_budget: int | None, forward: "Forward", test: bool) -> Tested | str:
    """A scorer that passes, or why a packed one that is not insisted on does not. Raises ModelError for the rest."""
    try:
        scorer = make_scorer(spec, device, token_budget, forward)
    except BatchRerankError:
        raise
    except Exception as error:  # kernels, drivers and compilers raise anything
        reason = " ".join(f"the forward could not be set up: {type(error).__name__}: {error}".split())
        if forward != "auto":
            raise ModelError(f"model {spec.name!r}: {reason}") from error
        return reason
    started = time.monotonic()
    result = self_test(spec, scorer) if test else None
    if result is None or result.passed:
        scorer.forget()
        return Tested(scorer, result, time.monotonic() - started, scorer.fallback or "")
    failed = {check.name for check in result.checks if not check.passed}
    its_own = failed & OF_THE_FORWARD and failed <= OF_THE_FORWARD | WITH_IT
    if forward != "auto" or not scorer.packed or not its_own:
        instead = "; set model.dtype to bfloat16" if spec.dtype == "float8" and its_own else ""
        raise ModelError(f"model {spec.name!r}: {result.summary()}; see batch-rerank selftest{instead}")
    return f"the packed forward's {result.summary()}"
