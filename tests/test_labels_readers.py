"""Exports through the trainers' own readers, and a training step of each with a finite loss.

sentence-transformers is tested beside the rest. The others ask for other versions of transformers: `make labels-check`
makes an environment of their own and runs this file in it. Where a package is absent its tests are skipped.
"""

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import job, nested, write

from batch_rerank.calls import in_turn
from batch_rerank.job.run import run
from batch_rerank.label_settings import Labels
from batch_rerank.labels.export import export
from batch_rerank.publish.output import Place

pytestmark = pytest.mark.filterwarnings("default")  # other people's packages, in versions that are not ours to choose

WORDS = ("alpha", "beta", "gamma", "delta", "eins", "zwei", "drei", "north", "south", "river", "mountain", "bridge")
QUERIES, CANDIDATES, NEGATIVES = 12, 20, 4
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[Q]", "[D]"]


def text_of(number: int) -> str:
    draw = random.Random(number)
    return f"document {number} " + " ".join(draw.choice(WORDS) for _ in range(draw.randint(3, 12)))


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scored output: 12 queries, 20 candidates each; a document has one text wherever it is a candidate."""
    directory = tmp_path_factory.mktemp("labels")
    rows = [
        {"query_id": f"q{q}", "query": f"{WORDS[q]} {q}?", "doc_id": f"d{q * 7 + d}", "text": text_of(q * 7 + d)}
        for q in range(QUERIES)
        for d in range(CANDIDATES)
    ]
    write(directory / "in" / "0.parquet", nested(rows))
    run(job(directory / "in", directory / "out", input__layout="nested"), local=True)
    return directory / "out"


def exported(output: Path, to: str, tmp_path: Path, **more: Any) -> Path:
    given = {"negatives": {"ranks": (3, None), "per_query": NEGATIVES}, "held_out": 0.25, **more}
    done = export(Place(str(output)), Labels(to=to, path=str(tmp_path / "labels"), **given), in_turn)
    assert done.counts["labelled_queries"] == QUERIES
    return tmp_path / "labels"


def files(root: Path, folder: str, ending: str = "parquet") -> list[str]:
    found = sorted(str(path) for path in (root / folder).glob(f"*.{ending}"))
    assert found
    return found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny BERT with the words of these texts."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    directory = str(tmp_path_factory.mktemp("checkpoint"))
    words = [*SPECIAL, *WORDS, "document", "?", *map(str, range(200))]
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    named = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **named).save_pretrained(directory)
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(words), num_labels=1, max_position_embeddings=64, **size)
    BertForSequenceClassification(config).save_pretrained(directory)
    return directory


# ---- sentence-transformers


def parquet(root: Path, folder: str, tmp_path: Path) -> Any:
    from datasets import load_dataset

    return load_dataset("parquet", data_files=files(root, folder), split="train", cache_dir=str(tmp_path / "cache"))


def distilled(model: Any, data: Any, tmp_path: Path) -> float:
    """The loss of a step on lists with a teacher's scores."""
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments, losses

    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments(SentenceTransformerTrainingArguments, tmp_path),
        train_dataset=data,
        loss=losses.DistillKLDivLoss(model),
    )
    return trained(trainer)


def trained(trainer: Any) -> float:
    """The loss of one step."""
    return float(trainer.train().training_loss)


def arguments(kind: Any, tmp_path: Path) -> Any:
    return kind(
        output_dir=str(tmp_path / "trained"),
        max_steps=1,
        per_device_train_batch_size=4,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )


@pytest.mark.parametrize(("layout", "columns"), [("pairs", 3), ("listwise", 3), ("margin", 4)])
def test_a_cross_encoder_trains_on_every_layout(
    layout: str, columns: int, output: Path, checkpoint: str, tmp_path: Path
) -> None:
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    pytest.importorskip("datasets", reason="sentence-transformers' trainer needs datasets")
    from sentence_transformers.cross_encoder import (
        CrossEncoder,
        CrossEncoderTrainer,
        CrossEncoderTrainingArguments,
        losses,
    )

    root = exported(output, "sentence-transformers", tmp_path, layout=layout)
    data = parquet(root, "train", tmp_path)
    model = CrossEncoder(checkpoint, num_labels=1, device="cpu")
    losses_of = {
        "pairs": losses.BinaryCrossEntropyLoss,
        "listwise": losses.ListNetLoss,
        "margin": losses.MarginMSELoss,
    }
    assert len(data.column_names) == columns
    trainer = CrossEncoderTrainer(
        model=model,
        args=arguments(CrossEncoderTrainingArguments, tmp_path),
        train_dataset=data,
        loss=losses_of[layout](model),
    )
    assert 0 < trained(trainer) < math.inf


def bi_encoder(checkpoint: str) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(checkpoint, device="cpu")


