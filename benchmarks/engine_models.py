"""Checkpoints with random weights in the shapes that the engine benchmark names, written to a directory."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, Qwen3Config, Qwen3ForCausalLM, XLMRobertaConfig
from transformers import XLMRobertaForSequenceClassification as XLMRobertaClassifier

from batch_rerank.engine.templates import TEMPLATES

SHAPES = {  # layers, hidden, heads, kv heads, head_dim, MLP, tied
    "tiny": (2, 128, 4, 2, 32, 384, True),
    "small": (8, 512, 8, 4, 64, 1536, True),
    "qwen3-reranker-0.6b": (28, 1024, 16, 8, 128, 3072, True),
    "qwen3-reranker-4b": (36, 2560, 32, 8, 128, 9728, True),
    "qwen3-reranker-8b": (36, 4096, 32, 8, 128, 12288, False),
}
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]

CHAT_TEMPLATE = """{%- set query = (messages | selectattr("role", "equalto", "query") | first)["content"] -%}
{%- set document = (messages | selectattr("role", "equalto", "document") | first)["content"] -%}
{{- prefix -}}{{- "<Instruct>: instruction\\n<Query>: " + query + "\\n<Document>: " + document -}}{{- suffix -}}"""


def build_causal(path: Path, shape: tuple[Any, ...], tokenizer: str, device: str) -> None:
    layers, hidden, heads, kv_heads, head_dim, inner, tied = shape
    _copy_tokenizer(path, tokenizer)
    config = Qwen3Config(
        vocab_size=_rows(path),
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=40960,
        tie_word_embeddings=tied,
    )
    _save(Qwen3ForCausalLM, config, path, device)
    template = TEMPLATES["qwen3-reranker"]
    chat = CHAT_TEMPLATE.replace("instruction\\n", f"{template.instruction}\\n")
    for name in ("prefix", "suffix"):
        chat = chat.replace("{{- " + name + " -}}", "{{- " + json.dumps(getattr(template, name)) + " -}}")
    (path / "chat_template.jinja").write_text(chat)


def build_encoder(path: Path, shape: tuple[Any, ...], tokenizer: str, device: str) -> None:
    _copy_tokenizer(path, tokenizer)
    _add_pair(path)
    config = XLMRobertaConfig(max_position_embeddings=8194, type_vocab_size=1, num_labels=1, **_encoder(shape, path))
    _save(XLMRobertaClassifier, config, path, device)


def build_embedding(path: Path, shape: tuple[Any, ...], tokenizer: str, device: str) -> None:
    _copy_tokenizer(path, tokenizer)
    _add_pair(path)
    _save(BertModel, BertConfig(max_position_embeddings=512, **_encoder(shape, path)), path, device)
    places = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": place, "type": f"sentence_transformers.models.{name}"}
        for i, (name, place) in enumerate(places.items())
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir(exist_ok=True)
    pooling = {"word_embedding_dimension": shape[1], "pooling_mode_mean_tokens": True, "include_prompt": True}
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


def linear_flop(config: Any, tokens: int, sequences: int, trimmed: bool) -> float:
    """FLOP of the weight matrices of the layers. `trimmed`: in the last layer all tokens need keys and values only."""
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    if not trimmed:
        return 2.0 * tokens * layers * (4 * hidden**2 + 2 * hidden * inner)
    queries = config.num_attention_heads * config.head_dim
    keys = 2 * config.num_key_value_heads * config.head_dim
    rest = 2 * queries * hidden + 3 * hidden * inner
    return 2.0 * (tokens * ((layers - 1) * (hidden * keys + rest) + hidden * keys) + sequences * rest)


def train_tokenizer(path: Path, texts: Iterable[str]) -> Path:
    """A byte-level vocabulary of 8,000 in Qwen's form, for where the real one is not at hand."""
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    split = words + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8000, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*texts, *["yes no"] * 100], trainer)
    path.mkdir(parents=True)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": SPECIALS[0], "eos_token": SPECIALS[2]}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def _encoder(shape: tuple[Any, ...], path: Path) -> dict[str, Any]:
    layers, hidden, heads, _, _, _, _ = shape
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads}
    # XLM-R counts positions from its pad token's id
    return {**sizes, "intermediate_size": 4 * hidden, "vocab_size": _rows(path), "pad_token_id": 1}


def _copy_tokenizer(path: Path, tokenizer: str) -> None:
    path.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(tokenizer) / name, path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (path / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": 8192}))


def _add_pair(path: Path) -> None:
    """The pair layout of XLM-R, with Qwen's special tokens in the roles of <s> and </s>."""
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    start, end = SPECIALS[1:3]
    ids = [(token, tokenizer.token_to_id(token)) for token in (start, end)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", pair=f"{start} $A {end} {end} $B {end}", special_tokens=ids
    )
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": SPECIALS[0], "model_max_length": 512}
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def _rows(path: Path) -> int:
    return max(Tokenizer.from_file(str(path / "tokenizer.json")).get_vocab().values()) + 1


def _save(cls: Any, config: Any, path: Path, device: str) -> None:
    torch.manual_seed(0)
    with torch.device(device):
        model = cls._from_config(config, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    model.save_pretrained(path)
