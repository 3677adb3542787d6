"""Scores to ranks: score descending, then first-stage rank, then doc_id; rows without a score come last."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.engine.packing import Float32
from batch_rerank.engine.scorer import relevance
from batch_rerank.schema import CHUNK_OFFSET, OUTPUT_NAMES

ORDER = [
    ("query_index", "ascending"),
    ("score", "descending"),
    ("first_stage_rank", "ascending"),
    ("doc_id", "ascending"),
]


def rank(
    rows: pa.Table,
    scores: Float32,
    n_tokens: npt.NDArray[np.int32],
    truncated: npt.NDArray[np.bool_],
    model: ModelSpec,
    top_k: int | None,
    offset: npt.NDArray[np.int32] | None = None,
) -> pa.Table:
    """The output rows of a unit, sorted by query in input order, then rank; `query_index` last.

    `scores`, `n_tokens`, `truncated` and `offset` are of the rows without an error, in row order; the others get null,
    0 and False.
    """
    scored = pc.is_null(rows["error"]).to_numpy()
    relevances = relevance(model, scores)
    columns = {
        "score": _spread(scores, scored, pa.float32()),
        "relevance_score": pa.nulls(len(scored), pa.float32())
        if relevances is None
        else _spread(relevances, scored, pa.float32()),
        "n_tokens": pc.fill_null(_spread(n_tokens, scored, pa.int32()), 0),
        "truncated": pc.fill_null(_spread(truncated, scored, pa.bool_()), False),
    }
    if offset is not None:
        columns[CHUNK_OFFSET] = _spread(offset, scored, pa.int32())
    for name, values in columns.items():
        rows = rows.append_column(name, values)
    rows = rows.take(pc.sort_indices(rows, sort_keys=ORDER))
    rows = rows.append_column("rank", pa.array(_ranks(rows["query_index"].to_numpy()), pa.int32()))
    if top_k is not None:
        rows = rows.filter(pc.less_equal(rows["rank"], top_k))
    extra = [name for name in rows.column_names if name not in (*OUTPUT_NAMES, "query_index")]
    return rows.select([*OUTPUT_NAMES, *extra, "query_index"])


def _spread(values: npt.NDArray[np.generic], scored: npt.NDArray[np.bool_], kind: pa.DataType) -> pa.Array:
    """Values of the scored rows at their places among all rows, null elsewhere."""
    full = np.zeros(len(scored), values.dtype)
    full[scored] = values
    return pa.array(full, kind, mask=~scored)


def _ranks(index: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    starts = np.flatnonzero(np.diff(index, prepend=-1))
    lengths = np.diff(np.append(starts, len(index)))
    return np.arange(len(index)) - np.repeat(starts, lengths) + 1
