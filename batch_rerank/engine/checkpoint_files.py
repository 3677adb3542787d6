"""Where a checkpoint is, whether its files are whole, and what makes two of them the same."""

import hashlib
import json
import math
import struct
from pathlib import Path
from typing import Any

from batch_rerank.errors import ModelError

WEIGHTLESS_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.py")
SAMPLE = 512
"""Bytes read at each place of a tensor."""


def locate(name: str, revision: str | None, weights: bool = True, pickled: bool = False) -> tuple[Path, str | None]:
    """The checkpoint's directory and, for a hub id, its commit. Downloads from the hub what is not cached; without
    `weights` the small files only, so that a CPU node does not fetch 16 GB to tokenise."""
    directory = Path(name).expanduser()
    if directory.is_dir():
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
    digest = hashlib.sha256()
    small = {path for pattern in WEIGHTLESS_FILES for path in directory.rglob(pattern)}
    weights = set(directory.glob("*.safetensors")) or set(directory.glob("*.bin"))
    for path in sorted(small | weights):
        sample = _sampled if path.suffix == ".safetensors" else _whole
        digest.update(f"{path.relative_to(directory)}:{path.stat().st_size}:".encode())
        digest.update(sample(path))
    return f"sha256:{digest.hexdigest()}"


def _whole(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _sampled(path: Path) -> bytes:
    header = safetensors_header(path)
    digest = hashlib.sha256(header)
    tensors = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
    with path.open("rb", buffering=0) as file:
        for name, entry in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            for offset, length in samples(name, end - begin):
                file.seek(8 + len(header) + begin + offset)
                digest.update(file.read(length))
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
    weights = sorted(directory.glob("*.safetensors"))
    if pickled and any(directory.glob("*.bin")):
        return
    if not weights:
        bins = sorted(path.name for path in directory.glob("*.bin"))
        found = f"only pickled weights ({', '.join(bins)}), which can run code" if bins else "no weights"
        raise ModelError(
            f"model directory {directory}: found {found}; expected *.safetensors; "
            "fetch the complete checkpoint, convert it to safetensors, or set model.allow_pickle: true"
        )
    index = directory / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        named = set(weight_map.values()) if isinstance(weight_map, dict) else {f"no weight_map: {weight_map!r}"}
        absent = sorted(named - {path.name for path in weights})
        if absent:
            raise ModelError(f"model directory {directory}: {index.name} names {absent}, which are not there")
    for path in weights:
        safetensors_header(path)


def safetensors_header(path: Path) -> bytes:
    """The JSON header of a safetensors file. Raises ModelError unless the file has the size that its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        header = file.read(length) if 8 + length <= size else b""
    try:
        tensors: dict[str, Any] = json.loads(header)
        ends = [entry["data_offsets"][1] for key, entry in tensors.items() if key != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        expected = -1
    if expected != size:
        wanted = f"{expected:,} bytes by its header" if expected >= 0 else "a complete safetensors header"
        raise ModelError(
            f"{path}: found {size:,} bytes, expected {wanted}; the file is cut short or damaged, copy it again"
        )
    return header


def matrix_parameters(directory: Path) -> int:
    """Elements of the matrices that a token is multiplied with, as the headers say: all but embeddings, which are
    looked up. 0 where there are no safetensors."""
    count = 0
    for path in directory.glob("*.safetensors"):
        for name, entry in json.loads(safetensors_header(path)).items():
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
