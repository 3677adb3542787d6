"""The candidates that have moved most, with their texts as far as the input is still there: all that a report reads of
the rows themselves."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batch_rerank.config import JobConfig
from batch_rerank.errors import BatchRerankError
from batch_rerank.input.unit_reader import read_units
from batch_rerank.store.failures import UNREADABLE
from batch_rerank.store.filesystem import locate
from batch_rerank.store.manifest import Manifest
from batch_rerank.store.plans import Plan, Unit
from batch_rerank.store.receipts import Receipt
from batch_rerank.store.scan import Scan
from batch_rerank.store.shapes import Mover, Shape, from_text

log = logging.getLogger("batch_rerank")

EACH_WAY = 10
TEXT, QUERY, ID = 700, 300, 200
"""Characters that are kept of each."""

BYTES_PER_SECOND = 5e7
"""Of Parquet, read and decoded, about: what is larger than the time allows is not begun."""

Json = dict[str, Any]


@dataclass(frozen=True)
class Chosen:
    """A candidate, and the unit that it is in."""

    unit: Unit
    mover: Mover


def movers(
    manifest: Manifest,
    plan: Plan,
    config: JobConfig | None,
    found: Scan,
    shapes: Sequence[tuple[Receipt, Shape]],
    seconds: float | None = None,
) -> Json:
    """Some twenty that have gained or lost most places. seconds: that reading their texts may take, None for any; the
    rest is named by its ids. Never raises for what cannot be read: it says so."""
    listed = choose(plan, shapes)
    texts, note = _texts(plan, config, listed, seconds)
    receipts = {receipt.unit: receipt for receipt, _ in shapes}
    rows = []
    for one in listed:
        known = texts.get((one.unit.id, one.mover.row)) or _ids(manifest, found, receipts[one.unit.id], one.mover.row)
        rows.append(
            {
                "unit": one.unit.id,
                "row": one.mover.row,
                "before": one.mover.before,
                "after": one.mover.after,
                "score": one.mover.score,
                **known,
            }
        )
    return {"rows": rows, "note": note}


def choose(plan: Plan, shapes: Sequence[tuple[Receipt, Shape]]) -> list[Chosen]:
    """Those that have gained most places, then those that have lost most, the largest moves first."""
    units = {unit.id: unit for unit in plan.units}
    listed: list[Chosen] = []
    for way in ("up", "down"):
        moved = (Chosen(units[receipt.unit], one) for receipt, shape in shapes for one in getattr(shape, way))
        listed += sorted(moved, key=_by_distance)[:EACH_WAY]
    return listed


def shapes_of(receipts: Sequence[Receipt]) -> list[tuple[Receipt, Shape]]:
    """Receipts with their shapes, those that have one."""
    return [(receipt, shape) for receipt in receipts if (shape := from_text(receipt.shape)) is not None]


def _by_distance(one: Chosen) -> tuple[int, str, int]:
    return -abs(one.mover.before - one.mover.after), one.unit.id, one.mover.row


def _texts(
    plan: Plan, config: JobConfig | None, chosen: Sequence[Chosen], seconds: float | None
) -> tuple[dict[tuple[str, int], Json], str]:
    if config is None or not chosen:
        return {}, "the job of this output is not understood" if chosen else ""
    started, read = time.monotonic(), dict[tuple[str, int], Json]()
    wanted: dict[str, list[Chosen]] = {}
    for one in chosen:
        wanted.setdefault(one.unit.id, []).append(one)
    late = 0
    for of_unit in wanted.values():
        left = None if seconds is None else seconds - (time.monotonic() - started)
        unit = of_unit[0].unit
        if left is not None and _bytes(plan, unit) / BYTES_PER_SECOND > left:
            late += 1
            continue
        try:
            rows = rows_of_unit(plan, config, unit)
        except BatchRerankError as error:
            return read, f"the input could not be read again: {error}"
        for one in of_unit:
            read[unit.id, one.mover.row] = _known(rows, one.mover.row)
    note = f"texts of {late} units were not read at the end of the run, to keep it short; this command reads them"
    return read, note if late else ""


def _bytes(plan: Plan, unit: Unit) -> float:
    """About how much of a shard has to be read for a unit: row groups are known to the run that has planned."""
    shard = plan.shards[unit.shard]
    size, at = 0, 0
    for rows, of_group in shard.row_groups:
        if at < unit.stop and unit.start < at + rows:
            size += of_group
        at += rows
    return size or shard.file.size


def rows_of_unit(plan: Plan, config: JobConfig, unit: Unit) -> pa.Table:
    """A unit's canonical rows, read again. Raises InputError where the input is gone or another."""
    shard = plan.shards[unit.shard]
    location = locate(shard.url, config.input.storage_options)
    read = read_units(location, shard, [unit], config.input.layout, config.input.columns, [])
    return next(rows for _, rows in read)


def _known(rows: pa.Table, row: int) -> Json:
    if row >= len(rows):
        return {}
    names = [name for name in ("query_id", "doc_id", "query", "text") if name in rows.column_names]
    (one,) = rows.select(names).slice(row, 1).to_pylist()
    most = {"query_id": ID, "doc_id": ID, "query": QUERY, "text": TEXT}
    return {name: _cut(value, most[name]) for name, value in one.items() if value is not None}


def _ids(manifest: Manifest, found: Scan, receipt: Receipt, row: int) -> Json:
    """The ids of a row as its scores have them, where those were kept."""
    place = found.place(receipt)
    name, group = place if place else (manifest.unit_name(receipt.unit), 0)
    if name not in found.files.found:
        return {}
    try:
        with (manifest.root / name).open() as file:
            rows = pq.ParquetFile(file).read_row_group(group, columns=["query_id", "doc_id"])
    except (*UNREADABLE, BatchRerankError):
        return {}
    return _known(rows, row)


def _cut(value: object, most: int) -> Json | str:
    """A text as it is kept: what is longer says how much longer."""
    text = str(value)
    return text if len(text) <= most else {"start": text[:most], "characters": len(text)}
