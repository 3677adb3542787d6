"""The labels of a job file: which scored documents become training data, for which trainer, in which layout and scale.

What can be wrong without looking at data is found here; what a scored output can not give is `labels/export.py`'s.
"""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from batch_rerank.sections import Place, Places, Section, StorageOptions, Written, as_list

LAYOUTS: dict[str, tuple[str, ...]] = {
    "sentence-transformers": ("listwise", "pairs", "margin", "n-tuple", "tables"),
    "flagembedding": ("lists",),
    "pylate": ("tables",),
    "tevatron": ("passages",),
    "lightning-ir": ("run",),
    "ms-swift": ("messages",),
    "trec": ("run",),
}
"""The targets, each with its layouts, the default first."""

Scale = Literal["auto", "logit", "probability", "minmax"]

SCALES: dict[tuple[str, str], Scale] = {
    ("sentence-transformers", "pairs"): "probability",  # of the default loss of a CrossEncoder, binary cross-entropy
    ("pylate", "tables"): "minmax",  # Distillation has normalize_scores=True, which brings the student's to 0..1
}
"""What `scale: auto` is, by target and layout; elsewhere logit. FlagEmbedding's softmax has no temperature, so it wants
logits; so do margins and every loss on lists."""

EQUAL_LISTS = (
    ("sentence-transformers", "n-tuple"),
    ("sentence-transformers", "tables"),
    ("pylate", "tables"),
)
"""Layouts whose readers need lists of one length: a query with fewer negatives has no place in them."""

WITHOUT_SCORES = (("ms-swift", "messages"),)
"""Layouts with binary labels only."""


class Positives(Section):
    """What a query's positives are. `from`: qrels, teacher, or both, judged ones first; auto is qrels where there are
    any. `qrels`: judgements, TREC or BEIR. `least`: the grade from which a judged document is relevant. `per_query`: at
    most, the best first. `floor`: the least score of the teacher's own."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, serialize_by_alias=True)

    from_: Literal["auto", "qrels", "teacher", "both"] = Field(default="auto", alias="from")
    qrels: Place | None = None
    least: Annotated[int, Field(ge=1)] = 1
    per_query: Annotated[int, Field(ge=1)] = 1
    floor: Annotated[float, Field(allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _judged(self) -> "Positives":
        if self.from_ in ("qrels", "both") and self.qrels is None:
            raise ValueError(f"from: found {self.from_!r}, which needs judgements; set qrels to a path")
        if self.from_ == "teacher" and self.qrels is not None:
            raise ValueError("qrels: not used with from: teacher; remove it, or set from to qrels or both")
        return self

    @property
    def source(self) -> Literal["qrels", "teacher", "both"]:
        """`from`, with auto decided."""
        if self.from_ != "auto":
            return self.from_
        return "teacher" if self.qrels is None else "qrels"


class Negatives(Section):
    """Which documents are drawn as negatives. `ranks`: first and last rank of the teacher's order that they are drawn
    from; the last may be null. `per_query`: at most. `least`: a query with fewer is left out; auto is 1, and
    `per_query` where a reader needs lists of one length."""

    ranks: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)] | None] = (10, 200)
    per_query: Annotated[int, Field(ge=1, le=100_000)] = 15
    least: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"

    @model_validator(mode="after")
    def _ordered(self) -> "Negatives":
        first, last = self.ranks
        if last is not None and last < first:
            raise ValueError(f"ranks: found [{first}, {last}]; expected the first rank, then the last")
        if self.least != "auto" and self.least > self.per_query:
            raise ValueError(f"least: {self.least} is above per_query {self.per_query}")
        return self


class FalseNegatives(Section):
    """What is too good to be a negative; without either key nothing is. `margin`: a score above the positive's minus
    this much, in log-odds. `share`: a probability above this share of the positive's."""

    margin: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    share: Annotated[float, Field(gt=0, le=1)] | None = None

    @model_validator(mode="after")
    def _one(self) -> "FalseNegatives":
        if self.margin is not None and self.share is not None:
            raise ValueError("margin, share: both are given; expected one of them")
        return self


