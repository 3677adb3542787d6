"""What was once wrong without a word: writers that wake late, scores that changed on the way, odd columns."""

import shutil
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from conftest import candidate_rows, job, rows_of, scored_only, write

from batch_rerank.errors import BatchRerankError, ConflictError
from batch_rerank.job.republish import model_of, republish
from batch_rerank.job.run import run
from batch_rerank.publish.keep import gather_scores
from batch_rerank.publish.output import Place
from batch_rerank.publish.parts import publish_part
from batch_rerank.publish.publish import _works
from batch_rerank.publish.verify import verify
from batch_rerank.store.bookkeeping import mark_done
from batch_rerank.store.filesystem import Location, locate
from batch_rerank.store.lease import _latest
from batch_rerank.store.manifest import Manifest
from batch_rerank.store.scan import scan


def late(out: Path, number: int, at: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker of the first publication, paused before it creates the file `at`, wakes when the output is published
    otherwise."""
    manifest = Manifest(locate(str(out), {}))
    plan = manifest.read_plan()
    assert plan is not None
    found = scan(manifest, plan)
    assert found.publication is not None
    (work,) = _works(found.publication, plan, found, [number], _latest(manifest.root)[0])  # type: ignore[index]
    config = job(source, out, output__file_bytes=1)
    create, asked = Location.create_exclusive, []

    def paused(self: Location, data: bytes) -> bool:
        if str(self).endswith(at) and not asked:
            asked.append(at)
            republish(Place(str(out), {}, job(source, out)), local=True)
        return create(self, data)

    monkeypatch.setattr(Location, "create_exclusive", paused)
    try:
        publish_part(work, config, model_of(plan))
    except BatchRerankError as error:
        print("said", error)
    monkeypatch.undo()
    assert asked


def test_a_late_part_of_an_earlier_publication_is_not_read(
    flat_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run(job(flat_shards, out, output__file_bytes=1), local=True)
    late(out, 5, "part-00005.parquet", flat_shards, monkeypatch)
    assert (out / "_SUCCESS").exists()
    assert len(rows_of(out)) == 300


def test_a_late_receipt_of_an_earlier_publication_replaces_none(
    flat_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run(job(flat_shards, out, output__file_bytes=1), local=True)
    late(out, 0, "parts/00000.json", flat_shards, monkeypatch)
    assert verify(str(out)).problems == []


def test_units_of_one_shard_that_lack_different_columns(flat_shards: Path, tmp_path: Path) -> None:
    keys = {"output__include_text": True, "output__passthrough": ["lang"]}
    out = scored_only(job(flat_shards, tmp_path / "out", output__passthrough=["lang"]))
    (out / "_work/00000-00001.parquet").unlink()
    scored_only(job(flat_shards, out, output__include_text=True))
    run(job(flat_shards, out, **keys), local=True)
    assert len(rows_of(out)) == 300


def test_what_any_unit_lacks_is_asked_before_anything_is_withdrawn(flat_shards: Path, tmp_path: Path) -> None:
    """The first unit has its text, the others not, and the input is gone."""
    out = scored_only(job(flat_shards, tmp_path / "out", output__file_bytes=1))
    (out / "_work/00000-00000.parquet").unlink()
    scored_only(job(flat_shards, out, output__file_bytes=1, output__include_text=True))
    run(job(flat_shards, out, output__file_bytes=1), local=True)
    shutil.move(flat_shards, tmp_path / "away")
    with pytest.raises(BatchRerankError):
        republish(Place(str(out), {}, job(flat_shards, out, output__include_text=True)), local=True)
    assert (out / "_SUCCESS").exists()


@pytest.mark.parametrize("gathered", [False, True])
def test_scores_that_are_not_what_their_receipt_says_are_not_published(
    gathered: bool, flat_shards: Path, tmp_path: Path
) -> None:
    """One byte of a score file is another one, its size the same."""
    run(job(flat_shards, tmp_path / "own"), local=True)
    out = scored_only(job(flat_shards, tmp_path / "out"))
    if gathered:
        run(job(flat_shards, out), local=True)
    name = next(out.glob("_scores/0000?.parquet")) if gathered else out / "_work/00000-00000.parquet"
    body = bytearray(name.read_bytes())
    right = pq.read_table(name)["score"]
    column = pq.read_metadata(name).row_group(0).column(pq.read_schema(name).names.index("score"))
    start, size = column.dictionary_page_offset or column.data_page_offset, column.total_compressed_size
    for at in range(start + size - 1, start, -1):
        body[at] ^= 1
        name.write_bytes(body)
        try:
            wrong = pq.read_table(name)["score"]
            if not wrong.equals(right) and pc.all(pc.is_valid(wrong)).as_py():
                break
        except (pa.ArrowException, OSError):
            pass
        body[at] ^= 1
    else:
        pytest.fail("no byte changes a score")
    before = rows_of(tmp_path / "own").select(["query_id", "doc_id", "score"]).to_pylist()
    try:
        if gathered:
            republish(Place(str(out), {}, job(flat_shards, out, output__top_k=1000)), local=True)
        else:
            run(job(flat_shards, out), local=True)
    except BatchRerankError as error:
        print("said", error)
    if (out / "_SUCCESS").exists():
        assert sorted(map(str, rows_of(out).select(["query_id", "doc_id", "score"]).to_pylist())) == sorted(
            map(str, before)
        )


TYPES: dict[str, pa.Array] = {
    "dictionary": pa.array(["a", None] * 50).dictionary_encode(),
    "list": pa.array([[1, None], None] * 50),
    "struct": pa.array([{"a": 1, "b": None}, None] * 50),
    "zone": pa.array([1, None] * 50, pa.timestamp("ns", "Europe/Berlin")),
    "decimal": pa.array([1, None] * 50, pa.decimal128(20, 3)),
    "nulls": pa.nulls(100),
    "dictionaries": pa.array([["a"], None] * 50).cast(pa.list_(pa.dictionary(pa.int32(), pa.string()))),
    "map": pa.array([[("a", 1)], None] * 50, pa.map_(pa.string(), pa.int64())),
}


@pytest.mark.parametrize("layout", ["flat", "nested"])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", ["a.b", "rank_index"])
def test_columns_of_any_type_pass(kind: str, layout: str, name: str, tmp_path: Path) -> None:
    for shard in range(2):
        path = write(tmp_path / "in" / f"{shard}.parquet", candidate_rows(4, 25, first=4 * shard))
        pq.write_table(pq.read_table(path).append_column(name, TYPES[kind]), path)
    keys: dict[str, Any] = {"output__passthrough": [name], "output__layout": layout}
    run(job(tmp_path / "in", tmp_path / "out", **keys), local=True)
    run(job(tmp_path / "in", tmp_path / "other", output__layout=layout), local=True)
    republish(Place(str(tmp_path / "other"), {}, job(tmp_path / "in", tmp_path / "other", **keys)), local=True)
    assert (
        rows_of(tmp_path / "out")
        .replace_schema_metadata()
        .equals(rows_of(tmp_path / "other").replace_schema_metadata())
    )


def test_a_late_mark_of_an_earlier_publication_replaces_none(
    flat_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver is paused behind its look at the lease, where `_SUCCESS` is written."""
    out = tmp_path / "out"
    run(job(flat_shards, out, output__file_bytes=1), local=True)
    manifest = Manifest(locate(str(out), {}))
    plan, mark = manifest.read_plan(), manifest.read_mark()
    assert plan is not None and mark is not None
    create, asked = Location.create_exclusive, []

    def paused(self: Location, data: bytes) -> bool:
        if str(self).endswith("_SUCCESS") and not asked:
            asked.append(1)
            republish(Place(str(out), {}, job(flat_shards, out)), local=True)
        return create(self, data)

    monkeypatch.setattr(Location, "create_exclusive", paused)
    lease = SimpleNamespace(check=lambda: None, id=mark.lease)
    with pytest.raises(ConflictError):
        mark_done(manifest, plan, mark, lease)  # type: ignore[arg-type]
    assert verify(str(out)).problems == []


def test_a_late_index_replaces_none(flat_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = scored_only(job(flat_shards, tmp_path / "out"))
    manifest = Manifest(locate(str(out), {}))
    plan = manifest.read_plan()
    assert plan is not None
    units = [(r.unit, r.sha256) for r in scan(manifest, plan).committed][:2]
    write, create, asked = Location.write_bytes, Location.create_exclusive, []

    def successor(self: Location) -> None:
        if str(self).endswith("00000.queries.npy") and not asked:
            asked.append(1)
            run(job(flat_shards, out), local=True)

    def write_late(self: Location, data: bytes) -> Any:
        successor(self)
        return write(self, data)

    def create_late(self: Location, data: bytes) -> bool:
        successor(self)
        return create(self, data)

    monkeypatch.setattr(Location, "write_bytes", write_late)
    monkeypatch.setattr(Location, "create_exclusive", create_late)
    with suppress(BatchRerankError):
        gather_scores(0, units, job(flat_shards, out), plan.fingerprint)
    assert asked
    files = list((out / "_scores").glob("*.parquet"))
    for path in files:
        index, pairs = np.load(path.with_suffix(".queries.npy")), np.load(path.with_suffix(".pairs.npy"))
        assert index["pairs"].sum() == len(pairs) == len(pq.read_table(path))
    assert files and verify(str(out)).problems == []


def test_nothing_of_one_query_of_many_candidates_is_lost(tmp_path: Path) -> None:
    table = pa.table(
        {
            "query_id": ["a"] * 250_000 + ["b"] * 10,
            "query": ["q"] * 250_010,
            "doc_id": [f"d{i}" for i in range(250_010)],
            "text": pa.array([f"t{i % 7}" for i in range(250_010)]),
        }
    )
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in/0.parquet")
    for layout in ("flat", "nested"):
        run(job(tmp_path / "in", tmp_path / layout, output__layout=layout, output__top_k=240_000), local=True)
    rows = rows_of(tmp_path / "flat")
    assert len(rows) == 240_010 and verify(str(tmp_path / "nested")).problems == []
    assert rows["rank"].to_pylist() == [*range(1, 240_001), *range(1, 11)]


def test_a_late_part_of_earlier_scores_is_not_adopted(
    flat_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its unit failed in the engine (here: its scores are null) and was scored again by the run that goes on, with the
    same publication; the worker that was paused writes its part just before that run writes it."""
    out = tmp_path / "out"
    config = job(flat_shards, out, output__file_bytes=1)
    run(config, local=True)
    right = rows_of(out)["score"].combine_chunks()
    part = pq.read_table(out / "part-00000.parquet")
    nulls = part.set_column(part.column_names.index("score"), "score", pa.nulls(len(part), pa.float32()))
    pq.write_table(nulls.replace_schema_metadata(part.schema.metadata), tmp_path / "late")
    for name in ("_SUCCESS", "part-00000.parquet", "_manifest/parts/00000.json"):
        (out / name).unlink()
    create, asked = Location.create_exclusive, []

    def late_part(self: Location, data: bytes) -> bool:
        if str(self).endswith("part-00000.parquet") and not asked:
            asked.append(1)
            shutil.copy(tmp_path / "late", out / "part-00000.parquet")
        return create(self, data)

    monkeypatch.setattr(Location, "create_exclusive", late_part)
    try:
        run(config, local=True)
    except BatchRerankError as error:
        print("said", error)
    assert asked
    if (out / "_SUCCESS").exists():
        assert rows_of(out)["score"].combine_chunks().equals(right)
