"""The operator: ranked rows inside a Ray Data pipeline of one's own, by the code that a job's actors run.

    ranked = candidates.map_batches(
        Rerank, fn_constructor_kwargs={"model": "Qwen/Qwen3-Reranker-0.6B", "top_k": 10},
        batch_format="pyarrow", compute=ray.data.ActorPoolStrategy(size=8), num_gpus=1,
    )

It has no output, plan or resume of its own: what it returns goes on in the pipeline, and a pipeline that is killed
begins again.
"""

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batch_rerank.config import JobConfig, parse_config
from batch_rerank.engine.encoding import make_encoder
from batch_rerank.errors import ConfigError, InputError, UnfinishedError
from batch_rerank.input.canonical import canonical
from batch_rerank.input.layouts import Columns, find_columns
from batch_rerank.input.units import cut_units
from batch_rerank.input.untyped import with_types
from batch_rerank.job.run_local import one_ahead
from batch_rerank.publish.nested import nest
from batch_rerank.publish.rank import rank
from batch_rerank.score.plan import configured_model
from batch_rerank.score.poison import DeviceLostError, PoisonedUnitError
from batch_rerank.score.read_unit import prepare
from batch_rerank.score.score_file import scored_rows
from batch_rerank.score.steps import EncodedUnit, LoadedScorer, encode_unit, log, score_unit
from batch_rerank.score.unit_size import unit_pairs
from batch_rerank.store.plans import Unit

WHERE = "Rerank"
"""The place in messages: a batch does not know which file it came from."""


class Rerank:
    """A callable class for `Dataset.map_batches`, with `batch_format="pyarrow"`: one model copy an actor.

    model: a hub id or a checkpoint directory, or the keys of a job file's section `model`. scoring: keys of its section
    `scoring`; those that limit a job's failures have no meaning here. top_k, include_text, passthrough: as `output` of
    a job file. columns: as `input.columns`, our names to the rows'.

    A row in is a query: `query_id`, `query`, `candidates: list<struct<doc_id, text>>`, optional `instruction`, and in
    the struct optional `title`, `score` and `rank`, as in a job's layout `nested`. A row out is the same query, in the
    same order: `query_id string` and `candidates`, the list of its ranked candidates, each a struct of the other
    columns of a job's output. A query without candidates has an empty list. Rows are ranked each for itself, whatever
    their ids. A candidate that cannot be scored is the last of its list, with an `error` and no score.

    On a GPU where Ray gives the actor one (`num_gpus=1`), else on the CPU with the threads of `num_cpus`. Calls may
    come from several threads at once.

    Raises ConfigError, and ModelError where the model does not load or fails its self-test.
    """

    def __init__(
        self,
        model: str | PathLike[str] | Mapping[str, Any],
        *,
        top_k: int | None = None,
        scoring: Mapping[str, Any] | None = None,
        columns: Mapping[str, str] | None = None,
        passthrough: Sequence[str] = (),
        include_text: bool = False,
    ) -> None:
        output = {"top_k": top_k, "passthrough": list(passthrough), "include_text": include_text}
        self._config = _config(model, scoring or {}, columns or {}, output)
        self._scorer = LoadedScorer(self._config, configured_model(self._config))
        self.model = self._scorer.model
        self._encoder = make_encoder(self.model)
        self._encoding = threading.Lock()
        log.info("%s: %s, %s; %s", WHERE, self.model.name, self._scorer.tag, self._scorer.self_test or "no self-test")

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """Ranked rows, some queries at a time, while the next ones are encoded.

        Raises ConfigError where the batch is no Arrow table, InputError where it has other columns or types,
        ModelError where the model gives NaN or equal scores, and UnfinishedError where more than 16 pairs of some
        queries raise, or the device is lost.
        """
        if not isinstance(batch, pa.Table):
            raise ConfigError(
                f"{WHERE}: found a batch of type {type(batch).__name__}; expected a pyarrow.Table: give map_batches "
                'batch_format="pyarrow" (the steps before and after may have others)'
            )
        renamed, passthrough = self._config.input.columns, self._config.output.passthrough
        batch = with_types(batch, renamed, passthrough)
        columns = find_columns(batch.schema, "nested", renamed, passthrough, WHERE)
        for piece, unit in one_ahead(self._encoded(batch, columns)):
            yield self._ranked(piece, columns, unit)

    def _encoded(self, batch: pa.Table, columns: Columns) -> Iterator[tuple[pa.Table, EncodedUnit]]:
        """Pieces of a batch with what is to be scored of them; one at least, for the columns of a batch without rows.

        A piece is what a unit of a job would be. A batch may be all rows of a block, and the device should have the
        first of them soon.
        """
        lists = batch[columns.names["candidates"]]
        pairs = pc.fill_null(pc.list_value_length(lists), 0).to_numpy().astype(np.int64)
        most = unit_pairs(self._config, self.model, int(pairs.sum()), batch.nbytes / max(1, int(pairs.sum())))
        for start, stop in pairwise(cut_units(pairs, np.arange(len(pairs) + 1), (), most) if len(pairs) else [0, 0]):
            piece = batch.slice(start, stop - start)
            unit = Unit("of a batch", 0, start, stop, stop - start, int(pairs[start:stop].sum()))
            try:
                rows = canonical(piece, columns, WHERE)
                rows.validate(full=True)
                read = prepare(unit, rows, self.model.takes_instruction, self._config.output.include_text)
            except (pa.ArrowException, UnicodeDecodeError) as error:
                raise InputError(
                    f"{WHERE}: rows {start} to {stop} of a batch: {str(error).splitlines()[0][:300]}; expected valid "
                    "UTF-8, and numbers that fit float32 scores and int32 ranks"
                ) from error
            with self._encoding:  # a tokenizer's cache is one thread's; not held while the caller is at work
                encoded = encode_unit(read, self._encoder)
            yield piece, encoded

    def _ranked(self, piece: pa.Table, columns: Columns, unit: EncodedUnit) -> pa.Table:
        output = self._config.output
        try:
            with self._scorer.sheet.unit():
                scored = score_unit(unit, self._scorer, alone=False)
        except (PoisonedUnitError, DeviceLostError) as error:
            raise UnfinishedError(
                f"{WHERE}: {unit.unit.queries} queries could not be scored: {error}; expected a few raising pairs at "
                "most; DataContext.max_errored_blocks lets a pipeline go on without such blocks"
            ) from error
        extra = [*(["text"] if output.include_text else []), *output.passthrough]
        rows, query = rank(scored_rows(scored), self.model, output.top_k, extra)
        counts = np.bincount(query, minlength=len(piece))
        ids = pc.cast(piece[columns.names["query_id"]].combine_chunks(), pa.string())
        return nest(rows, np.cumsum(counts) - counts, ids)


