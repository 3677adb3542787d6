"""The figures of a report, each out of a piece of report.json, with its numbers as a table under it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from batch_rerank.report.histograms import score_ticks
from batch_rerank.report.svg import BOTTOM, TOP, Bin, Svg, bars, ceiling, grid, tick_label
from batch_rerank.report.text import shown

Json = Mapping[str, Any]


@dataclass
class Figure:
    """A drawing, what its colours mean (class and words), and its numbers: a head and rows."""

    svg: Svg
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    keys: Sequence[tuple[str, str]] = field(default=())


def scores(content: Json, height: int = 220) -> Figure | None:
    """How the scores lie, and how an earlier output's did."""
    told = content.get("scores")
    if not told:
        return None
    low, width, counts = told["low"], told["width"], told["counts"]
    before = told.get("earlier")
    parts = [_shares(counts)] + ([_shares(before)] if before else [])
    most = ceiling(max(map(max, parts)))
    svg = Svg("scores", "Distribution of scores", _scores_said(told, content), height)
    grid(svg, most, " % of pairs")
    edges = _even(len(counts))
    tips = [
        f"{low + width * at:.4g} to {low + width * (at + 1):.4g}: {count:,.0f} pairs" for at, count in enumerate(counts)
    ]
    bars(svg, [(start, stop, value) for (start, stop), value in zip(edges, parts[0], strict=True)], most, tips)
    if before:
        line: list[Bin] = [(start, stop, value) for (start, stop), value in zip(edges, parts[1], strict=True)]
        svg.steps(line, TOP, height - TOP - BOTTOM, most, "then")
    for tick in score_ticks(told):
        svg.label((tick - low) / (width * len(counts)), height - 6, tick_label(tick))
    head = ["score from", "to", "pairs", *(["earlier"] if before else [])]
    rows = [
        [f"{low + width * at:.4g}", f"{low + width * (at + 1):.4g}", f"{count:,.0f}"]
        + ([f"{before[at]:,.0f}"] if before else [])
        for at, count in enumerate(counts)
    ]
    keys = (("bar", "this output"), ("then", "the earlier output")) if before else ()
    return Figure(svg, head, rows, keys)


def _scores_said(told: Json, content: Json) -> str:
    said = f"{told['count']:,} scores from {told['least']:.4g} to {told['most']:.4g}, half of them between "
    said += f"{told['lower']:.4g} and {told['upper']:.4g}, median {told['median']:.4g}."
    return said + (" The line is the earlier output." if told.get("earlier") else "")


def relevance(content: Json) -> Figure | None:
    """How the scores lie as relevance, 0 to 1."""
    counts = content.get("relevance")
    if not counts:
        return None
    svg = Svg("relevance", "Distribution of relevance", f"{sum(counts):,} pairs in 20 bins from 0 to 1.", 150)
    tips = [f"{at / 20:.2f} to {(at + 1) / 20:.2f}: {count:,} pairs" for at, count in enumerate(counts)]
    _soft_bars(svg, 20, counts, " % of pairs", tips)
    for part in (0, 0.25, 0.5, 0.75, 1):
        svg.label(part, 144, f"{part:g}")
    rows = [[f"{at / 20:.2f}", f"{(at + 1) / 20:.2f}", f"{count:,}"] for at, count in enumerate(counts)]
    return Figure(svg, ["relevance from", "to", "pairs"], rows)


