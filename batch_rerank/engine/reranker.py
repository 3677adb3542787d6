"""The Python face, in the shape people know from CrossEncoder: one model in this process, no job, no Ray."""

import os
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypedDict

import numpy as np
import numpy.typing as npt

from batch_rerank.engine.checkpoint import relocate, resolve_model
from batch_rerank.engine.checkpoint_files import Stored
from batch_rerank.engine.encoded import Group
from batch_rerank.engine.encoding import make_encoder
from batch_rerank.engine.packing import Float32, best_chunks
from batch_rerank.engine.scorer import relevance
from batch_rerank.engine.tested import tested_scorer
from batch_rerank.errors import ConfigError, InputError

Instructions = str | Sequence[str | None] | None
"""One for all pairs of a call, or one a pair; None is the model's own (`Reranker.spec.instruction`)."""


class Ranked(TypedDict):
    """One document of a ranking; `relevance_score` is None where the model defines no map to 0..1."""

    doc_index: int
    score: float
    relevance_score: float | None


class _Turn:
    """A model keeps a call's state, so threads that share it take turns, and so do shallow copies. Whoever gets it in
    another process, pickled or by a fork, begins with an open one."""

    every: ClassVar["weakref.WeakSet[_Turn]"] = weakref.WeakSet()

    def __init__(self) -> None:
        self.open()
        self.every.add(self)

    def open(self) -> None:
        self.lock = threading.RLock()

    def __reduce__(self) -> tuple[type["_Turn"], tuple[()]]:
        return _Turn, ()


def _open_all() -> None:
    for turn in _Turn.every:
        turn.open()


if hasattr(os, "register_at_fork"):  # the thread that held it is not in the child
    os.register_at_fork(after_in_child=_open_all)


class Reranker:
    """A loaded reranker that has passed its self-test. Raises ModelError and ConfigError as the job does.

    The settings are those of a job's sections `model` and `scoring`. self_test: False leaves the test out. `fallback`
    says why its batches are padded, empty where they are packed; `tested` what the self-test found, None without one.
    Threads may share one: they take turns.
    """

    def __init__(
        self,
        name: str,
        *,
        revision: str | None = None,
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
        long_documents: Literal["truncate", "chunk"] = "truncate",
        chunk_overlap: int = 80,
        escape_control_tokens: bool = False,
        self_test: bool = True,
    ) -> None:
        if long_documents not in ("truncate", "chunk"):
            raise ConfigError(f"long_documents: found {long_documents!r}; expected 'truncate' or 'chunk'")
        if chunk_overlap < 0:
            raise ConfigError(f"chunk_overlap: found {chunk_overlap}; expected tokens, 0 or more")
        if device == "auto":
            import torch

            device = "cuda" if torch.cuda.is_available() else "cpu"
        spec = resolve_model(
            name,
            revision=revision,
            kind=kind,
            template=template,
            instruction=instruction,
            stored=self._stored(name, allow_pickle),
            max_length=max_length,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            chunk_overlap=chunk_overlap if long_documents == "chunk" else None,
            escape=escape_control_tokens,
        )
        self.spec = relocate(spec)
        self._turn = _Turn()
        self._encoder = make_encoder(self.spec)
        loaded = tested_scorer(self.spec, device, token_budget, forward, self_test)
        self._scorer, self.tested, self.fallback = loaded.scorer, loaded.result, loaded.fallback

    def _stored(self, name: str, allow_pickle: bool) -> Stored | None:
        """What a store has by this name; the package's own Reranker can reach stores, this one reads hub and disk."""
        return None

    def score(self, pairs: Iterable[tuple[str, str]], instruction: Instructions = None) -> Float32:
        """float32[n_pairs] raw scores of (query, document) pairs, in input order; pairs of equal queries and
        instructions are scored together. NaN where a pair has no token, or is too large for the device's memory.

        Raises InputError where a text is none, and ConfigError where the model takes no instruction.
        """
        given = [_two(pair, position) for position, pair in enumerate(pairs)]
        instructions = self._instructions(instruction, len(given))
        groups: dict[tuple[str, str | None], list[int]] = {}
        for position, ((query, document), own) in enumerate(zip(given, instructions, strict=True)):
            _refuse_no_text(query, f"pairs[{position}]: the query")
            _refuse_no_text(document, f"pairs[{position}]: the document")
            groups.setdefault((query, own), []).append(position)
        return self._score(
            [Group(query, [given[i][1] for i in places], own) for (query, own), places in groups.items()],
            np.array([i for places in groups.values() for i in places], np.int64),
        )

    def rank(
        self, query: str, documents: Iterable[str], top_k: int | None = None, instruction: str | None = None
    ) -> list[Ranked]:
        """The documents by score descending, ties in the order given, those without a score (NaN) last; all of them, or
        the best `top_k`. Raises what `score` raises."""
        if isinstance(documents, str | Mapping | set | frozenset):
            found = "one text" if isinstance(documents, str) else f"a {type(documents).__name__}"
            raise InputError(f"documents: found {found}; expected a list of texts: [document]")
        if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int | np.integer) or top_k < 1):
            raise ConfigError(f"top_k: found {top_k!r}; expected a whole number from 1, or None for all documents")
        documents = list(documents)
        _refuse_no_text(query, "the query")
        for position, document in enumerate(documents):
            _refuse_no_text(document, f"documents[{position}]")
        (own,) = self._instructions(instruction, 1)
        scores = self._score([Group(query, documents, own)], np.arange(len(documents)))
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

    def _score(self, groups: list[Group], order: npt.NDArray[np.int64]) -> Float32:
        """float32[n]: of the pairs of the groups, each at its place in `order`."""
        scores = np.empty(len(order), np.float32)
        with self._turn.lock:
            encoded = self._encoder.encode(groups)
            scores[order] = best_chunks(encoded, self._scorer.score(encoded)).scores
        return scores

    def _instructions(self, given: Instructions, n: int) -> Sequence[str | None]:
        """One a pair. Raises ConfigError and InputError."""
        if given is not None and not isinstance(given, Iterable):
            raise InputError(f"instruction: found {type(given).__name__}; expected a text or None, or one a pair")
        found = [given] * n if given is None or isinstance(given, str) else list(given)
        if len(found) != n:
            raise InputError(f"instruction: found {len(found)} for {n} pairs; expected one text, or one a pair")
        for position, one in enumerate(found[:1] if isinstance(given, str) else found):
            if one is not None:
                _refuse_no_text(one, f"instruction[{position}]")
        if self.spec.instruction is None and any(one is not None for one in found):
            raise ConfigError(
                f"instruction: model {self.spec.name!r} (template {self.spec.template}) has no place for one; leave it "
                "out, or put it into the query"
            )
        return found


def _two(pair: Any, position: int) -> tuple[Any, Any]:
    if not isinstance(pair, str | Mapping | set | frozenset) and hasattr(pair, "__len__") and len(pair) == 2:
        query, document = pair
        return query, document
    raise InputError(f"pairs[{position}]: found {type(pair).__name__}; expected two texts: (query, document)")


def _refuse_no_text(text: object, where: str) -> None:
    if text is None:
        raise InputError(f'{where} is None; expected a text; leave it out, or give "" to score an empty one')
    if not isinstance(text, str):
        raise InputError(f"{where}: found {type(text).__name__}; expected a text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: found half a character ({text[error.start]!a} at {error.start}); expected a text that UTF-8 can "
            "hold"
        ) from None
