"""`_manifest/distrusted.json`: earlier outputs whose scores have failed this job's audit.

Written before the job ends, so that no later run builds on what was taken from them, with or without `reuse`.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass

from batch_rerank.errors import StorageError
from batch_rerank.store.filesystem import storage_errors
from batch_rerank.store.manifest import Manifest
from batch_rerank.store.records import Line, parse

DISTRUSTED = "_manifest/distrusted.json"


@dataclass(frozen=True)
class _Distrusted:
    outputs: list[Line]


def distrust(manifest: Manifest, outputs: Iterable[str]) -> None:
    """Add outputs to those that are not believed. Raises StorageError."""
    location = manifest.root / DISTRUSTED
    with storage_errors(location):
        location.write_bytes(json.dumps({"outputs": sorted({*outputs, *read_distrusted(manifest)})}).encode())


def read_distrusted(manifest: Manifest) -> frozenset[str]:
    """The outputs that are not believed. Raises StorageError, also where the record is damaged."""
    location = manifest.root / DISTRUSTED
    with storage_errors(location):
        try:
            return frozenset(parse(_Distrusted, location.read_bytes()).outputs)
        except FileNotFoundError:
            return frozenset()
        except ValueError as error:
            raise StorageError(f"{location}: not what we write ({error}); use a new output.path") from None
