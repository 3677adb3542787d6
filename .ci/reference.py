"""What the site has beside docs/*.md, as hooks of mkdocs: the README as its first page, and a reference that is made of
the code, so that neither can be behind it."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from pydantic import BaseModel

import batch_rerank
from batch_rerank.config import JobConfig
from batch_rerank.errors import BatchRerankError
from batch_rerank.schema import CHUNK_OFFSET, OUTPUT

HERE = Path(__file__).parent
README = HERE.parent / "README.md"

Schema = dict[str, Any]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that no file is, and take every page into the navigation: those that it does not name come last."""
    pages = {
        "index.md": README.read_text(encoding="utf-8").replace("](docs/", "]("),
        "reference/command-line.md": command_line(),
        "reference/job-file.md": job_file(),
        "reference/output.md": output(),
        "reference/python.md": python(),
    }
    pages["assets/iframe-worker.js"] = (HERE / "iframe-worker.js").read_text(encoding="utf-8")
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    named = set(re.findall(r"[\w/-]+\.md", json.dumps(config.nav)))
    others = sorted(file.src_uri for file in files.documentation_pages() if file.src_uri not in named)
    assert config.nav is not None
    config.nav.extend([{"More": others}] if others else [])
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """The README is the first page here, and its neighbour in the repository."""
    return markdown.replace("](../README.md", "](index.md")


def command_line() -> str:
    """Every verb with its arguments and options, as typer itself writes it down."""
    typer = [sys.executable, "-m", "typer", "batch_rerank.cli", "utils", "docs"]
    asked = [*typer, "--name", "batch-rerank", "--title", "Command line"]
    return subprocess.run(asked, check=True, capture_output=True, text=True).stdout


def job_file() -> str:
    """Every key of every section with its type, default and meaning: a heading and a table a section."""
    schema = JobConfig.model_json_schema()
    lines = [
        "# Job file",
        "",
        "A YAML file of sections: `input: {layout: flat}`. `--set input.layout=flat` overrides a key on the command "
        "line. Unknown keys are refused.",
        "",
    ]
    for place, model in sections(JobConfig):
        about, meanings = described(model)
        lines += [f"## {place or 'Sections'}", "", about, "", "| key | default | |", "|---|---|---|"]
        found = schema["$defs"][model.__name__] if place else schema
        if set(meanings) != set(found["properties"]):
            wrong = sorted(set(meanings) ^ set(found["properties"]))
            raise PluginError(f"{model.__name__}: expected a docstring that says `key`: what it is, of {wrong}")
        for key, value in found["properties"].items():
            within = "$ref" in json.dumps(value) and f"{place}.{key}".lstrip(".")
            name = f"[`{key}`](#{within.replace('.', '')})" if within else f"`{key}`"
            given = value.get("default")
            default = "" if within and not isinstance(given, int) else f"`{json.dumps(given)}`"
            default = "needed" if key in found.get("required", ()) else default
            lines.append(f"| {name} | {default} | *{cell(typed(value))}:* {cell(meanings[key])} |")
        lines.append("")
    return "\n".join(lines)


def sections(model: type[BaseModel], place: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """The sections of a job file, each with where it stands, a section before those within it."""
    yield place, model
    for name, field in model.model_fields.items():
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from sections(kind, f"{place}.{name}".lstrip("."))


def described(model: type[BaseModel]) -> tuple[str, dict[str, str]]:
    """What a docstring says of a section, and of each key: sentences begin with `key`: or with `key`, `other`:"""
    text = " ".join((model.__doc__ or "").split())
    about, *rest = re.split(r"(?:^|(?<=\. ))((?:`\w+`, )*`\w+`): ", text)
    return about.strip(), {
        key: meaning.strip()
        for keys, meaning in zip(rest[::2], rest[1::2], strict=True)
        for key in re.findall(r"\w+", keys)
    }


def typed(value: Schema) -> str:
    """A JSON schema in words."""
    if "anyOf" in value:
        return " or ".join(dict.fromkeys(typed(one) for one in value["anyOf"]))
    if "$ref" in value:
        return "a section"
    if "enum" in value or "const" in value:
        return ", ".join(f"`{one}`" for one in value.get("enum", [value.get("const")]))
    if value["type"] == "array":
        within = [typed(one) for one in value.get("prefixItems", [value.get("items", {})])]
        return f"a list of {within[0]}" if "items" in value else f"[{'; '.join(within)}]"
    return {"string": "text", "boolean": "true, false", "object": "a mapping", "null": "null"}.get(
        value["type"], bounded(value)
    )


def bounded(value: Schema) -> str:
    """A number with its limits; those that only keep it within what a computer counts are left out."""
    low, high = value.get("minimum"), value.get("maximum", value.get("exclusiveMaximum"))
    low = f" above {value['exclusiveMinimum']}" if "exclusiveMinimum" in value else low
    kind = "whole number" if value["type"] == "integer" else "number"
    if isinstance(low, str):
        return f"{kind}{low}{f' to {high}' if high is not None else ''}"
    if high is None or high >= 2**53:
        return kind if low is None or low < 0 else f"{kind} from {low}"
    below = "below " if "exclusiveMaximum" in value else ""
    return f"{kind} {low} to {below}{high}"


def cell(text: str) -> str:
    """A text in a table, in which nothing but code between backticks is special."""
    return re.sub(r"(`[^`]*`)|<", lambda found: found[1] or "&lt;", text).replace("|", "\\|")


def python() -> str:
    """What `import batch_rerank` offers, for mkdocstrings to fill in."""
    names = "\n\n".join(f"::: {home}.{name}" for name, home in batch_rerank._HOMES.items())
    return f"# Python\n\n`from batch_rerank import {', '.join(batch_rerank._HOMES)}`\n\n{names}\n"


def output() -> str:
    """The columns of an output, and the exit codes with their errors."""
    columns = "\n".join(f"| `{name}` | {kind} | {meaning} |" for name, (kind, meaning) in OUTPUT.items())
    errors = sorted(BatchRerankError.__subclasses__(), key=lambda one: one.exit_code)
    said = ((one.exit_code, one.__name__, " ".join((one.__doc__ or "").split())) for one in errors)
    codes = "\n".join(f"| {code} | `{name}` | {cell(meaning)} |" for code, name, meaning in said)
    return f"""# Output and errors

## Columns

One row per candidate, in the order of the input's queries, then by rank.

| column | type | |
|---|---|---|
{columns}

Then `text` with `output.include_text`, the columns of `output.passthrough`, and `{CHUNK_OFFSET}` (int32) with
`scoring.long_documents: chunk`. With `output.layout: nested` a row is a query, and all but `query_id` stands in a list
`candidates`.

## Exit codes

| code | exception in Python | |
|---|---|---|
{codes}

0 is done and 130 interrupted. What to do about each: [operations](../operations.md#exit-codes).
"""
