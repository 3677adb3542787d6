"""Rolling receipts up, so that a million units are a thousand objects: the driver's work, under its lease."""

from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

from batch_rerank.store.filesystem import storage_errors
from batch_rerank.store.lease import Lease
from batch_rerank.store.manifest import Manifest
from batch_rerank.store.names import ROLL, Files, receipt_name
from batch_rerank.store.receipts import Receipt, roll

ROLLED = 1000
"""Receipts of a roll."""

FEW = 32
"""Receipts that stay as they are at the end of a run."""

REMOVALS = 16
"""Requests at once."""


class Rolls:
    """Gathers the receipts of a run, and those that earlier runs have left alone."""

    def __init__(self, manifest: Manifest, lease: Lease, done: Collection[str], loose: Mapping[str, bytes]) -> None:
        """done: units that are; loose: receipts that are alone, of these and of others."""
        self._manifest, self._lease = manifest, lease
        self._pending = {unit: body for unit, body in loose.items() if unit in done}

    def add(self, receipt: Receipt) -> None:
        """One more, which is on storage. Raises StorageError, and ConflictError where the lease is lost."""
        self._pending[receipt.unit] = receipt.to_json()
        if len(self._pending) >= ROLLED:
            self._roll()

    def finish(self) -> None:
        """Roll the rest up, unless it is little. Raises as `add`."""
        if len(self._pending) > FEW:
            self._roll()

    def _roll(self) -> None:
        self._lease.check()
        files = self._manifest.list_files("_manifest/receipts")
        write_roll(self._manifest, self._pending.values(), files)
        names = [receipt_name(unit) for unit in self._pending]
        # of what the listing showed: a receipt that a successor has written since stays
        with ThreadPoolExecutor(REMOVALS) as pool:
            list(pool.map(lambda name: self._manifest.remove_seen(name, files), names))
        self._pending = {}


def write_roll(manifest: Manifest, bodies: Iterable[bytes], files: Files) -> None:
    """Write receipts as a roll, under a name that none has. Raises StorageError."""
    numbers = [int(name.rsplit("-", 1)[1].removesuffix(".jsonl")) for name in files.matching(ROLL)]
    number, data = max(numbers, default=-1) + 1, roll(bodies)
    while True:
        location = manifest.root / f"_manifest/receipts/rolled-{number:05d}.jsonl"
        with storage_errors(location):
            if location.create_exclusive(data):
                return
        number += 1
