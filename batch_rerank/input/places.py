"""Places that must not meet: what a job reads, and where it or its stage writes.

A pattern that would match the output is harmless once: the next run finds its own parts among its input. So patterns
are held against the names that will be there, before anything is.
"""

import re
from collections.abc import Iterator, Sequence

from fsspec.utils import glob_translate

from batch_rerank.config import JobConfig
from batch_rerank.errors import ConfigError
from batch_rerank.sections import as_list
from batch_rerank.store.filesystem import Location, has_magic, locate
from batch_rerank.store.latest import read_latest, real_path

WRITTEN = (
    "part-00000-00000.parquet",
    "part-00000.parquet",
    "_run.trec",
    "_SUCCESS",
    "_manifest/plan.json",
    "_manifest/lease/00000",
    "_manifest/receipts/00000-00000.json",
    "_manifest/exchange/00000-0000.arrows",
)
"""One of each kind of file below an output or a stage."""


def refuse_overlap(config: JobConfig, staging: bool = False) -> None:
    """Raise ConfigError where the input's patterns match what is written at `output.path`, or, when `staging`, at
    `input.stage` if it is named; where input files lie there; and where these two lie in each other. Links and .. are
    followed."""
    options = config.output.storage_options
    places = {"output.path": locate(config.output.path, options)}
    if staging and config.input.stage:
        stage = places["input.stage"] = locate(config.input.stage, options)
        output = places["output.path"]
        if same_store(stage, output) and (is_within(stage, output) or is_within(output, stage)):
            raise ConfigError(
                f"input.stage {config.input.stage!r} and output.path {config.output.path!r} lie in each other; use two "
                "places"
            )
    for key, pattern in patterns_of(config):
        read = locate(pattern, config.input.storage_options)
        for name, place in places.items():
            if not same_store(read, place):
                continue
            if is_within(_fixed(read), place):
                raise ConfigError(f"{key} {pattern!r} lies in {name} {str(place)!r}; use another {name}")
            seen = _would_match(read, place, WRITTEN)
            if seen:
                raise ConfigError(
                    f"{key} {pattern!r} takes in {name} {str(place)!r} (e.g. {seen}): the job would read what it "
                    f"writes; use another {name}, or a pattern that leaves it out"
                )


def refuse_pointer(config: JobConfig, inputs: bool = True) -> None:
    """Raise ConfigError where `output.latest` lies in the output, or would be read as input; ConflictError where what
    stands there is no pointer, and StorageError where it cannot be read. A sample moves none. `inputs`: False where
    only a job file would say how the input is reached."""
    if config.output.latest is None or config.limit is not None:
        return
    options, latest = config.output.storage_options, config.output.latest
    pointer, output = locate(latest, options), locate(config.output.path, options)
    if same_store(pointer, output) and is_within(pointer, output):
        raise ConfigError(f"output.latest {latest!r} lies in output.path; use a name beside it")
    folder, _, name = pointer.path.rpartition("/")
    for key, pattern in patterns_of(config) if inputs else ():
        read = locate(pattern, config.input.storage_options)
        if not same_store(read, pointer):
            continue
        if real_path(read) == real_path(pointer) or _would_match(read, pointer.at(folder or "/"), (name,)):
            raise ConfigError(f"{key} {pattern!r} takes in output.latest {latest!r}; use another name")
    read_latest(pointer)


def matches(pattern: Location, file: Location) -> bool:
    """Whether a pattern of an input takes in a file: a glob, a folder's files, or the file itself."""
    if not same_store(pattern, file):
        return False
    if has_magic(pattern.path):
        return re.match(glob_translate(pattern.path), file.path) is not None
    return is_within(file, pattern)


def patterns_of(config: JobConfig) -> Iterator[tuple[str, str]]:
    """The keys of a job's input with each pattern that they have."""
    given = config.input
    for key in ("run", "queries", "corpus"):
        for pattern in as_list(getattr(given, key)):
            yield f"input.{key}", pattern
    for pattern in given.patterns:
        if given.layout == "beir":  # only these two files of the folder are read
            yield "input.path", f"{pattern.rstrip('/')}/corpus.jsonl"
            yield "input.path", f"{pattern.rstrip('/')}/queries.jsonl"
        else:
            yield "input.path", pattern


def _fixed(read: Location) -> Location:
    """The folder that all matches of a glob lie in, or the path that is no glob."""
    magic = re.search(r"[*?\[]", read.path)
    return read.at(read.path[: read.path.rfind("/", 0, magic.start())] or "/") if magic else read


def _would_match(read: Location, place: Location, names: Sequence[str]) -> str | None:
    """A file of these names below `place` that a glob takes in, or a folder with its Parquet files."""
    fixed = _fixed(read)
    if not is_within(place, fixed):
        return None
    try:
        matches = re.compile(glob_translate(read.path[len(fixed.path) :].lstrip("/") or "*.parquet"))
    except ValueError:  # no glob: whoever lists it says so
        return None
    below = real_path(place)[len(real_path(fixed)) :].strip("/")
    return next((f"{place}/{name}" for name in names if matches.match(f"{below}/{name}".lstrip("/"))), None)


def same_store(one: Location, other: Location) -> bool:
    """Whether equal paths are the same file in both, as far as protocol and named endpoints say."""
    return one.fs.protocol == other.fs.protocol and _endpoint(one) in (_endpoint(other), None)


def _endpoint(location: Location) -> str | None:
    options = location.fs.storage_options
    found = options.get("endpoint_url") or (options.get("client_kwargs") or {}).get("endpoint_url")
    return None if found is None else str(found).rstrip("/")


def is_within(inner: Location, outer: Location) -> bool:
    """Whether a path of the same store is another one, or below it."""
    return f"{real_path(inner)}/".startswith(real_path(outer).rstrip("/") + "/")
