"""The candidates that a report names, scored again on this machine: is what it shows what the model says?"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from batch_rerank.engine.encoding import make_encoder
from batch_rerank.engine.packing import best_chunks
from batch_rerank.errors import ModelError
from batch_rerank.input.hashes import asked_hashes, refuse_other_texts
from batch_rerank.job.devices import settle, this_machine
from batch_rerank.judge.rankings import work_of
from batch_rerank.publish.output import Place, config_of, open_output
from batch_rerank.publish.parts import PartWork
from batch_rerank.publish.score_files import ScoreFiles
from batch_rerank.report.movers import Chosen, choose, rows_of_unit, shapes_of
from batch_rerank.score.plan import configured_model
from batch_rerank.score.read_unit import prepare
from batch_rerank.score.steps import LoadedScorer
from batch_rerank.store.manifest import Manifest
from batch_rerank.store.plans import Unit
from batch_rerank.store.scan import Scan, scan


@dataclass(frozen=True)
class Again:
    """A candidate with the score that is kept and the one that is computed now; None where the model gives none."""

    query_id: str
    doc_id: str
    before: int
    after: int
    kept: float
    computed: float | None


def score_movers(place: Place) -> list[Again]:
    """Score the candidates that have moved most again, in the report's order.

    Raises InputError where their texts are not there any more, ModelError where the model is not that of the output,
    ConfigError and StorageError.
    """
    manifest, plan = open_output(place)
    config = config_of(plan, place)
    free = config.cluster.model_copy(update={"gpus_per_actor": "auto", "cpus_per_actor": "auto"})
    config = settle(config.model_copy(update={"cluster": free}), this_machine(), actors=1)
    state = scan(manifest, plan)
    chosen = choose(plan, shapes_of(state.committed))
    if not chosen:
        return []
    model = configured_model(config)
    if model.identity != plan.model.get("identity"):
        raise ModelError(
            f"model {config.model.name!r}: found {model.identity!r}, the output was scored by "
            f"{plan.model.get('identity')!r}; expected the same checkpoint"
        )
    encoder, scorer, work = make_encoder(model), LoadedScorer(config, model), work_of(plan, state)
    found: dict[Chosen, Again] = {}
    for unit in dict.fromkeys(one.unit for one in chosen):
        rows = rows_of_unit(plan, config, unit)
        own = sorted({one.mover.row: one for one in chosen if one.unit == unit}.items())
        places = [row for row, _ in own]
        scored = _scored(manifest, state, work, unit)
        if scored is not None:
            asked, texts = asked_hashes(rows, model.takes_instruction)[places], rows["text"].take(places)
            advice = "have the input back as it was, or run the job on what there is now"
            given = (scored.take(places), asked, texts.cast(pa.large_string()))
            refuse_other_texts(*given, f"unit {unit.id}", advice)
        taken: pa.Table = rows.take(places)
        read = prepare(unit, taken, model.takes_instruction, include_text=False)
        encoded = encoder.encode(read.groups)
        scores = best_chunks(encoded, scorer.score(encoded)).scores
        for (_, one), ids, score in zip(
            own, taken.select(["query_id", "doc_id"]).to_pylist(), scores.tolist(), strict=True
        ):
            told = None if np.isnan(score) else score
            found[one] = Again(
                **ids, before=one.mover.before, after=one.mover.after, kept=one.mover.score, computed=told
            )
    return [found[one] for one in chosen if one in found]


def _scored(manifest: Manifest, found: Scan, work: PartWork, unit: Unit) -> pa.Table | None:
    """A unit's score-file rows with their hashes; None where they were not kept."""
    receipt = next(one for one in found.committed if one.unit == unit.id)
    if not found.available(manifest, receipt):
        return None
    ((_, rows),) = ScoreFiles(manifest, work.places, work.checksums).read([unit], hashed=True)
    return rows
