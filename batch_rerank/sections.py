"""What the sections of a job file have in common, and those that stand alone."""

from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from batch_rerank.outside import problem_of, protocol_of

MOST = 2**53
"""Of whole numbers: what JSON and every library that is handed one can hold."""

Whole = Annotated[int, Field(ge=1, le=MOST)]

TYPES: dict[str, type] = {
    **dict.fromkeys(("key", "secret", "token", "username", "password", "endpoint_url", "profile", "project"), str),
    **dict.fromkeys(("account_name", "account_key", "sas_token", "connection_string"), str),
    **dict.fromkeys(("anon", "use_ssl", "requester_pays", "use_listings_cache"), bool),
    **dict.fromkeys(("client_kwargs", "config_kwargs", "s3_additional_kwargs"), dict),
}
"""Of the storage options that are known, those whose libraries fail late or strangely where they get another type."""

KINDS = {str: "a text (in quotes where it looks like a number)", bool: "true or false", dict: "a mapping"}


def _options(options: dict[str, Any]) -> dict[str, Any]:
    wrong = [name for name, kind in TYPES.items() if not isinstance(options.get(name), (kind, type(None)))]
    # token: gcsfs takes a mapping
    wrong = [name for name in wrong if (name, type(options[name])) != ("token", dict)]
    if wrong:
        raise ValueError("; ".join(f"{name}: expected {KINDS[TYPES[name]]}; its value is not shown" for name in wrong))
    return options


StorageOptions = Annotated[dict[str, Any], AfterValidator(_options)]


def _place(place: str) -> str:
    if problem := problem_of(place):
        raise ValueError(problem)
    return place


def _written(place: str) -> str:
    if protocol_of(place) == "hf":
        raise ValueError(f"found {place[:200]!r}; hf:// is for inputs: nothing is created exclusively there")
    return place


def _name(name: str) -> str:
    if not name or "\0" in name:
        raise ValueError(f"found {name!r}; expected a name, a path or a URL")
    return name


Name = Annotated[str, AfterValidator(_name)]
Place = Annotated[str, AfterValidator(_place)]
Written = Annotated[Place, AfterValidator(_written)]
Places = Place | Annotated[list[Place], Field(min_length=1)]


