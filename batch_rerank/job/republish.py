"""Publishing scores that are there already: no model, no accelerator, and of the input only what the scores lack."""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq

from batch_rerank.calls import ahead, in_turn
from batch_rerank.config import JobConfig
from batch_rerank.errors import ConfigError, ConflictError, InputError, StorageError, UnfinishedError
from batch_rerank.input.places import matches, patterns_of, refuse_pointer
from batch_rerank.input.shards import passed_types
from batch_rerank.input.stage_place import scored_from
from batch_rerank.job.finish import by_size, finish, left_beside
from batch_rerank.job.gate import pass_gate
from batch_rerank.job.reported import Reported, reported
from batch_rerank.job.staging import on_ray
from batch_rerank.publish.output import Place, config_of, model_of, open_output
from batch_rerank.publish.publication import output_of, publishing_fields, stands
from batch_rerank.publish.publish import try_out, unavailable
from batch_rerank.publish.withdraw import withdraw
from batch_rerank.schema import PASSED
from batch_rerank.sections import Section
from batch_rerank.store import latest as pointers
from batch_rerank.store.bookkeeping import doubtful, recording, refuse_strays, remove_late_parts
from batch_rerank.store.failures import UNREADABLE, is_damage
from batch_rerank.store.filesystem import Location, locate, storage_errors
from batch_rerank.store.lease import hold
from batch_rerank.store.manifest import Manifest
from batch_rerank.store.names import work_name
from batch_rerank.store.plans import Plan
from batch_rerank.store.receipts import Totals
from batch_rerank.store.scan import Scan, scan
from batch_rerank.store.verdict import Verdict

log = logging.getLogger("batch_rerank")


@dataclass(frozen=True)
class Published:
    """What was published, candidates in and rows out, and how long it took. again: another publication was withdrawn;
    stood: all of it was there already; latest: what became of the pointer, empty where the job has none; gate: what
    the job's gate has found, None where nothing was judged; report: where it is, None without one; beside: what was
    done beside what stood, in words."""

    output: str
    rows_in: int
    rows_out: int
    again: bool
    seconds: float
    gate: Verdict | None = None
    stood: bool = False
    latest: str = ""
    report: str | None = None
    beside: list[str] = field(default_factory=list)


def republish(place: Place, *, local: bool = False, despite: str | None = None) -> Published:
    """Publish the scores of an output: as its job file says, or, given by its path, as it was published or planned.

    What is published otherwise is withdrawn first, `_SUCCESS` before all else. What is not published yet has to pass
    the job's gate, but for `despite`, a reason that is recorded. Raises ConflictError where the job file is of other
    scores, UnfinishedError where scores are missing, and the errors of `pass_gate` and `publish`.
    """
    started = time.monotonic()
    if despite is not None and not despite.strip():
        raise ConfigError("--despite-gate: no reason; expected why it is published all the same, e.g. a ticket")
    manifest, plan = open_output(place)
    config = config_of(plan, place)
    given = place.job or config
    output, gate = given.output, given.gate
    if place.job is not None:
        refuse_other_scores(manifest, place.job, config)
        own = {name: getattr(given.cluster, name) for name in ("address", "lease_seconds")}
        config = config.model_copy(update={"cluster": config.cluster.model_copy(update=own)})
    totals, told = Totals(), Reported()
    with hold(manifest.root, config.cluster.lease_seconds) as lease:
        totals.gpu_seconds = manifest.read_status().totals.gpu_seconds
        found = scan(manifest, plan)
        remove_late_parts(manifest, found, plan)
        refuse_strays(manifest, found, plan)
        if place.job is None and found.publication is not None:
            output = output_of(found.publication, output)
        output = output.model_copy(update={"path": str(manifest.root), "storage_options": place.options})
        config = config.model_copy(update={"output": output, "gate": gate})
        _check(manifest, plan, found, config)
        for receipt in found.committed:
            totals.add(receipt)
        totals.resumed_pairs = totals.rows_in
        other = found.publication is not None and found.publication.fields != publishing_fields(output)
        again = other or found.condemned
        mark = manifest.read_mark()
        stood = stands(mark, plan, found) and not again
        beside = left_beside(config, mark, found.files) if stood else []
        named, before = _named(config, manifest)
        # an old output that is looked at again by its path takes no pointer from a newer one
        point = place.job is not None or not stood or before is None
        if point:
            refuse_pointer(config, inputs=place.job is not None)
            if place.job is not None:  # a stage is read instead of what its job names
                refuse_pointer(config.model_copy(update={"input": place.job.input}))
        with reported(manifest, plan, config, lease, told), recording(manifest, plan, totals, lease):
            verdict = pass_gate(manifest, plan, totals, config, model_of(plan), lease, despite, place.job is None)
            if despite and not (verdict and verdict.despite):
                log.info("--despite-gate: no gate held it back")
            each = in_turn if local else on_ray(config)
            if again and found.publication is not None:
                try_out(manifest, plan, found, config, model_of(plan), lease, by_size(found.files, each))
                withdraw(manifest, found.publication, lease)
            finish(manifest, plan, totals, config, model_of(plan), lease, each, point)
    latest = _of_pointer(config, named, before, point)
    seconds = time.monotonic() - started
    done = (totals.rows_in, totals.rows_out, again, seconds, verdict, stood, latest, told.place, beside)
    return Published(str(manifest.root), *done)


def _named(config: JobConfig, manifest: Manifest) -> tuple[bool, str | None]:
    """Whether `output.latest` names this output, and what it names; None where it is not there, or not asked for."""
    if config.output.latest is None:
        return False, None
    pointer = locate(config.output.latest, config.output.storage_options)
    try:
        return pointers.names(pointer, manifest.root), pointers.read_latest(pointer)
    except ConflictError:
        return False, "something that is no pointer of ours"


