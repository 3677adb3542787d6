"""Inputs whose candidates are not side by side are staged: written once as nested shards, which jobs then read.

Read ids (the driver) -> spread each piece of the sources -> gather each shard -> `_SUCCESS`. The stage has a manifest
as an output has, and the same lease, receipts, resume and fingerprint; it is used again while its sources are the same.
"""

import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import pyarrow as pa

import batch_rerank
from batch_rerank.config import Input, JobConfig, as_list
from batch_rerank.errors import ConfigError, InputError
from batch_rerank.job.bookkeeping import Expected, mark_done, recording, resume, status_of
from batch_rerank.job.exchange import EXCHANGE, Gather, Note, Portion, Spread, gather, spread
from batch_rerank.job.join import SHARD_PAIRS, Join, join_flat, join_run
from batch_rerank.store.filesystem import Location, input_errors, list_files, locate, storage_errors
from batch_rerank.store.layouts import find_columns
from batch_rerank.store.lease import Lease, hold
from batch_rerank.store.manifest import Manifest, Plan, Totals, fingerprint
from batch_rerank.store.records import Mark
from batch_rerank.store.shards import Shard, open_parquet
from batch_rerank.store.sources import Source, find_files, find_source

log = logging.getLogger("batch_rerank")
T = TypeVar("T")
STAGING_VERSION = 1
"""Raised when the same sources would be staged differently."""

SMALL = 8
"""Tasks that the driver does itself: Ray would take longer to start."""

LOG_SECONDS = 10.0


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


def stage(config: JobConfig, *, local: bool = False) -> Staged:
    """Stage a job's input, or what is left of it, on Ray or in this process; nothing to do where that is done.

    Raises ConfigError, InputError, StorageError, and ConflictError where the place holds the stage of other sources.
    """
    started = time.monotonic()
    sources = find_sources(config)
    manifest, plan = _skeleton(config, sources)
    existing = manifest.read_plan()
    if existing is not None:
        manifest.refuse_other(existing, plan)
        if _finished(manifest, existing):
            _check_missing(config, existing)
            return _staged(config, manifest, existing, True, started)
    join = join_sources(config, sources)
    plan = replace(plan, units=join.units, counts=_counts(plan, join))
    totals = Totals()
    with hold(manifest.root, config.cluster.lease_seconds) as lease:
        plan = manifest.write_plan(plan)
        log.info("staging %s into %s", describe_stage(plan), manifest.root)
        with recording(manifest, plan, totals, lease):
            done = resume(manifest, plan, totals, lease)
            small = len(join.pieces) + len(join.units) <= SMALL
            calls = _in_turn if local or small else _on_ray(config)
            _run_passes(config, manifest, plan, join, sources, done, totals, lease, calls)
            _finalise(manifest, plan, join, lease)
    return _staged(config, manifest, plan, False, started)


def find_stage(config: JobConfig) -> Staged | None:
    """The finished stage of exactly this input, where there is one."""
    started = time.monotonic()
    existing = Manifest(locate(config.stage, config.output.storage_options)).read_plan()
    if existing is None:
        return None
    manifest, plan = _skeleton(config, find_sources(config))
    if existing.fingerprint != plan.fingerprint or not _finished(manifest, existing):
        return None
    _check_missing(config, existing)
    return _staged(config, manifest, existing, True, started)


def plan_stage(config: JobConfig) -> Plan:
    """What staging would do. Reads ids, writes nothing. Raises ConfigError and InputError."""
    sources = find_sources(config)
    _, plan = _skeleton(config, sources)
    join = join_sources(config, sources)
    return replace(plan, units=join.units, counts=_counts(plan, join))


def describe_stage(plan: Plan) -> str:
    """One line of counts."""
    counts = plan.counts
    odd = {
        "candidates below the cut of candidates_per_query": counts.get("candidates_cut", 0),
        "candidates left out": counts.get("missing_candidates", 0),
        "documents missing from the corpus": counts.get("missing_documents", 0),
        "queries missing from the queries file": counts.get("missing_queries", 0),
        "queries without candidates": counts["queries_without_candidates"],
    }
    parts = [f"{count:,} {name}" for name, count in odd.items() if count]
    whole = f"{counts['candidates']:,} candidates of {counts['queries']:,} queries in {len(plan.units)} shards"
    return "; ".join([whole, *([", ".join(parts)] if parts else [])])


