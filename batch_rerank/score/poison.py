"""Pairs that make the engine raise: found by halving, so that one bad pair costs a row and not its unit."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from batch_rerank.engine.encoded import Encoded
from batch_rerank.engine.packing import Float32
from batch_rerank.errors import ModelError

log = logging.getLogger("batch_rerank")

MOST_POISON = 16
"""Pairs of one unit that may raise, or of a bi-encoder texts. More of them are no bad pairs but a bad unit, or a bad
engine."""


class PoisonedUnitError(Exception):
    """So many pairs of a unit raise that it is set aside as a whole."""


class DeviceLostError(Exception):
    """The device has failed for good: only a new process can go on."""


@dataclass
class Trial:
    """What is known about a unit's pairs: ranges still to score, and the error of each pair that raised."""

    todo: list[tuple[int, int]]
    errors: dict[int, str] = field(default_factory=dict)

    @staticmethod
    def of(encoded: Encoded) -> "Trial":
        """Nothing is known yet."""
        return Trial([(0, len(encoded.document))])


def score_around(
    score: Callable[[Encoded], Float32],
    encoded: Encoded,
    trial: Trial | None,
    device_lost: Callable[[], bool],
    by_text: bool = False,
    alone: bool = True,
    most: int = MOST_POISON,
    all_may: bool = False,
) -> tuple[Float32, dict[int, str]]:
    """Score a unit without the pairs that raise: float32[n_pairs], NaN for those, and their errors by pair.

    `trial` is what an earlier try left, and what this one leaves where the device is lost. `by_text`: a bi-encoder's
    texts raise, and one text may take all pairs of its query with it. `alone`: else a lost device says nothing about
    these pairs, and they are tried again. Raises PoisonedUnitError for more than
    `most` such pairs or texts, or for all pairs unless they `all_may` raise (others of their unit are known to be
    good); ModelError where those fail in the model's own checks; and DeviceLostError.
    """
    n = len(encoded.document)
    trial = trial or Trial.of(encoded)
    scores = np.full(n, np.nan, np.float32)
    scored: list[tuple[int, int]] = []
    while trial.todo:
        start, stop = trial.todo.pop()
        if start == stop:  # a unit without a pair to score: its texts are all null
            continue
        try:
            scores[start:stop] = score(encoded if stop - start == n else encoded.part(start, stop))
            scored.append((start, stop))
        except Exception as error:
            lost = device_lost()
            if lost and not alone:
                trial.todo.append((start, stop))
            else:
                _divide(trial, start, stop, error)
            if lost:
                trial.todo += scored  # their scores die with this process
                raise DeviceLostError(trial.errors.get(start) or _name(error)) from error
            causes = _texts(encoded, trial.errors) if by_text else len(trial.errors)
            all_raised = len(trial.errors) == n and causes > 1 and not all_may
            if causes > most or all_raised:
                if isinstance(error, ModelError):
                    raise
                raise PoisonedUnitError(f"{len(trial.errors)} pairs raised, the last of them {_name(error)}") from error
    return scores, trial.errors


def _texts(encoded: Encoded, raised: Iterable[int]) -> int:
    """How many texts explain that these pairs raise: the one that most of them have, then the one that most of the
    others have, and so on."""
    pairs = np.fromiter(raised, np.int64)
    queries = encoded.prefix[encoded.group_of_pair()[pairs]].astype(np.int64)
    texts = np.stack([queries, -1 - encoded.document[pairs]])  # a query and a document are two texts
    count = 0
    while texts.size:
        found, often = np.unique(texts, return_counts=True)
        texts = texts[:, (texts != found[often.argmax()]).all(0)]
        count += 1
    return count


def _divide(trial: Trial, start: int, stop: int, error: Exception) -> None:
    if stop - start == 1:
        log.warning("pair %d of its unit raises: %s", start, _name(error))
        trial.errors[start] = f"engine: {_name(error)}"
        return
    middle = (start + stop) // 2
    trial.todo += [(middle, stop), (start, middle)]


def _name(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
