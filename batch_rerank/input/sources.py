"""Runs, queries and corpora as users have them: TREC, JSONL and Parquet files, read in pieces as columns of our names.

All files of a source are looked at before any is read: a column that only some have is either read as null (texts) or
refused (what ranks a run).
"""

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batch_rerank.errors import InputError
from batch_rerank.input.layouts import wrong_type
from batch_rerank.input.shards import ID_ROWS, TEXT_ROWS, check_unchanged, open_parquet, read_groups, reading
from batch_rerank.input.text_files import (
    IDS,
    LineNumber,
    codec_of,
    json_object,
    line_blocks,
    parse_jsonl,
    parse_trec,
    trec_fields,
)
from batch_rerank.schema import ALIASES
from batch_rerank.store.filesystem import File, Location, Options, identity_of, input_errors, list_files, locate

log = logging.getLogger("batch_rerank")
FOOTER_THREADS = 16
PIECE_BYTES = 64 * 2**20
"""Of a file, read by one task."""

OURS = {
    "run": ("query_id", "doc_id", "score", "rank"),
    "queries": ("query_id", "query", "instruction"),
    "corpus": ("doc_id", "text", "title"),
}
BEIR = {"query_id": "_id", "query": "text", "doc_id": "_id"}
"""What BEIR calls our columns, in queries and corpora."""

REQUIRED = ("query_id", "query", "doc_id", "text")
NUMBERS = {"score": pa.float64(), "rank": pa.int32()}
"""Our columns that are no text. Scores are ordered as they are, and written as float32: rounded ones would tie."""


@dataclass(frozen=True)
class Source:
    """The files of a run, of queries or of a corpus, one format in all. names: their columns by ours; fields: of a TREC
    file's lines; groups: of each Parquet file, the bytes of its row groups; lacking: texts that some files have no
    column of, and how many files."""

    kind: str
    format: str
    files: list[tuple[str, File]]
    names: dict[str, str]
    fields: int = 0
    groups: list[list[int]] = field(default_factory=list)
    lacking: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Footer:
    """What a Parquet file says of itself: its columns, and the bytes of its row groups after decompression."""

    schema: pa.Schema
    groups: list[int]


@dataclass(frozen=True)
class Piece:
    """What one task reads of a source: bytes `start` to `stop` of a plain text file (lines that begin there), row
    groups of a Parquet file, or a whole compressed file."""

    url: str
    file: File
    start: int
    stop: int


def find_files(kind: str, patterns: Sequence[str], options: Options) -> list[tuple[str, File]]:
    """The files of a source with their URLs. Raises InputError."""
    files: dict[str, tuple[str, File]] = {}
    for pattern in patterns:
        location = locate(pattern, options)
        with input_errors(pattern):
            found = list_files(location)
        if not found:
            raise InputError(
                f"input.{kind} {pattern!r}: no file matches; expected {_expected(kind)}; check the path (globs are "
                "allowed, a directory means its *.parquet)"
            )
        for file in found:
            files.setdefault(identity_of(location, file), (str(location.at(file.path)), file))
    for url, file in files.values():
        if file.size == 0:
            raise InputError(f"{url}: the file has 0 bytes; expected {_expected(kind)}; write it again")
    return list(files.values())


def find_source(kind: str, patterns: Sequence[str], renamed: Mapping[str, str], options: Options) -> Source:
    """List the files of a source and look at their columns: of a text file's, at the first line of the first.

    Raises InputError: files of two formats, a column that is missing, of a wrong type, or of two names.
    """
    files = find_files(kind, patterns, options)
    urls = [url for url, _ in files]
    formats = {url: _format(kind, url) for url in urls}
    if len(set(formats.values())) > 1:
        other = next(url for url in urls if formats[url] != formats[urls[0]])
        raise InputError(f"input.{kind}: {urls[0]} and {other} are of different formats; expected one format")
    if formats[urls[0]] == "parquet":
        every = footers(files, options)
        names, lacking = _names_of_all(kind, urls, [footer.schema for footer in every], renamed)
        return Source(kind, "parquet", files, names, groups=[footer.groups for footer in every], lacking=lacking)
    first = locate(urls[0], options)
    if formats[urls[0]] == "trec":
        return Source(kind, "trec", files, {}, trec_fields(first))
    block = next(line_blocks(first), b"")
    keys = json_object(block.split(b"\n", 1)[0], first, 1)
    names = _names(kind, list(keys), renamed, urls[0])
    for name in OURS[kind]:  # later lines may have what the first one lacks
        if name in renamed and name not in names:
            log.warning("%s: line 1 has no %r, which is to be the %s; found %s", first, renamed[name], name, list(keys))
        names.setdefault(name, renamed.get(name, name))
    return Source(kind, "jsonl", files, names)


