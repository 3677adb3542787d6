"""GPUs or CPUs, how many actors fit, what each reserves: decided from what a cluster has, and told by the plan."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from checkpoints import qwen3_reranker
from conftest import candidate_rows, job, write
from hypothesis import example, given
from hypothesis import strategies as st

from batch_rerank.config import JobConfig, parse_config
from batch_rerank.errors import ConfigError, ConflictError
from batch_rerank.job.ahead import plan_job
from batch_rerank.job.devices import Machines, Node, gpus_of_types, reservations, room, settle, threads
from batch_rerank.job.run import run
from batch_rerank.score.plan import make_plan
from batch_rerank.store.filesystem import locate
from batch_rerank.store.manifest import Manifest

GPU_BOX = Machines("the cluster", (Node(8), Node(16, 4), Node(16, 4)))
CPU_BOX = Machines("the cluster", (Node(8), Node(8)))
NOT_YET = Machines("the cluster", (Node(8),), grows=True, most_gpus=8)
NEVER = Machines("the cluster", (Node(8),), grows=True, most_gpus=0)
UNKNOWN = Machines("the cluster", (Node(8),), grows=True)


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another test's Ray in this process is not what these look at."""
    monkeypatch.setattr("ray.is_initialized", lambda: False)


def config(**cluster: Any) -> JobConfig:
    raw = {"input": {"layout": "flat", "path": "in"}, "output": {"path": "out"}, "model": {"name": "none"}}
    return parse_config({**raw, "cluster": cluster}, "test")


@pytest.mark.parametrize(
    ("found", "cluster", "expected"),
    [
        (GPU_BOX, {}, ("cuda", 1, 1)),
        (GPU_BOX, {"gpus_per_actor": 0}, ("cpu", 0, 15)),
        (GPU_BOX, {"cpus_per_actor": 3}, ("cuda", 1, 3)),
        (NOT_YET, {}, ("cuda", 1, 1)),
        (NEVER, {}, ("cpu", 0, 7)),
        (UNKNOWN, {"gpus_per_actor": 1}, ("cuda", 1, 1)),
        (CPU_BOX, {}, ("cpu", 0, 7)),
        (CPU_BOX, {"actors": 2}, ("cpu", 0, 7)),
        (CPU_BOX, {"actors": 3}, ("cpu", 0, 3)),
        (CPU_BOX, {"actors": {"min": 1, "max": 4}}, ("cpu", 0, 3)),
        (CPU_BOX, {"actors": 100}, ("cpu", 0, 1)),
        (CPU_BOX, {"cpus_per_actor": 5}, ("cpu", 0, 5)),
        (CPU_BOX, {"gpus_per_actor": 0.5}, ("cuda", 0.5, 1)),
    ],
)
def test_auto_is_gpus_where_there_are_some_and_cores_where_there_are_none(
    found: Machines, cluster: dict[str, Any], expected: tuple[str, float, int], logged: list[str]
) -> None:
    settled = settle(config(**cluster), found).cluster
    assert (settled.device, settled.gpus, settled.threads) == expected
    assert len(logged) == 1
    assert str(found) in logged[0]
    assert settle(
        config(**cluster, **settled.model_dump(include={"gpus_per_actor", "cpus_per_actor"} - set(cluster))), found
    )
    assert len(logged) == 1, "nothing was left to choose"


def test_whether_unreadable_nodes_bring_gpus_is_not_guessed() -> None:
    with pytest.raises(ConfigError, match=r"auto, but the cluster \(8 CPUs, 0 GPUs\) grows .* expected a number: 1"):
        settle(config(), UNKNOWN)


@pytest.mark.parametrize(
    ("found", "gpus", "actors", "expected"),
    [
        (GPU_BOX, 1, 8, 8),
        (GPU_BOX, 1, 9, 8),
        (GPU_BOX, 3, 8, 2),
        (GPU_BOX, 0.5, 100, 16),
        (GPU_BOX, 0.3, 100, 24),
        (GPU_BOX, 0.6, 100, 8),
        (NOT_YET, 1, 4, 4),
        (UNKNOWN, 4, 4, 4),
        (CPU_BOX, 0, 50, 50),
    ],
)
def test_fewer_actors_than_asked_for_work_and_it_is_said(
    found: Machines, gpus: float, actors: int, expected: int, logged: list[str]
) -> None:
    asked = settle(config(gpus_per_actor=gpus, cpus_per_actor=1, actors=actors), found).cluster
    assert room(asked, found) == expected
    assert any(f"cluster.actors asks for {actors}: " in line for line in logged) == (expected < actors)
    assert any("waiting for the autoscaler" in line for line in logged) == (found.grows and gpus > 0)


