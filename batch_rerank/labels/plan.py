"""What an export will be, and whether it can be: its sources opened, its settings held against them, its parts cut."""

import hashlib
import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow.parquet as pq

import batch_rerank
from batch_rerank.calls import Each, ahead, in_turn
from batch_rerank.config import JobConfig
from batch_rerank.errors import ConfigError, InputError
from batch_rerank.input.places import matches, patterns_of
from batch_rerank.judge.evaluate import Qrels, read_qrels
from batch_rerank.label_settings import SCALES, Labels
from batch_rerank.labels.rows import Work
from batch_rerank.labels.scores import Opened, open_scores
from batch_rerank.labels.teachers import QueryIndex, index_queries, sources_of
from batch_rerank.publish.output import Place
from batch_rerank.store.filesystem import Location, Options, has_magic, input_errors, locate
from batch_rerank.store.latest import real_path
from batch_rerank.store.manifest import fingerprint

log = logging.getLogger("batch_rerank")

LABELS_VERSION = 1
"""Raised when the same settings would give other labels of the same scores."""

CHOSEN_ROWS = 50_000
"""Of a part, where texts are small: some 50 MB of texts of 1 KB."""


WRITTEN = tuple(
    f"{folder}/part-00000.{ending}"
    for folder in ("train", "heldout", "queries", "documents", "_labels", "_dropped")
    for ending in ("parquet", "jsonl", "run", "qrels")
)
"""One of each kind of file that readers of labels see."""

TAUGHT_PAIRS = 500_000
"""Of a part with several teachers, whose scores are brought together by their ids: some 550 bytes a pair."""

SMALL_PAIRS = 500_000
"""Scored pairs that are exported in this process: Ray would take longer to start."""


@dataclass(frozen=True)
class Prepared:
    """An export whose sources are open. qrels: judgements, empty without; scale: decided; fields: what decides every
    byte; indexes: of the queries of the exported output and of the other teachers', where there are others."""

    labels: Labels
    output: Opened
    others: list[Opened]
    qrels: Qrels
    scale: str
    fields: dict[str, Any]
    parts: list[tuple[int, int]]
    indexes: list[QueryIndex] = field(repr=False)

    @property
    def fingerprint(self) -> str:
        """Of `fields`."""
        return fingerprint(self.fields)

    def works(self) -> Iterator[Work]:
        """Every part, in order."""
        units = self.output.plan.units
        for number, (first, last) in enumerate(self.parts):
            mine = units[first : last + 1]
            others = []
            if self.others:
                hashes = self.indexes[0].hashes_of(range(first, last + 1))
                others = sources_of(self.others, self.indexes[1:], hashes)
            yield Work(number, self.output.source(mine), others)


def prepare(place: Place, labels: Labels, each: Each) -> Prepared:
    """Open what an export reads, and check what needs no rows of it. Raises ConfigError, InputError, StorageError."""
    last = labels.negatives.ranks[1]
    output = open_scores(place, None if labels.teachers else last)
    root = locate(labels.path, labels.storage_options)
    _refuse_inside(output.manifest.root, root, "exported output")
    for job in (output.config, *([place.job] if place.job else [])):  # a staged output's own names its stage alone
        _refuse_among(job, root)
    if output.cut is not None and labels.positives.source != "teacher":
        log.warning(
            "%s has the %d best candidates of each query and no others: what is judged to be relevant below them is "
            "counted as judged_absent; a job with output.keep_scores: true keeps every score",
            output.manifest.root,
            output.cut,
        )
    others: list[Opened] = []
    for path in labels.teachers.places if labels.teachers else ():
        other = open_scores(Place(path, place.options), None)
        if other.plan.fingerprint == output.plan.fingerprint:
            raise ConfigError(
                f"labels.teachers.outputs: {path} has the exported output's own scores; expected another model's"
            )
        for earlier in others:
            if other.plan.fingerprint == earlier.plan.fingerprint:
                raise ConfigError(
                    f"labels.teachers.outputs: {path} has the same scores as {earlier.manifest.root}; expected each "
                    "once; labels.teachers.weights gives one more weight"
                )
        _refuse_inside(other.manifest.root, root, "output of a teacher")
        others.append(other)
    scale = decided(labels, output)
    qrels, judged = {}, None
    if labels.positives.qrels is not None:
        options = place.job.input.storage_options if place.job else labels.storage_options
        qrels = read_qrels(labels.positives.qrels, options)
        judged = _sha256(labels.positives.qrels, options)
    indexes = [index_queries(one, by_size(output, each)) for one in (output, *others)] if others else []
    return Prepared(
        labels=labels,
        output=output,
        others=others,
        qrels=qrels,
        scale=scale,
        fields=_fields(labels, output, others, scale, judged),
        parts=cut(output, labels),
        indexes=indexes,
    )


def by_size(output: Opened, each: Each) -> Each:
    """Who runs the calls of an export."""
    return in_turn if output.plan.pairs < SMALL_PAIRS else each


def decided(labels: Labels, output: Opened) -> str:
    """The scale. Raises ConfigError where the model has none such."""
    mapped = output.model.relevance != "none" and labels.teachers is None
    if not mapped and (labels.scale == "probability" or labels.false_negatives.share is not None):
        wanted = "scale: probability" if labels.scale == "probability" else "false_negatives.share"
        raise ConfigError(
            f"labels.{wanted}: scores of {output.model.name} have no map to probabilities ({output.model.kind}); "
            "use scale: minmax or logit, and false_negatives.margin"
        )
    if labels.scale != "auto":
        return labels.scale
    found = SCALES.get(labels.form, "logit")
    return "minmax" if found == "probability" and not mapped else found


