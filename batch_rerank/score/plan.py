"""Planning: shards, checks, units and the fingerprint. Reads footers and id columns, no text, and touches no GPU."""

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

import batch_rerank
from batch_rerank.conditions import LATEST
from batch_rerank.config import JobConfig
from batch_rerank.engine.checkpoint import ModelSpec, resolve_model
from batch_rerank.engine.encoding import make_encoder
from batch_rerank.errors import ConfigError, InputError, ScatteredError
from batch_rerank.input.layouts import OPTIONAL, Columns, Queries, Scattered, find_scattered
from batch_rerank.input.shards import read_queries, with_content
from batch_rerank.input.units import cut_units
from batch_rerank.score.unit_size import unit_pairs
from batch_rerank.score.weights import find_model, told_as
from batch_rerank.store.filesystem import File, Location, identity_of, input_errors, list_files, locate
from batch_rerank.store.manifest import fingerprint
from batch_rerank.store.plans import Plan, Shard, Unit

SCORING_VERSION = 3
"""Raised when the same job would score differently: it makes older outputs a conflict instead of a mixture."""

PLANNING_THREADS = max(2, min(8, os.cpu_count() or 2))
"""More than cores make nothing faster where shards are near, and hold a shard's ids each."""

MOST_THREADS = 32
"""Where shards are small and far away: 500 of them at 50 ms a request take 10 s with 8 threads, 3.7 s with 32."""

PLANNED_BYTES = 2**30
"""Of shards that may be planned at once by more than PLANNING_THREADS: their ids are a driver's memory."""


@dataclass(frozen=True)
class Seen:
    """What planning read of one shard. `file` has its content's version, `listed` its time's."""

    location: Location
    file: File
    listed: File
    columns: Columns
    queries: Queries
    row_groups: tuple[tuple[int, int], ...]
    pair_bytes: float
    passthrough_types: dict[str, str]


def make_plan(config: JobConfig, judged: Sequence[str] = ()) -> tuple[Plan, ModelSpec]:
    """Plan a job: everything that can be wrong is found here, before an accelerator is taken. judged: ids of queries,
    some of which the job's gate has to find.

    Raises ConfigError, ModelError and InputError.
    """
    model = configured_model(config)
    with told_as(model.name, model.directory if model.files else None):
        make_encoder(model)  # the tokenizer fits the template, or the job ends here
    seen = _read_shards(config)
    _check_together(config, model, seen)
    _verdict(config, find_scattered([(str(shard.location), shard.queries) for shard in seen]))
    shards = [
        Shard(index, str(shard.location), shard.file, int(shard.queries.rows[-1]), shard.row_groups, shard.listed)
        for index, shard in enumerate(seen)
    ]
    pairs = sum(int(shard.queries.pairs.sum()) for shard in seen)
    if judged and pairs:
        _refuse_other_judgements(seen, judged)
    sizes = [unit_pairs(config, model, pairs, shard.pair_bytes) for shard in seen]
    units = [unit for index, shard in enumerate(seen) for unit in _units_of(index, shard, sizes[index])]
    if config.limit is not None:
        units = _first_queries(units, seen, config.limit)
    fields = _fingerprint_fields(config, model, seen)
    counts = {
        "shards": len(seen),
        "zero_row_shards": sum(shard.rows == 0 for shard in shards),
        "queries": sum(unit.queries for unit in units),
        "queries_without_candidates": sum(int((shard.queries.pairs == 0).sum()) for shard in seen),
    }
    plan = Plan(
        fingerprint=fingerprint(fields),
        fingerprint_fields=fields,
        config=_stored(config),
        model={**asdict(model), "files": [list(file) for file in model.files]},
        version=batch_rerank.__version__,
        counts=counts,
        notes=_notes(model, seen, units, sizes),
        shards=shards,
        units=units,
    )
    return plan, model


def _refuse_other_judgements(seen: Sequence[Seen], judged: Sequence[str]) -> None:
    wanted = pa.array(judged, pa.large_string())
    if not any(pc.any(pc.is_in(shard.queries.ids, wanted)).as_py() for shard in seen):
        has = next(shard.queries.ids[0].as_py() for shard in seen if len(shard.queries.ids))
        raise ConfigError(
            f"gate.qrels: none of its {len(judged):,} queries is in the input, e.g. {judged[0]!r}; the input has e.g. "
            f"{has!r}; expected judgements of these queries, by their query_id"
        )


