"""Where a checkpoint is, whether its files are whole, and what makes two of them the same."""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from batch_rerank.errors import ModelError

WEIGHTLESS_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.py")


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
    """What makes two checkpoints the same: the hub commit, or a sha256 over a directory's small files, its pickles, and
    the header and size of every safetensors. Reads no other weights, so an actor recomputes it in well under a second.
    """
    if commit is not None:
        return f"commit:{commit}"
    digest = hashlib.sha256()
    small = {path for pattern in (*WEIGHTLESS_FILES, "*.bin") for path in directory.rglob(pattern)}
    for path in sorted(small | set(directory.glob("*.safetensors"))):
        content = path.read_bytes() if path in small else safetensors_header(path)
        digest.update(f"{path.relative_to(directory)}:{path.stat().st_size}:".encode())
        digest.update(hashlib.sha256(content).digest())
    return f"sha256:{digest.hexdigest()}"


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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; anything else as {"items": …}. Raises ModelError where the file is absent or not JSON."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"model directory {path.parent}: no {path.name}; expected a transformers checkpoint") from None
    except ValueError as error:
        raise ModelError(f"{path}: not JSON ({error}); the file is damaged, copy it again") from None
    return value if isinstance(value, dict) else {"items": value}
