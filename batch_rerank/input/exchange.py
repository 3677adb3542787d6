"""The two passes of a stage: spread the rows of a source over the shards that need them, then build each shard.

Between them lie files under `_manifest/exchange`: for each piece of the source, what each shard needs of it, one Arrow
stream a shard behind the other, and a note with the offsets, written last, which says that the piece is done.
A row goes once to each shard that needs it. A task holds one piece's needed rows, or one shard.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batch_rerank.config import JobConfig
from batch_rerank.errors import InputError, StorageError
from batch_rerank.input.candidates import Int32, Int64
from batch_rerank.input.canonical import canonical, first_of_each, with_title
from batch_rerank.input.carried import carried
from batch_rerank.input.join import Ranked
from batch_rerank.input.layouts import Columns, find_columns
from batch_rerank.input.notes import PORTION, Note, Portions, data_name
from batch_rerank.input.shards import TEXT_ROWS, check_unchanged, leaf_paths, open_parquet, read_groups, reading
from batch_rerank.input.sources import NUMBERS, Piece, Source, read_piece
from batch_rerank.schema import PASSED
from batch_rerank.store.commit import commit, footer
from batch_rerank.store.filesystem import locate, storage_errors
from batch_rerank.store.manifest import Manifest
from batch_rerank.store.plans import Unit
from batch_rerank.store.receipts import SUMMED, Receipt

EXCHANGE = "_manifest/exchange"
FLUSH_BYTES = 64 * 2**20
"""Text that a spreading task gathers before it writes a file."""

DICTIONARY_BYTES = 2**30
"""Of a staged shard's column, up to which a value that repeats is written once."""

OURS = ("query_id", "query", "instruction", "doc_id", "text", "score", "rank")


@dataclass(frozen=True)
class Spread:
    """One piece of a source: its first row's number, and which of its rows go to which shards (`Join.wanted`)."""

    index: int
    source: Source
    piece: Piece
    start: int
    rows: Int32
    shards: Int32


@dataclass(frozen=True)
class Gather:
    """One staged shard: where its rows lie, and what its task needs besides (`Join.details`)."""

    unit: Unit
    portions: Portions
    details: Ranked | pa.Array


def spread(work: Spread, config: JobConfig, stage: str) -> Note:
    """Write what shards need of a piece. Raises InputError and StorageError."""
    root = locate(stage, config.output.storage_options, reached=True)
    exchange = root / EXCHANGE
    found = []
    for number, table in enumerate(_flushes(_needed(work, config))):
        location = exchange / data_name(work.index, number)
        data, portions = _by_shard(table, work)
        with storage_errors(location):
            location.write_bytes(data)
        found += [(work.index, number, *portion) for portion in portions]
    note = Note(work.index, np.array(found, PORTION), len(work.rows), root.patience.retries)
    with storage_errors(exchange / note.name):
        (exchange / note.name).write_bytes(note.to_bytes())
    return note


def _needed(work: Spread, config: JobConfig) -> Iterator[pa.Table]:
    """The rows of a piece that some shard needs, each once, with their number in the column `row`."""
    distinct = work.rows[np.diff(work.rows, prepend=-1) > 0]
    first = 0
    for table in _read(work, config):
        here = distinct[np.searchsorted(distinct, first) : np.searchsorted(distinct, first + len(table))]
        if len(here):
            yield table.take(here - first).append_column("row", pa.array(work.start + here.astype(np.int64)))
        first += len(table)


def _read(work: Spread, config: JobConfig) -> Iterator[pa.Table]:
    options = config.input.storage_options
    if work.source.kind == "flat":
        yield from _read_flat(work.piece, config)
        return
    for table in read_piece(work.source, work.piece, ("doc_id", "text", "title"), options):
        title = table["title"].combine_chunks() if "title" in table.column_names else None
        text = table["text"].combine_chunks().cast(pa.large_string())
        yield pa.table({"doc_id": table["doc_id"], "text": with_title(title, text)})


