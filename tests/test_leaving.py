"""An actor whose node is leaving ends its units or drops them, begins none, and no unit is blamed for it."""

import signal
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
from conftest import job

from batch_rerank.config import JobConfig
from batch_rerank.errors import ConfigError
from batch_rerank.job.devices import Machines, Node, room, settle
from batch_rerank.job.watch import Watch
from batch_rerank.score.attempts import MOST_DEATHS, MOST_NODES, Attempts
from batch_rerank.score.leaving import Leaving, Notice
from batch_rerank.store.filesystem import locate

SECONDS = 30.0
"""How long anything here may take on a machine that is busy; nothing waits for it to pass."""


class Actor:
    """What `Leaving` is told, and what it does."""

    def __init__(self, notice: Notice | None = None) -> None:
        self.notice, self.noted, self.ended = notice, list[str](), threading.Event()
        self.leaving = Leaving(lambda: self.notice, self.note, self.ended.set, poll=0.01)

    def note(self, why: str) -> "Future[None]":
        self.noted.append(why)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def begin(self) -> tuple[threading.Event, threading.Event]:
        """A unit in a thread of its own: it has begun, and it is to end."""
        begun, end = threading.Event(), threading.Event()

        def unit() -> None:
            with self.leaving.unit():
                begun.set()
                end.wait(SECONDS)

        threading.Thread(target=unit, daemon=True).start()
        return begun, end


@pytest.fixture(autouse=True)
def own_signals() -> "object":
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_a_unit_at_work_is_ended_and_no_other_begun() -> None:
    actor = Actor()
    actor.leaving.loaded()
    begun, end = actor.begin()
    assert begun.wait(SECONDS)
    actor.notice = Notice("Ray drains the node", time.time() + 1000)
    while not actor.noted:
        time.sleep(0.01)
    another, _ = actor.begin()
    assert not another.wait(0.1) and not actor.ended.is_set()
    end.set()
    assert actor.ended.wait(SECONDS)
    assert not another.is_set()
    assert actor.noted == ["Ray drains the node"], "before the process can be lost, and once"


def test_sigterm_is_a_notice_without_a_deadline() -> None:
    actor = Actor()
    actor.leaving.loaded()
    begun, end = actor.begin()
    assert begun.wait(SECONDS)
    signal.raise_signal(signal.SIGTERM)
    while not actor.noted:
        time.sleep(0.01)
    assert actor.noted == ["SIGTERM"] and not actor.ended.is_set()
    end.set()
    assert actor.ended.wait(SECONDS)


def test_a_unit_is_dropped_where_it_would_end_too_late_to_be_committed() -> None:
    actor = Actor()
    actor.leaving.loaded()
    begun, _ = actor.begin()
    assert begun.wait(SECONDS)
    actor.notice = Notice("Ray drains the node", time.time() + 5.3)
    assert actor.ended.wait(SECONDS)
    assert actor.noted == ["Ray drains the node"]


def test_a_load_is_not_ended_and_is_noted() -> None:
    actor = Actor(Notice("Ray drains the node", time.time() + 1000))
    assert actor.ended.wait(SECONDS)
    assert actor.noted == ["Ray drains the node"]


def test_an_idle_actor_ends_without_a_note() -> None:
    """Ray ends the actors of every job with SIGTERM: that is no request to a store."""
    actor = Actor()
    actor.leaving.loaded()
    signal.raise_signal(signal.SIGTERM)
    assert actor.ended.wait(SECONDS)
    assert actor.noted == []


# ---- the diary


def test_a_unit_is_not_blamed_for_nodes_that_leave(tmp_path: Path) -> None:
    location = locate(str(tmp_path / "actor.json"))
    life = Attempts(location, restarted=False, node="n0")
    for move in range(3 * MOST_NODES):
        assert (life.begin("unit"), life.tries("unit"), life.moves("unit")) == (None, 1, move)
        assert not life.careful, "two at once, as before"
        life.leaving("Ray drains the node").result()
        life = Attempts(location, restarted=True, node=f"n{move + 1}")
    assert life.load() is None
    life.leaving("Ray drains the node").result()
    assert Attempts(location, restarted=True)._lost_loads == 0


def test_a_node_that_goes_without_notice_is_no_death_but_not_for_ever(tmp_path: Path) -> None:
    location = locate(str(tmp_path / "actor.json"))
    life = Attempts(location, restarted=False, node="n0")
    for number in range(MOST_NODES):
        assert life.begin("unit") is None
        life._writer.shutdown()
        life = Attempts(location, restarted=True, node=f"n{number + 1}", gone=lambda node: True)
    assert life.begin("unit") == f"{MOST_NODES} nodes went without notice, or ended its actor, while scoring it"
    assert (life.begin("another"), life.careful) == (None, True)


