"""64-bit hashes of what a score depends on besides its model: (instruction, query), and the document's text.

blake2b of the UTF-8 bytes, 8 of them, little endian. An instruction stands before its query with its length, so that
no other division of the same bytes has the same hash; a query that takes the job's own instruction has none.
"""

import hashlib
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batch_rerank.errors import InputError
from batch_rerank.schema import QUERY_HASH, TEXT_HASH

UInt64 = npt.NDArray[np.uint64]


def query_hashes(queries: Iterable[tuple[str, str | None]]) -> UInt64:
    """uint64[n] of queries, each with its own instruction."""
    return _hashes([_query_bytes(query, instruction) for query, instruction in queries])


def first_text(values: pa.ChunkedArray) -> str | None:
    """A query's instruction: flat rows carry it on every row, some of them null."""
    present: Sequence[str] = values.drop_null().slice(0, 1).to_pylist()
    return present[0] if present else None


def asked_hashes(rows: pa.Table, with_instructions: bool) -> UInt64:
    """uint64[n]: of the query of each canonical row."""
    asked = np.zeros(len(rows), np.uint64)
    starts = np.flatnonzero(np.diff(rows["query_index"].to_numpy(), prepend=-1)).tolist()
    bounds, instructions = list(pairwise([*starts, len(rows)])), rows["instruction"]
    said = [first_text(instructions[start:stop]) if with_instructions else None for start, stop in bounds]
    queries = [rows["query"][start].as_py() or "" for start in starts]
    for (start, stop), value in zip(bounds, query_hashes(zip(queries, said, strict=True)), strict=True):
        asked[start:stop] = value
    return asked


def refuse_other_texts(scored: pa.Table, asked: UInt64, texts: pa.ChunkedArray, where: str, advice: str) -> None:
    """Raise InputError for a row that has another query or text than was scored: a file's footer, by which its version
    is known, may be the same with a letter changed. scored: `query_id`, `doc_id` and, where they are known, the hashes
    of what was scored; asked (uint64[n], of the queries) and texts: of the same rows now, without dictionaries."""
    # a null text has no hash, and what it is held against is null too, or another
    here = text_hashes(pc.dictionary_encode(pc.fill_null(texts, "")))
    for name, what, now in ((QUERY_HASH, "the query", asked), (TEXT_HASH, "the document's text", here)):
        if name not in scored.column_names:
            continue
        other = np.flatnonzero(pc.fill_null(pc.not_equal(scored[name], pa.array(now)), False).to_numpy())
        if len(other):
            (row,) = scored.select(["query_id", "doc_id"]).slice(int(other[0]), 1).to_pylist()
            raise InputError(
                f"{where}: query_id {row['query_id']!r}, doc_id {row['doc_id']!r}: {what} is not the one that was "
                f"scored ({len(other):,} such rows of this unit); {advice}"
            )


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
