"""Defects that were looked for in what is new: models in stores, the operator, nodes that leave, plans of what is
left."""

import threading
from typing import Any

import pyarrow as pa
import pytest

import batch_rerank.ray_data as ray_data
from batch_rerank.errors import UnfinishedError
from batch_rerank.ray_data import Rerank
from batch_rerank.score.poison import PoisonedUnitError

FREE = {"name": "none", "kind": "checksum"}


def three_pieces(monkeypatch: pytest.MonkeyPatch) -> pa.Table:
    """A batch that the operator scores in three pieces."""
    monkeypatch.setattr(ray_data, "unit_pairs", lambda *given: 1)
    candidates = [{"doc_id": "d", "text": "t"}]
    return pa.Table.from_pylist([{"query_id": str(i), "query": "q", "candidates": candidates} for i in range(3)])


def ends(call: Any, seconds: float = 10) -> bool:
    """Whether a call returns."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def test_a_batch_that_waits_for_its_reader_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, operator = three_pieces(monkeypatch), Rerank(FREE)
    waiting = operator(batch)
    next(waiting)
    assert ends(lambda: list(operator(batch)), 5)
    assert len(list(waiting)) == 2


def test_a_batch_that_failed_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, operator = three_pieces(monkeypatch), Rerank(FREE)
    score = ray_data.score_unit

    def poisoned(*given: Any, **keys: Any) -> Any:
        raise PoisonedUnitError("as if many raised")

    monkeypatch.setattr(ray_data, "score_unit", poisoned)
    with pytest.raises(UnfinishedError) as kept:
        list(operator(batch))
    monkeypatch.setattr(ray_data, "score_unit", score)
    assert ends(lambda: list(operator(batch)), 5)
    assert kept.value
