"""Notes of an exchange, and calls that are made as they are run."""

from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest

from batch_rerank.calls import packs
from batch_rerank.input.notes import PORTION, Note, Portions, of_shards

GOOD = [(7, 0, 0, 0, 5), (7, 0, 2, 5, 9), (7, 1, 1, 0, 4)]


def portions(*rows: tuple[int, ...]) -> Portions:
    return np.array(list(rows), PORTION)


def test_a_note_is_read_as_it_was_written() -> None:
    note = Note(7, portions(*GOOD), rows=12, retries=3)
    read = Note.from_bytes(note.to_bytes(), 7, 3)
    assert read is not None
    assert (read.piece, read.rows, read.retries, read.portions.tolist()) == (7, 12, 3, GOOD)
    assert (read.name, read.sizes()) == ("00007.note", [9, 4])


@pytest.mark.parametrize(
    "rows",
    {
        "none": [],
        "the second file alone": [(7, 1, 0, 0, 5)],
        "a file is left out": [GOOD[0], (7, 2, 1, 0, 4)],
        "a gap": [GOOD[0], (7, 0, 2, 6, 9)],
        "not from the first byte": [(7, 0, 0, 1, 5)],
        "nothing in it": [(7, 0, 0, 0, 0)],
        "backwards": [(7, 0, 0, 0, 5), (7, 0, 1, 5, 3)],
        "a shard twice": [GOOD[0], (7, 0, 0, 5, 9)],
        "a shard of another stage": [(7, 0, 3, 0, 5)],
        "a shard below 0": [(7, 0, -1, 0, 5)],
        "a file below 0": [(7, -1, 0, 0, 5)],
    }.values(),
)
def test_a_note_that_is_not_whole_is_none(rows: list[tuple[int, ...]]) -> None:
    assert Note.from_bytes(Note(7, portions(*rows), 1).to_bytes(), 7, 3) is None


def test_a_note_of_another_piece_version_or_of_cut_bytes_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Note(7, portions(*GOOD), 1).to_bytes()
    assert Note.from_bytes(data, 8, 3) is None
    assert Note.from_bytes(b'{"files": [["00007-0000.arrows", [[0, 0, 5]]]], "rows": 1, "retries": 0}', 7, 3) is None
    for stop in range(0, len(data) - 8, 7):  # an Arrow stream is whole without the 8 bytes that end it
        assert Note.from_bytes(data[:stop], 7, 3) is None
    monkeypatch.setattr("batch_rerank.input.notes.VERSION", b"3")
    assert Note.from_bytes(data, 7, 3) is None


def test_portions_of_some_shards_are_by_shard_and_piece() -> None:
    random = np.random.default_rng(0)
    rows = sorted(
        (piece, number, int(shard), 0, 1)
        for piece in range(5)
        for number in range(2)
        for shard in random.choice(9, 6, replace=False)
    )
    found = [portions(*(row for row in rows if row[0] == piece)) for piece in (3, 0, 4, 1, 2)]  # as tasks finish
    expected = sorted((row for row in rows if 2 <= row[2] < 7), key=lambda row: (row[2], row[0], row[1]))
    assert of_shards(found, 2, 7).tolist() == expected
    assert of_shards([], 0, 9).tolist() == []


@pytest.mark.parametrize(
    ("tasks", "size", "groups"), [(3, 2**30, [3, 3, 1]), (100, 1, [1] * 7), (100, 2**30, [7]), (7, 2**30, [7])]
)
def test_calls_are_made_as_their_group_is_asked_for(tasks: int, size: int, groups: list[int]) -> None:
    made = 0

    def calls() -> Iterator[partial[int]]:
        nonlocal made
        for number in range(7):
            made += 1
            yield partial(int.__add__, number, 1)

    found: list[int] = []
    seen: list[int] = []
    for group in packs(calls(), tasks, size):
        seen.append(len(group))
        assert made == sum(seen)
        found += [call() for call in group]
    assert (seen, found) == (groups, list(range(1, 8)))
    assert list(packs(iter([]), 1, 1)) == []
