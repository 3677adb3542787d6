"""Scores that an earlier output has: found by what was scored, never by ids, and believed only with their checksum.

The index has the queries of earlier outputs, not their pairs: 24 bytes a query, one array a node. The pairs of a unit's
queries are read from where they lie, and matched by query and text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from batch_rerank.calls import ahead
from batch_rerank.engine.canaries import Limits
from batch_rerank.engine.encoded import Group
from batch_rerank.engine.packing import Float32, Scored
from batch_rerank.errors import BatchRerankError
from batch_rerank.schema import QUERY_HASH, TEXT_HASH
from batch_rerank.score.read_unit import ReadUnit
from batch_rerank.store.filesystem import Options, locate, storage_errors
from batch_rerank.store.kept import PAIR, Records, checksum

Bools = npt.NDArray[np.bool_]
Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]

GAP_BYTES = 2**16
"""Between two queries of a file that are read in one request all the same."""

SPAN_BYTES = 2**23
"""Of one request at most."""

ENOUGH = 32
"""Audited pairs from which on their mean difference says something."""


@dataclass(frozen=True)
class KeptFile:
    """A file of pairs. output: that it is of; header: bytes before its first record."""

    output: str
    name: str
    header: int


@dataclass(frozen=True)
class Index:
    """Where the pairs of earlier outputs' queries are; arrays of one length, sorted by query_hash, newer ones first
    among equals: query_hash uint64, file (which of `files`), first, pairs and crc uint32 as in store/kept.py."""

    files: Sequence[KeptFile]
    query_hash: UInt64
    file: npt.NDArray[np.uint32]
    first: npt.NDArray[np.uint32]
    pairs: npt.NDArray[np.uint32]
    crc: npt.NDArray[np.uint32]

    def of(self, queries: UInt64) -> Int64:
        """int64[m]: the entries of some distinct queries."""
        start = np.searchsorted(self.query_hash, queries, "left")
        stop = np.searchsorted(self.query_hash, queries, "right")
        return np.repeat(start - np.append(0, np.cumsum(stop - start)[:-1]), stop - start) + np.arange(
            (stop - start).sum()
        )

    def by_output(self, entries: Int64) -> Iterator[Int64]:
        """Entries of one output after the other, the newest first."""
        of_entry = self._output_of_file[self.file[entries]]
        for output in np.unique(of_entry).tolist():
            yield entries[of_entry == output]

    @cached_property
    def _output_of_file(self) -> Int64:
        """int64[files]: which output each is of, the newest first."""
        number = {output: at for at, output in enumerate(dict.fromkeys(file.output for file in self.files))}
        return np.array([number[file.output] for file in self.files], np.int64)


@dataclass(frozen=True)
class Reuse:
    """What a job takes from earlier outputs. share: of the reused pairs that are scored again, of those units that have
    anything to score; seed: which; options: what the stores of the outputs want to be told."""

    index: Index
    share: float
    seed: int
    options: Options


@dataclass(frozen=True)
class Known:
    """What earlier outputs know of a unit's n rows without an error. pairs: PAIR[n]; found: bool[n], of which rows;
    asked: bool[n], rows that are scored: what is not found, and of the rest those that are audited."""

    pairs: Records
    found: Bools
    asked: Bools
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def audited(self) -> Bools:
        """bool[n]: rows that are known, and scored again."""
        return np.logical_and(self.found, self.asked)

    @staticmethod
    def together(known: Sequence["Known"]) -> "Known":
        """Of several units as one; what receipts say stays apart."""
        return Known(
            pairs=np.concatenate([one.pairs for one in known]),
            found=np.concatenate([one.found for one in known]),
            asked=np.concatenate([one.asked for one in known]),
        )

    def merge(self, computed: Scored, chunked: bool) -> Scored:
        """The scores of all rows; `computed` are those of the asked ones. An audited row keeps what was known."""

        def full(name: str, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
            made = self.pairs[name].copy()
            made[self.asked] = values
            made[self.found] = self.pairs[name][self.found]
            return made

        told = -1 if computed.offset is None else computed.offset
        offset = full("chunk_offset", np.broadcast_to(told, computed.scores.shape)) if chunked else None
        return Scored(
            full("score", computed.scores),
            full("n_tokens", computed.n_tokens),
            full("truncated", computed.truncated),
            offset,
        )

    def rows_of(self, pairs: Sequence[int]) -> list[int]:
        """The rows of some of the asked pairs."""
        rows = np.flatnonzero(self.asked)
        return [int(rows[pair]) for pair in pairs]

    def audit(self, computed: Float32, allowed: Limits) -> tuple[dict[str, Any], str]:
        """What the receipt says of the audited pairs, and what is wrong with them, empty where nothing is. computed:
        float32[asked rows]."""
        audited = self.audited
        again, known = computed[audited[self.asked]], self.pairs["score"][audited]
        again, known = again[~np.isnan(again)], known[~np.isnan(again)]
        if not len(again):
            return {}, ""
        difference = np.abs(again - known)
        judged = difference / allowed.scale(known)
        about = {"audited": len(again), "audit_difference": float(difference.max())}
        wrong = judged.max() > allowed.most or (len(judged) >= ENOUGH and judged.mean() > allowed.mean)
        worst = int(judged.argmax())
        seen = (
            f"{len(again)} of its reused scores were computed again and differ by {difference.max():.2e} at most "
            f"({known[worst]:.6g} is kept, {again[worst]:.6g} computed) and {difference.mean():.2e} on average; "
            f"allowed {allowed.most:.2g} and {allowed.mean:.2g}"
        )
        return about, seen if wrong else ""


def recall(read: ReadUnit, reuse: Reuse) -> Known:
    """What earlier outputs know of a unit. What cannot be read, or is not what its checksum says, is not known."""
    queries, texts = (read.rows[name].drop_null().to_numpy() for name in (QUERY_HASH, TEXT_HASH))
    index = reuse.index
    known, found = np.zeros(len(queries), PAIR), np.zeros(len(queries), np.bool_)
    listed, lost = np.zeros(len(queries), np.bool_), np.zeros(len(queries), np.bool_)
    used: set[str] = set()
    for entries in index.by_output(index.of(np.unique(queries))):
        listed |= np.isin(queries, index.query_hash[entries])
        wanted = entries[np.isin(index.query_hash[entries], queries[~found])]
        whole, blocks = _read(reuse, wanted)
        lost |= np.isin(queries, index.query_hash[wanted[~whole]])
        hits = _matched(index, wanted[whole], blocks, queries, texts, known, found)
        used |= {index.files[file].output for file in np.unique(index.file[hits]).tolist()}
    lost &= ~found
    about = {
        "reused": int(found.sum()),
        "new_queries": int((~listed).sum()),
        "unreadable": int(lost.sum()),
        "new_documents": int((listed & ~found & ~lost).sum()),
        "reused_from": sorted(used),
    }
    asked = ~found
    if asked.any():
        mixed = _mixed(queries ^ np.uint64(reuse.seed), texts * np.uint64(0x9E3779B97F4A7C15))
        asked |= mixed < np.uint64(min(reuse.share, 1) * (2**64 - 2**11))
        asked |= reuse.share >= 1
    return Known(known, found, asked, about)


def _matched(
    index: Index,
    entries: Int64,
    blocks: Sequence[Records],
    queries: UInt64,
    texts: UInt64,
    known: Records,
    found: Bools,
) -> Int64:
    """Take what some entries' pairs know of the rows that are not found yet: fills `known` and `found`, and gives the
    entries that were of use."""
    if not len(entries):
        return entries
    pairs, source = np.concatenate(blocks), np.repeat(entries, index.pairs[entries])
    of_query = index.query_hash[source]
    key = _mixed(of_query, pairs["text_hash"])
    order = np.argsort(key, kind="stable")
    place = order[np.minimum(np.searchsorted(key[order], _mixed(queries, texts)), len(order) - 1)]
    new = (of_query[place] == queries) & (pairs["text_hash"][place] == texts) & ~found
    known[new] = pairs[place[new]]
    found |= new
    used: Int64 = source[place[new]]
    return used


def asked_groups(groups: Sequence[Group], asked: Bools) -> list[Group]:
    """The groups with the documents of the asked rows."""
    kept, start = [], 0
    for group in groups:
        wanted = asked[start : start + len(group.documents)]
        start += len(group.documents)
        if wanted.any():
            documents = [text for text, one in zip(group.documents, wanted.tolist(), strict=True) if one]
            kept.append(Group(group.query, documents, group.instruction))
    return kept


def _mixed(queries: UInt64, texts: UInt64) -> UInt64:
    """One number for both, to sort by; both are compared after it."""
    return queries * np.uint64(0xD6E8FEB86659FD93) ^ texts


def _read(reuse: Reuse, entries: Int64) -> tuple[Bools, list[Records]]:
    """The pairs of some entries of the index, of those that are whole, in their order; and bool[n], which are."""
    index = reuse.index
    order = entries[np.lexsort((index.first[entries], index.file[entries]))]
    spans = list(_spans(index, order))
    read: dict[int, bytes] = {}
    requests = [partial(_request, reuse, index.files[file], start, stop) for file, start, stop, _ in spans]
    for (_, start, _, of_span), data in zip(spans, ahead(requests), strict=True):
        for entry in of_span:
            if data is not None:
                first = (int(index.first[entry]) - start) * PAIR.itemsize
                read[entry] = data[first : first + int(index.pairs[entry]) * PAIR.itemsize]
    whole = np.array([checksum(read.get(entry, b"?")) == index.crc[entry] for entry in entries.tolist()], bool)
    return whole, [np.frombuffer(read[entry], PAIR) for entry in entries[whole].tolist()]


def _spans(index: Index, entries: Int64) -> Iterator[tuple[int, int, int, list[int]]]:
    """Entries in the order of their files and places as what is read in one request: file, first and last record, and
    the entries in between."""
    span: tuple[int, int, int, list[int]] | None = None
    for entry in entries.tolist():
        file, first = int(index.file[entry]), int(index.first[entry])
        stop = first + int(index.pairs[entry])
        if span is not None:
            near = span[0] == file and (first - span[2]) * PAIR.itemsize <= GAP_BYTES
            if near and (stop - span[1]) * PAIR.itemsize <= SPAN_BYTES:
                span[3].append(entry)
                span = (file, span[1], max(stop, span[2]), span[3])
                continue
            yield span
        span = (file, first, stop, [entry])
    if span is not None:
        yield span


def _request(reuse: Reuse, file: KeptFile, start: int, stop: int) -> bytes | None:
    """Records of a file; None where it is gone or damaged."""
    location = locate(file.output, reuse.options, reached=True) / file.name
    try:
        with storage_errors(location):
            return location.read_range(file.header + start * PAIR.itemsize, file.header + stop * PAIR.itemsize)
    except (BatchRerankError, EOFError):
        return None
