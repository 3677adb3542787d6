"""A part of an export: scores, input and judgements to training files, beside them where each label comes from.

Like a part of an output it is a pure function of its plan: whoever makes it makes the same bytes. Files are created
exclusively, then the receipt.
"""

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.errors import ConflictError, StorageError
from batch_rerank.label_settings import Labels
from batch_rerank.labels.census import counts_of
from batch_rerank.labels.choose import DOCUMENT_REASONS, QUERY_REASONS, Choice, choose
from batch_rerank.labels.documents import split_documents
from batch_rerank.labels.records import LabelFile, LabelReceipt, part_receipt
from batch_rerank.labels.rows import Qrels, UnitRows, Work, unit_rows
from batch_rerank.labels.scale import scaled
from batch_rerank.labels.targets import files_of
from batch_rerank.labels.texts import (
    at_rows,
    held_out,
    input_rows,
    instruction_of,
    refuse_other_labels,
    taken,
    with_texts,
)
from batch_rerank.store.filesystem import Location, locate, storage_errors
from batch_rerank.store.lease import check_epoch
from batch_rerank.store.manifest import sha256
from batch_rerank.store.records import parse


@dataclass(frozen=True)
class Order:
    """What is the same for all parts. root: of the export; scale: decided; buckets: files of documents; prompted:
    whether queries have instructions; epoch: the lease under which it was begun."""

    root: str
    labels: Labels
    model: ModelSpec
    scale: str
    fingerprint: str
    buckets: int
    prompted: bool
    epoch: int


def export_part(work: Work, order: Order, qrels: Qrels) -> LabelReceipt:
    """Make a part's files and its receipt, or find them there. Raises InputError where the input is not the one that
    was scored, or has what the target cannot hold; StorageError; and ConflictError where another has taken over."""
    root = locate(order.root, order.labels.storage_options, reached=True)
    chosen, dropped, counts = _choose(work, order, qrels)
    files = list(files_of(chosen, order.labels, work.number, work.source.path, order.prompted))
    if order.buckets and len(chosen):
        files.append(split_documents(chosen, work.number, order.buckets))
    for folder, table in (("_labels", _sources(chosen)), ("_dropped", dropped)):
        if len(table):
            files.append((f"{folder}/part-{work.number:05d}.parquet", _parquet(table), len(table)))
    written = [create(root, name, data, rows, order.epoch) for name, data, rows in files]
    receipt = LabelReceipt(work.number, order.fingerprint, written, dict(counts))
    return commit(root, part_receipt(work.number), receipt, order.epoch)


def _choose(work: Work, order: Order, qrels: Qrels) -> tuple[pa.Table, pa.Table, Counter[str]]:
    chosen, dropped, counts = [CHOSEN.empty_table()], [DROPPED.empty_table()], Counter[str]()
    given = input_rows(work.source)
    for rows in unit_rows(work, order.labels, order.model, qrels):
        table = next(table for unit, table in given if unit.id == rows.unit.id)
        where = work.source.shards[rows.unit.shard].url
        at = at_rows(rows, table, where)
        rows = with_texts(rows, table, at)
        choice = choose(rows.scored, order.labels)
        refuse_other_labels(rows, choice, table, at, order.model, where)
        counts.update(rows.counts)
        counts.update(counts_of(choice))
        instruction = instruction_of(work.source.config)
        chosen.append(_labelled(rows, choice, taken(rows, choice, table, at, instruction), order))
        dropped.append(_dropped(rows, choice))
    made = pa.concat_tables(chosen).combine_chunks()
    first = made.filter(pc.equal(made["place"], 0))
    counts["held_out_queries"] = int(pc.sum(first["held_out"]).as_py() or 0)
    return made, pa.concat_tables(dropped).combine_chunks(), counts


CHOSEN = pa.schema(
    [
        ("query_id", pa.string()),
        ("doc_id", pa.string()),
        ("query", pa.large_string()),
        ("text", pa.large_string()),
        ("instruction", pa.large_string()),
        ("role", pa.int8()),
        ("place", pa.int32()),
        ("rank", pa.int32()),
        ("score", pa.float32()),
        ("label", pa.float32()),
        ("disagreement", pa.float32()),
        ("grade", pa.int32()),
        ("held_out", pa.bool_()),
    ]
)

DROPPED = pa.schema(
    [
        ("query_id", pa.string()),
        ("doc_id", pa.string()),
        ("reason", pa.string()),
        ("rank", pa.int32()),
        ("score", pa.float32()),
        ("positive_score", pa.float32()),
        ("margin", pa.float32()),
    ]
)
"""margin: the positive's score minus the document's. A query that is left out has a row without doc_id."""


