"""Groups to token ids: the ids of whole strings, every distinct text once, and the shapes that scorers rely on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import INSTRUCTION, bert_reranker, modernbert_reranker, qwen3_embedding, qwen3_reranker, xlmr_reranker
from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import NFKC, Lowercase, Replace, Sequence
from tokenizers.pre_tokenizers import Whitespace

from batch_rerank.engine.checkpoint import resolve_model
from batch_rerank.engine.encoded import Encoded, Group
from batch_rerank.engine.encoding import EscapingEncoder, make_encoder
from batch_rerank.engine.packing import batches
from batch_rerank.engine.tokens import TokenCache, load_tokenizer

PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
BUILDERS = {
    "qwen": qwen3_reranker,
    "qwen-embedding": qwen3_embedding,
    "xlmr": xlmr_reranker,
    "bert": bert_reranker,
    "modernbert": modernbert_reranker,
}
KINDS = [*BUILDERS, "checksum"]

# Pieces that tokenizers join, split or rewrite at their edges
PIECES = [
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "\u00a0",
    "\u3000",
    "a",
    "The",
    "'s",
    "7",
    "½",
    ":",
    "}",
    "_",
    ">",
    "->",
    "北",
    "é",
]
PIECES += [
    "\u0301",
    "\u200d",
    "🙂",
    "<|im_end|>",
    "<think>",
    "<Query>:",
    "</s>",
    "<mask>",
    "[SEP]",
    "yes",
    "ﬁ",
    "ß",
    "د",
]


def adversarial(count: int) -> list[str]:
    random = np.random.default_rng(7)
    return [*PIECES, *("".join(random.choice(PIECES, random.integers(2, 9))) for _ in range(count))]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: build(tmp_path_factory.mktemp(name)) for name, build in BUILDERS.items()}


@pytest.fixture(scope="module")
def encode(directories: dict[str, Path]) -> Callable[..., Encoded]:
    def encode(name: str, groups: list[Group], **settings: object) -> Encoded:
        if name == "checksum":
            return make_encoder(resolve_model("none", kind="checksum", **settings)).encode(groups)
        return make_encoder(resolve_model(str(directories[name]), **settings)).encode(groups)

    return encode


def pair_ids(encoded: Encoded, pair: int) -> list[int]:
    """What a pair's model reads, by the contract in Encoded."""
    group = encoded.group_of_pair()[pair]
    document = encoded.segment(encoded.document[pair])[: encoded.kept[pair]]
    return [*encoded.segment(encoded.prefix[group]), *document, *encoded.tails[encoded.tail[group]]]


def prompt_ids(tokenizer: Tokenizer, query: str, document: str) -> list[int]:
    """Qwen3-Reranker's card: three strings, tokenised one by one."""
    middle = f"<Instruct>: {INSTRUCTION}\n<Query>: {query}\n<Document>: {document}"
    return [i for part in (PREFIX, middle, SUFFIX) for i in tokenizer.encode(part).ids]


def test_a_causal_pair_has_the_ids_of_the_whole_prompt(directories: dict[str, Path], encode: Callable) -> None:
    tokenizer = Tokenizer.from_file(str(directories["qwen"] / "tokenizer.json"))
    documents = adversarial(400)
    for query in ("what?", "ends in a newline\n", " {query}<|im_end|>", ""):
        encoded = encode("qwen", [Group(query, documents)])
        for pair, document in enumerate(documents):
            assert pair_ids(encoded, pair) == prompt_ids(tokenizer, query, document), document