def _stored(config: JobConfig) -> dict[str, object]:
    """The job as its plan keeps it; its pointer, and what its gate needs, are found from any working directory."""
    latest = config.output.latest
    if latest is not None:
        latest = str(locate(latest, config.output.storage_options))
        config = config.model_copy(update={"output": config.output.model_copy(update={"latest": latest})})
    gate = config.gate
    if gate is not None:
        against = None if gate.against in (None, LATEST) else locate(str(gate.against), config.output.storage_options)
        qrels = None if gate.qrels is None else locate(gate.qrels, config.input.storage_options)
        found = {name: str(place) for name, place in (("against", against), ("qrels", qrels)) if place is not None}
        config = config.model_copy(update={"gate": gate.model_copy(update=found)})
    return config.model_dump(mode="json")


def configured_model(config: JobConfig) -> ModelSpec:
    """The model of a job, without its weights. Raises ConfigError and ModelError."""
    stored = find_model(config.model)
    with told_as(config.model.name, stored.directory if stored else None):
        return resolve_model(
            config.model.name,
            revision=config.model.revision,
            kind=config.model.kind,
            template=config.model.template,
            instruction=config.model.instruction,
            max_length=config.model.max_length,
            dtype=config.model.dtype,
            device=config.cluster.device,
            trust_remote_code=config.model.trust_remote_code,
            allow_pickle=config.model.allow_pickle,
            chunk_overlap=config.scoring.chunk_overlap if config.scoring.long_documents == "chunk" else None,
            escape=config.scoring.escape_control_tokens,
            stored=stored,
        )


def _read_shards(config: JobConfig) -> list[Seen]:
    files: dict[str, tuple[Location, File]] = {}
    for pattern in config.input.patterns:
        location = locate(pattern, config.input.storage_options)
        with input_errors(pattern):
            found = list_files(location)
        if not found:
            raise InputError(
                f"input.path {pattern!r}: no shard matches; expected at least one Parquet file; "
                "check the path (globs are allowed, a directory means its *.parquet)"
            )
        for file in found:
            files.setdefault(identity_of(location, file), (location.at(file.path), file))
    _refuse_own_output(config, files.values())
    if config.limit is not None and config.input.layout == "nested":  # flat: only all ids show a scattered query
        return _read_first(config, config.limit, list(files.values()))
    with ThreadPoolExecutor(_threads(list(files.values()))) as pool:
        return list(pool.map(lambda entry: _read_shard(config, *entry), files.values()))


