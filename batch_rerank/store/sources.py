"""Runs, queries and corpora as users have them: TREC, JSONL and Parquet files, read in pieces as columns of our names.

A text file may be compressed (.gz, .zst). Its lines are numbered from 1, and none but the last may be blank: the number
of a row is the number of its line.
"""

import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import IO, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from batch_rerank.errors import InputError
from batch_rerank.schema import ALIASES
from batch_rerank.store.filesystem import File, Location, Options, input_errors, list_files, locate
from batch_rerank.store.layouts import wrong_type
from batch_rerank.store.shards import ID_ROWS, TEXT_ROWS, check_unchanged, open_parquet, read_groups, reading

BLOCK_BYTES = 16 * 2**20
"""Of a text file, parsed at once."""

PIECE_BYTES = 64 * 2**20
"""Of a file, read by one task."""

CODECS = {".gz": "gzip", ".zst": "zstd"}
OURS = {
    "run": ("query_id", "doc_id", "score", "rank"),
    "queries": ("query_id", "query", "instruction"),
    "corpus": ("doc_id", "text", "title"),
}
BEIR = {"query_id": "_id", "query": "text", "doc_id": "_id"}
"""What BEIR calls our columns, in queries and corpora."""

REQUIRED = ("query_id", "query", "doc_id", "text")
IDS = ("query_id", "doc_id")
NUMBERS = {"score": pa.float32(), "rank": pa.int32()}
"""Our columns that are no text."""


@dataclass(frozen=True)
class Source:
    """The files of a run, of queries or of a corpus, one format in all. names: their columns by ours; fields: of a TREC
    file's lines."""

    kind: str
    format: str
    files: list[tuple[str, File]]
    names: dict[str, str]
    fields: int = 0


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
        files.update({file.path: (str(location.at(file.path)), file) for file in found})
    for url, file in files.values():
        if file.size == 0:
            raise InputError(f"{url}: the file has 0 bytes; expected {_expected(kind)}; write it again")
    return list(files.values())


def find_source(kind: str, patterns: Sequence[str], renamed: Mapping[str, str], options: Options) -> Source:
    """List the files of a source and look at the first one's columns. Raises InputError."""
    files = find_files(kind, patterns, options)
    urls = [url for url, _ in files]
    formats = {url: _format(kind, url) for url in urls}
    if len(set(formats.values())) > 1:
        other = next(url for url in urls if formats[url] != formats[urls[0]])
        raise InputError(f"input.{kind}: {urls[0]} and {other} are of different formats; expected one format")
    source = Source(kind, formats[urls[0]], files, {})
    first = locate(urls[0], options)
    if source.format == "trec":
        return Source(kind, "trec", source.files, {}, _trec_fields(first))
    names = _names(kind, _columns_of(first, source.format), renamed, urls[0], source.format == "jsonl")
    return Source(kind, source.format, source.files, names)


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


def _columns_of(location: Location, format: str) -> dict[str, pa.DataType | None]:
    """The columns of a Parquet file with their types, or the keys of a JSONL file's first line."""
    if format == "parquet":
        with open_parquet(location) as parquet:
            return {field.name: field.type for field in parquet.schema_arrow}
    block = next(line_blocks(location), b"")
    return dict.fromkeys(_object(block.split(b"\n", 1)[0], location, 1))


def _names(
    kind: str, found: dict[str, pa.DataType | None], renamed: Mapping[str, str], where: str, optional_always: bool
) -> dict[str, str]:
    """Which column is ours: the one that input.columns names, else one of our name, else BEIR's."""
    names: dict[str, str] = {}
    for name in OURS[kind]:
        wanted = [renamed[name]] if name in renamed else []
        wanted += [name] + ([BEIR[name]] if kind != "run" and name in BEIR else [])
        present = [one for one in wanted if one in found]
        if present:
            names[name] = present[0]
        elif name in REQUIRED:
            similar = [alias for alias in ALIASES.get(name, ()) if alias in found]
            hint = f"set input.columns: {{{name}: {similar[0]}}}" if similar else f"name it in input.columns.{name}"
            raise InputError(f"{where}: found {sorted(found)}, expected {' or '.join(map(repr, wanted))}; {hint}")
        elif optional_always:  # later lines may have what the first one lacks
            names[name] = wanted[0]
        _refuse_type(name, names.get(name, ""), found, where)
    return names


