"""Units' scores, read back from where they are: a file of their own, or a row group of a file below `_scores/`."""

import io
from collections.abc import Iterable, Iterator, Mapping
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq

from batch_rerank.calls import ahead
from batch_rerank.errors import StorageError, lines_of
from batch_rerank.schema import QUERY_HASH, TEXT_HASH
from batch_rerank.store.manifest import Manifest, sha256
from batch_rerank.store.names import work_name
from batch_rerank.store.plans import Unit

Place = tuple[str, int]
"""A file below `_scores/`, and a row group of it."""


class ScoreFiles:
    """The score files of an output. places: of the units that are below `_scores/`; checksums: of the others' files."""

    def __init__(self, manifest: Manifest, places: Mapping[str, Place], checksums: Mapping[str, str]) -> None:
        self._manifest, self._places, self._checksums = manifest, places, checksums
        self._opened: tuple[str, pq.ParquetFile] | None = None

    def read(self, units: Iterable[Unit]) -> Iterator[tuple[Unit, pa.Table]]:
        """Units with their rows, without the hashes; some are held at a time. Raises StorageError where a file is not
        what its receipt says."""
        units = list(units)
        alone = ahead(partial(self._alone, unit.id) for unit in units if unit.id not in self._places)
        for unit in units:
            place = self._places.get(unit.id)
            location = self._manifest.root / (work_name(unit.id) if place is None else place[0])
            try:
                rows = self._gathered(place) if place else _rows(next(alone))
            except (pa.ArrowException, OSError) as error:
                reason = lines_of(error)[0]
                raise StorageError(
                    f"{location}: the scores of unit {unit.id} cannot be read ({reason}); "
                    "see batch-rerank verify --repair"
                ) from None
            yield unit, rows

    def _alone(self, unit_id: str) -> bytes:
        name = work_name(unit_id)
        return _checked(self._manifest, name, self._manifest.read(name), self._checksums[unit_id])

    def _gathered(self, place: Place) -> pa.Table:
        name, group = place
        if self._opened is None or self._opened[0] != name:
            receipt = self._manifest.read_scores_receipt(name)
            data = _checked(self._manifest, name, self._manifest.read(name), receipt.sha256 if receipt else None)
            self._opened = (name, pq.ParquetFile(io.BytesIO(data)))
        file = self._opened[1]
        return file.read_row_group(group, columns=_columns(file))


def _checked(manifest: Manifest, name: str, data: bytes, checksum: str | None) -> bytes:
    if sha256(data) != checksum:
        raise StorageError(
            f"{manifest.root / name}: not what its receipt says (another checksum); see batch-rerank verify --repair"
        )
    return data


def _rows(data: bytes) -> pa.Table:
    file = pq.ParquetFile(io.BytesIO(data))
    return file.read(columns=_columns(file))


def _columns(file: pq.ParquetFile) -> list[str]:
    return [name for name in file.schema_arrow.names if name not in (QUERY_HASH, TEXT_HASH)]