def _config(
    model: str | PathLike[str] | Mapping[str, Any],
    scoring: Mapping[str, Any],
    columns: Mapping[str, str],
    output: Mapping[str, Any],
) -> JobConfig:
    """The job that an actor's part is of. It reads and writes nothing, so its places are never looked at."""
    limits = sorted({"max_failed_rows", "max_failed_units"} & set(scoring))
    if limits:
        raise ConfigError(
            f"{WHERE}: scoring.{limits[0]}: a pipeline has no such limit; remove it, and look at the column error of "
            "the candidates (DataContext.max_errored_blocks limits what is lost as a whole)"
        )
    raw = {
        "input": {"layout": "nested", "path": WHERE, "columns": dict(columns)},
        "output": {"path": WHERE, **output},
        "model": dict(model) if isinstance(model, Mapping) else {"name": fspath(model)},
        "scoring": dict(scoring),
        "cluster": {"gpus_per_actor": 0, "cpus_per_actor": 1},
    }
    config = parse_config(raw, WHERE)
    return config if config.model.kind == "checksum" else parse_config(raw | {"cluster": _device()}, WHERE)


def _device() -> dict[str, int]:
    """The GPU that Ray gives this actor, or its threads: Ray sets OMP_NUM_THREADS to the CPUs that it asks for."""
    import torch

    if torch.cuda.is_available():
        return {"gpus_per_actor": 1, "cpus_per_actor": torch.get_num_threads()}
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "" and Path("/dev/nvidiactl").exists():
        log.warning(
            "%s: scores on the CPU, as this actor has no GPU and its node has: give map_batches num_gpus=1", WHERE
        )
    return {"gpus_per_actor": 0, "cpus_per_actor": torch.get_num_threads()}
