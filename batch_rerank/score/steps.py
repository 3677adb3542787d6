"""A unit on its way to its scores: encoded, then scored. What its receipt will say is gathered on the way."""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from batch_rerank.config import JobConfig
from batch_rerank.engine.canaries import limits
from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.engine.encoded import Encoded
from batch_rerank.engine.encoding import Encoder
from batch_rerank.engine.packing import Float32, best_chunks, unreadable
from batch_rerank.engine.selftest import unit_fault
from batch_rerank.engine.tested import tested_scorer
from batch_rerank.engine.work import Arithmetic, Work
from batch_rerank.errors import AuditError, BatchRerankError, ModelError
from batch_rerank.score.poison import MOST_POISON, DeviceLostError, PoisonedUnitError, Trial, score_around
from batch_rerank.score.read_unit import ReadUnit
from batch_rerank.score.reuse import Known
from batch_rerank.score.timesheet import Timesheet
from batch_rerank.score.weights import on_this_node
from batch_rerank.store.fetch import Fetched
from batch_rerank.store.plans import Unit
from batch_rerank.store.receipts import SetAside

log = logging.getLogger("batch_rerank")
NO_TOKENS = "no tokens: the model's tokenizer makes none of a text of this pair"
T = TypeVar("T")


@dataclass(frozen=True)
class Member:
    """One of several units that are scored as one: how many of the rows are its own, and what else is."""

    unit: Unit
    rows: int
    empty_texts: int
    about: dict[str, Any]


class _Together:
    """What may be several units."""

    unit: Unit
    members: tuple[Member, ...]

    @property
    def units(self) -> list[Unit]:
        """All that are in it."""
        return [member.unit for member in self.members] or [self.unit]


@dataclass(frozen=True)
class EncodedUnit(_Together):
    """A unit that waits for its scores. about: fields of its receipt so far; known: what is reused of
    members, the units that are scored together here; `encoded` has their other pairs. Without reuse there are none."""

    unit: Unit
    rows: pa.Table
    encoded: Encoded
    empty_texts: int
    about: dict[str, Any] = field(default_factory=dict)
    known: Known | None = None
    members: tuple[Member, ...] = ()


@dataclass(frozen=True)
class ScoredUnit(_Together):
    """A unit that waits for its commit. `scores`, `n_tokens`, `truncated` and `offset` (with chunks: of the best) are
    of the rows without an error. members: as before."""

    unit: Unit
    rows: pa.Table
    scores: Float32
    n_tokens: npt.NDArray[np.int32]
    truncated: npt.NDArray[np.bool_]
    offset: npt.NDArray[np.int32] | None
    empty_texts: int
    about: dict[str, Any] = field(default_factory=dict)
    members: tuple[Member, ...] = ()

    def apart(self) -> Iterator["ScoredUnit"]:
        """Its units one by one."""
        row = score = 0
        for member in self.members:
            rows = self.rows.slice(row, member.rows)
            own = slice(score, score + rows["error"].null_count)
            yield ScoredUnit(
                unit=member.unit,
                rows=rows,
                scores=self.scores[own],
                n_tokens=self.n_tokens[own],
                truncated=self.truncated[own],
                offset=None if self.offset is None else self.offset[own],
                empty_texts=member.empty_texts,
                about={**self.about, **member.about},
            )
            row, score = row + member.rows, own.stop
        if not self.members:
            yield self


def encode_unit(read: ReadUnit, encoder: Encoder) -> EncodedUnit:
    """Tokenise a unit."""
    started = time.monotonic()
    encoded = encoder.encode(read.groups)
    about = {**read.about, "encode_seconds": round(time.monotonic() - started, 4)}
    return EncodedUnit(read.unit, read.rows, encoded, read.empty_texts, about)


def or_set_aside(units: Sequence[Unit], step: Callable[[], T]) -> T | list[SetAside]:
    """What a step gives, or its units set aside where it raises what nobody expected. Raises BatchRerankError."""
    try:
        return step()
    except (BatchRerankError, DeviceLostError):
        raise
    except Exception as error:
        log.exception("unit %s", units[0].id)
        reason = str(error) if isinstance(error, PoisonedUnitError) else f"{type(error).__name__}: {error}"
        return [SetAside(unit.id, 1, reason[:500]) for unit in units]


