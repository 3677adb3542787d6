"""What a loaded model is tested for before its first unit, and what each unit's scores are looked at for.

The checks need no known answers: they hold for any healthy checkpoint, a random one too. So they find damage and
mistakes of this program, but not that the weights are other ones than were meant. Where a model's true scores are
published they are compared; where not, the result says that this was not checked.
"""

import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from batch_rerank.engine.canaries import Limits, canaries, few_tokens, limits, moved, order
from batch_rerank.engine.checkpoint import ModelSpec
from batch_rerank.engine.encoded import Encoded, Group
from batch_rerank.engine.encoding import Encoder, make_encoder
from batch_rerank.engine.known import GOLDEN, KNOWN_TEMPLATES, PLANETS
from batch_rerank.engine.packing import Float32, own_tokens, prefix_of
from batch_rerank.engine.scorer import Scorer, relevance
from batch_rerank.engine.templates import CausalTemplate
from batch_rerank.engine.tokens import PROBES
from batch_rerank.errors import BatchRerankError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from batch_rerank.engine.reference import Reference

FEWEST = 32
"""Distinct sequences of a unit from which on equal scores are no accident."""

FEWEST_CANARIES = 8
"""The same for the canaries. With fewer, max_length has cut them to the same few tokens."""

RIGHT_WEIGHTS = "whether these are the weights that were meant (no published scores of this model are known)"


@dataclass(frozen=True)
class Check:
    """One check and what it saw."""

    name: str
    passed: bool
    seen: str


@dataclass(frozen=True)
class SelfTest:
    """The result of a self-test. `largest_difference`: of the canaries between the fast and the slow path, and
    `allowed`: what rounding explains of it; None where they were not computed."""

    checks: tuple[Check, ...]
    not_checked: tuple[str, ...] = ()
    largest_difference: float | None = None
    allowed: Limits | None = None

    @property
    def passed(self) -> bool:
        """Whether every check that was made passed."""
        return all(check.passed for check in self.checks)

    def summary(self) -> str:
        """One line."""
        failed = [f"{check.name}: {check.seen}" for check in self.checks if not check.passed]
        if failed:
            return f"self-test failed: {'; '.join(failed)}"
        canaries = "".join(f"; {check.seen}" for check in self.checks if check.name == "canaries")
        rest = "".join(f"; not checked: {thing}" for thing in self.not_checked)
        return f"self-test passed: {', '.join(check.name for check in self.checks)}{canaries}{rest}"


def not_loaded(error: BatchRerankError) -> SelfTest:
    """The result where a model could not even be loaded."""
    return SelfTest((Check("load", False, str(error)),))


Findings = list[Check | str]
"""Checks, and as texts what could not be checked."""


def self_test(spec: ModelSpec, scorer: Scorer) -> SelfTest:
    """Test a loaded model. Failures are in the result, none is raised; the free scorer has nothing to test."""
    network = scorer.network
    if network is None:
        return SelfTest((), ("anything: the free scorer has no model",))
    from batch_rerank.engine.reference import Reference  # not at the top: units are looked at without torch

    try:
        encoder = make_encoder(replace(spec, chunk_overlap=None, escape=False))  # the slow path cuts
        reference = Reference(spec, network)
    except BatchRerankError as error:
        return not_loaded(error)
    found: Findings = [Check("load", True, f"every weight of {type(network).__name__} is there once")]
    found += _attempt("weights", lambda: _weights(network))
    if spec.kind == "causal":
        found += _attempt("answers", lambda: _answers(reference))
        found += _attempt("template", lambda: _template(spec, reference))
    if spec.kind != "bi_encoder":
        found += _attempt("head", lambda: _head(spec, network, reference))
    found += _attempt("tokens", lambda: _tokens(spec, encoder, reference))
    measured: list[tuple[float, Limits]] = []
    found += _attempt("canaries", lambda: _canaries(spec, encoder, scorer, reference, measured))
    found += _attempt("golden", lambda: _golden(spec, encoder, scorer))
    found += ["where the chunks of long documents begin and end"] if spec.chunk_overlap is not None else []
    checks = tuple(item for item in found if isinstance(item, Check))
    not_checked = tuple(item for item in found if isinstance(item, str))
    return SelfTest(checks, not_checked, *(measured[0] if measured else ()))


