"""What a receipt keeps of its unit's distribution: counts in bins that are the same in every unit, job and version, so
that units add up and two nights can be laid over each other without reading a score again.

A number's bin is its sign and the first bits of its float32: bins of equal width in each octave, which serve cosines
and logits alike. They are fixed for ever; other ones would need another name in a receipt.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

MOST_BITS = 4
SMALLEST = -24
"""The exponent below which a number counts as zero."""


class Scale:
    """Bins of any finite number, 0 for what is nearly zero, negative below it. bits: the octave from 2^exponent on has
    2^bits bins of equal width, of which there are 1, 2, 4, 8 or 16."""

    def __init__(self, bits: Callable[[int], int]) -> None:
        table, lower = [], [0.0]
        for stored in range(255 << MOST_BITS):
            exponent, fraction = (stored >> MOST_BITS) - 127, stored & (1 << MOST_BITS) - 1
            if exponent >= SMALLEST and fraction % (1 << MOST_BITS >> bits(exponent)) == 0:
                lower.append(2.0**exponent * (1 + fraction / (1 << MOST_BITS)))
            table.append(len(lower) - 1)
        self._table = np.array(table, np.int64)
        self._lower = [*lower, float(np.finfo(np.float32).max)]

    @property
    def last(self) -> int:
        """The bin of the largest numbers."""
        return len(self._lower) - 2

    def of(self, values: npt.NDArray[np.floating] | npt.NDArray[np.integer]) -> Int64:
        """int64[n]: the bins of finite numbers."""
        plain = values.astype(np.float32)
        found: Int64 = self._table[np.abs(plain).view(np.uint32) >> np.uint32(23 - MOST_BITS)]
        np.negative(found, where=plain < 0, out=found)
        return found

    def edges(self, bin_: int) -> tuple[float, float]:
        """From where to where a bin reaches; bin 0 on both sides of zero."""
        first, last = self._lower[abs(bin_)], self._lower[abs(bin_) + 1]
        return (first, last) if bin_ > 0 else (-last, -first) if bin_ < 0 else (-last, last)


SCORES = Scale(lambda exponent: 4 if exponent >= -1 else 3 if exponent == -2 else 2)
TOKENS = Scale(lambda _: 2)
PLACES = Scale(lambda _: 1)
"""Of whole numbers: 0, 1, 2, 3, 4 to 5, 6 to 7, 8 to 11, …"""

RELEVANCE_BINS, OVERLAP_BINS, RBO_BINS = 20, 10, 20
"""Of values from 0 to 1, which have bins of equal width; the last one has 1 in it."""

LONGEST = 6000
"""Characters of a shape that are believed; ours are below 1,600."""


def equal_bins(values: npt.NDArray[np.floating], bins: int) -> Int64:
    """int64[n]: the bins of values from 0 to 1, all of one width."""
    return np.clip((values * bins).astype(np.int64), 0, bins - 1)


Counts = dict[int, int]
"""How many a bin has; bins with none are not in it."""


@dataclass(frozen=True)
class Mover:
    """A candidate that moved far: which row of its unit it is, its places from 1 in the first stage and by score, among
    the scored candidates of its query, and its score."""

    row: int
    before: int
    after: int
    score: float


@dataclass
class Shape:
    """Of one unit, or of many: the sums of any two add up.

    relevance, overlap (at 10, of queries with more than 10 candidates) and rbo (0.9, with
    two or more): bins of equal width; tokens: of each scored pair; places: how many places each candidate has gained,
    negative where it has lost. count, total, squares, least, most: of the scores; taus: queries of a sample with their
    Kendall's tau in tau_total. up, down: the candidate of a query that has gained, and lost, most places, a few queries
    a unit.
    """

    scores: Counts = field(default_factory=dict)
    relevance: Counts = field(default_factory=dict)
    tokens: Counts = field(default_factory=dict)
    places: Counts = field(default_factory=dict)
    overlap: Counts = field(default_factory=dict)
    overlap_total: float = 0.0
    rbo: Counts = field(default_factory=dict)
    rbo_total: float = 0.0
    taus: int = 0
    tau_total: float = 0.0
    count: int = 0
    total: float = 0.0
    squares: float = 0.0
    least: float = float("inf")
    most: float = float("-inf")
    up: tuple[Mover, ...] = ()
    down: tuple[Mover, ...] = ()

    def to_text(self) -> str:
        """As it lies in a receipt: `name=value` a field, those with nothing left out."""
        parts = [f"{name}={_runs(counts)}" for name in HISTOGRAMS if (counts := getattr(self, name))]
        if self.count:
            # with all digits: a narrow distribution's deviation is a small difference of them
            exact = f"{self.total:.17g},{self.squares:.17g}"
            parts.append(f"moments={self.count},{exact},{self.least:.9g},{self.most:.9g}")
        sums = (("overlaps", self.overlap, self.overlap_total), ("rbos", self.rbo, self.rbo_total))
        parts += [f"{name}={_g(total)}" for name, counts, total in sums if counts]
        if self.taus:
            parts.append(f"taus={self.taus},{_g(self.tau_total)}")
        for name, movers in (("up", self.up), ("down", self.down)):
            if movers:
                parts.append(f"{name}=" + "/".join(f"{m.row},{m.before},{m.after},{m.score:.9g}" for m in movers))
        return " ".join(parts)


HISTOGRAMS = ("scores", "relevance", "tokens", "places", "overlap", "rbo")


def from_text(text: str) -> Shape | None:
    """A unit's shape; None where the receipt has none, or none that this version understands."""
    if not text or len(text) > LONGEST:
        return None
    try:
        fields = dict(part.split("=", 1) for part in text.split(" "))
        count, *moments = fields["moments"].split(",") if "moments" in fields else ("0", "0", "0", "inf", "-inf")
        total, squares, least, most = map(float, moments)
        taus, tau_total = fields.get("taus", "0,0").split(",")
        return Shape(
            **{name: _unrun(fields.get(name, "")) for name in HISTOGRAMS},
            overlap_total=float(fields.get("overlaps", 0)),
            rbo_total=float(fields.get("rbos", 0)),
            taus=int(taus),
            tau_total=float(tau_total),
            count=int(count),
            total=total,
            squares=squares,
            least=least,
            most=most,
            up=_movers(fields.get("up", "")),
            down=_movers(fields.get("down", "")),
        )
    except (ValueError, KeyError, TypeError):
        return None


