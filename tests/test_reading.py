"""Units out of large row groups: how much is read, how much is held, and what is the same whatever the row groups."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import job
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from batch_rerank import outside
from batch_rerank.config import JobConfig
from batch_rerank.input.shards import STREAM_BYTES
from batch_rerank.score.plan import make_plan
from batch_rerank.score.read_unit import read_range, read_ranges
from batch_rerank.store.filesystem import File
from batch_rerank.store.plans import Plan, Shard, Unit

MIB = 2**20


PROTOCOLS = outside.PROTOCOLS


class Counted(MemoryFileSystem):
    """A store that counts what is asked of it."""

    protocol = "counted"
    cachable = False
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs: list[str] = [""]  # noqa: RUF012
    reads: list[int] = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        stripped: str = MemoryFileSystem._strip_protocol(path.removeprefix("counted:"))
        return stripped

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        content: bytes = super().cat_file(path, start, end, **kwargs)
        self.reads.append(len(content))
        return content


@pytest.fixture
def counted() -> Iterator[type[Counted]]:
    fsspec.register_implementation("counted", Counted, clobber=True)
    outside.PROTOCOLS = (*PROTOCOLS, "counted")
    Counted.store.clear()
    Counted.reads.clear()
    yield Counted
    outside.PROTOCOLS = PROTOCOLS
    Counted.store.clear()


@contextmanager
def own_pool() -> Iterator[pa.MemoryPool]:
    """What Arrow allocates from now on, apart from what it has before: `max_memory` is its peak."""
    before = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(before)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(pool))  # what it allocates does not keep it, and may outlive it
    pa.set_memory_pool(pool)
    try:
        yield pool
    finally:
        pa.set_memory_pool(before)


def put(table: pa.Table, number: int = 0, **options: Any) -> int:
    """Write a shard, counted://in/0.parquet; its size."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    data = sink.getvalue().to_pybytes()
    Counted(skip_instance_cache=True).pipe_file(f"/in/{number}.parquet", data)
    return len(data)


def texts(number: int, size: int) -> pa.Array:
    """Different texts of `size` characters that no codec makes much smaller."""
    noise = np.random.default_rng(0).integers(0, 64, (number, size), dtype=np.uint8)
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .", np.uint8)[noise]
    offsets = np.arange(number + 1, dtype=np.int32) * size
    return pa.StringArray.from_buffers(number, pa.py_buffer(offsets), pa.py_buffer(letters.tobytes()))


def shard(layout: str, queries: int, per_query: int, text: pa.Array) -> pa.Table:
    """Candidates with these texts, in a layout."""
    pairs = queries * per_query
    query = np.repeat(np.arange(queries), per_query)
    doc_id = pa.array([f"d{number}" for number in range(pairs)])
    if layout == "flat":
        ids = pa.array([f"q{number}" for number in query])
        return pa.table({"query_id": ids, "query": ids, "doc_id": doc_id, "text": text})
    structs = pa.StructArray.from_arrays([doc_id, text], names=["doc_id", "text"])
    offsets = pa.array(np.arange(queries + 1) * per_query, pa.int32())
    ids = pa.array([f"q{number}" for number in range(queries)])
    return pa.table({"query_id": ids, "query": ids, "candidates": pa.ListArray.from_arrays(offsets, structs)})


def config_of(layout: str, **keys: Any) -> JobConfig:
    layout = "flat" if layout == "flat" else "nested"
    return job("counted://in/*.parquet", "/nowhere", input__layout=layout, **{"input__unit_pairs": 1000, **keys})