def find_sources(config: JobConfig) -> list[Source]:
    """The files of the input, listed. Raises ConfigError and InputError."""
    given, options = config.input, config.input.storage_options
    if "title" in config.output.passthrough:
        raise ConfigError(
            "output.passthrough: a staged input has each title in its text; pass a copy under another name through"
        )
    if given.layout == "flat":
        return [_flat_source(config)]
    if config.output.passthrough:
        raise ConfigError(
            f"output.passthrough: layout {given.layout} has no further columns; join them to the output by query_id "
            "and doc_id"
        )
    queries, corpus = as_list(given.queries), as_list(given.corpus)
    if given.layout == "beir":
        queries, corpus = (_beir_file(given, name) for name in ("queries", "corpus"))
    patterns = {"run": as_list(given.run), "queries": queries, "corpus": corpus}
    return [find_source(kind, files, given.columns, options) for kind, files in patterns.items()]


def _beir_file(given: Input, name: str) -> list[str]:
    """corpus.jsonl or queries.jsonl of a BEIR folder; compressed or Parquet ones too."""
    (folder,) = given.patterns
    for suffix in (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"):
        path = f"{folder.rstrip('/')}/{name}{suffix}"
        with input_errors(path):
            if list_files(locate(path, given.storage_options)):
                return [path]
    raise InputError(
        f"input.path {folder!r}: no {name}.jsonl there; expected a BEIR folder with corpus.jsonl and queries.jsonl "
        "(.gz, .zst or .parquet too); check the path, or name the files with layout: run"
    )


def _flat_source(config: JobConfig) -> Source:
    options, renamed, passthrough = config.input.storage_options, config.input.columns, config.output.passthrough
    files = find_files("path", config.input.patterns, options)
    kinds: dict[str, tuple[str, str]] = {}
    for url, _ in files:
        with open_parquet(locate(url, options)) as parquet:
            names = find_columns(parquet.schema_arrow, "flat", renamed, passthrough, url).names
            for name in ("query_id", "doc_id"):
                kind = "an integer" if pa.types.is_integer(parquet.schema_arrow.field(names[name]).type) else "a string"
                first = kinds.setdefault(name, (kind, url))
                if kind != first[0]:
                    raise InputError(
                        f"{url}: {name} is {kind}, but {first[0]} in {first[1]}: 7 and '7' may be two ids or one; "
                        "expected one type in all shards of a scattered input; cast it"
                    )
    return Source("flat", "parquet", files, {name: names[name] for name in ("query_id", "doc_id")})


def join_sources(config: JobConfig, sources: Sequence[Source]) -> Join:
    """Which row goes where. Reads ids. Raises InputError."""
    options = config.input.storage_options
    if config.input.layout == "flat":
        return join_flat(sources[0], options)
    run, queries, corpus = sources
    return join_run(run, queries, corpus, config.input.candidates_per_query, config.input.max_missing, options)


def _skeleton(config: JobConfig, sources: Sequence[Source]) -> tuple[Manifest, Plan]:
    """The plan of a stage as far as listings show it: its fingerprint, without units."""
    manifest = Manifest(locate(config.stage, config.output.storage_options))
    root = f"{manifest.root.path.rstrip('/')}/"
    output = locate(config.output.path, config.output.storage_options).path.rstrip("/") + "/"
    if output.startswith(root) or root.startswith(output):
        raise ConfigError(
            f"input.stage {config.stage!r} and output.path {config.output.path!r} lie in each other; use two places"
        )
    inside = [url for source in sources for url, file in source.files if file.path.startswith(root)]
    if inside:
        raise ConfigError(f"input.stage {config.stage!r} holds files of the input, e.g. {inside[0]}; use another place")
    fields: dict[str, Any] = {"staging_version": STAGING_VERSION, "shard_pairs": SHARD_PAIRS}
    fields["input.layout"] = "flat" if config.input.layout == "flat" else "run"
    for source in sources:
        files = [[url, file.size, file.version] for url, file in source.files]
        fields[f"input.{source.kind}"] = fingerprint({"files": files})
        fields[f"input.columns of {source.kind}"] = source.names
    fields["input.candidates_per_query"] = config.input.candidates_per_query
    if config.input.layout == "flat":
        fields["input.columns"] = config.input.columns
        fields["output.passthrough"] = config.output.passthrough
    files_of_all = [entry for source in sources for entry in source.files]
    plan = Plan(
        fingerprint=fingerprint(fields),
        fingerprint_fields=fields,
        config={"stage": True, "cluster": {"lease_seconds": config.cluster.lease_seconds}},
        model={},
        version=batch_rerank.__version__,
        counts={"files": len(files_of_all)},
        notes=[],
        shards=[Shard(index, url, file, 0) for index, (url, file) in enumerate(files_of_all)],
        units=[],
    )
    return manifest, plan


def _counts(plan: Plan, join: Join) -> dict[str, int]:
    return {**plan.counts, "queries_without_candidates": 0, **join.counts}


def _finished(manifest: Manifest, plan: Plan) -> bool:
    scan = manifest.scan(plan)
    whole = len(scan.committed) == len(plan.units) and not scan.broken
    return whole and "_SUCCESS" in scan.files.found and not scan.files.strays(unit.id for unit in plan.units)


def _check_missing(config: JobConfig, plan: Plan) -> None:
    lost = plan.counts.get("missing_candidates", 0)
    total = lost + plan.counts["candidates"]
    if lost > config.input.max_missing * total:
        raise InputError(
            f"{config.stage}: {lost:,} of {total:,} candidates lack their document or query (_manifest/missing.json); "
            f"expected at most input.max_missing = {config.input.max_missing:g} of them; mend the run, or raise it"
        )


def _staged(config: JobConfig, manifest: Manifest, plan: Plan, reused: bool, started: float) -> Staged:
    given = config.input
    place = str(manifest.root)
    staged = Input(
        layout="nested",
        path=re.sub(r"([*?[])", r"[\1]", place) + "/part-*.parquet",  # a * in the path is no glob
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


Calls = Callable[[Sequence[Callable[[], T]]], Iterator[T]]


def _in_turn(calls: Sequence[Callable[[], T]]) -> Iterator[T]:
    return (call() for call in calls)


def _on_ray(config: JobConfig) -> Any:
    from batch_rerank.job.run_ray import each_on_ray  # not at the top: --local does without ray

    return partial(each_on_ray, config)


def _run_passes(
    config: JobConfig,
    manifest: Manifest,
    plan: Plan,
    join: Join,
    sources: Sequence[Source],
    done: frozenset[str],
    totals: Totals,
    lease: Lease,
    calls: Any,
) -> None:
    """Spread what is not spread yet, then gather the shards that are not done."""
    units = [unit for unit in join.units if unit.id not in done]
    if not units:
        return
    root = manifest.root
    works = [
        Spread(index, sources[-1], piece, int(join.starts[index]), *join.wanted(index))
        for index, piece in enumerate(join.pieces)
    ]
    works = [work for work in works if len(work.rows)]
    noted = {name.rsplit("/", 1)[-1] for name in manifest.list_files().within(EXCHANGE)}
    pending = [work for work in works if f"{work.name}.json" not in noted]
    progress = _Progress(manifest, plan, totals, lease)
    for note in calls([partial(spread, work, config, str(root)) for work in pending]):
        progress.count("pieces of the sources read", len(pending), note.rows)
        totals.storage_retries += note.retries
    portions = _portions(root, works, len(plan.units))
    progress = _Progress(manifest, plan, totals, lease)
    gathers = [
        partial(
            gather,
            Gather(unit, portions[int(unit.id)], join.details(unit)),
            config,
            str(root),
            plan.fingerprint,
        )
        for unit in units
    ]
    expected = Expected(manifest, plan, done)
    for receipt in calls(gathers):
        if expected.take(receipt):
            totals.add(receipt)
            progress.count("shards written", len(units), receipt.rows_in)
    expected.check({})


def _portions(root: Location, works: Sequence[Spread], shards: int) -> list[list[Portion]]:
    """Where each shard's rows lie in the exchange."""
    found: list[list[Portion]] = [[] for _ in range(shards)]
    for work in works:
        location = root / f"{EXCHANGE}/{work.name}.json"
        with storage_errors(location):
            note = Note.from_json(location.read_bytes(), location)
        for name, portions in note.files:
            for shard, start, stop in portions:
                found[shard].append(Portion(name, start, stop))
    return found


class _Progress:
    """Says every few seconds how far a pass is, and looks at the lease."""

    def __init__(self, manifest: Manifest, plan: Plan, totals: Totals, lease: Lease) -> None:
        self._manifest, self._plan, self._totals, self._lease = manifest, plan, totals, lease
        self._next = time.monotonic() + LOG_SECONDS
        self._done = self._rows = 0

    def count(self, what: str, of: int, rows: int) -> None:
        self._done, self._rows = self._done + 1, self._rows + rows
        if self._lease.lost:
            self._lease.check()
        if time.monotonic() >= self._next or self._done == of:
            self._next = time.monotonic() + LOG_SECONDS
            log.info("staging: %d of %d %s, %s rows", self._done, of, what, f"{self._rows:,}")
            self._manifest.write_status(status_of("running", self._plan, self._totals, self._lease))


def _finalise(manifest: Manifest, plan: Plan, join: Join, lease: Lease) -> None:
    lease.check()
    with storage_errors(manifest.root):
        if any(join.missing.values()):
            (manifest.root / "_manifest/missing.json").write_bytes(json.dumps(join.missing, indent=1).encode())
        mark_done(manifest, plan, Mark(rows=plan.counts["queries"]), lease)
        for name in manifest.list_files().within(EXCHANGE):
            (manifest.root / name).remove()
