"""A job from its config to `_SUCCESS`: plan, resume, run, finalise. Every way to end is recorded in the status."""

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from batch_rerank.calls import in_turn
from batch_rerank.config import JobConfig
from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.errors import AuditError, GateError, UnfinishedError
from batch_rerank.estimate.forecast import Forecast
from batch_rerank.estimate.rates import knows_flop
from batch_rerank.estimate.sample import SAMPLED
from batch_rerank.job import actual
from batch_rerank.job.ahead import describe, ready, settled
from batch_rerank.job.estimate import QUICK, Estimate, estimate
from batch_rerank.job.finish import finish, finished
from batch_rerank.job.gate import await_gate, pass_gate
from batch_rerank.job.metrics import Metrics
from batch_rerank.job.progress import Display
from batch_rerank.job.reported import Reported, reported
from batch_rerank.job.reused import score
from batch_rerank.job.spend import Spend
from batch_rerank.job.staging import on_ray
from batch_rerank.publish.publish import refuse_other_publication
from batch_rerank.publish.withdraw import go_on_withdrawing
from batch_rerank.score.earlier import Earlier, find_earlier
from batch_rerank.store.bookkeeping import Expected, recording, resume, status_of
from batch_rerank.store.distrusted import distrust
from batch_rerank.store.filesystem import locate, storage_errors
from batch_rerank.store.held import read_held, write_held
from batch_rerank.store.lease import Lease, hold
from batch_rerank.store.manifest import Manifest
from batch_rerank.store.plans import Plan
from batch_rerank.store.receipts import Receipt, SetAside, Totals
from batch_rerank.store.rolls import Rolls
from batch_rerank.store.verdict import Verdict, read_verdict

log = logging.getLogger("batch_rerank")
STATUS_SECONDS = 10.0


@dataclass(frozen=True)
class Summary:
    """How a finished job went. `totals` are of the whole output; `units`, `pairs` and `seconds` of this run, start-up
    included; `steady_rate` is this run's pairs/s from its first finished unit on, None with fewer than two; `reuse`:
    which earlier outputs served, and why others did not; `gate` is what the job's gate has found, None where nothing
    was judged; `held`: planned against actual (job/actual.py), of the run that ended last; `report` is where the run's
    report is, None where there is none; `stood`: nothing was left to do."""

    output: str
    fingerprint: str
    totals: Totals
    resumed_units: int
    units: int
    pairs: int
    seconds: float
    steady_rate: float | None
    counts: dict[str, int]
    reuse: dict[str, Any] | None = None
    gate: Verdict | None = None
    held: dict[str, Any] | None = None
    report: str | None = None
    stood: bool = False


