"""Encoded groups to float32 scores.

`Scorer` is the one interface between a job and a model: a unit's groups go in, one score a pair comes out, in order.
How pairs are batched inside is the scorer's business and never changes a score beyond the dtype's tolerance.
"""

import hashlib
import itertools
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.engine.encoded import Encoded, Int32, lengths_of
from batch_rerank.engine.packing import Float32, Ids, Index, distinct_pairs, read_segments, unreadable
from batch_rerank.errors import ConfigError, ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from batch_rerank.engine.memory import Fetch, TokenBudget
    from batch_rerank.engine.models import ClassificationModel, DecoderModel, EmbeddingModel, Forward

VECTOR_CACHE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Result:
    """Scores that are on their way: called, it waits for them and gives float32[n_pairs]. texts: int32[n], tokens of
    each text that a bi-encoder reads for them; None for other kinds."""

    wait: Callable[[], Float32]
    texts: Int32 | None = None

    def __call__(self) -> Float32:
        """float32[n_pairs]."""
        return self.wait()


class Scorer(Protocol):
    """Scores the pairs of encoded groups."""

    @property
    def network(self) -> "PreTrainedModel | None":
        """The loaded model, for the self-test's slow path; None where there is none."""
        ...

    @property
    def fallback(self) -> str | None:
        """Why batches are padded, or packed without the fastest kernels; None where nothing is wanting."""
        ...

    @property
    def packed(self) -> bool:
        """Whether sequences are packed end to end."""
        ...

    @property
    def token_budget(self) -> int | None:
        """Tokens of one batch as of now, None where nothing is batched."""
        ...

    def start(self, encoded: Encoded, begun: Callable[[], None] = lambda: None) -> Result:
        """Begin to score, without waiting for the device: what is returned waits, so that one unit can be packed while
        another computes. `begun` is called before the first batch, and may be before others. Both raise what `score`
        raises."""
        ...

    def score(self, encoded: Encoded) -> Float32:
        """float32[n_pairs], in the order of the groups and their documents: raw logit, log-odds or cosine; NaN for a
        pair that the device's memory is too small for, and for one without a token (`unreadable`). Raises ModelError
        where the model gives NaN or infinity."""
        ...

    def forget(self) -> None:
        """Drop what is remembered of texts: after a self-test, whose texts are no job's."""
        ...

    def under(self, token_budget: int) -> "Scorer":
        """The same loaded model with batches of at most `token_budget` tokens; it remembers nothing of this one."""
        ...


def make_scorer(
    spec: ModelSpec, device: str = "cpu", token_budget: int | None = None, forward: "Forward" = "auto"
) -> Scorer:
    """Load a model as a scorer. `token_budget`: tokens of one batch, None to choose by free memory. `forward`: packed
    where the model, device and dtype allow it (auto), or one of packed and padded insisted on.

    float8 on a CPU is emulated, for tests; `resolve_model` refuses it there.

    Raises ModelError (the checkpoint does not load completely) and ConfigError (the device is absent or lacks the
    dtype).
    """
    if spec.kind == "checksum":
        return ChecksumScorer()
    import torch  # not at the top: an actor of the checksum kind does without it

    from batch_rerank.engine.memory import TokenBudget, choose_budget
    from batch_rerank.engine.models import causal_model, classification_model, embedding_model

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            "CUDA is asked for, but torch sees no GPU here; set cluster.gpus_per_actor: 0 to score on the CPU"
        )
    if device.startswith("cuda") and spec.dtype in ("bfloat16", "float8"):
        _refuse_dtype(spec.dtype, device)
    kinds: dict[str, Any] = {
        "causal": causal_model,
        "sequence_classification": classification_model,
        "bi_encoder": embedding_model,
    }
    model = kinds[spec.kind](spec, device, forward)
    budget = TokenBudget(token_budget or choose_budget(model.model, device))
    return BiEncoderScorer(model, budget) if spec.kind == "bi_encoder" else PairScorer(model, budget)


def _refuse_dtype(dtype: str, device: str) -> None:
    """Raise ConfigError where a GPU has no bfloat16 or no float8."""
    import torch

    if torch.version.hip is not None:
        if dtype == "float8":
            raise ConfigError("model.dtype: found float8, but this is a ROCm build of torch; set bfloat16")
        return
    found = torch.cuda.get_device_capability(device)  # torch's own check counts a slow emulation as support
    needed, other = {"bfloat16": ((8, 0), "float16 or float32"), "float8": ((8, 9), "bfloat16")}[dtype]
    if found < needed:
        raise ConfigError(
            f"model.dtype: found {dtype}, but this GPU (compute capability {found[0]}.{found[1]}) has none; set {other}"
        )


def relevance(spec: ModelSpec, scores: Float32) -> Float32 | None:
    """float32[n] in 0..1: the sigmoid of the scaled scores, or None where the model defines no such map."""
    if spec.relevance == "none":
        return None
    logits = np.clip(
        scores.astype(np.float64) / spec.relevance_scale, -500, 500
    )  # exp overflows beyond 709; float32 sees no difference
    return np.asarray(1 / (1 + np.exp(-logits)), np.float32)