def _refuse_type(name: str, column: str, found: Mapping[str, pa.DataType | None], where: object) -> None:
    kind = found.get(column)
    expected = kind and wrong_type(name, kind)
    if expected:
        raise InputError(f"{where}: column {column!r} is {kind}, expected {expected}; cast it")


def pieces(source: Source, options: Options) -> list[Piece]:
    """Cut a source into what one task reads, in order."""
    found: list[Piece] = []
    for url, file in source.files:
        if source.format == "parquet":
            location = locate(url, options)
            with open_parquet(location) as parquet, reading(location, "the Parquet footer"):
                sizes = [parquet.metadata.row_group(i).total_byte_size for i in range(parquet.num_row_groups)]
            cuts = _cuts(sizes)
        elif _codec(url):
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
        first = _LineNumber(location, piece.start)
        parse: Callable[[bytes, _LineNumber], pa.Table]
        if source.format == "trec":
            parse = lambda block, line: parse_trec(block, source.fields, location, line)  # noqa: E731
        else:
            names = {name: source.names[name] for name in wanted if name in source.names}
            parse = lambda block, line: parse_jsonl(block, names, location, line)  # noqa: E731
        stop = None if _codec(piece.url) else piece.stop
        for block in line_blocks(location, piece.start, stop):
            table = parse(block, first)
            first.passed += len(table)
            yield table
    check_unchanged(location, piece.file)


def _parquet_rows(source: Source, piece: Piece, wanted: Sequence[str], location: Location) -> Iterator[pa.Table]:
    names = {name: source.names[name] for name in wanted if name in source.names}
    with open_parquet(location) as parquet:
        for name in names.values():
            found = parquet.schema_arrow.names.count(name)
            if found != 1:
                there = "missing" if not found else "there more than once"
                raise InputError(f"{location}: column {name!r} is {there}; expected each once in every file")
        types = {field.name: field.type for field in parquet.schema_arrow}
        for name, column in names.items():
            _refuse_type(name, column, types, location)
        read = sum(parquet.metadata.row_group(group).num_rows for group in range(piece.start))
        leaves = list(dict.fromkeys(names.values()))
        most = TEXT_ROWS if {"query", "text"} & names.keys() else ID_ROWS
        for batch in read_groups(parquet, range(piece.start, piece.stop), leaves, location, most):
            with reading(location, f"rows from {read} on"):
                table = pa.table({name: batch.column(found) for name, found in names.items()})
                for index, name in enumerate(table.column_names):
                    if name in (*IDS, "rank"):
                        _refuse_null(table[name], name, location, read)
                    kind = NUMBERS.get(name, pa.string())
                    table = table.set_column(index, name, table[name].cast(kind, safe=kind != pa.float32()))
                table.validate(full=True)
            read += len(table)
            yield table


def _refuse_null(values: pa.ChunkedArray, name: str, location: Location, row: int) -> None:
    if values.null_count:
        at = row + int(np.flatnonzero(pc.is_null(values).to_numpy(zero_copy_only=False))[0])
        raise InputError(f"{location}: row {at}: {name} is null; expected one in every row; fill or drop it")


@dataclass
class _LineNumber:
    """Which line a row of a piece is; only errors ask, as the lines before the piece have to be counted for it."""

    location: Location
    start: int
    passed: int = 0

    def of(self, row: int) -> int:
        before = sum(block.count(b"\n") for block in line_blocks(self.location, 0, self.start)) if self.start else 0
        return before + self.passed + row + 1


