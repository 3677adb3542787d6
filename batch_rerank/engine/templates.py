"""Prompt templates of causal rerankers, and what is known of models by their exact hub id.

Templates are data. A sequence is ids(prefix) + ids(middle) + ids(suffix). A middle is one string or several pieces;
each piece is tokenised apart, as the model's own code does it. What stands after the document is never cut: the
document's tail goes first, then the query's.
"""

import re
import reprlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from batch_rerank.errors import ConfigError

PLACES = ("{instruction}", "{query}", "{document}")
_PLACE = re.compile(r"(\{instruction\}|\{query\}|\{document\})")


@dataclass(frozen=True)
class CausalTemplate:
    """How a causal reranker, or a decoder with a classification head, is asked, and which tokens carry its answer.

    `instructed`: the middle where an instruction is given, for templates that have one only then. `true_token` and
    `false_token`: a text that is one token, or an id; the score is logit(true) - logit(false), or logit(true) alone. A
    causal model needs the first; a classification head needs none.
    `relevance`: "sigmoid" of score / `scale`, or "none". `instruction`: the default, "" for none, null for no place.
    """

    name: str
    middle: tuple[str, ...]
    true_token: str | int | None = None
    false_token: str | int | None = None
    prefix: str = ""
    suffix: str = ""
    instructed: tuple[str, ...] = ()
    instruction: str | None = None
    max_length: int = 8192
    relevance: Literal["sigmoid", "none"] = "sigmoid"
    scale: float = 1.0
    version: int = 1
    source: str = "the job file"

    def pieces(self, query: str, instruction: str) -> tuple[list[str], str, list[str]]:
        """The pieces up to the document, the text after it in its piece, and the pieces after that, filled in.

        The last string of the first list is what precedes the document in its own piece. The texts are inserted, not
        formatted: braces in them are kept.
        """
        pieces = self.instructed if self.instructed and instruction else self.middle
        values = {"{query}": query, "{instruction}": instruction}
        filled = ["".join(values.get(part, part) for part in _PLACE.split(piece)) for piece in pieces]
        at = next(index for index, piece in enumerate(pieces) if "{document}" in piece)
        before, after = (
            "".join(values.get(part, part) for part in _PLACE.split(part)) for part in pieces[at].split("{document}")
        )
        return [*filled[:at], before], after, filled[at + 1 :]

    @property
    def constant_tail(self) -> bool:
        """Whether what follows the document is the same for every pair."""
        tails = {
            "".join([after, *rest]) for _, after, rest in (self.pieces(q, i) for q in "ab" for i in ("", "c", "d"))
        }
        return len(tails) == 1


def parse_template(given: Mapping[str, Any]) -> CausalTemplate:
    """A user's own template. Raises ConfigError with every error."""
    kinds: dict[str, tuple[tuple[type, ...], str]] = {
        **dict.fromkeys(("name", "prefix", "suffix", "source"), ((str,), "a text")),
        **dict.fromkeys(("middle", "instructed"), ((str, list, tuple), "a text or a list of texts")),
        **dict.fromkeys(("true_token", "false_token"), ((str, int, type(None)), "a token's text or id, or null")),
        "instruction": ((str, type(None)), "a text or null"),
        **dict.fromkeys(("max_length", "version"), ((int,), "an integer")),
        "relevance": ((str,), "sigmoid or none"),
        "scale": ((int, float), "a number"),
    }
    unknown = [f"unknown key {key!r}; expected some of {list(kinds)}" for key in given if key not in kinds]
    errors = unknown + [f"{key}: missing; this key is required" for key in ("middle",) if key not in given]
    for key, (types, expected) in kinds.items():
        if key in given and (not isinstance(given[key], types) or isinstance(given[key], bool)):
            errors.append(f"{key}: found {reprlib.repr(given[key])}; expected {expected}")
    if errors:
        raise ConfigError("model.template: " + "; ".join(errors))
    texts = {key: _texts(given[key]) for key in ("middle", "instructed") if key in given}
    template = CausalTemplate(**{"name": "custom", **given, **texts})
    errors = _wrong_pieces(template)
    if template.relevance not in ("sigmoid", "none") or not 0 < template.scale <= sys.float_info.max:
        found = f"found relevance {template.relevance!r} and scale {reprlib.repr(template.scale)}"
        errors.append(f"{found}; expected sigmoid or none, > 0")
    if errors:
        raise ConfigError("model.template: " + "; ".join(errors))
    return template