def _of_pointer(config: JobConfig, named: bool, before: str | None, point: bool) -> str:
    """What became of `output.latest`, in words."""
    latest = config.output.latest
    if latest is None:
        return ""
    if config.limit is not None:
        return f"{latest} stays as it is: this is a sample of {config.limit} queries"
    if named:
        return f"{latest} names it already"
    if point:
        return f"{latest} names it now" + (f", and named {before} before" if before else "")
    return f"{latest} names {before} and stays; batch-rerank publish JOB, with the job file, moves it"


HOW = ("forward", "cache_dir", "cache_bytes", "storage_options")
"""Of a model, how it is computed and reached, by which no score is another. Options may be secrets: none is shown."""


def refuse_other_scores(manifest: Manifest, job: JobConfig, stored: JobConfig) -> None:
    """Raise ConflictError that names the settings by which a job would score otherwise than an output was."""
    lines = []
    stage = scored_from(job, stored.input.model_dump())
    if stage is not None:
        lines += [f"  {line}" for line in _other_sources(job, stage)]
    inputs = () if stage else ("layout", "path", "columns")
    sections: tuple[tuple[str, Section, Section, tuple[str, ...]], ...] = (
        ("input", stored.input, job.input, inputs),
        ("model", stored.model, job.model, tuple(name for name in type(job.model).model_fields if name not in HOW)),
        ("scoring", stored.scoring, job.scoring, ("long_documents", "chunk_overlap", "escape_control_tokens")),
    )
    for section, there, here, names in sections:
        for name in names:
            one, other = getattr(there, name), getattr(here, name)
            if one != other:
                lines.append(f"  {section}.{name}: there {one!r}, here {other!r}")
    if lines:
        raise ConflictError(
            f"{manifest.root}: was scored by another job, which differs in:\n" + "\n".join(lines) + "\n"
            "expected the job that scored it, with another output section at most; batch-rerank run scores"
        )


def _other_sources(job: JobConfig, stage: Location) -> Iterator[str]:
    """What a job reads that its stage was not made of, and the reverse, by the places of the files."""
    plan = Manifest(stage, staged=True).read_plan()
    if plan is None:
        log.warning("%s: the stage is gone; whether it was made of this job's input cannot be told", stage)
        return
    cut = "input.candidates_per_query"
    there, here = plan.fingerprint_fields.get(cut), job.input.candidates_per_query
    if there != here:
        yield f"{cut}: there {there!r}, here {here!r}"
    given = [(key, locate(pattern, job.input.storage_options)) for key, pattern in patterns_of(job)]
    urls = [(shard.url, locate(shard.url, job.input.storage_options)) for shard in plan.shards]
    for key, pattern in given:
        if not any(matches(pattern, location) for _, location in urls):
            yield f"{key}: {str(pattern)!r} is not what was staged"
    for url, location in urls:
        if not any(matches(pattern, location) for _, pattern in given):
            yield f"input: {url} was staged, and is not read here"
            return


def _check(manifest: Manifest, plan: Plan, found: Scan, config: JobConfig) -> None:
    """Raise before anything is withdrawn, where the new publication could not be made."""
    missing = unavailable(manifest, plan, found)
    done = {receipt.unit for receipt in found.committed}
    standing = None if found.condemned else found.publication
    same = standing is not None and standing.fields == publishing_fields(config.output)
    undone = [unit.id for unit in plan.left(done)]
    if undone or (missing and not same):
        absent = undone or missing
        raise UnfinishedError(
            f"{manifest.root}: the scores of {len(absent)} of {len(plan.units)} units are not there, e.g. of "
            f"{absent[0]}; expected all of them; run the job first (output.keep_scores: false keeps none)"
        )
    if again := doubtful(manifest, plan, found):
        unit, why = next(iter(again.items()))
        raise UnfinishedError(
            f"{manifest.root}: {len(again)} of {len(plan.units)} units must be made again, e.g. {unit}: {why}; run the "
            "job first"
        )
    if same or not plan.units:
        return
    schemas = _schemas(manifest, found)
    passed = {name: f"{PASSED}{name}" for name in config.output.passthrough}
    wanted = {**({"text": "text"} if config.output.include_text else {}), **passed}
    lacking = [name for name, column in wanted.items() if any(column not in schema.names for schema in schemas)]
    kinds = {
        name: [one.field(column).type for one in schemas if column in one.names] for name, column in passed.items()
    }
    if lacking:
        log.info("%s: not in the score files; read from the input", ", ".join(lacking))
        given, more = config.input, [name for name in lacking if name in passed]
        located = [(locate(shard.url, given.storage_options), shard) for shard in plan.shards]
        for types in ahead([partial(passed_types, *one, given.layout, given.columns, more) for one in located]):
            for name, kind in types.items():
                kinds[name].append(kind)
    for name, of_column in kinds.items():
        other = next((kind for kind in of_column if kind != of_column[0]), None)
        if other is not None:
            raise InputError(
                f"{manifest.root}: output.passthrough names {name!r}, which has the types {of_column[0]} and {other} "
                "in the input; expected one type in all shards"
            )


def _schemas(manifest: Manifest, found: Scan) -> list[pa.Schema]:
    """Of every file that has scores: those below `_scores/`, and of the others."""
    names = {place[0] if (place := found.place(one)) else work_name(one.unit) for one in found.committed}

    def schema(name: str) -> pa.Schema:
        location = manifest.root / name
        with storage_errors(location), location.open() as file:
            try:
                return pq.read_schema(file)
            except UNREADABLE as error:
                if not is_damage(error):
                    raise
                raise StorageError(f"{location}: cannot be read ({error}); see batch-rerank verify --repair") from None

    return list(ahead([partial(schema, name) for name in sorted(names)]))
