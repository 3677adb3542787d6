"""Reuse: defects that were found by looking for them, each with the test that showed it."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import job, scored_only
from test_reuse import NO_AUDIT, as_if_alone, corpus, night, plant, shards

from batch_rerank.engine.encoded import Encoded
from batch_rerank.engine.encoding import make_encoder
from batch_rerank.engine.packing import Float32
from batch_rerank.engine.selftest import own_tokens
from batch_rerank.errors import AuditError, BatchRerankError, UnfinishedError
from batch_rerank.job.republish import republish
from batch_rerank.job.run import run
from batch_rerank.publish.output import Place
from batch_rerank.score.steps import LoadedScorer
from batch_rerank.store.distrusted import distrust
from batch_rerank.store.filesystem import Location, locate
from batch_rerank.store.manifest import Manifest


def poison(monkeypatch: pytest.MonkeyPatch, marker: str) -> None:
    """The engine raises for every batch that has a text with this word."""
    plain = LoadedScorer.score

    def score(self: LoadedScorer, encoded: Encoded) -> Float32:
        for own in own_tokens(encoded, np.arange(len(encoded.document))):
            if marker.encode() in bytes(np.asarray(own).astype(np.uint8)):
                raise RuntimeError("poison")
        return plain(self, encoded)

    monkeypatch.setattr(LoadedScorer, "score", score)


# pairs that failed are never kept, so the next night they are all that a bundle has; "all pairs raise" then
# takes the unit for a bad one and sets it aside, where a run without reuse gives an error row each.
def test_pairs_that_failed_last_night_fail_alone_tonight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = corpus()
    rows[3]["text"], rows[17]["text"] = "zzpoison a", "zzpoison b"
    poison(monkeypatch, "zzpoison")
    given = shards(tmp_path / "in", rows)
    keys = {"scoring__max_failed_rows": 1}
    first = run(job(given, tmp_path / "first", **keys), local=True).totals
    assert first.failed == 2
    assert night(given, tmp_path / "second", tmp_path / "first", **keys, **NO_AUDIT).totals.failed == 2


# a unit may have 16 pairs that raise; units that go together have 16 between them, and all are set aside.
def test_pairs_that_raise_are_counted_by_unit_not_by_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = corpus(60, 10)
    run(job(shards(tmp_path / "in", rows), tmp_path / "first"), local=True)
    for number, row in enumerate(rows[::25]):
        row["text"] = f"zzpoison {number}"
    for row in rows[1::25]:
        row["text"] += "!"
    poison(monkeypatch, "zzpoison")
    given = shards(tmp_path / "in2", rows)
    keys = {"scoring__max_failed_rows": 1, "input__unit_pairs": 100}
    assert run(job(given, tmp_path / "own", **keys), local=True).totals.failed == 24
    assert night(given, tmp_path / "second", tmp_path / "first", **keys, **NO_AUDIT).totals.failed == 24


# a tokenizer that raises in one unit ends the job with a traceback; without reuse the unit is set aside.
def test_a_unit_that_cannot_be_encoded_is_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = corpus()
    run(job(shards(tmp_path / "in", rows), tmp_path / "first"), local=True)
    for row in rows[::10]:
        row["text"] += "!"
    given = shards(tmp_path / "in2", rows)

    def failing(model: Any) -> Any:
        encoder = make_encoder(model)

        class Failing:
            def encode(self, groups: Any) -> Any:
                if any(text.endswith("!") for group in groups for text in group.documents):
                    raise ValueError("the tokenizer")
                return encoder.encode(groups)

        return Failing()

    monkeypatch.setattr("batch_rerank.job.run_local.make_encoder", failing)
    with pytest.raises(BatchRerankError):
        run(job(given, tmp_path / "own"), local=True)
    with pytest.raises(BatchRerankError):
        night(given, tmp_path / "second", tmp_path / "first", **NO_AUDIT)


# each output that serves is read in full for every query: the pairs of eight nights where one has them all.
def test_what_the_newest_output_has_is_not_read_in_the_older_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = shards(tmp_path / "in", corpus())
    for name in ("a1", "a2", "a3", "a4"):
        run(job(given, tmp_path / name), local=True)
    plain, read = Location.read_range, []

    def counted(self: Location, start: int, stop: int) -> bytes:
        if "pairs.npy" in self.path:
            read.append(stop - start)
        return plain(self, start, stop)

    monkeypatch.setattr(Location, "read_range", counted)
    night(given, tmp_path / "one", tmp_path / "a4")
    alone = sum(read)
    read.clear()
    night(given, tmp_path / "all", str(tmp_path / "a*"))
    assert sum(read) == alone


# a job that was killed after its last score cannot be finished once the output it reused is removed.
def test_a_scored_job_needs_no_earlier_output_to_be_finished(tmp_path: Path) -> None:
    given = shards(tmp_path / "in", corpus())
    run(job(given, tmp_path / "first"), local=True)
    config = job(given, tmp_path / "second", reuse__from=str(tmp_path / "first"))
    scored_only(config)
    shutil.rmtree(tmp_path / "first")
    assert run(config, local=True).totals.reused == 120


# `latest` names an output that is gone: the job ends, where a score that is gone is a counted miss.
def test_latest_that_names_what_is_gone_is_a_first_night(tmp_path: Path) -> None:
    given = shards(tmp_path / "in", corpus())
    latest = {"output__latest": str(tmp_path / "LATEST.json")}
    run(job(given, tmp_path / "first", **latest), local=True)
    shutil.rmtree(tmp_path / "first")
    assert night(given, tmp_path / "second", "latest", **latest).totals.reused == 0


# an audit that failed left the units that were known in whole, and the next run finished and published them
@pytest.mark.parametrize("reuse", [True, False])
def test_after_a_failed_audit_nothing_of_the_earlier_output_is_left(reuse: bool, tmp_path: Path) -> None:
    rows = corpus()
    run(job(shards(tmp_path / "in", rows), tmp_path / "first"), local=True)
    plant(tmp_path / "first", 0.25)
    rows[57]["text"] += "!"
    given = shards(tmp_path / "in2", rows)
    keys = {"input__unit_pairs": 10}
    with pytest.raises(AuditError):
        night(given, tmp_path / "second", tmp_path / "first", **keys)
    left = sorted((tmp_path / "second/_work").iterdir())
    assert len(left) == 11
    (tmp_path / f"second/_manifest/receipts/{left[0].stem}.json").unlink()  # killed before it, there
    if reuse:
        summary = night(given, tmp_path / "second", tmp_path / "first", **keys)
        assert summary.reuse is not None and "failed this job's audit" in str(summary.reuse["passed_over"])
    else:
        summary = run(job(given, tmp_path / "second", **keys), local=True)
    assert summary.totals.reused == 0
    as_if_alone(tmp_path / "second", given, tmp_path / "own", **keys)


# `publish` took what the next run would have thrown away.
def test_after_a_failed_audit_nothing_is_published(tmp_path: Path) -> None:
    rows = corpus()
    run(job(shards(tmp_path / "in", rows), tmp_path / "first"), local=True)
    plant(tmp_path / "first", 0.25)
    given = shards(tmp_path / "in2", rows)
    config = job(given, tmp_path / "second", reuse__from=str(tmp_path / "first"), reuse__audit=0.0)
    scored_only(config)
    distrust(Manifest(locate(str(tmp_path / "second"))), [str(tmp_path / "first")])
    with pytest.raises(UnfinishedError, match="failed the audit"):
        republish(Place(str(tmp_path / "second")), local=True)
    assert not list((tmp_path / "second").glob("part-*"))
    assert run(job(given, tmp_path / "second"), local=True).totals.reused == 0
