"""Checkpoints as torch modules: strict loading, and one forward for each kind.

Batches come padded on the right. A causal model needs no mask for that: no position looks ahead, and the answer is
read at each row's last real token. Scores leave in float32, whatever the model's dtype: a bf16 probability near 1
has steps of 2^-8 and would tie the top of a ranking.
"""

from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging as transformers_logging

from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.engine.encoding import PairEncoder, load_tokenizer
from batch_rerank.engine.templates import TEMPLATES
from batch_rerank.errors import ModelError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class CausalModel:
    """score = logit(true token) - logit(false token) at the last position (Qwen3-Reranker's card: log-odds of yes)."""

    def __init__(self, spec: ModelSpec, device: str) -> None:
        model = _load(AutoModelForCausalLM, spec, device)
        head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        if getattr(model.config, "final_logit_softcapping", None) or getattr(head, "bias", None) is not None:
            raise ModelError(f"model {spec.name!r}: its head has a bias or a soft cap, which is not supported")
        yes, no = answer_tokens(spec)
        # Two rows in float32 instead of the whole vocabulary: 1.4e-6 from the full head, 35 % less work at 0.6B
        self._direction = head.weight[yes].float() - head.weight[no].float()
        _refuse_constant(spec, self._direction)
        self._body = model.base_model

    def scores(self, ids: torch.Tensor, lengths: torch.Tensor, document_starts: torch.Tensor) -> torch.Tensor:
        """int64[n, longest], int64[n], int64[n] -> float32[n]."""
        hidden = self._body(input_ids=ids, use_cache=False).last_hidden_state
        last = hidden[torch.arange(len(ids), device=ids.device), lengths - 1]
        scores: torch.Tensor = last.float() @ self._direction
        return scores


class ClassificationModel:
    """score = the raw logit of a one-label head over the tokenizer's pair."""

    def __init__(self, spec: ModelSpec, device: str) -> None:
        self._model = _load(AutoModelForSequenceClassification, spec, device)
        linear = [module for module in self._model.modules() if isinstance(module, torch.nn.Linear)]
        _refuse_constant(spec, next(layer for layer in reversed(linear) if layer.out_features == 1).weight)
        types = getattr(self._model.config, "type_vocab_size", 0) or 0
        pair = PairEncoder(load_tokenizer(Path(spec.directory)), spec.max_length)
        self._document_type = pair.document_type if types > 1 else None

    def scores(self, ids: torch.Tensor, lengths: torch.Tensor, document_starts: torch.Tensor) -> torch.Tensor:
        """int64[n, longest], int64[n], int64[n] -> float32[n]. Tokens from document_starts on have the second type."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        mask = positions < lengths[:, None]
        types = {}
        if self._document_type is not None:
            second = (positions >= document_starts[:, None]) & mask
            types = {"token_type_ids": second.long() * self._document_type}
        logits: torch.Tensor = self._model(input_ids=ids, attention_mask=mask.long(), **types).logits
        return logits[:, 0].float()


class EmbeddingModel:
    """One vector a text: cls, mean or last-token pooling, then L2 where the checkpoint says so."""

    def __init__(self, spec: ModelSpec, device: str) -> None:
        self._model = _load(AutoModel, spec, device)
        self._pooling, self._normalize = spec.pooling, spec.normalize

    def embed(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """int64[n, longest], int64[n] -> float32[n, hidden]."""
        mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        hidden = self._model(input_ids=ids, attention_mask=mask.long()).last_hidden_state.float()
        if self._pooling == "cls":
            pooled = hidden[:, 0]
        elif self._pooling == "last":
            pooled = hidden[torch.arange(len(ids), device=ids.device), lengths - 1]
        else:
            pooled = (hidden * mask[:, :, None]).sum(1) / lengths[:, None]
        return torch.nn.functional.normalize(pooled, dim=1) if self._normalize else pooled


def answer_tokens(spec: ModelSpec) -> tuple[int, int]:
    """Ids of the template's true and false token. Raises ModelError unless each is one token of the vocabulary."""
    tokenizer = load_tokenizer(Path(spec.directory))
    template = TEMPLATES[spec.template]
    ids = []
    for text in (template.true_token, template.false_token):
        found = tokenizer.encode(text, add_special_tokens=False).ids
        if len(found) != 1:
            raise ModelError(
                f"template {template.name!r}: the answer {text!r} is {len(found)} tokens here, expected one"
            )
        ids.append(found[0])
    if ids[0] == ids[1]:
        raise ModelError(f"template {template.name!r}: both answers are token {ids[0]}, expected two different ones")
    return ids[0], ids[1]


def _refuse_constant(spec: ModelSpec, head: torch.Tensor) -> None:
    """An untrained or zeroed head scores everything alike, and nothing else would say so."""
    if head.min() == head.max():
        raise ModelError(
            f"model {spec.name!r}: every weight of its scoring head is {head.flatten()[0].item():g}; "
            "expected a trained head; this is a base model or a damaged checkpoint"
        )


def _load(auto_class: type, spec: ModelSpec, device: str) -> PreTrainedModel:
    """Load with every weight accounted for: transformers only warns where a head is missing, and makes a random one."""
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    # its load report repeats what the check below raises
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        model, info = auto_class.from_pretrained(  # type: ignore[attr-defined]
            spec.directory,
            dtype=DTYPES[spec.dtype],
            trust_remote_code=spec.trust_remote_code,  # unset, transformers asks on stdin
            use_safetensors=True,
            local_files_only=True,
            attn_implementation="sdpa",
            ignore_mismatched_sizes=True,  # so that they are reported below with the others
            output_loading_info=True,
        )
    except Exception as error:  # whatever transformers, safetensors or remote code raise on a bad checkpoint
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"model {spec.name!r} ({spec.directory}) cannot be loaded: {reason}") from error
    wrong = {
        name: sorted(map(str, info[name]))
        for name in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info[name]
    }
    if wrong:
        listed = "; ".join(
            f"{len(keys)} {name.replace('_', ' ')}: {', '.join(keys[:4])}" for name, keys in wrong.items()
        )
        raise ModelError(
            f"model {spec.name!r} ({spec.directory}): its weights do not fit {type(model).__name__}: {listed}; "
            "expected every weight to be there once; this is another model class or a damaged checkpoint"
        )
    largest = max(load_tokenizer(Path(spec.directory)).get_vocab().values())
    rows = model.get_input_embeddings().weight.shape[0]
    if largest >= rows:
        raise ModelError(
            f"model {spec.name!r}: its tokenizer gives ids up to {largest}, but its embedding has {rows} rows; "
            "expected the tokenizer of this model"
        )
    loaded: PreTrainedModel = model.eval().requires_grad_(False).to(device)
    return loaded
