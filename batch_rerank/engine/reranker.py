"""The Python face, in the shape people know from CrossEncoder: one model in this process, no job, no Ray."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

import numpy as np

from batch_rerank.engine.checkpoint import relocate, resolve_model
from batch_rerank.engine.checkpoint_files import Stored
from batch_rerank.engine.encoded import Group
from batch_rerank.engine.encoding import make_encoder
from batch_rerank.engine.packing import Float32, best_chunks
from batch_rerank.engine.scorer import relevance
from batch_rerank.engine.tested import tested_scorer


class Ranked(TypedDict):
    """One document of a ranking; `relevance_score` is None where the model defines no map to 0..1."""

    doc_index: int
    score: float
    relevance_score: float | None


class Reranker:
    """A loaded reranker that has passed its self-test. Raises ModelError and ConfigError as the job does.

    self_test: False leaves the test out. forward: as `model.forward` of a job. `fallback` says why its batches are
    padded, empty where they are packed; `tested` what the self-test found, None without one.
    """

    def __init__(
        self,
        name: str,
        *,
        max_length: int | None = None,
        dtype: str = "auto",
        kind: str = "auto",
        template: str | Mapping[str, Any] = "auto",
        instruction: str | None = None,
        device: str = "auto",
        token_budget: int | None = None,
        trust_remote_code: bool = False,
        allow_pickle: bool = False,
        forward: Literal["auto", "packed", "padded"] = "auto",
        self_test: bool = True,
    ) -> None:
        if device == "auto":
            import torch

            device = "cuda" if torch.cuda.is_available() else "cpu"
        spec = resolve_model(
            name,
            kind=kind,
            template=template,
            instruction=instruction,
            stored=self._stored(name, allow_pickle),
            max_length=max_length,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
        )
        self.spec = relocate(spec)
        self._encoder = make_encoder(self.spec)
        loaded = tested_scorer(self.spec, device, token_budget, forward, self_test)
        self._scorer, self.tested, self.fallback = loaded.scorer, loaded.result, loaded.fallback

    def _stored(self, name: str, allow_pickle: bool) -> Stored | None:
        """What a store has by this name; the package's own Reranker can reach stores, this one reads hub and disk."""
        return None

    def score(self, pairs: Sequence[tuple[str, str]]) -> Float32:
        """float32[n_pairs] raw scores of (query, document) pairs, in input order; equal queries are scored together."""
        by_query: dict[str, list[int]] = {}
        for position, (query, _) in enumerate(pairs):
            by_query.setdefault(query, []).append(position)
        groups = [Group(query, [pairs[i][1] for i in positions]) for query, positions in by_query.items()]
        order = np.array([i for positions in by_query.values() for i in positions], np.int64)
        scores = np.empty(len(pairs), np.float32)
        encoded = self._encoder.encode(groups)
        scores[order] = best_chunks(encoded, self._scorer.score(encoded)).scores
        return scores

    def rank(self, query: str, documents: Sequence[str], top_k: int | None = None) -> list[Ranked]:
        """The documents by score descending, ties in the order given."""
        scores = self.score([(query, document) for document in documents])
        relevances = relevance(self.spec, scores)
        order = np.argsort(-scores, kind="stable")[:top_k]
        return [
            Ranked(
                doc_index=int(i),
                score=float(scores[i]),
                relevance_score=None if relevances is None else float(relevances[i]),
            )
            for i in order
        ]
