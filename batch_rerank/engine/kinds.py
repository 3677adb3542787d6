"""What kind of model a checkpoint is and how it is asked, from its own files, never from its name."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from batch_rerank.engine.architecture import DECODERS, ENCODERS, architectures, steady_positions
from batch_rerank.engine.checkpoint_files import read_json
from batch_rerank.engine.templates import HUB_MODELS, PAIR, SENTENCE, TEMPLATES, CausalTemplate, parse_template
from batch_rerank.errors import ConfigError, ModelError

Kind = Literal["causal", "sequence_classification", "bi_encoder", "checksum"]
INSTRUCT = "Instruct: "
KINDS: tuple[Kind, ...] = ("causal", "sequence_classification", "bi_encoder", "checksum")


def kind_of(directory: Path, config: dict[str, Any], asked: str, name: str) -> Kind:
    """Qwen3-Embedding's config names Qwen3ForCausalLM and loads as one without a missing key: modules.json decides."""
    listed = architectures(config)
    found: Kind | None = None
    if any(module["type"].endswith(".Pooling") for module in _modules(directory)):
        found = "bi_encoder"
    elif any(a.endswith("ForSequenceClassification") for a in listed):
        found = "sequence_classification"
    elif any(a.endswith("ForCausalLM") for a in listed):
        found = "causal"
    if found is None:
        raise ModelError(
            f"model {name!r}: architecture {listed or 'unnamed'} is none this program can score with; expected "
            "a ...ForCausalLM reranker, a ...ForSequenceClassification, or a sentence-transformers "
            "bi-encoder (modules.json with Pooling). Listwise models score a document by its neighbours and do not fit"
        )
    if asked not in ("auto", found):
        raise ModelError(
            f"model {name!r}: model.kind is {asked!r}, but the checkpoint's files say {found!r}; set model.kind: auto"
        )
    return found


def template_of(kind: Kind, asked: str | Mapping[str, Any], config: dict[str, Any], name: str) -> str | CausalTemplate:
    """The template that was asked for, or the only one known for this model. Raises ConfigError where none is."""
    if kind == "bi_encoder":
        if asked not in ("auto", SENTENCE):
            raise ConfigError(f"model.template: found {asked!r}; a model of kind {kind} takes {SENTENCE!r} or auto")
        return SENTENCE
    if kind == "sequence_classification":
        return _classifiers_template(asked, config, name)
    template = parse_template(asked) if not isinstance(asked, str) else None
    if asked == "auto" and name in HUB_MODELS:
        template = TEMPLATES[HUB_MODELS[name].template]
    elif asked == "auto" and config.get("model_type") == "qwen3":
        template = TEMPLATES["qwen3-reranker"]
    elif asked == "auto":
        raise ConfigError(
            f"model.template: no template is known for the architecture {config.get('architectures')}; "
            f"set one of {sorted(TEMPLATES)} if the model was trained with it, or write your own"
        )
    elif template is None and asked not in TEMPLATES:
        raise ConfigError(f"model.template: found {asked!r}; expected one of {sorted(TEMPLATES)}, or a mapping")
    template = template or TEMPLATES[str(asked)]
    if template.true_token is None:
        raise ConfigError(
            f"model.template: true_token: missing in {template.name!r}; a causal model's score is the logit of a token"
        )
    return template


def _classifiers_template(asked: str | Mapping[str, Any], config: dict[str, Any], name: str) -> str | CausalTemplate:
    """PAIR, or a causal template without its answers, which a head has replaced.

    The files do not say with which prompt a decoder's head was trained, and with another one its scores are wrong
    without a sign of it. So a decoder's template is asked for.
    """
    decoder = config.get("model_type") not in ENCODERS and not is_jina(config)
    if asked == "auto" and name in HUB_MODELS:
        asked = HUB_MODELS[name].template
    elif asked == "auto" and not decoder:
        asked = PAIR
    elif asked == "auto":
        raise ConfigError(
            f"model.template: not known for the classification head of {config.get('architectures')}; expected the one "
            f"that the head was trained with: one of {sorted(TEMPLATES)}, {PAIR!r} for the tokenizer's own pair, or a "
            "mapping (a Qwen3-Reranker converted to one label: qwen3-reranker)"
        )
    if asked == PAIR:
        return PAIR
    if not decoder:
        raise ConfigError(
            f"model.template: found {asked!r}; a model of kind sequence_classification with an encoder takes {PAIR!r} "
            "or auto"
        )
    if isinstance(asked, str) and asked not in TEMPLATES:
        raise ConfigError(
            f"model.template: found {asked!r}; expected {PAIR!r}, one of {sorted(TEMPLATES)}, or a mapping"
        )
    template = TEMPLATES[asked] if isinstance(asked, str) else parse_template(asked)
    return replace(template, true_token=None, false_token=None)


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
        common |= {**own, "max_length": min(template.max_length, positions), "instruction": template.instruction}
    if kind == "causal":
        return common
    if kind == "sequence_classification":
        if not isinstance(template, CausalTemplate):
            common["relevance"] = "sigmoid"
        if str((config.get("sentence_transformers") or {}).get("activation_fn")).endswith("Identity"):
            common["relevance"] = "none"
        return {**common, "labels": _labels(config, name)}
    return {**common, **_sentence_details(directory, common["max_length"])}