def _attempt(name: str, check: Callable[[], Findings]) -> Findings:
    try:
        return check()
    except BatchRerankError as error:
        return [Check(name, False, str(error))]
    except Exception as error:  # a model's own code may raise anything, torch where memory runs out too
        return [Check(name, False, " ".join(f"{type(error).__name__}: {error}".split()))]


def _weights(network: "PreTrainedModel") -> Findings:
    weights = dict(network.named_parameters())
    bad = [name for name, weight in weights.items() if not weight.isfinite().all()]
    if bad:
        return [Check("weights", False, f"NaN or infinity in {len(bad)} of {len(weights)} weights, e.g. {bad[0]}")]
    return [Check("weights", True, f"{len(weights)} weights, all finite")]


def _answers(reference: "Reference") -> Findings:
    tokens = [token for token in (reference.template.true_token, reference.template.false_token) if token is not None]
    ids = reference.answers()
    back = [reference.tokenizer.decode(found, skip_special_tokens=False) for found in ids]
    single = all(len(found) == 1 for found in ids) and len({found[0] for found in ids}) == len(ids)
    same = all(text == token for text, token in zip(back, tokens, strict=True) if isinstance(token, str))
    seen = ", ".join(f"{token!r} is {found}" for token, found in zip(tokens, ids, strict=True))
    return [Check("answers", single and same, seen)]


def _template(spec: ModelSpec, reference: "Reference") -> Findings:
    known = KNOWN_TEMPLATES.get(spec.template)
    if known is None:
        return [f"the text of template {spec.template!r}, of which nothing is known"]
    parts = rendered(reference.template, reference.template.instruction or "")
    found = digest(reference.template)
    if found != known.sha256:
        seen = f"{spec.template} renders {''.join(parts)!r} (sha256 {found[:12]}, expected {known.sha256[:12]})"
        return [Check("template", False, seen)]
    if not known.ids or any(reference.tokenizer.token_to_id(token) != i for token, i in known.vocabulary.items()):
        return [Check("template", True, f"{spec.template} has the text that is known")]
    ids = [i for part in parts for i in reference.tokenizer.encode(part, add_special_tokens=False).ids]
    seen = f"{spec.template} has the text that is known, in {len(ids)} ids; expected {len(known.ids)}"
    return [Check("template", tuple(ids) == known.ids, seen)]


def digest(template: CausalTemplate) -> str:
    """sha256 over the parts, joined by NUL, of what a template renders with its own instruction and with another."""
    texts = rendered(template, template.instruction or "") + rendered(template, "instruction")
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def rendered(template: CausalTemplate, instruction: str) -> list[str]:
    """The parts, tokenised apart, that a template gives for the texts "query" and "document"."""
    from batch_rerank.engine.reference import render

    before, left, right, after = render(template, "query", "document", instruction)
    return [*before, left + right, *after]


def _head(spec: ModelSpec, network: "PreTrainedModel", reference: "Reference") -> Findings:
    """The rows that score: neither constant nor, of a causal model, alike."""
    import torch

    if spec.kind == "causal":
        answers = [found[0] for found in reference.answers()]
        rows = network.get_output_embeddings().weight[answers].float()  # type: ignore[no-untyped-call]
        rows = torch.cat([rows, rows[:1] - rows[1:]])
    else:
        linear = [module for module in network.modules() if isinstance(module, torch.nn.Linear)]
        rows = next(layer for layer in reversed(linear) if layer.out_features == spec.labels).weight.float()
        rows = torch.cat([rows, rows[1:] - rows[:1]])
    norms = ", ".join(f"{norm:.3g}" for norm in rows.norm(dim=1).tolist())
    varied = bool((rows.amax(1) > rows.amin(1)).all() and rows.isfinite().all())
    return [Check("head", varied, f"rows of {rows.shape[1]} weights with norm {norms}{'' if varied else ': constant'}")]


