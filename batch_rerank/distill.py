"""The loop closed, with real weights: a teacher's scores, labels, a student trained on them, and both measured.

MiniLM scores the demo's collection; labels of it are exported, a fifth of the queries held out; a student with two of
MiniLM's six layers learns from the others with sentence-transformers; then the student, as it was before and after,
scores the held-out queries as a job of this project, as the teacher has, and all are measured on them.
"""

import json
import logging
import shutil
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from rich.console import Console
from rich.table import Table

from batch_rerank.calls import in_turn
from batch_rerank.config import load_config
from batch_rerank.demo import build_collection, packaged_model
from batch_rerank.errors import ConfigError
from batch_rerank.job.run import run
from batch_rerank.judge.evaluate import evaluate
from batch_rerank.labels.export import Exported, export
from batch_rerank.labels.texts import held_out
from batch_rerank.publish.output import Place

log = logging.getLogger("batch_rerank")

QUERIES = 2000
HELD_OUT = 0.2
LAYERS = (0, 5)
"""The first and the last: what is learnt begins at 0.36 in nDCG@10; with the first two at 0.23."""

NEGATIVES = 7
MAX_LENGTH = 96
"""Of teacher and students, in tokens: the teacher is as good as with 128."""

EPOCHS = 1
MEASURE = "nDCG@10"


@dataclass(frozen=True)
class Row:
    """A line of the table: nDCG@10 of the held-out queries, and pairs/s of the job without its start, None where no
    model scored."""

    name: str
    quality: float
    rate: float | None = None


def distill(directory: str = "demo-data", queries: int = QUERIES, epochs: float = EPOCHS) -> list[Row]:
    """Run all of it, or what is left of it, and print the table. Raises the errors of its steps."""
    started = time.monotonic()
    _need_trainer()
    root = Path(directory) / f"distill-{queries}"
    if not (root / "qrels.tsv").exists():
        build_collection(root, queries)
    hold_out(root)
    teacher = packaged_model()
    labels = label(root, _score(root, teacher, "teacher", "nested")[0])
    told = labels.counts
    log.info(
        "labels of %s queries: %s, spread %s, temperature %g",
        f"{told['labelled_queries']:,}",
        labels.path,
        labels.about["spread"]["p50"],
        labels.about["temperature"],
    )
    untrained, trained = root / "student-untrained", root / "student"
    how = json.dumps({"epochs": epochs, "layers": LAYERS, "labels": labels.counts})
    done = trained / "done"
    if not done.exists() or done.read_text() != how:
        for stale in (trained, *root.glob("held-out-*trained-output")):  # scores of a student that is no more
            shutil.rmtree(stale, ignore_errors=True)
        cut_layers(Path(teacher), untrained)
        train(untrained, trained, labels, epochs)
        done.write_text(how)
    rows: list[Row] = []
    scorers = {"student, untrained": str(untrained), "student, trained": str(trained), "teacher": teacher}
    for name, model in scorers.items():  # all of the same pairs: a rate depends on how often a document comes back
        output, rate = _score(root, model, f"held-out-{name.split()[-1]}", "held-out")
        found = evaluate(output, str(root / "heldout-qrels.tsv"), [MEASURE])
        if not rows:
            rows.append(Row("BM25", found.before[MEASURE]))
        rows.append(Row(name, found.after[MEASURE], rate))
    show(rows, root, time.monotonic() - started)
    return rows


def _need_trainer() -> None:
    try:
        for name in ("accelerate", "datasets", "sentence_transformers"):
            import_module(name)
    except ImportError as error:
        raise ConfigError(f"{error}; pip install 'batch-rerank[demo,distill]'") from None


def hold_out(root: Path) -> None:
    """The candidates and judgements of the queries that the export holds out, by the same hash."""
    rows = [row for path in sorted((root / "nested").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    apart = held_out([row["query"] for row in rows], HELD_OUT)
    rows = [row for row, out in zip(rows, apart.tolist(), strict=True) if out]
    names = {row["query_id"] for row in rows}
    (root / "held-out").mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), root / "held-out" / "0.parquet", compression="zstd")
    first, *judged = (root / "qrels.tsv").read_text(encoding="utf-8").splitlines()
    mine = [first, *(line for line in judged if line.split("\t")[0] in names)]
    (root / "heldout-qrels.tsv").write_text("\n".join(mine) + "\n", encoding="utf-8")