def prompted(output: Opened) -> bool:
    """Whether queries have instructions, of their own or the job's. A reader of lines wants a key in all of them."""
    given = output.config.input
    name = given.columns.get("instruction", "instruction")

    def has_column(url: str) -> bool:
        location = locate(url, given.storage_options)
        with input_errors(location), location.open() as file:
            return name in pq.read_schema(file).names

    calls = [partial(has_column, shard.url) for shard in output.plan.shards]
    return output.config.model.instruction is not None or any(ahead(calls))


def _fields(labels: Labels, output: Opened, others: list[Opened], scale: str, judged: str | None) -> dict[str, Any]:
    """Everything that changes a byte: not where things lie, nor the limits."""
    told = labels.model_dump(mode="json", exclude={"path", "max_dropped_queries", "to", "layout", "scale"})
    told["positives"] |= {"from": labels.positives.source, "qrels": judged}
    told["negatives"]["least"] = labels.least
    if labels.teachers is not None:
        told["teachers"] |= {"outputs": [one.plan.fingerprint for one in others]}
        del told["teachers"]["max_missing"]
    publication = None if output.whole or output.found.publication is None else output.found.publication.id
    target, layout = labels.form
    return {
        "labels_version": LABELS_VERSION,
        "output": output.plan.fingerprint,
        "scores": [_digest(one) for one in (output, *others)],  # the same job may have been scored again
        "publication": publication,
        "to": target,
        "layout": layout,
        "scale": scale,
        **told,
    }


def _digest(output: Opened) -> str:
    scored = sorted((receipt.unit, receipt.sha256) for receipt in output.found.committed)
    return fingerprint({"units": scored})


def about(prepared: Prepared) -> dict[str, Any]:
    """Where the labels come from, for people."""
    output = prepared.output
    model = output.model
    return {
        "version": batch_rerank.__version__,
        "output": str(output.manifest.root),
        "output_fingerprint": output.plan.fingerprint,
        "model": model.name,
        "revision": model.revision or model.identity,
        "template": model.template,
        "teachers": [{"output": str(one.manifest.root), "model": one.model.name} for one in prepared.others],
        "to": prepared.labels.form[0],
        "layout": prepared.labels.form[1],
        "scale": prepared.scale,
    }


def cut(output: Opened, labels: Labels) -> list[tuple[int, int]]:
    """Units in parts: first and last. A part ends where what is chosen of it has about `file_bytes` in the input's
    compression, or CHOSEN_ROWS rows, or, with several teachers, TAUGHT_PAIRS pairs; or with a shard, once it has half
    of that."""
    units, shards = output.plan.units, output.plan.shards
    wanted = labels.positives.per_query + labels.negatives.per_query
    parts: list[tuple[int, int]] = []
    first, size, rows, pairs = 0, 0.0, 0.0, 0
    for index, unit in enumerate(units):
        shard = shards[unit.shard]
        chosen = min(unit.pairs, unit.queries * wanted)
        rows += chosen
        pairs += unit.pairs if labels.teachers else 0
        size += shard.file.size * (unit.stop - unit.start) / max(1, shard.rows) * chosen / max(1, unit.pairs)
        full = max(size / labels.file_bytes, rows / CHOSEN_ROWS, pairs / TAUGHT_PAIRS)
        ends = index == len(units) - 1 or units[index + 1].shard != unit.shard
        if full >= 1 or (ends and full >= 0.5) or index == len(units) - 1:
            parts.append((first, index))
            first, size, rows, pairs = index + 1, 0.0, 0.0, 0
    return parts


def _refuse_inside(own: Location, root: Location, what: str) -> None:
    if own.is_local != root.is_local:
        return
    there, here = (f"{real_path(one).rstrip('/')}/" for one in (own, root))
    if here.startswith(there):
        raise ConfigError(
            f"labels.path: {root} is inside the {what} {own}, whose readers would meet it; expected a place of its own"
        )
    if there.startswith(here):
        raise ConfigError(f"labels.path: {root} holds the {what} {own}; expected a place of its own")


def _refuse_among(job: JobConfig, root: Location) -> None:
    """Labels where the next run of the job would read them as its input."""
    for key, pattern in patterns_of(job):
        if not has_magic(pattern):
            continue  # a file, or a folder, which is not read recursively
        read = locate(pattern, job.input.storage_options)
        if any(matches(read, root / name) for name in WRITTEN):
            raise ConfigError(
                f"labels.path: {root} is among what {key} {pattern!r} of the exported output takes in: its next run "
                "would read labels; expected a place of its own"
            )


def _sha256(path: str, options: Options) -> str:
    location = locate(path, options)
    with input_errors(location):
        return hashlib.sha256(location.read_bytes()).hexdigest()


def check_matches(prepared: Prepared, judged_queries: int, ids: Iterator[str]) -> None:
    """Raise InputError where judgements are of none of the output's queries."""
    if prepared.qrels and judged_queries == 0:
        here = list(itertools.islice(ids, 1))
        there = next(iter(prepared.qrels))
        raise InputError(
            f"{prepared.labels.positives.qrels}: judges {len(prepared.qrels):,} queries, none of which is in "
            f"{prepared.output.manifest.root} (there {there!r}, here {here[0] if here else 'no query'!r}); expected "
            "the qrels of these queries, with the same ids"
        )
