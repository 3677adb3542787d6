"""The scored rows of a part of an export, ready to choose from: all teachers' scores, ranks, judgements, draws."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.label_settings import Labels
from batch_rerank.labels.choose import DISAGREE, NO_SCORE, TEACHER_LACKS, Float64, Int64, Scored, draws_of
from batch_rerank.labels.scale import probabilities
from batch_rerank.labels.scores import Source, read_scores
from batch_rerank.labels.teachers import Combined, combine
from batch_rerank.store.plans import Unit

Qrels = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class Work:
    """A part of an export: some units of the exported output, and of each further teacher those that have their
    queries."""

    number: int
    source: Source
    others: Sequence[Source]


@dataclass(frozen=True)
class UnitRows:
    """A unit's rows to choose from. table: `query_id`, `doc_id`; query_ids: of `scored.draws`; disagreement float64[n],
    or None with one teacher; counts: what was odd."""

    unit: Unit
    table: pa.Table
    query_ids: list[str]
    scored: Scored
    disagreement: Float64 | None
    counts: Counter[str]

    def with_texts(self, text: Int64, reason: "np.typing.NDArray[np.int8]") -> "UnitRows":
        """The same where texts are known: reason has what they rule out."""
        kept = np.where(self.scored.reason == 0, reason, self.scored.reason).astype(np.int8)
        return replace(self, scored=replace(self.scored, text=text, reason=kept))


def unit_rows(work: Work, labels: Labels, model: ModelSpec, qrels: Qrels) -> Iterator[UnitRows]:
    """The units of a part. Raises what `read_scores` raises."""
    if labels.teachers is None:
        for unit, table in read_scores(work.source):
            yield _unit(unit, table, table["score"].to_numpy(), None, labels, model, qrels)
        return
    read = list(read_scores(work.source))
    sizes = [len(table) for _, table in read]
    if not sum(sizes):
        return
    rows = pa.concat_tables([table for _, table in read]).combine_chunks()
    unit_of = np.repeat(np.arange(len(read)), sizes)
    index = rows["query_index"].to_numpy()
    changes = (np.diff(index, prepend=-1) != 0) | (np.diff(unit_of, prepend=-1) != 0)
    found = combine(rows, np.cumsum(changes) - 1, work.others, labels.teachers)
    start, extra = 0, found.extra
    for (unit, table), size in zip(read, sizes, strict=True):
        here = slice(start, start + size)
        mine = Combined(found.score[here], found.disagreement[here], found.lacking[here], 0)
        made = _unit(unit, table, mine.score, mine, labels, model, qrels)
        made.counts["teachers_extra"], extra = extra, 0  # of the whole part, so once
        yield made
        start += size


def _unit(
    unit: Unit,
    table: pa.Table,
    score: Float64,
    combined: Combined | None,
    labels: Labels,
    model: ModelSpec,
    qrels: Qrels,
) -> UnitRows:
    index = table["query_index"].to_numpy()
    starts = np.flatnonzero(np.diff(index, prepend=-1))
    lengths = np.diff(np.append(starts, len(index)))
    query = np.repeat(np.arange(len(starts)), lengths)
    ids = table["query_id"].take(pa.array(starts)).to_pylist()
    reason = np.where(np.isnan(score), NO_SCORE, 0).astype(np.int8)
    counts = Counter({"pairs": len(table), "queries": len(starts), "judged_absent": 0})
    if combined is not None and labels.teachers is not None:
        reason[combined.lacking] = TEACHER_LACKS
        limit = labels.teachers.max_disagreement
        if limit is not None:
            reason[(reason == 0) & (combined.disagreement > limit)] = DISAGREE
        counts["teachers_missing"] = int(combined.lacking.sum())
        counts["teachers_wanted"] = int((~np.isnan(table["score"].to_numpy())).sum())
    grade, absent = _grades(table["doc_id"].combine_chunks(), ids, starts, lengths, qrels, labels.positives.least)
    counts["judged_absent"] = absent
    counts["judged_queries"] = sum(name in qrels for name in ids)
    scored = Scored(
        query=query,
        score=score,
        probability=probabilities(score, model) if combined is None else None,
        rank=_ranks(table, query, score, starts, lengths),
        grade=grade,
        reason=reason,
        text=None,
        draws=draws_of(ids, labels.seed),
        odds=model.relevance_scale if combined is None and model.relevance != "none" else 1.0,
    )
    return UnitRows(unit, table, ids, scored, None if combined is None else combined.disagreement, counts)


def _grades(
    documents: pa.Array, ids: Sequence[str], starts: Int64, lengths: Int64, qrels: Qrels, least: int
) -> tuple[Int64, int]:
    """int64[n], -1 where not judged; and how many relevant documents of these queries, judged `least` or more, are no
    candidates."""
    grades, absent = np.full(len(documents), -1, np.int64), 0
    for name, start, length in zip(ids, starts.tolist(), lengths.tolist(), strict=True):
        judged = qrels.get(name)
        if not judged:
            continue
        at = pc.index_in(pa.array(list(judged), documents.type), documents.slice(start, length))
        for place, value in zip(at.to_pylist(), judged.values(), strict=True):
            if place is None:
                absent += value >= least
            else:
                grades[start + place] = max(0, value)
    return grades, absent


def _ranks(table: pa.Table, query: Int64, score: Float64, starts: Int64, lengths: Int64) -> Int64:
    """By score, then first-stage rank, then doc_id, as the output is ranked."""
    first = table["first_stage_rank"].to_numpy()
    falling = -np.where(np.isnan(score), -np.inf, score)
    order = np.lexsort((first, falling, query))
    keys = np.stack([query[order], falling[order], first[order]])
    if (keys[:, 1:] == keys[:, :-1]).all(axis=0).any():  # seldom: then ids decide, which is slow
        columns = {"query": query, "score": falling, "first": first, "doc_id": table["doc_id"]}
        order = pc.sort_indices(pa.table(columns), sort_keys=[(name, "ascending") for name in columns]).to_numpy()
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.arange(len(order)) - np.repeat(starts, lengths) + 1
    return ranks