def _read_flat(piece: Piece, config: JobConfig) -> Iterator[pa.Table]:
    """A flat shard's columns under our names; passed-through ones under their own, with a + before it."""
    location = locate(piece.url, config.input.storage_options, reached=True)
    check_unchanged(location, piece.file)
    with open_parquet(location) as parquet:
        passthrough = config.output.passthrough
        columns = find_columns(parquet.schema_arrow, "flat", config.input.columns, passthrough, str(location))
        leaves = columns.leaves(leaf_paths(parquet), list(columns.names), passed=True)
        for batch in read_groups(parquet, range(piece.start, piece.stop), leaves, location, TEXT_ROWS):
            with reading(location, f"row groups {piece.start} to {piece.stop}"):
                ours = {name: _as_ours(name, batch, columns) for name in columns.names}
                ours["text"] = with_title(ours.pop("title", None), ours["text"])
                ours.setdefault("instruction", pa.nulls(batch.num_rows, pa.large_string()))
                passed = {f"{PASSED}{name}": carried(batch.column(name)) for name in passthrough}
                table = pa.table({**{name: ours[name] for name in OURS if name in ours}, **passed})
                table.validate(full=True)
            yield table
    check_unchanged(location, piece.file)


def _as_ours(name: str, batch: pa.RecordBatch, columns: Columns) -> pa.Array:
    """A column in the type that it has in every shard."""
    kind = NUMBERS.get(name, pa.large_string())
    return batch.column(columns.names[name]).cast(kind, safe=not pa.types.is_floating(kind))


