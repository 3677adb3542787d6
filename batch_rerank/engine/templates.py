"""Prompt templates of causal rerankers, and what is known of models by their exact hub id.

Templates are data. A causal pair is ids(prefix) + ids(middle), cut on the right, + ids(suffix): the prefix and the
suffix are never cut. `{instruction}` may be absent from a middle; `{query}` and `{document}` may not.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class CausalTemplate:
    """How a causal reranker is asked, and which tokens carry its answer."""

    name: str
    version: int
    source: str
    prefix: str
    middle: str
    suffix: str
    instruction: str | None
    true_token: str
    false_token: str
    max_length: int

    def before_document(self, query: str, instruction: str | None) -> str:
        """The middle up to the document, filled in. The texts are inserted, not formatted: braces in them are kept."""
        values = {"{query}": query, "{instruction}": instruction or ""}
        parts = re.split(r"(\{query\}|\{instruction\})", self.middle.partition("{document}")[0])
        return "".join(values.get(part, part) for part in parts)


QWEN3_RERANKER = CausalTemplate(
    name="qwen3-reranker",
    version=1,
    source="model card of Qwen/Qwen3-Reranker-8B, transformers usage",
    prefix=(
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    ),
    middle="<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}",
    suffix="<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    instruction="Given a web search query, retrieve relevant passages that answer the query",
    true_token="yes",
    false_token="no",
    max_length=8192,
)

TEMPLATES = {template.name: template for template in (QWEN3_RERANKER,)}

PAIR = "pair"
"""Name of the sequence-classification input: the tokenizer's own pair of query and document."""

SENTENCE = "sentence"
"""Name of the bi-encoder input: each text alone, with the prompts of `config_sentence_transformers.json`."""


@dataclass(frozen=True)
class HubModel:
    """What the checkpoint's files do not say: the template, and the max_length its authors use."""

    template: str
    max_length: int | None = None
    note: str = ""


HUB_MODELS = {
    "Qwen/Qwen3-Reranker-0.6B": HubModel("qwen3-reranker"),
    "Qwen/Qwen3-Reranker-4B": HubModel("qwen3-reranker"),
    "Qwen/Qwen3-Reranker-8B": HubModel("qwen3-reranker"),
    "BAAI/bge-reranker-v2-m3": HubModel(PAIR, 1024),
    "cross-encoder/ms-marco-MiniLM-L6-v2": HubModel(PAIR, 512),
    "Qwen/Qwen3-Embedding-0.6B": HubModel(SENTENCE, 8192),
}
