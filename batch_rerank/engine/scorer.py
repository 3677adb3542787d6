"""Encoded groups to float32 scores.

`Scorer` is the one interface between a job and a model: a unit's groups go in, one score a pair comes out, in order.
How pairs are batched inside is the scorer's business and never changes a score beyond the dtype's tolerance.
"""

import hashlib
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.engine.encoding import Encoded
from batch_rerank.errors import ConfigError, ModelError

if TYPE_CHECKING:
    import torch

    from batch_rerank.engine.models import EmbeddingModel

Float32 = npt.NDArray[np.float32]
Index = npt.NDArray[np.int64]
Sequence32 = Sequence[npt.NDArray[np.integer]]
Forward = Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor"], "torch.Tensor"]

VECTOR_CACHE_BYTES = 256 * 2**20


class Scorer(Protocol):
    """Scores the pairs of encoded groups."""

    def score(self, encoded: Encoded) -> Float32:
        """float32[n_pairs], in the order of the groups and their documents: raw logit, log-odds or cosine."""
        ...


def make_scorer(spec: ModelSpec, device: str = "cpu", token_budget: int | None = None) -> Scorer:
    """Load a model as a scorer. `token_budget`: tokens of one padded batch.

    Raises ModelError (the checkpoint does not load completely) and ConfigError (the device is absent).
    """
    if spec.kind == "checksum":
        return ChecksumScorer()
    import torch  # not at the top: an actor of the checksum kind does without it

    from batch_rerank.engine.models import CausalModel, ClassificationModel, EmbeddingModel

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "CUDA is asked for, but torch sees no GPU here; set cluster.gpus_per_actor: 0 to score on the CPU"
        )
    if device == "cuda" and spec.dtype == "bfloat16" and not torch.cuda.is_bf16_supported():
        raise ConfigError("this GPU has no bfloat16; set model.dtype to float16 or float32")
    # On CPUs batches of 2,000 to 4,000 tokens were faster than 8,000 (caches)
    budget = token_budget or (32768 if device == "cuda" else 4096)
    if spec.kind == "bi_encoder":
        return BiEncoderScorer(EmbeddingModel(spec, device), device, budget)
    model = CausalModel(spec, device) if spec.kind == "causal" else ClassificationModel(spec, device)
    return PairScorer(model.scores, device, budget)


def relevance(spec: ModelSpec, scores: Float32) -> Float32 | None:
    """float32[n] in 0..1: the sigmoid of the scores, or None where the model defines no such map."""
    if spec.relevance == "none":
        return None
    logits = np.clip(scores.astype(np.float64), -500, 500)  # exp overflows beyond 709; float32 sees no difference
    return np.asarray(1 / (1 + np.exp(-logits)), np.float32)


class PairScorer:
    """One forward a pair: causal and sequence-classification models."""

    def __init__(self, forward: Forward, device: str, token_budget: int) -> None:
        self._forward, self._device, self._token_budget = forward, device, token_budget

    def score(self, encoded: Encoded) -> Float32:
        """See Scorer."""
        import torch

        scores = np.empty(len(encoded.document), np.float32)
        group = encoded.group_of_pair()
        for batch in batches(encoded.n_tokens, self._token_budget):
            prefixes = [encoded.segment(encoded.prefix[group[pair]]) for pair in batch]
            documents = [encoded.segment(encoded.document[pair])[: encoded.kept[pair]] for pair in batch]
            rows = [np.concatenate([p, d, encoded.tail]) for p, d in zip(prefixes, documents, strict=True)]
            document_starts = torch.tensor([len(prefix) for prefix in prefixes], device=self._device)
            with torch.inference_mode():
                result = self._forward(*padded(rows, self._device), document_starts)
            scores[batch] = result.cpu().numpy()
        return _finite(scores)


