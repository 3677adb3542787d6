"""Where an actor's time goes: every second once, whatever its units do, up to the actor's age."""

import json
import random
import threading
from pathlib import Path
from typing import Any

import pytest
from checkpoints import qwen3_reranker
from conftest import candidate_rows, job, write

from batch_rerank.job.run import run
from batch_rerank.score.timesheet import Phase, Timesheet
from batch_rerank.store.receipts import TIMES, Receipt, Totals

PARTS = ("load_seconds", "wait_seconds", "seconds")


class Clock:
    """A clock that stands until it is set."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Unit:
    """A unit in a thread of its own, which does one thing after the other as it is told."""

    def __init__(self, sheet: Timesheet) -> None:
        self._sheet, self._told, self._done = sheet, threading.Semaphore(0), threading.Semaphore(0)
        self._next: Phase | None = "hand"
        self._thread = threading.Thread(target=self._live)
        self._thread.start()
        self._done.acquire()

    def _live(self) -> None:
        with self._sheet.unit():
            self._done.release()
            while True:
                self._told.acquire()
                if self._next is None:
                    return
                self._sheet.enter(self._next)
                self._done.release()

    def to(self, phase: Phase) -> None:
        self._next = phase
        self._told.release()
        self._done.acquire()

    def leave(self) -> None:
        self._next = None
        self._told.release()
        self._thread.join()


def test_two_units_at_once_are_the_union_of_their_computing() -> None:
    clock = Clock()
    sheet = Timesheet(clock)
    clock.now = 105
    sheet.loaded()
    clock.now = 107
    first = Unit(sheet)  # waited 2 s for it
    clock.now = 108
    first.to("pack")
    clock.now = 110
    first.to("compute")
    clock.now = 111
    first.to("await")  # its results come at 120
    second = Unit(sheet)
    second.to("pack")
    clock.now = 113
    second.to("compute")
    clock.now = 115
    second.to("await")  # begun later, there earlier
    clock.now = 118
    second.to("hand")
    assert sheet.take() == {
        "load_seconds": 5,
        "wait_seconds": 2,
        "seconds": 11,  # 107 to 118
        "pack_seconds": 2,  # 108 to 110; the second unit's, 111 to 113, was beside the first one's computing
        "compute_seconds": 8,  # 110 to 118
        "result_seconds": 5,  # 111 to 113 the second unit was packed: the device computed, nobody sent anything
        "age_seconds": 18,
    }
    second.leave()
    clock.now = 120
    first.to("hand")
    clock.now = 120.5
    assert sheet.take() == {
        "load_seconds": 0,
        "wait_seconds": 0,
        "seconds": 2.5,
        "pack_seconds": 0,
        "compute_seconds": 2,
        "result_seconds": 2,
        "age_seconds": 20.5,
    }
    first.leave()


def test_a_unit_without_a_receipt_leaves_its_time_to_the_next_and_units_together_share() -> None:
    clock = Clock()
    sheet = Timesheet(clock)
    sheet.loaded()
    with pytest.raises(RuntimeError), sheet.unit():
        sheet.enter("pack")
        clock.now += 3
        raise RuntimeError
    clock.now += 5
    with sheet.unit():
        sheet.enter("compute")
        clock.now += 4
        taken = sheet.take(units=4)
    assert taken["pack_seconds"] == 0.75
    assert taken["compute_seconds"] == 1
    assert taken["wait_seconds"] == 1.25
    assert taken["age_seconds"] == 12


def test_whatever_units_do_their_seconds_add_up_to_the_actors_age() -> None:
    chance = random.Random(7)
    clock = Clock()
    sheet, units, spent = Timesheet(clock), list[Unit](), 0.0
    sheet.loaded()
    for _ in range(300):
        clock.now += chance.random()
        act = chance.choice(["come", "go", "take", "pack", "compute", "await", "hand"])
        if act == "come" and len(units) < 2:
            units.append(Unit(sheet))
        elif act == "go" and units:
            units.pop(chance.randrange(len(units))).leave()
        elif act == "take":
            taken = sheet.take()
            spent += sum(taken[name] for name in PARTS)
            assert spent == pytest.approx(taken["age_seconds"], abs=1e-3)
            assert taken["result_seconds"] <= taken["compute_seconds"]
            assert taken["compute_seconds"] + taken["pack_seconds"] <= taken["seconds"] + 1e-5
        elif units and act in ("pack", "compute", "await", "hand"):
            chance.choice(units).to(act)  # type: ignore[arg-type]
    for unit in units:
        unit.leave()
    assert spent > 100


def receipts_of(output: Path) -> list[Receipt]:
    return [Receipt.from_json(path.read_bytes(), path) for path in (output / "_manifest/receipts").iterdir()]


def check(receipts: list[Receipt], wall: float) -> None:
    """Each actor's seconds add up to its age at every receipt, in the order of their instants, and no actor is older
    than the run."""
    for scorer in {receipt.scorer for receipt in receipts}:
        own = sorted((one for one in receipts if one.scorer == scorer), key=lambda one: one.age_seconds)
        spent = 0.0
        for count, receipt in enumerate(own, 1):
            assert receipt.load_seconds == 0 or count == 1
            assert receipt.pack_seconds + receipt.compute_seconds <= receipt.seconds + 1e-5
            spent += sum(getattr(receipt, name) for name in PARTS)
            assert spent == pytest.approx(receipt.age_seconds, abs=1e-5 * count)
        assert own[0].load_seconds > 0
        assert 0 < own[-1].age_seconds <= wall


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("mode", ["free", pytest.param("tiny", marks=pytest.mark.slow), "local"])
def test_an_actors_receipts_add_up_to_its_wall_time(mode: str, flat_shards: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"input__unit_pairs": 25, "cluster__cpus_per_actor": 1}
    if mode != "free":
        keys |= {"model__name": str(qwen3_reranker(tmp_path / "model")), "model__kind": "auto"}
        keys |= {"model__max_length": 256}
    summary = run(job(flat_shards, tmp_path / "out", **keys), local=mode == "local")
    receipts = receipts_of(tmp_path / "out")
    assert len(receipts) == 12
    check(receipts, summary.seconds)
    assert {bool(receipt.actor) for receipt in receipts} == {mode != "local"}
    assert all(receipt.compute_seconds > 0 for receipt in receipts)
    assert all((receipt.token_budget > 0) == (mode != "free") for receipt in receipts)
    for name in TIMES:
        assert getattr(summary.totals, name) == pytest.approx(sum(getattr(one, name) for one in receipts))


@pytest.mark.usefixtures("local_ray")
@pytest.mark.slow
def test_units_that_were_reused_took_no_actors_time_and_those_of_a_bundle_share_it(tmp_path: Path) -> None:
    rows = candidate_rows(48, 10)
    write(tmp_path / "in" / "0.parquet", rows)
    run(job(tmp_path / "in", tmp_path / "one"), local=True)
    changed = [{**row, "text": row["text"] + ("new" if i % 80 == 0 else "")} for i, row in enumerate(rows)]
    write(tmp_path / "in2" / "0.parquet", changed)
    again = job(tmp_path / "in2", tmp_path / "two", reuse__from=str(tmp_path / "one"), reuse__audit=0.0)
    summary = run(again)
    receipts = receipts_of(tmp_path / "two")
    met = [receipt for receipt in receipts if receipt.scorer]
    unmet = [receipt for receipt in receipts if not receipt.scorer]
    assert len(met) == len(unmet) == 6
    assert {sum(getattr(receipt, name) for name in PARTS) for receipt in unmet} == {0}
    assert {receipt.age_seconds for receipt in unmet} == {0}
    for scorer in {receipt.scorer for receipt in met}:
        own = [receipt for receipt in met if receipt.scorer == scorer]
        age = max(receipt.age_seconds for receipt in own)
        assert sum(getattr(one, name) for one in own for name in PARTS) == pytest.approx(age, abs=1e-4)
        assert age <= summary.seconds
    assert len({receipt.age_seconds for receipt in met}) < len(met), "some were scored together"


def test_a_receipt_of_an_earlier_version_has_no_such_seconds() -> None:
    old = {"unit": "00000-00000", "fingerprint": "f", "part": "p", "size": 1, "sha256": "s", "seconds": 2.5}
    receipt, totals = Receipt.from_json(json.dumps(old).encode(), "here"), Totals()
    totals.add(receipt)
    assert (receipt.wait_seconds, receipt.age_seconds, receipt.actor) == (0, 0, "")
    assert (totals.seconds, totals.compute_seconds) == (2.5, 0)
