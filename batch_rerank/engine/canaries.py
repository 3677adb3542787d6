"""The pairs that a loaded model is tried on, and how the scores of two ways to compute them are compared.

A fault shows where texts differ in what it breaks: positions beyond 511, keys more than 256 tokens back, documents
after the fortieth, groups of one beside groups of many. So there are long texts with their answer far from the end or
from the beginning, in which nothing repeats, and groups of 1, 2, 3, 4 and 48 documents.
"""

import random
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.engine.encoded import Encoded, Group
from batch_rerank.engine.known import PLANETS
from batch_rerank.engine.packing import Float32, Index, own_tokens

SHORT = (
    PLANETS,
    Group(
        "read a file line by line",
        (
            "def lines(path):\n    with open(path) as file:\n        yield from file\n",
            "",
            "Größe, naïve, 🙂",
            "close it",
        ),
    ),
    Group("what does a cat drink", ("milk and water",)),
    Group(
        "北京在哪里？",
        (
            "中国的首都是北京。",
            "x <|im_end|>\n</s> [SEP] {query} {document}",
            "\n\n1,234.5 €\r\n\tSumme ",
            "The river rises in the hills behind the town and runs past it to the sea, as rivers do. " * 3,
        ),
    ),
    Group("the capital of France", ("Paris", "It rises in the hills.")),
)
"""Pairs of several lengths, scripts and shared prefixes."""

MANY = Group(
    "a small red animal",
    tuple(
        f"{kind} {animal}"
        for kind in ("old", "wet", "sad", "red", "big", "shy")
        for animal in ("cat", "fox", "owl", "hen", "cow", "bee", "ant", "dog")
    ),
)
"""The slow path reads the first SEEN[0] and the last SEEN[1] of these; the fast path all, in two arrangements."""

SEEN = 4, 8
LONG_TOKENS = 600, 2000
WORDS = "day river house and of green letter small engine north bread seven under glass where paper field old is music"


@dataclass(frozen=True)
class Canaries:
    """groups: queries with their documents; judged: int64[n], the pairs that the slow path reads too."""

    groups: tuple[Group, ...]
    judged: Index

    def turned(self) -> tuple[Group, ...]:
        """The same pairs in reverse order, without the last and longest one."""
        last = self.groups[-1]
        groups = (*self.groups[:-1], Group(last.query, last.documents[:-1]))
        return tuple(Group(group.query, group.documents[::-1]) for group in groups[::-1])

    def judged_texts(self) -> list[tuple[str, str]]:
        """(query, document) of the pairs that are judged."""
        texts = [(group.query, document) for group in self.groups for document in group.documents]
        return [texts[pair] for pair in self.judged]


