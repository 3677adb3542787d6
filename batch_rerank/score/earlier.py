"""Which earlier outputs may serve a job's scores, and their index. Reads records and indexes, and no score."""

import json
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from batch_rerank.calls import ahead
from batch_rerank.config import JobConfig
from batch_rerank.errors import BatchRerankError, ConfigError, StorageError
from batch_rerank.score.reuse import Index, KeptFile, Reuse
from batch_rerank.store.distrusted import read_distrusted
from batch_rerank.store.filesystem import Location, list_files, locate, storage_errors
from batch_rerank.store.kept import PAIR, QUERY, Records, from_bytes, pairs_name, queries_name
from batch_rerank.store.latest import read_latest, real_path
from batch_rerank.store.manifest import Manifest, differing, sha256
from batch_rerank.store.names import SCORES
from batch_rerank.store.plans import Plan

log = logging.getLogger("batch_rerank")

MOST_OUTPUTS = 8
"""That serve, the newest first: what a night has taken over from the one before lies in its own scores too."""

MOST_QUERIES = 50_000_000
"""Of an index: 1.2 GB on each node."""

LEAST_AUDITED = 200
"""Pairs of a job that are scored again, about, where any are."""

PLAN = "/_manifest/plan.json"


@dataclass(frozen=True)
class Earlier:
    """The outputs that serve, newest first, those that do not and why, and what is taken from the first."""

    served: list[str]
    passed_over: dict[str, str]
    reuse: Reuse

    def summary(self) -> dict[str, Any]:
        """For `--json`."""
        return {"outputs": self.served, "passed_over": self.passed_over}


def recipe(fields: dict[str, Any]) -> dict[str, Any]:
    """The part of a fingerprint's fields that changes a score: all that does not say which pairs there are."""
    told: dict[str, Any] = json.loads(json.dumps(fields))
    return {name: value for name, value in told.items() if not name.startswith("input.") and name != "limit"}


def find_earlier(config: JobConfig, plan: Plan) -> Earlier | None:
    """What `reuse` names, opened; None for a job that reuses nothing. Logs what serves and what does not.

    Raises ConfigError where a place that is named has no output, or is this job's own; and StorageError.
    """
    if config.reuse is None:
        return None
    options = config.output.storage_options
    own = real_path(locate(config.output.path, options))
    distrusted = read_distrusted(Manifest(locate(config.output.path, options)))
    passed: dict[str, str] = {}
    found: list[tuple[str, Manifest, Plan]] = []
    for root in _roots(config):
        if real_path(root) == own:
            continue
        if str(root) in distrusted:
            passed[str(root)] = "its scores have failed this job's audit"
            continue
        manifest = Manifest(root)
        earlier = _serving(manifest, plan)
        if isinstance(earlier, Plan):
            found.append((manifest.read_status().updated_at, manifest, earlier))
        else:
            passed[str(root)] = earlier
    found.sort(key=lambda one: one[0], reverse=True)
    for _, manifest, _ in found[MOST_OUTPUTS:]:
        passed[str(manifest.root)] = f"older than {MOST_OUTPUTS} others that serve"
    index, served = _index([(manifest, earlier) for _, manifest, earlier in found[:MOST_OUTPUTS]], passed)
    share = config.reuse.audit and max(config.reuse.audit, LEAST_AUDITED / max(1, plan.pairs))
    for output, reason in passed.items():
        log.warning("reuse: %s: %s", output, reason)
    for output in served:
        log.info("reuse: %s", output)
    if not served:
        log.warning("reuse: no earlier output serves; every pair is scored")
    return Earlier(served, passed, Reuse(index, share, int(plan.fingerprint[:16], 16), options))


def _roots(config: JobConfig) -> Iterator[Location]:
    """The outputs that a job names, each once."""
    assert config.reuse is not None
    seen = set()
    for place in config.reuse.places:
        for root in _latest(config) if place == "latest" else _matching(config, place):
            if real_path(root) not in seen:
                seen.add(real_path(root))
                yield root


def _latest(config: JobConfig) -> Sequence[Location]:
    options = config.output.storage_options
    if config.output.latest is None:
        raise ConfigError("reuse.from: latest, but the job has no output.latest; name one, or an output")
    location = locate(config.output.latest, options)
    named = read_latest(location)
    if named is None:
        log.info("reuse: %s: not there yet; nothing is published before this job", location)
        return []
    return [locate(named, options)]