def _flushes(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        if sum(one.nbytes for one in held) >= FLUSH_BYTES:
            yield pa.concat_tables(held).combine_chunks()
            held = []
    if held:
        yield pa.concat_tables(held).combine_chunks()


def _by_shard(table: pa.Table, work: Spread) -> tuple[bytes, list[tuple[int, int, int]]]:
    """A file's bytes and its portions."""
    numbers = table["row"].to_numpy()
    first, last = np.searchsorted(work.rows, np.array([numbers[0], numbers[-1] + 1]) - work.start)
    rows, shards = work.rows[first:last] + np.int64(work.start), work.shards[first:last]
    order = np.argsort(shards, kind="stable")
    rows, shards = np.searchsorted(numbers, rows[order]), shards[order]
    borders = np.flatnonzero(np.diff(shards, prepend=-1)).tolist()
    sink = io.BytesIO()
    portions = []
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    for start, stop in zip(borders, [*borders[1:], len(rows)], strict=True):
        position = sink.tell()
        with pa.ipc.new_stream(sink, table.schema, options=options) as stream:
            stream.write_table(table.take(rows[start:stop]).combine_chunks())
        portions.append((int(shards[start]), position, sink.tell()))
    return sink.getvalue(), portions


def gather(work: Gather, config: JobConfig, stage: str, fingerprint: str) -> Receipt:
    """Build a shard and commit it. Raises InputError and StorageError."""
    root = locate(stage, config.output.storage_options, reached=True)
    tables = []
    for piece, number, _, start, stop in work.portions.tolist():
        location = root / EXCHANGE / data_name(piece, number)
        with storage_errors(location):
            data = location.read_range(start, stop)
        try:
            tables.append(pa.ipc.open_stream(data).read_all())
        except (pa.ArrowException, OSError) as error:
            raise StorageError(f"{location}: damaged ({error}); delete it and its .note, and run again") from None
    read = pa.concat_tables(tables).combine_chunks()
    if isinstance(work.details, Ranked):
        rows = _of_run(read, work.details)
    else:
        try:
            rows = _of_flat(read, work.details, config, str(root))
        except pa.ArrowInvalid as error:
            raise InputError(
                f"{root}: shard {work.unit.id} cannot be built ({error}); expected less than 2 GiB of queries, and of "
                "each passed-through column, for its candidates; leave the column out of output.passthrough"
            ) from None
    if len(rows) != work.unit.pairs:
        raise StorageError(
            f"{root}: found {len(rows):,} rows of shard {work.unit.id} in {EXCHANGE}, expected {work.unit.pairs:,}; "
            "delete that folder and run again"
        )
    table = nested(rows)
    counts = {
        **dict.fromkeys(SUMMED, 0),
        "rows_in": len(rows),
        "rows_out": len(table),
        "queries": len(table),
        "null_texts": rows["text"].null_count,
        "null_queries": table["query"].null_count,
    }
    data = _serialise(table, footer(fingerprint, work.unit.id, counts))
    manifest = Manifest(root, staged=True)
    return commit(manifest, work.unit.id, data, fingerprint, counts, storage_retries=root.patience.retries)


def _of_run(read: pa.Table, ranked: Ranked) -> pa.Table:
    """Canonical rows from texts and the candidates that the driver ranked; each text is held once."""
    numbers = read["row"].to_numpy()
    order = np.argsort(numbers)
    texts = read["text"].combine_chunks().take(pa.array(order))
    documents = np.searchsorted(numbers[order], ranked.documents)
    if not np.array_equal(numbers[order][np.minimum(documents, len(order) - 1)], ranked.documents):
        raise StorageError(f"{EXCHANGE} lacks documents of this shard; delete that folder and run again")
    index = np.repeat(np.arange(len(ranked.pairs), dtype=np.int32), ranked.pairs)
    queries = ranked.queries.take(pa.array(index))
    data: dict[str, Any] = {
        "query_index": pa.array(index),
        "query_id": queries["query_id"].cast(pa.string()),
        "query": queries["query"],
        "doc_id": read["doc_id"].combine_chunks().take(pa.array(order)).take(pa.array(documents)).cast(pa.string()),
        "text": _dictionary(texts, documents),
        "first_stage_rank": pa.array(ranked.ranks, pa.int32()),
    }
    if "instruction" in queries.column_names:
        data["instruction"] = queries["instruction"]
    if ranked.scores is not None:
        data["first_stage_score"] = pa.array(ranked.scores, pa.float32(), mask=np.isnan(ranked.scores))
    return pa.table(data)


def _dictionary(values: pa.Array, rows: Int64) -> pa.DictionaryArray:
    """values[rows] with every value held once."""
    null = pc.is_null(values).to_numpy(zero_copy_only=False)[rows]
    return pa.DictionaryArray.from_arrays(pa.array(rows, pa.int32(), mask=null), pc.fill_null(values, ""))


def _of_flat(read: pa.Table, queries: pa.Array, config: JobConfig, where: str) -> pa.Table:
    """Canonical rows of a shard's queries, each query's rows in the order of the input."""
    position = pc.index_in(read["query_id"], value_set=queries).to_numpy()
    read = read.take(np.lexsort((read["row"].to_numpy(), position)))
    passthrough = {name: True for name in read.column_names if name.startswith(PASSED)}
    names = {name: name for name in OURS if name in read.column_names}
    rows = canonical(read, Columns("flat", names, passthrough), where)
    absent = ["first_stage_score"] if "score" not in names else []
    absent += ["instruction"] if rows["instruction"].null_count == len(rows) else []
    rows = rows.drop_columns(absent)
    rows = rows.set_column(rows.column_names.index("text"), "text", rows["text"].dictionary_encode())
    for name in ("query", "instruction"):
        if name in rows.column_names:
            rows = rows.set_column(rows.column_names.index(name), name, rows[name].cast(pa.large_string()))
    return rows.rename_columns([name.replace(2 * PASSED, PASSED, 1) for name in rows.column_names])


def nested(rows: pa.Table) -> pa.Table:
    """Canonical rows as a nested shard: a row a query, a struct a candidate."""
    rows = rows.combine_chunks()
    index = rows["query_index"].to_numpy()
    starts = np.flatnonzero(np.diff(index, prepend=-1))
    names = {"doc_id": "doc_id", "text": "text", "first_stage_score": "score", "first_stage_rank": "rank"}
    names |= {name: name.removeprefix(PASSED) for name in rows.column_names if name.startswith(PASSED)}
    fields = {ours: rows[name].combine_chunks() for name, ours in names.items() if name in rows.column_names}
    candidates = pa.StructArray.from_arrays([_one(array) for array in fields.values()], names=list(fields))
    offsets = pa.array(np.append(starts, len(rows)), pa.int32())
    data: dict[str, Any] = {"query_id": rows["query_id"].take(starts)}
    for name in ("query", "instruction"):
        if name in rows.column_names:
            data[name] = first_of_each(rows[name].combine_chunks(), starts).cast(pa.string())
    return pa.table({**data, "candidates": pa.ListArray.from_arrays(offsets, candidates)})


def _one(array: pa.Array | pa.ChunkedArray) -> pa.Array:
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array


def _serialise(table: pa.Table, metadata: dict[str, str]) -> bytes:
    """A staged shard: one row group, so that a text stands once in it; pages with checksums."""
    sink = io.BytesIO()
    pq.write_table(
        table.replace_schema_metadata(metadata),
        sink,
        compression="zstd",
        row_group_size=len(table),
        dictionary_pagesize_limit=DICTIONARY_BYTES,
        write_page_checksum=True,
    )
    return sink.getvalue()