def read_all(config: JobConfig, done: frozenset[str] = frozenset()) -> Iterator[tuple[str, pa.Table, list[Any]]]:
    """Each unit that is not done, as it is read: its id, rows and texts."""
    plan, model = make_plan(config)
    Counted.reads.clear()
    for work in read_ranges(plan, done):
        for read in read_range(work, config, model):
            yield read.unit.id, read.rows, read.groups


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("layout", ["nested", "flat", "staged"])
def test_a_large_row_group_is_read_once_and_never_held(layout: str, groups: int, counted: type[Counted]) -> None:
    queries, per_query = 3600, 25
    text: pa.Array = texts(queries * per_query, 1100)
    options: dict[str, Any] = {"compression": "none"}
    if layout == "staged":
        once = pa.array(np.arange(len(text)) // 10, pa.int32())
        text = pa.DictionaryArray.from_arrays(once, text.slice(0, len(text) // 10).cast(pa.large_string()))
        options["dictionary_pagesize_limit"] = 2**30
    table = shard(layout, queries, per_query, text)
    del text
    size = put(table, row_group_size=len(table) // groups, **options)
    assert layout == "staged" or size / groups > STREAM_BYTES
    del table
    with own_pool() as pool:
        units = [unit for unit, _, _ in read_all(config_of(layout))]
    assert len(units) == 90
    assert sum(counted.reads) <= 1.3 * size
    assert max(counted.reads) < 16 * MIB
    assert pool.max_memory() < (72 if layout == "staged" else 48) * MIB  # of a dictionary pyarrow makes copies


def test_a_large_row_group_gives_its_first_unit_at_once(counted: type[Counted]) -> None:
    size = put(shard("nested", 3600, 25, texts(3600 * 25, 1100)), compression="none")
    assert next(read_all(config_of("nested")))[0] == "00000-00000"
    assert sum(counted.reads) < size / 8


def test_two_units_that_are_left_cost_their_row_groups_only(counted: type[Counted]) -> None:
    size = put(shard("flat", 1000, 25, texts(25_000, 200)), row_group_size=2500, compression="none")
    plan, _ = make_plan(config_of("flat"))
    left = {plan.units[0].id, plan.units[-1].id}
    done = frozenset(unit.id for unit in plan.units) - left
    assert {unit for unit, _, _ in read_all(config_of("flat"), done)} == left
    assert sum(counted.reads) < 0.25 * size


def ranges_of(units: list[tuple[int, int]], row_groups: list[tuple[int, int]]) -> list[list[int]]:
    """The ranges of units with these rows, by the units' numbers."""
    one = Shard(0, "x", File("x", 1, "v"), units[-1][1], tuple(row_groups))
    made = [Unit(str(number), 0, start, stop, 1, stop - start) for number, (start, stop) in enumerate(units)]
    plan = Plan("", {}, {}, {}, "", {}, [], [one], made)
    return [[int(unit.id) for unit in work.units] for work in read_ranges(plan, frozenset())]


def test_a_range_ends_where_a_row_group_does() -> None:
    units = [(start, start + 10) for start in range(0, 400, 10)]
    assert ranges_of(units, [(400, 10**9)]) == [[*range(40)]]
    assert ranges_of(units, [(200, 10**9)] * 2) == [[*range(20)], [*range(20, 40)]]
    assert ranges_of(units, [(20, 10**6)] * 20) == [[*range(start, start + 8)] for start in range(0, 40, 8)]
    assert ranges_of(units, [(205, 10**9), (195, 10**9)]) == [[*range(21)], [*range(21, 40)]]
    assert ranges_of(units, [(205, 10**6), (195, 10**6)]) == [[*range(40)]]
    assert ranges_of(units, [(0, 0), (200, 10**6), (0, 0), (200, 10**6), (0, 0)]) == [[*range(20)], [*range(20, 40)]]


def test_ranges_with_a_large_unit_come_first() -> None:
    units = [*((start, start + 10) for start in range(0, 100, 10)), (100, 500)]
    assert ranges_of(units, [(100, 10**6), (400, 10**6)]) == [[10], [*range(10)]]


@settings(max_examples=30, derandomize=True, deadline=None)
@given(
    layout=st.sampled_from(["nested", "flat"]),
    row_group_size=st.integers(1, 200),
    unit_pairs=st.integers(1, 60),
    kind=st.sampled_from([pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]),
    written=st.sampled_from([{}, {"use_dictionary": False}, {"dictionary_pagesize_limit": 100}]),
    distinct=st.integers(1, 40),
    data=st.data(),
)
def test_units_are_the_same_whatever_the_row_groups(
    layout: str,
    row_group_size: int,
    unit_pairs: int,
    kind: pa.DataType,
    written: dict[str, Any],
    distinct: int,
    data: st.DataObject,
) -> None:
    fsspec.register_implementation("counted", Counted, clobber=True)
    outside.PROTOCOLS = (*PROTOCOLS, "counted")
    values = [None if pair % 17 == 3 else f"text {pair % distinct}" for pair in range(120)]
    table = shard(layout, 30, 4, pa.array(values).cast(kind))
    put(table, row_group_size=row_group_size, **written)
    config = config_of(layout, input__unit_pairs=unit_pairs, output__include_text=True)
    every = {unit for unit, _, _ in read_all(config)}
    done = data.draw(st.sets(st.sampled_from(sorted(every))))
    found = [(unit, rows, groups) for unit, rows, groups in read_all(config, frozenset(done))]
    assert sorted(unit for unit, _, _ in found) == sorted(every - done)
    plan, _ = make_plan(config)
    starts = dict(
        zip([unit.id for unit in plan.units], accumulate((u.pairs for u in plan.units), initial=0), strict=False)
    )
    for unit, rows, groups in found:
        pairs = range(starts[unit], starts[unit] + len(rows))
        assert rows["query_id"].to_pylist() == [f"q{pair // 4}" for pair in pairs]
        assert rows["query_index"].to_pylist() == [pair // 4 - pairs[0] // 4 for pair in pairs]
        assert rows["doc_id"].to_pylist() == [f"d{pair}" for pair in pairs]
        assert rows["text"].to_pylist() == [values[pair] for pair in pairs]
        assert rows["first_stage_rank"].to_pylist() == [pair % 4 + 1 for pair in pairs]
        assert [text for group in groups for text in group.documents] == [values[p] for p in pairs if values[p]]
        assert [group.query for group in groups] == list(dict.fromkeys(f"q{p // 4}" for p in pairs if values[p]))


@pytest.mark.parametrize("layout", ["nested", "flat"])
def test_few_documents_for_many_queries_are_held_once(layout: str, counted: type[Counted]) -> None:
    """40 documents of 10 KB, 24,000 candidates: 240 MB once they are decoded, 0.4 MB as they stand in the file."""
    distinct = texts(40, 10_000)
    once = pa.DictionaryArray.from_arrays(pa.array(np.arange(24_000) % 40, pa.int32()), distinct)
    table = shard(layout, 600, 40, once)
    size = put(table, store_schema=False, dictionary_pagesize_limit=2**30)  # the file says string
    assert size < 2 * MIB
    with own_pool() as pool:
        for unit, rows, groups in read_all(config_of(layout)):
            assert len(rows) == 1000, unit
            assert len({id(text) for group in groups for text in group.documents}) <= 80
    assert pool.max_memory() < 24 * MIB


def test_a_sample_reads_the_row_groups_that_it_needs(counted: type[Counted]) -> None:
    table = shard("nested", 2000, 10, texts(20_000, 300))
    for number in range(5):
        ids = pa.array([f"{number}-{row}" for row in range(2000)])
        size = put(table.set_column(0, "query_id", ids), number, row_group_size=100, compression="none")
    counted.reads.clear()
    config = config_of("nested").model_copy(update={"limit": 150})
    plan, model = make_plan(config)
    assert (plan.counts["queries"], plan.counts["shards"], plan.pairs) == (150, 1, 1500)
    for work in read_ranges(plan, frozenset()):
        assert sum(len(read.rows) for read in read_range(work, config, model)) == 1500
    assert sum(counted.reads) < 0.25 * size
    whole, _ = make_plan(config_of("nested"))
    assert plan.units[0] == whole.units[0]


@pytest.mark.chaos
@pytest.mark.parametrize("layout", ["flat", "nested"])
def test_ids_of_a_shard_may_have_more_than_2_gib(layout: str, counted: type[Counted]) -> None:
    queries = 22_000
    names = pa.array([f"{number:04d}" + "x" * 1020 for number in range(100)])
    ids = pa.DictionaryArray.from_arrays(pa.array(np.arange(queries * 100) % 100, pa.int32()), names)
    table = shard(layout, queries, 100, pa.array(["text"]).take(pa.array(np.zeros(queries * 100, np.int64))))
    if layout == "flat":
        table = table.set_column(2, "doc_id", ids)
    else:
        text = table["candidates"].chunk(0).values.field("text")
        structs = pa.StructArray.from_arrays([ids, text], names=["doc_id", "text"])
        offsets = table["candidates"].chunk(0).offsets
        table = table.set_column(2, "candidates", pa.ListArray.from_arrays(offsets, structs))
    put(table, store_schema=False)
    del table
    plan, model = make_plan(config_of(layout))
    assert plan.pairs == 2_200_000
    work = read_ranges(plan, frozenset())[0]
    read = next(read_range(work, config_of(layout), model))
    assert read.rows["doc_id"][99].as_py() == names[99].as_py()