def _tokens(spec: ModelSpec, encoder: Encoder, reference: "Reference") -> Findings:
    """Our encoder, which splits and shares, against whole strings; long texts show where it cuts."""
    long = " ".join(PLANETS.documents) * (1 + spec.max_length // 32)
    groups = [*(Group(query, PROBES) for query in PROBES[:6]), Group("a", ["b", long])]
    if spec.causal is None or not _query_is_last(spec.causal):  # that one cuts what no model should be asked
        groups.append(Group(long, ["b"]))
    encoded = encoder.encode(groups)
    texts = [(group.query, document) for group in groups for document in group.documents]
    for pair, (query, document) in enumerate(texts):
        expected = [tokens.ids for tokens in reference.read(query, document)]
        found = _sequences(spec, encoded, pair)
        if found != expected:
            seen = f"{query[:40]!r} and {document[:40]!r} give {_around(found, expected)}"
            return [Check("tokens", False, seen)]
        if spec.causal is None and any(ids[-1] == ids[-2] for ids in found if (query, document) == ("a", "b")):
            return [Check("tokens", False, f"a sequence ends with token {found[-1][-1]} twice: {found[-1]}")]
    return [Check("tokens", True, f"{len(texts)} probe pairs have the ids of the whole strings")]


def _query_is_last(template: CausalTemplate) -> bool:
    whole = "".join(template.middle)
    return whole.index("{document}") < whole.index("{query}")


def _sequences(spec: ModelSpec, encoded: Encoded, pair: int) -> list[list[int]]:
    prefix = encoded.segment(int(prefix_of(encoded, np.array([pair]))[0])).tolist()
    own = own_tokens(encoded, np.array([pair]))[0].tolist()
    return [prefix, own] if spec.kind == "bi_encoder" else [prefix + own]


def _around(found: list[list[int]], expected: list[list[int]]) -> str:
    """Where two lists of sequences differ first."""
    ours, theirs = next((a, b) for a, b in zip(found, expected, strict=True) if a != b)
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    near = slice(max(0, at - 2), at + 3)
    return f"{len(ours)} ids with {ours[near]} at {at}; expected {len(theirs)} with {theirs[near]}"


def _canaries(
    spec: ModelSpec,
    encoder: Encoder,
    scorer: Scorer,
    reference: "Reference",
    measured: list[tuple[float, Limits]],
) -> Findings:
    """The canaries on both paths, and on the fast one in another order and other packs. Fills `measured` with
    the largest difference of the two paths and what is allowed."""
    tried = canaries(reference.tokenizer, spec.max_length)
    encoded = encoder.encode(tried.groups)
    fast = scorer.score(encoded)
    split = scorer.under(few_tokens(encoded)).score(encoder.encode(tried.turned()))[::-1]
    held = ~np.isnan(fast)
    slow = reference.scores(tried.judged_texts())
    held[:-1] &= ~np.isnan(split)
    judged, slow = tried.judged[held[tried.judged]], slow[held[tried.judged]]
    if not len(judged):
        return [Check("canaries", False, "nothing fits into the device's memory")]
    found: Findings = [] if held.all() else [f"{np.count_nonzero(~held)} canaries that do not fit into memory"]
    fault = suspect(spec, fast[held])
    alike = distinct_sequences(encoded) < FEWEST_CANARIES
    spread = None if alike or suspect(spec, slow) else float(slow.std())
    allowed, group = limits(spec, spread), encoded.group_of_pair()[judged]
    measured.append((max(np.abs(fast[judged] - slow).tolist()), allowed))
    agree, seen = allowed.judge(fast[judged], slow)
    if spec.dtype == "float8" and spread:
        seen += f"; float8: {moved(fast[judged], slow, group)}"
    found.append(Check("canaries", agree, f"{len(judged)} pairs differ from the slow float32 path by {seen}"))
    both = held[: len(split)]
    same, seen = allowed.judge(split[both], fast[: len(split)][both])
    found.append(Check("packs", same, f"{len(split)} pairs in other packs and reverse order differ by {seen}"))
    if alike:
        return [*found, f"order and spread of the scores: max_length {spec.max_length} leaves the canaries alike"]
    if not (fault or suspect(spec, slow)):
        found.append(Check("order", *order(fast[judged], slow, group, allowed)))
    return [*found, Check("spread", fault is None, fault or f"scores from {slow.min():.4g} to {slow.max():.4g}")]


def _golden(spec: ModelSpec, encoder: Encoder, scorer: Scorer) -> Findings:
    golden = GOLDEN.get(spec.name)
    if golden is None or golden.template != spec.template:
        return [RIGHT_WEIGHTS]
    instruction = spec.causal.instruction if spec.causal else None
    encoded = encoder.encode([replace(PLANETS, instruction=instruction)])
    if encoded.truncated.any():
        return [f"the published scores of {spec.name}: max_length {spec.max_length} cuts their texts"]
    # Published on other hardware. A wrong newline or id moves at least one of them by more than this
    allowed = Limits(0.01, 0.01, relative=False) if spec.dtype == "float32" else limits(spec, None)
    right, seen = allowed.judge(scorer.score(encoded), np.array(golden.scores, np.float32))
    return [Check("golden", right, f"{len(golden.scores)} published scores ({golden.source}) are missed by {seen}")]


def unit_fault(spec: ModelSpec, encoded: Encoded, scores: Float32, explained: Collection[int] = ()) -> str | None:
    """What is wrong with a unit's scores as a whole. None where nothing is, or where fewer than FEWEST of its sequences
    are distinct.

    scores: float32[n_pairs]; NaN where a pair did not fit into memory. explained: pairs that have no score for a reason
    of their own, which are not judged.
    """
    judged = np.delete(np.arange(len(scores)), sorted(explained))
    if spec.kind == "checksum" or len(judged) < FEWEST:
        return None
    scored = judged[~np.isnan(scores[judged])]
    seen = scored if len(scored) else judged
    fault = suspect(spec, scores[seen])
    if fault is None:
        return None
    distinct = distinct_sequences(encoded, seen)
    return f"{fault}, though {distinct} of its sequences are distinct" if distinct >= FEWEST else None


def suspect(spec: ModelSpec, scores: Float32) -> str | None:
    """What is wrong with the scores of different sequences if they are all NaN, equal or saturated, else None."""
    n = len(scores)
    if np.isnan(scores).any():
        return f"{np.count_nonzero(np.isnan(scores))} of {n} scores are NaN"
    if np.ptp(scores) <= 1e-6 * max(1.0, float(np.abs(scores).max())):  # batches differ in their last bits
        return f"all {n} scores are {scores[0]:.6g}"
    probabilities = relevance(spec, scores)
    if probabilities is not None and np.isin(probabilities, (0, 1)).all():
        return f"all {n} scores are saturated, from {scores.min():.4g} to {scores.max():.4g}"
    if spec.kind == "bi_encoder" and spec.normalize and scores.min() >= 1 - 1e-5:
        return f"all {n} cosines are 1"
    return None


def distinct_sequences(encoded: Encoded, pairs: npt.NDArray[np.int64] | None = None) -> int:
    """How many different sequences some pairs, or all, have after truncation."""
    chosen = np.arange(len(encoded.document)) if pairs is None else pairs
    prefixes = prefix_of(encoded, chosen)
    return len(
        {
            (encoded.segment(int(prefix)).tobytes(), own.tobytes())
            for prefix, own in zip(prefixes, own_tokens(encoded, chosen), strict=True)
        }
    )