def _score(root: Path, model: str, name: str, candidates: str) -> tuple[str, float]:
    """A job over a folder of candidates, in this process: its output, and pairs/s of scoring."""
    raw: dict[str, Any] = {
        "input": {"layout": "nested", "path": f"{root}/{candidates}/*.parquet", "unit_pairs": 500},
        "output": {"path": f"{root}/{name}-output"},
        "model": {"name": model, "max_length": MAX_LENGTH},
        "cluster": {"gpus_per_actor": 0},
    }
    path, rate = root / f"{name}.yaml", root / f"{name}.json"
    path.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    config = load_config(path)
    totals = run(config, local=True).totals
    if totals.seconds:  # of all runs; else it was done
        rate.write_text(json.dumps(totals.rows_in / totals.seconds))
    return config.output.path, float(json.loads(rate.read_text()))


def label(root: Path, output: str) -> Exported:
    """Lists of one positive and NEGATIVES others with the teacher's scores, as sentence-transformers reads them."""
    from batch_rerank.label_settings import Labels

    given = {
        "to": "sentence-transformers",
        "path": str(root / "labels"),
        "layout": "n-tuple",
        "positives": {"from": "both", "qrels": str(root / "qrels.tsv")},
        "negatives": {"ranks": (2, 50), "per_query": NEGATIVES},
        "held_out": HELD_OUT,
    }
    return export(Place(output), Labels.model_validate(given), in_turn)


def cut_layers(teacher: Path, student: Path) -> None:
    """A checkpoint with the teacher's embeddings, LAYERS of its layers and its pooling."""
    from safetensors.torch import load_file, save_file

    shutil.rmtree(student, ignore_errors=True)
    shutil.copytree(teacher, student)
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps({**config, "num_hidden_layers": len(LAYERS)}, indent=1))
    weights = load_file(student / "model.safetensors")
    kept = {}
    for name, value in weights.items():
        layer = _layer(name)
        if layer in LAYERS:
            kept[name.replace(f".layer.{layer}.", f".layer.{LAYERS.index(layer)}.")] = value
        elif layer < 0:
            kept[name] = value
    save_file(kept, student / "model.safetensors", metadata={"format": "pt"})


def _layer(name: str) -> int:
    """The layer that a weight is of; -1 of others."""
    return int(name.split("encoder.layer.")[1].split(".")[0]) if "encoder.layer." in name else -1


def train(student: Path, path: Path, labels: Exported, epochs: float) -> None:
    """Train a student on exported labels: the divergence (Kullback and Leibler) of its softmax over each list from the
    teacher's, at the temperature that the export advises."""
    from datasets import load_dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss

    started = time.monotonic()
    model = SentenceTransformer(str(student), device="cpu")
    model.max_seq_length = MAX_LENGTH
    data = load_dataset("parquet", data_files=f"{labels.path}/train/*.parquet", split="train")
    given = SentenceTransformerTrainingArguments(
        output_dir=str(path.parent / "training"),
        num_train_epochs=epochs,
        per_device_train_batch_size=16,
        learning_rate=2e-4,
        warmup_steps=10,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=50,
        seed=0,
    )
    loss = DistillKLDivLoss(model, temperature=labels.about["temperature"])
    SentenceTransformerTrainer(model=model, args=given, train_dataset=data, loss=loss).train()
    model.save(str(path))
    log.info("trained on %s lists in %.0f s", f"{len(data):,}", time.monotonic() - started)


def show(rows: list[Row], root: Path, seconds: float) -> None:
    """Print the table."""
    judged = len((root / "heldout-qrels.tsv").read_text(encoding="utf-8").splitlines()) - 1
    table = Table("held-out queries", MEASURE, "pairs/s", title=f"{judged} queries, top 50")
    for row in rows:
        table.add_row(row.name, f"{row.quality:.3f}", "" if row.rate is None else f"{row.rate:,.0f}")
    Console().print(table)
    print(f"{seconds:.0f} s in all; the student: {root}/student, its labels: {root}/labels/train/*.parquet")


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    distill()