class Teachers(Section):
    """Further outputs over the same candidates. `outputs`: their paths. `combine`: the mean over teachers of each
    query's z-scores, of its ranks, or of the scores as they are. `weights`: of the exported output, then of `outputs`.
    `max_disagreement`: a document above it is dropped; the standard deviation over teachers of its z-scores, or of its
    ranks as shares of the query's candidates. `max_missing`: share of the candidates that a teacher may lack."""

    outputs: Places
    combine: Literal["zscore", "rank", "mean"] = "zscore"
    weights: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = None
    max_disagreement: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    max_missing: Annotated[float, Field(ge=0, le=1)] = 0

    @property
    def places(self) -> list[str]:
        """`outputs` as a list."""
        return as_list(self.outputs)

    @model_validator(mode="after")
    def _weighed(self) -> "Teachers":
        if self.weights is not None and len(self.weights) != 1 + len(self.places):
            raise ValueError(
                f"weights: {len(self.weights)} of them for {1 + len(self.places)} teachers; expected one of the "
                "exported output, then one of each of outputs"
            )
        return self


class Labels(Section):
    """Training data out of a scored output. `to`: whose. `path`: where it goes. `layout`: of sentence-transformers;
    auto is its first. `scale`: of the labels; auto is what the reader expects. `positives`: which documents are the
    good ones. `negatives`: which are the others. `false_negatives`: which are neither. `teachers`: further outputs
    whose scores count too. `held_out`: share of the queries, by a hash of their text. `seed`: of what is drawn.
    `max_dropped_queries`: share of the queries that may be left out. `grades`: of trec, the teacher's order, or rising
    bounds of labels, each of which adds one. `file_bytes`: about how large a file becomes. `storage_options`: of
    `path`; those of the output if none."""

    to: str
    path: Written
    layout: str = "auto"
    scale: Scale = "auto"
    positives: Positives = Positives()
    negatives: Negatives = Negatives()
    false_negatives: FalseNegatives = FalseNegatives()
    teachers: Teachers | None = None
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.05
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    max_dropped_queries: Annotated[float, Field(ge=0, le=1)] = 0.5
    grades: Literal["order"] | Annotated[list[float], Field(min_length=1)] = "order"
    file_bytes: Annotated[int, Field(ge=1, le=2**30)] = 32 * 2**20
    storage_options: StorageOptions = Field(default={}, exclude=True)

    @model_validator(mode="after")
    def _known(self) -> "Labels":
        if self.to not in LAYOUTS:
            raise ValueError(f"to: found {self.to!r}; expected one of {', '.join(LAYOUTS)}")
        if self.layout not in ("auto", *LAYOUTS[self.to]):
            expected = ", ".join(LAYOUTS[self.to])
            raise ValueError(f"layout: found {self.layout!r}; {self.to} has {expected}")
        if self.grades != "order" and (self.to != "trec" or sorted(set(self.grades)) != self.grades):
            raise ValueError(f"grades: found {self.grades}; expected rising bounds of labels, of trec alone")
        if self.scale not in ("auto", "logit") and self.form in WITHOUT_SCORES:
            raise ValueError(f"scale: found {self.scale!r}; {self.to} has binary labels; remove the key")
        if self.form in EQUAL_LISTS and self.negatives.least not in ("auto", self.negatives.per_query):
            raise ValueError(
                f"negatives.least: found {self.negatives.least}; {self.to} reads lists of one length here, so each "
                f"query needs negatives.per_query of them ({self.negatives.per_query}); remove the key or lower that"
            )
        combined = self.teachers is not None
        if combined and (self.scale == "probability" or self.false_negatives.share is not None):
            raise ValueError(
                "scale: probability and false_negatives.share are of one model's scores, not of those of several "
                "teachers; use minmax, and false_negatives.margin"
            )
        return self

    @property
    def form(self) -> tuple[str, str]:
        """Target and layout, with auto decided."""
        return self.to, LAYOUTS[self.to][0] if self.layout == "auto" else self.layout

    @property
    def least(self) -> int:
        """Negatives without which a query is left out."""
        if self.negatives.least != "auto":
            return self.negatives.least
        return self.negatives.per_query if self.form in EQUAL_LISTS else 1
