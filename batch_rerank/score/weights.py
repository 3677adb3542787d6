"""Models that lie in a store: what they are, from one listing and small reads; their files on a node that needs them.

The driver fetches the small files and reads the weights' headers and samples. So the identity is that of the same
checkpoint in a directory, or the one that a mirror names. Whoever scores fetches the weights, of the versions that the
driver has seen, once for all processes of a node.
"""

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from pydantic import ValidationError

from batch_rerank.engine.checkpoint import ModelSpec, relocate
from batch_rerank.engine.checkpoint_files import (
    HEADER,
    WEIGHTLESS_FILES,
    LocalFile,
    Readable,
    Stored,
    check_listed,
    check_weights,
    copied_from,
    files_of,
    header_of,
    identify,
    identity_of,
    read_json,
)
from batch_rerank.engine.checkpoint_files import locate as find_checkpoint
from batch_rerank.errors import ConfigError, ModelError
from batch_rerank.model_settings import Model
from batch_rerank.store.disk import place as place_file
from batch_rerank.store.fetch import Fetched, Wanted, fetch, forget, key_of, read_range, refuse_other, threads
from batch_rerank.store.filesystem import File, Location, locate, storage_errors
from batch_rerank.store.manifest import sha256
from batch_rerank.store.mirror import MIRROR, UNFINISHED, Done, mirror, names_below, read_mirror, refuse_unfinished
from batch_rerank.store.node_cache import NodeCache

log = logging.getLogger("batch_rerank")

READS_AT_ONCE = 32

KEPT = "kept.json"
"""Beside the files of a version: the sha256 of those that are small, as they came."""

SAMPLED = "sampled"
"""Beside the files of a commit: what `identify` says of their content."""