def score_unit(unit: EncodedUnit, scorer: "LoadedScorer", trial: Trial | None = None, alone: bool = True) -> ScoredUnit:
    """Score a unit. A pair that makes the engine raise, or is too large for the device's memory, becomes an error row.

    `trial`: what earlier tries learnt of its pairs, and what this one leaves; `alone`: no other unit is on the device.
    Raises ModelError where the model gives NaN, or scores that are no scores: the same for every sequence, or all
    saturated; and what score_around raises.
    """
    by_text = scorer.model.kind == "bi_encoder"
    most, known = MOST_POISON * len(unit.units), unit.known
    all_may = known is not None and bool(known.found.any()) and not known.audited.any()
    scores, raised = score_around(scorer.score, unit.encoded, trial, scorer.device_lost, by_text, alone, most, all_may)
    for pair in np.flatnonzero(unreadable(unit.encoded, by_text)).tolist():
        raised[pair] = NO_TOKENS
    fault = unit_fault(scorer.model, unit.encoded, scores, raised)
    if fault:
        raise ModelError(
            f"unit {unit.unit.id}: {fault}; expected different scores for different texts; the model or its device is "
            "damaged, or nothing fits into its memory; see batch-rerank selftest"
        )
    best = best_chunks(unit.encoded, scores)
    chunks = unit.encoded.chunks
    errors = {pair if chunks is None else int(chunks.owner[pair]): error for pair, error in raised.items()}
    members = unit.members
    if unit.known is not None:
        audit, wrong = unit.known.audit(best.scores, scorer.allowed)
        if wrong:
            raise AuditError(
                f"unit {unit.unit.id}: {wrong}; expected the same scores from the same model; the earlier output was "
                "scored by a damaged one, or this one is: see batch-rerank selftest; run again, and what was taken "
                "from earlier outputs is scored"
            )
        members = _of_first(members, audit)
        errors = dict(zip(unit.known.rows_of(list(errors)), errors.values(), strict=True))
        best = unit.known.merge(best, chunked=chunks is not None)
    scored = ~np.isnan(best.scores)
    work, members = _work(unit, scorer.computed(), members)
    about = {**unit.about, **scorer.sheet.take(len(unit.units)), **work}
    fetched = scorer.fetched()
    if members:
        members = _of_first(members, fetched)
    else:
        about = _summed(about, fetched)
    return ScoredUnit(
        unit=unit.unit,
        rows=unit.rows if scored.all() else _with_errors(unit.rows, ~scored, best.n_tokens, errors),
        scores=best.scores[scored],
        n_tokens=best.n_tokens[scored],
        truncated=best.truncated[scored],
        offset=None if best.offset is None else best.offset[scored],
        empty_texts=unit.empty_texts,
        about={**about, **scorer.about},
        members=members,
    )


def _work(unit: EncodedUnit, work: Work, members: tuple[Member, ...]) -> tuple[dict[str, Any], tuple[Member, ...]]:
    """What receipts say of the work; of units that are scored together each has an equal share, and the first one the
    tokens that are over, so that sums are true."""
    n = len(unit.units)
    share, over = divmod(work.tokens, n)
    about = {"computed_tokens": share, "flop": work.flop / n}
    if over:
        members = _of_first(members, {"computed_tokens": share + over})
    return about, members


def _of_first(members: tuple[Member, ...], more: dict[str, Any]) -> tuple[Member, ...]:
    """With what one receipt says for all of them, so that sums are true."""
    first, *others = members
    return replace(first, about=_summed(first.about, more)), *others


