"""Scores to ranks: score descending, then first-stage rank, then doc_id; rows without a score come last."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.engine.scorer import relevance
from batch_rerank.schema import CHUNK_OFFSET, OUTPUT_NAMES, PASSED

ORDER = [
    ("query_index", "ascending"),
    ("score", "descending"),
    ("first_stage_rank", "ascending"),
    ("doc_id", "ascending"),
]


def rank(
    rows: pa.Table, model: ModelSpec, top_k: int | None, extra: Sequence[str]
) -> tuple[pa.Table, npt.NDArray[np.int32]]:
    """The output rows of a unit, out of its score file, sorted by query in input order, then rank; and int32[n], which
    query of the unit each is of: not as a column, because passed-through columns may have any name.

    `extra`: the columns behind the fixed ones, `text` and the passed-through ones under their own names; with chunks
    `chunk_offset` follows them.
    """
    rows = rows.append_column("relevance_score", _relevance(rows["score"], model))
    rows = rows.take(pc.sort_indices(rows, sort_keys=ORDER))
    rows = rows.append_column("rank", pa.array(_ranks(rows["query_index"].to_numpy()), pa.int32()))
    if top_k is not None:
        rows = rows.filter(pc.less_equal(rows["rank"], top_k))
    taken = {name: name if name == "text" else f"{PASSED}{name}" for name in extra}
    offset = [CHUNK_OFFSET] if CHUNK_OFFSET in rows.column_names else []
    chosen = rows.select([*OUTPUT_NAMES, *taken.values(), *offset])
    return chosen.rename_columns([*OUTPUT_NAMES, *taken, *offset]), rows["query_index"].to_numpy()


def _relevance(scores: pa.ChunkedArray, model: ModelSpec) -> pa.Array:
    found = relevance(model, scores.fill_null(0.0).to_numpy())
    if found is None:
        return pa.nulls(len(scores), pa.float32())
    return pa.array(found, pa.float32(), mask=pc.is_null(scores).to_numpy())


def _ranks(index: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    starts = np.flatnonzero(np.diff(index, prepend=-1))
    lengths = np.diff(np.append(starts, len(index)))
    return np.arange(len(index)) - np.repeat(starts, lengths) + 1
