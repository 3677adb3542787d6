"""Inputs whose candidates are not side by side are staged: written once as nested shards, which jobs then read.

Read ids (the driver) -> spread each piece of the sources -> gather each shard -> `_SUCCESS`. The stage has a manifest
as an output has, and the same lease, receipts, resume and fingerprint; it is used again while its sources are the same.
"""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import batch_rerank
from batch_rerank.calls import Each, in_turn
from batch_rerank.config import Input, JobConfig
from batch_rerank.errors import ConfigError, ConflictError, InputError, StorageError
from batch_rerank.input.contents import Key, contents
from batch_rerank.input.join import SHARD_PAIRS, Join, join_flat, join_run
from batch_rerank.input.passes import clean, run_passes
from batch_rerank.input.places import is_within, same_store
from batch_rerank.input.sources import Source
from batch_rerank.input.spill import Spill
from batch_rerank.input.stage_place import Place, at, find_place, held, noted, of_output, pattern_of
from batch_rerank.input.stage_sources import find_sources
from batch_rerank.store.bookkeeping import expected_parts, mark_done, recording, resume
from batch_rerank.store.failures import denied
from batch_rerank.store.filesystem import locate, storage_errors
from batch_rerank.store.lease import HEARTBEATS, HeldError, Lease, hold, sign_of_life
from batch_rerank.store.manifest import Manifest, fingerprint
from batch_rerank.store.names import EXCHANGED
from batch_rerank.store.plans import Plan, Shard
from batch_rerank.store.receipts import Totals
from batch_rerank.store.records import Mark
from batch_rerank.store.scan import scan

log = logging.getLogger("batch_rerank")
STAGING_VERSION = 3
"""Raised when the same sources would be staged differently."""

SMALL = 8
"""Tasks that the driver does itself: Ray would take longer to start."""


WAIT_SECONDS = 5.0
"""Between two looks at a stage that another job makes, at most."""


@dataclass(frozen=True)
class Staged:
    """A finished stage. config: the job that reads it; counts: queries, candidates, what is missing; reused: whether
    it was there already."""

    config: JobConfig
    place: str
    counts: dict[str, int]
    shards: int
    reused: bool
    seconds: float


def needs_stage(config: JobConfig) -> bool:
    """Whether the layout says so; a flat input whose queries are scattered shows only when its ids are read."""
    return config.input.layout in ("run", "beir")


def stage_with(config: JobConfig, each: Each) -> Staged:
    """Stage a job's input, or what is left of it, with large passes run by `each`; nothing to do where that is done.

    Another job that stages the same sources in a place that none has named is waited for. Raises ConfigError,
    InputError, StorageError, and ConflictError where the place holds the stage of other sources, the output was scored
    from other sources, or another job is at work on a place that is named.
    """
    started = time.monotonic()
    sources, plan, place = _open(config)
    with Spill() as spill:
        return _stage(config, sources, plan, place, each, spill, started)


def _stage(
    config: JobConfig,
    sources: Sequence[Source],
    plan: Plan,
    place: Place,
    each: Each,
    spill: Spill,
    started: float,
) -> Staged:
    join: Join | None = None
    while True:
        manifest, existing = place.manifest, place.existing
        if existing is not None:
            _refuse_other(manifest, existing, plan)
            if _finished(manifest, existing):
                _check_missing(config, manifest, existing)
                if manifest.list_files().matching(EXCHANGED):  # killed while it was removed
                    with hold(manifest.root, _lease_seconds(config, existing)):
                        clean(manifest)
                return _staged(config, manifest, existing, True, started)
        join = join or join_sources(config, sources, spill)
        if place.note:
            log.info("%s", place.note)
        with ExitStack() as stack:
            taken = _take(stack, config, place)
            if isinstance(taken, Lease):
                made = _make(config, manifest, plan, join, sources, taken, each)
                return _staged(config, manifest, made, False, started)
            place = taken


def _take(stack: ExitStack, config: JobConfig, place: Place) -> Lease | Place:
    """The lease of a place; or, where another job has had it, or it refuses to be written, the place to look at."""
    root, seconds = place.manifest.root, _lease_seconds(config, place.existing)
    try:
        return stack.enter_context(hold(root, seconds))
    except HeldError as error:
        if config.input.stage:
            raise
        log.info("%s; it stages the same sources, and is waited for", str(error).partition(";")[0])
        said = time.monotonic()
        while sign_of_life(root, seconds).alive:
            time.sleep(min(WAIT_SECONDS, seconds / HEARTBEATS))
            if time.monotonic() > said + 60:
                said = time.monotonic()
                log.info("%s: still being staged by another job", root)
        return at(root, place.instead)
    except StorageError as error:
        if place.instead is None or not denied(error):
            raise
        log.warning("%s: not permitted; the stage goes beside the output, to %s", root, place.instead)
        return at(place.instead)


