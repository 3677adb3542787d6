"""What the sections of a job file have in common, and those that stand alone."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

StorageOptions = dict[str, Any]


def _plain(path: str) -> str:
    if not path or "\0" in path:
        raise ValueError(f"found {path!r}; expected a path or a URL")
    return path


Place = Annotated[str, AfterValidator(_plain)]
Places = Place | Annotated[list[Place], Field(min_length=1)]


class Section(BaseModel):
    """Base of all sections."""

    model_config = ConfigDict(extra="forbid", frozen=True)


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