@pytest.mark.parametrize(("found", "gpus"), [(CPU_BOX, 1), (CPU_BOX, 0.25), (GPU_BOX, 5), (NEVER, 1), (NOT_YET, 9)])
def test_gpus_that_never_come_are_an_error(found: Machines, gpus: float) -> None:
    asked = settle(config(gpus_per_actor=gpus), found).cluster
    with pytest.raises(
        ConfigError, match=rf"gpus_per_actor: found {gpus:g}, but the cluster \(.*set it to 0"
    ) as raised:
        room(asked, found)
    assert raised.value.exit_code == 2
    assert ("grows to" in str(raised.value)) == found.grows


NODES = st.lists(st.builds(Node, st.integers(1, 64), st.integers(0, 8)), min_size=1, max_size=6)


@given(NODES, st.integers(1, 40))
def test_all_actors_fit_with_the_threads_they_get_or_have_one(nodes: list[Node], actors: int) -> None:
    cpus = [node.cpus for node in nodes]
    each = threads(cpus, actors)
    assert 1 <= each <= max(cpus)
    if each > 1:
        assert sum(int(count // each) for count in cpus) >= actors


@example([Node(30)] * 4, 33, 4, 0)  # 1.2 CPUs are left, on four nodes
@given(NODES, st.integers(1, 40), st.integers(1, 64), st.sampled_from([0, 0.5, 1, 2]))
def test_reservations_leave_a_cpu_and_fit_onto_the_nodes(
    nodes: list[Node], actors: int, wanted: int, gpus: float
) -> None:
    found = Machines("the cluster", tuple(nodes))
    actors = min(actors, found.places(gpus))
    if actors == 0:
        return
    actor, read, write = reservations(wanted, gpus, actors, found)
    assert 0 <= actor <= wanted
    # filled one after the other, each onto the first node with room: all are there, and one node reads or writes
    free = [[node.cpus, Machines("", (node,)).places(gpus)] for node in nodes]
    for _ in range(actors):
        node = next(left for left in free if left[0] >= actor - 1e-9 and left[1] > 0)
        node[0], node[1] = node[0] - actor, node[1] - 1
    assert max(left[0] for left in free) >= min(read, max(node.cpus for node in nodes) - 0.25) - 1e-6
    assert max(read, write) <= 1 and math.isclose(read + write, 2 if read == 1 else 1)


def test_node_types_are_read_where_ray_up_leaves_them(tmp_path: Path) -> None:
    file = tmp_path / "ray_bootstrap_config.yaml"
    assert gpus_of_types(file, {"head"}) is None
    types = {
        "head": {"resources": {"CPU": 8}},
        "gpu": {"resources": {"CPU": 8, "GPU": 4}, "max_workers": 3},
        "cpu": {"resources": {"CPU": 8}, "max_workers": 3},
    }
    file.write_text(json.dumps({"available_node_types": types}))
    assert gpus_of_types(file, {"head", "gpu"}) == 12
    assert gpus_of_types(file, {"another cluster's"}) is None
    file.write_text("[]")
    assert gpus_of_types(file, {"head"}) is None


@pytest.mark.parametrize("gpus", [1.5, 0.00001, -1, "all", float("nan")])
def test_gpus_that_ray_cannot_count_are_refused(gpus: object) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.gpus_per_actor: found"):
        config(gpus_per_actor=gpus)


# ---- the plan


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen3_reranker(tmp_path_factory.mktemp("model"))


@pytest.fixture
def defaults(model: Path, tmp_path: Path) -> JobConfig:
    """A job that leaves the cluster section out, on a machine without a GPU."""
    shard = write(tmp_path / "in.parquet", candidate_rows(2, 3))
    made = job(shard, tmp_path / "out", model__name=str(model), model__kind="auto", model__max_length=128)
    return made.model_copy(update={"cluster": config().cluster})


def test_a_plan_is_that_of_the_run_from_here_and_says_what_it_supposes(
    defaults: JobConfig, tmp_path: Path, logged: list[str]
) -> None:
    planned = plan_job(defaults).plan
    assert planned.model["dtype"] == "float32"
    assert any("this machine (" in line and "no GPU" in line for line in logged)
    assert any("the job is another one, in bfloat16; model.dtype fixes it" in line for line in logged)
    assert not (tmp_path / "out").exists()
    assert run(defaults, local=True).fingerprint == planned.fingerprint


def test_a_fixed_dtype_is_one_job_everywhere(defaults: JobConfig, logged: list[str]) -> None:
    fixed = defaults.model_copy(update={"model": defaults.model.model_copy(update={"dtype": "float32"})})
    here = plan_job(fixed).plan
    there, _ = make_plan(settle(fixed, GPU_BOX))
    assert here.fingerprint == there.fingerprint
    assert not any("model.dtype fixes it" in line for line in logged)


def test_a_job_begun_on_gpus_is_not_finished_in_another_dtype(defaults: JobConfig, tmp_path: Path) -> None:
    begun, _ = make_plan(settle(defaults, GPU_BOX))
    Manifest(locate(str(tmp_path / "out"))).write_plan(begun)
    with pytest.raises(ConflictError, match=r'model\.dtype: there "bfloat16", here "float32"'):
        run(defaults, local=True)