def _lease_seconds(config: JobConfig, existing: Plan | None) -> float:
    """What the stage's plan says, so that jobs of several settings agree on when one of them is silent."""
    told = existing.config.get("cluster") if existing is not None else None
    seconds = told.get("lease_seconds") if isinstance(told, dict) else None
    return seconds if isinstance(seconds, int | float) and 1 <= seconds <= 3600 else config.cluster.lease_seconds


def _make(
    config: JobConfig, manifest: Manifest, plan: Plan, join: Join, sources: Sequence[Source], lease: Lease, each: Each
) -> Plan:
    plan = replace(plan, units=join.units, counts=_counts(plan, sources, join))
    totals = Totals()
    plan = manifest.write_plan(plan)
    named = "" if config.input.stage else " (input.stage names another place)"
    log.info("staging %s into %s%s", describe_stage(plan), manifest.root, named)
    with recording(manifest, plan, totals, lease):
        done, _ = resume(manifest, plan, totals, lease)
        small = len(join.pieces) + len(join.units) <= SMALL
        run_passes(config, manifest, plan, join, sources, done, totals, lease, in_turn if small else each)
        _finalise(manifest, plan, join, lease)
    return plan


def find_stage(config: JobConfig) -> Staged | None:
    """The finished stage of exactly this input, where there is one."""
    started = time.monotonic()
    _, plan, place = _open(config)
    manifest, existing = place.manifest, place.existing
    if existing is None or existing.fingerprint != plan.fingerprint or not _finished(manifest, existing):
        return None
    _check_missing(config, manifest, existing)
    return _staged(config, manifest, existing, True, started)


def plan_stage(config: JobConfig) -> tuple[str, Plan]:
    """Where staging would go, and what it would do. Reads ids, writes nothing. Raises ConfigError and InputError."""
    sources, plan, place = _open(config)
    with Spill() as spill:
        join = join_sources(config, sources, spill)
    return str(place.manifest.root), replace(plan, units=join.units, counts=_counts(plan, sources, join))


def _open(config: JobConfig) -> tuple[list[Source], Plan, Place]:
    """A job's sources, the plan of their stage as far as it is known without their ids, and the stage's place."""
    sources, own = find_sources(config), of_output(config)
    plan = _skeleton(config, noted(config, sources, own), sources)
    place = find_place(config, sources, plan.fingerprint, own)
    root = place.manifest.root
    for source in sources:
        for url, file in source.files:
            found = locate(url, config.input.storage_options).at(file.path)
            if same_store(found, root) and is_within(found, root):
                raise ConfigError(f"input.stage {str(root)!r} holds files of the input, e.g. {url}; use another place")
    return sources, plan, place


def describe_stage(plan: Plan) -> str:
    """One line of counts."""
    counts = plan.counts
    odd = {
        "candidates below the cut of candidates_per_query": counts.get("candidates_cut", 0),
        "candidates left out": counts.get("missing_candidates", 0),
        "documents missing from the corpus": counts.get("missing_documents", 0),
        "queries missing from the queries file": counts.get("missing_queries", 0),
        "queries without candidates": counts["queries_without_candidates"],
        "files of the corpus without a title": counts.get("corpus_files_without_title", 0),
        "files of queries without an instruction": counts.get("queries_files_without_instruction", 0),
    }
    parts = [f"{count:,} {name}" for name, count in odd.items() if count]
    whole = f"{counts['candidates']:,} candidates of {counts['queries']:,} queries in {len(plan.units)} shards"
    return "; ".join([whole, *([", ".join(parts)] if parts else [])])


def join_sources(config: JobConfig, sources: Sequence[Source], spill: Spill) -> Join:
    """Which row goes where. Reads ids; larger inputs need room in `spill`. Raises InputError and StorageError."""
    options = config.input.storage_options
    if config.input.layout == "flat":
        return join_flat(sources[0], options, spill)
    run, queries, corpus = sources
    depth, max_missing = config.input.candidates_per_query, config.input.max_missing
    return join_run(run, queries, corpus, depth, max_missing, options, spill)


