"""The files that a job's input names, listed and looked at before any of them is read."""

import pyarrow as pa

from batch_rerank.config import Input, JobConfig
from batch_rerank.errors import ConfigError, InputError
from batch_rerank.input.carried import carried_type
from batch_rerank.input.layouts import Columns, find_columns
from batch_rerank.input.places import refuse_overlap
from batch_rerank.input.sources import Source, find_files, find_source, footers
from batch_rerank.sections import as_list
from batch_rerank.store.filesystem import input_errors, list_files, locate


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
        kinds[name] = (str(carried_type(schema.field(name).type)), "it is passed through")
    return kinds
