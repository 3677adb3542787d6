"""From a model's name to a checked description of it, without torch and without reading a weight.

`resolve_model` describes the model to plan with and checks all that can be checked before an accelerator is taken;
`relocate` finds a planned model on another machine.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from batch_rerank.engine.architecture import DECODERS, refuse_unknown_computation
from batch_rerank.engine.checkpoint_files import (
    Stored,
    check_weights,
    copied_from,
    identify,
    locate,
    read_json,
    refuse_adapter,
)
from batch_rerank.engine.kinds import KINDS, Kind, details_of, kind_of, refuse_code, template_of
from batch_rerank.engine.templates import CausalTemplate
from batch_rerank.errors import ConfigError, ModelError

DTYPES = ("float32", "bfloat16", "float16", "float8")
SHORTEST_MAX_LENGTH = 32


@dataclass(frozen=True)
class ModelSpec:
    """A model as the job will use it.

    `max_length` counts tokens of the whole sequence. `instruction` is the job's or the template's, None where the
    template has no place for one. `relevance` says how a score becomes 0..1: "sigmoid" of
    score / relevance_scale, or "none" if undefined. `causal`: the template of a causal model, or of a decoder with a
    classification head, whose template has no answer tokens. `labels` of a classification head: 1, where the score is
    the logit, or 2, where it is logit[1] - logit[0], the log-odds of label 1 under softmax (transformers' cross-entropy
    of two labels; id2label is checked to call 1 the yes).
    `chunk_overlap`: None to cut long documents, else the tokens that two chunks of one share. `escape`: control tokens
    inside queries and documents are read as plain text. `files`: of a model that lies in a store, as `Stored` has them.
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
    labels: int = 1
    trust_remote_code: bool = False
    pickled: bool = False
    chunk_overlap: int | None = None
    escape: bool = False
    pooling: Literal["cls", "mean", "last", ""] = ""
    normalize: bool = False
    query_prompt: str = ""
    document_prompt: str = ""
    files: tuple[tuple[str, int, str, str], ...] = ()

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
    stored: Stored | None = None,
) -> ModelSpec:
    """Describe the model that a hub id or a checkpoint directory names, or that was found in a store. Of a hub id only
    the small files are fetched: the weights are for those who score (`relocate`).

    Raises ModelError (no such model, no weights, an architecture this program cannot score with) and ConfigError
    (a setting that does not fit the model).
    """
    for setting, value, allowed in (("kind", kind, ("auto", *KINDS)), ("dtype", dtype, ("auto", *DTYPES))):
        if value not in allowed:
            raise ConfigError(f"model.{setting}: found {value!r}; expected one of {list(allowed)}")
    if kind == "checksum":
        return replace(_checksum_spec(name, instruction, max_length), chunk_overlap=chunk_overlap)
    directory, commit = (stored.directory, None) if stored else locate(name, revision, weights=False)
    if stored and revision is not None and stored.identity != f"commit:{revision}":
        raise ConfigError(
            f"model.revision: found {revision!r}, but what lies at {name} is {stored.identity}; remove the key: a "
            "place has one version"
        )
    if not stored and commit is None and revision is not None:
        raise ConfigError(
            f"model.revision: found {revision!r}, but {name!r} is a directory here, which has no revisions; remove it"
        )
    refuse_adapter(directory)
    names = [file[0] for file in stored.files] if stored else [path.name for path in directory.iterdir()]
    pickled = allow_pickle and not any(file.endswith(".safetensors") for file in names)
    if commit is None and stored is None:
        check_weights(directory, pickled)
    known_as = (stored.known_as if stored else "" if commit else copied_from(directory)) or name
    dtype = ("bfloat16" if device == "cuda" else "float32") if dtype == "auto" else dtype
    try:
        config = read_json(directory / "config.json")
        if not trust_remote_code:
            refuse_code(config, name)
        refuse_unknown_computation(config, name)
        found = kind_of(directory, config, kind, name)
        chosen = template_of(found, template, config, known_as)
        details = details_of(directory, config, found, chosen, known_as)
        if dtype == "float8":
            _refuse_float8(found, str(config.get("model_type")), device)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(
            f"model directory {directory}: one of its JSON files has content of an unexpected form "
            f"({type(error).__name__}: {error}); expected a transformers checkpoint; copy it again"
        ) from error
    label = chosen if isinstance(chosen, str) else chosen.name
    details["instruction"] = _instruction(label, details["instruction"], instruction)
    details["max_length"] = _max_length(max_length, details["max_length"], details.pop("positions"))
    return ModelSpec(
        name=name if commit or stored else str(directory),  # absolute: workers may have another working directory
        revision=commit,
        directory=str(directory),
        identity=stored.identity if stored else identify(directory, commit),
        kind=found,
        template=label,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        pickled=pickled,
        chunk_overlap=chunk_overlap,
        escape=escape,
        files=stored.files if stored else (),
        **details,
    )


def _refuse_float8(kind: Kind, architecture: str, device: str) -> None:
    if not device.startswith("cuda"):
        raise ConfigError(
            "model.dtype: found float8, which needs a GPU of compute capability 8.9 or later, but this is to score on "
            "the CPU; set float32 or bfloat16, or for a job on GPUs cluster.gpus_per_actor: 1"
        )
    if kind == "bi_encoder" or architecture not in DECODERS:
        raise ConfigError(
            f"model.dtype: found float8 for a model of kind {kind} and architecture {architecture!r}; expected a "
            "decoder that scores pairs (causal, or with a classification head); set bfloat16"
        )


def relocate(spec: ModelSpec, weights: bool = True) -> ModelSpec:
    """A planned model on this machine; one of a store is in `spec.directory`, put there by whoever can reach the store.
    Raises ModelError where it is not here, or not the one that was planned."""
    if spec.kind == "checksum":
        return spec
    directory, commit = (
        (Path(spec.directory), None) if spec.files else locate(spec.name, spec.revision, weights, spec.pickled)
    )
    if weights:
        check_weights(directory, spec.pickled)
    if spec.files and (not weights or spec.identity.startswith("commit:")):
        return spec  # its files were held against their etags and checksums when they came
    found = identify(directory, commit)
    if found != spec.identity:
        raise ModelError(
            f"model {spec.name!r} ({directory}): found {found}, but the plan has {spec.identity}; "
            "put the same checkpoint on every node, or plan a new output"
        )
    return replace(spec, directory=str(directory))


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
