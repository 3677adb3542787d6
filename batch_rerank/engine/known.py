"""What is known before a model is loaded: published scores, and what the templates render to."""

from dataclasses import dataclass, field

from batch_rerank.engine.encoded import Group

PLANETS = Group(
    "Which planet is known as the Red Planet?",
    (
        "Venus is often called Earth's twin because of its similar size and proximity.",
        "Mars, known for its reddish appearance, is often referred to as the Red Planet.",
        "Jupiter, the largest planet in our solar system, has a prominent red spot.",
        "Saturn, famous for its rings, is sometimes mistaken for the Red Planet.",
    ),
)


@dataclass(frozen=True)
class Golden:
    """Published float32 scores of PLANETS, with the template's own instruction."""

    source: str
    template: str
    scores: tuple[float, ...]


GOLDEN = {
    "Qwen/Qwen3-Reranker-0.6B": Golden(
        "sentence-transformers, tests/cross_encoder, test_qwen3_reranker_original_with_identity_activation",
        "qwen3-reranker",
        (-3.109298, 7.120390, -0.378755, 3.541637),
    ),
    "cross-encoder/ms-marco-MiniLM-L6-v2": Golden(
        "sentence-transformers, tests/cross_encoder/test_pretrained.py",
        "pair",
        (-6.52474, 9.69094, 6.92376, 6.66822),
    ),
}
"""By exact hub id."""


@dataclass(frozen=True)
class KnownTemplate:
    """What a template gives for the texts "query" and "document".

    sha256: of the text (`selftest.digest`); ids: with its own instruction, under the vocabulary that has the tokens of
    `vocabulary`, empty where they are not known
    """

    sha256: str
    vocabulary: dict[str, int] = field(default_factory=dict)
    ids: tuple[int, ...] = ()


def _ids(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split()))


KNOWN_TEMPLATES = {
    "qwen3-reranker": KnownTemplate(
        "73fab6a0e8d5047f414d4d6fd20a9f33e10739c277435435744f270f7b037257",
        {"<|im_end|>": 151645, "<think>": 151667},
        _ids(
            "151644 8948 198 60256 3425 279 11789 20027 279 8502 3118 389 279 11361 323 279 758 1235 3897 13 7036 "
            "429 279 4226 646 1172 387 330 9693 1 476 330 2152 3263 151645 198 151644 872 198 "
            "27 641 1235 26818 16246 264 3482 2711 3239 11 17179 9760 46769 429 4226 279 3239 198 27 2859 26818 "
            "3239 198 75692 26818 2197 "
            "151645 198 151644 77091 198 151667 271 151668 271"
        ),
    ),
    "qwen3-reranker-eval": KnownTemplate("f2065cd99aee4e00ec8e777feb214459cc5377061c45b3d718534457d6936788"),
    "mxbai-rerank-v2": KnownTemplate("9b53112beb4c6d1e9a4a330ce6586def84153d1762873c6de2c7afe00bcf7c34"),
    "zerank": KnownTemplate("d06fb5383a35f1b96068c32d1bf8197f6fdba4bb30315f99a9faf3ac6b1bdfbb"),
    "ctxl-rerank-v2": KnownTemplate("311d03f1b325c4125ee1a3be6a9ebf8f8b7ca92999572cc25cba6addaedf4ef8"),
    "bge-reranker-v2-gemma": KnownTemplate("eaf03b7efc94fe3ca1e90adfd8cba3294c32cf30b55c642852db4c606f88e98a"),
}
