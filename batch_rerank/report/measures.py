"""Judged quality before and after reranking, for a report: means, the interval of the change, and who won."""

from typing import Any

import numpy as np

from batch_rerank.errors import InputError
from batch_rerank.judge.compare import bootstrap
from batch_rerank.judge.evaluate import DEFAULT_MEASURES, evaluate
from batch_rerank.publish.output import Place

EVEN = 1e-9

Json = dict[str, Any]


def measures_of(place: Place, qrels: str) -> Json:
    """Measures over the queries of some judgements; `problem` where they say nothing of this output: it is not
    finished, or has none of their queries. Raises InputError where the judgements cannot be read, and StorageError."""
    from batch_rerank.judge.evaluate import read_qrels

    judged = read_qrels(qrels)
    told: Json = {"qrels": qrels, "queries": len(judged)}
    try:
        found = evaluate(place, qrels)
    except InputError as error:
        return {**told, "problem": str(error)[:600]}
    told["missing"] = found.queries_missing
    if found.queries_missing == found.queries:
        return {
            **told,
            "problem": f"the output has none of the {found.queries:,} judged queries, so nothing is measured",
        }
    rows = []
    for name in DEFAULT_MEASURES:
        before, after = (np.array(list(one[name].values())) for one in (found.before_by_query, found.after_by_query))
        change = after - before
        low, high = bootstrap(change)
        rows.append(
            {
                "measure": name,
                "before": found.before[name],
                "after": found.after[name],
                "low": low,
                "high": high,
                "better": int((change > EVEN).sum()),
                "worse": int((change < -EVEN).sum()),
                "even": int((np.abs(change) <= EVEN).sum()),
            }
        )
    if found.deeper:
        told["cut"] = f"{', '.join(found.deeper)}: deeper than output.top_k: {found.top_k}; what was cut is not found"
    if not any(row["before"] or row["after"] for row in rows):
        told["problem"] = "no judged document is among the candidates of the judged queries: every measure is 0"
    return {**told, "rows": rows}