def together(shapes: Iterable[Shape]) -> Shape:
    """The sum of many; movers stay with their units."""
    counts: dict[str, Counter[int]] = {name: Counter() for name in HISTOGRAMS}
    made = Shape()
    for shape in shapes:
        for name in HISTOGRAMS:
            sums, more = counts[name], getattr(shape, name)
            for bin_, count in more.items():
                sums[bin_] += count
        for name in ("overlap_total", "rbo_total", "taus", "tau_total", "count", "total", "squares"):
            setattr(made, name, getattr(made, name) + getattr(shape, name))
        made.least, made.most = min(made.least, shape.least), max(made.most, shape.most)
    for name in HISTOGRAMS:
        setattr(made, name, dict(sorted(counts[name].items())))
    return made


def _runs(counts: Counts) -> str:
    """`first:count,count,…` a run of neighbours, with nothing for 0; runs are apart where that is shorter."""
    runs: list[str] = []
    last: int | None = None
    for bin_ in sorted(counts):
        if last is not None and bin_ - last <= 4:
            runs[-1] += "," * (bin_ - last) + str(counts[bin_])
        else:
            runs.append(f"{bin_}:{counts[bin_]}")
        last = bin_
    return "/".join(runs)


def _unrun(text: str) -> Counts:
    counts: Counts = {}
    for run in text.split("/") if text else ():
        first, _, listed = run.partition(":")
        for bin_, count in enumerate(listed.split(","), int(first)):
            if count:
                counts[bin_] = int(count)
    if counts:
        farthest = max(max(counts), -min(counts))
        if farthest > SCORES.last or min(counts.values()) < 0 or max(counts.values()) >= 2**48:
            raise ValueError("no counts of ours")
    return counts


def _movers(text: str) -> tuple[Mover, ...]:
    told = (one.split(",") for one in text.split("/")) if text else ()
    return tuple(Mover(int(row), int(before), int(after), float(score)) for row, before, after, score in told)


def _g(value: float) -> str:
    return f"{value:.7g}"
