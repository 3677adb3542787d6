"""nDCG, RR, recall and the rest through ir-measures, for the first stage and for the reranked output.

Both runs are evaluated in the order of their ranks, as `score = -rank`: evaluators break ties of the raw score their
own way (trec_eval by doc_id), which would not be the order that was written. A query of the qrels that the run does
not have counts as zero.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import ir_measures
import pyarrow as pa
import pyarrow.compute as pc

from batch_rerank.conditions import measure_of
from batch_rerank.errors import InputError, StorageError
from batch_rerank.judge.rankings import published_rows
from batch_rerank.publish.output import Place, config_of, input_ids, open_output
from batch_rerank.store.filesystem import Options, locate, storage_errors
from batch_rerank.store.manifest import PUBLICATION

DEFAULT_MEASURES = ("nDCG@10", "RR@10", "R@10")

ROWS_AT_ONCE = 100_000
"""Rows of judged queries that are held and evaluated together: some 30 MB."""

Qrels = dict[str, dict[str, int]]
Run = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Evaluation:
    """Means over the queries of the qrels, and each query's values: measure -> query_id -> value. limit: of a sample,
    how many queries it has."""

    queries: int
    queries_missing: int
    before: dict[str, float]
    after: dict[str, float]
    before_by_query: dict[str, dict[str, float]]
    after_by_query: dict[str, dict[str, float]]
    limit: int | None = None


def evaluate(
    output: Place | str, qrels_path: str, measures: Sequence[str] = DEFAULT_MEASURES, *, per_query: bool = True
) -> Evaluation:
    """Evaluate an output against qrels (TREC or BEIR). Raises ConfigError, InputError and StorageError.

    A query's rows are in one part, so parts are evaluated some at a time and their sums are kept; without `per_query`
    memory grows with the qrels alone.
    """
    parsed = [measure_of(name) for name in measures]
    qrels = read_qrels(qrels_path)
    manifest, plan = open_output(output)
    config = config_of(plan, output)
    if not manifest.success.exists():
        raise InputError(
            f"{manifest.root}: no _SUCCESS, the job has not finished; run it again to the end, then evaluate"
        )
    publication = manifest.read_publication()
    if publication is None:
        raise StorageError(f"{manifest.root}: _SUCCESS without {PUBLICATION}; the manifest is damaged; run it again")
    whole = publication.fields.get("top_k") is None
    before, after = (Sums(parsed, qrels, per_query) for _ in range(2))
    for part in published_rows(manifest, ["query_id", "doc_id", "rank", "first_stage_rank"]):
        after.add(part, "rank")
        if whole:
            before.add(part, "first_stage_rank")
    if not whole:  # the output lacks the tail
        for _, units in groupby(plan.units, key=lambda unit: unit.shard):
            for _, candidates in input_ids(plan, config, list(units)):
                before.add(candidates, "first_stage_rank")
    before.calculate()
    after.calculate()
    return Evaluation(
        queries=len(qrels),
        queries_missing=len(qrels) - after.queries,
        before=before.means(),
        after=after.means(),
        before_by_query=before.by_query,
        after_by_query=after.by_query,
        limit=config.limit,
    )


def by_query(tables: Iterable[pa.Table], qrels: Qrels, measures: Sequence[str]) -> dict[str, dict[str, float]]:
    """Measure -> query_id -> value, of rows of whole queries with their `rank`."""
    sums = Sums([measure_of(name) for name in measures], qrels, per_query=True)
    for rows in tables:
        sums.add(rows, "rank")
    sums.calculate()
    return sums.by_query


class Sums:
    """Sums of measures over queries, fed with whole queries."""

    def __init__(self, measures: Sequence["ir_measures.Measure"], qrels: Qrels, per_query: bool) -> None:
        self._measures, self._qrels, self._ids = measures, qrels, pa.array(list(qrels), pa.string())
        self._sums = dict.fromkeys(map(str, measures), 0.0)
        self.by_query = {name: dict.fromkeys(qrels, 0.0) if per_query else {} for name in self._sums}
        self._per_query = per_query
        self._run: Run = {}
        self._rows = 0
        self.queries = 0

    def add(self, rows: pa.Table, rank: str) -> None:
        """More whole queries: `query_id`, `doc_id` and a column of ranks. Only judged queries are looked at."""
        judged = rows.filter(pc.is_in(rows["query_id"].cast(pa.string()), self._ids))
        columns = (judged[name].to_pylist() for name in ("query_id", "doc_id", rank))
        for query_id, document, position in zip(*columns, strict=True):
            self._run.setdefault(query_id, {})[document] = -float(position)
        self._rows += len(judged)
        if self._rows >= ROWS_AT_ONCE:
            self.calculate()

    def calculate(self) -> None:
        """Take what was added into the sums."""
        if self._run:
            qrels = {query_id: self._qrels[query_id] for query_id in self._run}
            for result in ir_measures.iter_calc(list(self._measures), qrels, self._run):
                self._sums[str(result.measure)] += float(result.value)
                if self._per_query:
                    self.by_query[str(result.measure)][result.query_id] = float(result.value)
        self.queries += len(self._run)
        self._run, self._rows = {}, 0

    def means(self) -> dict[str, float]:
        """Over all queries of the qrels."""
        return {name: value / len(self._qrels) for name, value in self._sums.items()}


def read_qrels(path: str, options: Options | None = None) -> Qrels:
    """qrels[query_id][doc_id] = relevance, from `qid 0 docid rel` or a BEIR TSV with a header."""
    location = locate(path, options)
    try:
        with storage_errors(location, InputError):
            lines = location.read_bytes().decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error}); expected qrels in TREC or BEIR form") from None
    qrels: Qrels = {}
    beir = bool(lines) and lines[0].split("\t")[0] in ("query-id", "query_id")
    for number, line in enumerate(lines[1:] if beir else lines, start=2 if beir else 1):
        if not line.strip():
            continue
        fields = line.split("\t") if beir else line.split()
        try:
            query_id, document, value = fields if beir else (fields[0], fields[2], fields[3])
            if not beir and len(fields) != 4:
                raise ValueError
            qrels.setdefault(query_id, {})[document] = int(value)
        except (ValueError, IndexError):
            expected = "query-id, corpus-id, score with tabs" if beir else "qid 0 docid relevance"
            raise InputError(f"{path}: line {number}: found {line[:80]!r}, expected {expected}") from None
    if not qrels:
        raise InputError(f"{path}: no judgements; expected TREC qrels (qid 0 docid rel) or a BEIR TSV with a header")
    return qrels
