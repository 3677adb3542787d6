"""A small writer of figures: bars, steps and lanes as static SVG, with titles for those who do not see them.

Widths are shares of the page, so a figure fits any screen and its letters keep their size; heights are pixels. Colours
are classes of the style sheet, so a figure is dark where the page is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from batch_rerank.report.text import plain

Bin = tuple[float, float, float]
"""From, to, and how many or how much."""

TOP, BOTTOM = 18, 22
"""Pixels above and below what is drawn: room for a number and for the axis."""


@dataclass
class Svg:
    """A figure of some height with what is in it; words stand above all else. name: unique on its page."""

    name: str
    title: str
    description: str
    height: int
    parts: list[str] = field(default_factory=list)
    above: list[str] = field(default_factory=list)

    def rect(self, x: float, y: float, width: float, height: float, kind: str, tip: str = "") -> None:
        """Of x and width as shares of 1, y and height in pixels."""
        inner = f"<title>{plain(tip)}</title>" if tip else ""
        self.parts.append(
            f'<rect class="{kind}" x="{_percent(x)}" y="{y:.1f}" width="{_percent(width)}" height="{height:.1f}"'
            + (f">{inner}</rect>" if inner else "/>")
        )

    def rule(self, y: float, kind: str = "grid") -> None:
        """A line from side to side."""
        self.parts.append(f'<line class="{kind}" x1="0%" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>')

    def upright(self, x: float, y: float, height: float, kind: str = "mark") -> None:
        """A vertical line."""
        where = _percent(x)
        self.parts.append(f'<line class="{kind}" x1="{where}" x2="{where}" y1="{y:.1f}" y2="{y + height:.1f}"/>')

    def label(self, x: float, y: float, text: str, kind: str = "axis", anchor: str = "") -> None:
        """A few words; at the edges they stay inside."""
        anchor = anchor or ("start" if x < 0.04 else "end" if x > 0.96 else "middle")
        self.above.append(
            f'<text class="{kind}" x="{_percent(x)}" y="{y:.1f}" text-anchor="{anchor}">{plain(text)}</text>'
        )

    def steps(self, points: Sequence[Bin], y: float, height: float, most: float, kind: str) -> None:
        """An outline over neighbouring bins whose edges are shares of the width."""
        if not points or most <= 0:
            return
        path = [f"M{1000 * points[0][0]:.1f} {height:.1f}"]
        for start, stop, value in points:
            top = height * (1 - min(1.0, value / most))
            path.append(f"L{1000 * start:.1f} {top:.1f}H{1000 * stop:.1f}")
        path.append(f"V{height:.1f}")
        self.parts.append(
            f'<svg x="0" y="{y:.1f}" width="100%" height="{height:.1f}" viewBox="0 0 1000 {height:.1f}" '
            f'preserveAspectRatio="none"><path class="{kind}" d="{"".join(path)}"/></svg>'
        )

    def to_html(self) -> str:
        """As an element of a page."""
        return self._element('width="100%"')

    def to_file(self, width: int, style: str, keys: Sequence[tuple[str, str]] = ()) -> str:
        """As a file of its own, of some pixels, with its title and what its colours mean."""
        pad, head = 16, 30
        tall = self.height + head + 2 * pad
        key, at = [], width - pad
        for kind, words in reversed(keys):
            at -= 7 * len(words) + 22
            key.append(f'<rect class="{kind}" x="{at}" y="{pad}" width="12" height="9" rx="2"/>')
            key.append(f'<text x="{at + 16}" y="{pad + 9}">{plain(words)}</text>')
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{tall}" viewBox="0 0 {width} {tall}" '
            f'role="img" aria-label="{plain(self.title)}"><title>{plain(self.title)}</title>'
            f"<desc>{plain(self.description)}</desc><style>{style}</style>"
            f'<rect class="paper" x="0" y="0" width="100%" height="100%" rx="8"/>'
            f'<text class="value" x="{pad}" y="{pad + 10}">{plain(self.title)}</text>{"".join(key)}'
            f'<svg x="{pad}" y="{pad + head}" width="{width - 2 * pad}" height="{self.height}">'
            + "".join(self.parts + self.above)
            + "</svg></svg>\n"
        )

    def _element(self, width: str) -> str:
        told = f"{self.name}-t {self.name}-d"
        return (
            f'<svg role="img" aria-labelledby="{told}" {width} height="{self.height}">'
            f'<title id="{self.name}-t">{plain(self.title)}</title>'
            f'<desc id="{self.name}-d">{plain(self.description)}</desc>' + "".join(self.parts + self.above) + "</svg>"
        )


def bars(svg: Svg, bins: Sequence[Bin], most: float, tips: Sequence[str], kinds: Sequence[str] | str = "bar") -> None:
    """A bar a bin, the edges of bins as shares of the width, over the whole height but the axis."""
    room = svg.height - TOP - BOTTOM
    for number, ((start, stop, value), tip) in enumerate(zip(bins, tips, strict=True)):
        tall = room * value / most if most > 0 else 0.0
        if value > 0:
            tall = max(tall, 1.0)  # what is there is seen
        gap = min(0.0035, (stop - start) * 0.12)
        kind = kinds if isinstance(kinds, str) else kinds[number]
        svg.rect(start + gap / 2, TOP + room - tall, stop - start - gap, tall, kind, tip)
    svg.rule(TOP + room, "base")


def ceiling(value: float) -> float:
    """A round number that is not below."""
    if value <= 0:
        return 1.0
    size = 10.0 ** math.floor(math.log10(value))
    return next(step * size for step in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if step * size >= value * (1 - 1e-9))


def grid(svg: Svg, most: float, unit: str = "") -> None:
    """Two rules, at the top, which says what it stands for, and half way."""
    room = svg.height - TOP - BOTTOM
    for part in (0.5, 1.0):
        svg.rule(TOP + room * (1 - part))
    svg.label(0, TOP - 4, f"{_round(most)}{unit}", "axis", "start")


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers from low to high."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(one * size for one in (1, 2, 2.5, 5, 10) if one * size >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _round(value: float) -> str:
    for size, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size * (10 if sign == "k" else 1):
            return f"{value / size:g}{sign}"
    return f"{value:,.0f}" if value >= 100 else f"{value:g}"


def tick_label(value: float) -> str:
    """A tick in a few signs."""
    return f"{value:g}" if abs(value) < 1e5 else f"{value:.3g}"


def _percent(value: float) -> str:
    return f"{100 * value:.3f}".rstrip("0").rstrip(".") + "%"
