"""What the sections of a job file have in common."""

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
