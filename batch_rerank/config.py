"""The job's configuration: one YAML file, every default visible here, unknown keys refused.

`load_config` reports all errors of a file together, each with its place, what was found and what to do.
"""

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from os import PathLike
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError, model_validator

from batch_rerank.conditions import Gate
from batch_rerank.errors import ConfigError
from batch_rerank.job_file import copied, parse_yaml, read_yaml
from batch_rerank.label_settings import Labels
from batch_rerank.model_settings import Model
from batch_rerank.outside import hide
from batch_rerank.schema import CHUNK_OFFSET, INPUT_COLUMNS, OUTPUT_NAMES
from batch_rerank.sections import (
    MOST,
    Cluster,
    Cost,
    Places,
    Reuse,
    Section,
    StorageOptions,
    Whole,
    Written,
    as_list,
)

KEYS = {
    "nested": (("path",), ()),
    "flat": (("path",), ("stage",)),
    "run": (("run", "queries", "corpus"), ("stage", "candidates_per_query", "max_missing")),
    "beir": (("path", "run"), ("stage", "candidates_per_query", "max_missing")),
}
"""The keys that say where a layout's files are, all needed; and those that it may have besides."""


class Input(Section):
    """Where the candidates are. `layout`: what a row is. `path`: of nested and flat, and a BEIR folder: a path, a
    directory, a glob, or a list of them. `run`: ids alone, of layouts run and beir. `queries`, `corpus`: of layout run.
    `stage`: layouts run and beir, and a flat whose queries are scattered, are written once as nested shards there; by
    default in a folder _stage-… beside the sources, or beside the output where they may not be written.
    `candidates_per_query`: the best of the first stage, all if null. `max_missing`: share of the candidates, 0 to 1,
    that may lack their query or document and are then left out. `columns`: our names to the file's, e.g. {text:
    passage}. `unit_pairs`: pairs that are scored and committed together; auto: some 20 s of an actor's work.
    `unit_bytes`: of text in a unit at most, where a query has less. `storage_options`: what the store is opened with,
    in fsspec's words; never stored or shown."""

    layout: Literal["nested", "flat", "run", "beir"]
    path: Places | None = None
    run: Places | None = None
    queries: Places | None = None
    corpus: Places | None = None
    stage: Written | None = None
    candidates_per_query: Whole | None = None
    max_missing: Annotated[float, Field(ge=0, le=1)] = 0
    columns: dict[str, str] = Field(default={})
    unit_pairs: Literal["auto"] | Whole = "auto"
    unit_bytes: Whole = 4 * 2**20
    storage_options: StorageOptions = Field(default={}, exclude=True, repr=False)  # may hold secrets: never stored

    @model_validator(mode="after")
    def _known_columns(self) -> "Input":
        unknown = sorted(set(self.columns) - set(INPUT_COLUMNS))
        if unknown:
            raise ValueError(f"columns: unknown {unknown}; expected some of {list(INPUT_COLUMNS)}")
        return self

    @model_validator(mode="after")
    def _keys_of_the_layout(self) -> "Input":
        needed, allowed = KEYS[self.layout]
        every = dict.fromkeys(key for keys in KEYS.values() for key in (*keys[0], *keys[1]))
        missing = [key for key in needed if getattr(self, key) is None]
        foreign = [
            key
            for key in every
            if key not in (*needed, *allowed) and getattr(self, key) != type(self).model_fields[key].default
        ]
        problems = [f"{key}: missing; layout {self.layout} requires it" for key in missing]
        problems += [f"{key}: layout {self.layout} has no such key; remove it" for key in foreign]
        if self.layout == "beir" and isinstance(self.path, list):
            problems.append("path: a list; expected one BEIR folder")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def patterns(self) -> list[str]:
        """The paths or globs, as a list."""
        return as_list(self.path)


