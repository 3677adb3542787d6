"""Units' scores, read back from where they are: a file of their own, or a row group of a file below `_scores/`."""

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batch_rerank.calls import ahead
from batch_rerank.errors import StorageError, lines_of
from batch_rerank.schema import QUERY_HASH, TEXT_HASH
from batch_rerank.store.kept import PAIR, QUERY, from_bytes, pairs_name, queries_name
from batch_rerank.store.manifest import Manifest, sha256
from batch_rerank.store.names import work_name
from batch_rerank.store.plans import Unit

UInt64 = npt.NDArray[np.uint64]
Place = tuple[str, int]
"""A file below `_scores/`, and a row group of it."""


class ScoreFiles:
    """The score files of an output. places: of the units that are below `_scores/`; checksums: of the others' files."""

    def __init__(self, manifest: Manifest, places: Mapping[str, Place], checksums: Mapping[str, str]) -> None:
        self._manifest, self._places, self._checksums = manifest, places, checksums
        self._opened: tuple[str, pq.ParquetFile] | None = None
        self._hashes: tuple[UInt64, UInt64] | None = None
        self._firsts: list[int] = []

    def read(
        self, units: Iterable[Unit], hashed: bool = False, wanted: Sequence[str] = ()
    ) -> Iterator[tuple[Unit, pa.Table]]:
        """Units with their rows; with the hashes, if there are any, where `hashed`, or where a file lacks one of the
        columns `wanted`. Some are held at a time. Raises StorageError where a file is not what its receipt says."""
        units = list(units)
        alone = ahead(partial(self._alone, unit.id) for unit in units if unit.id not in self._places)
        for unit in units:
            place = self._places.get(unit.id)
            location = self._manifest.root / (work_name(unit.id) if place is None else place[0])
            try:
                rows = self._gathered(place, hashed, wanted) if place else _rows(next(alone), hashed, wanted)
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

    def _gathered(self, place: Place, hashed: bool, wanted: Sequence[str]) -> pa.Table:
        name, group = place
        if self._opened is None or self._opened[0] != name:
            receipt = self._manifest.read_scores_receipt(name)
            data = _checked(self._manifest, name, self._manifest.read(name), receipt.sha256 if receipt else None)
            self._opened = (name, pq.ParquetFile(io.BytesIO(data)))
            self._hashes, self._firsts = None, []
        file = self._opened[1]
        names = _columns(file)
        rows = file.read_row_group(group, columns=names)
        if not hashed and set(wanted) <= set(names):
            return rows
        if not self._firsts:
            self._hashes, self._firsts = self._kept(name), _firsts(file)
        if self._hashes is None:
            return rows
        scored, first = pc.is_valid(rows["score"]).to_numpy(), self._firsts[group]
        for column, hashes in zip((QUERY_HASH, TEXT_HASH), self._hashes, strict=True):
            full = np.zeros(len(rows), np.uint64)
            full[scored] = hashes[first : first + int(scored.sum())]
            rows = rows.append_column(column, pa.array(full, mask=~scored))
        return rows

    def _kept(self, name: str) -> tuple[UInt64, UInt64] | None:
        """uint64[n] each, the hashes of the queries and of the texts of a file's scored pairs, in its order; None where
        the file has none beside it."""
        receipt = self._manifest.read_scores_receipt(name)
        if receipt is None or not receipt.queries_sha256:
            return None
        told, places = (receipt.queries_sha256, receipt.pairs_sha256), (queries_name(name), pairs_name(name))
        queries, pairs = (
            from_bytes(_checked(self._manifest, one, self._manifest.read(one), checksum), kind)
            for one, checksum, kind in zip(places, told, (QUERY, PAIR), strict=True)
        )
        queries = queries[np.argsort(queries["first"])]
        return np.repeat(queries["query_hash"], queries["pairs"]), pairs["text_hash"]


def _checked(manifest: Manifest, name: str, data: bytes, checksum: str | None) -> bytes:
    if sha256(data) != checksum:
        raise StorageError(
            f"{manifest.root / name}: not what its receipt says (another checksum); see batch-rerank verify --repair"
        )
    return data


def _rows(data: bytes, hashed: bool, wanted: Sequence[str]) -> pa.Table:
    file = pq.ParquetFile(io.BytesIO(data))
    names = _columns(file)
    return file.read(columns=None if hashed or not set(wanted) <= set(names) else names)


def _firsts(file: pq.ParquetFile) -> list[int]:
    """How many pairs before each row group have a score."""
    column, counts = file.schema_arrow.names.index("score"), []
    for group in range(file.num_row_groups):
        told = file.metadata.row_group(group).column(column).statistics
        if told is None or not told.has_null_count:  # not as we write it
            scores = file.read_row_group(group, columns=["score"])["score"]
            counts.append(len(scores) - scores.null_count)
        else:
            counts.append(int(told.num_values))
    return list(accumulate(counts, initial=0))


def _columns(file: pq.ParquetFile) -> list[str]:
    return [name for name in file.schema_arrow.names if name not in (QUERY_HASH, TEXT_HASH)]
