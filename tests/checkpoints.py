"""Tiny checkpoints with random weights, in the directory layouts of the real models. Offline, a second each.

The weights are larger than a real initialisation (0.2, not 0.02), so that different inputs get clearly different
scores, and they come from fixed seeds. Every builder returns the directory it wrote.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    Gemma3TextConfig,
    Gemma3TextModel,
    GemmaConfig,
    GemmaForCausalLM,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
    Qwen3Model,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

CORPUS = [
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided.",
    'Note that the answer can only be "yes" or "no". system user assistant <Instruct>: <Query>: <Document>:',
    "Given a web search query, retrieve relevant passages that answer the query",
    "The capital of France is Paris. What is the capital of France? Where does the river rise?",
    "Die Hauptstadt von Frankreich heißt Paris. La capitale de la France est à Paris.",
    "中国的首都是北京。北京在哪里？ Столица России — Москва. Где находится Москва?",
    "def rank(items):\n    return sorted(items, key=lambda item: -item.score)\n",
    *["yes", "no", "Yes", "0", "1"] * 8,
] * 3
LETTERS = sorted({letter for text in CORPUS for letter in text if not letter.isspace()})
WORDS = sorted({word for text in CORPUS for word in re.findall(r"\w{2,}", text)})

# The pre-tokenizer of Qwen2, Qwen2.5 and Qwen3
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BERT_TOKENS = {"cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "unk": "[UNK]", "mask": "[MASK]"}
ENCODER = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "num_labels": 1,
}
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


def qwen3_reranker(path: Path, tied: bool = True) -> Path:
    """Qwen/Qwen3-Reranker: 0.6B and 4B have a tied head, 8B a head of its own."""
    tokenizer = _qwen_tokenizer(path, appends_end=False)
    _save(Qwen3ForCausalLM(_qwen3_config(tokenizer, tied)), path, seed=1 if tied else 2)
    return _as_on_the_hub(path, tokenizer)


def qwen2_reranker(path: Path) -> Path:
    """mixedbread-ai/mxbai-rerank-base-v2: Qwen2, with biases on queries, keys and values, and a tied head."""
    tokenizer = _qwen_tokenizer(path, appends_end=False)
    config = Qwen2Config(**_sizes(tokenizer), tie_word_embeddings=True, max_position_embeddings=32768)
    return _save(Qwen2ForCausalLM(config), path, seed=8)


def gemma_reranker(path: Path) -> Path:
    """BAAI/bge-reranker-v2-gemma: Gemma, whose norms multiply by 1 + weight and whose embeddings are scaled."""
    tokenizer = _qwen_tokenizer(path, appends_end=False)
    tokenizer.add_special_tokens(["<bos>"])
    _save_tokenizer(tokenizer, path, "PreTrainedTokenizerFast", 8192, {"bos": "<bos>", "pad": "<|endoftext|>"})
    config = GemmaConfig(**_sizes(tokenizer), head_dim=32, max_position_embeddings=8192)
    return _save(GemmaForCausalLM(config), path, seed=9)


def qwen3_seq_cls(path: Path, labels: int = 1) -> Path:
    """tomaarsen/Qwen3-Reranker-seq-cls: Qwen3-Reranker whose head is a classification head of one label (or two)."""
    tokenizer = _qwen_tokenizer(path, appends_end=False)
    config = _qwen3_config(tokenizer, tied=True)
    config.num_labels, config.pad_token_id = labels, tokenizer.token_to_id("<|endoftext|>")
    return _save(Qwen3ForSequenceClassification(config), path, seed=11)


def qwen3_embedding(path: Path, query: str = f"Instruct: {INSTRUCTION}\nQuery:") -> Path:
    """Qwen/Qwen3-Embedding: config.json names the causal class, but the keys are those of the body alone."""
    tokenizer = _qwen_tokenizer(path, appends_end=True)
    _save(Qwen3Model(_qwen3_config(tokenizer, tied=True)), path, seed=3)
    prompts = {"query": query, "document": ""}
    _sentence_transformers(path, "pooling_mode_lasttoken", prompts)
    return _as_on_the_hub(path, tokenizer)


def gemma3_embedding(path: Path) -> Path:
    """google/embeddinggemma: Gemma 3 that looks both ways, in layers with a window and without one; mean pooling. (Its
    two Dense layers are left out.)"""
    tokenizer = _qwen_tokenizer(path, appends_end=True)
    layers = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "sliding_window": 8}
    sizes = {**_sizes(tokenizer), **layers, "head_dim": 32, "max_position_embeddings": 2048}
    _save(Gemma3TextModel(Gemma3TextConfig(**sizes, use_bidirectional_attention=True)), path, seed=12)
    _sentence_transformers(path, "pooling_mode_mean_tokens", {"query": "query: ", "document": "title: none | text: "})
    return path


def xlmr_reranker(path: Path) -> Path:
    """BAAI/bge-reranker-v2-m3: `<s> query </s></s> document </s>`, one token type, positions from pad + 1."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces = [*((token, 0.0) for token in special), *((f"▁{word}", -4.0) for word in WORDS)]
    tokenizer = Tokenizer(models.Unigram([*pieces, *((letter, -6.0) for letter in ["▁", *LETTERS])], unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.add_special_tokens([*special, AddedToken("<mask>", lstrip=True, special=True)])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "sep": "</s>", "cls": "<s>", "pad": "<pad>", "mask": "<mask>"}
    _save_tokenizer(tokenizer, path, "XLMRobertaTokenizer", 8192, names)
    # 1026 positions hold 1024 tokens
    sizes = {**ENCODER, "max_position_embeddings": 1026, "type_vocab_size": 1, "pad_token_id": 1}
    config = XLMRobertaConfig(vocab_size=tokenizer.get_vocab_size(), **sizes)
    return _save(XLMRobertaForSequenceClassification(config), path, seed=4)


def jina_reranker(path: Path) -> Path:
    """jinaai/jina-reranker-v2-base-multilingual: XLM-R under the names of flash attention, without a model_type."""
    xlmr_reranker(path)
    weights = load_file(path / "model.safetensors")
    names = {
        "embeddings.LayerNorm": "emb_ln",
        "encoder.layer.": "encoder.layers.",
        "attention.output.dense": "mixer.out_proj",
        "attention.output.LayerNorm": "norm1",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
        "output.LayerNorm": "norm2",
    }
    packed = {}
    for name, tensor in weights.items():
        if "attention.self." in name:
            continue
        for old, new in names.items():
            name = name.replace(old, new)
        packed[name] = tensor.contiguous()
    for name in [name for name in weights if "attention.self.query" in name]:
        parts = [weights[name.replace("query", part)] for part in ("query", "key", "value")]
        new = name.replace("encoder.layer.", "encoder.layers.").replace("attention.self.query", "mixer.Wqkv")
        packed[new] = torch.cat(parts)
    save_file(packed, path / "model.safetensors", metadata={"format": "pt"})
    classes = {"AutoConfig": "configuration_xlm_roberta.XLMRobertaFlashConfig"}
    rewrite(path / "config.json", model_type=None, auto_map=classes, use_flash_attn=True, dtype=None)
    return path


GTE_FACTOR, GTE_THETA = 8.0, 20000


def gte_reranker(path: Path) -> Path:
    """Alibaba-NLP/gte-multilingual-reranker-base: `model_type: new`, packed projections, NTK-scaled rotary angles."""
    xlmr_reranker(path)
    rows = load_file(path / "model.safetensors")["roberta.embeddings.word_embeddings.weight"].shape[0]
    hidden, inner = ENCODER["hidden_size"], ENCODER["intermediate_size"]
    generator = torch.Generator().manual_seed(10 + _offset)

    def normal(*shape: int, around: float = 0.0) -> torch.Tensor:
        return around + 0.2 * torch.randn(*shape, generator=generator)

    weights = {
        "new.embeddings.word_embeddings.weight": normal(rows, hidden),
        "new.embeddings.token_type_embeddings.weight": normal(1, hidden),
        "new.pooler.dense.weight": normal(hidden, hidden),
        "new.pooler.dense.bias": normal(hidden),
        "classifier.weight": normal(1, hidden),
        "classifier.bias": normal(1),
    }
    norms = ["new.embeddings.LayerNorm"]
    for layer in range(ENCODER["num_hidden_layers"]):
        at = f"new.encoder.layer.{layer}"
        norms += [f"{at}.attn_ln", f"{at}.mlp_ln"]
        weights |= {
            f"{at}.attention.qkv_proj.weight": normal(3 * hidden, hidden),
            f"{at}.attention.qkv_proj.bias": normal(3 * hidden),
            f"{at}.attention.o_proj.weight": normal(hidden, hidden),
            f"{at}.attention.o_proj.bias": normal(hidden),
            f"{at}.mlp.up_gate_proj.weight": normal(2 * inner, hidden),
            f"{at}.mlp.down_proj.weight": normal(hidden, inner),
            f"{at}.mlp.down_proj.bias": normal(hidden),
        }
    for norm in norms:
        weights |= {f"{norm}.weight": normal(hidden, around=1.0), f"{norm}.bias": normal(hidden)}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    names = {"AutoConfig": "NewConfig", "AutoModelForSequenceClassification": "NewForSequenceClassification"}
    config = {
        **{key: value for key, value in ENCODER.items() if key != "num_labels"},
        "architectures": ["NewForSequenceClassification"],
        "model_type": "new",
        "auto_map": {key: f"Alibaba-NLP/new-impl--modeling.{name}" for key, name in names.items()},
        "hidden_act": "gelu",
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "layer_norm_eps": 1e-12,
        "layer_norm_type": "layer_norm",
        "max_position_embeddings": 1024,
        "pack_qkv": True,
        "pad_token_id": 1,
        "position_embedding_type": "rope",
        "rope_scaling": {"factor": GTE_FACTOR, "type": "ntk"},
        "rope_theta": GTE_THETA,
        "torch_dtype": "float16",
        "type_vocab_size": 1,
        "vocab_size": rows,
    }
    _write(path / "config.json", config)
    return path


def bert_reranker(path: Path) -> Path:
    """cross-encoder/ms-marco-MiniLM: the document has token type 1, and its score is the logit as it is."""
    tokenizer = _wordpiece_tokenizer(path)
    _save(BertForSequenceClassification(_bert_config(tokenizer)), path, seed=5)
    activation = {"activation_fn": "torch.nn.modules.linear.Identity", "version": "4.0.1"}
    rewrite(path / "config.json", sentence_transformers=activation)
    return _with_position_ids(path, "bert.")


def bert_embedding(path: Path, pooling: Literal["mean", "cls"] = "mean") -> Path:
    """sentence-transformers/all-MiniLM (mean) and BAAI/bge-base (cls): tokenizer.json stores padding and truncation."""
    tokenizer = _wordpiece_tokenizer(path)
    tokenizer.enable_padding(length=128)
    tokenizer.enable_truncation(128)
    tokenizer.save(str(path / "tokenizer.json"))
    _save(BertModel(_bert_config(tokenizer)), path, seed=6)
    _sentence_transformers(path, {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}[pooling], {})
    _write(path / "sentence_bert_config.json", {"max_seq_length": 256, "do_lower_case": False})
    return _with_position_ids(path, "")


def modernbert_reranker(path: Path) -> Path:
    """Alibaba-NLP/gte-reranker-modernbert-base: byte-level BPE, local and global attention, mean pooling."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]"]
    tokenizer.train_from_iterator(CORPUS, _byte_level_trainer(special))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    _save_tokenizer(tokenizer, path, "PreTrainedTokenizerFast", 8192, BERT_TOKENS)
    attention = {"num_hidden_layers": 4, "global_attn_every_n_layers": 3, "local_attention": 16}
    ids = {"cls_token_id": 0, "bos_token_id": 0, "sep_token_id": 1, "eos_token_id": 1, "pad_token_id": 2}
    sizes = {**ENCODER, **attention, **ids, "classifier_pooling": "mean", "max_position_embeddings": 8192}
    config = ModernBertConfig(vocab_size=tokenizer.get_vocab_size(), **sizes)
    return _save(ModernBertForSequenceClassification(config), path, seed=7)


_offset = 0
"""Added to every seed."""


@contextmanager
def seeded(offset: int) -> Iterator[None]:
    """Build other checkpoints than the usual ones."""
    global _offset
    _offset = offset
    try:
        yield
    finally:
        _offset = 0


def rewrite(path: Path, **changes: Any) -> None:
    """Change keys of a JSON object in place; None removes one."""
    content = {**json.loads(path.read_text()), **changes}
    _write(path, {key: value for key, value in content.items() if value is not None})


def _qwen_tokenizer(path: Path, appends_end: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.train_from_iterator(CORPUS, _byte_level_trainer([]))
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    if appends_end:
        end = ("<|endoftext|>", tokenizer.token_to_id("<|endoftext|>"))
        append = processors.TemplateProcessing(single=f"$A {end[0]}", pair=f"$A $B {end[0]}", special_tokens=[end])
        tokenizer.post_processor = processors.Sequence([tokenizer.post_processor, append])
    _save_tokenizer(tokenizer, path, "Qwen2Tokenizer", 131072, {"eos": "<|im_end|>", "pad": "<|endoftext|>"})
    tokenizer.model.save(str(path))  # vocab.json and merges.txt
    return tokenizer


def _byte_level_trainer(special: list[str]) -> trainers.BpeTrainer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trainers.BpeTrainer(
        vocab_size=600, min_frequency=2, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )


def _wordpiece_tokenizer(path: Path) -> Tokenizer:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    lower = sorted({piece.lower() for piece in [*LETTERS, *WORDS]})
    pieces = [*special, *lower, *(f"##{letter}" for letter in lower if len(letter) == 1)]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(special)
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    _save_tokenizer(tokenizer, path, "BertTokenizer", 512, BERT_TOKENS)
    return tokenizer


def _save_tokenizer(tokenizer: Tokenizer, path: Path, cls: str, max_length: int, names: dict[str, str]) -> None:
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    tokens = {f"{name}_token": token for name, token in names.items()}
    _write(path / "tokenizer_config.json", {"tokenizer_class": cls, "model_max_length": max_length, **tokens})


def _sizes(tokenizer: Tokenizer) -> dict[str, int]:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3}
    return {"vocab_size": tokenizer.get_vocab_size(), **sizes, **heads}


def _qwen3_config(tokenizer: Tokenizer, tied: bool) -> Qwen3Config:
    return Qwen3Config(
        **_sizes(tokenizer),
        head_dim=32,  # heads times head_dim is not hidden_size, as in 0.6B and 4B
        max_position_embeddings=40960,
        tie_word_embeddings=tied,
    )


def _bert_config(tokenizer: Tokenizer) -> BertConfig:
    return BertConfig(vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=512, **ENCODER)


def _as_on_the_hub(path: Path, tokenizer: Tokenizer) -> Path:
    """Qwen3's config.json as transformers 4.51 wrote it: rope_theta at the top, torch_dtype, no layer types."""
    newer = dict.fromkeys(("rope_parameters", "dtype", "layer_types", "pad_token_id"))
    older = {
        "rope_theta": 1000000,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "max_window_layers": 28,
    }
    ends = {"bos_token_id": "<|endoftext|>", "eos_token_id": "<|im_end|>"}
    ids = {key: tokenizer.token_to_id(token) for key, token in ends.items()}
    rewrite(path / "config.json", architectures=["Qwen3ForCausalLM"], **newer, **older, **ids)
    return path


def _sentence_transformers(path: Path, pooling: str, prompts: dict[str, str]) -> None:
    places = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [
        {"idx": index, "name": str(index), "path": place, "type": f"sentence_transformers.models.{name}"}
        for index, (name, place) in enumerate(places.items())
    ]
    (path / "1_Pooling").mkdir(exist_ok=True)
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    switches = {f"pooling_mode_{mode}": f"pooling_mode_{mode}" == pooling for mode in modes}
    _write(path / "modules.json", modules)
    width = json.loads((path / "config.json").read_text())["hidden_size"]
    content = {"word_embedding_dimension": width, **switches, "include_prompt": True}
    _write(path / "1_Pooling" / "config.json", content)
    _write(path / "config_sentence_transformers.json", {"prompts": prompts, "similarity_fn_name": "cosine"})


def _save(model: PreTrainedModel, path: Path, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed + _offset)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(0.2 * noise)
            else:  # biases around 0 and the scales of norms around 1, as they were initialised
                parameter.add_(0.1 * noise)
    model.save_pretrained(path)
    return path


def _with_position_ids(path: Path, prefix: str) -> Path:
    """BERT checkpoints of older transformers hold a position buffer among the weights."""
    weights = load_file(path / "model.safetensors")
    weights[f"{prefix}embeddings.position_ids"] = torch.arange(512)[None]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False))
