"""What a file below `_scores/` keeps for later jobs, in two NumPy files beside it: every score by what was scored.

`<number>.pairs.npy`, PAIR, a record for each pair that has a score, in the order of the file; `<number>.queries.npy`,
QUERY, where the pairs of a query stand in it, sorted by hash. Records are of fixed size, so those of one query are read
without the others, and have a checksum of their own, so they are believed or not without the others.
"""

import io
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

PAIR = np.dtype(
    [("text_hash", "<u8"), ("score", "<f4"), ("n_tokens", "<i4"), ("chunk_offset", "<i4"), ("truncated", "?")]
)
"""chunk_offset: -1 where documents are not read in chunks. The query's hash is in QUERY."""

QUERY = np.dtype([("query_hash", "<u8"), ("first", "<u4"), ("pairs", "<u4"), ("crc", "<u4")])
"""first: which record of the file is the query's first; pairs: how many it has; crc: zlib.crc32 of their bytes."""

Records = npt.NDArray[Any]


def queries_name(name: str) -> str:
    """The index of `_scores/00003.parquet`."""
    return f"{name.removesuffix('.parquet')}.queries.npy"


def pairs_name(name: str) -> str:
    """What it leads into."""
    return f"{name.removesuffix('.parquet')}.pairs.npy"


def index_of(query_hash: npt.NDArray[np.uint64], pairs: Records) -> Records:
    """QUERY[n] of PAIR records whose queries have these hashes; a query whose pairs stand in two places has two."""
    starts = np.flatnonzero(np.append(True, query_hash[1:] != query_hash[:-1])) if len(query_hash) else np.empty(0, int)
    made = np.zeros(len(starts), QUERY)
    made["query_hash"], made["first"] = query_hash[starts], starts
    made["pairs"] = np.diff(np.append(starts, len(query_hash)))
    for entry in made:
        entry["crc"] = checksum(pairs[entry["first"] : entry["first"] + entry["pairs"]].tobytes())
    return made[np.argsort(made["query_hash"], kind="stable")]


def checksum(data: bytes) -> int:
    """Of the records of a query."""
    return zlib.crc32(data)


def to_bytes(records: Records) -> bytes:
    """A file of records."""
    sink = io.BytesIO()
    np.save(sink, records, allow_pickle=False)
    return sink.getvalue()


def from_bytes(data: bytes, kind: np.dtype[Any]) -> Records:
    """The records of a file. Raises ValueError where it has others, or is damaged."""
    try:
        found: Records = np.load(io.BytesIO(data), allow_pickle=False)
    except (EOFError, OSError) as error:
        raise ValueError(str(error)) from None
    if found.dtype != kind or found.ndim != 1:
        raise ValueError(f"records of {found.dtype}, expected {kind}")
    return found