def test_a_tokenizer_that_joins_the_document_to_its_frame_gets_whole_strings(
    directories: dict[str, Path], tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(directories["qwen"], tmp_path / "joins"))
    content = json.loads((directory / "tokenizer.json").read_text())
    content["pre_tokenizer"] = content["pre_tokenizer"]["pretokenizers"][1]  # bytes only, no split into words
    content["model"]["merges"].insert(0, [":", "Ġ"])
    content["model"]["vocab"][":Ġ"] = 5000
    (directory / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    encoder = make_encoder(resolve_model(str(directory)))
    encoded = encoder.encode([Group("one", ["x", ""]), Group("two", ["x"])])
    for pair, (query, document) in enumerate([("one", "x"), ("one", ""), ("two", "x")]):
        assert 5000 in tokenizer.encode(f"<Document>: {document}").ids
        assert pair_ids(encoded, pair) == prompt_ids(tokenizer, query, document)


@pytest.mark.parametrize("name", ["xlmr", "bert", "modernbert"])
def test_a_pair_has_the_ids_of_the_tokenizers_own_pair(
    directories: dict[str, Path], encode: Callable, name: str
) -> None:
    tokenizer = Tokenizer.from_file(str(directories[name] / "tokenizer.json"))
    documents = adversarial(200)
    for query in ("what?", " ends in a space ", ""):
        encoded = encode(name, [Group(query, documents)])
        for pair, document in enumerate(documents):
            assert pair_ids(encoded, pair) == tokenizer.encode(query, document).ids, document


def test_a_sentence_has_the_ids_of_its_prompt_and_text(directories: dict[str, Path], encode: Callable) -> None:
    tokenizer = Tokenizer.from_file(str(directories["qwen-embedding"] / "tokenizer.json"))
    for text in adversarial(100):
        encoded = encode("qwen-embedding", [Group(text, [text], instruction="Find {query}")])
        query = tokenizer.encode(f"Instruct: Find {{query}}\nQuery:{text}").ids
        assert encoded.segment(encoded.prefix[0]).tolist() == query
        assert encoded.segment(encoded.document[0]).tolist() == tokenizer.encode(text).ids


def test_braces_in_texts_are_kept(directories: dict[str, Path], encode: Callable) -> None:
    encoded = encode("qwen", [Group("{document} {query} {0}", ["{instruction} {{x}} %s"], instruction="{query} {}")])
    tokenizer = Tokenizer.from_file(str(directories["qwen"] / "tokenizer.json"))
    middle = "<Instruct>: {query} {}\n<Query>: {document} {query} {0}\n<Document>: {instruction} {{x}} %s"
    assert tokenizer.decode(pair_ids(encoded, 0), skip_special_tokens=False) == PREFIX + middle + SUFFIX


@pytest.mark.parametrize("name", BUILDERS)
def test_distinct_texts_are_tokenised_once(encode: Callable, name: str) -> None:
    groups = [Group("one", ["a", "b", "a"]), Group("two", ["b", "c", ""]), Group("one", ["", "c"])]
    encoded = encode(name, groups)
    assert len(encoded.offsets) - 1 == 2 + 4  # queries one, two; documents a, b, c and the empty one
    assert encoded.prefix[0] == encoded.prefix[2] != encoded.prefix[1]
    a, b, c, empty = encoded.document[[0, 1, 4, 5]]
    assert encoded.document.tolist() == [a, b, a, b, c, empty, empty, c]


@pytest.mark.parametrize("name", ["qwen", "qwen-embedding"])
def test_a_query_with_two_instructions_is_two_texts(encode: Callable, name: str) -> None:
    groups = [Group("one", ["a"], "Find code"), Group("one", ["a"]), Group("one", ["a"], "Find code")]
    encoded = encode(name, groups)
    assert len(encoded.offsets) - 1 == 3
    assert encoded.prefix[0] == encoded.prefix[2] != encoded.prefix[1]


@pytest.mark.parametrize(
    ("documents", "n_pairs"),
    [([], 0), ([[]], 0), ([[], ["a", "bb"], []], 2), ([["a"], []], 1)],
    ids=["no group", "a group without documents", "between empty groups", "before an empty group"],
)
@pytest.mark.parametrize("name", KINDS)
def test_shapes_and_dtypes(encode: Callable, name: str, documents: list[list[str]], n_pairs: int) -> None:
    encoded = encode(name, [Group(f"query {i}", texts) for i, texts in enumerate(documents)])
    shapes = {
        "prefix": (np.int32, len(documents)),
        "tail": (np.int32, len(documents)),
        "starts": (np.int64, len(documents) + 1),
        "document": (np.int32, n_pairs),
        "kept": (np.int32, n_pairs),
        "n_tokens": (np.int32, n_pairs),
        "truncated": (np.bool_, n_pairs),
    }
    found = {field: (getattr(encoded, field).dtype.type, len(getattr(encoded, field))) for field in shapes}
    assert found == shapes
    assert np.issubdtype(encoded.tokens.dtype, np.integer)
    assert encoded.offsets.dtype == np.int64
    assert {ids.dtype for ids in encoded.tails} <= {np.dtype(np.int32)}
    assert (encoded.offsets[0], encoded.offsets[-1]) == (0, len(encoded.tokens))
    assert encoded.starts.tolist() == np.cumsum([0, *map(len, documents)]).tolist()
    assert encoded.group_of_pair().tolist() == [i for i, texts in enumerate(documents) for _ in texts]


@pytest.mark.parametrize("name", ["qwen", "xlmr", "bert", "modernbert", "checksum"])
def test_a_pair_has_n_tokens_and_never_more_than_max_length(encode: Callable, name: str) -> None:
    words = "river " * 60
    groups = [Group(query, [words[:length] for length in range(0, 361, 24)]) for query in ("", "why?", words)]
    encoded = encode(name, groups, max_length=100)
    lengths = [len(pair_ids(encoded, pair)) for pair in range(len(encoded.document))]
    assert lengths == encoded.n_tokens.tolist()
    assert max(lengths) == 100


def test_the_byte_encoder_gives_utf8_bytes(encode: Callable) -> None:
    encoded = encode("checksum", [Group("q?", ["é", "12345678", "1234"], "find"), Group("r", ["é"])], max_length=13)
    assert encoded.tokens.dtype == np.uint8
    assert [bytes(pair_ids(encoded, pair)) for pair in range(4)] == [
        b"find\nq?\n\xc3\xa9",
        b"find\nq?\n12345",
        b"find\nq?\n1234",
        b"\nr\n\xc3\xa9",
    ]
    assert encoded.truncated.tolist() == [False, True, False, False]


@pytest.mark.parametrize("token_budget", [1, 64, 1000, 10**6])
@pytest.mark.parametrize("seed", range(5))
def test_batches_hold_every_index_once_within_the_budget(token_budget: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 200, random.integers(1, 80)).astype(np.int32)
    found = list(batches(lengths, token_budget))
    assert sorted(np.concatenate(found).tolist()) == list(range(len(lengths)))
    for batch in found:
        assert len(batch) == 1 or len(batch) * lengths[batch].max() <= token_budget


def test_batches_are_longest_first_and_one_longer_than_the_budget_is_alone() -> None:
    found = [batch.tolist() for batch in batches(np.array([3, 50, 4, 4, 2, 4], np.int32), token_budget=12)]
    assert found == [[1], [2, 3, 5], [0, 4]]


def test_no_sequences_are_no_batches() -> None:
    assert list(batches(np.empty(0, np.int32), token_budget=64)) == []


def test_a_bounded_cache_gives_the_same_ids_and_forgets_the_oldest(directories: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(directories["qwen"])
    cache = TokenCache(tokenizer, tokens=40)
    calls: list[list[str]] = []

    class Counting:
        def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> object:
            calls.append(texts)
            return tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)

    cache._tokenizer = Counting()
    texts = ["Paris is", "Moscow", "Paris is", ""]
    for _ in range(2):
        ids, positions = cache.distinct(texts)
        assert [ids[i].tolist() for i in positions] == [
            tokenizer.encode(t, add_special_tokens=False).ids for t in texts
        ]
    assert calls == [["Paris is", "Moscow", ""], []]
    cache.distinct(["where does the river rise? " * 10])
    assert sum(len(ids) for ids in cache._known.values()) <= 40
    cache.distinct(["Paris is"])
    assert calls[-1] == ["Paris is"]


@pytest.mark.parametrize("name", ["qwen", "xlmr", "bert", "modernbert", "qwen-embedding"])
def test_escaped_control_tokens_are_text_and_other_texts_stay_as_they_are(
    directories: dict[str, Path], encode: Callable, name: str
) -> None:
    tokenizer = Tokenizer.from_file(str(directories[name] / "tokenizer.json"))
    added = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items() if token.content.strip()}
    assert added
    plain = [Group("a query", ["def f(x):\n    return  x", ""])]
    as_ever, escaped = encode(name, plain), encode(name, plain, escape=True)
    np.testing.assert_array_equal(as_ever.tokens, escaped.tokens)
    hostile = "".join(f"a{content}{content} b" for content in added.values())
    group = [Group(hostile, [hostile, "x" + hostile])]
    frame = pair_ids(encode(name, [Group("", [""])]), 0)
    for pair in range(2):
        found = pair_ids(encode(name, group, escape=True), pair)
        for token in added:
            if "unk" not in added[token].lower():  # what "[" itself is in a small vocabulary
                assert found.count(token) == frame.count(token), added[token]
        assert len(pair_ids(encode(name, group), pair)) < len(found), "unescaped, they are control tokens"


