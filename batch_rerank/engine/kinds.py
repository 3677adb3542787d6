"""What kind of model a checkpoint is and how it is asked, from its own files, never from its name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from batch_rerank.engine.checkpoint_files import read_json
from batch_rerank.engine.templates import HUB_MODELS, PAIR, SENTENCE, TEMPLATES, CausalTemplate, parse_template
from batch_rerank.errors import ConfigError, ModelError

Kind = Literal["causal", "sequence_classification", "bi_encoder", "checksum"]
KINDS: tuple[Kind, ...] = ("causal", "sequence_classification", "bi_encoder", "checksum")


def kind_of(directory: Path, config: dict[str, Any], asked: str, name: str) -> Kind:
    """Qwen3-Embedding's config names Qwen3ForCausalLM and loads as one without a missing key: modules.json decides."""
    listed = config.get("architectures") or []
    architectures = [str(a) for a in ([listed] if isinstance(listed, str) else listed)]
    found: Kind | None = None
    if any(module["type"].endswith(".Pooling") for module in _modules(directory)):
        found = "bi_encoder"
    elif any(a.endswith("ForSequenceClassification") for a in architectures):
        found = "sequence_classification"
    elif any(a.endswith("ForCausalLM") for a in architectures):
        found = "causal"
    if found is None:
        raise ModelError(
            f"model {name!r}: architecture {architectures or 'unnamed'} is none this program can score with; expected "
            "a ...ForCausalLM reranker, a ...ForSequenceClassification with one label, or a sentence-transformers "
            "bi-encoder (modules.json with Pooling). Listwise models score a document by its neighbours and do not fit"
        )
    if asked not in ("auto", found):
        raise ModelError(
            f"model {name!r}: model.kind is {asked!r}, but the checkpoint's files say {found!r}; set model.kind: auto"
        )
    return found


def template_of(kind: Kind, asked: str | Mapping[str, Any], config: dict[str, Any], name: str) -> str | CausalTemplate:
    """The template that was asked for, or the only one known for this model. Raises ConfigError where none is."""
    only = {"sequence_classification": PAIR, "bi_encoder": SENTENCE}.get(kind)
    if only is not None:
        if asked not in ("auto", only):
            raise ConfigError(f"model.template: found {asked!r}; a model of kind {kind} takes {only!r} or auto")
        return only
    if not isinstance(asked, str):
        return parse_template(asked)
    if asked == "auto" and name in HUB_MODELS:
        return TEMPLATES[HUB_MODELS[name].template]
    if asked == "auto" and config.get("model_type") != "qwen3":
        raise ConfigError(
            f"model.template: no template is known for the architecture {config.get('architectures')}; "
            f"set one of {sorted(TEMPLATES)} if the model was trained with it, or write your own"
        )
    if asked not in ("auto", *TEMPLATES):
        raise ConfigError(f"model.template: found {asked!r}; expected one of {sorted(TEMPLATES)}, or a mapping")
    return TEMPLATES["qwen3-reranker" if asked == "auto" else asked]


def details_of(
    directory: Path, config: dict[str, Any], kind: Kind, template: str | CausalTemplate, name: str
) -> dict[str, Any]:
    """What depends on the kind: default instruction and max_length, positions, relevance, pooling, prompts."""
    positions = _positions(config)
    known = HUB_MODELS[name].max_length if name in HUB_MODELS else None
    tokenizer_config = directory / "tokenizer_config.json"
    longest = read_json(tokenizer_config).get("model_max_length") if tokenizer_config.exists() else None
    # transformers writes 1e30 for "unknown"
    default = min(int(longest), positions) if longest and longest < 1e9 else positions
    common: dict[str, Any] = {
        "positions": positions,
        "instruction": None,
        "max_length": known or default,
        "relevance": "none",
    }
    if isinstance(template, CausalTemplate):
        own = {"relevance": template.relevance, "relevance_scale": template.scale, "causal": template}
        length = min(template.max_length, positions)
        return {**common, **own, "max_length": length, "instruction": template.instruction}
    if kind == "sequence_classification":
        labels = config.get("num_labels") or len(config.get("id2label") or {"0": "", "1": ""})
        if labels != 1:
            raise ModelError(f"model {name!r}: found a classification head with {labels} labels, expected 1")
        head = str((config.get("sentence_transformers") or {}).get("activation_fn", "Sigmoid"))
        return {**common, "relevance": "none" if head.endswith("Identity") else "sigmoid"}
    return {**common, **_sentence_details(directory, common["max_length"])}


