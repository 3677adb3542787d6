"""What lies where in an exchange: of each piece of the sources a note, whose portions are columns and never objects.

20,000 shards that 1,600 pieces serve are 32 million portions, 28 bytes each in the driver.
"""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Portions = npt.NDArray[np.void]
"""Structured, of the dtype PORTION."""

PORTION = np.dtype([("piece", "<i4"), ("number", "<i4"), ("shard", "<i4"), ("start", "<i8"), ("stop", "<i8")])
"""Bytes `start` to `stop` of the piece's file `number`, which are of one shard."""

WRITTEN = ("number", "shard", "start", "stop")
VERSION = b"2"
"""1 was JSON, in files of another name."""


def data_name(piece: int, number: int) -> str:
    """A file of a piece, e.g. 00012-0003.arrows."""
    return f"{piece:05d}-{number:04d}.arrows"


@dataclass(frozen=True)
class Note:
    """What the files of a piece hold: PORTION[n] by file and shard, in each file from its first byte to its last."""

    piece: int
    portions: Portions
    rows: int
    retries: int = 0

    @property
    def name(self) -> str:
        """Of its file."""
        return note_name(self.piece)

    def to_bytes(self) -> bytes:
        """An Arrow stream; what is no column is in its schema."""
        columns: dict[str, Any] = {name: self.portions[name] for name in WRITTEN}
        told = {"version": VERSION, "piece": str(self.piece), "rows": str(self.rows), "retries": str(self.retries)}
        table = pa.table(columns).replace_schema_metadata(told)
        sink = io.BytesIO()
        with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as stream:
            stream.write_table(table)
        return sink.getvalue()

    @staticmethod
    def from_bytes(data: bytes, piece: int, shards: int) -> "Note | None":
        """None where the content is no note of this piece, or of a stage with other shards."""
        try:
            table = pa.ipc.open_stream(data).read_all()
            table.validate(full=True)
            told = table.schema.metadata or {}
            if told.get(b"version") != VERSION or int(told[b"piece"]) != piece or table.column_names != list(WRITTEN):
                return None
            portions = np.zeros(len(table), PORTION)
            portions["piece"] = piece
            for name in WRITTEN:
                if table[name].type != pa.from_numpy_dtype(PORTION[name]) or table[name].null_count:
                    return None
                portions[name] = table[name].to_numpy()
            note = Note(piece, portions, int(told[b"rows"]), int(told[b"retries"]))
        except (pa.ArrowException, OSError, ValueError, KeyError):
            return None
        return note if note.rows >= 0 and note.retries >= 0 and _is_whole(portions, shards) else None

    def sizes(self) -> list[int]:
        """Bytes of each of its files."""
        numbers = self.portions["number"]
        ends: list[int] = self.portions["stop"][np.flatnonzero(np.diff(numbers, append=-1))].tolist()
        return ends


def note_name(piece: int) -> str:
    """The note of a piece."""
    return f"{piece:05d}.note"


def _is_whole(portions: Portions, shards: int) -> bool:
    """Whether the portions fill files 0, 1, … without a gap, in each by ascending shard."""
    if not len(portions):
        return False
    number, shard = portions["number"].astype(np.int64), portions["shard"].astype(np.int64)
    begins = np.diff(number, prepend=-1)
    before = np.concatenate([[0], portions["stop"][:-1]])
    ascends = (begins == 1) | (np.diff(shard, prepend=-1) > 0)
    follows = portions["start"] == np.where(begins == 1, 0, before)
    steps = (number >= 0) & ((begins == 0) | (begins == 1))
    known = (shard >= 0) & (shard < shards)
    return bool((steps & known & ascends & follows & (portions["stop"] > portions["start"])).all())


def of_shards(found: list[Portions], first: int, last: int) -> Portions:
    """The portions of shards `first` to `last`, by shard, in the order of pieces and their files."""
    here = [one[(one["shard"] >= first) & (one["shard"] < last)] for one in found]
    portions = np.concatenate(here) if here else np.zeros(0, PORTION)
    order = np.lexsort((portions["number"], portions["piece"], portions["shard"]))
    return portions[order]