@pytest.mark.parametrize("gone", [False, True])
def test_sigterm_on_a_node_that_stays_is_forgiven_as_often_as_a_node_without_notice(tmp_path: Path, gone: bool) -> None:
    location = locate(str(tmp_path / "actor.json"))
    life = Attempts(location, restarted=False, node="n0")
    for _ in range(MOST_NODES):
        assert life.begin("unit") is None
        life.leaving("SIGTERM").result()
        life = Attempts(location, restarted=True, node="n0", gone=lambda node: gone)
    assert (life.begin("unit") is None) == gone
    assert (life.moves("unit"), life.tries("unit")) == (MOST_NODES, 1)


def test_deaths_on_a_node_that_stays_count_as_before(tmp_path: Path) -> None:
    location = locate(str(tmp_path / "actor.json"))
    life = Attempts(location, restarted=False, node="n0", gone=lambda node: False)
    for _ in range(MOST_DEATHS):
        assert life.begin("unit") is None
        life._writer.shutdown()
        life = Attempts(location, restarted=True, node="n0", gone=lambda node: False)
    assert (
        life.begin("unit") == f"its actor died {MOST_DEATHS} times while scoring it (killed, or a crash in native code)"
    )
    assert life.moves("unit") == 0


# ---- which GPUs serve


def config(**cluster: object) -> JobConfig:
    return job("in", "out", **{f"cluster__{key}": value for key, value in cluster.items()})


MIXED = Machines("the cluster", (Node(8), Node(8, 4, "A100"), Node(8, 2, "L4"), Node(8, 1)))


@pytest.mark.parametrize(("kind", "places"), [(None, 7), ("A100", 4), ("L4", 2)])
def test_any_gpu_serves_unless_a_type_is_asked_for(kind: str | None, places: int) -> None:
    asked = settle(config(gpus_per_actor="auto", accelerator_type=kind, actors=7), MIXED).cluster
    assert (asked.gpus, room(asked, MIXED)) == (1, places)


def test_a_type_that_no_node_has_is_an_error_that_names_those_there_are() -> None:
    asked = settle(config(gpus_per_actor="auto", accelerator_type="H100"), MIXED).cluster
    with pytest.raises(
        ConfigError,
        match=r"accelerator_type: found 'H100', but the GPUs of .* are A100, L4, of a type that Ray does not",
    ):
        room(asked, MIXED)
    with pytest.raises(ConfigError, match=r"gpus_per_actor: found 1, but the cluster \(8 CPUs, 0 GPUs\) has no node"):
        room(asked, Machines("the cluster", (Node(8),)))


def test_a_type_that_may_still_come_is_waited_for(logged: list[str]) -> None:
    asked = settle(config(gpus_per_actor=1, accelerator_type="H100", actors=3), MIXED).cluster
    grows = Machines("the cluster", MIXED.nodes, grows=True)
    assert room(asked, grows) == 3
    assert any("no room for an actor of 1 H100 GPUs yet: waiting for the autoscaler" in line for line in logged)


@pytest.mark.parametrize("kind", ["", "A 100", "a/b", "x" * 101, 5])
def test_a_type_that_is_no_name_is_refused(kind: object) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.accelerator_type"):
        config(gpus_per_actor=1, accelerator_type=kind)


def test_a_type_of_gpus_without_gpus_is_refused() -> None:
    with pytest.raises(ConfigError, match="accelerator_type: found 'L4', but gpus_per_actor is 0"):
        config(accelerator_type="L4")


# ---- a job that is stuck


def test_a_job_in_which_nothing_happens_is_ended_with_what_it_waits_for() -> None:
    watch = Watch(lambda: "Score: 0 actors alive, 1 waited for", seconds=100, poll=0.01, limit=0.1)
    with pytest.raises(KeyboardInterrupt), watch:
        threading.Event().wait(SECONDS)
    assert watch.lost is None
    assert watch.stuck == (
        "nothing has happened for 0.1 s (cluster.max_seconds_without_progress): Score: 0 actors alive, 1 waited for; "
        "finished units are kept; run it again to resume"
    )


def test_what_grows_is_progress_and_what_comes_back_is_none() -> None:
    counts, asked = iter([1, 2, 3, 4, 5]), list[float]()

    def done() -> tuple[int, int]:
        asked.append(time.monotonic())
        return 7, next(counts, 5 - len(asked) % 2)  # an actor that dies and comes again

    with pytest.raises(KeyboardInterrupt), Watch(lambda: "", seconds=100, poll=0.05, limit=0.2, done=done):
        threading.Event().wait(SECONDS)
    assert len(asked) > 5 and asked[-1] - asked[4] >= 0.15


def test_what_a_job_does_between_units_is_no_standstill() -> None:
    asked = threading.Semaphore(0)
    with Watch(lambda: "", lambda: asked.release(), seconds=100, poll=0.01, limit=0.05) as watch:
        watch.away = True
        assert all(asked.acquire(timeout=SECONDS) for _ in range(20))
    assert watch.stuck is None


def test_without_a_limit_it_is_waited_for_ever() -> None:
    asked = threading.Semaphore(0)

    def done() -> tuple[int]:
        asked.release()
        return (0,)

    with Watch(lambda: "", seconds=100, poll=0.001, done=done) as watch:
        assert all(asked.acquire(timeout=SECONDS) for _ in range(20))
    assert watch.stuck is None
