"""Qwen3-Reranker's shapes with random weights, made on the device: the engine beside transformers' padded forward and
sentence-transformers' CrossEncoder, on the same weights and documents, in one process, in turn.

Documents are pieces of this Python's standard library, of half to one and a half times the mean length, 100 a query.
The engine and the padded forward are given token ids; CrossEncoder, which takes texts, tokenises in its own time. It is
loaded with a tiny checkpoint and given the large model: nothing large is written to disk. Where it is not installed the
padded forward, which sorts and pads as it does, stands for it.
"""

import gc
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine_models import SHAPES, build_causal, linear_flop, train_tokenizer
from gpu_device import Record, forget_peak, has_float8, median_and_spread, peak_gib, seconds, short
from gpu_rates import NAMES, best_matrix_rate
from tokenizers import Tokenizer
from transformers import AutoConfig, Qwen3ForCausalLM

from batch_rerank.engine.causal_encoding import answer_tokens
from batch_rerank.engine.checkpoint import ModelSpec, resolve_model
from batch_rerank.engine.encoded import Encoded, Group
from batch_rerank.engine.encoding import make_encoder
from batch_rerank.engine.memory import TokenBudget, choose_budget
from batch_rerank.engine.models import DecoderModel, sequences
from batch_rerank.engine.packing import Float32, Index
from batch_rerank.engine.reference import in_float32
from batch_rerank.engine.scorer import PairScorer
from batch_rerank.engine.tokens import load_tokenizer

GOALS = {"0.6b": 0.55, "4b": 0.75, "8b": 0.82}
TIMES_GOALS = {65: 3, 233: 2}
DEPTH = 100
EXACT_DEPTH = 50
"""Documents of a query in float32, which takes ten times as long."""
SECONDS = 1.5
BATCH_SIZES = (32, 128, 256)
Pairs = list[tuple[str, str]]


def shape(record: Record, device: str, small: bool, name: str) -> None:
    """One shape at both lengths. `passed`: the engine is as near to float32 as transformers' own bfloat16 is."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as directory:
        root, sources = Path(directory), _sources(5 if small else 200)
        tokenizer = train_tokenizer(root / "tokenizer", [*sources, *["yes", "no"] * 2000])  # each one token
        build_causal(root / "model", SHAPES["tiny"], str(tokenizer), "cpu")
        spec = resolve_model(str(root / "model"), dtype="bfloat16", max_length=2048)
        model = _large(spec, SHAPES["tiny" if small else NAMES[name]], device)
        bench = _Bench(spec, model, device, small, sources)
        record(goal_share=GOALS[name], weights="random", setting=__doc__, fallback=bench.fallback)
        verdicts = []
        for tokens, goal in TIMES_GOALS.items():
            verdicts.append(bench.exactness(tokens))
            record(**{f"exactness at {tokens}": verdicts[-1]})
            record(passed=all(verdict["passed"] for verdict in verdicts))
            record(**{f"documents of {tokens}": {"goal_times": goal, **bench.rates(tokens)}})
        record(cross_encoder=bench.cross_encoder)
        if has_float8(device):
            record(float8=bench.float8())


def _large(spec: ModelSpec, sizes: tuple[Any, ...], device: str) -> Any:
    """The causal model of this shape with the small checkpoint's vocabulary, in bfloat16."""
    config = AutoConfig.from_pretrained(spec.directory)
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    for key, value in zip((*names, "intermediate_size", "tie_word_embeddings"), sizes, strict=True):
        setattr(config, key, value)
    config.layer_types = ["full_attention"] * sizes[0]
    torch.manual_seed(0)
    with torch.device(device):
        return Qwen3ForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