def _texts(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(map(str, value))


def _wrong_pieces(template: CausalTemplate) -> list[str]:
    errors = []
    for key in ("middle", "instructed"):
        whole = "\0".join(getattr(template, key))
        if key == "instructed" and not whole:
            continue
        for place in ("{query}", "{document}", *(["{instruction}"] if key == "instructed" else [])):
            if place not in whole:
                errors.append(f"{key}: lacks {place}, found {whole!r}")
        if whole.count("{document}") > 1:
            errors.append(f"{key}: has {{document}} more than once")
        odd = sorted(set(re.findall(r"\{[a-z_]+\}", whole)) - set(PLACES))
        if odd:
            errors.append(f"{key}: unknown places {odd}; expected {list(PLACES)}")
    if "{instruction}" in "".join(template.middle) + "".join(template.instructed) and template.instruction is None:
        errors.append('instruction: missing; the template has a place for one: set a default, "" for none')
    return errors


_QWEN3_PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
_QWEN3_SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"

_MXBAI = (
    "query: {query}",
    "\n",
    "document: {document}",
    "\n",
    "You are a search relevance expert who evaluates how well documents match search queries. For each query-document "
    "pair, carefully analyze the semantic relationship between them, then provide your binary relevance judgment "
    "(0 for not relevant, 1 for relevant).\nRelevance:",
)
_CTXL = "Check whether a given document contains information helpful to answer the query.\n<Document> {document}\n"

TEMPLATES = {
    template.name: template
    for template in (
        CausalTemplate(
            name="qwen3-reranker",
            source="model card of Qwen/Qwen3-Reranker-8B, transformers usage",
            prefix=_QWEN3_PREFIX,
            middle=("<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}",),
            suffix=_QWEN3_SUFFIX,
            instruction="Given a web search query, retrieve relevant passages that answer the query",
            true_token="yes",
            false_token="no",
        ),
        CausalTemplate(
            name="qwen3-reranker-eval",
            source="evaluation code of QwenLM/Qwen3-Embedding, behind the published table (where it cuts a document "
            "it also drops the first <|im_end|>; this does not)",
            prefix=_QWEN3_PREFIX,
            middle=("<Instruct>: {instruction}\n\n<Query>: {query}\n\n<Document>: {document}<|im_end|>\n",),
            suffix=_QWEN3_SUFFIX,
            instruction="Given the user query, retrieval the relevant passages",
            true_token="yes",
            false_token="no",
        ),
        CausalTemplate(
            name="mxbai-rerank-v2",
            source="mixedbread-ai/mxbai-rerank, class MxbaiRerankV2",
            prefix="<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
            "<|im_end|>\n<|im_start|>user\n",
            middle=_MXBAI,
            instructed=("instruction: {instruction}", "\n", *_MXBAI),
            suffix="<|im_end|>\n<|im_start|>assistant\n",
            instruction="",
            true_token="1",
            false_token="0",
        ),
        CausalTemplate(
            name="zerank",
            source="model card of zeroentropy/zerank-2: its chat template, the logit of Yes, divided by 5",
            middle=(
                "<|im_start|>system\n{query}<|im_end|>\n<|im_start|>user\n{document}<|im_end|>\n"
                "<|im_start|>assistant\n",
            ),
            true_token="Yes",
            scale=5.0,
        ),
        CausalTemplate(
            name="ctxl-rerank-v2",
            source="model card of ContextualAI/ctxl-rerank-v2-instruct-multilingual-1b (the document is cut, not the "
            "query behind it)",
            middle=(_CTXL + "<Query> {query} ??",),
            instructed=(_CTXL + "<Query> {query} {instruction} ??",),
            instruction="",
            true_token=0,
            relevance="none",
        ),
        CausalTemplate(
            name="bge-reranker-v2-gemma",
            source="FlagEmbedding, get_inputs of the LLM-based reranker (max_length counts the whole sequence here)",
            prefix="<bos>",
            middle=(
                "A: {query}",
                "\n",
                "B: {document}",
                "\n",
                "Given a query A and a passage B, determine whether the passage contains an answer to the query by "
                "providing a prediction of either 'Yes' or 'No'.",
            ),
            true_token="Yes",
            max_length=1024,
        ),
    )
}

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


_GIVEN = {
    "qwen3-reranker": [
        *(f"Qwen/Qwen3-Reranker-{size}" for size in ("0.6B", "4B", "8B")),
        *(f"tomaarsen/Qwen3-Reranker-{size}-seq-cls" for size in ("0.6B", "4B", "8B")),
    ],
    "mxbai-rerank-v2": [f"mixedbread-ai/mxbai-rerank-{size}-v2" for size in ("base", "large")],
    "zerank": [f"zeroentropy/zerank-{version}" for version in ("1", "1-small", "2")],
    "ctxl-rerank-v2": [f"ContextualAI/ctxl-rerank-v2-instruct-multilingual-{size}" for size in ("1b", "2b", "6b")],
    "bge-reranker-v2-gemma": ["BAAI/bge-reranker-v2-gemma"],
}

_NON_COMMERCIAL = "licence CC-BY-NC 4.0: not for commercial use"
_LICENCES = {
    **dict.fromkeys(("zeroentropy/zerank-1", "zeroentropy/zerank-2"), _NON_COMMERCIAL),
    **dict.fromkeys(_GIVEN["ctxl-rerank-v2"], "licence CC-BY-NC-SA 4.0: not for commercial use"),
}

HUB_MODELS = {
    **{name: HubModel(template, note=_LICENCES.get(name, "")) for template, names in _GIVEN.items() for name in names},
    "BAAI/bge-reranker-v2-m3": HubModel(PAIR, 1024),
    "Alibaba-NLP/gte-multilingual-reranker-base": HubModel(PAIR, 8192),
    "Alibaba-NLP/gte-reranker-modernbert-base": HubModel(PAIR, 8192),
    "jinaai/jina-reranker-v2-base-multilingual": HubModel(PAIR, 1024, _NON_COMMERCIAL),
    "cross-encoder/ms-marco-MiniLM-L6-v2": HubModel(PAIR, 512),
    **{f"Qwen/Qwen3-Embedding-{size}": HubModel(SENTENCE, 8192) for size in ("0.6B", "4B", "8B")},
}