def _labelled(rows: UnitRows, choice: Choice, texts: pa.Table, order: Order) -> pa.Table:
    at, scored = choice.rows, rows.scored
    query = scored.query[at]
    probability = None if scored.probability is None else scored.probability[at]
    starts = np.flatnonzero(np.diff(query, prepend=-1))
    lengths = np.diff(np.append(starts, len(query)))
    queries = texts["query"].take(pa.array(starts)).to_pylist()
    grade, apart = scored.grade[at], rows.disagreement
    data = {name: texts[name] for name in texts.column_names}
    data |= {
        "role": pa.array(choice.role[at], pa.int8()),
        "place": pa.array(np.arange(len(at)) - np.repeat(starts, lengths), pa.int32()),
        "rank": pa.array(scored.rank[at], pa.int32()),
        "score": pa.array(scored.score[at], pa.float32()),
        "label": pa.array(
            scaled(scored.score[at], probability, choice.low[query], choice.high[query], order.scale), pa.float32()
        ),
        "disagreement": pa.nulls(len(at), pa.float32()) if apart is None else pa.array(apart[at], pa.float32()),
        "grade": pa.array(grade, pa.int32(), mask=grade < 0),
        "held_out": pa.array(np.repeat(held_out(queries, order.labels.held_out), lengths), pa.bool_()),
    }
    return pa.table(data).select(CHOSEN.names).cast(CHOSEN)


def _sources(chosen: pa.Table) -> pa.Table:
    """Where each label comes from, for people: most targets carry no ids."""
    role = pc.if_else(pc.equal(chosen["role"], 1), "positive", "negative")
    kept = ["query_id", "doc_id", "place", "rank", "score", "label", "disagreement", "grade", "held_out"]
    return chosen.select(kept).add_column(2, "role", role)


def _dropped(rows: UnitRows, choice: Choice) -> pa.Table:
    scored = rows.scored
    gone = np.flatnonzero(choice.reason)
    with np.errstate(invalid="ignore"):
        against = np.where(np.isfinite(choice.positive), choice.positive, np.nan)[scored.query[gone]]
    documents = {
        **{name: rows.table[name].take(pa.array(gone)) for name in ("query_id", "doc_id")},
        "reason": pa.array(DOCUMENT_REASONS).take(pa.array(choice.reason[gone])),
        "rank": pa.array(scored.rank[gone], pa.int32()),
        "score": _number(scored.score[gone]),
        "positive_score": _number(against),
        "margin": _number(against - scored.score[gone]),
    }
    left_out = np.flatnonzero(choice.query_reason)
    queries = {
        "query_id": pa.array([rows.query_ids[one] for one in left_out.tolist()], pa.string()),
        "doc_id": pa.nulls(len(left_out), pa.string()),
        "reason": pa.array(QUERY_REASONS).take(pa.array(choice.query_reason[left_out])),
        **{name: pa.nulls(len(left_out), DROPPED.field(name).type) for name in DROPPED.names[3:]},
    }
    return pa.concat_tables([pa.table(documents).cast(DROPPED), pa.table(queries).cast(DROPPED)])


def _number(values: "np.typing.NDArray[np.float64]") -> pa.Array:
    return pa.array(values.astype(np.float32), pa.float32(), mask=np.isnan(values))


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def create(root: Location, name: str, data: bytes, rows: int, epoch: int) -> LabelFile:
    """Write a file of an export, or find the same there. Another content is of an attempt with other libraries, which
    did not get as far as its receipt: it is replaced. Raises StorageError and ConflictError."""
    location = root / name
    with storage_errors(location):
        if not location.create_exclusive(data):
            seen = location.stat()
            check_epoch(root, epoch)
            location.remove_seen(seen)
            if not location.create_exclusive(data):
                raise ConflictError(f"{location}: written by another export meanwhile; run again when it has ended")
    return LabelFile(name, rows, len(data), sha256(data))


def commit(root: Location, name: str, receipt: LabelReceipt, epoch: int) -> LabelReceipt:
    """Write a receipt behind its files. Raises StorageError, and ConflictError where another has taken over."""
    location = root / name
    check_epoch(root, epoch)
    with storage_errors(location):
        if not location.create_exclusive(receipt.to_json()):
            there = read_receipt(location)
            if there != receipt:
                raise StorageError(
                    f"{location}: says otherwise than this export; it is damaged, or was made by other libraries; "
                    "delete it and run again"
                )
    return receipt


def read_receipt(location: Location) -> LabelReceipt | None:
    """A receipt; None where it cannot be read."""
    with storage_errors(location):
        return next(iter(receipts_of([location.read_bytes()])), None)


def receipts_of(bodies: Sequence[bytes]) -> list[LabelReceipt]:
    """Those that can be read."""
    found = []
    for body in bodies:
        try:
            found.append(parse(LabelReceipt, body))
        except ValueError:
            continue
    return found