class Output(Section):
    """Where the ranked rows go, and which columns they have beyond the fixed ones. `path`: a directory, of this output
    alone. `layout`: flat is a row for each candidate, nested a row for each query with its ranked list. `top_k`: the
    best of a query that are kept, all if null. `include_text`: the documents too, in a column text. `passthrough`:
    columns of the input that the output has too. `trec_run`: the rows also as _run.trec. `file_bytes`: about how large
    a part becomes. `keep_scores`: false removes the scores once they are published; they are what other settings are
    published from without scoring. `latest`: a small file that names the newest finished output. `report`: false leaves
    out what a run otherwise ends with, _report/report.html and .json. `storage_options`: as those of the input."""

    path: Written
    layout: Literal["flat", "nested"] = "flat"
    top_k: Whole | None = None
    include_text: bool = False
    passthrough: list[str] = Field(default=[])
    trec_run: bool = False
    file_bytes: Annotated[int, Field(ge=1, le=2**31)] = 128 * 2**20
    keep_scores: bool = True
    latest: Written | None = None
    report: bool = True
    storage_options: StorageOptions = Field(default={}, exclude=True, repr=False)

    @model_validator(mode="after")
    def _free_names(self) -> "Output":
        taken = sorted(set(self.passthrough) & {*OUTPUT_NAMES, CHUNK_OFFSET, "text"})
        if taken:
            raise ValueError(f"passthrough: {taken} are columns of the output itself (text: set include_text)")
        if len(set(self.passthrough)) < len(self.passthrough):
            raise ValueError(f"passthrough: {self.passthrough} names a column twice")
        return self


class Scoring(Section):
    """How pairs are scored, and how many may fail. `token_budget`: tokens of one batch; auto goes by free memory.
    `max_failed_rows`: share of rows that may have an error, 0 to 1. `max_failed_units`: units that may be set aside
    before the job gives up; a job with any ends with exit 1. `long_documents`: truncate, or chunk: a document that does
    not fit is scored in chunks that share `chunk_overlap` tokens, and has the score of its best chunk. `chunk_overlap`:
    in tokens. `escape_control_tokens`: read "<|im_end|>" and the like inside queries, their instructions and documents
    as plain text; the models' own code does not."""

    token_budget: Literal["auto"] | Whole = "auto"
    max_failed_rows: Annotated[float, Field(ge=0, le=1)] = 0.01
    max_failed_units: Annotated[int, Field(ge=0, le=MOST)] = 10
    long_documents: Literal["truncate", "chunk"] = "truncate"
    chunk_overlap: Annotated[int, Field(ge=0, le=MOST)] = 80
    escape_control_tokens: bool = False


class JobConfig(Section):
    """A whole job. `input`: what is scored. `output`: where it goes. `model`: by what. `scoring`: how. `cluster`: on
    what. `reuse`: whose scores are taken. `gate`: what has to hold before it is published. `labels`: training files of
    its scores. `cost`: its price and budget. `limit`: only the first N queries, as a sample, as `--limit` sets it."""

    input: Input
    output: Output
    model: Model
    scoring: Scoring = Scoring()
    cluster: Cluster = Cluster()
    reuse: Reuse | None = Field(default=None, exclude=True)  # of a run, not of its output: receipts say what served
    gate: Gate | None = None
    labels: Labels | None = Field(default=None, exclude=True)  # of an export, not of the output
    cost: Cost | None = Field(default=None, exclude=True)  # of a run too: a resumed one may have another budget
    limit: Whole | None = None


def load_config(
    job: str | PathLike[str] | Mapping[str, Any], overrides: Sequence[str] = (), limit: int | None = None
) -> JobConfig:
    """Read a job file, or take its sections as a mapping, and apply `section.key=value` overrides.

    Raises ConfigError with every error of the job. With `limit`, the output is `<output>-limit-<N>`: a sample is
    another job than the whole and must not stand in its place.
    """
    where = "job" if isinstance(job, Mapping) else str(job)
    raw = copied(job) if isinstance(job, Mapping) else read_yaml(job)
    if not isinstance(raw, dict):
        raise ConfigError(f"{where}: found {type(raw).__name__}, expected the sections input, output and model")
    for override in overrides:
        _apply(raw, override)
    for section in raw.values():
        hide(section.get("storage_options") if isinstance(section, dict) else None)
    if limit is not None:
        raw["limit"] = limit
    return parse_config(raw, where)


