"""`_manifest/actual.json`: what a run took beside what was planned, and the rate that it found."""

import json
import logging
from typing import Any

from batch_rerank.errors import BatchRerankError
from batch_rerank.store.filesystem import storage_errors
from batch_rerank.store.manifest import Manifest

log = logging.getLogger("batch_rerank")

ACTUAL = "_manifest/actual.json"


def write_held(manifest: Manifest, value: dict[str, Any]) -> None:
    """Write it beside the output, which is finished by then: a failure is said and costs nothing else."""
    location = manifest.root / ACTUAL
    try:
        with storage_errors(location):
            location.write_bytes(json.dumps(value, indent=1).encode())
    except BatchRerankError as error:
        log.warning("planned against actual could not be written: %s", error)


def read_held(manifest: Manifest) -> dict[str, Any] | None:
    """What the last run has written; None where there is nothing, or nothing that has the shape of it."""
    location = manifest.root / ACTUAL
    try:
        with storage_errors(location):
            try:
                value = json.loads(location.read_bytes())
            except (FileNotFoundError, ValueError):
                return None
    except BatchRerankError as error:
        log.warning("%s", error)
        return None
    sides = isinstance(value, dict) and all(isinstance(value.get(side), dict) for side in ("planned", "actual"))
    return value if sides and isinstance(value.get("reasons"), list) else None