class BiEncoderScorer:
    """One forward a distinct text; a score is the dot product of two vectors, the cosine where they are normalised.

    The vectors of the latest texts are kept, up to VECTOR_CACHE_BYTES: a first stage finds the same documents for many
    queries (the demo's 10,000 pairs hold 3,300 documents).
    """

    def __init__(self, model: "EmbeddingModel", device: str, token_budget: int) -> None:
        self._model, self._device, self._token_budget = model, device, token_budget
        self._cache: dict[bytes, Float32] = {}

    def score(self, encoded: Encoded) -> Float32:
        """See Scorer."""
        segments = [encoded.segment(index) for index in range(len(encoded.offsets) - 1)]
        keys = [hashlib.blake2b(np.ascontiguousarray(ids).data, digest_size=16).digest() for ids in segments]
        known = {key: self._cache[key] for key in keys if key in self._cache}
        new = {key: ids for key, ids in zip(keys, segments, strict=True) if key not in known}
        known |= self._embed(list(new), list(new.values()))
        self._remember(known, new)
        scores = np.empty(len(encoded.document), np.float32)
        for group, prefix in enumerate(encoded.prefix):
            pairs = slice(encoded.starts[group], encoded.starts[group + 1])
            documents = [known[keys[segment]] for segment in encoded.document[pairs]]
            if documents:
                scores[pairs] = np.stack(documents) @ known[keys[prefix]]
        return _finite(scores)

    def _embed(self, keys: list[bytes], segments: list[npt.NDArray[np.integer]]) -> dict[bytes, Float32]:
        import torch

        vectors: dict[bytes, Float32] = {}
        for batch in batches(np.array([len(ids) for ids in segments], np.int32), self._token_budget):
            with torch.inference_mode():
                embedded = self._model.embed(*padded([segments[i] for i in batch], self._device)).cpu().numpy()
            vectors |= {keys[i]: vector.copy() for i, vector in zip(batch, embedded, strict=True)}
        return vectors

    def _remember(self, known: dict[bytes, Float32], new: Iterable[bytes]) -> None:
        """Keep the new vectors; the oldest go first."""
        self._cache.update((key, known[key]) for key in new)
        size = next(iter(known.values())).nbytes if known else 1
        for key in list(itertools.islice(self._cache, max(0, len(self._cache) - VECTOR_CACHE_BYTES // size))):
            del self._cache[key]


class ChecksumScorer:
    """A free scorer: the CRC-32 of a pair's token ids, mapped to -8..8. It moves every byte of the text and costs
    nothing, so it measures and tests the pipeline; it does not rank."""

    def score(self, encoded: Encoded) -> Float32:
        """See Scorer."""
        heads = [zlib.crc32(encoded.segment(index).data) for index in encoded.prefix]
        group = encoded.group_of_pair()
        sums = np.empty(len(encoded.document), np.float64)
        for pair, (segment, kept) in enumerate(zip(encoded.document, encoded.kept, strict=True)):
            sums[pair] = zlib.crc32(encoded.segment(segment)[:kept].data, heads[group[pair]])
        return np.asarray(sums / 2**28 - 8, np.float32)


def batches(lengths: npt.NDArray[np.int32], token_budget: int) -> Iterator[Index]:
    """Indexes of sequences, longest first, so that rows times the longest row stay within the budget; a sequence
    longer than the budget is alone. Sorting by length is what keeps padding low."""
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    start = 0
    while start < len(order):
        rows = max(1, token_budget // max(1, int(lengths[order[start]])))
        yield order[start : start + rows]
        start += rows


def padded(rows: Sequence32, device: str) -> tuple["torch.Tensor", "torch.Tensor"]:
    """int64[n, longest] padded on the right with 0, and int64[n] lengths."""
    import torch

    lengths = np.array([len(row) for row in rows], np.int64)
    ids = np.zeros((len(rows), int(lengths.max(initial=1))), np.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
    return torch.from_numpy(ids).to(device), torch.from_numpy(lengths).to(device)


def _finite(scores: Float32) -> Float32:
    bad = int(np.count_nonzero(~np.isfinite(scores)))
    if bad:
        raise ModelError(
            f"the model gave NaN or infinity for {bad} of {len(scores)} pairs; expected finite scores; "
            "check the weights, and with float16 try bfloat16 or float32"
        )
    return scores