class PairScorer:
    """One score a distinct pair: causal and sequence-classification models."""

    def __init__(self, model: "DecoderModel | ClassificationModel", budget: "TokenBudget") -> None:
        self._model, self._budget = model, budget
        self.network, self.fallback, self.packed = model.model, model.fallback, model.packed

    @property
    def token_budget(self) -> int:
        """See Scorer."""
        return self._budget.tokens

    def start(self, encoded: Encoded, begun: Callable[[], None] = lambda: None) -> Result:
        """See Scorer."""
        representative = distinct_pairs(encoded)

        def compute(batch: Index) -> "torch.Tensor":
            begun()
            return self._model.scores(encoded, batch)

        fetch = self._budget.start(
            np.unique(representative[~unreadable(encoded, texts=False)]),
            lambda pending, tokens: self._model.split(encoded, pending, tokens),
            compute,
        )

        def result() -> Float32:
            pairs, computed = fetch()
            scores = np.full(len(representative), np.nan, np.float32)
            scores[pairs] = _finite(computed, "pairs")
            return scores[representative]

        return Result(result)

    def score(self, encoded: Encoded) -> Float32:
        """See Scorer."""
        return self.start(encoded)()

    def forget(self) -> None:
        """See Scorer."""

    def under(self, token_budget: int) -> "PairScorer":
        """See Scorer."""
        from batch_rerank.engine.memory import TokenBudget

        return PairScorer(self._model, TokenBudget(token_budget))


class BiEncoderScorer:
    """One vector a distinct text; a score is the dot product of two, the cosine where they are normalised.

    The vectors of the latest texts are kept, up to VECTOR_CACHE_BYTES: a first stage finds the same documents for many
    queries (the demo's 10,000 pairs hold 3,300 documents).
    """

    def __init__(self, model: "EmbeddingModel", budget: "TokenBudget") -> None:
        self._model, self._budget = model, budget
        self.network, self.fallback, self.packed = model.model, model.fallback, model.packed
        self._cache: dict[bytes, Float32] = {}
        self._remembering = threading.Lock()

    @property
    def token_budget(self) -> int:
        """See Scorer."""
        return self._budget.tokens

    def start(self, encoded: Encoded, begun: Callable[[], None] = lambda: None) -> Result:
        """See Scorer."""
        queries = encoded.prefix[encoded.group_of_pair()]
        readable = np.flatnonzero(~unreadable(encoded, texts=True))
        keys: dict[int, bytes] = {}
        known: dict[bytes, Float32] = {}
        new: dict[bytes, Ids] = {}
        for index in read_segments(encoded).tolist():
            ids = encoded.segment(index)
            key = keys[index] = hashlib.blake2b(np.ascontiguousarray(ids).data, digest_size=16).digest()
            vector = self._cache.get(key)
            if vector is None:
                new[key] = ids
            else:
                known[key] = vector
        fetch = self._embed(list(new.values()), begun)

        def result() -> Float32:
            order, vectors = fetch()
            names = list(new)
            fresh = {names[i]: vector.copy() for i, vector in zip(order, _finite(vectors, "texts"), strict=True)}
            self._remember(fresh)
            found = known | fresh
            scores = np.full(len(encoded.document), np.nan, np.float32)
            for pair in readable.tolist():
                query, document = found.get(keys[queries[pair]]), found.get(keys[encoded.document[pair]])
                if query is not None and document is not None:
                    scores[pair] = document @ query
            return scores

        return Result(result, lengths_of(list(new.values())))

    def score(self, encoded: Encoded) -> Float32:
        """See Scorer."""
        return self.start(encoded)()

    def forget(self) -> None:
        """See Scorer."""
        self._cache = {}

    def under(self, token_budget: int) -> "BiEncoderScorer":
        """See Scorer."""
        from batch_rerank.engine.memory import TokenBudget

        return BiEncoderScorer(self._model, TokenBudget(token_budget))

    def _embed(self, segments: list[Ids], begun: Callable[[], None]) -> "Fetch":
        lengths = lengths_of(segments)

        def compute(batch: Index) -> "torch.Tensor":
            begun()
            return self._model.embed([segments[index] for index in batch])

        return self._budget.start(
            np.arange(len(segments)),
            lambda pending, tokens: (pending[batch] for batch in self._model.split(lengths[pending], tokens)),
            compute,
        )

    def _remember(self, fresh: dict[bytes, Float32]) -> None:
        """Keep the new vectors; the oldest go first."""
        size = next(iter(fresh.values())).nbytes if fresh else 1
        with self._remembering:  # two units may end at once
            self._cache |= fresh
            for key in list(itertools.islice(self._cache, max(0, len(self._cache) - VECTOR_CACHE_BYTES // size))):
                del self._cache[key]


class ChecksumScorer:
    """A free scorer: the CRC-32 of a pair's token ids, mapped to -8..8. It moves every byte of the text and costs
    nothing, so it measures and tests the pipeline; it does not rank."""

    network = None
    fallback = None
    packed = False
    token_budget = None

    def start(self, encoded: Encoded, begun: Callable[[], None] = lambda: None) -> Result:
        """See Scorer."""
        begun()
        scores = self.score(encoded)
        return Result(lambda: scores)

    def score(self, encoded: Encoded) -> Float32:
        """See Scorer."""
        heads = [zlib.crc32(encoded.segment(index).data) for index in encoded.prefix]
        group = encoded.group_of_pair()
        sums = np.empty(len(encoded.document), np.float64)
        for pair, (segment, kept) in enumerate(zip(encoded.document, encoded.kept, strict=True)):
            sums[pair] = zlib.crc32(encoded.segment(segment)[:kept].data, heads[group[pair]])
        return np.asarray(sums / 2**28 - 8, np.float32)

    def forget(self) -> None:
        """See Scorer."""

    def under(self, token_budget: int) -> "ChecksumScorer":
        """See Scorer."""
        return self


def _finite(values: Float32, what: str) -> Float32:
    bad = len(values) and int(np.count_nonzero(~np.isfinite(values).reshape(len(values), -1).all(1)))
    if bad:
        raise ModelError(
            f"the model gave NaN or infinity for {bad} of {len(values)} {what}; expected finite scores; "
            "check the weights, and with float16 try bfloat16 or float32"
        )
    return values