def _sentence_details(directory: Path, default_length: int) -> dict[str, Any]:
    """Pooling, normalisation and prompts as sentence-transformers stores them."""
    modules = [module["type"].rsplit(".", 1)[-1] for module in _modules(directory)]
    if modules not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ModelError(
            f"{directory}/modules.json: found {modules}, expected Transformer, Pooling and maybe Normalize"
        )
    pooling_path = next(str(m["path"]) for m in _modules(directory) if str(m["type"]).endswith(".Pooling"))
    pooling = read_json(directory / pooling_path / "config.json")
    modes = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean", "pooling_mode_lasttoken": "last"}
    chosen = [key for key, on in pooling.items() if key.startswith("pooling_mode_") and on is True]
    if len(chosen) != 1 or chosen[0] not in modes or pooling.get("include_prompt") is False:
        raise ModelError(
            f"{directory}/{pooling_path}/config.json: found {chosen or pooling}, expected one of {list(modes)}"
        )
    st_path = directory / "config_sentence_transformers.json"
    st = read_json(st_path) if st_path.exists() else {}
    prompts = st.get("prompts") or {}
    query = prompts.get("query") or ""
    length_path = directory / "sentence_bert_config.json"
    length = read_json(length_path).get("max_seq_length") if length_path.exists() else None
    return {
        "pooling": modes[chosen[0]],
        "normalize": modules[-1] == "Normalize" or st.get("similarity_fn_name") in (None, "cosine"),
        "query_prompt": query,
        "document_prompt": prompts.get("document") or prompts.get("passage") or "",
        "instruction": instruction_in(query),
        "max_length": length or default_length,
    }


def instruction_in(prompt: str) -> str | None:
    """The instruction inside a query prompt `Instruct: …, newline, Query:` (Qwen3-Embedding's card), else None."""
    if prompt.startswith("Instruct: ") and prompt.rstrip().endswith("\nQuery:"):
        return prompt[len("Instruct: ") : prompt.rindex("\nQuery:")]
    return None


def _positions(config: dict[str, Any]) -> int:
    positions = int(config.get("max_position_embeddings") or 512)
    # XLM-R and RoBERTa count positions from pad_token_id + 1: 514 rows hold 512 tokens
    roberta = "roberta" in str(config.get("model_type")) or is_jina(config)
    offset = int(config.get("pad_token_id") or 0) + 1 if roberta else 0
    return positions - offset


def _modules(directory: Path) -> list[dict[str, Any]]:
    path = directory / "modules.json"
    modules = read_json(path)["items"] if path.exists() else []
    return [{"type": str(module["type"]), "path": str(module["path"])} for module in modules]


def refuse_code(config: dict[str, Any], name: str) -> None:
    """Raise ModelError where the checkpoint cannot be loaded without running code of its own."""
    if not config.get("auto_map") or is_gte(config) or is_jina(config):
        return
    from transformers import CONFIG_MAPPING  # slow, and seldom needed

    if config.get("model_type") not in CONFIG_MAPPING:
        code = sorted(map(str, config["auto_map"].values()))
        raise ModelError(
            f"model {name!r}: transformers does not have its model_type {config.get('model_type')!r}, and config.json "
            f"names code of its own: {code}; read that code, and where you trust it set model.trust_remote_code: true"
        )


def is_gte(config: dict[str, Any]) -> bool:
    """Whether this is the config of Alibaba-NLP's `new` architecture, which transformers has as `gte`."""
    return config.get("model_type") == "new"


def is_jina(config: dict[str, Any]) -> bool:
    """Whether this is the config of jina-reranker-v2: XLM-R with other names of the weights, and no model_type."""
    remote = str((config.get("auto_map") or {}).get("AutoConfig"))
    return "model_type" not in config and remote.endswith("XLMRobertaFlashConfig")
