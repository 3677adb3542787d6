"""Where a checkpoint is, whether its files are whole, and what makes two of them the same."""

import hashlib
import json
import math
import os
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from batch_rerank.errors import ModelError

WEIGHTLESS_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.py")
SAMPLE = 512
"""Bytes read at each place of a tensor."""

LONGEST_HEADER = 100_000_000
"""Bytes; safetensors itself reads none that is longer."""

MIRROR, UNFINISHED = "_MIRROR", "_MIRROR.unfinished"
"""Beside a copy that `batch-rerank fetch` makes: the first one when it is whole, the other until then."""

HEADER = ".header"
"""Ends the name of a file that is the first bytes of a safetensors file, where the file itself is elsewhere."""


class Readable(Protocol):
    """A file of a checkpoint, wherever it lies."""

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    def read(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """What lies from each start to its stop."""
        ...


@dataclass(frozen=True)
class LocalFile:
    """A file on this machine."""

    path: Path

    @property
    def size(self) -> int:
        """Bytes."""
        return self.path.stat().st_size

    def read(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """What lies from each start to its stop."""
        found = []
        with self.path.open("rb", buffering=0) as file:
            for start, stop in ranges:
                file.seek(start)
                found.append(file.read(stop - start))
        return found


@dataclass(frozen=True)
class Stored:
    """A checkpoint of a store, as found by whoever can reach it. directory: on this machine, with its small files and
    the headers of its weights; identity: as `identify` would say it of the whole; known_as: the hub id that it is a
    copy of, empty where nothing says so; files: name, bytes, version (an etag, mostly) and sha256 (empty where unknown)
    of all that it consists of.
    """

    directory: Path
    identity: str
    known_as: str
    files: tuple[tuple[str, int, str, str], ...]


def locate(name: str, revision: str | None, weights: bool = True, pickled: bool = False) -> tuple[Path, str | None]:
    """The checkpoint's directory and, for a hub id, its commit. Downloads from the hub what is not cached; without
    `weights` the small files only, so that a CPU node does not fetch 16 GB to tokenise."""
    directory = Path(name).expanduser()
    if os.path.isdir(directory):
        if (directory / UNFINISHED).exists() and not (directory / MIRROR).exists():
            raise ModelError(
                f"model directory {directory}: a copy that is not finished; expected {MIRROR}; wait for "
                "`batch-rerank fetch`, or run it again"
            )
        return directory.resolve(), None
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelError(
            f"model.name {name!r}: no such directory on this machine, and not a hub id (owner/name); "
            "on a cluster the directory must exist at the same path on every node"
        )
    from huggingface_hub import snapshot_download

    patterns = [*WEIGHTLESS_FILES, *(["*.bin" if pickled else "*.safetensors"] if weights else [])]
    try:
        path = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub client raises OSError, ValueError and its own errors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"model.name {name!r} is no directory here and could not be fetched from the hub: {reason}; "
            "check the id, the network and HF_TOKEN, or give a checkpoint directory"
        ) from error
    return path, path.name


def copied_from(directory: Path) -> str:
    """The hub id that a directory is a copy of, as `batch-rerank fetch` has noted it: its template goes by that. Empty
    where nothing says so."""
    if not (directory / MIRROR).exists():
        return ""
    source = read_json(directory / MIRROR).get("source")
    return source if isinstance(source, str) else ""


def identify(directory: Path, commit: str | None) -> str:
    """What makes two checkpoints the same: the hub commit, or a sha256 over a directory's small files, and over the
    size, the header and samples of every tensor of every safetensors file (of pickles, which have no header: all).

    A sample is a tensor's first and last 512 bytes and 512 bytes at 6 places between, which are the same in every
    process; a tensor of up to 4 KiB counts whole. So another training, a merge, or a tensor put in for another is
    another identity. What it misses: a change of fewer bytes than lie between two samples, such as one row of an
    embedding. An actor recomputes it in well under a second: 400 tensors are 1.6 MB to read, whatever their size.
    """
    if commit is not None:
        return f"commit:{commit}"
    return identity_of({name: LocalFile(directory / name) for name in files_of(directory)})


def files_of(directory: Path) -> list[str]:
    """The files that a checkpoint consists of, by their names in its directory: small ones at any depth, and weights,
    which are pickles only where there are no others."""
    small = {path for pattern in WEIGHTLESS_FILES for path in directory.rglob(pattern)}
    weights = set(directory.glob("*.safetensors")) or set(directory.glob("*.bin"))
    return [path.relative_to(directory).as_posix() for path in sorted(small | weights)]


def identity_of(files: Mapping[str, Readable]) -> str:
    """The identity of the files of a checkpoint, by their names in its directory."""
    digest = hashlib.sha256()
    for name in sorted(files, key=PurePosixPath):
        file = files[name]
        digest.update(f"{name}:{file.size}:".encode())
        digest.update(_sampled(name, file) if name.endswith(".safetensors") else _whole(file))
    return f"sha256:{digest.hexdigest()}"


def _whole(file: Readable) -> bytes:
    digest = hashlib.sha256()
    for start in range(0, file.size, 2**24):
        digest.update(*file.read([(start, min(file.size, start + 2**24))]))
    return digest.digest()


def _sampled(name: str, file: Readable) -> bytes:
    header = header_of(name, file)
    digest = hashlib.sha256(header)
    tensors = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
    ranges = []
    for tensor, entry in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        first = 8 + len(header) + begin
        ranges += [(first + offset, first + offset + length) for offset, length in samples(tensor, end - begin)]
    for data in file.read(ranges):
        digest.update(data)
    return digest.digest()


def samples(name: str, size: int) -> list[tuple[int, int]]:
    """(offset, length) in bytes of what is read of a tensor: its ends, and 6 places seeded by its name, one in each
    sixth of what is between, so that no stretch of a third of it is passed over."""
    if size <= 8 * SAMPLE:
        return [(0, size)]
    seeds = hashlib.sha256(name.encode()).digest()
    step = (size - 2 * SAMPLE) // 6
    between = [
        SAMPLE + part * step + int.from_bytes(seeds[4 * part : 4 * part + 4], "little") % (step - SAMPLE + 1)
        for part in range(6)
    ]
    return [(offset, SAMPLE) for offset in (0, *between, size - SAMPLE)]


def refuse_adapter(directory: Path) -> None:
    """Raise ModelError for weights to be added to another model's: transformers may leave them out in silence."""
    if (directory / "adapter_config.json").exists():
        raise ModelError(
            f"model directory {directory}: found adapter_config.json; expected a whole model; merge the adapter into "
            "its base model (peft's merge_and_unload) and save that"
        )


def check_weights(directory: Path, pickled: bool = False) -> None:
    """Raise ModelError where the weights are absent, cut short, or pickled and not `pickled`. Reads headers only."""
    names = {path.name for path in directory.glob("*.safetensors")} | {path.name for path in directory.glob("*.bin")}
    check_listed(f"model directory {directory}", directory, names, pickled)
    for name in sorted(names):
        if name.endswith(".safetensors"):
            safetensors_header(directory / name)


def check_listed(where: str, directory: Path, names: Collection[str], pickled: bool = False) -> None:
    """The same by the names of the files alone; `directory` has the index, if there is one."""
    weights = {name for name in names if name.endswith(".safetensors")}
    bins = sorted(name for name in names if name.endswith(".bin"))
    if pickled and bins:
        return
    if not weights:
        found = f"only pickled weights ({', '.join(bins)}), which can run code" if bins else "no weights"
        raise ModelError(
            f"{where}: found {found}; expected *.safetensors; "
            "fetch the complete checkpoint, convert it to safetensors, or set model.allow_pickle: true"
        )
    index = directory / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        named = (
            set(map(str, weight_map.values())) if isinstance(weight_map, dict) else {f"no weight_map: {weight_map!r}"}
        )
        if absent := sorted(named - weights):
            raise ModelError(f"{where}: {index.name} names {absent}, which are not there")


def safetensors_header(path: Path) -> bytes:
    """The JSON header of a safetensors file. Raises ModelError unless the file has the size that its header says."""
    return header_of(str(path), LocalFile(path))


def header_of(where: str, file: Readable) -> bytes:
    """The same of a file anywhere."""
    size = file.size
    (start,) = file.read([(0, min(8, size))])
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
    (header,) = file.read([(8, 8 + length)]) if length <= min(size - 8, LONGEST_HEADER) else (b"",)
    try:
        tensors: dict[str, Any] = json.loads(header)
        spans = [entry["data_offsets"] for key, entry in tensors.items() if key != "__metadata__"]
        ordered = all(0 <= begin <= end for begin, end in spans)
        expected = 8 + length + max((end for _, end in spans), default=0) if ordered else -1
    except (ValueError, KeyError, TypeError, AttributeError):
        expected = -1
    if expected != size:
        wanted = f"{expected:,} bytes by its header" if expected >= 0 else "a complete safetensors header"
        raise ModelError(
            f"{where}: found {size:,} bytes, expected {wanted}; the file is cut short or damaged, copy it again"
        )
    return header


def matrix_parameters(directory: Path) -> int:
    """Elements of the matrices that a token is multiplied with, as the headers say: all but embeddings, which are
    looked up. 0 where there are neither safetensors nor their headers."""
    count = 0
    headers = {path.name: path for path in directory.glob(f"*.safetensors{HEADER}")}
    found = {name.removesuffix(HEADER): path.read_bytes() for name, path in headers.items()}
    found |= {path.name: safetensors_header(path) for path in directory.glob("*.safetensors")}
    for header in found.values():
        for name, entry in json.loads(header).items():
            if name != "__metadata__" and len(entry["shape"]) == 2 and "embed" not in name:
                count += math.prod(entry["shape"])
    return count


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; anything else as {"items": …}. Raises ModelError where the file is absent or not JSON."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"model directory {path.parent}: no {path.name}; expected a transformers checkpoint") from None
    except ValueError as error:
        raise ModelError(f"{path}: not JSON ({error}); the file is damaged, copy it again") from None
    return value if isinstance(value, dict) else {"items": value}