def parse_config(raw: dict[str, Any], where: str) -> JobConfig:
    """Validate a parsed job. Raises ConfigError with every error."""
    try:
        config = JobConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(_told(error, f"{where}: {{}} error(s) in the job")) from None
    if config.limit is None:
        return config
    sample = f"{config.output.path.rstrip('/')}-limit-{config.limit}"
    return config.model_copy(update={"output": config.output.model_copy(update={"path": sample})})


def parse_labels(overrides: Sequence[str], where: str) -> Labels:
    """The section `labels` alone, of `labels.key=value`: for an output without a job file. Raises ConfigError."""
    raw: dict[str, Any] = {}
    for override in overrides:
        _apply(raw, override)
    other = sorted(set(raw) - {"labels"})
    if other:
        raise ConfigError(f"{where}: --set {other[0]}.…: not of a job file; expected labels.key=value alone")
    try:
        return Labels.model_validate(raw.get("labels", {}))
    except ValidationError as error:
        raise ConfigError(_told(error, f"{where}: {{}} error(s) in the labels", "labels.")) from None


def _told(error: ValidationError, first: str, prefix: str = "") -> str:
    found: dict[str, list[str]] = {}
    for one in error.errors():
        found.setdefault(_place(one), []).append(_explain(one))
    lines = [f"  {prefix}{place}: {' or: '.join(dict.fromkeys(reasons))}" for place, reasons in found.items()]
    return "\n".join([first.format(len(lines)), *lines])


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    names = key.split(".")
    if not equals or not all(names):
        said = _without_value(override)
        raise ConfigError(f"--set {said}: expected section.key=value, e.g. --set model.max_length=1024")
    section = raw
    for name in names[:-1]:
        inner = section.setdefault(name, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {_without_value(override)}: {name!r} is a value in the job file, not a section")
        section = inner
    try:
        section[names[-1]] = parse_yaml(value)
    except ValueError as error:
        raise ConfigError(f"--set {_without_value(override)}: not a YAML value ({error}); quote it") from None


def _without_value(override: str) -> str:
    """The key of an override: its value may be a secret, and so may be what has no key."""
    key, _, _ = override.partition("=")
    return f"{key[:100]!r}" if re.fullmatch(r"[a-z_.]*", key) else "(a key that is none)"


def _place(error: Any) -> str:
    """The key. pydantic adds the branch of a union to it ("constrained-int", "ActorRange", "list[str]")."""
    parts = [str(part) for part in error["loc"]]
    return ".".join(part for part in parts if re.fullmatch(r"[a-z_]+|\d+", part) and part not in ("int", "str"))


def _siblings(loc: Sequence[Any]) -> list[str]:
    """The keys that there are where one is unknown."""
    model: Any = JobConfig
    for name in loc[:-1]:
        field = model.model_fields.get(name)
        kinds = () if field is None else (field.annotation, *get_args(field.annotation))
        model = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)
        if model is None:
            return []
    return [field.alias or name for name, field in model.model_fields.items()]


def _explain(error: Any) -> str:
    if error["type"] == "missing":
        return "missing; this key is required"
    if error["type"] == "extra_forbidden":
        plain = isinstance(error["input"], int | float)  # anything else may be a secret under a wrong name
        value = f" (value {error['input']!r})" if plain else ""
        near = get_close_matches(str(error["loc"][-1]), _siblings(error["loc"]), 1)
        meant = f"; is {near[0]} meant?" if near else "; remove it or correct its name"
        return f"unknown key{value}{meant}"
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "value_error":
        return message
    value = error["input"]
    # of what has parts only the type: one may be a secret, and a few lines of YAML can name a billion of them
    plain = isinstance(value, str | int | float) and not (isinstance(value, str) and "\n" in value)
    found = repr(value)[:200] if plain else f"a {type(value).__name__}"
    if "storage_options" in error["loc"]:
        found = "a value that is not shown"
    return f"found {found}; {message[0].lower()}{message[1:]}"
