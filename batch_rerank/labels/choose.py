"""Which documents of a query become labels: positives, and negatives in an order of which every beginning is fair.

Arrays in, arrays out; what is drawn comes in as numbers that are a hash of the seed and the query's id, so a query's
labels are the same whatever stands around it.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from batch_rerank.label_settings import Labels

Int64 = npt.NDArray[np.int64]
Int8 = npt.NDArray[np.int8]
Float64 = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]
UInt64 = npt.NDArray[np.uint64]

POSITIVE, NEGATIVE = 1, 2

DOCUMENT_REASONS = (
    "",
    "no score",
    "a teacher has no score",
    "empty text",
    "teachers disagree",
    "false negative",
    "text of a positive",
)
"""Why a document is dropped, by number."""

NO_SCORE, TEACHER_LACKS, EMPTY_TEXT, DISAGREE, FALSE_NEGATIVE, SAME_TEXT = range(1, 7)

QUERY_REASONS = ("", "no scores", "all scores equal", "no positive", "too few negatives")
"""Why a whole query is left out, by number."""

UNSCORED, EQUAL_SCORES, NO_POSITIVE, TOO_FEW = range(1, 5)


@dataclass(frozen=True)
class Scored:
    """Rows of whole queries. query int64[n], which query each is of, rising from 0; score float64[n], NaN where there
    is none; probability float64[n], or None where the scores have no such map; rank int64[n] of the teacher's order
    from 1; grade int64[n], -1 where not judged; reason int8[n], why a row is no candidate, else 0; text int64[n], equal
    where texts are, or None where they are not known; draws uint64[n_queries, 2]; odds: what a score is longer by than
    log-odds."""

    query: Int64
    score: Float64
    probability: Float64 | None
    rank: Int64
    grade: Int64
    reason: Int8
    text: Int64 | None
    draws: UInt64
    odds: float = 1.0


@dataclass(frozen=True)
class Choice:
    """rows int64[n_chosen], by query, positives before negatives, each in the order of its list; role int8[n], POSITIVE
    or NEGATIVE or 0; reason int8[n] of documents that are dropped; query_reason int8[n_queries] of queries that are;
    positive float64[n_queries], the score that false negatives are held against; low and high float64[n_queries], the
    least and the greatest score; eligible int64[n_queries], candidates that negatives were drawn from."""

    rows: Int64
    role: Int8
    reason: Int8
    query_reason: Int8
    positive: Float64
    low: Float64
    high: Float64
    eligible: Int64
    pool: Bool = field(repr=False)


def draws_of(query_ids: Iterable[str], seed: int) -> UInt64:
    """uint64[n, 2]: two numbers that are drawn for each query."""
    key = seed.to_bytes(8, "little")
    found = b"".join(hashlib.blake2b(one.encode(), digest_size=16, key=key).digest() for one in query_ids)
    return np.frombuffer(found, "<u8").astype(np.uint64).reshape(-1, 2)


def choose(rows: Scored, labels: Labels) -> Choice:
    """Choose the positives and negatives of every query."""
    queries = len(rows.draws)
    order = np.lexsort((rows.rank, rows.query))
    usable = rows.reason == 0
    low, high = _extremes(rows, usable, queries)
    reason = rows.reason.copy()
    positive, again = _positives(rows, labels, usable, order)
    reason[again] = SAME_TEXT
    judged = rows.grade >= labels.positives.least
    least, share = _of_positives(rows, positive, queries)
    first, last = labels.negatives.ranks
    within = (rows.rank >= first) & (rows.rank <= (np.iinfo(np.int64).max if last is None else last))
    relevant = judged if labels.positives.source != "teacher" else np.zeros(len(judged), np.bool_)
    pool = usable & within & ~positive & ~relevant
    reason[pool & too_good(rows, labels, least, share)] = FALSE_NEGATIVE
    if rows.text is not None:
        reason[pool & (reason == 0) & _texts_of(rows, positive | relevant)] = SAME_TEXT
    fair = pool & (reason == 0)
    eligible = np.bincount(rows.query[fair], minlength=queries)
    taken = np.minimum(eligible, labels.negatives.per_query)
    has_positive = np.bincount(rows.query[positive], minlength=queries) > 0
    query_reason = np.zeros(queries, np.int8)
    query_reason[taken < labels.least] = TOO_FEW
    query_reason[~has_positive] = NO_POSITIVE
    query_reason[low == high] = EQUAL_SCORES
    query_reason[np.bincount(rows.query[usable], minlength=queries) == 0] = UNSCORED
    good = query_reason[rows.query] == 0
    sample = order[(fair & good)[order]]
    chosen, place = _strata(rows, sample, eligible, taken)
    best = np.flatnonzero(positive & good)
    best = best[np.lexsort((rows.rank[best], ~relevant[best], rows.query[best]))]
    role = np.zeros(len(rows.query), np.int8)
    role[best], role[chosen] = POSITIVE, NEGATIVE
    both = np.concatenate([best, chosen])
    places = np.concatenate([_within_query(rows.query[best]), place])
    listed = both[np.lexsort((places, role[both], rows.query[both]))]
    return Choice(listed, role, reason, query_reason, least, low, high, eligible, pool)


def too_good(rows: Scored, labels: Labels, least: Float64, share: Float64 | None) -> Bool:
    """bool[n]: what may be a relevant document, by the filter of the settings. Judged documents are believed.

    A margin is a difference of log-odds, and a share is one of probabilities: both mean the same below zero as above.
    """
    limits, suspect = labels.false_negatives, np.zeros(len(rows.query), np.bool_)
    with np.errstate(invalid="ignore"):
        if limits.margin is not None:
            suspect = rows.score > (least - limits.margin * rows.odds)[rows.query]
        if limits.share is not None:
            assert rows.probability is not None and share is not None, "checked before anything is read"
            suspect = rows.probability > (limits.share * share)[rows.query]
    return np.asarray(suspect & (rows.grade < 0), np.bool_)


def _extremes(rows: Scored, usable: Bool, queries: int) -> tuple[Float64, Float64]:
    low, high = np.full(queries, np.inf), np.full(queries, -np.inf)
    np.minimum.at(low, rows.query[usable], rows.score[usable])
    np.maximum.at(high, rows.query[usable], rows.score[usable])
    return low, high


def _positives(rows: Scored, labels: Labels, usable: Bool, order: Int64) -> tuple[Bool, Bool]:
    """The first `per_query` of each query: judged ones, then the teacher's best above the floor; and those that have
    the text of an earlier one."""
    given, source = labels.positives, labels.positives.source
    none = np.zeros(len(rows.query), np.bool_)
    judged = usable & (rows.grade >= given.least) if source != "teacher" else none
    floor = -np.inf if given.floor is None else given.floor
    own = none
    if source != "qrels":
        with np.errstate(invalid="ignore"):
            # of those that are judged to be irrelevant none is taken on the teacher's word
            own = usable & ~judged & (rows.score >= floor) & ~((rows.grade >= 0) & (source == "both"))
    found, again = none.copy(), none.copy()
    listed = order[(judged | own)[order]]
    listed = listed[np.lexsort((rows.rank[listed], own[listed], rows.query[listed]))]
    if rows.text is not None:
        _, first = np.unique(_text_keys(rows, rows.text)[listed], return_index=True)
        twice = np.delete(np.arange(len(listed)), first)
        again[listed[twice]] = True
        listed = np.delete(listed, twice)
    found[listed[_within_query(rows.query[listed]) < given.per_query]] = True
    return found, again


def _of_positives(rows: Scored, positive: Bool, queries: int) -> tuple[Float64, Float64 | None]:
    """The least score and the least probability of each query's positives: what is held against all of them."""
    least, share = np.full(queries, np.inf), np.full(queries, np.inf)
    np.minimum.at(least, rows.query[positive], rows.score[positive])
    if rows.probability is None:
        return least, None
    np.minimum.at(share, rows.query[positive], rows.probability[positive])
    return least, share