def run(config: JobConfig, *, local: bool = False) -> Summary:
    """Run a job, or what is left of it, on Ray or in this process.

    Raises the errors of `batch_rerank.errors`; none of them leaves a `_SUCCESS` of this run, all leave a resumable
    output.
    """
    started = time.monotonic()
    config, plan, model = ready(settled(config, local=local), local=local)
    manifest = Manifest(locate(config.output.path, config.output.storage_options))
    # absolute: workers may have another working directory
    output = config.output.model_copy(update={"path": str(manifest.root)})
    config = config.model_copy(update={"output": output})
    totals = finished(config, manifest, plan)
    if totals:
        described = Summary(str(manifest.root), plan.fingerprint, totals, totals.units, 0, 0, 0.0, None, plan.counts)
        describe(plan, model)
        seconds = time.monotonic() - started
        return replace(described, seconds=seconds, gate=read_verdict(manifest), held=read_held(manifest), stood=True)
    totals = Totals()
    earlier = find_earlier(config, plan)
    gate = plan.config.get("gate")  # with the places that it needs, from wherever it is judged
    each, told = in_turn if local else on_ray(config), Reported()
    with hold(manifest.root, config.cluster.lease_seconds) as lease:
        totals.gpu_seconds = manifest.read_status().totals.gpu_seconds  # nobody else counts from here on
        # shards as they are now: the same content, but places, times and row groups are this run's
        plan = replace(manifest.write_plan(plan), shards=plan.shards)
        describe(plan, model)
        go_on_withdrawing(manifest, lease)
        refuse_other_publication(manifest, manifest.read_publication(), config.output)
        with reported(manifest, plan, config, lease, told), recording(manifest, plan, totals, lease):
            await_gate(manifest, config, gate, lease)
            done, found = resume(manifest, plan, totals, lease)
            resumed, pairs_before = totals.units, totals.rows_in
            planned = _planned(config, plan, model, earlier, done, local)
            spend, course = Spend(config, totals), actual.Course(by_flop=knows_flop(model))
            spend.check(len(plan.units) - len(done))
            planned.check_budget(totals.gpu_seconds / 3600)

            def begin(actors: int) -> None:
                spend.begin(actors)
                course.begin(actors)

            receipts = score(config, model, plan, done, earlier, each, local, begin)
            metrics = None if local else Metrics(config, _units_waiting)
            expected, rolls = Expected(manifest, plan, done), Rolls(manifest, lease, done, found.loose)
            del found  # 3 KB a unit
            followed = _Followed(expected, rolls, manifest, plan, totals, lease, spend, course, metrics)
            try:
                rates, failed = followed.to_the_end(receipts, config.scoring.max_failed_units)
            except AuditError:
                assert earlier is not None, "only what is reused is audited"
                lease.check()
                distrust(manifest, earlier.served)
                raise
            expected.check({unit.unit: unit.error for unit in failed})
            rolls.finish()
            _check_failed_rows(manifest, totals, config)
            try:
                verdict = pass_gate(manifest, plan, totals, config, model, lease)
            except GateError:  # nothing is published, and yet the rate of scoring is known
                if totals.units > resumed:
                    _keep_held(manifest, lease, _held(planned, course, model, spend.of_this_run, local))
                raise
            finish(manifest, plan, totals, config, model, lease, each)
            course.published = time.monotonic()
            course.published_rows = totals.rows_in
            if totals.units > resumed:
                held = _held(planned, course, model, spend.of_this_run, local)
                _keep_held(manifest, lease, held)
            else:  # published alone: the run that has scored said what it took, and its rate
                held = read_held(manifest)
    totals.storage_retries += manifest.root.patience.retries
    return Summary(
        output=str(manifest.root),
        fingerprint=plan.fingerprint,
        totals=totals,
        resumed_units=resumed,
        units=totals.units - resumed,
        pairs=totals.rows_in - pairs_before,
        seconds=time.monotonic() - started,
        steady_rate=rates and rates[0],
        counts=plan.counts,
        reuse=None if earlier is None else earlier.summary(),
        gate=verdict,
        held=held,
        report=told.place,
    )


def _planned(
    config: JobConfig, plan: Plan, model: ModelSpec, earlier: Earlier | None, done: frozenset[str], local: bool
) -> Estimate:
    """What the units that are left come to, by a small sample; by a large one where a budget depends on it."""
    limited = config.cost is not None and config.cost.most_gpu_hours is not None
    reuse = earlier.reuse if earlier and earlier.served else None
    rest = replace(plan, units=plan.left(done))
    try:
        budget = SAMPLED if limited else QUICK
        return estimate(config, rest, model, budget=budget, reuse=reuse, local=local, published=plan.pairs)
    except Exception as error:  # any: a unit that cannot be read or encoded is the run's to set aside, or to end with
        log.warning("what this run takes could not be estimated: %s", error)
        return Estimate(config, None, Forecast(1 if local else config.cluster.max_actors, config.cluster.gpus), [])


def _held(
    planned: Estimate, course: actual.Course, model: ModelSpec, gpu_seconds: float, local: bool
) -> dict[str, Any] | None:
    """Planned against actual, of an output that is finished by then: nothing may cost it that."""
    try:
        return actual.compare(planned, course, model, gpu_seconds, local)
    except Exception as error:  # any
        log.warning("the run could not be held against its plan: %s: %s", type(error).__name__, error)
        return None


