"""Checkpoints to transformers models, every weight accounted for.

transformers only warns where a head is missing, and makes a random one: here a missing, unexpected or mismatched weight
is an error. Two models whose own code would have to be run are read into classes that transformers has.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers import PreTrainedModel, XLMRobertaConfig, XLMRobertaForSequenceClassification
from transformers.utils import logging as transformers_logging

from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.engine.kinds import is_gte, is_jina
from batch_rerank.engine.tokens import load_tokenizer
from batch_rerank.errors import ModelError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

JINA_NAMES = (
    (r"emb_ln", "embeddings.LayerNorm"),
    (r"encoder\.layers\.", "encoder.layer."),
    (r"mixer\.out_proj", "attention.output.dense"),
    (r"norm1", "attention.output.LayerNorm"),
    (r"mlp\.fc1", "intermediate.dense"),
    (r"mlp\.fc2", "output.dense"),
    (r"norm2", "output.LayerNorm"),
)
"""Weights of jina-reranker-v2 (flash-attention's names) to XLM-R's; `mixer.Wqkv` holds queries, keys and values."""


def load(auto_class: Any, spec: ModelSpec, device: str) -> PreTrainedModel:
    """The model of a checkpoint, in its dtype, on the device. Raises ModelError unless every weight is there once."""
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    # its load report repeats what the check below raises
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    raw = json.loads((Path(spec.directory) / "config.json").read_text(encoding="utf-8"))
    try:
        model, info = _jina(spec, raw) if is_jina(raw) else _from_pretrained(auto_class, spec, raw)
    except ModelError:
        raise
    except Exception as error:  # whatever transformers, safetensors or remote code raise on a bad checkpoint
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"model {spec.name!r} ({spec.directory}) cannot be loaded: {reason}") from error
    _refuse_wrong_keys(spec, model, info)
    _refuse_other_vocabulary(spec, model)
    loaded: PreTrainedModel = model.eval().requires_grad_(False).to(device)
    return loaded


def _from_pretrained(auto_class: Any, spec: ModelSpec, raw: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    model, info = auto_class.from_pretrained(
        spec.directory,
        **({"config": gte_config(spec, raw)} if is_gte(raw) else {}),
        dtype=DTYPES[spec.dtype],
        trust_remote_code=spec.trust_remote_code,  # unset, transformers asks on stdin
        use_safetensors=not spec.pickled,
        weights_only=True,
        local_files_only=True,
        attn_implementation="sdpa",
        ignore_mismatched_sizes=True,  # so that they are reported with the others
        output_loading_info=True,
    )
    return model, info


def gte_config(spec: ModelSpec, raw: dict[str, Any]) -> Any:
    """The config of transformers' own GTE for a checkpoint with `model_type: new`.

    Its code scales rotary positions by NTK: base theta * factor, and frequencies divided by factor^(2 / head_dim),
    which is the linear scaling of transformers (Alibaba-NLP/new-impl, NTKScalingRotaryEmbedding).
    """
    if not hasattr(transformers, "GteConfig"):
        raise ModelError(
            f"model {spec.name!r}: its architecture needs transformers 5.23 or newer, found {transformers.__version__}"
        )
    theta, scaling = float(raw.get("rope_theta", 10000.0)), raw.get("rope_scaling")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if scaling is not None:
        if scaling.get("type") != "ntk" or raw.get("logn_attention_scale"):
            raise ModelError(f"model {spec.name!r}: rope_scaling is {scaling}; expected type ntk, or none")
        factor, dim = float(scaling["factor"]), raw["hidden_size"] // raw["num_attention_heads"]
        rope = {"rope_type": "linear", "rope_theta": theta * factor, "factor": factor ** (2 / dim)}
    names = transformers.GteConfig().to_dict()
    own = {key: value for key, value in raw.items() if key in names or key in ("id2label", "label2id")}
    return transformers.GteConfig(**{**own, "model_type": "gte", "rope_parameters": rope})


def _jina(spec: ModelSpec, raw: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    names = XLMRobertaConfig().to_dict()
    config = XLMRobertaConfig(**{key: value for key, value in raw.items() if key in names or key == "id2label"})
    config._attn_implementation = "sdpa"
    model: Any = XLMRobertaForSequenceClassification(config)
    model.to(DTYPES[spec.dtype])
    weights: dict[str, torch.Tensor] = {}
    for path in sorted(Path(spec.directory).glob("*.safetensors")):
        weights |= {_jina_name(name): tensor for name, tensor in load_file(path).items()}
    for name in [name for name in weights if "mixer.Wqkv" in name]:
        parts = zip(("query", "key", "value"), weights.pop(name).chunk(3), strict=True)
        weights |= {name.replace("mixer.Wqkv", f"attention.self.{part}"): tensor for part, tensor in parts}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    odd = [name for name, tensor in weights.items() if name in shapes and tensor.shape != shapes[name]]
    found = model.load_state_dict({n: t for n, t in weights.items() if n not in odd}, strict=False)
    missing = [name for name in found.missing_keys if name not in odd]
    return model, {"missing_keys": missing, "unexpected_keys": found.unexpected_keys, "mismatched_keys": odd}


def _jina_name(name: str) -> str:
    for pattern, replacement in JINA_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _refuse_wrong_keys(spec: ModelSpec, model: Any, info: dict[str, Any]) -> None:
    names = ("missing_keys", "unexpected_keys", "mismatched_keys")
    wrong = {name: sorted(map(str, info[name])) for name in names if info[name]}
    if not wrong:
        return
    listed = "; ".join(f"{len(keys)} {name.replace('_', ' ')}: {', '.join(keys[:4])}" for name, keys in wrong.items())
    raise ModelError(
        f"model {spec.name!r} ({spec.directory}): its weights do not fit {type(model).__name__}: {listed}; "
        "expected every weight to be there once; this is another model class or a damaged checkpoint"
    )


def _refuse_other_vocabulary(spec: ModelSpec, model: Any) -> None:
    largest = max(load_tokenizer(Path(spec.directory)).get_vocab().values())
    rows = model.get_input_embeddings().weight.shape[0]
    if largest >= rows:
        raise ModelError(
            f"model {spec.name!r}: its tokenizer gives ids up to {largest}, but its embedding has {rows} rows; "
            "expected the tokenizer of this model"
        )
