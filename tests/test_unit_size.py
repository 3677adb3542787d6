"""How many pairs a unit has: by the model's work, within bounds of bytes, of the actors and of the plan."""

from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import bert_reranker
from conftest import candidate_rows, job, write

import batch_rerank.score.unit_size as unit_size
from batch_rerank.engine.checkpoint import ModelSpec, resolve_model
from batch_rerank.engine.checkpoint_files import matrix_parameters
from batch_rerank.score.plan import make_plan
from batch_rerank.score.unit_size import unit_pairs

BILLION = 10**9


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> ModelSpec:
    """Any causal model: its size is what a test says."""
    monkeypatch.setattr(unit_size, "matrix_parameters", lambda directory: int(float(directory.name) * BILLION))
    spec = resolve_model("none", kind="checksum")
    return replace(spec, kind="causal", max_length=8192)


@pytest.mark.parametrize(
    ("billions", "gpus", "pair_bytes", "pairs"),
    [
        (8, 1, 4000, 242),  # passages of 1,000 tokens
        (8, 1, 400, 1893),
        (0.6, 1, 400, 20_000),  # 25,000, above the most
        (0.6, 0, 400, 100),  # two cores: 12, below the fewest
        (0.02, 0, 400, 378),
        (0, 1, 400, 10_485),  # weights that are not here count as 0.6 billion; 4 MiB of text are fewer
    ],
)
def test_a_unit_is_some_20_seconds_of_work(
    billions: float, gpus: int, pair_bytes: int, pairs: int, model: ModelSpec, tmp_path: Path
) -> None:
    cluster = {"cluster__gpus_per_actor": gpus, "cluster__cpus_per_actor": 2}
    config = job("in", tmp_path / "out", input__unit_pairs="auto", **cluster)
    found = unit_pairs(config, replace(model, directory=f"/x/{billions}"), 10**7, pair_bytes)
    assert found == min(pairs, 4 * 2**20 // pair_bytes)


def test_the_bounds_hold_for_any_job(model: ModelSpec, tmp_path: Path) -> None:
    def pairs_of(total: int, pair_bytes: float, actors: int = 2, **keys: object) -> int:
        cluster = {"cluster__actors": actors, "cluster__gpus_per_actor": 1, "cluster__cpus_per_actor": 1}
        config = job("in", tmp_path / "out", **{"input__unit_pairs": "auto", **cluster, **keys})
        return unit_pairs(config, replace(model, directory="/x/0.1"), total, pair_bytes)

    assert pairs_of(10**8, 10_000_000) == 1, "documents of 10 MB: by bytes, whatever else"
    assert pairs_of(16_000, 100) == 1000, "8 units for each of two actors"
    assert pairs_of(160, 100) == 100
    assert pairs_of(0, 0) == 100
    assert pairs_of(10**10, 20) == 50_000, "200,000 units"
    assert pairs_of(10**8, 100, input__unit_pairs=77) == 77
    assert pairs_of(10**8, 10_000_000, input__unit_pairs=77) == 1


def test_embeddings_are_no_work(tmp_path: Path) -> None:
    small, wide = (bert_reranker(tmp_path / name) for name in ("a", "b"))
    from safetensors.torch import load_file, save_file

    weights = load_file(wide / "model.safetensors")
    name = "bert.embeddings.word_embeddings.weight"
    weights[name] = weights[name].repeat(3, 1)
    save_file(weights, wide / "model.safetensors")
    assert matrix_parameters(small) == matrix_parameters(wide) > 0
    assert matrix_parameters(tmp_path / "absent") == 0


def test_a_plan_is_cut_by_it(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.parquet", candidate_rows(60, 50))
    plan, _ = make_plan(job(tmp_path / "in", tmp_path / "out", input__unit_pairs="auto"))
    assert max(unit.pairs for unit in plan.units) == 200 and len(plan.units) == 15  # 3,000 pairs for two actors