def test_a_bi_encoder_trains_on_tuples(output: Path, checkpoint: str, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    pytest.importorskip("datasets", reason="sentence-transformers' trainer needs datasets")
    root = exported(output, "sentence-transformers", tmp_path, layout="n-tuple")
    data = parquet(root, "train", tmp_path)
    assert data.column_names == ["query", "positive", *(f"negative_{n + 1}" for n in range(NEGATIVES)), "label"]
    assert {len(one) for one in data["label"]} == {1 + NEGATIVES}
    assert math.isfinite(distilled(bi_encoder(checkpoint), data, tmp_path))


def test_three_tables_resolve_without_a_missing_id(output: Path, checkpoint: str, tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="sentence-transformers' trainer needs datasets")
    util = pytest.importorskip("sentence_transformers.util", reason="sentence-transformers is not installed")
    if not hasattr(util, "resolve_ids"):
        pytest.skip("this sentence-transformers is older than 6.2, whose resolve_ids reads three tables")
    root = exported(output, "sentence-transformers", tmp_path, layout="tables")
    data, queries, documents = (parquet(root, name, tmp_path) for name in ("train", "queries", "documents"))
    held_out = parquet(root, "heldout", tmp_path)
    for part in (data, held_out):
        part.set_transform(util.resolve_ids({"query_id": queries, "document_ids": documents}))
        read = part[:]  # an id that is missing raises here
        assert list(read) == ["query", *(f"document_{n + 1}" for n in range(1 + NEGATIVES)), "scores"]
        assert all(text for name, texts in read.items() if name != "scores" for text in texts)
    assert math.isfinite(distilled(bi_encoder(checkpoint), data, tmp_path))


# ---- FlagEmbedding


def test_flagembedding_reads_groups_and_distills(output: Path, checkpoint: str, tmp_path: Path) -> None:
    pytest.importorskip("FlagEmbedding", reason="FlagEmbedding is not installed; see make labels-check")
    from FlagEmbedding.abc.finetune.reranker import (
        AbsRerankerCollator,
        AbsRerankerDataArguments,
        AbsRerankerTrainDataset,
    )
    from FlagEmbedding.finetune.reranker.encoder_only.base.modeling import CrossEncoderModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    root = exported(output, "flagembedding", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    given = AbsRerankerDataArguments(
        train_data=files(root, "train", "jsonl"),
        train_group_size=1 + NEGATIVES,
        knowledge_distillation=True,
        cache_path=str(tmp_path / "cache"),
    )
    data = AbsRerankerTrainDataset(given, tokenizer)
    items = [data[number] for number in range(len(data))]
    assert all(len(scores) == 1 + NEGATIVES and scores[0] == max(scores) for _, scores in items)
    batch = AbsRerankerCollator(tokenizer, query_max_len=16, passage_max_len=40)(items)
    model = CrossEncoderModel(
        AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=1),
        tokenizer=tokenizer,
        train_batch_size=len(items),
    ).train()
    step(model.model, model(**batch).loss)


# ---- PyLate


def test_pylate_finds_every_document_and_distills(output: Path, checkpoint: str, tmp_path: Path) -> None:
    pytest.importorskip("pylate", reason="PyLate is not installed; see make labels-check")
    from pylate import losses, models, utils
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    root = exported(output, "pylate", tmp_path)
    data, queries, documents = (parquet(root, name, tmp_path) for name in ("train", "queries", "documents"))
    for scores in data["scores"]:
        assert len(scores) == 1 + NEGATIVES and min(scores) >= 0 and max(scores) <= 1
    data.set_transform(utils.KDProcessing(queries=queries, documents=documents, n_ways=1 + NEGATIVES).transform)
    assert all(text for documents in data[:]["documents"] for text in documents), "an unknown id is an empty text"
    model = models.ColBERT(checkpoint, embedding_size=8, document_length=32, query_length=8, device="cpu")
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments(SentenceTransformerTrainingArguments, tmp_path),
        train_dataset=data,
        loss=losses.Distillation(model=model),
        data_collator=utils.ColBERTCollator(tokenize_fn=model.tokenize),
    )
    assert math.isfinite(trained(trainer))


# ---- lightning-ir


