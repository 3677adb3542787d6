"""What a config.json says of the computation that the weights are for. Pure functions on its keys, as they are in the
file or as transformers' `config.to_dict()` gives them; no torch here."""

from collections.abc import Collection, Mapping
from typing import Any

from batch_rerank.errors import ModelError

ENCODERS = (
    "albert",
    "bert",
    "camembert",
    "deberta",
    "deberta-v2",
    "distilbert",
    "electra",
    "ernie",
    "eurobert",
    "gte",
    "modernbert",
    "mpnet",
    "new",
    "nomic_bert",
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
)
"""Architectures whose attention looks both ways and whose tokenizer has a pair of its own that they are trained on."""

DECODERS = ("gemma", "gemma2", "gemma3_text", "llama", "ministral", "mistral", "phi3", "qwen2", "qwen3", "smollm3")
"""Architectures whose attention looks back only, unless their config says otherwise."""


COMPUTES = (
    "alibi",
    "attention_multiplier",
    "dim_model_base",
    "embedding_multiplier",
    "logit_scale",
    "logits_scaling",
    "logn_attention_scale",
    "no_rope_layers",
    "parallel_residual",
    "partial_rotary_factor",
    "qk_layernorm",
    "query_pre_attn_scalar",
    "residual_multiplier",
    "scale_depth",
    "scale_emb",
    "sliding_window",
    "use_dynamic_ntk",
    "use_logn_attn",
    "use_parallel_residual",
    "use_qk_norm",
)
"""Keys of config.json that change what is computed without a weight of their own to be missed. transformers keeps a
key that a class does not know, and computes without it."""


def looks_both_ways(config: Mapping[str, Any]) -> bool:
    """Whether a decoder's config asks for attention in both directions, which the classes of transformers honour in
    part (5.17 to 5.23: `is_causal: false` where they build the mask, `use_bidirectional_attention` in Gemma only)."""
    asked = config.get("use_bidirectional_attention")
    named = any("Bidirectional" in architecture for architecture in architectures(config))
    return config.get("is_causal") is False or asked is True or asked == "all" or named


def architectures(config: Mapping[str, Any]) -> list[str]:
    """The classes that config.json names."""
    listed = config.get("architectures") or []
    return [str(name) for name in ([listed] if isinstance(listed, str) else listed)]


def rope_regime(config: Mapping[str, Any]) -> int | None:
    """The length in tokens up to which a row is computed with other rotary frequencies than a longer one; None where
    all lengths have the same.

    transformers picks one set of frequencies (longrope: short or long) by the longest row of a batch, so rows on both
    sides of this length must not share a batch: the long one would change the others, by up to 1.9 in their scores.
    """
    for rope in _ropes(config):
        if _rope_type(rope) in ("longrope", "su"):
            # a length beside the dict has priority, as in transformers' standardize_rope_params (Phi-3 has it there)
            original = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
            return int(original or config["max_position_embeddings"])
    return None


def steady_positions(config: Mapping[str, Any]) -> int:
    """The tokens that positions reach with frequencies that depend on nothing but the row: `dynamic` ones change above
    their original length with every longer row, and stay changed for the rows after it."""
    positions = int(config.get("max_position_embeddings") or 512)
    original = [
        int(rope["original_max_position_embeddings"])
        for rope in _ropes(config)
        if "dynamic" in _rope_type(rope) and rope.get("original_max_position_embeddings")
    ]
    return min([positions, *original])


def _ropes(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rotary parameters: one dict, or one for each type of layer (Gemma 3)."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    nested = [value for value in given.values() if isinstance(value, Mapping)]
    return nested or [given]


def _rope_type(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")


def uncomputed(config: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """The keys of config.json that change what is computed, and that are not among those a class knows."""
    given = {key: config[key] for key in COMPUTES if not _neutral(config.get(key))}
    for rope in _ropes(config):
        if not _neutral(rope.get("partial_rotary_factor")):
            given["partial_rotary_factor"] = rope["partial_rotary_factor"]
    return {key: value for key, value in given.items() if key not in known}


def _neutral(value: Any) -> bool:
    return not value or (value == 1 and value is not True)  # a factor of 1 changes nothing, a switch that is on does


def refuse_unknown_computation(config: Mapping[str, Any], name: str) -> None:
    """Raise ModelError where the weights are of a form, or for a computation, that this program would get wrong."""
    quantized = config.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, Mapping) else quantized
        raise ModelError(
            f"model {name!r}: config.json has a quantization_config ({method}); expected weights in float32, bfloat16 "
            "or float16; use the checkpoint that it was made from"
        )
    if config.get("attn_logit_softcapping"):
        raise ModelError(
            f"model {name!r}: config.json has attn_logit_softcapping {config['attn_logit_softcapping']}, which torch's "
            "attention does not compute (transformers 5.17 leaves it out in silence)"
        )
