"""The gate between the last score and publishing: what a job is held against, the verdict's record, and its override.

What is published once, or is being published, is not judged again: an output that was good enough to go live is not
taken down, or left half repaired, by an earlier output or a threshold that has changed since.
"""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from batch_rerank.conditions import LATEST, SHARES, Gate, looks_deeper
from batch_rerank.config import JobConfig
from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.errors import ConfigError, GateError, InputError, StorageError
from batch_rerank.judge.evaluate import Qrels, read_qrels
from batch_rerank.judge.gate import BEHIND, Row, Shares, judge
from batch_rerank.judge.rankings import Ranking, published, unpublished, work_of
from batch_rerank.publish.output import Place, open_output
from batch_rerank.publish.publish import refuse_unseen
from batch_rerank.publish.score_files import ScoreFiles
from batch_rerank.schema import NULL_QUERY, NULL_TEXT
from batch_rerank.store.filesystem import locate
from batch_rerank.store.latest import read_latest, real_path
from batch_rerank.store.lease import Lease
from batch_rerank.store.manifest import Manifest
from batch_rerank.store.plans import Plan
from batch_rerank.store.receipts import Totals
from batch_rerank.store.scan import Scan, scan
from batch_rerank.store.verdict import GATE, NOT_JUDGED, PASSED_OVER, Verdict, read_verdict

log = logging.getLogger("batch_rerank")


def check_gate(config: JobConfig) -> list[str]:
    """The ids of the queries that a gate has judgements of. An output that is finished has passed its gate.

    Raises ConfigError, before anything is scored, where it could not judge: qrels that cannot be read, or no finished
    output to compare with."""
    gate = config.gate
    manifest = Manifest(locate(config.output.path, config.output.storage_options))
    if gate is None or config.limit is not None or manifest.success.exists():
        return []
    judged = list(_qrels(gate, config) or ())
    _earlier(gate, config, manifest)
    top_k = config.output.top_k
    for _, one in gate.conditions:
        if (one.needs_qrels and looks_deeper(one.name, top_k)) or (top_k is not None and one.depth > top_k):
            log.warning("gate: %r looks deeper than output.top_k: %d; what is cut counts as not found", one.text, top_k)
    return judged


def await_gate(manifest: Manifest, config: JobConfig, gate: object, lease: Lease) -> None:
    """Record that a job which is not published yet has to pass a gate, before it can be: whoever goes on, by the job
    file or by the path alone, judges it. gate: the section as a plan keeps it. Under the lease; raises StorageError,
    and ConflictError where it is lost."""
    if not isinstance(gate, dict) or config.limit is not None or _is_public(manifest):
        return
    recorded = read_verdict(manifest)
    if recorded is not None and not recorded.passed and not recorded.awaited:
        return  # a refusal, with the rows behind it
    lease.check()
    Verdict(False, _now(), problem=NOT_JUDGED, gate=gate).write(manifest)


def _is_public(manifest: Manifest) -> bool:
    """Whether an output is published, or is being published; withdrawn: the publication is being replaced."""
    return manifest.read_publication() is not None or bool(manifest.list_files("_manifest/withdrawn").found)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def pass_gate(
    manifest: Manifest,
    plan: Plan,
    totals: Totals,
    config: JobConfig,
    model: ModelSpec,
    lease: Lease,
    despite: str | None = None,
    stands: bool = False,
) -> Verdict | None:
    """Judge scores that are all there and not published, and record it. `despite`: why to publish them all the same;
    stands: a refusal that is recorded does, for there is no job file that could say otherwise.

    Returns the verdict, or the one that is there of what is published already. Raises GateError where an error
    condition does not hold, ConfigError where nothing can be judged, and StorageError.
    """
    recorded, gate = read_verdict(manifest), config.gate
    if recorded is None and gate is None:
        return None
    if _is_public(manifest):
        return recorded
    if stands and recorded is not None and recorded.awaited and config.limit is None:
        gate = _gate_of(recorded, manifest)
    elif stands and recorded is not None and not recorded.passed:
        # a reason that is there already is of a publication that has not come about: whoever gave it was killed
        return _recorded(manifest, replace(recorded, despite=despite or ""), lease)
    if gate is None:
        verdict: Verdict | None = recorded and replace(recorded, despite=despite or "the job has no gate any more")
        if verdict is None or verdict.passed:
            return recorded
    elif config.limit is not None:
        log.info("gate: not judged: this is a sample of %d queries", config.limit)
        return None
    else:
        verdict = _verdict(manifest, plan, totals, config, model, gate, despite)
    return _recorded(manifest, verdict, lease)


def _gate_of(recorded: Verdict, manifest: Manifest) -> Gate:
    try:
        return Gate.model_validate(recorded.gate)
    except ValidationError:
        raise StorageError(
            f"{manifest.root / GATE}: the gate to be judged by cannot be understood; expected one of this version; "
            "batch-rerank publish JOB judges by the job file"
        ) from None


def _recorded(manifest: Manifest, verdict: Verdict, lease: Lease) -> Verdict:
    """The verdict, written. Raises GateError where it refuses."""
    lease.check()
    verdict.write(manifest)
    for line in verdict.failed("warn"):
        log.warning("gate: %s: found %s", line.condition, line.said)
    if not verdict.passed and not verdict.despite:
        raise _refused(manifest, verdict)
    log.log(logging.INFO if verdict.passed else logging.WARNING, "gate: %s", verdict.summary)
    return verdict


