"""Checkpoints to transformers models, every weight accounted for.

transformers only warns where a head is missing, and makes a random one: here a missing, unexpected or mismatched weight
is an error. Two models whose own code would have to be run are read into classes that transformers has.
"""

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers import PreTrainedModel, XLMRobertaConfig, XLMRobertaForSequenceClassification
from transformers.integrations import accelerate as transformers_accelerate
from transformers.utils import logging as transformers_logging

from batch_rerank.engine.architecture import DECODERS, ENCODERS, looks_both_ways, refuse_unknown_computation, uncomputed
from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.engine.kinds import is_gte, is_jina
from batch_rerank.engine.tokens import load_tokenizer
from batch_rerank.errors import ModelError

log = logging.getLogger("batch_rerank")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES["float8"] = torch.bfloat16  # what the packed forward does not multiply in float8

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
        model, info = _jina(spec, raw) if is_jina(raw) else from_pretrained(auto_class, spec, raw, device)
        _refuse_wrong_keys(spec, model, info)
        _refuse_other_vocabulary(spec, model)
        refuse_unknown_computation(model.config.to_dict(), spec.name)  # also what is a class's default
        _refuse_uncomputed(spec, model, raw)
        _refuse_overflow(spec, model)
        loaded: PreTrainedModel = model.eval().requires_grad_(False).to(device)
        _direct_attention(spec, loaded, raw)
    except ModelError:
        raise
    except Exception as error:  # whatever transformers, safetensors or remote code raise on a bad checkpoint
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"model {spec.name!r} ({spec.directory}) cannot be loaded: {reason}") from error
    return loaded


def _refuse_uncomputed(spec: ModelSpec, model: Any, raw: dict[str, Any]) -> None:
    known = {key for cls in type(model.config).__mro__ for key in vars(cls)}
    missed = {} if is_gte(raw) or is_jina(raw) else uncomputed(raw, known)
    if missed:
        raise ModelError(
            f"model {spec.name!r}: config.json says {missed}, of which {type(model).__name__} takes no notice; "
            "expected a model that transformers computes; remove the keys if the model was trained without them"
        )


def _refuse_overflow(spec: ModelSpec, model: Any) -> None:
    """float16 ends at 65,504; a bfloat16 or float32 checkpoint may have more."""
    if spec.dtype != "float16":
        return
    odd = [name for name, weight in model.named_parameters() if weight.isinf().any()]
    if odd:
        raise ModelError(
            f"model {spec.name!r}: {len(odd)} weights are infinite in float16, such as {odd[0]}; set model.dtype to "
            "bfloat16 or float32"
        )


def _direct_attention(spec: ModelSpec, model: Any, raw: dict[str, Any]) -> None:
    """Let attention look both ways where config.json says so, and prove that it looks where it should.

    transformers (5.17, 5.23) takes no notice of `use_bidirectional_attention` outside Gemma, and a mask that hides
    nothing is dropped, whereupon torch's attention goes by each module's `is_causal`: both are set here.
    """
    both = looks_both_ways(raw)
    if both and _first_sees_last(model) != {True}:
        model.config.is_causal = False
        for module in model.modules():
            if hasattr(module, "is_causal"):
                module.is_causal = False
    encoder = model.config.model_type in ENCODERS and not getattr(model.config, "is_decoder", False)
    back_only = spec.kind == "causal" or model.config.model_type in DECODERS
    if not (both or encoder or back_only):
        return  # an architecture of which nothing is known but that it loads
    expected = both or encoder
    if not _first_sees_last(model) <= {expected}:
        wanted = "to see the last one" if expected else "not to see the last one"
        asked = "config.json says that attention looks both ways" if both else f"as {model.config.model_type!r} does"
        raise ModelError(
            f"model {spec.name!r}: expected the first position of {type(model).__name__} {wanted} ({asked}), found "
            "otherwise; this version of transformers computes another model than the one that was trained"
        )


@torch.no_grad()
def _first_sees_last(model: Any) -> set[bool]:
    """Whether another last token changes the hidden state at the first position, with a mask of ones and without one;
    empty where the weights give no numbers."""
    body, pad = model.base_model, getattr(model.config, "pad_token_id", None)
    one, other = [token for token in range(body.get_input_embeddings().weight.shape[0]) if token != pad][1:3]
    cache = {} if model.config.model_type in ENCODERS else {"use_cache": False}
    seen = set()
    for given in (cache, {**cache, "attention_mask": torch.ones(1, 4, dtype=torch.int64, device=model.device)}):
        first = [
            body(input_ids=torch.tensor([[one, one, one, last]], device=model.device), **given)[0][0, 0].float()
            for last in (one, other)
        ]
        if not torch.isfinite(torch.stack(first)).all():
            return set()
        # far above float32's rounding; of equal shapes, bfloat16 computes equal numbers equally
        seen.add(bool((first[0] - first[1]).norm() > 1e-6 * first[0].norm()))
    return seen


def from_pretrained(auto_class: Any, spec: ModelSpec, raw: dict[str, Any], device: str) -> tuple[Any, dict[str, Any]]:
    """A model and what transformers found of its keys. Each weight is read from its file, cast and put on the device by
    itself: the host holds no second copy of the model, only pages of the files, which the kernel can drop."""
    settings = {
        **({"config": gte_config(spec, raw)} if is_gte(raw) else {}),
        "dtype": DTYPES[spec.dtype],
        "trust_remote_code": spec.trust_remote_code,  # unset, transformers asks on stdin
        "use_safetensors": not spec.pickled,
        "weights_only": True,
        "local_files_only": True,
        "attn_implementation": "sdpa",
        "ignore_mismatched_sizes": True,  # so that they are reported with the others
        "output_loading_info": True,
    }
    try:
        with _devices_without_accelerate():
            model, info = auto_class.from_pretrained(spec.directory, device_map={"": torch.device(device)}, **settings)
    except ValueError as error:
        if "accelerate" not in str(error):
            raise
        log.warning("model %s: loaded through a whole copy in host memory: %s", spec.name, error)
        model, info = auto_class.from_pretrained(spec.directory, **settings)
    return model, info


@contextmanager
def _devices_without_accelerate() -> Iterator[None]:
    """Transformers (5.17 to 5.23) refuses any device_map without accelerate, but uses accelerate only for one of
    several devices or a disk. Where it is not installed, the one check is told that it is."""
    module: Any = transformers_accelerate
    asked = module.is_accelerate_available
    module.is_accelerate_available = lambda: True
    try:
        yield
    finally:
        module.is_accelerate_available = asked


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
        weights |= {_jina_name(name): tensor for name, tensor in load_file(path).items()}  # 0.6 GB, mapped
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