def test_a_control_token_that_only_normalizing_makes_is_text_too() -> None:
    """Tokens that are `normalized` are found in the text as the tokenizer has it, and may take spaces along."""
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "a": 1}, "[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = Sequence([NFKC(), Lowercase()]), Whitespace()
    tokenizer.add_tokens([AddedToken("<stop>", normalized=True), AddedToken("<Mask>", normalized=True, lstrip=True)])
    stop, mask = (tokenizer.token_to_id(name) for name in ("<stop>", "<Mask>"))
    texts = ["a<stop>a", "a<STOP>", "a＜stop＞a＜ＳＴＯＰ＞", "a   ＜mask＞a", "<Mask><Mask> <MASK>", "a", "", "ﬁ ＜"]
    assert [number in tokenizer.encode(text).ids for text in texts for number in (stop, mask)].count(True) == 5
    given: list[Group] = []

    class Kept:
        def encode(self, groups: list[Group]) -> None:
            given.extend(groups)

    EscapingEncoder(Kept(), tokenizer).encode([Group(texts[0], texts, texts[2])])
    (group,) = given
    for text in (group.query, group.instruction, *group.documents):
        assert text is not None and not {stop, mask} & set(tokenizer.encode(text).ids), text
    for before, after in zip(texts, group.documents, strict=True):
        assert after.replace(" ", "") == before.replace(" ", "")
    assert group.documents[5:] == texts[5:], "what holds none stays"


