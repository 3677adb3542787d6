"""Chosen rows to the files that each trainer reads, as its own reader wants them.

Rows come by query, positives before negatives, each in the order of its list: `query_id`, `query`, `instruction`,
`doc_id`, `text`, `role`, `rank`, `label`. What each reader does, and at which version, is in docs/labels.md.
"""

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batch_rerank.errors import InputError
from batch_rerank.input.layouts import NO_TREC_ID
from batch_rerank.label_settings import Labels
from batch_rerank.labels.choose import POSITIVE
from batch_rerank.publish.trec import falling

Int64 = npt.NDArray[np.int64]
Content: TypeAlias = "pa.Table | list[str]"

LINE_ENDS = {ord(sign): f"\\u{ord(sign):04x}" for sign in "\u0085\u2028\u2029"}
"""Ends of lines to some readers, as JSON that has none: str.splitlines cuts at them."""


@dataclass(frozen=True)
class Lists:
    """Where the lists are in chosen rows: first int64[q + 1], where each query begins, and its last end; positives
    int64[q], how many of them come first; prompted: whether any query of the export may have an
    instruction."""

    rows: pa.Table
    first: Int64
    positives: Int64
    prompted: bool = False

    @property
    def negatives(self) -> Int64:
        """int64[q]: how many follow."""
        return np.diff(self.first) - self.positives

    def per_positive(self) -> tuple[Int64, Int64, Int64]:
        """A list for each positive, with all negatives of its query behind it: int64[p], which query it is of;
        int64[p + 1], where the lists begin; and the numbers of their rows."""
        of = np.repeat(np.arange(len(self.positives)), self.positives)
        within = np.arange(len(of)) - np.repeat(np.cumsum(self.positives) - self.positives, self.positives)
        offsets = np.append(0, np.cumsum(1 + self.negatives[of]))
        place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], np.diff(offsets))
        head = np.repeat(self.first[:-1][of] + within, np.diff(offsets))
        behind = np.repeat((self.first[:-1] + self.positives)[of], np.diff(offsets)) + place - 1
        return of, offsets, np.where(place == 0, head, behind)


def lists_of(rows: pa.Table, prompted: bool = False) -> Lists:
    """The lists of chosen rows."""
    number = pc.run_end_encode(rows["query_id"].combine_chunks()) if len(rows) else None
    ends = np.asarray(number.run_ends) if number is not None else np.empty(0, np.int64)
    first = np.append(0, ends).astype(np.int64)
    best = np.append(0, np.cumsum(rows["role"].to_numpy() == POSITIVE))
    return Lists(rows, first, np.diff(best[first]), prompted)


def files_of(
    rows: pa.Table, labels: Labels, number: int, where: str, prompted: bool
) -> Iterator[tuple[str, bytes, int]]:
    """The files of a part of an export: name, content, and how many examples it has; none without rows. Raises
    InputError where the target cannot hold what the rows have."""
    target, layout = labels.form
    for folder, held_out in (("train", False), ("heldout", True)):
        mine = rows.filter(pc.equal(rows["held_out"], held_out)).combine_chunks()
        if not len(mine):
            continue
        for ending, content in WRITERS[target, layout](lists_of(mine, prompted), labels, where).items():
            yield f"{folder}/part-{number:05d}.{ending}", to_bytes(content), len(content)
    if layout == "tables" and len(rows):
        lists = lists_of(rows)
        texts = rows.select(["query_id", "query"]).take(pa.array(lists.first[:-1])).rename_columns(["query_id", "text"])
        yield f"queries/part-{number:05d}.parquet", to_bytes(texts), len(texts)


def to_bytes(content: Content) -> bytes:
    """Parquet of a table, or lines."""
    if isinstance(content, list):
        return "".join(f"{line}\n" for line in content).encode()
    sink = io.BytesIO()
    pq.write_table(content.combine_chunks(), sink, compression="zstd")
    return sink.getvalue()


def _pairs(lists: Lists, labels: Labels, where: str) -> dict[str, Content]:
    rows = lists.rows
    return {"parquet": pa.table({"query": rows["query"], "answer": rows["text"], "label": rows["label"]})}


def _listwise(lists: Lists, labels: Labels, where: str) -> dict[str, Content]:
    rows = lists.rows
    queries = rows["query"].take(pa.array(lists.first[:-1]))
    docs, values = (_list(rows[name], lists.first) for name in ("text", "label"))
    return {"parquet": pa.table({"query": queries, "docs": docs, "labels": values})}


