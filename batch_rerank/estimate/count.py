"""What units will count when they are scored: their texts are read and tokenised, and nothing is scored or written."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from batch_rerank.config import JobConfig
from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.engine.checkpoint_files import read_json
from batch_rerank.engine.encoded import Encoded, lengths_of
from batch_rerank.engine.encoding import make_encoder
from batch_rerank.engine.packing import Ids, Scored, best_chunks, read_segments, unreadable
from batch_rerank.engine.scorer import VECTOR_CACHE_BYTES
from batch_rerank.engine.work import Arithmetic, Work
from batch_rerank.schema import TEXT_HASH
from batch_rerank.score.read_unit import ReadRange, ReadUnit, read_range
from batch_rerank.score.reuse import Reuse, asked_groups, recall
from batch_rerank.store.plans import Plan, Unit

UInt64 = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Counted:
    """What a unit's receipt will say, and more; of a part of it where `pairs` are fewer than the unit's. computed: of a
    bi-encoder as if nothing were remembered from other units; texts: uint64[n], hashes of its documents' texts; cached:
    of a bi-encoder, hash and tokens of each distinct text that it reads."""

    unit: Unit
    pairs: int
    scored: int
    failed: int
    tokens: int
    truncated: int
    reused: int
    computed: Work
    texts: UInt64
    cached: dict[int, int]


def count_units(
    config: JobConfig,
    model: ModelSpec,
    plan: Plan,
    units: Sequence[Unit],
    reuse: Reuse | None = None,
    share: float = 1.0,
    seed: int = 0,
) -> Iterator[Counted]:
    """Count some units of a plan, in its order; of each `share` of its queries, drawn by the seed, one at least. Raises
    InputError and StorageError."""
    counter = _Counter(model, reuse)
    for shard, of_shard in groupby(units, key=lambda unit: unit.shard):
        for read in read_range(ReadRange(plan.shards[shard], list(of_shard)), config, model):
            yield counter.count(_some(read, share, seed))


class _Counter:
    def __init__(self, model: ModelSpec, reuse: Reuse | None) -> None:
        self._encoder, self._arithmetic = make_encoder(model), Arithmetic.of(model)
        self._by_text, self._reuse = model.kind == "bi_encoder", reuse
        self._chunked = model.chunk_overlap is not None

    def count(self, read: ReadUnit) -> Counted:
        known = None if self._reuse is None else recall(read, self._reuse)
        encoded = self._encoder.encode(read.groups if known is None else asked_groups(read.groups, known.asked))
        found = self._readable(encoded)
        if known is not None:
            found = known.merge(found, chunked=self._chunked)
        scored = ~np.isnan(found.scores)
        cached = _hashed([encoded.segment(one) for one in read_segments(encoded).tolist()]) if self._by_text else {}
        lengths = np.fromiter(cached.values(), np.int64)
        return Counted(
            unit=read.unit,
            pairs=len(read.rows),
            scored=int(scored.sum()),
            failed=len(read.rows) - int(scored.sum()),
            tokens=int(found.n_tokens[scored].sum()),
            truncated=int(found.truncated[scored].sum()),
            reused=0 if known is None else int(known.found.sum()),
            computed=self._arithmetic.of_texts(lengths) if self._by_text else self._arithmetic.of_pairs(encoded),
            texts=_texts(read),
            cached=cached,
        )

    def _readable(self, encoded: Encoded) -> Scored:
        """The pairs that will have a score, as documents; its value is not known."""
        scores = np.zeros(len(encoded.document), np.float32)
        scores[unreadable(encoded, self._by_text)] = np.nan
        return best_chunks(encoded, scores)


def _some(read: ReadUnit, share: float, seed: int) -> ReadUnit:
    """A part of a unit: whole queries."""
    if share >= 1 or not len(read.rows):
        return read
    of_row = read.rows["query_index"].to_numpy()
    queries = np.unique(of_row)
    rng = np.random.default_rng([seed, read.unit.shard, read.unit.start])
    kept = rng.choice(queries, max(1, round(share * len(queries))), replace=False)
    good = read.rows["error"].is_null().to_numpy()
    groups = [group for group, query in zip(read.groups, np.unique(of_row[good]), strict=True) if query in kept]
    return replace(read, rows=read.rows.filter(pa.array(np.isin(of_row, kept))), groups=groups)


def _hashed(texts: Sequence[Ids]) -> dict[int, int]:
    digests = (hashlib.blake2b(np.ascontiguousarray(ids).data, digest_size=8).digest() for ids in texts)
    return dict(zip((int.from_bytes(one) for one in digests), lengths_of(texts).tolist(), strict=True))


def _texts(read: ReadUnit) -> UInt64:
    hashes: UInt64 = read.rows[TEXT_HASH].drop_null().to_numpy()
    return hashes


class Remembering:
    """What bi-encoders compute of units that come one after the other: each actor remembers the vectors of its latest
    texts (engine/scorer.py). Units go to actors in turn, which is how a run deals them out, about."""

    def __init__(self, model: ModelSpec, actors: int) -> None:
        self._arithmetic = Arithmetic.of(model)
        width = int(read_json(Path(model.directory) / "config.json").get("hidden_size") or 1024)
        self._room = VECTOR_CACHE_BYTES // (4 * width)
        self._known: list[dict[int, None]] = [{} for _ in range(actors)]
        self._next = 0

    def add(self, unit: Counted) -> Work:
        """What the next unit computes."""
        known = self._known[self._next % len(self._known)]
        self._next += 1
        new = {key: length for key, length in unit.cached.items() if key not in known}
        known |= dict.fromkeys(new)
        for key in list(islice(known, max(0, len(known) - self._room))):
            del known[key]
        return self._arithmetic.of_texts(np.fromiter(new.values(), np.int64))
