"""The section `model` of a job file: which reranker, and how it is read."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from batch_rerank.engine.kinds import KINDS
from batch_rerank.engine.templates import parse_template
from batch_rerank.errors import ConfigError
from batch_rerank.outside import problem_of, protocol_of
from batch_rerank.sections import MOST, Name, Section, StorageOptions, Whole


class Model(Section):
    """The reranker; auto reads the checkpoint's own files. `name`: a hub id, a checkpoint directory, or a place in a
    store, such as s3://bucket/models/mine. `revision`: of a hub id; the newest if null. `kind`: causal,
    sequence_classification, bi_encoder, or checksum, a free stand-in. `template`: how a pair becomes a prompt: a name
    that `batch-rerank models` lists, or a mapping with a template of your own. `instruction`: the template's own if
    null; the input's column counts first. `max_length`: tokens of a sequence, query, document and template; the
    template's or the model's if null. `dtype`: auto is bfloat16 on GPUs and float32 on CPUs; float8 is of decoders on
    GPUs, packed, alone. `forward`: auto packs sequences where the model and device allow it and the self-test passes,
    and pads them else; packed and padded insist. `trust_remote_code`: run code of the checkpoint's. `allow_pickle`:
    read pickled weights, without running code in them. `cache_dir`: where a node keeps what it fetches from a store;
    batch-rerank beside the hub's own cache if null. `cache_bytes`: what that may hold: what was used longest ago goes
    first, and nothing that a process uses. `storage_options`: what the store of `name` is opened with; never stored or
    shown."""

    name: Name
    revision: str | None = None
    kind: str = "auto"
    template: str | dict[str, Any] = "auto"
    instruction: str | None = None
    max_length: Annotated[int, Field(ge=-MOST, le=MOST)] | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float8"] = "auto"
    forward: Literal["auto", "packed", "padded"] = "auto"
    trust_remote_code: bool = False
    allow_pickle: bool = False
    cache_dir: Name | None = None
    cache_bytes: Whole = 100 * 2**30
    storage_options: StorageOptions = Field(default={}, exclude=True, repr=False)  # may hold secrets: never stored

    @property
    def in_a_store(self) -> bool:
        """Whether `name` is a place, not a hub id or a directory."""
        return "://" in self.name

    @model_validator(mode="after")
    def _known_place(self) -> "Model":
        if self.in_a_store:
            if problem := problem_of(self.name):
                raise ValueError(f"name: {problem}")
            if (protocol := protocol_of(self.name)) in ("hf", "file", "local"):
                instead = "the hub id alone (owner/name)" if protocol == "hf" else "the path alone"
                raise ValueError(f"name: found {self.name!r}; expected {instead}")
        elif self.storage_options:
            raise ValueError("storage_options: are for a model in a store; remove them, or name a place (s3://…)")
        if self.cache_dir is not None and not self.cache_dir.startswith(("/", "~")):
            raise ValueError(
                f"cache_dir: found {self.cache_dir!r}; expected an absolute path, on a disk of each node: "
                "its processes have working directories of their own"
            )
        return self

    @model_validator(mode="after")
    def _whole_template(self) -> "Model":
        if not isinstance(self.template, str):
            try:
                parse_template(self.template)
            except ConfigError as error:
                raise ValueError(str(error).removeprefix("model.")) from None
        return self

    @model_validator(mode="after")
    def _known_kind(self) -> "Model":
        if self.kind not in ("auto", *KINDS):
            raise ValueError(f"kind: found {self.kind!r}; expected one of {['auto', *KINDS]}")
        return self

    @model_validator(mode="after")
    def _packed_float8(self) -> "Model":
        if self.dtype == "float8" and self.forward == "padded":
            raise ValueError("dtype: found float8, which only the packed forward has; set forward to auto, or bfloat16")
        return self