def _margin(lists: Lists, labels: Labels, where: str) -> dict[str, Content]:
    _, offsets, rows = lists.per_positive()
    place = np.arange(len(rows)) - np.repeat(offsets[:-1], np.diff(offsets))
    best = np.repeat(rows[offsets[:-1]], np.diff(offsets))[place > 0]
    other = rows[place > 0]
    scores = lists.rows["label"].to_numpy()
    texts = lists.rows["text"]
    data = {
        "query": lists.rows["query"].take(pa.array(other)),
        "positive": texts.take(pa.array(best)),
        "negative": texts.take(pa.array(other)),
        "label": pa.array(scores[best] - scores[other], pa.float32()),
    }
    return {"parquet": pa.table(data)}


def _n_tuple(lists: Lists, labels: Labels, where: str) -> dict[str, Content]:
    of, offsets, rows = lists.per_positive()
    width = 1 + labels.negatives.per_query
    square = rows.reshape(-1, width)  # queries with fewer are left out
    texts, scores = lists.rows["text"], lists.rows["label"].to_numpy()
    data: dict[str, Any] = {"query": lists.rows["query"].take(pa.array(lists.first[:-1][of]))}
    for column in range(width):
        name = "positive" if column == 0 else f"negative_{column}"
        data[name] = texts.take(pa.array(square[:, column]))
    data["label"] = _list(pa.chunked_array([pa.array(scores[rows], pa.float32())]), offsets)
    return {"parquet": pa.table(data)}


def _tables(lists: Lists, labels: Labels, where: str) -> dict[str, Content]:
    of, offsets, rows = lists.per_positive()
    data = {
        "query_id": lists.rows["query_id"].take(pa.array(lists.first[:-1][of])),
        "document_ids": _list(lists.rows["doc_id"].take(pa.array(rows)), offsets),
        "scores": _list(lists.rows["label"].take(pa.array(rows)), offsets),
    }
    return {"parquet": pa.table(data)}


def _run(lists: Lists, labels: Labels, where: str) -> dict[str, Content]:
    """Flat rows by rank. Its reader takes every column whose name contains "score" or "rank": there is one of each."""
    rows = lists.rows
    _refuse_two_texts(rows, where)
    order, rank = _by_rank(lists)
    data = {name: rows[name].take(pa.array(order)) for name in ("query_id", "doc_id")}
    data |= {"rank": pa.array(rank, pa.int32()), "score": rows["label"].take(pa.array(order))}
    data |= {name: rows[name].take(pa.array(order)) for name in ("query", "text")}
    return {"parquet": pa.table(data)}


def _lists(lists: Lists, labels: Labels, where: str) -> dict[str, Content]:
    """FlagEmbedding's. An instruction is the `query_prompt` of its rerankers, in all lines or none; not `prompt`, with
    which a line replaces what its LLM rerankers ask."""
    lines = []
    for best, others in _examples(lists):
        line = {
            "query": best[0]["query"],
            "pos": [one["text"] for one in best],
            "neg": [one["text"] for one in others],
            "pos_scores": [one["label"] for one in best],
            "neg_scores": [one["label"] for one in others],
        }
        lines.append(_json(line | ({"query_prompt": best[0]["instruction"] or ""} if lists.prompted else {})))
    return {"jsonl": lines}


def _passages(lists: Lists, labels: Labels, where: str) -> dict[str, Content]:
    """Tevatron's; its reranker wants a title. A text has its title before it already."""

    def passage(one: dict[str, Any]) -> dict[str, Any]:
        return {"docid": one["doc_id"], "title": "", "text": one["text"], "score": one["label"]}

    lines = [
        _json(
            {
                "query_id": best[0]["query_id"],
                "query": best[0]["query"],
                "positive_passages": [passage(one) for one in best],
                "negative_passages": [passage(one) for one in others],
            }
        )
        for best, others in _examples(lists)
    ]
    return {"jsonl": lines}


