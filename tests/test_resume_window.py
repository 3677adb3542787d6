# ruff: noqa: F811  (fixtures)
"""A run that goes on with an unfinished output is stopped at each of its steps, another job ends there, and it wakes:
it takes nothing away of what the other has published."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from conftest import Killed
from test_withdraw import Made, at_step, made, store  # noqa: F401

import batch_rerank.publish.publish as publishing
from batch_rerank.config import JobConfig
from batch_rerank.engine.encoded import Encoded
from batch_rerank.engine.packing import Float32
from batch_rerank.errors import ConflictError, UnfinishedError
from batch_rerank.job.republish import republish
from batch_rerank.job.run import run
from batch_rerank.publish.output import Place
from batch_rerank.publish.verify import verify
from batch_rerank.score.steps import LoadedScorer

STEPS = 80


def killed(*_: object) -> None:
    raise Killed


def left_behind(config: JobConfig, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An output without `_SUCCESS` in which the engine has failed on a pair of the second unit: nothing published, or
    all but the mark."""
    score = LoadedScorer.score

    def failing(self: LoadedScorer, encoded: Encoded) -> Float32:
        if any(bytes(encoded.segment(index)).count(b"beta") == 10 for index in encoded.document):
            raise RuntimeError("cannot score this")
        return score(self, encoded)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(LoadedScorer, "score", failing)
        if state == "scored":
            patch.setattr("batch_rerank.job.run.finish", killed)
        else:
            patch.setattr(publishing, "mark_done", killed)
        run(tolerant(config), local=True)


def tolerant(config: JobConfig) -> JobConfig:
    return config.model_copy(update={"scoring": config.scoring.model_copy(update={"max_failed_rows": 1.0})})


def act(successor: str, made: Made, output: str) -> bool:
    """Another job on the output; whether it was let: what a run makes again is not there to be published."""
    otherwise = made(output, top_k=2)
    try:
        if successor == "run":
            run(tolerant(made(output)), local=True)
        else:
            path = otherwise.output.path
            republish(Place(path) if successor == "publish" else Place(path, {}, otherwise), local=True)
    except (UnfinishedError, ConflictError):
        return False
    return True


def stopped_at(
    number: int,
    state: str,
    successor: str,
    made: Made,
    monkeypatch: pytest.MonkeyPatch,
) -> list[str] | None:
    """What is wrong when a run was stopped at a step, another job has ended meanwhile, and it has woken; None where
    there are fewer steps."""
    output = f"out-{number}"
    config = tolerant(made(output))
    left_behind(config, state, monkeypatch)
    let: list[bool] = []
    following: Callable[[], Any] = partial(act, successor, made, output)
    with at_step(number, lambda: let.append(following()), monkeypatch) as struck, suppress(ConflictError):
        run(config, local=True)
    if not struck:
        return None
    if not let[0]:
        run(config, local=True)
    return [f"{struck}: {problem}" for problem in verify(config.output.path).problems]


CASES = [
    pytest.param(
        where, state, successor, marks=[] if (where, successor) == ("disk", "publish") else [pytest.mark.chaos]
    )
    for where in ("disk", "s3")
    for state in ("scored", "published")
    for successor in ("publish", "publish otherwise", "run")
]


@pytest.mark.parametrize(("store", "state", "successor"), CASES, indirect=["store"])
def test_stopped_anywhere_a_resume_takes_nothing_from_who_follows(
    successor: str,
    state: str,
    made: Made,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = []
    for number in range(STEPS):
        problems = stopped_at(number, state, successor, made, monkeypatch)
        if problems is None:
            break
        found += problems
    assert found == [] and 20 < number < STEPS - 1, "each step was struck"