def footers(files: Sequence[tuple[str, File]], options: Options) -> list[Footer]:
    """The footers of Parquet files, several at a time. Raises InputError."""

    def read(entry: tuple[str, File]) -> Footer:
        location = locate(entry[0], options)
        with open_parquet(location) as parquet, reading(location, "the Parquet footer"):
            groups = [parquet.metadata.row_group(i).total_byte_size for i in range(parquet.num_row_groups)]
            return Footer(parquet.schema_arrow, groups)

    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        return list(pool.map(read, files))


def _expected(kind: str) -> str:
    return "a Parquet or a TREC file" if kind == "run" else "a Parquet or a JSONL file"


def _format(kind: str, url: str) -> str:
    name = re.sub(r"\.(gz|zst)$", "", url.lower())
    if name.endswith((".parquet", ".pq")):
        if name != url.lower():
            raise InputError(f"{url}: a compressed Parquet file; expected a plain one, which is compressed inside")
        return "parquet"
    if name.endswith((".jsonl", ".ndjson", ".json")):
        if kind == "run":
            raise InputError(f"{url}: a JSONL file; expected {_expected(kind)}; write the run in one of these")
        return "jsonl"
    if kind == "run":
        return "trec"
    raise InputError(f"{url}: its name says no format; expected .parquet or .jsonl (.jsonl.gz, .jsonl.zst); rename it")


def _names_of_all(
    kind: str, urls: Sequence[str], schemas: Sequence[pa.Schema], renamed: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, int]]:
    """Which column is ours, the same in all files; and the texts that some files lack, with their number."""
    found = [_names(kind, schema.names, renamed, url) for url, schema in zip(urls, schemas, strict=True)]
    for one, schema, url in zip(found, schemas, urls, strict=True):
        _refuse_columns(one, schema, url)
    names: dict[str, str] = {}
    lacking: dict[str, int] = {}
    for name in OURS[kind]:
        columns = [one.get(name) for one in found]
        present = next((index for index, column in enumerate(columns) if column is not None), None)
        if present is None:
            if name in renamed:
                raise InputError(
                    f"input.columns: no file of input.{kind} has {renamed[name]!r}, e.g. {urls[0]}: found "
                    f"{sorted(schemas[0].names)}; correct the name, or leave {name} out"
                )
            continue
        names[name] = columns[present] or ""
        other = next((index for index, column in enumerate(columns) if column not in (None, names[name])), None)
        if other is not None:
            raise InputError(
                f"{urls[other]}: {name} is column {columns[other]!r}, but {names[name]!r} in {urls[present]}; expected "
                "one name in all files; rename one"
            )
        if None in columns and name in NUMBERS:
            raise InputError(
                f"{urls[columns.index(None)]}: no column {names[name]!r}, which {urls[present]} has; expected it in "
                "all files or in none, as candidates are ranked by it; write the file again"
            )
        if None in columns:
            lacking[name] = columns.count(None)
    return names, lacking


def _refuse_columns(names: Mapping[str, str], schema: pa.Schema, where: str) -> None:
    """Raise InputError for a column that stands twice or has a wrong type. An optional text may be null in every row,
    for which pandas writes a column without a type."""
    for name, column in names.items():
        if schema.names.count(column) > 1:
            raise InputError(f"{where}: column {column!r} is there more than once; expected each once; drop one")
        kind = schema.field(column).type
        expected = wrong_type(name, kind)
        if expected and not (pa.types.is_null(kind) and name not in (*REQUIRED, *NUMBERS)):
            raise InputError(f"{where}: column {column!r} is {kind}, expected {expected}; cast it")


