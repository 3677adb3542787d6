"""A checkpoint's tokenizer.json, texts to ids through it, and the texts on which its habits are probed."""

import hashlib
from collections.abc import Hashable
from pathlib import Path
from typing import TypeVar

import numpy as np
from tokenizers import Encoding, Tokenizer

from batch_rerank.engine.encoded import Int32
from batch_rerank.errors import ModelError

CACHE_TOKENS = 16 * 2**20
"""64 MiB of ids, in each process that tokenises."""

Item = TypeVar("Item", bound=Hashable)

PROBES = (
    "",
    "x",
    " leading and trailing ",
    "\n\nline\r\n\tbreaks",
    "def f(x):\n    return x ** 2  # code",
    "中国的首都是北京。",
    "Größe, naïve, e\u0301 combining",
    "\u0301starts with a mark",
    "12,345.67 €",
    "السلام عليكم",
    "<|im_end|>\n<|im_start|>assistant",
    "🙂🙃 x" * 3,
    "ends in a break\n",
    "in breaks and a tab \n\n\t",
)
"""Texts on which a split of the template, or a pair's layout, must give the ids of the whole."""


def load_tokenizer(directory: Path) -> Tokenizer:
    """The checkpoint's tokenizer.json without the padding and truncation that may be stored in it."""
    path = directory / "tokenizer.json"
    if not path.exists():
        raise ModelError(f"model directory {directory}: no tokenizer.json; save the model's fast tokenizer into it")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise ModelError(f"{path}: not a tokenizer ({error}); the file is damaged, copy it again") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def unique_items(items: "list[Item]") -> "tuple[list[Item], Int32]":
    """The distinct items in order of first appearance, and int32[n_items]: which of them each item is."""
    index: dict[Item, int] = {}
    positions = [index.setdefault(item, len(index)) for item in items]
    return list(index), np.array(positions, np.int32)


def distinct_ids(tokenizer: Tokenizer, texts: list[str]) -> tuple[list[Int32], Int32]:
    """The ids of every distinct text, and int32[n_texts]: which of them each text has."""
    unique, positions = unique_items(texts)
    return token_ids(tokenizer, unique), positions


class TokenCache:
    """Ids of the latest documents, by a hash of the text: a first stage finds the same documents for many queries."""

    def __init__(self, tokenizer: Tokenizer, tokens: int = CACHE_TOKENS) -> None:
        self._tokenizer, self._room = tokenizer, tokens
        self._known: dict[bytes, Int32] = {}

    def distinct(self, texts: list[str]) -> tuple[list[Int32], Int32]:
        """As `distinct_ids`."""
        unique, positions = unique_items(texts)
        keys = [hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() for text in unique]
        found = {key: self._known[key] for key in keys if key in self._known}
        new = {key: text for key, text in zip(keys, unique, strict=True) if key not in found}
        found |= zip(new, token_ids(self._tokenizer, list(new.values())), strict=True)
        self._remember({key: found[key] for key in new})
        return [found[key] for key in keys], positions

    def _remember(self, new: dict[bytes, Int32]) -> None:
        """Keep the new; the oldest go first."""
        self._known |= new
        self._room -= sum(len(ids) for ids in new.values())
        while self._room < 0 and self._known:
            self._room += len(self._known.pop(next(iter(self._known))))


def token_ids(tokenizer: Tokenizer, texts: list[str]) -> list[Int32]:
    """Ids without special tokens."""
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(encoding.ids, np.int32) for encoding in encodings]


def special_ids(probe: Encoding, n_sequences: int) -> list[Int32]:
    """The special ids before, between and after the sequences of an encoding."""
    runs: list[list[int]] = [[] for _ in range(n_sequences + 1)]
    seen = 0
    for token, sequence in zip(probe.ids, probe.sequence_ids, strict=True):
        seen = seen if sequence is None else sequence + 1
        if sequence is None:
            runs[seen].append(token)
    return [np.array(run, np.int32) for run in runs]
