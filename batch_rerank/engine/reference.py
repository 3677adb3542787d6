"""The slow path: a pair's score as its model's card computes it, to hold against the fast path.

Plain transformers forward of the loaded model in float32, one sequence at a time, no packing, no padding, no shared
prefix. Texts are tokenised whole by the checkpoint's tokenizer.json. Nothing of the fast path's own derivations
(splits, layouts, answer rows, positions) is used, so that a fault in one of them shows as a difference.
"""

import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedModel

from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.engine.packing import Float32
from batch_rerank.engine.templates import CausalTemplate


@dataclass(frozen=True)
class Tokens:
    """One sequence as the model reads it: token ids and token types."""

    ids: list[int]
    types: list[int]


class Reference:
    """The slow path of a loaded model."""

    def __init__(self, spec: ModelSpec, network: PreTrainedModel) -> None:
        self._spec, self._network = spec, network
        self.tokenizer = Tokenizer.from_file(str(Path(spec.directory) / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        # A vocabulary of 151,669 at each of 2,000 positions would be 1.2 GB of logits, of which one row is read
        takes = inspect.signature(network.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}

    def read(self, query: str, document: str) -> list[Tokens]:
        """The sequences of a pair: one, or two for a bi-encoder, cut at the model's max_length."""
        if self._spec.causal is not None:
            return [self._prompt(query, document)]
        if self._spec.kind == "sequence_classification":
            return [self._pair(query, document)]
        return [self._sentence(self._query_prompt() + query), self._sentence(self._spec.document_prompt + document)]

    def scores(self, pairs: Sequence[tuple[str, str]]) -> Float32:
        """float32[n_pairs] of (query, document) pairs. The model is as before when this returns or raises."""
        known: dict[tuple[int, ...], torch.Tensor] = {}  # vectors: several pairs have the same query
        with in_float32(self._network), torch.no_grad():
            return np.array([self._score(self.read(*pair), known) for pair in pairs], np.float32)

    def answers(self) -> list[list[int]]:
        """The ids of the template's true and, where it has one, false token; each should be one."""
        tokens = (self.template.true_token, self.template.false_token)
        return [[token] if isinstance(token, int) else self._bare(token).ids for token in tokens if token is not None]

    @property
    def template(self) -> CausalTemplate:
        """Of a causal model, or of a decoder with a classification head."""
        assert self._spec.causal is not None
        return self._spec.causal

    def _score(self, sequences: list[Tokens], known: dict[tuple[int, ...], torch.Tensor]) -> float:
        if self._spec.kind == "causal":
            logits = self._forward(sequences[0], use_cache=False, **self._last_only).logits[0, -1].float()
            (yes,), *no = self.answers()
            return float(logits[yes] - logits[no[0][0]] if no else logits[yes])
        if self._spec.kind == "sequence_classification":
            logits = self._forward(sequences[0]).logits[0].float()
            return float(logits[1] - logits[0] if self._spec.labels == 2 else logits[0])
        for sequence in sequences:
            if tuple(sequence.ids) not in known:
                known[tuple(sequence.ids)] = self._vector(sequence)
        query, document = (known[tuple(sequence.ids)] for sequence in sequences)
        return float(query @ document)

    def _forward(self, tokens: Tokens, **given: Any) -> Any:
        device = self._network.device
        if (getattr(self._network.config, "type_vocab_size", 0) or 0) > 1:
            given["token_type_ids"] = torch.tensor([tokens.types], device=device)
        ids = torch.tensor([tokens.ids], device=device)
        return self._network(input_ids=ids, attention_mask=torch.ones_like(ids), **given)

    def _vector(self, tokens: Tokens) -> torch.Tensor:
        hidden = self._forward(tokens).last_hidden_state[0].float()
        pooled = {"cls": hidden[0], "last": hidden[-1], "mean": hidden.mean(0)}[self._spec.pooling]
        vector: torch.Tensor = pooled / pooled.norm() if self._spec.normalize else pooled
        return vector

    def _prompt(self, query: str, document: str) -> Tokens:
        """What follows the document is never cut; of the rest, the end goes first."""
        before, left, right, after = render(self.template, query, document, self._spec.instruction or "")
        ids = self._joined([*before, left + right, *after])
        if len(ids) > self._spec.max_length:
            tail = self._joined([right, *after])
            ids = self._joined([*before, left])[: self._spec.max_length - len(tail)] + tail
        return Tokens(ids, [0] * len(ids))

    def _joined(self, texts: list[str]) -> list[int]:
        return [token for text in texts for token in self._bare(text).ids]

    def _pair(self, query: str, document: str) -> Tokens:
        """FlagEmbedding's truncation: the query to 3/4 of max_length, then the document to what is left."""
        q, d = self._bare(query), self._bare(document)
        q.truncate(self._spec.max_length * 3 // 4)
        d.truncate(self._spec.max_length - len(q) - self.tokenizer.num_special_tokens_to_add(True))
        pair = self.tokenizer.post_process(q, d)
        return Tokens(pair.ids, pair.type_ids)

    def _sentence(self, text: str) -> Tokens:
        encoding = self._bare(text)
        encoding.truncate(self._spec.max_length - self.tokenizer.num_special_tokens_to_add(False))
        sentence = self.tokenizer.post_process(encoding)
        return Tokens(sentence.ids, [0] * len(sentence.ids))

    def _bare(self, text: str) -> Encoding:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _query_prompt(self) -> str:
        prompt, instruction = self._spec.query_prompt, self._spec.instruction
        stored = re.fullmatch(r"(Instruct: ).*(\nQuery:\s*)", prompt, re.DOTALL)
        # only the instruction is another: whether a space follows "Query:" is the checkpoint's to say
        return prompt if instruction is None or stored is None else f"{stored[1]}{instruction}{stored[2]}"


def render(
    template: CausalTemplate, query: str, document: str, instruction: str
) -> tuple[list[str], str, str, list[str]]:
    """The texts that are tokenised apart from each other, filled in: those before the document's, the document's own in
    two (up to the document's end, and what follows), those after it."""
    values = {"query": query, "document": document, "instruction": instruction}
    middle = template.instructed if template.instructed and instruction else template.middle
    at = next(index for index, piece in enumerate(middle) if "{document}" in piece)
    left, right = middle[at].split("{document}")
    texts = [template.prefix, *middle[:at], left + "{document}", right, *middle[at + 1 :], template.suffix]
    filled = [re.sub(r"\{(query|document|instruction)\}", lambda match: values[match[1]], text) for text in texts]
    return filled[: at + 1], filled[at + 1], filled[at + 2], filled[at + 3 :]


@contextmanager
def in_float32(network: PreTrainedModel) -> Iterator[None]:
    """Let a bf16 or float16 model compute in float32 without a second copy of it.

    Each module's own weights are widened for the time of its forward. Of an embedding only the looked-up rows are.
    """
    narrow: dict[torch.nn.Parameter, torch.Tensor] = {}

    def widen(module: torch.nn.Module, args: Any) -> None:
        for weight in module.parameters(recurse=False):
            if weight.is_floating_point() and weight.dtype != torch.float32:
                narrow[weight] = weight.data
                weight.data = weight.data.float()

    def restore(module: torch.nn.Module, args: Any, output: Any) -> None:
        for weight in module.parameters(recurse=False):
            if weight in narrow:
                weight.data = narrow.pop(weight)

    def widen_output(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output.float()

    hooks = []
    for module in network.modules():
        if isinstance(module, torch.nn.Embedding):
            hooks.append(module.register_forward_hook(widen_output))
        elif next(module.parameters(recurse=False), None) is not None:
            hooks += [module.register_forward_pre_hook(widen), module.register_forward_hook(restore)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for weight, data in narrow.items():  # of modules whose forward raised
            weight.data = data
        if network.device.type == "cuda":
            torch.cuda.empty_cache()  # the widened weights' blocks are of no size that scoring asks for
