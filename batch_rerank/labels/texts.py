"""The texts of what was chosen, out of the input that was scored; and what texts alone can rule out."""

import hashlib
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batch_rerank.config import JobConfig
from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.errors import InputError
from batch_rerank.input.hashes import asked_hashes, refuse_other_texts
from batch_rerank.input.layouts import run_starts
from batch_rerank.input.unit_reader import read_units
from batch_rerank.labels.choose import EMPTY_TEXT, Choice, Int64
from batch_rerank.labels.rows import UnitRows
from batch_rerank.labels.scores import Source
from batch_rerank.store.filesystem import locate
from batch_rerank.store.plans import Shard, Unit


def input_rows(source: Source) -> Iterator[tuple[Unit, pa.Table]]:
    """Canonical rows of a part's units. Raises InputError where the input is gone or is not the one that was scored."""
    given = source.config.input
    for number, units in groupby(source.units, key=lambda unit: unit.shard):
        shard: Shard = source.shards[number]
        location = locate(shard.url, given.storage_options, reached=True)
        try:
            yield from read_units(location, shard, list(units), given.layout, given.columns, [])
        except InputError as error:
            raise InputError(
                f"{error}\nthe labels' texts come from the input that was scored: have it back as it was, or run the "
                "job on what there is now and export that"
            ) from None


def at_rows(rows: UnitRows, given: pa.Table, where: object) -> Int64:
    """int64[n]: which row of the input each scored row is. Raises InputError where one is none."""
    ids, documents = (rows.table[name].combine_chunks() for name in ("query_id", "doc_id"))
    if ids.equals(given["query_id"].combine_chunks()) and documents.equals(given["doc_id"].combine_chunks()):
        return np.arange(len(given))
    known = given["doc_id"].combine_chunks().dictionary_encode()
    there = pc.fill_null(pc.index_in(documents, known.dictionary), -1).to_numpy(zero_copy_only=False)
    queries = given["query_id"].combine_chunks()
    names = queries.take(pa.array(run_starts(queries)))
    of = np.repeat(np.arange(len(names)), np.diff(np.append(run_starts(queries), len(queries))))
    number = pc.fill_null(pc.index_in(ids, names), -1).to_numpy(zero_copy_only=False)
    keys = of * (1 + len(known.dictionary)) + known.indices.to_numpy()
    wanted = number * (1 + len(known.dictionary)) + there
    order = np.argsort(keys)
    at = order[np.minimum(np.searchsorted(keys[order], wanted), max(0, len(keys) - 1))] if len(keys) else number * 0
    lost = (number < 0) | (there < 0) | (len(keys) == 0)
    if not lost.any():
        lost = keys[at] != wanted
    if lost.any():
        row = int(np.flatnonzero(lost)[0])
        raise InputError(
            f"{where}: unit {rows.unit.id}: query_id {ids[row].as_py()!r} with doc_id {documents[row].as_py()!r} was "
            "scored and is not there"
        )
    return np.asarray(at, np.int64)


def with_texts(rows: UnitRows, given: pa.Table, at: Int64) -> UnitRows:
    """Rows with their texts as numbers, equal where texts are; an empty text is no label's, nor is an empty query."""
    numbers, blank = _numbered(given["text"].combine_chunks())
    _, blank_query = _numbered(given["query"].combine_chunks())
    reason = np.where((blank | blank_query)[at], EMPTY_TEXT, 0).astype(np.int8)
    return rows.with_texts(numbers[at], reason)


def _numbered(text: pa.DictionaryArray) -> tuple[Int64, np.typing.NDArray[np.bool_]]:
    """int64[n], equal where texts are; bool[n], where they are empty or null."""
    numbers = pc.fill_null(text.indices, len(text.dictionary)).to_numpy(zero_copy_only=False).astype(np.int64)
    empty = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(text.dictionary)), 0)
    return numbers, np.append(empty.to_numpy(zero_copy_only=False).astype(np.bool_), True)[numbers]


def refuse_other_labels(
    rows: UnitRows, choice: Choice, given: pa.Table, at: Int64, model: ModelSpec, where: object
) -> None:
    """Raise InputError where a chosen row's text, or its query, is not what was scored."""
    here = at[choice.rows]
    texts = pc.cast(given["text"].take(pa.array(here)), pa.large_string())  # those that are chosen, and no dictionary
    asked = asked_hashes(given, model.takes_instruction)[here]
    advice = "have the input back as it was, or run the job on what there is now and export that"
    refuse_other_texts(rows.table.take(pa.array(choice.rows)), asked, texts, f"{where}: unit {rows.unit.id}", advice)


def taken(rows: UnitRows, choice: Choice, given: pa.Table, at: Int64, takes_instruction: str | None) -> pa.Table:
    """The chosen rows with their texts: `query_id`, `doc_id`, `query`, `text`, `instruction`."""
    place = pa.array(at[choice.rows])
    plain = rows.table.select(["query_id", "doc_id"]).take(pa.array(choice.rows))
    for name in ("query", "text"):
        plain = plain.append_column(name, pc.cast(given[name].take(place), pa.large_string()))
    said = pc.cast(given["instruction"].take(place), pa.large_string())
    return plain.append_column("instruction", pc.fill_null(said, takes_instruction) if takes_instruction else said)


def held_out(queries: Sequence[str], share: float) -> np.typing.NDArray[np.bool_]:
    """bool[n]: which queries are held out, by a hash of their text without its case, its spacing and the two ways in
    which Unicode writes a letter (NFKC): the same query under two ids is on one side, and data that is added moves
    none."""
    found = np.zeros(len(queries), np.bool_)
    for number, query in enumerate(queries):
        plain = " ".join(unicodedata.normalize("NFKC", query).casefold().split()).encode()
        found[number] = int.from_bytes(hashlib.blake2b(plain, digest_size=8).digest(), "little") < share * 2**64
    return found


def instruction_of(config: JobConfig) -> str | None:
    """What the job gives queries without an instruction of their own."""
    return config.model.instruction