def _summed(about: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Fields of a receipt with others: requests may have been repeated for both."""
    retries = about.get("storage_retries", 0) + more.get("storage_retries", 0)
    return {**about, **more, **({"storage_retries": retries} if retries else {})}


def _with_errors(
    rows: pa.Table, failed: npt.NDArray[np.bool_], n_tokens: npt.NDArray[np.int32], raised: dict[int, str]
) -> pa.Table:
    """The rows with an error for each failed pair; the pairs are the rows without an error, in row order."""
    errors = rows["error"].to_pylist()
    pairs = [row for row, error in enumerate(errors) if error is None]
    for pair in np.flatnonzero(failed).tolist():
        too_long = f"out of memory: a sequence of {n_tokens[pair]} tokens does not fit; lower max_length"
        errors[pairs[pair]] = raised.get(pair, too_long)
    return rows.set_column(rows.schema.get_field_index("error"), "error", pa.array(errors, pa.string()))


class Done(threading.local):
    """What the calling thread has scored since it was asked last."""

    work = Work()


class LoadedScorer:
    """A model copy that has passed its self-test. Raises ModelError where it does not load or pass.

    `load_seconds`, `test_seconds`: that loading and the self-test took; `tag`: host, process, device, threads and a
    number that tells two loads apart; `self_test`: its summary, empty for the free scorer; `fallback`: why its
    batches are padded, empty where they are packed; `allowed`: by how much two computations of a score may differ;
    `sheet`: where its time goes.
    """

    def __init__(self, config: JobConfig, model: ModelSpec) -> None:
        started, self.sheet = time.monotonic(), Timesheet()
        device = self._device = config.cluster.device
        self.model, self._fetched = placed(config, model)
        tested = tested_scorer(self.model, device, token_budget(config), config.model.forward)
        self._scorer, self.fallback = tested.scorer, tested.fallback
        self._turn = threading.Lock()
        self._arithmetic, self._done = Arithmetic.of(self.model), Done()
        self.test_seconds, self.load_seconds = tested.seconds, time.monotonic() - started - tested.seconds
        load = f"{self.load_seconds:.1f}s {os.urandom(3).hex()}"
        self.tag = f"{socket.gethostname()}:{os.getpid()} {device} threads={_threads(model)} load={load}"
        assert tested.result is not None
        self.allowed = tested.result.allowed or limits(self.model, None)
        self.self_test = "" if model.kind == "checksum" else f"{tested.result.summary()}; {tested.seconds:.1f} s"
        self.sheet.loaded()

    @property
    def about(self) -> dict[str, str | int]:
        """What receipts say of it."""
        said = {"scorer": self.tag, "self_test": self.self_test, "fallback": self.fallback}
        budget = self._scorer.token_budget or 0
        return {**said, "host": socket.gethostname(), "device": self._device, "token_budget": budget}

    def score(self, encoded: Encoded) -> Float32:
        """float32[n_pairs]. Calls of two threads are begun one after the other, and waited for beside each other."""
        try:
            with self._turn:
                self.sheet.enter("pack")
                result = self._scorer.start(encoded, lambda: self.sheet.enter("compute"))
            self.sheet.enter("await")
            scores = result()
        finally:
            self.sheet.enter("hand")
        texts = result.texts
        done = self._arithmetic.of_pairs(encoded) if texts is None else self._arithmetic.of_texts(texts)
        self._done.work += done
        return scores

    def computed(self) -> Work:
        """What this thread has scored since it was asked last."""
        work, self._done.work = self._done.work, Work()
        return work

    @property
    def token_budget(self) -> int | None:
        """Tokens of one batch as they are now; None for a scorer without batches."""
        return self._scorer.token_budget

    def fetched(self) -> dict[str, Any]:
        """What receipts say of weights that came from a store; nothing from the second call on."""
        done, self._fetched = self._fetched, None
        if done is None or not done.size:
            return {}
        return {"fetched_bytes": done.size, "fetch_seconds": round(done.seconds, 3), "storage_retries": done.retries}

    def forget(self) -> None:
        """Drop what is remembered of texts."""
        self._scorer.forget()

    def under(self, token_budget: int) -> Callable[[Encoded], Float32]:
        """Scores of the same model with batches of at most so many tokens."""
        return self._scorer.under(token_budget).score

    def device_lost(self) -> bool:
        """Whether the device has failed for good: after some errors CUDA refuses everything in the same process."""
        if self._device != "cuda":
            return False
        import torch

        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
        return False


def placed(config: JobConfig, model: ModelSpec) -> tuple[ModelSpec, Fetched | None]:
    """A planned model on this machine, where torch computes with the actor's threads, and what was fetched for it.
    Raises what `on_this_node` raises."""
    if model.kind == "checksum":
        return model, None
    import torch

    # Ray sets OMP_NUM_THREADS to the CPUs an actor asks for; without Ray nothing would
    torch.set_num_threads(config.cluster.threads)
    return on_this_node(model, config.model)


def token_budget(config: JobConfig) -> int | None:
    """Tokens of one batch, None to choose by free memory."""
    return None if config.scoring.token_budget == "auto" else config.scoring.token_budget


def _threads(model: ModelSpec) -> int:
    if model.kind == "checksum":
        return 1
    import torch

    return torch.get_num_threads()
