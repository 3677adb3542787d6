"""64-bit hashes of what a score depends on besides its model: (instruction, query), and the document's text.

blake2b of the UTF-8 bytes, 8 of them, little endian. An instruction stands before its query with its length, so that
no other division of the same bytes has the same hash; a query that takes the job's own instruction has none.
"""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

UInt64 = npt.NDArray[np.uint64]


def query_hashes(queries: Iterable[tuple[str, str | None]]) -> UInt64:
    """uint64[n] of queries, each with its own instruction."""
    return _hashes([_query_bytes(query, instruction) for query, instruction in queries])


def first_text(values: pa.ChunkedArray) -> str | None:
    """A query's instruction: flat rows carry it on every row, some of them null."""
    present: Sequence[str] = values.drop_null().slice(0, 1).to_pylist()
    return present[0] if present else None


def text_hashes(texts: pa.ChunkedArray) -> UInt64:
    """uint64[n] of texts without nulls, as dictionaries: each distinct one is hashed once."""
    found = [np.empty(0, np.uint64)]
    for chunk in texts.chunks:
        values = _hashes([text.encode() for text in chunk.dictionary.to_pylist()])
        found.append(values[chunk.indices.to_numpy()])
    return np.concatenate(found)


def _query_bytes(query: str, instruction: str | None) -> bytes:
    if instruction is None:
        return b"-" + query.encode()
    said = instruction.encode()
    return b"%d:" % len(said) + said + query.encode()


def _hashes(contents: Sequence[bytes]) -> UInt64:
    digests = b"".join(hashlib.blake2b(content, digest_size=8).digest() for content in contents)
    return np.frombuffer(digests, "<u8").astype(np.uint64)
