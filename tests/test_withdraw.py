"""A publication that is taken back: whoever is stopped or killed in it, no `_SUCCESS` names parts that are gone.

A publisher with other settings is stopped at each of its steps in turn, another job takes the output over and ends, and
the publisher wakes. Or it is killed there, and another job goes on.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Killed, candidate_rows, job

from batch_rerank.config import JobConfig
from batch_rerank.errors import ConflictError
from batch_rerank.job.republish import republish
from batch_rerank.job.run import run
from batch_rerank.publish.clean import clean
from batch_rerank.publish.output import Place
from batch_rerank.publish.verify import verify
from batch_rerank.store.filesystem import Location, locate
from batch_rerank.store.lease import Lease
from batch_rerank.store.manifest import PUBLICATION

Made = Callable[..., JobConfig]
STEPS = [(Location, "remove_seen"), (Location, "create_exclusive"), (Location, "take_back"), (Lease, "check")]


@pytest.fixture(params=["disk", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where input and outputs are. On S3 a file is known by its content, on a disk by its time."""
    monkeypatch.setattr(Lease, "_wait_for_silence", lambda *_: None)  # who holds the output is far away, and silent
    if request.param == "disk":
        return str(tmp_path)
    for name, value in request.getfixturevalue("endpoint").environment.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    bucket = f"bucket-{time.monotonic_ns()}"
    locate(f"s3://{bucket}").fs.mkdir(bucket)
    return f"s3://{bucket}"


@pytest.fixture
def made(store: str) -> Made:
    """A finished output of two parts; called again with the settings of its output, the job that it was made by."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(candidate_rows(4, 5)), sink)
    locate(f"{store}/in/0.parquet").write_bytes(sink.getvalue().to_pybytes())

    def job_to(output: str, **keys: Any) -> JobConfig:
        told = {"output__file_bytes": 1, **{f"output__{name}": value for name, value in keys.items()}}
        return job(f"{store}/in", f"{store}/{output}", input__unit_pairs=10, cluster__lease_seconds=1200, **told)

    return job_to


SUCCESSORS = ["run as before", "publish as before", "publish as it", "publish otherwise"]


def act(successor: str, made: Made, output: str) -> bool:
    """Another job on the output, to its end; whether it was let: `run` does not publish otherwise."""
    keys = {"publish as it": {"top_k": 2}, "publish otherwise": {"file_bytes": 10**6}}.get(successor, {})
    config = made(output, **keys)
    if successor == "run as before":
        try:
            run(config, local=True)
        except ConflictError as error:
            assert "published otherwise" in str(error)
            return False
    else:
        republish(Place(config.output.path, {}, config), local=True)
    return True


CASES = [
    pytest.param(store, successor, marks=[] if (store, successor) in quick else [pytest.mark.chaos])
    for quick in [{("disk", "run as before"), ("disk", "publish as it")}]
    for store in ("disk", "s3")
    for successor in SUCCESSORS
]


@contextmanager
def at_step(number: int, strike: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Something happens just before a step with this number; what is given names it when it has."""
    struck: list[str] = []
    count = 0

    def told(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def step(self: Any, *given: Any) -> Any:
            nonlocal count
            count += 1
            if count == number + 1 and not struck:
                struck.append(f"{number}: {name} {getattr(self, 'name', '')}")
                strike()
            return original(self, *given)

        return step

    with monkeypatch.context() as patch:
        for owner, name in STEPS:
            patch.setattr(owner, name, told(name, getattr(owner, name)))
        yield struck


def stopped_at(number: int, successor: str, made: Made, monkeypatch: pytest.MonkeyPatch) -> list[str] | None:
    """What is wrong when a publisher was stopped at a step, another job has ended meanwhile, and it has woken; None
    where there are fewer steps."""
    config, output = made(f"out-{number}", top_k=2), f"out-{number}"
    run(made(output), local=True)
    let: list[bool] = []
    following = partial(act, successor, made, output)
    with at_step(number, lambda: let.append(following()), monkeypatch) as struck, suppress(ConflictError):
        republish(Place(config.output.path, {}, config), local=True)
    if not struck:
        return None
    if let == [False]:
        republish(Place(config.output.path, {}, config), local=True)
    return [f"{struck}: {problem}" for problem in verify(config.output.path).problems]


@pytest.mark.parametrize(("store", "successor"), CASES, indirect=["store"])
def test_stopped_anywhere_a_publisher_takes_nothing_from_who_follows(
    successor: str, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [stopped_at(number, successor, made, monkeypatch) for number in range(30)]
    assert [problem for problems in found for problem in problems or []] == []
    assert found[15] is not None and found[-1] is None, "each step was struck"


@pytest.mark.parametrize("store", ["s3"], indirect=True)
@pytest.mark.parametrize("number", [2, 4, 8])
def test_on_s3_the_next_publication_is_unlike_the_one_that_a_late_publisher_removes(
    number: int, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`run` with the settings of the first publication, while a publisher stands before its note, a part, the
    publication."""
    assert stopped_at(number, "run as before", made, monkeypatch) == []


@pytest.mark.parametrize(("store", "successor"), CASES, indirect=["store"])
def test_killed_anywhere_another_publisher_goes_on(successor: str, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill() -> None:
        raise Killed

    problems = []
    for number in range(30):
        config = made(f"out-{number}", top_k=2)
        run(made(f"out-{number}"), local=True)
        with at_step(number, kill, monkeypatch) as struck, suppress(Killed):
            republish(Place(config.output.path, {}, config), local=True)
        if not struck:
            break
        if not act(successor, made, f"out-{number}"):
            republish(Place(config.output.path, {}, config), local=True)
        problems += [f"{struck}: {problem}" for problem in verify(config.output.path).problems]
    assert problems == [] and number > 15


@pytest.mark.parametrize("store", ["disk", "s3"], indirect=True)
def test_a_publication_that_is_written_late_and_was_taken_back_is_replaced(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A publisher that was paused before it created the first publication wakes when that has been withdrawn."""
    config = made("out", top_k=2)
    run(made("out"), local=True)
    where = locate(config.output.path) / PUBLICATION
    first, create = where.read_bytes(), Location.create_exclusive
    late: list[bool] = []

    def paused(self: Location, data: bytes) -> bool:
        if self.path == where.path and not late:
            late.append(create(self, first))
        return create(self, data)

    monkeypatch.setattr(Location, "create_exclusive", paused)
    republish(Place(config.output.path, {}, config), local=True)
    assert late == [True] and where.read_bytes() != first and verify(config.output.path).problems == []


@pytest.mark.parametrize("store", ["disk"], indirect=True)
def test_what_is_being_withdrawn_is_not_taken_for_finished(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """`_SUCCESS` and all parts are there still, and the note."""
    config = made("out", top_k=2)
    run(made("out"), local=True)

    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Location, "remove_seen", kill)
        republish(Place(config.output.path, {}, config), local=True)
    assert (locate(config.output.path) / "_SUCCESS").exists()
    assert "being withdrawn" in verify(config.output.path).problems[0]
    assert "not finished" in clean(Place(config.output.path), "scores").kept
    assert run(config, local=True).units == 0, "and with other settings: nothing stands that they differ from"
    assert verify(config.output.path).problems == []
    notes = (locate(config.output.path) / "_manifest/withdrawn").find()
    assert notes == {}, "they go when another publication stands"
