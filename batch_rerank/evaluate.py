"""nDCG, RR, recall and the rest through ir-measures, for the first stage and for the reranked output.

Both runs are evaluated in the order of their ranks, as `score = -rank`: evaluators break ties of the raw score their
own way (trec_eval by doc_id), which would not be the order that was written. A query of the qrels that the run does
not have counts as zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import ir_measures
import pyarrow as pa
import pyarrow.parquet as pq

from batch_rerank.errors import ConfigError, InputError
from batch_rerank.job.verify import input_ids, open_output
from batch_rerank.store.filesystem import locate, storage_errors
from batch_rerank.store.manifest import Manifest, Plan

DEFAULT_MEASURES = ("nDCG@10", "RR@10", "R@10")

Qrels = dict[str, dict[str, int]]
Run = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Evaluation:
    """Means over the queries of the qrels, and each query's values: measure -> query_id -> value."""

    queries: int
    queries_missing: int
    before: dict[str, float]
    after: dict[str, float]
    before_by_query: dict[str, dict[str, float]]
    after_by_query: dict[str, dict[str, float]]


def evaluate(output: str, qrels_path: str, measures: Sequence[str] = DEFAULT_MEASURES) -> Evaluation:
    """Evaluate an output against qrels (TREC or BEIR). Raises ConfigError, InputError and StorageError."""
    parsed = [_measure(name) for name in measures]
    qrels = read_qrels(qrels_path)
    manifest, plan = open_output(output)
    if not manifest.success.exists():
        raise InputError(f"{output}: no _SUCCESS, the job has not finished; run it again to the end, then evaluate")
    before, after = _runs(manifest, plan)
    results = [_by_query(parsed, qrels, run) for run in (before, after)]
    means = [{name: sum(values.values()) / len(qrels) for name, values in result.items()} for result in results]
    return Evaluation(
        queries=len(qrels),
        queries_missing=len(set(qrels) - set(after)),
        before=means[0],
        after=means[1],
        before_by_query=results[0],
        after_by_query=results[1],
    )


def _measure(name: str) -> "ir_measures.Measure":
    try:
        return ir_measures.parse_measure(name)
    except (NameError, ValueError, SyntaxError) as error:
        raise ConfigError(
            f"measure {name!r} is not known ({error}); expected names as in ir_measures, e.g. nDCG@10, RR@10, AP"
        ) from None


def read_qrels(path: str) -> Qrels:
    """qrels[query_id][doc_id] = relevance, from `qid 0 docid rel` or a BEIR TSV with a header."""
    location = locate(path)
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


def _runs(manifest: Manifest, plan: Plan) -> tuple[Run, Run]:
    """The first stage's run and the reranked one. With top_k the output lacks the tail, so the first is re-read."""
    before: Run = {}
    after: Run = {}
    for unit in plan.units:
        with storage_errors(manifest.part(unit.id)), manifest.part(unit.id).open() as file:
            part = pq.read_table(file, columns=["query_id", "doc_id", "rank", "first_stage_rank"])
        _collect(after, part, "rank")
        if plan.config["output"]["top_k"] is None:
            _collect(before, part, "first_stage_rank")
    if plan.config["output"]["top_k"] is not None:
        for _, units in groupby(plan.units, key=lambda unit: unit.shard):
            for _, candidates in input_ids(plan, list(units)):
                _collect(before, candidates, "first_stage_rank")
    return before, after


def _collect(run: Run, rows: pa.Table, rank: str) -> None:
    columns = (rows[name].to_pylist() for name in ("query_id", "doc_id", rank))
    for query_id, document, position in zip(*columns, strict=True):
        run.setdefault(query_id, {})[document] = -float(position)


def _by_query(measures: Sequence["ir_measures.Measure"], qrels: Qrels, run: Run) -> dict[str, dict[str, float]]:
    judged = {query_id: documents for query_id, documents in run.items() if query_id in qrels}
    values = {str(measure): dict.fromkeys(qrels, 0.0) for measure in measures}
    if judged:
        for result in ir_measures.iter_calc(list(measures), qrels, judged):
            values[str(result.measure)][result.query_id] = float(result.value)
    return values
