"""nDCG, RR, recall and the rest through ir-measures, for the first stage and for the reranked output.

Both runs are evaluated in the order of their ranks, as `score = -rank`: evaluators break ties of the raw score their
own way (trec_eval by doc_id), which would not be the order that was written. A query of the qrels that the run does
not have counts as zero.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from math import fsum
from typing import TypeVar

import ir_measures
import pyarrow as pa
import pyarrow.compute as pc

from batch_rerank.calls import SMALL_BYTES, Each, in_turn
from batch_rerank.conditions import looks_deeper, measure_of
from batch_rerank.config import JobConfig
from batch_rerank.errors import InputError, StorageError
from batch_rerank.publish.output import Opened, Place, config_of, input_ids, open_output
from batch_rerank.publish.read_parts import read_part
from batch_rerank.store.filesystem import Options, locate, storage_errors
from batch_rerank.store.manifest import PUBLICATION
from batch_rerank.store.plans import Shard, Unit
from batch_rerank.store.verdict import why_unfinished

DEFAULT_MEASURES = ("nDCG@10", "RR@10", "R@10")

ROWS_AT_ONCE = 100_000
"""Rows of judged queries that are held and evaluated together: some 30 MB."""

Qrels = dict[str, dict[str, int]]
Run = dict[str, dict[str, float]]
Values = dict[str, dict[str, float]]
"""Measure -> query_id -> value."""

Seen = dict[str, Values]
"""Of the run `before` or `after`, or of both."""

MOST_GRADE = 2**31 - 1
"""Of a judgement, either way."""

CALLS = 1000
"""Pieces of a large output at most: each is sent the qrels."""

T = TypeVar("T")


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
    top_k: int | None = None
    deeper: list[str] = field(default_factory=list)


def evaluate(
    output: Place | str,
    qrels_path: str,
    measures: Sequence[str] = DEFAULT_MEASURES,
    *,
    per_query: bool = True,
    on: Callable[[JobConfig], Each] | None = None,
) -> Evaluation:
    """Evaluate an output against qrels (TREC or BEIR). Raises ConfigError, InputError and StorageError.

    A query's rows are in one part, so parts are evaluated some at a time: memory grows with the qrels alone. `on` says
    where those of a large output are; None, and a small one: in this process. The numbers are the same to the last bit.
    """
    parsed = [measure_of(name) for name in measures]
    qrels = read_qrels(qrels_path)
    place = Place(output) if isinstance(output, str) else output
    manifest, plan = open_output(place)
    config = config_of(plan, place)
    if not manifest.success.exists():
        raise InputError(f"{manifest.root}: {why_unfinished(manifest)}, then evaluate")
    publication, mark = manifest.read_publication(), manifest.read_mark()
    if publication is None:
        raise StorageError(f"{manifest.root}: _SUCCESS without {PUBLICATION}; the manifest is damaged; run it again")
    small = on is None or mark is None or sum(part.size for part in mark.parts) < SMALL_BYTES
    each = in_turn if small or on is None else on(config)
    whole = publication.fields.get("top_k") is None  # else the output lacks the tail
    ranks = {"after": "rank", **({"before": "first_stage_rank"} if whole else {})}
    opened = Opened.of(manifest, place.options)
    calls: list[Callable[[Qrels], Seen]] = [
        partial(_of_parts, opened, numbers, ranks, list(measures)) for numbers in _some(range(len(publication.parts)))
    ]
    if not whole:
        shards = [(plan.shards[shard], list(units)) for shard, units in groupby(plan.units, lambda unit: unit.shard)]
        calls += [partial(_of_shards, config, some, list(measures)) for some in _some(shards)]
    sums = {run: Sums(parsed, qrels) for run in ("before", "after")}
    for seen in each(calls, qrels):
        for run, values in seen.items():
            sums[run].take(values)
    before, after = sums["before"], sums["after"]
    if plan.pairs and not (before.queries or after.queries):
        raise InputError(
            f"{qrels_path}: none of its {len(qrels):,} queries is in {manifest.root}, e.g. {next(iter(qrels))!r}; "
            "expected judgements of these queries, by their query_id"
        )
    top_k = publication.fields.get("top_k")
    return Evaluation(
        queries=len(qrels),
        queries_missing=len(qrels) - after.queries,
        before=before.means(),
        after=after.means(),
        before_by_query=before.by_query if per_query else {name: {} for name in before.seen},
        after_by_query=after.by_query if per_query else {name: {} for name in after.seen},
        limit=config.limit,
        top_k=top_k,
        deeper=[name for name in before.seen if looks_deeper(name, top_k)],
    )


def _some(works: Sequence[T]) -> Iterator[Sequence[T]]:
    """In order, so many together that there are at most CALLS."""
    size = -(-len(works) // CALLS) or 1
    return (works[at : at + size] for at in range(0, len(works), size))


def _of_parts(output: Opened, numbers: Sequence[int], ranks: dict[str, str], measures: list[str], qrels: Qrels) -> Seen:
    manifest, sums = output.manifest(), {run: _sums(measures, qrels) for run in ranks}
    for number in numbers:
        for rows in read_part(manifest.part(number), ["query_id", "doc_id", "rank", "first_stage_rank"]):
            for run, rank in ranks.items():
                sums[run].add(rows, rank)
    return {run: one.whole() for run, one in sums.items()}


def _of_shards(
    config: JobConfig, shards: Sequence[tuple[Shard, list[Unit]]], measures: list[str], qrels: Qrels
) -> Seen:
    sums = _sums(measures, qrels)
    for shard, units in shards:
        for _, candidates in input_ids(shard, config, units):
            sums.add(candidates, "first_stage_rank")
    return {"before": sums.whole()}


def _sums(measures: Sequence[str], qrels: Qrels) -> "Sums":
    return Sums([measure_of(name) for name in measures], qrels)


def sums_of(tables: Iterable[pa.Table], qrels: Qrels, measures: Sequence[str]) -> "Sums":
    """Of rows of whole queries with their `rank`."""
    sums = _sums(measures, qrels)
    for rows in tables:
        sums.add(rows, "rank")
    sums.calculate()
    return sums


def paired(old: "Sums", new: "Sums", measure: str) -> dict[str, tuple[float, float]]:
    """query_id -> value of old and of new, of the judged queries that at least one has, in the order of the qrels; zero
    where the other lacks one. Queries that neither has would be differences of zero, and hide a loss among them."""
    before, now = old.seen[measure], new.seen[measure]
    return {
        query: (before.get(query, 0.0), now.get(query, 0.0)) for query in old.qrels if query in before or query in now
    }


class Sums:
    """Measures of queries, fed with whole queries."""

    def __init__(self, measures: Sequence["ir_measures.Measure"], qrels: Qrels) -> None:
        self._measures, self.qrels, self._ids = measures, qrels, pa.array(list(qrels), pa.string())
        self.seen: Values = {str(measure): {} for measure in measures}
        self._run: Run = {}
        self._rows = 0

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
        """Evaluate what was added."""
        if self._run:
            qrels = {query_id: self.qrels[query_id] for query_id in self._run}
            for result in ir_measures.iter_calc(list(self._measures), qrels, self._run):
                self.seen[str(result.measure)][result.query_id] = float(result.value)
        self._run, self._rows = {}, 0

    def whole(self) -> Values:
        """The values of all queries that were added."""
        self.calculate()
        return self.seen

    def take(self, seen: Values) -> None:
        """Values of other queries."""
        for name, values in seen.items():
            self.seen[name] |= values

    @property
    def queries(self) -> int:
        """Judged queries that were added."""
        return max(map(len, self.seen.values()), default=0)

    @property
    def by_query(self) -> Values:
        """Of all queries of the qrels, in their order; those that the run does not have are zero."""
        zeros = dict.fromkeys(self.qrels, 0.0)
        return {name: zeros | values for name, values in self.seen.items()}

    def means(self) -> dict[str, float]:
        """Over all queries of the qrels. The sum is exact, so in whatever order they came it is the same."""
        return {name: fsum(values.values()) / len(self.qrels) for name, values in self.seen.items()}


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
            grade, known = int(value), qrels.setdefault(query_id, {})
            if abs(grade) > MOST_GRADE:
                raise ValueError
            if known.setdefault(document, grade) != grade:
                raise InputError(
                    f"{path}: line {number}: judges document {document!r} of query {query_id!r} a second time, "
                    f"{grade} after {known[document]}; expected one judgement; drop one"
                )
        except (ValueError, IndexError):
            expected = "query-id, corpus-id, score with tabs" if beir else "qid 0 docid relevance, a whole number"
            raise InputError(f"{path}: line {number}: found {line[:80]!r}, expected {expected}") from None
    if not qrels:
        raise InputError(f"{path}: no judgements; expected TREC qrels (qid 0 docid rel) or a BEIR TSV with a header")
    return qrels