def canaries(tokenizer: Tokenizer, max_length: int) -> Canaries:
    """The canaries of a model; its tokenizer, which neither pads nor truncates, says how long the long ones are."""
    near = _filler(tokenizer, 0, min(LONG_TOKENS[0], 2 * max_length // 3))  # leaves room for the answer behind it
    far = _filler(tokenizer, 1, min(LONG_TOKENS[1], max_length))
    answer = PLANETS.documents[1]
    groups = (*SHORT, MANY, Group(PLANETS.query, (f"{near} {answer}", "Mars", f"{answer} {far}")))
    before = sum(len(group.documents) for group in SHORT)
    after = before + len(MANY.documents)
    judged = [*range(before + SEEN[0]), *range(after - SEEN[1], after + 3)]
    return Canaries(groups, np.array(judged, np.int64))


def _filler(tokenizer: Tokenizer, seed: int, tokens: int) -> str:
    """So many tokens of words in an order that does not come back."""
    text = " ".join(random.Random(seed).choices(WORDS.split(), k=tokens))
    offsets = tokenizer.encode(text, add_special_tokens=False).offsets
    return text[: offsets[min(tokens, len(offsets)) - 1][1]]


def few_tokens(encoded: Encoded) -> int:
    """A token budget under which the largest group needs three packs or more."""
    group = int(np.diff(encoded.starts).argmax())
    pairs = np.arange(encoded.starts[group], encoded.starts[group + 1])
    prefix = len(encoded.segment(int(encoded.prefix[group])))
    return prefix + sum(map(len, own_tokens(encoded, pairs))) // 3


@dataclass(frozen=True)
class Limits:
    """The largest and the mean difference that rounding explains, both of numbers up to 1 or, if `relative`, relative
    to larger ones."""

    most: float
    mean: float
    relative: bool

    def judge(self, ours: Float32, theirs: Float32) -> tuple[bool, str]:
        """Whether two computations of the same scores agree, and what was seen."""
        difference = np.abs(ours - theirs)
        judged = difference / self.scale(theirs)
        seen = (
            f"{difference.max():.1e} at most, {difference.mean():.1e} on average; "
            f"allowed {self.most:.2g} and {self.mean:.2g}"
        )
        return bool(judged.max() <= self.most and judged.mean() <= self.mean), seen

    def scale(self, scores: Float32) -> Float32:
        """float32[n]: what the limits are multiplied with."""
        return np.maximum(np.float32(1), np.abs(scores)) if self.relative else np.ones_like(scores)


MOST_OF_SPREAD, MEAN_OF_SPREAD = 0.25, 0.08
"""Of the standard deviation of the scores. bf16 moved those of 108 random models by 0.17 at most and 0.05 on average,
whatever the deviation was."""


def limits(spec: ModelSpec, spread: float | None) -> Limits:
    """spread: standard deviation of the scores in the slow path, None where they are too few or too much alike."""
    exact = spec.dtype == "float32"
    if spec.kind == "bi_encoder":
        most, mean = (1e-5, 1e-5) if exact else (0.05, 0.02)
    else:
        most, mean = (1e-4, 1e-4) if exact else (0.25, 0.1)
    if spread is not None:
        most, mean = min(most, MOST_OF_SPREAD * spread), min(mean, MEAN_OF_SPREAD * spread)
    # float32's error grows with the number; bf16's limits are wide enough as they are
    return Limits(most, mean, relative=exact)


LEAST_CORRELATION = 0.9


def order(fast: Float32, slow: Float32, group: npt.NDArray[np.integer], allowed: Limits) -> tuple[bool, str]:
    """Whether two computations order the pairs of each query alike, and what was seen: no two that the slow one puts
    further apart than is allowed stand the other way round, and the differences within queries correlate.

    fast, slow: float32[n]; group: integer[n], the query of each.
    """
    apart = (group[:, None] == group) & (slow[:, None] - slow > allowed.most * allowed.scale(slow)[:, None])
    turned = int((apart & (fast[:, None] <= fast)).sum())
    correlation = float(np.corrcoef(_centred(fast, group), _centred(slow, group))[0, 1])
    seen = (
        f"{turned} of {int(apart.sum())} pairs of documents stand the other way round; "
        f"correlation within queries {correlation:.4f}, at least {LEAST_CORRELATION}"
    )
    return turned == 0 and correlation >= LEAST_CORRELATION, seen


def moved(fast: Float32, slow: Float32, group: npt.NDArray[np.integer]) -> str:
    """What another computation changes: how far scores move on the scale of their spread, and how many of the pairs of
    documents of a query stand the other way round, near ones too. Arguments as in `order`."""
    difference, spread = np.abs(fast - slow), float(slow.std())
    apart = (group[:, None] == group) & (slow[:, None] > slow)
    turned = int((apart & (fast[:, None] <= fast)).sum())
    return (
        f"scores move by {difference.max() / spread:.2g} of their standard deviation at most and "
        f"{difference.mean() / spread:.2g} on average, and {turned} of {int(apart.sum())} pairs of documents are turned"
    )


def _centred(scores: Float32, group: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    _, of = np.unique(group, return_inverse=True)
    return scores - (np.bincount(of, scores) / np.bincount(of))[of]
