"""The ranked rows as one TREC run beside the parts, under a name that readers of directories pass over."""

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batch_rerank.errors import InputError
from batch_rerank.input.layouts import NO_TREC_ID, run_starts
from batch_rerank.publish.read_parts import read_part
from batch_rerank.store.filesystem import storage_errors
from batch_rerank.store.manifest import Manifest
from batch_rerank.store.records import TrecRun

TAG = "batch_rerank"


def write_trec_run(manifest: Manifest, parts: Iterable[int]) -> TrecRun:
    """Write `_run.trec` from the parts: query_id Q0 doc_id rank score tag, in the parts' order; its size and sha256.

    Evaluators order by score and break ties their own way, so where scores tie, or a row has none, the score of the
    lower rank is the next smaller float32. Raises StorageError, and InputError for ids with white space.
    """
    location = manifest.trec_run
    digest, size = hashlib.sha256(), 0
    with storage_errors(location), location.writer() as file:
        for block in _blocks(manifest, parts):
            digest.update(block)
            size += len(block)
            file.write(block)
    return TrecRun(size, digest.hexdigest())


def _blocks(manifest: Manifest, parts: Iterable[int]) -> Iterator[bytes]:
    for number in parts:
        for rows in read_part(manifest.part(number), ["query_id", "doc_id", "rank", "score"]):
            if len(rows):
                yield trec_lines(rows)


def trec_lines(rows: pa.Table) -> bytes:
    """Lines of ranked rows: `query_id`, `doc_id`, `rank`, `score` float32 or null."""
    refuse_spaced(rows)
    rows = rows.combine_chunks()
    ids = rows["query_id"].combine_chunks()
    scores = pa.array(falling(rows["score"].to_numpy(), run_starts(ids)), pa.float32())
    fields = [ids, pa.scalar("Q0"), rows["doc_id"], pc.cast(rows["rank"], pa.string()), pc.cast(scores, pa.string())]
    lines = pc.binary_join_element_wise(*fields, pa.scalar(f"{TAG}\n"), " ")
    return "".join(lines.to_pylist()).encode()


def refuse_spaced(rows: pa.Table) -> None:
    """Raise InputError for a `query_id` or a `doc_id` that is no field of a TREC run."""
    for name in ("query_id", "doc_id"):
        spaced = rows.filter(pc.match_substring_regex(rows[name], NO_TREC_ID))
        if len(spaced):
            raise InputError(
                f"{name} {spaced[name][0].as_py()!r} is empty or has white space, which ends a field of a TREC run; "
                "rename it, or leave output.trec_run out"
            )


def falling(scores: npt.NDArray[np.float32], starts: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """float32[n]: the scores, NaN for none, made to fall strictly within each query (which begin at `starts`)."""
    bits = scores.astype(np.float32).view(np.int32).astype(np.int64)
    order = np.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))  # counts the float32 values from zero up and down
    order[np.isnan(scores)] = 2**40  # above all: takes the next value below the row before
    for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(scores)], strict=True):
        if order[start] == 2**40:
            order[start] = 0
        steps = np.arange(stop - start)
        order[start:stop] = np.minimum.accumulate(order[start:stop] + steps) - steps
    fallen = np.where(order >= 0, order, -order | 0x80000000).astype(np.uint32)
    return fallen.view(np.float32)