def line_blocks(location: Location, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """The lines that begin at bytes `start` to `stop`, some MB at a time, each block of whole lines. A compressed file
    is read from its beginning to its end. Raises InputError."""
    if stop is not None and stop <= start:
        return
    with _text_file(location) as file:
        position, rest, skip = max(0, start - 1), b"", start > 0
        if position:
            file.seek(position)
        while True:
            with reading(location, "the text"):
                read = file.read(BLOCK_BYTES)
            data = rest + read
            if skip:  # the end of a line that began before
                cut = data.find(b"\n") + 1
                if not cut:
                    if not read:
                        return
                    rest = data
                    continue
                position, data, skip = position + cut, data[cut:], False
            elif position == 0 and data.startswith(b"\xef\xbb\xbf"):
                position, data = 3, data[3:]
            if stop is not None and position >= stop:
                return
            if stop is not None and position + len(data) >= stop:
                cut = data.find(b"\n", max(0, stop - 1 - position)) + 1
                if cut:
                    yield data[:cut]
                    return
            if not read:
                if data:
                    yield data + b"\n"
                return
            cut = data.rfind(b"\n") + 1
            if cut:
                yield data[:cut]
            position, rest = position + cut, data[cut:]


def _codec(url: str) -> str | None:
    return next((codec for suffix, codec in CODECS.items() if url.lower().endswith(suffix)), None)


@contextmanager
def _text_file(location: Location) -> Iterator[IO[bytes]]:
    with input_errors(location):
        file = location.open()
    codec = _codec(location.name)
    with file:
        if codec is None:
            yield file
            return
        # buffered: the decompressor asks for 64 KB at a time, which would be a request each
        buffered = io.BufferedReader(file, BLOCK_BYTES) if isinstance(file, io.RawIOBase) else file
        with pa.CompressedInputStream(pa.PythonFile(buffered, "r"), codec) as stream:
            yield cast(IO[bytes], stream)


def _lines(block: bytes, location: Location, number: _LineNumber) -> pa.LargeStringArray:
    """A block's lines as they are, with their ends. Trailing blank ones are left out; raises InputError for others."""
    block = block.rstrip(b"\r\n\t ") + b"\n" if block.endswith((b"\n\n", b"\n\r\n", b" \n", b"\t\n")) else block
    ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + 1
    if len(block) == 1:
        return pa.array([], pa.large_string())
    offsets = np.concatenate([[0], ends]).astype(np.int64)
    lines = pa.LargeStringArray.from_buffers(len(ends), pa.py_buffer(offsets), pa.py_buffer(block))
    try:
        lines.validate(full=True)
    except pa.ArrowInvalid:
        for row, (start, end) in enumerate(pairwise(offsets.tolist())):
            try:
                block[start:end].decode()
            except UnicodeDecodeError as error:
                raise InputError(f"{location}: line {number.of(row)}: not UTF-8 ({error}); write it as UTF-8") from None
    return lines


def _trec_fields(location: Location) -> int:
    block = next(line_blocks(location), b"")
    fields = len(block.split(b"\n", 1)[0].split())
    if fields not in (3, 6):
        raise _wrong_fields(block.split(b"\n", 1)[0].decode(errors="replace"), fields, "6 or 3", location, 1)
    return fields


def _wrong_fields(line: str, found: int, expected: str, location: Location, number: int) -> InputError:
    return InputError(
        f"{location}: line {number}: found {found} fields in {line.strip()[:80]!r}, expected {expected} "
        "(qid Q0 docid rank score tag, or qid docid score); correct the line"
    )


def parse_trec(block: bytes, width: int, location: Location, number: _LineNumber) -> pa.Table:
    """Columns query_id, doc_id, score float32 and, of 6 fields, rank int32. Raises InputError with the line."""
    lines = _lines(block, location, number)
    fields = pc.ascii_split_whitespace(pc.ascii_trim_whitespace(lines))
    counts = pc.list_value_length(fields).to_numpy(zero_copy_only=False)
    counts = np.where(pc.equal(pc.ascii_trim_whitespace(lines), "").to_numpy(zero_copy_only=False), 0, counts)
    wrong = np.flatnonzero(counts != width)
    if len(wrong):
        row = int(wrong[0])
        raise _wrong_fields(lines[row].as_py(), int(counts[row]), str(width), location, number.of(row))

    def field(index: int) -> pa.Array:
        return pc.list_element(fields, index).cast(pa.string())

    def number_of(index: int, kind: pa.DataType, what: str) -> pa.Array:
        values = field(index)
        try:
            cast_values = values.cast(kind)
            if not pa.types.is_floating(kind) or pc.all(pc.is_finite(cast_values)).as_py() is not False:
                return cast_values
        except pa.ArrowInvalid:
            pass
        row = next(row for row, value in enumerate(values.to_pylist()) if not _is_number(value, kind))
        raise InputError(
            f"{location}: line {number.of(row)}: {what} is {values[row].as_py()[:80]!r}, expected "
            f"{'a finite number' if pa.types.is_floating(kind) else 'an integer'}; correct the line"
        )

    columns = {"query_id": field(0), "doc_id": field(1 if width == 3 else 2)}
    columns["score"] = number_of(2 if width == 3 else 4, pa.float64(), "the score").cast(pa.float32(), safe=False)
    if width == 6:
        columns["rank"] = number_of(3, pa.int32(), "the rank")
    return pa.table(columns)


def _is_number(text: str, kind: pa.DataType) -> bool:
    try:
        value = pa.array([text]).cast(kind)[0].as_py()
    except pa.ArrowInvalid:
        return False
    return bool(np.isfinite(value))


def parse_jsonl(block: bytes, names: Mapping[str, str], location: Location, number: _LineNumber) -> pa.Table:
    """Columns `names` as strings, null where a line lacks one. Raises InputError with the line."""
    lines = _lines(block, location, number)
    if not len(lines):
        return pa.table({name: pa.array([], pa.string()) for name in names})
    schema = pa.schema([(found, pa.string()) for found in dict.fromkeys(names.values())])
    try:
        read = pa.json.read_json(
            io.BytesIO(block),
            pa.json.ReadOptions(use_threads=False, block_size=len(block) + 1),
            pa.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        )
        table = pa.table({name: read[found] for name, found in names.items()})
        table.validate(full=True)
        if len(table) == len(lines) and not any(table[name].null_count for name in IDS if name in names):
            return table
    except pa.ArrowException:
        pass
    # line by line: to find the one that is wrong, or ids that are numbers
    rows = [_row(line, names, location, number, row) for row, line in enumerate(lines.to_pylist())]
    return pa.table({name: pa.array([row[name] for row in rows], pa.string()) for name in names})


def _object(line: bytes | str, location: Location, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{location}: line {number}: not JSON ({error}); expected one object a line; correct the line"
        ) from None
    if not isinstance(value, dict):
        raise InputError(f"{location}: line {number}: found {type(value).__name__}, expected a JSON object")
    return value


def _row(
    line: str, names: Mapping[str, str], location: Location, number: _LineNumber, row: int
) -> dict[str, str | None]:
    try:
        value = _object(line, location, 0)
    except InputError:
        value = _object(line, location, number.of(row))  # counts the lines before it
    found: dict[str, str | None] = {}
    for name, key in names.items():
        one = value.get(key)
        if name in IDS and isinstance(one, int) and not isinstance(one, bool):
            one = str(one)
        if not isinstance(one, str) and (one is not None or name in IDS):
            expected = "a string or an integer" if name in IDS else "a string"
            shown = json.dumps(one)[:80]
            raise InputError(f"{location}: line {number.of(row)}: {key!r} is {shown}, expected {expected}")
        if one is not None and not _encodable(one):
            raise InputError(f"{location}: line {number.of(row)}: {key!r} holds half of a surrogate pair; remove it")
        found[name] = one
    return found


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