def _names(kind: str, found: Sequence[str], renamed: Mapping[str, str], where: str) -> dict[str, str]:
    """Which column of a file is ours: the one that input.columns names, else one of our name, else BEIR's. An id may be
    named for another source than this, so one of our name will do as well."""
    names: dict[str, str] = {}
    for name in OURS[kind]:
        wanted = [renamed[name]] if name in renamed else []
        if name not in renamed or name in IDS:
            wanted += [name] + ([BEIR[name]] if kind != "run" and name in BEIR else [])
        present = [one for one in wanted if one in found]
        if present:
            names[name] = present[0]
        elif name in REQUIRED:
            similar = [alias for alias in ALIASES.get(name, ()) if alias in found]
            hint = f"set input.columns: {{{name}: {similar[0]}}}" if similar else f"name it in input.columns.{name}"
            raise InputError(f"{where}: found {sorted(found)}, expected {' or '.join(map(repr, wanted))}; {hint}")
    return names


def pieces(source: Source) -> list[Piece]:
    """Cut a source into what one task reads, in order."""
    found: list[Piece] = []
    for index, (url, file) in enumerate(source.files):
        if source.format == "parquet":
            cuts = _cuts(source.groups[index])
        elif codec_of(url):
            cuts = [0, file.size]
        else:
            cuts = [*range(0, file.size, PIECE_BYTES), file.size]
        found += [Piece(url, file, start, stop) for start, stop in pairwise(cuts)]
    return found


def _cuts(sizes: Sequence[int]) -> list[int]:
    cuts, size = [0], 0
    for index, one in enumerate(sizes):
        size += one
        if size >= PIECE_BYTES or index == len(sizes) - 1:
            cuts.append(index + 1)
            size = 0
    return cuts


def read_piece(source: Source, piece: Piece, wanted: Sequence[str], options: Options) -> Iterator[pa.Table]:
    """The wanted columns (our names; those that the source has) of a piece, some MB at a time, ids as strings.

    Raises InputError where a line or a page is damaged, or the file has changed since it was listed.
    """
    location = locate(piece.url, options, reached=True)
    check_unchanged(location, piece.file)
    if source.format == "parquet":
        yield from _parquet_rows(source, piece, wanted, location)
    else:
        first = LineNumber(location, piece.start)
        parse: Callable[[bytes, LineNumber], pa.Table]
        if source.format == "trec":
            parse = lambda block, line: parse_trec(block, source.fields, location, line)  # noqa: E731
        else:
            names = {name: source.names[name] for name in wanted if name in source.names}
            parse = lambda block, line: parse_jsonl(block, names, location, line)  # noqa: E731
        stop = None if codec_of(piece.url) else piece.stop
        for block in line_blocks(location, piece.start, stop):
            table = parse(block, first)
            first.passed += len(table)
            yield table
    check_unchanged(location, piece.file)


def _parquet_rows(source: Source, piece: Piece, wanted: Sequence[str], location: Location) -> Iterator[pa.Table]:
    names = {name: source.names[name] for name in wanted if name in source.names}
    with open_parquet(location) as parquet:
        read = sum(parquet.metadata.row_group(group).num_rows for group in range(piece.start))
        leaves = list(dict.fromkeys(column for column in names.values() if column in parquet.schema_arrow.names))
        most = TEXT_ROWS if {"query", "text"} & names.keys() else ID_ROWS
        for batch in read_groups(parquet, range(piece.start, piece.stop), leaves, location, most):
            with reading(location, f"rows from {read} on"):
                data = {}
                for name, column in names.items():
                    kind = NUMBERS.get(name, pa.large_string())
                    if column not in leaves:
                        data[name] = pa.nulls(batch.num_rows, kind)
                        continue
                    data[name] = batch.column(column).cast(kind, safe=not pa.types.is_floating(kind))
                    if name in (*IDS, "rank"):
                        _refuse_null(data[name], name, location, read)
                table = pa.table(data)
                table.validate(full=True)
            read += len(table)
            yield table


def _refuse_null(values: pa.Array, name: str, location: Location, row: int) -> None:
    if values.null_count:
        at = row + int(np.flatnonzero(pc.is_null(values).to_numpy(zero_copy_only=False))[0])
        raise InputError(f"{location}: row {at}: {name} is null; expected one in every row; fill or drop it")