def _texts_of(rows: Scored, good: Bool) -> Bool:
    """bool[n]: rows with the text of a positive or of a relevant document of their query, be it chosen, scored or
    not."""
    assert rows.text is not None
    keys = _text_keys(rows, rows.text)
    return np.isin(keys, keys[good])


def _text_keys(rows: Scored, text: Int64) -> Int64:
    """int64[n], equal where a query's texts are."""
    return np.asarray(rows.query * (int(text.max(initial=0)) + 2) + text, np.int64)


def _within_query(query: Int64) -> Int64:
    """0, 1, … within each run of equal numbers."""
    if not len(query):
        return np.empty(0, np.int64)
    starts = np.flatnonzero(np.diff(query, prepend=query[0] - 1))
    lengths = np.diff(np.append(starts, len(query)))
    return np.asarray(np.arange(len(query)) - np.repeat(starts, lengths), np.int64)


def _strata(rows: Scored, sample: Int64, eligible: Int64, taken: Int64) -> tuple[Int64, Int64]:
    """`taken` of each query's `eligible` rows, which `sample` has by rank, and their places in the list.

    Systematic sampling (W. G. and L. H. Madow, 1944): of m rows the n whose strata, m/n ranks wide, begin at a drawn
    rank: each row is taken with probability n/m, and every part of the ranks has its share. The strata come in the
    order of reversed bits (van der Corput, 1935), turned by a drawn number: the first k of a list are spread over all
    ranks as well, and each row is among them with probability k/m.
    """
    query = rows.query[sample]
    number, most, wanted = _within_query(query), eligible[query], taken[query]
    first, second = (rows.draws[query, column] for column in (0, 1))
    offset = (first % np.maximum(most, 1).astype(np.uint64)).astype(np.int64)
    before = (number * wanted + offset) // np.maximum(most, 1)
    stratum = ((number + 1) * wanted + offset) // np.maximum(most, 1)
    here = stratum > before
    turn = (second % np.maximum(wanted, 1).astype(np.uint64)).astype(np.int64)
    turned = (before + turn) % np.maximum(wanted, 1)
    place = np.zeros(len(sample), np.int64)
    for size in np.unique(wanted[here]).tolist():
        of_size = wanted == size
        place[of_size] = _reversed_places(size)[turned[of_size]]
    return sample[here], place[here]


def _reversed_places(size: int) -> Int64:
    """int64[size]: where each of 0, …, size-1 comes when they are sorted by their reversed bits."""
    bits = max(1, (size - 1).bit_length())
    numbers = np.arange(size)
    keys = sum(((numbers >> bit) & 1) << (bits - 1 - bit) for bit in range(bits))
    places = np.empty(size, np.int64)
    places[np.argsort(keys)] = numbers
    return places