def _messages(lists: Lists, labels: Labels, where: str) -> dict[str, Content]:
    """ms-swift's; the instruction is the system's message, where its Qwen3-Reranker template looks for it."""

    def said(one: dict[str, Any]) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": one["text"]}]

    lines = []
    for best, others in _examples(lists):
        asked = [{"role": "user", "content": best[0]["query"]}]
        if best[0]["instruction"]:
            asked.insert(0, {"role": "system", "content": best[0]["instruction"]})
        told = {"messages": asked, "positive_messages": list(map(said, best))}
        lines.append(_json(told | {"negative_messages": list(map(said, others))}))
    return {"jsonl": lines}


def _trec(lists: Lists, labels: Labels, where: str) -> dict[str, Content]:
    """A run, whose scores fall from rank to rank as in an output's, and qrels with the teacher's order (the last has 1)
    or with how many of the bounds a label reaches."""
    rows = lists.rows
    for name in ("query_id", "doc_id"):
        spaced = rows[name].filter(pc.match_substring_regex(rows[name], NO_TREC_ID))
        if len(spaced):
            raise InputError(
                f"{where}: {name} {spaced[0].as_py()!r} is empty or has space in it, which no TREC file can hold; "
                "export to another target, or use other ids"
            )
    order, rank = _by_rank(lists)
    values = rows["label"].to_numpy()[order]
    queries, documents = (rows[name].take(pa.array(order)).to_pylist() for name in ("query_id", "doc_id"))
    if labels.grades == "order":
        size = np.repeat(np.diff(lists.first), np.diff(lists.first))
        grades = size - rank + 1
    else:
        grades = np.searchsorted(np.asarray(labels.grades, np.float32), values, side="right")
    named = list(zip(queries, documents, strict=True))
    scores = falling(values, lists.first[:-1])
    run = [f"{q} Q0 {d} {r} {v} batch_rerank" for (q, d), r, v in zip(named, rank.tolist(), scores, strict=True)]
    return {"run": run, "qrels": [f"{q} 0 {d} {g}" for (q, d), g in zip(named, grades.tolist(), strict=True)]}


WRITERS: dict[tuple[str, str], Callable[[Lists, Labels, str], dict[str, Content]]] = {
    ("sentence-transformers", "pairs"): _pairs,
    ("sentence-transformers", "listwise"): _listwise,
    ("sentence-transformers", "margin"): _margin,
    ("sentence-transformers", "n-tuple"): _n_tuple,
    ("sentence-transformers", "tables"): _tables,
    ("flagembedding", "lists"): _lists,
    ("pylate", "tables"): _tables,
    ("tevatron", "passages"): _passages,
    ("lightning-ir", "run"): _run,
    ("ms-swift", "messages"): _messages,
    ("trec", "run"): _trec,
}


def _list(values: pa.ChunkedArray, offsets: Int64) -> pa.Array:
    whole = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), whole)


def _by_rank(lists: Lists) -> tuple[Int64, Int64]:
    """The rows of each list in the teacher's order, and their ranks in it, from 1."""
    lengths = np.diff(lists.first)
    query = np.repeat(np.arange(len(lengths)), lengths)
    order = np.lexsort((lists.rows["rank"].to_numpy(), query))
    return order, np.arange(len(order)) - np.repeat(lists.first[:-1], lengths) + 1


def _examples(lists: Lists) -> Iterator[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """The positives and the negatives of each query. A loop over chosen rows: JSON is written in one anyway."""
    rows = lists.rows.select(["query_id", "query", "instruction", "doc_id", "text"]).to_pylist()
    for row, value in zip(rows, lists.rows["label"].to_numpy(), strict=True):
        row["label"] = float(str(value))  # the shortest decimal that is this float32
    for start, stop, best in zip(lists.first[:-1], lists.first[1:], lists.positives, strict=True):
        yield rows[start : start + best], rows[start + best : stop]


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).translate(LINE_ENDS)


def _refuse_two_texts(rows: pa.Table, where: str) -> None:
    distinct = pa.table({"doc_id": rows["doc_id"], "text": rows["text"]}).group_by(["doc_id", "text"]).aggregate([])
    counts = pc.value_counts(distinct["doc_id"])
    twice = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(twice):
        raise two_texts(twice.field("values")[0].as_py(), where)


def two_texts(doc_id: str, where: str) -> InputError:
    """Of a document that is not the same under two queries."""
    return InputError(
        f"{where}: doc_id {doc_id!r} has different texts under different queries; this target names each document once "
        "and would take the first; use one that carries texts (sentence-transformers with layout listwise, "
        "flagembedding), or give different texts different ids"
    )