@dataclass(frozen=True)
class _StoredFile:
    """A file that stays in its store."""

    where: Location
    wanted: Wanted

    @property
    def size(self) -> int:
        return self.wanted.size

    def read(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """What lies from each start to its stop. Raises ModelError where the file is another by now."""

        def one(span: tuple[int, int]) -> bytes:
            return b"" if span[0] == span[1] else read_range(self.where, self.wanted, *span)

        with threads(READS_AT_ONCE) as pool:
            found = list(pool.map(one, ranges))
        with storage_errors(self.where, ModelError):
            refuse_other(self.where, self.wanted)  # what is read is kept for this version
        return found


def find_model(settings: Model) -> Stored | None:
    """The model of a job where it lies in a store, else None. Fetches its small files.

    Raises ModelError where there is none, or not a whole one; ConfigError; and StorageError where the store cannot be
    reached.
    """
    if not settings.in_a_store or settings.kind == "checksum":
        return None
    place = locate(settings.name, settings.storage_options)
    wanted, identity, known_as = _look(place, settings)
    small = [one for one in wanted if _is_small(one.name)]
    directory = _fetch_small(place, wanted, cache_of(settings)).directory
    weights = {one.name: _StoredFile(place / one.name, one) for one in wanted if not _is_small(one.name)}
    with told_as(str(place), directory):
        check_listed(str(place), directory, weights, settings.allow_pickle)
        _keep_headers(place, directory, weights)
        identity = identity or _identity(place, directory, small, weights)
    return Stored(directory, identity, known_as, tuple((one.name, one.size, one.version, one.sha256) for one in wanted))


def fetched_model(name: str, allow_pickle: bool) -> Stored:
    """A model of a store with its weights, for this process. Raises what `find_model` and `on_this_node` raise."""
    try:
        settings = Model(name=name, allow_pickle=allow_pickle)
    except ValidationError as error:
        said = str(error.errors(include_url=False, include_input=False)[0]["msg"])
        raise ConfigError(said.removeprefix("Value error, ")) from None
    found = find_model(settings)
    assert found is not None, "the name is a place"
    _fetch_whole(locate(name), [Wanted(*one) for one in found.files], cache_of(settings), found.identity)
    return found


def cache_of(settings: Model) -> NodeCache:
    """Where this node keeps the files of models."""
    if settings.cache_dir is not None:
        return NodeCache(Path(settings.cache_dir).expanduser().absolute(), settings.cache_bytes)
    from huggingface_hub.constants import HF_HUB_CACHE

    return NodeCache(Path(HF_HUB_CACHE).absolute().parent / "batch-rerank", settings.cache_bytes)


def on_this_node(model: ModelSpec, settings: Model, weights: bool = True) -> tuple[ModelSpec, Fetched | None]:
    """A planned model on this machine, and what was fetched for it; without `weights` its small files alone.

    Raises ModelError where it is not here or not the one that was planned, ConfigError and StorageError.
    """
    if not model.files:
        return relocate(model, weights or model.revision is None), None
    place = locate(settings.name, settings.storage_options, reached=True)
    planned, cache = [Wanted(*one) for one in model.files], cache_of(settings)
    found = _fetch_whole(place, planned, cache, model.identity) if weights else _fetch_small(place, planned, cache)
    with told_as(str(place), found.directory):
        return relocate(replace(model, directory=str(found.directory)), weights), found


def _fetch_small(place: Location, planned: Sequence[Wanted], cache: NodeCache) -> Fetched:
    """Configuration and tokenizer: those that this node has kept and that are not what came are fetched again. Encoders
    are built of them before anybody looks at the whole checkpoint."""
    small, key = [one for one in planned if _is_small(one.name)], key_of(place, planned)
    found = fetch(place, small, cache, key, "small")
    kept = found.directory.parent / KEPT
    if kept.exists():
        damaged = _damaged(found.directory, small, kept)
        if not damaged:
            return found
        names = ", ".join(damaged)
        log.warning("%s: %s in %s: not what came, as %s says; fetched again", place, names, found.directory, kept.name)
        with cache.alone(f"{key}.small", f"{place}: forgetting {found.directory}"):
            forget(found.directory, _damaged(found.directory, small, kept))
        found = fetch(place, small, cache, key, "small")
    _remember(kept, json.dumps(_checksums(found.directory, small)).encode())
    return found


def _remember(path: Path, content: bytes) -> None:
    """Write a file of ours beside those of a model. Raises StorageError."""
    with storage_errors(path):
        place_file(os.replace, str(path), content)


def _damaged(directory: Path, small: Sequence[Wanted], kept: Path) -> list[str]:
    """The files that are not what they were when they came, or of which that cannot be told."""
    try:
        told = json.loads(kept.read_bytes())
    except (ValueError, RecursionError):
        told = None
    then, now = told if isinstance(told, dict) else {}, _checksums(directory, small)
    return [name for name, checksum in now.items() if then.get(name) != checksum]


def _checksums(directory: Path, small: Sequence[Wanted]) -> dict[str, str]:
    """The sha256 of each file; empty where another process has just found it damaged."""

    def checksum(name: str) -> str:
        try:
            return sha256((directory / name).read_bytes())
        except FileNotFoundError:
            return ""

    return {one.name: checksum(one.name) for one in small}


def _fetch_whole(place: Location, planned: Sequence[Wanted], cache: NodeCache, identity: str) -> Fetched:
    """All files; those that this node has kept and that are not what they were are fetched again."""
    key, large = key_of(place, planned), [one for one in planned if not _is_small(one.name)]

    def both() -> Fetched:
        small, found = _fetch_small(place, planned, cache), fetch(place, large, cache, key, "weights")
        return replace(
            found,
            size=small.size + found.size,
            seconds=small.seconds + found.seconds,
            retries=small.retries + found.retries,
        )

    found = both()
    sampled = found.directory.parent / SAMPLED
    if found.size and not sampled.exists():
        if identity.startswith("commit:"):  # its content has just been held against checksums, and a commit tells none
            _remember(sampled, identify(found.directory, None).encode())
        return found
    if _is_whole(found.directory, identity):
        return found
    log.warning("%s: what this node has kept in %s is damaged; it is fetched again", place, found.directory)
    with cache.alone(f"{key}.weights", f"{place}: forgetting {found.directory}"):
        if not _is_whole(found.directory, identity):  # else another process has just fetched it again, and loads it
            forget(found.directory, [one.name for one in planned])
    return both()


def _is_whole(directory: Path, identity: str) -> bool:
    """Whether a directory has the model of an identity; of a commit, whether it still has what its samples were."""
    sampled = directory.parent / SAMPLED
    try:
        found = identify(directory, None)
        if identity.startswith("commit:"):
            return not sampled.exists() or sampled.read_text() == found
        return found == identity
    except (ModelError, FileNotFoundError):  # or another process has just found the same
        return False


def mirror_model(name: str, to: str, *, revision: str | None, allow_pickle: bool, replacing: bool) -> Done:
    """Copy a model, of the hub or of a directory, to a place. Raises ModelError, ConflictError and StorageError."""
    place = locate(to)
    if "://" in name:
        raise ConfigError(f"{name}: a place; expected a hub id or a checkpoint directory to copy from")
    directory, commit = find_checkpoint(name, revision, weights=True, pickled=allow_pickle)
    if commit is None and revision is not None:
        raise ConfigError(f"--revision {revision!r}: {name!r} is a directory here, which has none; leave it out")
    if place.is_local and directory in Path(place.path).resolve().parents:
        raise ConfigError(f"{to}: lies in {directory}, which would be another model with it; use another place")
    read_json(directory / "config.json")
    check_weights(directory, allow_pickle and not any(directory.glob("*.safetensors")))
    identity = identify(directory, commit)
    source = name if commit else copied_from(directory)
    return mirror(place, directory, files_of(directory), identity, source, replacing)


def _look(place: Location, settings: Model) -> tuple[list[Wanted], str, str]:
    """What a place's model consists of; and its identity and hub id, where it is a mirror that names them."""
    with storage_errors(place, ModelError):
        config = (place / "config.json").exists()  # before a listing, which is long where the place is a wrong one
        if not config and (place / UNFINISHED).exists() and not (place / MIRROR).exists():
            refuse_unfinished(place)
        listed = names_below(place, place.find()) if config else {}
    if not config:
        raise ModelError(
            f"model.name {settings.name!r}: no config.json there; expected a transformers checkpoint; check the "
            "bucket, the path and, for S3, AWS_ENDPOINT_URL"
        )
    record = read_mirror(place, listed)
    if record is not None:
        wanted = [Wanted(one.name, one.size, listed[one.name].version, one.sha256) for one in record.files]
    else:
        wanted = [Wanted(name, file.size, file.version) for name, file in _parts_of(listed).items()]
    odd = [one.name for one in wanted if str(PurePosixPath(one.name)) != one.name or ".." in one.name.split("/")]
    odd += [one.name for one in wanted if one.name.startswith("/") or not one.name.isprintable()]
    if odd:
        raise ModelError(f"{place}: found a file named {odd[0]!r}; expected names below the place; remove it")
    pickles = any(one.name.endswith(".bin") for one in wanted)
    if record is None and pickles and settings.allow_pickle:
        raise ModelError(
            f"{place}: found pickled weights, of which small reads show no identity; expected *.safetensors, or a copy "
            "that `batch-rerank fetch --allow-pickle` has made"
        )
    return (wanted, "", "") if record is None else (wanted, record.identity, record.source)


def _parts_of(listed: Mapping[str, File]) -> dict[str, File]:
    """The files that a checkpoint consists of: as `files_of` has them of a directory."""
    small = {name: file for name, file in listed.items() if _is_small(name)}
    top = {name: file for name, file in listed.items() if "/" not in name}
    safe = {name: file for name, file in top.items() if name.endswith(".safetensors")}
    return small | (safe or {name: file for name, file in top.items() if name.endswith(".bin")})


def _is_small(name: str) -> bool:
    return any(fnmatch(PurePosixPath(name).name, pattern) for pattern in WEIGHTLESS_FILES)


def _keep_headers(place: Location, directory: Path, weights: Mapping[str, Readable]) -> None:
    """The headers of weights that stay in the store, beside the small files. Raises ModelError for a file that is cut
    short."""
    for name, file in weights.items():
        kept = directory / f"{name}{HEADER}"
        if name.endswith(".safetensors") and not kept.exists():
            _remember(kept, header_of(str(place / name), file))


def _identity(place: Location, directory: Path, small: Sequence[Wanted], weights: Mapping[str, Readable]) -> str:
    """As `identify` says it of a directory with the same files; found once on a node for each version."""
    kept = directory.parent / "identity"
    if kept.exists():
        return kept.read_text()
    started = time.monotonic()
    found = identity_of({**{one.name: LocalFile(directory / one.name) for one in small}, **weights})
    _remember(kept, found.encode())
    log.info("%s: %s, from samples of its weights in %.1f s", place, found, time.monotonic() - started)
    return found


@contextmanager
def told_as(name: str, directory: Path | str | None) -> Iterator[None]:
    """Errors name the model's place, not the directory of this machine that has its files; without one they stay."""
    try:
        yield
    except ModelError as error:
        if not directory:
            raise
        said = str(error).replace(f"model directory {directory}", name).replace(str(directory), name)
        raise ModelError(said) from error