def _skeleton(config: JobConfig, known: Mapping[Key, str], sources: Sequence[Source]) -> Plan:
    """The plan of a stage as far as the files' contents show it: its fingerprint, without units."""
    fields: dict[str, Any] = {"staging_version": STAGING_VERSION, "shard_pairs": SHARD_PAIRS}
    fields["input.layout"] = "flat" if config.input.layout == "flat" else "run"
    every = []
    for source in sources:
        found_contents = contents(source.files, known, config.input.storage_options)
        every += [[source.kind, content] for content in found_contents]
        fields[f"input.{source.kind}"] = fingerprint({"contents": found_contents})
        fields[f"input.columns of {source.kind}"] = source.names
    fields["input.candidates_per_query"] = config.input.candidates_per_query
    if config.input.layout == "flat":
        fields["input.columns"] = config.input.columns
        fields["output.passthrough"] = config.output.passthrough
    files_of_all = [entry for source in sources for entry in source.files]
    return Plan(
        fingerprint=fingerprint(fields),
        fingerprint_fields=fields,
        config={"stage": True, "cluster": {"lease_seconds": config.cluster.lease_seconds}, "sources": every},
        model={},
        version=batch_rerank.__version__,
        counts={"files": len(files_of_all)},
        notes=[],
        shards=[Shard(index, url, file, 0) for index, (url, file) in enumerate(files_of_all)],
        units=[],
    )


def _refuse_other(manifest: Manifest, existing: Plan, plan: Plan) -> None:
    """Raise ConflictError where the place holds the stage of other sources; it names the files."""
    try:
        manifest.refuse_other(existing, plan)
    except ConflictError as error:
        lines = [
            _other_files("here, and not what was staged", plan, existing),
            _other_files("staged, and not here", existing, plan),
        ]
        raise ConflictError("\n".join([str(error), *filter(None, lines)])) from None


def _other_files(what: str, plan: Plan, other: Plan) -> str:
    """The files of one plan whose content is not in another, or nothing."""
    there = set(held(other))
    files = [
        f"input.{kind} {shard.url} ({shard.file.size:,} bytes)"
        for shard, (kind, content) in zip(plan.shards, held(plan), strict=False)
        if (kind, content) not in there
    ]
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    return f"{what}: {', '.join(files[:3])}{more}" if files else ""


def _counts(plan: Plan, sources: Sequence[Source], join: Join) -> dict[str, int]:
    lacking = {
        f"{source.kind}_files_without_{name}": count for source in sources for name, count in source.lacking.items()
    }
    return {**plan.counts, "queries_without_candidates": 0, **lacking, **join.counts}


def _finished(manifest: Manifest, plan: Plan) -> bool:
    found = scan(manifest, plan)
    whole = len(found.committed) == len(plan.units) and not found.broken
    strays = found.files.strays(expected_parts(manifest, plan, None))
    return whole and "_SUCCESS" in found.files.found and not strays


def _check_missing(config: JobConfig, manifest: Manifest, plan: Plan) -> None:
    lost = plan.counts.get("missing_candidates", 0)
    total = lost + plan.counts["candidates"]
    if lost > config.input.max_missing * total:
        raise InputError(
            f"{manifest.root}: {lost:,} of {total:,} candidates lack their document or query (_manifest/missing.json); "
            f"expected at most input.max_missing = {config.input.max_missing:g} of them; mend the run, or raise it"
        )


def _staged(config: JobConfig, manifest: Manifest, plan: Plan, reused: bool, started: float) -> Staged:
    given = config.input
    place = str(manifest.root)
    staged = Input(
        layout="nested",
        path=pattern_of(manifest.root),
        unit_pairs=given.unit_pairs,
        unit_bytes=given.unit_bytes,
        storage_options=config.output.storage_options,
    )
    how = "staged already" if reused else f"staged in {time.monotonic() - started:.1f} s"
    log.info("%s at %s: %s", how, place, describe_stage(plan))
    return Staged(
        config.model_copy(update={"input": staged}),
        place,
        plan.counts,
        len(plan.units),
        reused,
        time.monotonic() - started,
    )


def _finalise(manifest: Manifest, plan: Plan, join: Join, lease: Lease) -> None:
    lease.check()
    with storage_errors(manifest.root):
        if any(join.missing.values()):
            (manifest.root / "_manifest/missing.json").write_bytes(json.dumps(join.missing, indent=1).encode())
    mark_done(manifest, plan, Mark(rows=plan.counts["queries"]), lease)
    clean(manifest)
