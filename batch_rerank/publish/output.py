"""An output that is there already, opened for `status`, `verify` and `evaluate`: by its place, or by its job file."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import pyarrow as pa
from pydantic import BaseModel, ValidationError

from batch_rerank.config import JobConfig, load_config
from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.errors import ConfigError, StorageError
from batch_rerank.input.unit_reader import read_units
from batch_rerank.outside import problem_of
from batch_rerank.sections import Cluster
from batch_rerank.store.filesystem import Options, locate
from batch_rerank.store.manifest import Manifest
from batch_rerank.store.plans import Plan, Shard, Unit

T = TypeVar("T", bound=BaseModel)


@dataclass(frozen=True)
class Place:
    """Where an output is, and what the stores of it and of its input want to be told: no plan has storage options."""

    path: str
    options: Options = field(default_factory=dict)
    job: JobConfig | None = None


@dataclass(frozen=True)
class Opened:
    """An output that is there, or a staged input, in what a task anywhere needs to open it again."""

    path: str
    options: Options
    staged: bool

    @staticmethod
    def of(manifest: Manifest, options: Options) -> "Opened":
        """options: of the store that it is on."""
        return Opened(str(manifest.root), options, manifest.staged)

    def manifest(self) -> Manifest:
        """Its files; an outage of its store is waited for."""
        return Manifest(locate(self.path, self.options, reached=True), self.staged)


def find_place(output: str, overrides: Sequence[str] = (), limit: int | None = None) -> Place:
    """The place of an output, given by its path or URL, or by the job file that it is of. Raises ConfigError."""
    if "://" in output or not os.path.isfile(output):  # which raises for no name
        if overrides or limit is not None:
            raise ConfigError(f"{output}: --set and --limit are for a job file; found no such file, expected one")
        if problem := problem_of(output):
            raise ConfigError(problem)
        return Place(output)
    job = load_config(output, overrides, limit)
    return Place(job.output.path, job.output.storage_options, job)


def open_output(place: Place | str, or_stage: bool = False) -> tuple[Manifest, Plan]:
    """The manifest and plan of an output, or of a staged input too. Raises StorageError where there is none."""
    place = Place(place) if isinstance(place, str) else place
    root = locate(place.path, place.options)
    manifest = Manifest(root)
    plan = manifest.read_plan()
    if plan is None:
        raise StorageError(
            f"{manifest.root}: no _manifest/plan.json; expected the output of `batch-rerank run`; check the path"
        )
    if is_stage(plan) and not or_stage:
        raise StorageError(
            f"{manifest.root}: a staged input, expected the output of `batch-rerank run`; check the path"
        )
    return Manifest(root, staged=is_stage(plan)), plan


def is_stage(plan: Plan) -> bool:
    """Whether a plan is that of a staged input."""
    return bool(plan.config.get("stage"))


def config_of(plan: Plan, place: Place | str = "") -> JobConfig:
    """The job of a plan, with the storage options of its job file. Raises StorageError where this version does not
    understand it."""
    config = _parsed(JobConfig, plan.config, plan)
    job = place.job if isinstance(place, Place) else None
    if job is None:
        return config
    opened = config.model.model_copy(update={"storage_options": job.model.storage_options})
    config = config.model_copy(update={"model": opened})
    staged = job.input.patterns != config.input.patterns  # the stage lies where the output's options reach
    given = job.output.storage_options if staged else job.input.storage_options
    return config.model_copy(update={"input": config.input.model_copy(update={"storage_options": given})})


def lease_seconds_of(plan: Plan) -> float:
    """How long a job on this output must be silent before it counts as dead. Raises StorageError."""
    return _parsed(Cluster, plan.config.get("cluster", {}), plan).lease_seconds


def _parsed(kind: type[T], value: object, plan: Plan) -> T:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])[:100]
        raise StorageError(
            f"_manifest/plan.json: written by batch_rerank {plan.version or '?'}, whose job this version does not "
            f"understand ({where}: {first['msg']}); use that version"
        ) from None


def model_of(plan: Plan) -> ModelSpec:
    """What a plan knows of its model, for publishing. Raises StorageError where this version does not understand it."""
    try:
        files = tuple(map(tuple, plan.model.get("files") or ()))
        return ModelSpec(**{**plan.model, "causal": None, "files": files})
    except TypeError as error:
        raise StorageError(
            f"_manifest/plan.json: written by batch_rerank {plan.version}, whose model this version does not "
            f"understand ({error}); use that version"
        ) from None


def input_ids(shard: Shard, config: JobConfig, units: list[Unit]) -> Iterator[tuple[Unit, pa.Table]]:
    """Canonical rows of units of a shard, re-read from the input. Raises InputError where it changed."""
    location = locate(shard.url, config.input.storage_options)
    return read_units(location, shard, units, config.input.layout, config.input.columns, [], ids_only=True)
