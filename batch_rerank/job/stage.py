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
from batch_rerank.errors import ConfigError, ConflictError, InputError
from batch_rerank.job.bookkeeping import recording, resume, status_of
from batch_rerank.job.exchange import EXCHANGE, Gather, Note, Portion, Spread, gather, spread
from batch_rerank.job.join import SHARD_PAIRS, Join, join_flat, join_run
from batch_rerank.job.places import is_within, refuse_overlap, same_store
from batch_rerank.store.contents import contents
from batch_rerank.store.filesystem import input_errors, list_files, locate, storage_errors
from batch_rerank.store.layouts import Columns, find_columns
from batch_rerank.store.lease import Lease, hold
from batch_rerank.store.manifest import Manifest, Plan, Totals, fingerprint
from batch_rerank.store.shards import Shard
from batch_rerank.store.sources import Source, find_files, find_source, footers

log = logging.getLogger("batch_rerank")
T = TypeVar("T")
STAGING_VERSION = 2
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
    manifest = Manifest(locate(config.stage, config.output.storage_options))
    existing = manifest.read_plan()
    plan = _skeleton(config, manifest, existing, sources)
    if existing is not None:
        _refuse_other(manifest, existing, plan)
        if _finished(manifest, existing):
            _check_missing(config, existing)
            if manifest.list_files().within(EXCHANGE):  # killed while it was removed
                with hold(manifest.root, config.cluster.lease_seconds):
                    _clean(manifest)
            return _staged(config, manifest, existing, True, started)
    join = join_sources(config, sources)
    plan = replace(plan, units=join.units, counts=_counts(plan, sources, join))
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
    manifest = Manifest(locate(config.stage, config.output.storage_options))
    existing = manifest.read_plan()
    if existing is None:
        return None
    plan = _skeleton(config, manifest, existing, find_sources(config))
    if existing.fingerprint != plan.fingerprint or not _finished(manifest, existing):
        return None
    _check_missing(config, existing)
    return _staged(config, manifest, existing, True, started)


def plan_stage(config: JobConfig) -> Plan:
    """What staging would do. Reads ids, writes nothing. Raises ConfigError and InputError."""
    sources = find_sources(config)
    manifest = Manifest(locate(config.stage, config.output.storage_options))
    plan = _skeleton(config, manifest, manifest.read_plan(), sources)
    join = join_sources(config, sources)
    return replace(plan, units=join.units, counts=_counts(plan, sources, join))


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


def find_sources(config: JobConfig) -> list[Source]:
    """The files of the input, listed. Raises ConfigError and InputError."""
    given, options = config.input, config.input.storage_options
    refuse_overlap(config, staging=True)
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
    every = footers(files, options)
    first: dict[str, tuple[str, str]] = {}
    for (url, _), footer in zip(files, every, strict=True):
        columns = find_columns(footer.schema, "flat", renamed, passthrough, url)
        for name, (kind, reason) in _kinds(columns, footer.schema).items():
            there, where = first.setdefault(name, (kind, url))
            if kind != there:
                raise InputError(
                    f"{url}: {name} is {kind}, but {there} in {where}: {reason}; expected one type in all shards of a "
                    "scattered input; cast it"
                )
    names = {name: renamed.get(name, name) for name in ("query_id", "doc_id")}
    return Source("flat", "parquet", files, names, groups=[footer.groups for footer in every])


def _kinds(columns: Columns, schema: pa.Schema) -> dict[str, tuple[str, str]]:
    """What must be alike in all shards, whose rows will stand side by side: of each column, what it is, and why."""
    kinds = {}
    for name in ("query_id", "doc_id"):
        is_integer = pa.types.is_integer(schema.field(columns.names[name]).type)
        kinds[name] = ("an integer" if is_integer else "a string", "7 and '7' may be two ids or one")
    for name in ("score", "rank"):
        kinds[name] = ("there" if name in columns.names else "missing", "a query's candidates are told apart by it")
    for name in columns.passthrough:
        kinds[name] = (str(schema.field(name).type), "it is passed through")
    return kinds


def join_sources(config: JobConfig, sources: Sequence[Source]) -> Join:
    """Which row goes where. Reads ids. Raises InputError."""
    options = config.input.storage_options
    if config.input.layout == "flat":
        return join_flat(sources[0], options)
    run, queries, corpus = sources
    return join_run(run, queries, corpus, config.input.candidates_per_query, config.input.max_missing, options)


