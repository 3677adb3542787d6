"""What is wrong with a published part, or with a file of scores: each is looked at by itself, anywhere."""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batch_rerank.config import JobConfig
from batch_rerank.errors import InputError
from batch_rerank.publish.compare_rows import compare, rows_of_units
from batch_rerank.publish.nested import flat, flat_names, is_nested
from batch_rerank.publish.output import Opened, input_ids
from batch_rerank.publish.verify_units import Verdict, content
from batch_rerank.schema import OUTPUT_NAMES
from batch_rerank.store.kept import pairs_name, queries_name
from batch_rerank.store.manifest import Manifest, sha256
from batch_rerank.store.names import part_name
from batch_rerank.store.plans import Shard, Unit
from batch_rerank.store.receipts import PartReceipt, Receipt
from batch_rerank.store.records import PartMark, parse

HELD = ["query_id", "doc_id", "rank", "score", "first_stage_rank", "error"]
"""Columns of a part that are held against its candidates; the others its checksum covers."""


@dataclass(frozen=True)
class PartCheck:
    """A part as it should be. publication: its id; shards: those of its units; marked: what `_SUCCESS` says of it;
    config: of the input, None where that is not looked at."""

    number: int
    publication: str
    fingerprint: str
    top_k: int | None
    units: list[Unit]
    shards: Mapping[int, Shard]
    marked: PartMark | None
    config: JobConfig | None


def verify_part(output: Opened, check: PartCheck) -> Verdict:
    """A part against its receipt, `_SUCCESS` and the candidates of its units."""
    verdict, name = Verdict(), part_name(check.number)
    rows, problems = _read_part(output.manifest(), check)
    if rows is None:
        verdict.add(name, problems)
        return verdict
    if check.config is None:
        problems = compare(None, rows, check.top_k)
        verdict.candidates = sum(unit.pairs for unit in check.units)
    else:
        try:
            for unit, candidates, ours in rows_of_units(_candidates(check, check.config), rows):
                wrong = compare(candidates, ours, check.top_k)
                problems += [f"unit {unit.id}: {problem}" for problem in wrong]
                verdict.candidates += len(candidates)
        except InputError as error:
            verdict.problems.append(f"{name}: input: {error} (--output-only does without the input)")
    verdict.units, verdict.rows = len(check.units), len(rows)
    verdict.add(name, problems)
    return verdict


def _candidates(check: PartCheck, config: JobConfig) -> Iterator[tuple[Unit, pa.Table]]:
    for shard, units in groupby(check.units, key=lambda unit: unit.shard):
        yield from input_ids(check.shards[shard], config, list(units))


def _read_part(manifest: Manifest, check: PartCheck) -> tuple[pa.Table | None, list[str]]:
    """A part's flat rows, or what is wrong with its receipt and its file."""
    name, marked = part_name(check.number), check.marked
    where, location = manifest.part_receipt(check.number), manifest.part(check.number)
    body, data = content(where), content(location)
    if body is None or data is None:
        absent, path = ("receipt", where) if body is None else ("file", location)
        return None, [f"its {absent} is missing ({path})"]
    try:
        receipt = parse(PartReceipt, body)
        schema = pq.read_schema(io.BytesIO(data))
        names = flat_names(schema)
        whole = is_nested(schema.names) or not set(HELD) <= set(names)
        rows = flat(pq.read_table(io.BytesIO(data), columns=None if whole else HELD))
    except (KeyError, AttributeError, TypeError):
        return None, [f"its columns are {schema.names[:10]}, which are not an output's"]
    except (pa.ArrowException, OSError, ValueError) as error:
        return None, [(str(error) or type(error).__name__).splitlines()[0]]
    metadata = schema.metadata or {}
    told = None if marked is None else (marked.rows, marked.size, marked.sha256)
    checks = {
        "the receipt is of another publication or part": (receipt.publication, receipt.part)
        == (check.publication, name),
        f"the part has {len(data):,} bytes, its receipt says {receipt.size:,}": len(data) == receipt.size,
        "the part's checksum is not its receipt's": sha256(data) == receipt.sha256,
        "_SUCCESS says otherwise than its receipt": told in (None, (receipt.rows, receipt.size, receipt.sha256)),
        "the part is of another job": metadata.get(b"batch_rerank.fingerprint") == check.fingerprint.encode(),
        "the part is another one, or of another publication": (
            metadata.get(b"batch_rerank.publication"),
            metadata.get(b"batch_rerank.part"),
        )
        == (check.publication.encode(), str(check.number).encode()),
        f"the part has {len(rows)} rows, its receipt says {receipt.rows}": len(rows) == receipt.rows,
        f"the columns are {names[:10]}": names[: len(OUTPUT_NAMES)] == list(OUTPUT_NAMES),
    }
    problems = [problem for problem, good in checks.items() if not good]
    return (None if problems else rows), problems


COUNTED = ("rows_in", "scored", "tokens", "truncated")


def counted(receipt: Receipt) -> tuple[str, dict[str, int]]:
    """A unit, and what its receipt says of its scores."""
    return receipt.unit, {name: getattr(receipt, name) for name in COUNTED}


def verify_scores(
    output: Opened, fingerprint: str, name: str, told: Mapping[int, tuple[str, Mapping[str, int]]]
) -> Verdict:
    """A file below `_scores/` against its receipt and those of its units, which are `told` by row group; one without a
    receipt is none yet, and nothing reads it."""
    manifest = output.manifest()
    verdict, receipt = Verdict(), manifest.read_scores_receipt(name)
    if receipt is None or receipt.fingerprint != fingerprint:
        return verdict
    data = content(manifest.root / name)
    if data is None or (len(data), sha256(data)) != (receipt.size, receipt.sha256):
        verdict.add(name, ["not what its receipt says (another size or checksum)"])
        return verdict
    beside = {queries_name(name): receipt.queries_sha256, pairs_name(name): receipt.pairs_sha256}
    for other, checksum in beside.items():
        kept = content(manifest.root / other)
        if kept is not None and sha256(kept) != checksum:
            verdict.problems.append(f"{other}: not what {name}'s receipt says; delete it: later jobs score its pairs")
    file = pq.ParquetFile(io.BytesIO(data))
    for group, (unit, says) in told.items():
        rows = file.read_row_group(group, columns=["score", "n_tokens", "truncated"])
        counts = {
            "rows_in": len(rows),
            "scored": len(rows) - rows["score"].null_count,
            "tokens": pc.sum(rows["n_tokens"]).as_py() or 0,
            "truncated": pc.sum(rows["truncated"]).as_py() or 0,
        }
        edited: Sequence[str] = [one for one, value in counts.items() if says[one] != value]
        if edited:
            verdict.add(f"unit {unit}", [f"the receipt's counts are not its scores': {', '.join(edited)}"])
    return verdict