def _keep_held(manifest: Manifest, lease: Lease, held: dict[str, Any] | None) -> None:
    if held is not None and not lease.lost:
        write_held(manifest, held)


def _units_waiting() -> dict[str, int]:
    from batch_rerank.job.run_ray import units_waiting  # not at the top: --local does without ray

    return units_waiting()


class _Followed:
    """Counts receipts as they come. None is kept, so the driver does not grow with the number of units."""

    def __init__(
        self,
        expected: Expected,
        rolls: Rolls,
        manifest: Manifest,
        plan: Plan,
        totals: Totals,
        lease: Lease,
        spend: Spend,
        course: actual.Course,
        metrics: Metrics | None,
    ) -> None:
        self._expected, self._rolls, self._manifest = expected, rolls, manifest
        self._plan, self._totals, self._lease = plan, totals, lease
        self._spend, self._course, self._metrics = spend, course, metrics

    def to_the_end(
        self, receipts: Iterator[Receipt | SetAside], max_failed_units: int
    ) -> tuple[tuple[float, float] | None, list[SetAside]]:
        """Rates of this run, and the units set aside."""
        next_status = time.monotonic() + STATUS_SECONDS
        failed: list[SetAside] = []
        with Display(len(self._plan.units), self._plan.pairs, self._totals, self._spend.usd_per_gpu_hour) as display:
            try:
                for receipt in receipts:
                    if isinstance(receipt, SetAside):
                        failed.append(receipt)
                        self._note(receipt)
                        if len(failed) > max_failed_units:
                            raise self._too_many(failed, max_failed_units)
                    elif self._expected.take(receipt):
                        self._count(receipt, display)
                    if self._lease.lost:
                        self._lease.check()
                    if time.monotonic() >= next_status:
                        next_status = time.monotonic() + STATUS_SECONDS
                        self._manifest.write_status(status_of("running", self._plan, self._totals, self._lease))
            finally:  # what is spent is spent, however it ends
                self._spend.end()
            if self._metrics:
                self._metrics.end()
            return display.meter.rates, failed

    def _count(self, receipt: Receipt, display: Display) -> None:
        self._totals.add(receipt)
        self._rolls.add(receipt)
        self._course.add(receipt)
        self._spend.check(len(self._expected.left))
        display.advance(receipt)
        if self._metrics:
            self._metrics.count(receipt)

    def _note(self, failed: SetAside) -> None:
        if self._metrics:
            self._metrics.set_aside()
        _record_failure(self._manifest, failed)

    def _too_many(self, failed: list[SetAside], most: int) -> UnfinishedError:
        return UnfinishedError(
            f"{self._manifest.root}: {len(failed)} units could not be scored, the last {failed[-1].unit}: "
            f"{failed[-1].error}; expected at most scoring.max_failed_units = {most} before the job gives up; "
            "see _manifest/failures; run the job again to retry them"
        )


def _record_failure(manifest: Manifest, failed: SetAside) -> None:
    log.error("unit %s is set aside after %d tries: %s", failed.unit, failed.tries, failed.error)
    location = manifest.failure(failed.unit)
    with storage_errors(location):
        location.write_bytes(json.dumps(asdict(failed)).encode())


def _check_failed_rows(manifest: Manifest, totals: Totals, config: JobConfig) -> None:
    max_failed_rows = config.scoring.max_failed_rows
    if totals.failed > max_failed_rows * totals.rows_in:
        raise UnfinishedError(
            f"{manifest.root}: {totals.failed:,} of {totals.rows_in:,} rows failed "
            f"({totals.null_queries:,} null queries, {totals.null_texts:,} null texts, {totals.engine_failed:,} in the "
            f"engine); expected at most {max_failed_rows:.2%}; the score files below "
            "_work name the error of each, and _manifest/failures what the engine failed on; "
            "mend the input, or raise scoring.max_failed_rows and run again"
        )