NO = ("label_0", "no", "false", "irrelevant", "not_relevant", "not relevant", "0")
YES = ("label_1", "yes", "true", "relevant", "1")
"""Names of the first and the second of two labels. LABEL_0 and LABEL_1 are transformers' for labels without a name,
which are trained on 0 for no and 1 for yes."""


def _labels(config: dict[str, Any], name: str) -> int:
    """1, or a decoder's 2. Raises ModelError for more, or where the second label is not the one for relevant."""
    named = config.get("id2label") or {}
    labels = int(config.get("num_labels") or len(named) or 2)  # 2: transformers' own default
    if labels == 1:
        return 1
    known = labels == 2 and config.get("model_type") in DECODERS
    if not known:
        raise ModelError(
            f"model {name!r}: found a classification head with {labels} labels, expected 1 (or 2 on a decoder)"
        )
    names = [str(named.get(str(label), f"LABEL_{label}")).lower() for label in (0, 1)]
    ordered = names[0] in NO and names[1] in YES
    if not ordered or config.get("problem_type") == "multi_label_classification":
        raise ModelError(
            f"model {name!r}: found the labels {named} with problem_type {config.get('problem_type')!r}; expected "
            "0 for no and 1 for yes, of which one is true"
        )
    return 2


def _sentence_details(directory: Path, default_length: int) -> dict[str, Any]:
    """Pooling, normalisation and prompts as sentence-transformers stores them."""
    modules = [module["type"].rsplit(".", 1)[-1] for module in _modules(directory)]
    if modules not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ModelError(
            f"{directory}/modules.json: found {modules}, expected Transformer, Pooling and maybe Normalize"
        )
    pooling_path = next(str(m["path"]) for m in _modules(directory) if str(m["type"]).endswith(".Pooling"))
    pooling = read_json(directory / pooling_path / "config.json")
    modes = {"cls_token": "cls", "mean_tokens": "mean", "lasttoken": "last", "cls": "cls", "mean": "mean"}
    chosen = [
        key.removeprefix("pooling_mode_") for key, on in pooling.items() if key[:13] == "pooling_mode_" and on is True
    ]
    if "pooling_mode" in pooling:  # as sentence-transformers 6 writes it: one name, or several
        chosen = [pooling["pooling_mode"]] if isinstance(pooling["pooling_mode"], str) else pooling["pooling_mode"]
    if len(chosen) != 1 or chosen[0] not in modes or pooling.get("include_prompt") is False:
        raise ModelError(
            f"{directory}/{pooling_path}/config.json: found pooling {chosen or pooling}, "
            f"expected one of {sorted(modes)}, with include_prompt"
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
        # the names that sentence-transformers' encode_document looks for, in its order
        "document_prompt": next(filter(None, map(prompts.get, ("document", "passage", "corpus"))), ""),
        "instruction": instruction_in(query),
        "max_length": length or default_length,
    }


def with_instruction(prompt: str, instruction: str | None) -> str:
    """A query prompt with another instruction, and every other byte as it is stored: what follows "Query:" (nothing, in
    Qwen3-Embedding; a space, in others) is a token of its own."""
    own = instruction_in(prompt)
    if instruction is None or own is None:
        return prompt
    return f"{INSTRUCT}{instruction}{prompt[len(INSTRUCT) + len(own) :]}"


def instruction_in(prompt: str) -> str | None:
    """The instruction inside a query prompt `Instruct: …, newline, Query:` (Qwen3-Embedding's card), else None."""
    if prompt.startswith(INSTRUCT) and prompt.rstrip().endswith("\nQuery:"):
        return prompt[len(INSTRUCT) : prompt.rindex("\nQuery:")]
    return None


def _positions(config: dict[str, Any]) -> int:
    positions = steady_positions(config)
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