def _skeleton(config: JobConfig, manifest: Manifest, existing: Plan | None, sources: Sequence[Source]) -> Plan:
    """The plan of a stage as far as the files' contents show it: its fingerprint, without units. What the plan that is
    there says of files that are untouched since need not be read again."""
    for source in sources:
        for url, file in source.files:
            found = locate(url, config.input.storage_options).at(file.path)
            if same_store(found, manifest.root) and is_within(found, manifest.root):
                raise ConfigError(
                    f"input.stage {config.stage!r} holds files of the input, e.g. {url}; use another place"
                )
    known = {}
    if existing is not None:
        for shard, (_, content) in zip(existing.shards, _held(existing), strict=False):
            known[shard.url, shard.file.size, shard.file.version] = content
    fields: dict[str, Any] = {"staging_version": STAGING_VERSION, "shard_pairs": SHARD_PAIRS}
    fields["input.layout"] = "flat" if config.input.layout == "flat" else "run"
    held = []
    for source in sources:
        found_contents = contents(source.files, known, config.input.storage_options)
        held += [[source.kind, content] for content in found_contents]
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
        config={"stage": True, "cluster": {"lease_seconds": config.cluster.lease_seconds}, "sources": held},
        model={},
        version=batch_rerank.__version__,
        counts={"files": len(files_of_all)},
        notes=[],
        shards=[Shard(index, url, file, 0) for index, (url, file) in enumerate(files_of_all)],
        units=[],
    )


def _held(plan: Plan) -> list[tuple[str, str]]:
    """The kind and the content of each file of a stage's sources; nothing in plans of older versions."""
    return [(str(kind), str(content)) for kind, content in plan.config.get("sources", [])]


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
    there = set(_held(other))
    files = [
        f"input.{kind} {shard.url} ({shard.file.size:,} bytes)"
        for shard, (kind, content) in zip(plan.shards, _held(plan), strict=False)
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
    source = replace(sources[-1], files=[], groups=[])  # goes along with every task
    works = [
        Spread(index, source, piece, int(join.starts[index]), *join.wanted(index))
        for index, piece in enumerate(join.pieces)
    ]
    works = [work for work in works if len(work.rows)]
    notes = _whole(manifest, works)
    pending = [work for work in works if work.name not in notes]
    progress = _Progress(manifest, plan, totals, lease)
    portions: list[list[Portion]] = [[] for _ in plan.units]
    for note in notes.values():
        _add_portions(portions, note)
    for note in calls([partial(spread, work, config, str(root)) for work in pending]):
        progress.count("pieces of the sources read", len(pending), note.rows)
        totals.storage_retries += note.retries
        _add_portions(portions, note)
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
    for receipt in calls(gathers):
        totals.add(receipt)
        progress.count("shards written", len(units), receipt.rows_in)


def _whole(manifest: Manifest, works: Sequence[Spread]) -> dict[str, Note]:
    """The notes of the pieces that are in the exchange already, by piece; one whose files are not all there as it says
    is spread again."""
    files = manifest.list_files()
    found = {}
    for work in works:
        location = manifest.root / f"{EXCHANGE}/{work.name}.json"
        if files.size(f"{EXCHANGE}/{work.name}.json") is None:
            continue
        with storage_errors(location):
            note = Note.from_json(location.read_bytes())
        if note and all(files.size(f"{EXCHANGE}/{name}") == portions[-1][2] for name, portions in note.files):
            found[work.name] = note
        else:
            log.warning("%s: the exchange is not whole there; the piece is spread again", location)
    return found


def _add_portions(portions: list[list[Portion]], note: Note) -> None:
    for name, found in note.files:
        for shard, start, stop in found:
            portions[shard].append(Portion(name, start, stop))


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
            self._manifest.write_status(status_of("running", self._plan, self._totals))


def _finalise(manifest: Manifest, plan: Plan, join: Join, lease: Lease) -> None:
    mark = {"fingerprint": plan.fingerprint, "units": len(plan.units), "rows": plan.counts["queries"]}
    lease.check()
    with storage_errors(manifest.root):
        if any(join.missing.values()):
            (manifest.root / "_manifest/missing.json").write_bytes(json.dumps(join.missing, indent=1).encode())
        manifest.success.create_exclusive(json.dumps(mark).encode())
    _clean(manifest)


def _clean(manifest: Manifest) -> None:
    """Remove the exchange: notes first, so that none is left that promises what is gone."""
    with storage_errors(manifest.root):
        for name in sorted(manifest.list_files().within(EXCHANGE), key=lambda name: not name.endswith(".json")):
            (manifest.root / name).remove()