class Section(BaseModel):
    """Base of all sections."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads yes, on and true as True, which Python counts as 1."""
        truths = [one for one in (value if isinstance(value, list | tuple) else [value]) if isinstance(one, bool)]
        if truths and _has_numbers(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError(
                f"found {str(truths[0]).lower()}; expected a number (YAML reads yes and no as truth values)"
            )
        return value


def _has_numbers(annotation: Any) -> bool:
    return annotation in (int, float) or any(map(_has_numbers, get_args(annotation)))


def as_list(places: Places | None) -> list[str]:
    """Paths or globs as a list."""
    return [] if places is None else [places] if isinstance(places, str) else places


class Reuse(Section):
    """Whose scores are taken instead of computed again. `from`: earlier outputs, as paths, globs, or `latest`, which
    is the one that output.latest names; they are opened with output.storage_options. `audit`: share of the taken
    scores that is computed again and compared, at least some 200 pairs where there are any; 0 trusts them."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, serialize_by_alias=True)

    from_: Places = Field(alias="from")
    audit: Annotated[float, Field(ge=0, le=1)] = 0.001

    @property
    def places(self) -> list[str]:
        """What `from` names, as a list."""
        return as_list(self.from_)


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Cost(Section):
    """What a job may cost. `usd_per_gpu_hour`: the price of one GPU. `max_usd`, `max_gpu_hours`: a plan that needs more
    is refused before a GPU is taken, and a run that reaches it stops at a unit's border (exit 8), to be resumed.
    `rates`: outputs, and files that `bench` wrote, as paths or globs, whose rates a plan may go by; its own output,
    those of `reuse.from` and the one that `output.latest` names are looked at anyway."""

    usd_per_gpu_hour: Positive | None = None
    max_usd: Positive | None = None
    max_gpu_hours: Positive | None = None
    rates: Places | None = None

    @property
    def places(self) -> list[str]:
        """What `rates` names, as a list."""
        return as_list(self.rates)

    @property
    def most_gpu_hours(self) -> float | None:
        """The lower of both limits, in hours of one GPU; None without any."""
        limits = [] if self.max_gpu_hours is None else [self.max_gpu_hours]
        if self.max_usd is not None and self.usd_per_gpu_hour is not None:
            limits.append(self.max_usd / self.usd_per_gpu_hour)
        return min(limits, default=None)

    @model_validator(mode="after")
    def _priced(self) -> "Cost":
        if self.max_usd is not None and self.usd_per_gpu_hour is None:
            raise ValueError("max_usd: needs a price; set cost.usd_per_gpu_hour too, or use max_gpu_hours")
        return self


class ActorRange(Section):
    """A pool that grows and shrinks. `min`: actors at least. `max`: actors at most."""

    min: Whole
    max: Whole

    @model_validator(mode="after")
    def _ordered(self) -> "ActorRange":
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self


def _countable(gpus: float) -> float:
    if not (0.0001 <= gpus <= 1 or gpus == int(gpus)):
        raise ValueError(f"{gpus:g} GPUs; expected 0, a share of one (0.0001 to 1), or a whole number")
    return gpus


class Cluster(Section):
    """The actors. `actors`: copies of the model, or {min: 1, max: 8}. `gpus_per_actor`: auto is 1 where the cluster has
    GPUs or brings them, else 0; 0 scores on the CPU. `cpus_per_actor`: threads of an actor on the CPU; auto divides a
    node's cores among its actors, and is 1 beside a GPU. `address`: HOST:PORT of a Ray to join; RAY_ADDRESS, or else a
    Ray of its own on this machine, if null. `prefetch_units`: units that are given to an actor ahead.
    `accelerator_type`: only GPUs that Ray calls so (L4, A100, H100, …) serve; any if null. `lease_seconds`: how long a
    job must be silent before another one takes its output over. `max_seconds_without_progress`: on Ray, how long
    nothing may happen (no unit, part or piece of a stage ends, and no model is loaded) before the job ends with exit 9;
    it waits for ever if null."""

    actors: Whole | ActorRange = 1
    gpus_per_actor: Literal["auto"] | Annotated[float, Field(ge=0, le=1000), AfterValidator(_countable)] = "auto"
    cpus_per_actor: Literal["auto"] | Whole = "auto"
    address: str | None = None
    prefetch_units: Whole = 2
    accelerator_type: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,100}$")] | None = None
    lease_seconds: Annotated[float, Field(ge=1, le=3600)] = 60
    max_seconds_without_progress: Annotated[float, Field(ge=1, le=MOST)] | None = None

    @model_validator(mode="after")
    def _accelerated(self) -> "Cluster":
        if self.accelerator_type and self.gpus_per_actor == 0:
            raise ValueError(
                f"accelerator_type: found {self.accelerator_type!r}, but gpus_per_actor is 0; remove one of them"
            )
        return self

    @property
    def gpus(self) -> float:
        """GPUs of an actor, once `settle` has replaced auto."""
        assert self.gpus_per_actor != "auto"
        return self.gpus_per_actor

    @property
    def threads(self) -> int:
        """Threads of an actor, once `settle` has replaced auto."""
        assert self.cpus_per_actor != "auto"
        return self.cpus_per_actor

    @property
    def device(self) -> str:
        """What an actor scores on, once `settle` has replaced auto."""
        return "cuda" if self.gpus > 0 else "cpu"

    @property
    def min_actors(self) -> int:
        """How many actors there are at least."""
        return self.actors if isinstance(self.actors, int) else self.actors.min

    @property
    def max_actors(self) -> int:
        """How many actors there may be."""
        return self.actors if isinstance(self.actors, int) else self.actors.max
