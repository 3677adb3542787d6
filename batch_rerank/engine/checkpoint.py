"""From a model's name to a checked description of it, without torch and without reading a weight.

`resolve_model` finds the directory, decides the kind from the checkpoint's own files (never from its name) and
checks all that can be checked before an accelerator is taken. `identify` gives what the job's fingerprint holds.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from batch_rerank.engine.templates import HUB_MODELS, PAIR, SENTENCE, TEMPLATES, CausalTemplate, parse_template
from batch_rerank.errors import ConfigError, ModelError

Kind = Literal["causal", "sequence_classification", "bi_encoder", "checksum"]
KINDS: tuple[Kind, ...] = ("causal", "sequence_classification", "bi_encoder", "checksum")
DTYPES = ("float32", "bfloat16", "float16")

WEIGHTLESS_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.py")
SHORTEST_MAX_LENGTH = 32


@dataclass(frozen=True)
class ModelSpec:
    """A model as the job will use it.

    `max_length` counts tokens of the whole sequence. `instruction` is the job's or the template's, None where the
    template has no place for one. `relevance` says how a score becomes 0..1: "sigmoid" of
    score / relevance_scale, or "none" if undefined. `causal`: the template of a causal model.
    `chunk_overlap`: None to cut long documents, else the tokens that two chunks of one share. `escape`: control tokens
    inside queries and documents are read as plain text.
    """

    name: str
    revision: str | None
    directory: str
    identity: str
    kind: Kind
    template: str
    instruction: str | None
    max_length: int
    dtype: str
    relevance: Literal["sigmoid", "none"]
    relevance_scale: float = 1.0
    causal: CausalTemplate | None = None
    trust_remote_code: bool = False
    pickled: bool = False
    chunk_overlap: int | None = None
    escape: bool = False
    pooling: Literal["cls", "mean", "last", ""] = ""
    normalize: bool = False
    query_prompt: str = ""
    document_prompt: str = ""

    @property
    def takes_instruction(self) -> bool:
        """Whether an instruction can be given per query."""
        return self.instruction is not None


def resolve_model(
    name: str,
    *,
    revision: str | None = None,
    kind: str = "auto",
    template: str | Mapping[str, Any] = "auto",
    instruction: str | None = None,
    max_length: int | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    chunk_overlap: int | None = None,
    escape: bool = False,
) -> ModelSpec:
    """Describe the model that a hub id or a checkpoint directory names. Of a hub id only the small files are fetched:
    the weights are for those who score (`relocate`).

    Raises ModelError (no such model, no weights, an architecture this program cannot score with) and ConfigError
    (a setting that does not fit the model).
    """
    for setting, value, allowed in (("kind", kind, ("auto", *KINDS)), ("dtype", dtype, ("auto", *DTYPES))):
        if value not in allowed:
            raise ConfigError(f"model.{setting}: found {value!r}; expected one of {list(allowed)}")
    if kind == "checksum":
        return replace(_checksum_spec(name, instruction, max_length), chunk_overlap=chunk_overlap)
    directory, commit = locate(name, revision, weights=False)
    pickled = allow_pickle and not any(directory.glob("*.safetensors"))
    if commit is None:
        check_weights(directory, pickled)
    dtype = ("bfloat16" if device == "cuda" else "float32") if dtype == "auto" else dtype
    try:
        config = _read_json(directory / "config.json")
        if not trust_remote_code:
            _refuse_code(config, name)
        found = _kind(directory, config, kind, name)
        chosen = _template(found, template, config, name)
        details = _details(directory, config, found, chosen, name)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(
            f"model directory {directory}: one of its JSON files has content of an unexpected form "
            f"({type(error).__name__}: {error}); expected a transformers checkpoint; copy it again"
        ) from error
    label = chosen if isinstance(chosen, str) else chosen.name
    details["instruction"] = _instruction(label, details["instruction"], instruction)
    details["max_length"] = _max_length(max_length, details["max_length"], details.pop("positions"))
    return ModelSpec(
        name=name if commit else str(directory),  # absolute: workers may have another working directory
        revision=commit,
        directory=str(directory),
        identity=identify(directory, commit),
        kind=found,
        template=label,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        pickled=pickled,
        chunk_overlap=chunk_overlap,
        escape=escape,
        **details,
    )


def relocate(spec: ModelSpec, weights: bool = True) -> ModelSpec:
    """A planned model on this machine. Raises ModelError where it is not here, or not the one that was planned."""
    if spec.kind == "checksum":
        return spec
    directory, commit = locate(spec.name, spec.revision, weights, spec.pickled)
    if weights:
        check_weights(directory, spec.pickled)
    found = identify(directory, commit)
    if found != spec.identity:
        raise ModelError(
            f"model {spec.name!r} ({directory}): found {found}, but the plan has {spec.identity}; "
            "put the same checkpoint on every node, or plan a new output"
        )
    return replace(spec, directory=str(directory))


def locate(name: str, revision: str | None, weights: bool = True, pickled: bool = False) -> tuple[Path, str | None]:
    """The checkpoint's directory and, for a hub id, its commit. Downloads from the hub what is not cached; without
    `weights` the small files only, so that a CPU node does not fetch 16 GB to tokenise."""
    directory = Path(name).expanduser()
    if directory.is_dir():
        return directory.resolve(), None
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelError(
            f"model.name {name!r}: no such directory on this machine, and not a hub id (owner/name); "
            "on a cluster the directory must exist at the same path on every node"
        )
    from huggingface_hub import snapshot_download

    patterns = [*WEIGHTLESS_FILES, *(["*.bin" if pickled else "*.safetensors"] if weights else [])]
    try:
        path = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub client raises OSError, ValueError and its own errors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"model.name {name!r} is no directory here and could not be fetched from the hub: {reason}; "
            "check the id, the network and HF_TOKEN, or give a checkpoint directory"
        ) from error
    return path, path.name


def identify(directory: Path, commit: str | None) -> str:
    """What makes two checkpoints the same: the hub commit, or a sha256 over a directory's small files, its pickles, and
    the header and size of every safetensors. Reads no other weights, so an actor recomputes it in well under a second.
    """
    if commit is not None:
        return f"commit:{commit}"
    digest = hashlib.sha256()
    small = {path for pattern in (*WEIGHTLESS_FILES, "*.bin") for path in directory.rglob(pattern)}
    for path in sorted(small | set(directory.glob("*.safetensors"))):
        content = path.read_bytes() if path in small else _safetensors_header(path)
        digest.update(f"{path.relative_to(directory)}:{path.stat().st_size}:".encode())
        digest.update(hashlib.sha256(content).digest())
    return f"sha256:{digest.hexdigest()}"


def check_weights(directory: Path, pickled: bool = False) -> None:
    """Raise ModelError where the weights are absent, cut short, or pickled and not `pickled`. Reads headers only."""
    weights = sorted(directory.glob("*.safetensors"))
    if pickled and any(directory.glob("*.bin")):
        return
    if not weights:
        bins = sorted(path.name for path in directory.glob("*.bin"))
        found = f"only pickled weights ({', '.join(bins)}), which can run code" if bins else "no weights"
        raise ModelError(
            f"model directory {directory}: found {found}; expected *.safetensors; "
            "fetch the complete checkpoint, convert it to safetensors, or set model.allow_pickle: true"
        )
    index = directory / "model.safetensors.index.json"
    if index.exists():
        weight_map = _read_json(index).get("weight_map")
        named = set(weight_map.values()) if isinstance(weight_map, dict) else {f"no weight_map: {weight_map!r}"}
        absent = sorted(named - {path.name for path in weights})
        if absent:
            raise ModelError(f"model directory {directory}: {index.name} names {absent}, which are not there")
    for path in weights:
        _safetensors_header(path)


def _safetensors_header(path: Path) -> bytes:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        header = file.read(length) if 8 + length <= size else b""
    try:
        tensors: dict[str, Any] = json.loads(header)
        ends = [entry["data_offsets"][1] for key, entry in tensors.items() if key != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        expected = -1
    if expected != size:
        wanted = f"{expected:,} bytes by its header" if expected >= 0 else "a complete safetensors header"
        raise ModelError(
            f"{path}: found {size:,} bytes, expected {wanted}; the file is cut short or damaged, copy it again"
        )
    return header


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"model directory {path.parent}: no {path.name}; expected a transformers checkpoint") from None
    except ValueError as error:
        raise ModelError(f"{path}: not JSON ({error}); the file is damaged, copy it again") from None
    return value if isinstance(value, dict) else {"items": value}


def _modules(directory: Path) -> list[dict[str, Any]]:
    path = directory / "modules.json"
    modules = _read_json(path)["items"] if path.exists() else []
    return [{"type": str(module["type"]), "path": str(module["path"])} for module in modules]


def _refuse_code(config: dict[str, Any], name: str) -> None:
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


def _kind(directory: Path, config: dict[str, Any], asked: str, name: str) -> Kind:
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


def _template(kind: Kind, asked: str | Mapping[str, Any], config: dict[str, Any], name: str) -> str | CausalTemplate:
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


def _details(
    directory: Path, config: dict[str, Any], kind: Kind, template: str | CausalTemplate, name: str
) -> dict[str, Any]:
    """What depends on the kind: default instruction and max_length, positions, relevance, pooling, prompts."""
    positions = _positions(config)
    known = HUB_MODELS[name].max_length if name in HUB_MODELS else None
    tokenizer_config = directory / "tokenizer_config.json"
    longest = _read_json(tokenizer_config).get("model_max_length") if tokenizer_config.exists() else None
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
    pooling = _read_json(directory / pooling_path / "config.json")
    modes = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean", "pooling_mode_lasttoken": "last"}
    chosen = [key for key, on in pooling.items() if key.startswith("pooling_mode_") and on is True]
    if len(chosen) != 1 or chosen[0] not in modes or pooling.get("include_prompt") is False:
        raise ModelError(
            f"{directory}/{pooling_path}/config.json: found {chosen or pooling}, expected one of {list(modes)}"
        )
    st_path = directory / "config_sentence_transformers.json"
    st = _read_json(st_path) if st_path.exists() else {}
    prompts = st.get("prompts") or {}
    query = prompts.get("query") or ""
    length_path = directory / "sentence_bert_config.json"
    length = _read_json(length_path).get("max_seq_length") if length_path.exists() else None
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


def _instruction(template: str, default: str | None, asked: str | None) -> str | None:
    if asked is not None and default is None:
        raise ConfigError(
            f"model.instruction: found {asked!r}, but the template {template!r} has no place for one; remove it"
        )
    return default if asked is None else asked


def _max_length(asked: int | None, default: int, positions: int) -> int:
    if asked is None:
        return min(default, positions)
    if not SHORTEST_MAX_LENGTH <= asked <= positions:
        raise ConfigError(
            f"model.max_length: found {asked}; expected {SHORTEST_MAX_LENGTH} to {positions}, the model's positions"
        )
    return asked


def _checksum_spec(name: str, instruction: str | None, max_length: int | None) -> ModelSpec:
    return ModelSpec(
        name=name,
        revision=None,
        directory="",
        identity="checksum",
        kind="checksum",
        template="bytes",
        instruction=instruction or "",
        max_length=max_length or 8192,
        dtype="float32",
        relevance="sigmoid",
    )