def places(content: Json) -> Figure | None:
    """How many places candidates have lost, to the left, and gained, to the right."""
    told = content.get("places")
    if not told:
        return None
    total = max(1, sum(count for _, _, count in told))
    rose, fell = (sum(c for low, _, c in told if (low > 0 if up else low < 0)) for up in (True, False))
    said = f"{rose / total:.0%} of the candidates rose, {fell / total:.0%} fell, the others kept their place."
    svg = Svg("places", "Places gained and lost against the first stage", said, 190)
    values = [100 * count / total for _, _, count in told]
    most = ceiling(max(values))
    grid(svg, most, " % of candidates")
    edges = _even(len(told))
    kinds = ["up" if low > 0 else "down" if low < 0 else "still" for low, _, _ in told]
    tips = [f"{_moved(low, high)}: {count:,} candidates" for low, high, count in told]
    bars(svg, [(a, b, value) for (a, b), value in zip(edges, values, strict=True)], most, tips, kinds)
    middle = len(told) // 2
    svg.label((middle + 0.5) / len(told), 184, "0")
    for at in sorted({0, middle // 3, 2 * middle // 3}):
        if at < middle - 1:
            least, x = -told[at][1], (at + 0.5) / len(told)
            svg.label(x, 184, f"−{least:,}", anchor="start" if at == 0 else "")
            svg.label(1 - x, 184, f"+{least:,}", anchor="end" if at == 0 else "")
    rows = [[_moved(low, high), f"{count:,}"] for low, high, count in told]
    return Figure(svg, ["places", "candidates"], rows, (("down", "fell"), ("still", "stayed"), ("up", "rose")))


def _moved(low: int, high: int) -> str:
    if low == high == 0:
        return "the same place"
    near, far = sorted((abs(low), abs(high)))
    span = f"{near:,}" if near == far else f"{near:,} to {far:,}"
    return f"{'up' if low > 0 else 'down'} {span}"


def overlap(content: Json) -> Figure | None:
    """Of how many queries so many of the first ten were among the first stage's first ten."""
    counts = (content.get("agreement") or {}).get("overlap_counts")
    if not counts:
        return None
    svg = Svg("overlap", "Of the top 10, how many were in the first stage's top 10", f"{sum(counts):,} queries.", 190)
    tips = [f"{at} of 10: {count:,} queries" for at, count in enumerate(counts)]
    _soft_bars(svg, 11, counts, " % of queries", tips)
    for at in range(0, 11, 2):
        svg.label((at + 0.5) / 11, 184, str(at), anchor="middle")
    return Figure(svg, ["of 10", "queries"], [[str(at), f"{count:,}"] for at, count in enumerate(counts)])


def tokens(content: Json) -> Figure | None:
    """How many tokens the model read of a pair."""
    told = (content.get("tokens") or {}).get("bins")
    if not told:
        return None
    most_tokens = content["tokens"].get("max_length")
    said = f"From {told[0][0]:,} to {told[-1][1]:,} tokens; four bins an octave."
    svg = Svg("tokens", "Tokens of a pair", said, 190)
    values = _shares([count for _, _, count in told])
    most = ceiling(max(values))
    grid(svg, most, " % of pairs")
    tips = [f"{low:,} to {high:,} tokens: {count:,} pairs" for low, high, count in told]
    kinds = ["down" if most_tokens and high >= most_tokens else "bar" for _, high, _ in told]
    edges = _even(len(told))
    bars(svg, [(a, b, value) for (a, b), value in zip(edges, values, strict=True)], most, tips, kinds)
    step = max(1, -(-len(told) // 7))
    for at in range(0, len(told), step):
        svg.label(edges[at][0], 184, f"{told[at][0]:,}")
    rows = [[f"{low:,}", f"{high:,}", f"{count:,}"] for low, high, count in told]
    keys = (("down", f"reaches max_length, {most_tokens:,}"),) if most_tokens and "down" in kinds else ()
    return Figure(svg, ["tokens from", "to", "pairs"], rows, keys)


def rate(content: Json) -> Figure | None:
    """Pairs a second from the first unit to the last."""
    told = content.get("time")
    if not told:
        return None
    values = told["rate"]
    most = ceiling(max(values))
    gaps = f" {len(told['gaps'])} gaps in which nothing was scored are cut out." if told["gaps"] else ""
    said = f"From {told['start']} to {told['stop']}, {told['seconds']:,.0f} s of scoring.{gaps}"
    svg = Svg("rate", "Pairs scored a second over time", said, 170)
    grid(svg, most, " pairs/s")
    edges = _pairs(told["edges"])
    for run in _connected(edges, values):
        svg.steps(run, TOP, 170 - TOP - BOTTOM, most, "rate")
    svg.rule(170 - BOTTOM, "base")
    for mark in told["gap_marks"]:
        svg.upright(mark, TOP, 170 - TOP - BOTTOM)
    svg.label(0, 164, told["start"][11:16] + " UTC")
    svg.label(1, 164, told["stop"][11:16] + " UTC")
    rows = [
        [f"{100 * start:.1f} %", f"{100 * stop:.1f} %", f"{value:,.1f}"]
        for (start, stop), value in zip(edges, values, strict=True)
    ]
    return Figure(svg, ["from (of the time)", "to", "pairs/s"], rows)


def lane(number: int, actor: Json, edges: Sequence[float]) -> str:
    """When one actor scored, as a strip: the darker the busier."""
    svg = Svg(f"lane{number}", f"When {actor['name']} scored", "Darker is busier.", 14)
    svg.rect(0, 1, 1, 12, "lane")
    levels: list[tuple[float, float, int]] = []
    for (start, stop), busy in zip(_pairs(edges), actor["busy"], strict=True):
        level = round(4 * busy) if busy > 0.02 else 0
        if levels and levels[-1][2] == level and abs(levels[-1][1] - start) < 1e-6:
            levels[-1] = (levels[-1][0], stop, level)
        else:
            levels.append((start, stop, level))
    for start, stop, level in levels:
        if level or busy_between(actor, edges, start, stop):
            opacity = 0.25 + 0.1875 * level
            svg.parts.append(
                f'<rect class="bar" opacity="{opacity:.2f}" x="{100 * start:.3g}%" y="1" '
                f'width="{100 * (stop - start):.3g}%" height="12"/>'
            )
    return svg.to_html()


def busy_between(actor: Json, edges: Sequence[float], start: float, stop: float) -> bool:
    """Whether an actor scored at all in a stretch of the axis."""
    found = (
        busy for (low, high), busy in zip(_pairs(edges), actor["busy"], strict=True) if start <= low and high <= stop
    )
    return any(busy > 0.02 for busy in found)


STEPS = ("one", "two", "three", "four", "five", "six")


def steps(content: Json) -> Figure | None:
    """Where the time of all units went."""
    told = {name: value for name, value in (content.get("steps") or {}).items() if value > 0}
    total = sum(told.values())
    if not total:
        return None
    said = ", ".join(f"{name} {value:,.1f} s" for name, value in told.items())
    svg = Svg("steps", "Seconds of all units, step by step", f"{said}.", 26)
    at = 0.0
    for number, (name, value) in enumerate(told.items()):
        svg.rect(at, 3, value / total, 20, STEPS[number % len(STEPS)], f"{name}: {value:,.1f} s")
        at += value / total
    rows = [[shown(name), f"{value:,.1f}", f"{value / total:.1%}"] for name, value in told.items()]
    keys = [(STEPS[number % len(STEPS)], f"{name} {value:,.1f} s") for number, (name, value) in enumerate(told.items())]
    return Figure(svg, ["step", "seconds", "share"], rows, keys)


def _soft_bars(svg: Svg, bins: int, counts: Sequence[float], unit: str, tips: Sequence[str]) -> None:
    """Shares in so many bins of one width, with their grid."""
    values = _shares(counts)
    most = ceiling(max(values))
    grid(svg, most, unit)
    bars(svg, [(a, b, value) for (a, b), value in zip(_even(bins), values, strict=True)], most, tips, "soft")


def _shares(counts: Sequence[float]) -> list[float]:
    total = sum(counts)
    return [100 * count / total if total else 0.0 for count in counts]


def _even(number: int) -> list[tuple[float, float]]:
    return [(at / number, (at + 1) / number) for at in range(number)]


def _pairs(edges: Sequence[float]) -> list[tuple[float, float]]:
    return list(zip(edges[::2], edges[1::2], strict=True))


def _connected(edges: Sequence[tuple[float, float]], values: Sequence[float]) -> list[list[Bin]]:
    """Runs of slices that touch each other: a gap is between two."""
    runs: list[list[Bin]] = []
    for (start, stop), value in zip(edges, values, strict=True):
        if not runs or abs(runs[-1][-1][1] - start) > 1e-4:
            runs.append([])
        runs[-1].append((start, stop, value))
    return runs