def _threads(files: Sequence[tuple[Location, File]]) -> int:
    if any(location.is_local for location, _ in files):
        return PLANNING_THREADS
    mean = 1 + sum(file.size for _, file in files) // len(files)
    return max(PLANNING_THREADS, min(MOST_THREADS, PLANNED_BYTES // mean))


def _read_first(config: JobConfig, limit: int, files: Sequence[tuple[Location, File]]) -> list[Seen]:
    """The first shards, up to the one with the last query of a sample."""
    seen: list[Seen] = []
    for location, file in files:
        if limit <= 0:
            break
        seen.append(_read_shard(config, location, file, limit))
        limit -= len(seen[-1].queries.ids)
    return seen


def _refuse_own_output(config: JobConfig, files: Iterable[tuple[Location, File]]) -> None:
    output = locate(config.output.path, config.output.storage_options)
    inside = [str(at) for at, _ in files if at.is_local == output.is_local and at.path.startswith(f"{output.path}/")]
    if inside:
        raise ConfigError(
            f"output.path {config.output.path!r} holds shards of the input, e.g. {inside[0]}; "
            "expected a place of its own for the output"
        )


def _read_shard(config: JobConfig, location: Location, file: File, rows: int | None = None) -> Seen:
    if file.size == 0:
        raise InputError(
            f"{location}: the file has 0 bytes; expected Parquet (a table without rows has a footer); write it again"
        )
    given, output = config.input, config.output
    read = read_queries(location, given.layout, given.columns, output.passthrough, output.trec_run, rows)
    return Seen(location, with_content(location, file), file, *read)


def _check_together(config: JobConfig, model: ModelSpec, seen: Sequence[Seen]) -> None:
    """What no shard can show alone."""
    for shard in seen:
        if shard.passthrough_types != seen[0].passthrough_types:
            raise InputError(
                f"{shard.location}: passed-through columns have the types {shard.passthrough_types}, but "
                f"{seen[0].passthrough_types} in {seen[0].location}; expected one type in all shards"
            )
    if "instruction" in config.input.columns and not model.takes_instruction:
        raise ConfigError(
            f"input.columns.instruction: the template {model.template!r} has no place for one; remove the key"
        )


def _verdict(config: JobConfig, scattered: Sequence[Scattered]) -> None:
    """A scattered flat input can be staged; a nested query in two places is one id for two queries."""
    if not scattered:
        return
    one = scattered[0]
    places = " and ".join(f"{shard} row {row}" for shard, row in (one.first, one.second))
    found = f"query_id {one.query_id!r} stands in two places: {places} ({len(scattered)} such places in all)"
    if config.input.layout == "flat":
        raise ScatteredError(f"{found}; a job can read it once it is staged: batch-rerank stage, or run")
    raise InputError(f"{found}; expected each query in one row; give different queries different ids")


def _units_of(index: int, shard: Seen, size: int) -> Iterator[Unit]:
    cuts = cut_units(
        shard.queries.pairs,
        shard.queries.rows,
        list(itertools.accumulate(rows for rows, _ in shard.row_groups)),
        size,
    )
    for number, (first, last) in enumerate(itertools.pairwise(cuts)):
        rows, pairs = shard.queries.rows, shard.queries.pairs
        yield Unit(
            id=f"{index:05d}-{number:05d}",
            shard=index,
            start=int(rows[first]),
            stop=int(rows[last]),
            queries=int(last - first),
            pairs=int(pairs[first:last].sum()),
        )


def _first_queries(units: Sequence[Unit], seen: Sequence[Seen], limit: int) -> list[Unit]:
    """The units of the first `limit` queries; the last of them is cut short."""
    kept: list[Unit] = []
    for unit in units:
        if limit <= 0:
            break
        queries = seen[unit.shard].queries
        first = int(np.searchsorted(queries.rows, unit.start))
        last = first + min(unit.queries, limit)
        stop, pairs = int(queries.rows[last]), int(queries.pairs[first:last].sum())
        kept.append(Unit(unit.id, unit.shard, unit.start, stop, last - first, pairs))
        limit -= unit.queries
    return kept


def _notes(model: ModelSpec, seen: Sequence[Seen], units: Sequence[Unit], sizes: Sequence[int]) -> list[str]:
    notes = []
    if not model.takes_instruction and any("instruction" in shard.columns.names for shard in seen):
        notes.append(
            f"the input's instruction column is not used: the template {model.template!r} has no place for one"
        )
    for name in OPTIONAL:
        having = [shard for shard in seen if name in shard.columns.names]
        if 0 < len(having) < len(seen):
            lacks = next(shard.location for shard in seen if name not in shard.columns.names)
            notes.append(
                f"column {name!r} is in {len(having)} of {len(seen)} shards, e.g. not in {lacks}: read without it"
            )
    largest = max(units, key=lambda unit: unit.pairs, default=None)
    if largest is not None and largest.pairs > 4 * max(sizes, default=1):
        notes.append(
            f"unit {largest.id} has {largest.pairs:,} pairs: a query is never cut, so one task scores them all"
        )
    return notes


def _fingerprint_fields(config: JobConfig, model: ModelSpec, seen: Sequence[Seen]) -> dict[str, object]:
    """Everything that changes a score, or which pairs have one: not the cluster, the token budget, the failure limits,
    nor what the output makes of the scores."""
    shards = [[shard.file.size, shard.file.version] for shard in seen]  # wherever they lie
    return {
        "scoring_version": SCORING_VERSION,
        "model.identity": model.identity,
        "model.kind": model.kind,
        "model.template": model.template if model.causal is None else asdict(model.causal),
        "model.instruction": model.instruction,
        "model.max_length": model.max_length,
        "model.dtype": model.dtype,
        "scoring.chunk_overlap": model.chunk_overlap,
        "scoring.escape_control_tokens": model.escape,
        "input.layout": config.input.layout,
        "input.columns": [shard.columns.names for shard in seen[:1]],
        "input.shards": fingerprint({"shards": shards}),
        "limit": config.limit,
    }
