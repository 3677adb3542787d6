"""Units' scores, read back from where they are: a file of their own, or a row group of a file below `_scores/`."""

import io
from collections.abc import Iterable, Iterator, Mapping
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq

from batch_rerank.calls import ahead
from batch_rerank.errors import StorageError
from batch_rerank.schema import QUERY_HASH, TEXT_HASH
from batch_rerank.store.manifest import Manifest
from batch_rerank.store.names import work_name
from batch_rerank.store.plans import Unit

Place = tuple[str, int]
"""A file below `_scores/`, and a row group of it."""


class ScoreFiles:
    """The score files of an output. places: of the units that are below `_scores/`."""

    def __init__(self, manifest: Manifest, places: Mapping[str, Place]) -> None:
        self._manifest, self._places = manifest, places
        self._opened: tuple[str, pq.ParquetFile] | None = None

    def read(self, units: Iterable[Unit]) -> Iterator[tuple[Unit, pa.Table]]:
        """Units with their rows, without the hashes; some are held at a time. Raises StorageError."""
        units = list(units)
        alone = ahead(partial(self._manifest.read, work_name(unit.id)) for unit in units if unit.id not in self._places)
        for unit in units:
            place = self._places.get(unit.id)
            location = self._manifest.root / (work_name(unit.id) if place is None else place[0])
            try:
                rows = self._gathered(place) if place else _rows(next(alone))
            except (pa.ArrowException, OSError) as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise StorageError(
                    f"{location}: the scores of unit {unit.id} cannot be read ({reason}); "
                    "see batch-rerank verify --repair"
                ) from None
            yield unit, rows

    def _gathered(self, place: Place) -> pa.Table:
        name, group = place
        if self._opened is None or self._opened[0] != name:
            self._opened = (name, pq.ParquetFile((self._manifest.root / name).open(), pre_buffer=True))
        file = self._opened[1]
        return file.read_row_group(group, columns=_columns(file))


def _rows(data: bytes) -> pa.Table:
    file = pq.ParquetFile(io.BytesIO(data))
    return file.read(columns=_columns(file))


def _columns(file: pq.ParquetFile) -> list[str]:
    return [name for name in file.schema_arrow.names if name not in (QUERY_HASH, TEXT_HASH)]