class _Bench:
    """One model, and what scores with it."""

    def __init__(self, spec: ModelSpec, model: Any, device: str, small: bool, sources: list[str]) -> None:
        self._spec, self._model, self._device, self._small = spec, model, device, small
        self._tokenizer = Tokenizer.from_file(str(Path(spec.directory) / "tokenizer.json"))
        assert spec.causal is not None
        self._answers = answer_tokens(load_tokenizer(Path(spec.directory)), spec.causal)
        yes, no = self._answers
        head = model.get_output_embeddings().weight
        self._direction = (head[yes].float() - head[no].float()).detach()
        self._decoder = DecoderModel(spec, model, self._direction, device, "packed")
        self._budget = TokenBudget(choose_budget(model, device))
        self._scorer = PairScorer(self._decoder, self._budget)
        self.fallback = self._decoder.fallback  # why the fastest kernels are not used, None where they are
        self._ids = self._tokenizer.encode("\n".join(sources), add_special_tokens=False).ids
        self._cross = _cross_encoder(spec, model, device)
        self._scored: dict[int, Encoded] = {}

    @property
    def cross_encoder(self) -> str:
        """Whether CrossEncoder was here to compare with."""
        return self._cross if isinstance(self._cross, str) else "installed"

    def groups(self, tokens: int, queries: int, depth: int = DEPTH) -> list[Group]:
        """Queries of 12 tokens with documents of `tokens` on average."""
        depth = 4 if self._small else depth
        rng = random.Random(tokens)

        def text(length: int) -> str:
            at = rng.randrange(len(self._ids) - 2 * length)
            return self._tokenizer.decode(self._ids[at : at + length]).replace("\ufffd", " ")

        return [
            Group(text(12), [text(rng.randint(tokens // 2, tokens + tokens // 2)) for _ in range(depth)])
            for _ in range(queries)
        ]

    def exactness(self, tokens: int) -> dict[str, Any]:
        """One query's scores by the engine and by transformers in bfloat16, both against transformers in float32."""
        encoded = make_encoder(self._spec).encode(self.groups(tokens, 1, EXACT_DEPTH))
        ours, theirs = self._scorer.score(encoded), self._padded(encoded, 32)
        with in_float32(self._model):
            exact = self._padded(encoded, 32)
        errors = [np.abs(scores - exact) for scores in (ours, theirs)]
        spread = float(exact.std())
        means = [float(error.mean()) for error in errors]
        # twice transformers' own error: two roundings in another order, and chance among 100 pairs
        passed = bool(np.isfinite(ours).all() and means[0] <= 2 * means[1] + 1e-3 * spread)
        return {
            "passed": passed,
            "standard_deviation": short(spread),
            "engine_mean": short(means[0]),
            "engine_largest": short(float(errors[0].max())),
            "transformers_mean": short(means[1]),
            "transformers_largest": short(float(errors[1].max())),
        }

    def rates(self, tokens: int) -> dict[str, Any]:
        """Medians of runs in turn; the other two score the first quarter of the queries."""
        encode = make_encoder(self._spec).encode
        trial = encode(self.groups(tokens, 4))
        self._scorer.score(trial)
        took = seconds(lambda: self._scorer.score(trial), self._device)
        queries = 4 if self._small else int(min(400, max(4, 4 * SECONDS / took)))
        groups = self.groups(tokens, queries)
        encoded = self._scored[tokens] = encode(groups)
        encoding = seconds(lambda: encode(groups), "cpu")
        few = groups[: max(1, queries // 4)]
        others = self._others(few, encode(few))
        forget_peak(self._device)
        ceiling = best_matrix_rate(self._device, self._small)
        ours: list[float] = []
        theirs: dict[str, list[float]] = {name: [] for name in others}
        for _ in range(2 if self._small else 3):
            ours.append(seconds(lambda: self._scorer.score(encoded), self._device))
            for name, call in others.items():
                theirs[name].append(seconds(call, self._device))
        ceiling = max(ceiling, best_matrix_rate(self._device, self._small))
        pairs, computed = len(encoded.document), self._computed(encoded)
        flop = linear_flop(self._model.config, computed, pairs, trimmed=True)
        fewer = sum(len(group.documents) for group in few)
        their_rates = {name: [fewer / took for took in times] for name, times in theirs.items()}
        our_rates = [pairs / took for took in ours]
        return {
            "pairs": pairs,
            "tokens_per_pair": short(float(encoded.n_tokens.mean())),
            "computed_tokens": computed,
            "token_budget": self._budget.tokens,
            "pairs_per_s": median_and_spread(our_rates),
            "tokens_per_s": median_and_spread([int(encoded.n_tokens.sum()) / took for took in ours]),
            "computed_tokens_per_s": median_and_spread([computed / took for took in ours]),
            "share_of_matrix_rate": median_and_spread([flop / took / ceiling for took in ours]),
            "matrix_tflops": short(ceiling / 1e12),
            "tokenising_seconds_on_one_core": short(encoding),
            "peak_gib": peak_gib(self._device),
            "others": {
                name: {
                    "pairs_per_s": median_and_spread(rates),
                    "engine_times_as_fast": median_and_spread(
                        [own / rate for own, rate in zip(our_rates, rates, strict=True)]
                    ),
                }
                for name, rates in their_rates.items()
            },
        }

    def float8(self) -> dict[str, Any]:
        """At each length in turn with bfloat16, and how far it moves scores on the scale of their spread: of random
        weights, which bear it worse than trained ones. Its decoder joins weights anew: both hold their own."""
        spec = replace(self._spec, dtype="float8")
        decoder = DecoderModel(spec, self._model, self._direction, self._device, "packed")
        scorer = PairScorer(decoder, TokenBudget(self._budget.tokens))
        found: dict[str, Any] = {}
        for tokens, encoded in self._scored.items():
            plain, rounded = self._scorer.score(encoded), scorer.score(encoded)
            times = [
                [seconds(partial(which.score, encoded), self._device) for which in (self._scorer, scorer)]
                for _ in range(2 if self._small else 3)
            ]
            moved = np.abs(rounded - plain) / plain.std()
            found[f"documents of {tokens}"] = {
                "pairs_per_s": median_and_spread([len(plain) / ours for _, ours in times]),
                "times_as_fast_as_bfloat16": median_and_spread([theirs / ours for theirs, ours in times]),
                "moved_of_spread": {"mean": short(float(moved.mean())), "largest": short(float(moved.max()))},
            }
        return {**found, "peak_gib": peak_gib(self._device)}

    def _others(self, groups: list[Group], encoded: Encoded) -> dict[str, Callable[[], Any]]:
        """Each with the fastest of several batch sizes; its name says which."""
        trial = encoded.part(0, min(256, len(encoded.document)))
        sizes = BATCH_SIZES[:1] if self._small else BATCH_SIZES
        pairs = [(group.query, document) for group in groups for document in group.documents]
        ways: dict[str, Callable[[Any, int], Any]] = {"transformers, padded, sorted by length": self._padded}
        cross = self._cross
        if not isinstance(cross, str):
            ways["CrossEncoder"] = lambda part, size: cross.predict(pairs[: len(part.document)], batch_size=size)
        calls: dict[str, Callable[[], Any]] = {}
        for name, way in ways.items():
            times = {}
            way(trial.part(0, min(32, len(trial.document))), 32)
            for size in sizes:
                times[size] = seconds(lambda way=way, size=size: way(trial, size), self._device)  # type: ignore[misc]
            best = min(times, key=lambda size: times[size])
            calls[f"{name}, batches of {best}"] = lambda way=way, best=best: way(encoded, best)  # type: ignore[misc]
        return calls

    def _padded(self, encoded: Encoded, size: int) -> Float32:
        """As CrossEncoder does it: longest first, padded on the left, the head at the last position only."""
        yes, no = self._answers
        rows = sequences(encoded, np.arange(len(encoded.document)))
        order = np.argsort([-len(row) for row in rows], kind="stable")
        scores = []
        for start in range(0, len(order), size):
            batch = [rows[index] for index in order[start : start + size]]
            ids, mask = (torch.zeros(len(batch), len(batch[0]), dtype=torch.long) for _ in range(2))
            for at, row in enumerate(batch):
                ids[at, -len(row) :], mask[at, -len(row) :] = torch.from_numpy(row.astype(np.int64)), 1
            given = {"input_ids": ids.to(self._device), "attention_mask": mask.to(self._device)}
            with torch.inference_mode():
                logits = self._model(**given, logits_to_keep=1, use_cache=False).logits[:, -1].float()
            scores.append(logits[:, yes] - logits[:, no])
        result = np.empty(len(rows), np.float32)
        result[order] = torch.cat(scores).cpu().numpy()
        return result

    def _computed(self, encoded: Encoded) -> int:
        """Tokens that go through the layers: each pack's prefixes once, and what is each document's own."""
        group, prefixes = encoded.group_of_pair(), np.diff(encoded.offsets)[encoded.prefix]
        packs: Iterator[Index] = self._decoder.split(encoded, np.arange(len(encoded.document)), self._budget.tokens)
        shared = sum(int(prefixes[np.unique(group[pack])].sum()) for pack in packs)
        return shared + int((encoded.n_tokens - prefixes[group]).sum())


def _cross_encoder(spec: ModelSpec, model: Any, device: str) -> Any:
    """sentence-transformers' CrossEncoder with this model as its own, or why there is none."""
    try:
        from sentence_transformers import CrossEncoder

        activation = torch.nn.Identity()
        found = CrossEncoder(
            spec.directory, device=device, max_length=spec.max_length, activation_fn=activation, local_files_only=True
        )
        found[0].model = model
    except Exception as error:  # a package of another's, in any state: the padded forward stands for it
        return f"{type(error).__name__}: {error}"
    return found


def _sources(files: int) -> list[str]:
    """Text that every machine with Python has."""
    paths = sorted(Path(os.__file__).parent.glob("*.py"))[:files]
    return [path.read_text(encoding="utf-8", errors="replace")[:20_000] for path in paths]