def test_lightning_ir_reads_targets_of_one_column_and_trains(output: Path, checkpoint: str, tmp_path: Path) -> None:
    """Its dataset, batches and loss; the scores are of a plain BERT, because the tokenizers of lightning-ir 0.0.6 want
    transformers 4."""
    pytest.importorskip("lightning_ir", reason="lightning-ir is not installed; see make labels-check")
    from lightning_ir import LightningIRDataModule, RunDataset
    from lightning_ir.loss import KLDivergence
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    root = exported(output, "lightning-ir", tmp_path)
    size = 1 + NEGATIVES
    given = {"depth": size, "sample_size": size, "sampling_strategy": "random"}
    for target in ("score", "rank"):
        data = RunDataset(Path(files(root, "train")[0]), targets=target, **given)
        samples = [data[number] for number in range(len(data))]
        assert samples
        for sample in samples:
            assert sample.targets is not None and sample.targets.numel() == size, "one column has the target's name"
            assert all(sample.docs)
    data = RunDataset(Path(files(root, "train")[0]), targets="score", **given)
    source = LightningIRDataModule(train_dataset=data, train_batch_size=2)
    source.setup("fit")
    batch = next(iter(source.train_dataloader()))
    queries = [query for query in batch.queries for _ in range(size)]
    texts = [text for documents in batch.docs for text in documents]
    tokens = AutoTokenizer.from_pretrained(checkpoint)(queries, texts, return_tensors="pt", padding=True)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    scores = model(**tokens).logits.view(2, size)
    batch.targets = batch.targets.view(2, size)  # as its module does before it asks the loss
    step(model, KLDivergence().compute_loss(SimpleNamespace(scores=scores), batch))


def step(model: Any, loss: Any) -> None:
    """Take a training step on a loss that must be finite."""
    import torch

    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert math.isfinite(float(loss.detach()))
    assert all(bool(torch.isfinite(weight).all()) for weight in model.parameters())


# ---- ms-swift


def test_ms_swift_encodes_lists_of_positives_and_negatives(output: Path, tmp_path: Path) -> None:
    pytest.importorskip("swift", reason="ms-swift is not installed; see make labels-check")
    import torch
    from checkpoints import qwen3_reranker
    from swift import get_template
    from swift.dataset import load_dataset
    from swift.loss.reranker import ListwiseRerankerLoss
    from swift.model import get_processor
    from transformers import AutoModelForCausalLM

    root = exported(output, "ms-swift", tmp_path)
    data, _ = load_dataset(files(root, "train", "jsonl"))
    directory = str(qwen3_reranker(tmp_path / "model"))
    processor = get_processor(directory, model_type="qwen3_reranker")
    template = get_template(processor, template_type="qwen3_reranker", max_length=256)
    template.set_mode("train")
    template.task_type = "generative_reranker"
    encoded = [template.encode(data[number]) for number in range(len(data))]
    batch = template.data_collator(encoded[:2])
    labels = batch.pop("labels")
    assert labels.tolist() == [1, *[0] * NEGATIVES] * 2
    model = AutoModelForCausalLM.from_pretrained(directory)
    kept = {name: value for name, value in batch.items() if name in ("input_ids", "attention_mask", "position_ids")}
    last = batch["attention_mask"].sum(dim=1) - 1
    logits = model(**kept).logits[torch.arange(len(last)), last, :1]
    step(model, ListwiseRerankerLoss(None, None)(SimpleNamespace(logits=logits), labels))


# ---- Tevatron


def test_tevatron_tokenizes_passages_with_their_titles_and_trains(
    output: Path, checkpoint: str, tmp_path: Path
) -> None:
    """The preprocessing of Tevatron 0.1.0, the one that PyPI has; its collator wants transformers 4."""
    pytest.importorskip("tevatron", reason="Tevatron is not installed; see make labels-check")
    import torch
    from datasets import load_dataset
    from tevatron.datasets.preprocessor import TrainPreProcessor
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    root = exported(output, "tevatron", tmp_path)
    data = load_dataset(
        "json", data_files=files(root, "train", "jsonl"), split="train", cache_dir=str(tmp_path / "cache")
    )
    for line in data:
        scores = [one["score"] for one in (*line["positive_passages"], *line["negative_passages"])]
        assert all(map(math.isfinite, scores)), "a missing score is appended as an exception, not raised"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    read = data.map(TrainPreProcessor(tokenizer), remove_columns=data.column_names)
    assert all(one["query"] and len(one["positives"]) == 1 and len(one["negatives"]) == NEGATIVES for one in read)
    assert all(passage for one in read for passage in (*one["positives"], *one["negatives"]))
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    pairs = [one["query"] + passage for one in read for passage in (*one["positives"], *one["negatives"])]
    batch = tokenizer.pad({"input_ids": pairs}, return_tensors="pt")
    logits = model(**batch).logits.view(len(read), -1)
    step(model, torch.nn.functional.cross_entropy(logits, torch.zeros(len(read), dtype=torch.long)))


# ---- what needs no package


def test_what_was_exported_is_on_the_record(output: Path, tmp_path: Path) -> None:
    root = exported(output, "trec", tmp_path)
    mark = json.loads((root / "_SUCCESS").read_text())
    assert {one["name"] for one in mark["files"]} >= {"train/part-00000.run", "train/part-00000.qrels"}
    assert mark["about"]["model"] == "none" and mark["about"]["output_fingerprint"]
    chosen = pq.read_table(root / "_labels" / "part-00000.parquet")
    assert len(chosen) == QUERIES * (1 + NEGATIVES)