@pytest.mark.parametrize("kind", [r"\s+", " {2,}"])
def test_a_normalizer_that_takes_spaces_away_holds_nobody_up(kind: str) -> None:
    """The space that breaks a token is gone in the text that is looked at: a document of ten characters hung."""
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "a": 1}, "[UNK]"))
    spaces = Replace(Regex(kind), "" if kind == r"\s+" else " ")
    tokenizer.normalizer, tokenizer.pre_tokenizer = Sequence([NFKC(), spaces]), Whitespace()
    tokenizer.add_tokens([AddedToken(token, normalized=True) for token in ("<mask>", "x yz")])
    control = set(tokenizer.get_added_tokens_decoder())
    texts = ["a ＜mask＞ b", "<mask><mask>", "＜ m a s k ＞", "x yz", "x  yz ", "a"]
    calls, given = [], list[Group]()

    class Kept:
        def encode(self, groups: list[Group]) -> None:
            given.extend(groups)

    class Counting:
        normalizer = tokenizer.normalizer
        get_added_tokens_decoder = tokenizer.get_added_tokens_decoder

        def encode_batch(self, texts: list[str], **how: Any) -> Any:
            calls.append(len(texts))
            return tokenizer.encode_batch(texts, **how)

    EscapingEncoder(Kept(), Counting()).encode([Group("a", texts * 50) for _ in range(20)])
    assert all(not control & set(tokenizer.encode(text).ids) for text in given[0].documents)
    assert given[0].documents[5] == "a" and len(given) == 20
    assert calls[0] == len(set(texts)) + 1 and len(calls) < 8, "each distinct text once, the empty instruction too"
