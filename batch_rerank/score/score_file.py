"""A scored unit to its score file: every score before ranking and top_k, in the order of the input.

Columns: `query_index int32` (which query of the unit), `query_id`, `doc_id`, `first_stage_score float32`,
`first_stage_rank int32`, `query_hash uint64` of (instruction, query), `text_hash uint64` of the document, `error`,
`score float32`, `n_tokens int32`, `truncated bool`, with chunks `chunk_offset int32`, `text` where the output has it,
and the passed-through columns, each as `+` and its name. Hashes and scores are null in rows with an error.
"""

import io
import json

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batch_rerank.config import JobConfig
from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.schema import CHUNK_OFFSET, NULL_QUERY, NULL_TEXT
from batch_rerank.score.read_unit import spread
from batch_rerank.score.shape import shape_of
from batch_rerank.score.steps import ScoredUnit
from batch_rerank.store.commit import commit, footer
from batch_rerank.store.filesystem import locate, storage_errors
from batch_rerank.store.manifest import Manifest
from batch_rerank.store.receipts import Receipt


def commit_unit(unit: ScoredUnit, config: JobConfig, model: ModelSpec, fingerprint: str) -> Receipt:
    """Write a unit's score file, then its receipt. Raises StorageError."""
    manifest = Manifest(locate(config.output.path, config.output.storage_options, reached=True))
    counts = counts_of(unit)
    if counts["engine_failed"]:
        _record_failures(manifest, unit)
    said = {"model": model.name, "revision": model.revision or model.identity, "template": model.template}
    shape = shape_of(unit, model)
    data = serialise(unit, footer(fingerprint, unit.unit.id, counts, **said, shape=shape))
    return commit(manifest, unit.unit.id, data, fingerprint, counts, **unit.about, shape=shape)


def counts_of(unit: ScoredUnit) -> dict[str, int]:
    """What came in and what became of it. rows_out: of the score file, which has every row."""
    errors = unit.rows["error"]
    null_texts, null_queries = _count(errors, NULL_TEXT), _count(errors, NULL_QUERY)
    failed = len(unit.rows) - len(unit.scores)
    return {
        "rows_in": len(unit.rows),
        "rows_out": len(unit.rows),
        "queries": unit.unit.queries,
        "scored": len(unit.scores),
        "failed": failed,
        "null_texts": null_texts,
        "null_queries": null_queries,
        "empty_texts": unit.empty_texts,
        "truncated": int(unit.truncated.sum()),
        "tokens": int(unit.n_tokens.sum()),
        "engine_failed": failed - null_texts - null_queries,
    }


def serialise(unit: ScoredUnit, metadata: dict[str, str]) -> bytes:
    """A score file's bytes: zstd Parquet, one row group."""
    rows = scored_rows(unit).replace_schema_metadata(metadata)
    sink = io.BytesIO()
    pq.write_table(rows, sink, compression="zstd", row_group_size=max(1, len(rows)))
    return sink.getvalue()


def scored_rows(unit: ScoredUnit) -> pa.Table:
    """The unit's rows with their scores; rows with an error have null, 0 tokens and False."""
    rows, scored = unit.rows, pc.is_null(unit.rows["error"]).to_numpy()
    columns = {
        "score": spread(unit.scores, scored, pa.float32()),
        "n_tokens": pc.fill_null(spread(unit.n_tokens, scored, pa.int32()), 0),
        "truncated": pc.fill_null(spread(unit.truncated, scored, pa.bool_()), False),
    }
    if unit.offset is not None:
        columns[CHUNK_OFFSET] = spread(unit.offset, scored, pa.int32())
    for name, values in columns.items():
        rows = rows.append_column(name, values)
    return rows


def _record_failures(manifest: Manifest, unit: ScoredUnit) -> None:
    """What the engine could not score, for people."""
    errors = unit.rows["error"]
    engine = pc.and_(pc.is_valid(errors), pc.invert(pc.is_in(errors, pa.array([NULL_TEXT, NULL_QUERY]))))
    rows = unit.rows.filter(engine).select(["query_id", "doc_id", "error"]).to_pylist()
    location = manifest.failure(unit.unit.id)
    with storage_errors(location):
        location.write_bytes(json.dumps({"unit": unit.unit.id, "rows": rows}).encode())


def _count(errors: pa.ChunkedArray, value: str) -> int:
    return int(pc.sum(pc.equal(errors, value)).as_py() or 0)