def _matching(config: JobConfig, pattern: str) -> Sequence[Location]:
    where = locate(pattern.rstrip("/") + PLAN, config.output.storage_options)
    with storage_errors(where):
        roots = [where.at(file.path.removesuffix(PLAN)) for file in list_files(where)]
    if any(sign in pattern for sign in "*?["):
        if not roots:
            log.warning("reuse.from: %s matches no output", pattern)
        return roots
    if not roots and Manifest(locate(config.output.path, config.output.storage_options)).plan_location.exists():
        log.warning("reuse.from: %s: no output is there any more", pattern)  # since this job was begun
        return roots
    if not roots:
        raise ConfigError(
            f"reuse.from: {pattern}: no _manifest/plan.json there; expected the output of an earlier run, a glob of "
            "outputs, or latest"
        )
    if real_path(roots[0]) == real_path(locate(config.output.path, config.output.storage_options)):
        raise ConfigError(f"reuse.from: {pattern} is this job's own output.path; expected an earlier output")
    return roots


def _serving(manifest: Manifest, plan: Plan) -> Plan | str:
    """The plan of an output that serves a job, or why it does not. Raises StorageError where the store fails."""
    with storage_errors(manifest.plan_location):
        try:
            data = manifest.plan_location.read_bytes()
        except FileNotFoundError:
            return "no output is there any more"
    try:
        earlier = Plan.from_json(data, "its plan")
    except BatchRerankError as error:
        return str(error)
    if earlier.config.get("stage"):
        return "a staged input, no output"
    there, here = recipe(earlier.fingerprint_fields), recipe(plan.fingerprint_fields)
    lines = differing(there, here)
    if lines:
        return f"scored by another recipe, {', '.join(lines)}:\n" + "\n".join(lines.values())
    mark = manifest.read_mark()
    if mark is None or mark.fingerprint != earlier.fingerprint:
        return "not finished (no _SUCCESS)"
    return earlier


def _index(outputs: Sequence[tuple[Manifest, Plan]], passed: dict[str, str]) -> tuple[Index, list[str]]:
    """The indexes of some outputs as one, and which of them have any."""
    files: list[KeptFile] = []
    entries: list[Records] = [np.empty(0, QUERY)]
    served: list[str] = []
    for manifest, plan in outputs:
        kept = list(_kept(manifest, plan))
        queries = sum(len(found) for _, found in kept)
        if not kept:
            passed[str(manifest.root)] = "keeps no scores by what was scored (output.keep_scores: false, or cleaned)"
        elif sum(map(len, entries)) + queries > MOST_QUERIES:
            passed[str(manifest.root)] = f"the index would have more than {MOST_QUERIES:,} queries"
        else:
            served.append(str(manifest.root))
            files += [file for file, _ in kept]
            entries += [found for _, found in kept]
    together = np.concatenate(entries)
    order = np.argsort(together["query_hash"], kind="stable")
    file = np.repeat(np.arange(len(files), dtype=np.uint32), [len(found) for found in entries[1:]])
    columns = [np.ascontiguousarray(together[name][order]) for name in ("query_hash", "first", "pairs", "crc")]
    return Index(files, columns[0], file[order], *columns[1:]), served


def _kept(manifest: Manifest, plan: Plan) -> Iterator[tuple[KeptFile, Records]]:
    """The files of pairs of an output, each with its index. One without a receipt, or that is not what it says, is
    named and passed over."""
    with storage_errors(manifest.root):
        files = manifest.list_files("_scores")
    names = files.matching(SCORES)
    with ThreadPoolExecutor(16) as pool:
        receipts = list(pool.map(manifest.read_scores_receipt, names))
    wanted = [
        (name, receipt.queries_sha256)
        for name, receipt in zip(names, receipts, strict=True)
        if receipt is not None and receipt.fingerprint == plan.fingerprint and receipt.queries_sha256
    ]
    for (name, checksum), data in zip(
        wanted, ahead([partial(_read, manifest, queries_name(name)) for name, _ in wanted]), strict=True
    ):
        size = files.size(pairs_name(name))
        try:
            if data is None or size is None:
                raise ValueError("it, or what it leads into, is gone")
            if sha256(data) != checksum:
                raise ValueError("not what the receipt says")
            found = from_bytes(data, QUERY)
            header = size - int(found["pairs"].sum()) * PAIR.itemsize
            if not 0 < header < 1024:
                raise ValueError(f"{pairs_name(name)} has {size:,} bytes, which are not those of its pairs")
        except ValueError as error:
            log.warning("reuse: %s: %s; its pairs are scored", manifest.root / queries_name(name), error)
            continue
        yield KeptFile(str(manifest.root), pairs_name(name), header), found


def _read(manifest: Manifest, name: str) -> bytes | None:
    location = manifest.root / name
    try:
        with storage_errors(location):
            return location.read_bytes()
    except StorageError as error:
        log.warning("reuse: %s", error)
        return None
