"""What the sections of a job file have in common, and those that stand alone."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

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