def _verdict(
    manifest: Manifest,
    plan: Plan,
    totals: Totals,
    config: JobConfig,
    model: ModelSpec,
    gate: Gate,
    despite: str | None,
) -> Verdict:
    said = Verdict(False, _now(), qrels=gate.qrels or "", despite=despite or "")
    try:
        found = scan(manifest, plan)
        refuse_unseen(manifest, plan, found)
        old, why = _earlier(gate, config, manifest)
        new = unpublished(manifest, plan, found, config, model)
        counts = {name: getattr(totals, name) for name in (*SHARES, "rows_in")}
        shares = Shares(counts, lambda share: _rows_behind(share, manifest, plan, found))
        lines = judge(gate.conditions, new, old, _qrels(gate, config), shares)
    except (ConfigError, InputError, StorageError) as error:
        if despite is None:
            raise
        return replace(said, problem=f"could not be judged: {error}")
    over = [line.condition for line in lines if line.state == PASSED_OVER]
    if over:
        log.info("gate: no earlier output (%s); passed over: %s", why, "; ".join(over))
    made = replace(said, against=old.name if old else "", lines=lines)
    passed = not made.failed("error")
    return replace(made, passed=passed, despite="" if passed else made.despite)


def _many(failed: int) -> str:
    return "a condition does not hold" if failed == 1 else f"{failed} conditions do not hold"


def _refused(manifest: Manifest, verdict: Verdict) -> GateError:
    failed = verdict.failed("error")
    lines = "\n".join(f"  {line.condition}: found {line.said}" for line in failed)
    return GateError(
        f"{manifest.root}: {_many(len(failed))} of the gate:\n{lines}\n"
        f"expected all of gate.error; nothing is published, and all scores are kept; {GATE} has the rows behind each; "
        'batch-rerank publish JOB --despite-gate "REASON", with the --set of this run, publishes them all the same; '
        "run judges them again without scoring, by the job file's conditions then",
        asdict(verdict),
    )


def _qrels(gate: Gate, config: JobConfig) -> Qrels | None:
    """The judgements, where a condition needs them. Raises ConfigError."""
    if gate.qrels is None or not any(condition.needs_qrels for _, condition in gate.conditions):
        return None
    try:
        return read_qrels(gate.qrels, config.input.storage_options)
    except (InputError, StorageError) as error:
        raise ConfigError(f"gate.qrels: {error}") from None


def _earlier(gate: Gate, config: JobConfig, manifest: Manifest) -> tuple[Ranking | None, str]:
    """The output to compare with, where a condition needs one; or None and why there is none yet. Raises ConfigError,
    and ConflictError where `output.latest` is no pointer of ours."""
    if gate.against is None or not any(condition.needs_earlier for _, condition in gate.conditions):
        return None, "none is asked for"
    options, path = config.output.storage_options, gate.against
    if path == LATEST:
        if config.output.latest is None:
            raise ConfigError("gate.against: found latest, and no output.latest; set output.latest, or name an output")
        named = read_latest(locate(config.output.latest, options))
        if named is None or _same(named, manifest, config):
            return None, f"{config.output.latest} {'is not there yet' if named is None else 'names this one'}"
        path = named
    elif _same(path, manifest, config):
        raise ConfigError(f"gate.against: {path} is the job's own output; expected an earlier one, or latest")
    try:
        earlier, plan = open_output(Place(path, options))
        if not earlier.success.exists():
            raise StorageError(f"{earlier.root}: no _SUCCESS, it is not finished; expected a finished output")
    except StorageError as error:
        raise ConfigError(f"gate.against: {error}") from None
    return published(earlier, plan), ""


def _same(path: str, manifest: Manifest, config: JobConfig) -> bool:
    other = locate(path, config.output.storage_options)
    same = other.fs.protocol == manifest.root.fs.protocol
    return same and real_path(other) == real_path(manifest.root)


def _rows_behind(share: str, manifest: Manifest, plan: Plan, found: Scan) -> list[Row]:
    """The first candidates that a share counts, as far as score files show them."""
    is_behind = _BEHIND.get(share)
    if is_behind is None:
        return []
    rows: list[Row] = []
    for one in _scores(manifest, plan, found):
        rows += one.filter(is_behind(one)).slice(0, BEHIND - len(rows)).to_pylist()
        if len(rows) == BEHIND:
            break
    return rows


def _scores(manifest: Manifest, plan: Plan, found: Scan) -> Iterator[pa.Table]:
    work = work_of(plan, found)
    for _, rows in ScoreFiles(manifest, work.places, work.checksums).read(work.units):
        yield rows.select(["query_id", "doc_id", "n_tokens", "truncated", "error"])


def _engine_failed(rows: pa.Table) -> Any:
    return pc.and_(pc.is_valid(rows["error"]), pc.invert(pc.is_in(rows["error"], pa.array([NULL_TEXT, NULL_QUERY]))))


_BEHIND: dict[str, Callable[[pa.Table], Any]] = {
    "failed": lambda rows: pc.is_valid(rows["error"]),
    "null_texts": lambda rows: pc.equal(rows["error"], NULL_TEXT),
    "null_queries": lambda rows: pc.equal(rows["error"], NULL_QUERY),
    "engine_failed": _engine_failed,
    "truncated": lambda rows: rows["truncated"],
}
