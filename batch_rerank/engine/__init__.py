"""Texts to scores: numpy, tokenizers, torch and transformers only.

No ray, no pyarrow and no fsspec, so that the engine can be measured alone on a GPU machine; a test asserts it.
Encoding (texts to token ids) does not import torch either: CPU tasks that only tokenise stay small.
"""
