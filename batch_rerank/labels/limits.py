"""What may be left out of an export, and what ends it."""

from collections.abc import Mapping

from batch_rerank.errors import InputError
from batch_rerank.labels.plan import Prepared


def refuse_missing(prepared: Prepared, counts: Mapping[str, int]) -> None:
    """Raise InputError where more candidates than may be have no score of another teacher."""
    teachers, missing = prepared.labels.teachers, counts.get("teachers_missing", 0)
    scored = counts.get("teachers_wanted", 0)
    if teachers is not None and missing > teachers.max_missing * scored:
        raise InputError(
            f"labels.teachers: {missing:,} of {scored:,} scored candidates of {prepared.output.manifest.root} have no "
            f"score of another teacher, or one of another text ({counts.get('teachers_extra', 0):,} of theirs are no "
            "candidates here); expected outputs over the same candidates; set labels.teachers.max_missing to leave out "
            "a share of them"
        )


def refuse_left_out(prepared: Prepared, counts: Mapping[str, int]) -> None:
    """Raise InputError where more queries are left out than may be, or all are."""
    labels, queries = prepared.labels, counts.get("queries", 0)
    gone = {name.removeprefix("left out: "): n for name, n in counts.items() if name.startswith("left out: ") and n}
    said = ", ".join(f"{count:,} {name}" for name, count in gone.items()) or "it has no query with candidates"
    left_out = sum(gone.values())
    first, last = labels.negatives.ranks
    hint = (
        f"labels.negatives.ranks [{first}, {last}], per_query {labels.negatives.per_query} and least {labels.least}, "
        "labels.positives and labels.false_negatives decide it; batch-rerank export --dry-run shows what drops what"
    )
    if counts.get("labelled_queries", 0) == 0:
        raise InputError(f"{prepared.output.manifest.root}: no query has labels: {said}; {hint}")
    if left_out > labels.max_dropped_queries * queries:
        raise InputError(
            f"{prepared.output.manifest.root}: {left_out:,} of {queries:,} queries would be left out ({said}), and at "
            f"most {labels.max_dropped_queries:.2%} may be (labels.max_dropped_queries); {hint}"
        )
