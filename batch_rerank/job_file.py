"""A job file's bytes to plain values: YAML, of a bounded size, in which a key stands once. What is wrong is said by
line, and no line is shown: it may have a secret in it."""

from collections.abc import Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import yaml

from batch_rerank.errors import ConfigError

MOST_BYTES = 2**20
"""Of a job file. The largest that we know has 4 KB."""

MOST_VALUES = 100_000
"""Of a job file, each counted as often as aliases and merges repeat it."""

MOST_DEPTH = 20
"""Of values within values of a job that is a mapping."""


def read_yaml(path: str | PathLike[str]) -> Any:
    """The values of a job file. Raises ConfigError."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise ConfigError(f"{path}: more than {MOST_BYTES:,} bytes; expected a job file (YAML)")
        return parse_yaml(data.decode())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give the path of a job file (YAML)") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the path of a job file (YAML)") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: cannot be read as YAML: not UTF-8, at byte {error.start}") from None
    except ValueError as error:  # a null byte in the path, too
        raise ConfigError(f"{str(path)!r}: cannot be read as YAML: {error}") from None


def copied(values: Any, depth: int = 0) -> Any:
    """A mapping as a job file would have it: plain dicts and lists of its own, and paths as texts."""
    if depth > MOST_DEPTH:
        raise ConfigError(f"job: more than {MOST_DEPTH} levels, or within itself; expected sections of keys and values")
    if isinstance(values, Mapping):
        return {key: copied(value, depth + 1) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [copied(value, depth + 1) for value in values]
    return fspath(values) if isinstance(values, PathLike) else values


def parse_yaml(text: str) -> Any:
    """The values of a text. Raises ValueError that says where it is wrong and shows nothing of it."""
    try:
        values = yaml.load(text, _Loader)
        if _count(values, {}) > MOST_VALUES:
            raise ValueError(f"more than {MOST_VALUES:,} values, by aliases and merges")
    except RecursionError:
        raise ValueError("nested too deeply, or within itself") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        # what PyYAML quotes is the file's
        problem = str(error.problem or "not YAML").split("'")[0].split('"')[0].strip()
        raise ValueError(f"{at}{problem}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML ({type(error).__name__}); is it a text?") from None
    except _TooManyError:
        raise ValueError(f"more than {MOST_VALUES:,} values, by aliases and merges") from None
    return values


class _TooManyError(Exception):
    """Merges that repeat more than a job file can need."""


class _Loader(yaml.SafeLoader):
    """Plain YAML in which a key stands once: of two, PyYAML would take the last in silence."""

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    named = f"key {key.value}" if key.value.isidentifier() and key.value.islower() else "a key"
                    raise yaml.constructor.ConstructorError(None, None, f"{named} again", key.start_mark)
                seen.add(key.value)
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MOST_VALUES:
            raise _TooManyError

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (
            ValueError,
            OverflowError,
            AttributeError,
            TypeError,
        ):  # a date or a number that is none; the text would be in the message
            raise yaml.constructor.ConstructorError(
                None, None, "a value that is not what it looks like (a date, a number); quote it", node.start_mark
            ) from None


def _count(value: Any, known: dict[int, int]) -> int:
    """How many values there are, each as often as it is named. Raises RecursionError where one is in itself."""
    if not isinstance(value, dict | list | set | tuple):
        return 1
    if id(value) in known:
        if known[id(value)] < 0:
            raise RecursionError
        return known[id(value)]
    known[id(value)] = -1
    parts = [*value, *value.values()] if isinstance(value, dict) else value
    known[id(value)] = 1 + sum(_count(part, known) for part in parts)
    return known[id(value)]
