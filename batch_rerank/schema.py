"""Column names and Arrow schemas: the contract with those who write the input and read the output."""

from collections.abc import Mapping, Sequence

INPUT_COLUMNS = (
    "query_id",
    "query",
    "instruction",
    "candidates",
    "doc_id",
    "text",
    "title",
    "score",
    "rank",
)
"""Our names of the input's columns. `instruction`, `title`, `score` and `rank` are optional."""

ALIASES = {
    "query_id": ("qid", "query-id", "_id"),
    "doc_id": ("docid", "docno", "pid", "corpus-id", "document_id", "_id"),
    "text": ("contents", "passage", "document", "body"),
    "query": ("question", "query_text"),
    "instruction": ("instruct", "prompt"),
    "candidates": ("documents", "passages", "docs"),
}
"""Names that other tools use: suggested where ours is missing, never taken silently."""

PASSED = "+"
"""Stands before the name of a passed-through column until its part is written. No name of ours begins so: an input's
column may have any name, ours too."""

CHUNK_OFFSET = "chunk_offset"
"""With scoring.long_documents: chunk, the first token of the best chunk within its document; null in an error row."""

NULL_QUERY, NULL_TEXT = "query is null", "text is null"
"""Errors of rows that the input has nothing to score in."""

QUERY_HASH, TEXT_HASH = "query_hash", "text_hash"
"""Columns of a score file: which (instruction, query) and which document was scored."""

OUTPUT: Mapping[str, tuple[str, str]] = {
    "query_id": ("string", "as in the input; a number as its digits"),
    "doc_id": ("string", "as in the input; a number as its digits"),
    "rank": ("int32", "from 1; by score, then first-stage rank, then `doc_id`"),
    "score": ("float32", "raw logit or log-odds; the cosine of a bi-encoder; null in an error row"),
    "relevance_score": ("float32", "sigmoid of the score; null where the model defines no such map"),
    "first_stage_rank": ("int32", "as in the input; by the order of its rows where it has none"),
    "first_stage_score": ("float32", "as in the input; null where it has none"),
    "n_tokens": ("int32", "tokens that the model read; 0 in an error row"),
    "truncated": ("bool", "whether it did not read all"),
    "error": ("string", "why there is no score, else null"),
}
"""The output's columns with type and meaning, one row per candidate; then `text` if asked for, then the passed-through
columns."""

OUTPUT_NAMES: Sequence[str] = tuple(OUTPUT)
