"""Text files of a run, of queries or of a corpus: TREC and JSONL, plain, .gz or .zst, parsed in blocks of whole lines.

Lines are numbered from 1, and none but the last may be blank: the number of a row is the number of its line.
"""

import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import IO, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from batch_rerank.errors import InputError
from batch_rerank.input.shards import reading
from batch_rerank.store.filesystem import Location, input_errors

BLOCK_BYTES = 16 * 2**20
"""Of a text file, parsed at once."""

LINE_BYTES = 64 * 2**20
"""Of one line at most. A document has less; some hundred KB of .gz may be a line of GB."""

BLANK = (b"\n\n", b"\n\r\n", b" \n", b"\t\n")
"""How text ends whose last line is blank, or ends in space."""

CODECS = {".gz": "gzip", ".zst": "zstd"}
IDS = ("query_id", "doc_id")


@dataclass
class LineNumber:
    """Which line a row of a piece is; only errors ask, as the lines before the piece have to be counted for it."""

    location: Location
    start: int
    passed: int = 0

    def of(self, row: int) -> int:
        """The number of a row's line."""
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
            if len(rest) > LINE_BYTES:
                raise InputError(
                    f"{location}: a line of more than {LINE_BYTES:,} bytes, from byte {position:,} of the text on; "
                    "expected a row a line; cut it, or leave it out"
                )
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
            if data.endswith(BLANK, 0, cut) or data[:1].isspace():
                # blank lines go with what follows: at the end of a block they may stand
                kept = len(data[:cut].rstrip(b"\r\n\t "))
                cut = data.find(b"\n", kept) + 1 if kept else 0
            if cut:
                yield data[:cut]
            position, rest = position + cut, data[cut:]


def codec_of(url: str) -> str | None:
    """How a file is compressed, by its name."""
    return next((codec for suffix, codec in CODECS.items() if url.lower().endswith(suffix)), None)


@contextmanager
def _text_file(location: Location) -> Iterator[IO[bytes]]:
    with input_errors(location):
        file = location.open()
    codec = codec_of(location.name)
    with file:
        if codec is None:
            yield file
            return
        # buffered: the decompressor asks for 64 KB at a time, which would be a request each
        buffered = io.BufferedReader(file, BLOCK_BYTES) if isinstance(file, io.RawIOBase) else file
        with pa.CompressedInputStream(pa.PythonFile(buffered, "r"), codec) as stream:
            yield cast(IO[bytes], stream)


def _lines(block: bytes, location: Location, number: LineNumber) -> pa.LargeStringArray:
    """A block's lines as they are, with their ends. Trailing blank ones are left out; raises InputError for others."""
    block = block.rstrip(b"\r\n\t ") + b"\n" if block.endswith(BLANK) or block.isspace() else block
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


def trec_fields(location: Location) -> int:
    """Fields of the first line: 3 or 6. Raises InputError for others."""
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


def parse_trec(block: bytes, width: int, location: Location, number: LineNumber) -> pa.Table:
    """Columns query_id, doc_id, score float64 and, of 6 fields, rank int32; ids as large strings. Raises InputError
    with the line."""
    lines = _lines(block, location, number)
    fields = pc.ascii_split_whitespace(pc.ascii_trim_whitespace(lines))
    counts = pc.list_value_length(fields).to_numpy(zero_copy_only=False)
    counts = np.where(pc.equal(pc.ascii_trim_whitespace(lines), "").to_numpy(zero_copy_only=False), 0, counts)
    wrong = np.flatnonzero(counts != width)
    if len(wrong):
        row = int(wrong[0])
        raise _wrong_fields(lines[row].as_py(), int(counts[row]), str(width), location, number.of(row))

    def field(index: int) -> pa.Array:
        return pc.list_element(fields, index)

    def number_of(index: int, kind: pa.DataType, what: str) -> pa.Array:
        values = field(index)
        try:
            cast_values = values.cast(kind)
            if pc.all(_is_fit(values, cast_values)).as_py() is not False:
                return cast_values
        except pa.ArrowInvalid:
            pass
        row = next(row for row, value in enumerate(values.to_pylist()) if not _is_number(value, kind))
        expected = "a finite number (of float32)" if pa.types.is_floating(kind) else "an integer of 32 bits"
        raise InputError(
            f"{location}: line {number.of(row)}: {what} is {values[row].as_py()[:80]!r}, expected {expected}; "
            "correct the line"
        )

    columns = {"query_id": field(0), "doc_id": field(1 if width == 3 else 2)}
    columns["score"] = number_of(2 if width == 3 else 4, pa.float64(), "the score")
    if width == 6:
        columns["rank"] = number_of(3, pa.int32(), "the rank")
    return pa.table(columns)


def _is_number(text: str, kind: pa.DataType) -> bool:
    values = pa.array([text])
    try:
        return bool(_is_fit(values, values.cast(kind))[0].as_py())
    except pa.ArrowInvalid:
        return False


def _is_fit(texts: pa.Array, values: pa.Array) -> pa.BooleanArray:
    """Which numbers are finite as float32, in which scores are written, or integers in digits: Arrow reads 0x10 too."""
    if pa.types.is_floating(values.type):
        return pc.is_finite(values.cast(pa.float32(), safe=False))
    return pc.invert(pc.match_substring(texts, "x", ignore_case=True))


def parse_jsonl(block: bytes, names: Mapping[str, str], location: Location, number: LineNumber) -> pa.Table:
    """Columns `names` as large strings, null where a line lacks one. Raises InputError with the line."""
    lines = _lines(block, location, number)
    if not len(lines):
        return pa.table({name: pa.array([], pa.large_string()) for name in names})
    schema = pa.schema([(found, pa.string()) for found in dict.fromkeys(names.values())])
    try:
        read = pa.json.read_json(
            io.BytesIO(block),
            pa.json.ReadOptions(use_threads=False, block_size=len(block) + 1),
            pa.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        )
        table = pa.table({name: read[found].cast(pa.large_string()) for name, found in names.items()})
        table.validate(full=True)
        if len(table) == len(lines) and not any(table[name].null_count for name in IDS if name in names):
            return table
    except pa.ArrowException:
        pass
    # line by line: to find the one that is wrong, or ids that are numbers
    rows = [_row(line, names, location, number, row) for row, line in enumerate(lines.to_pylist())]
    return pa.table({name: pa.array([row[name] for row in rows], pa.large_string()) for name in names})


def json_object(line: bytes | str, location: Location, number: int) -> dict[str, Any]:
    """A line's object. Raises InputError."""
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
    line: str, names: Mapping[str, str], location: Location, number: LineNumber, row: int
) -> dict[str, str | None]:
    try:
        value = json_object(line, location, 0)
    except InputError:
        value = json_object(line, location, number.of(row))  # counts the lines before it
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
