"""Numbers and other people's texts as HTML: nothing of a text is markup, and nothing of it turns what stands beside it.

What a reader would not see, or would obey, is shown as an escape: control characters, lone surrogates, and the marks
that change the direction of writing. Every text is isolated (`<bdi>`), so that its own letters may run as they do.
"""

import html
import unicodedata
from collections.abc import Mapping

JOINERS = "\u200c\u200d"
"""Of Persian, Hindi and emoji: part of the writing."""

HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def shown(text: object, most: int = 0) -> str:
    """Any text as HTML, cut behind `most` characters where that is given. Line breaks and tabs stay."""
    whole = str(text)
    kept = whole[:most] if most and len(whole) > most else whole
    cut = f'<span class="esc">…&thinsp;{len(whole) - len(kept):,} more</span>' if len(kept) < len(whole) else ""
    return f"<bdi>{_escaped(kept)}{cut}</bdi>"


def _escaped(text: str) -> str:
    return "\n".join(html.escape(line) if line.isprintable() else _one_by_one(line) for line in text.split("\n"))


def _one_by_one(line: str) -> str:
    parts, hidden = [], ""
    for sign in line:
        if sign != "\t" and sign not in JOINERS and unicodedata.category(sign) in HIDDEN:
            hidden += _escape(sign)
            continue
        if hidden:
            parts.append(f'<span class="esc">{hidden}</span>')
            hidden = ""
        parts.append(html.escape(sign))
    if hidden:
        parts.append(f'<span class="esc">{hidden}</span>')
    return "".join(parts)


def _escape(sign: str) -> str:
    code = ord(sign)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"


def plain(text: object) -> str:
    """The same for an attribute or an SVG's title, where no element can be."""
    signs = (s if unicodedata.category(s) not in HIDDEN else _escape(s) for s in str(text))
    return html.escape("".join(signs))


def count(value: float | None) -> str:
    """A whole number; an em dash where it is unknown."""
    return "unknown" if value is None else f"{value:,.0f}"


def short(value: float | None) -> str:
    """A number in a few signs: 12.3 M."""
    if value is None:
        return "unknown"
    for size, sign in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e5, "k")):
        if abs(value) >= size:
            scaled = value / (1e3 if sign == "k" else size)
            return f"{scaled:.3g}&thinsp;{sign}" if abs(scaled) < 1000 else f"{scaled:,.0f}&thinsp;{sign}"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def figure(value: float | None, digits: int = 3) -> str:
    """A measured number."""
    return "unknown" if value is None else f"{value:,.{digits}f}"


def share(part: float | None, whole: float | None) -> str:
    """A percentage: never 0 % of something, never 100 % of less."""
    if part is None or not whole:
        return "unknown" if part is None else "–"
    percent = 100 * part / whole
    if part and percent < 0.01:
        return "&lt; 0.01&thinsp;%"
    if part < whole and percent > 99.99:
        return "&gt; 99.99&thinsp;%"
    return f"{percent:.2f}".rstrip("0").rstrip(".") + "&thinsp;%"


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours, as people say them."""
    if seconds is None:
        return "unknown"
    if seconds < 60:
        return f"{seconds:.2g}&thinsp;s" if seconds < 10 else f"{seconds:.0f}&thinsp;s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}&thinsp;min {rest}&thinsp;s" if rest else f"{minutes}&thinsp;min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}&thinsp;h {minutes:02d}&thinsp;min" if hours < 48 else f"{hours / 24:.1f}&thinsp;days"


def size(value: int | None) -> str:
    """Bytes."""
    if value is None:
        return "unknown"
    return f"{value:,} B" if value < 10_000 else f"{value / 1024:,.0f} KiB" if value < 2**20 * 10 else _mib(value)


def _mib(value: int) -> str:
    return f"{value / 2**20:,.0f}&thinsp;MiB"


def dig(content: Mapping[str, object], *names: str) -> object:
    """What lies under some keys, None where there is none."""
    found: object = content
    for name in names:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found
