"""What scoring some pairs takes: tokens that go through a model, and the arithmetic of that. Counted from token ids and
config.json alone, so a plan can know before a run what the run will count. No torch here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from batch_rerank.engine.architecture import looks_both_ways
from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.engine.checkpoint_files import matrix_parameters, read_json
from batch_rerank.engine.encoded import Encoded
from batch_rerank.engine.packing import distinct_pairs, prefix_of, unreadable


@dataclass(frozen=True)
class Work:
    """tokens: that a model computes, padding aside; flop: of their matrix products and attention, multiplications and
    additions counted apart, as accelerators' rates are."""

    tokens: int = 0
    flop: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.tokens + other.tokens, self.flop + other.flop)


@dataclass(frozen=True)
class Arithmetic:
    """Of one model. per_token: FLOP of the matrices; per_key: FLOP for each token that a token attends to, in all
    layers; shared: whether pairs of a query share their prefix; causal: whether a token attends to what is before it
    only; distinct: whether equal pairs are computed once."""

    per_token: float
    per_key: float
    shared: bool
    causal: bool
    distinct: bool = True

    @staticmethod
    def of(spec: ModelSpec) -> "Arithmetic":
        """Of a model whose small files are on this machine; without its weights' headers the matrices are unknown and
        `per_token` is 0."""
        if spec.kind == "checksum":
            return Arithmetic(0.0, 0.0, shared=True, causal=True, distinct=False)
        config = read_json(Path(spec.directory) / "config.json")
        both_ways = looks_both_ways(config)
        decoder = spec.causal is not None
        try:
            matrices = matrix_parameters(Path(spec.directory))
        except (KeyError, TypeError, ValueError):
            matrices = 0
        return Arithmetic(
            per_token=2.0 * matrices,
            per_key=_per_key(config),
            shared=decoder and not both_ways,
            causal=decoder and not both_ways,
        )

    def of_pairs(self, encoded: Encoded) -> Work:
        """Of a cross-encoder: each distinct pair once and, where it is shared, each prefix once."""
        n_pairs = len(encoded.document)
        pairs = np.unique(distinct_pairs(encoded)) if self.distinct else np.arange(n_pairs)
        pairs = pairs[~unreadable(encoded, texts=False)[pairs]]
        prefixes = prefix_of(encoded, pairs)
        total = encoded.n_tokens[pairs].astype(np.float64)
        head = np.diff(encoded.offsets)[prefixes].astype(np.float64)
        if not self.shared:
            return Work(int(total.sum()), self._flop(total.sum(), (total * total).sum()))
        # a prefix is cut at what the longest pair uses of it: where nothing else fits, n_tokens is shorter
        head = np.minimum(head, total)
        own = total - head
        _, first = np.unique(prefixes, return_index=True)
        keys = (own * (head + own / 2)).sum() + (head[first] ** 2 / 2).sum()
        tokens = own.sum() + head[first].sum()
        return Work(int(tokens), self._flop(tokens, keys))

    def of_texts(self, lengths: npt.NDArray[np.integer]) -> Work:
        """Of a bi-encoder: `lengths` are those of the texts that it reads (packing.read_segments)."""
        n = lengths.astype(np.float64)
        keys = (n * n).sum() / (2 if self.causal else 1)
        return Work(int(n.sum()), self._flop(n.sum(), keys))

    def _flop(self, tokens: float, keys: float) -> float:
        """0 where the matrices are not known: attention alone would be a small part of it."""
        if not self.per_token:
            return 0.0
        return float(self.per_token * tokens + self.per_key * keys)


def _per_key(config: dict[str, Any]) -> float:
    """FLOP of attention for a token and one that it attends to: two products of a head's width, in each head and
    layer. 0 where the config does not say its shape."""
    try:
        layers, heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
        width = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return 0.0
    return 4.0 * layers * heads * width
