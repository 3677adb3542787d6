"""Pieces of a page: sections, cards, tables, and a figure with its key and its numbers."""

from collections.abc import Sequence

from batch_rerank.report.figures import Figure
from batch_rerank.report.text import plain

ROWS = 200
"""Of a table at most."""


def section(title: str, body: str) -> str:
    """A part of the page with its heading."""
    return f"<section><h2>{title}</h2>{body}</section>"


def card(title: str, body: str, kind: str = "") -> str:
    """A box."""
    heading = f"<h3>{title}</h3>" if title else ""
    return f'<div class="card{f" {kind}" if kind else ""}">{heading}{body}</div>'


def drawn(found: Figure | None) -> str:
    """A figure, what its colours mean, and its numbers for those who do not see it."""
    if found is None:
        return "<p>unknown</p>"
    keys = "".join(
        f'<span class="key"><svg aria-hidden="true"><rect class="{_swatch(kind)}" width="14" height="10" rx="2"/></svg>'
        f"{plain(words)}</span>"
        for kind, words in found.keys
    )
    caption = f"<figcaption>{keys}</figcaption>" if keys else ""
    numbers = f"<details><summary>Numbers</summary>{table(found.head, found.rows, numbers=len(found.head))}</details>"
    return f"<figure>{found.svg.to_html()}{caption}</figure>{numbers}"


def _swatch(kind: str) -> str:
    return "swatch" if kind == "then" else kind


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: int = 0) -> str:
    """A table whose cells are HTML already. numbers: how many of its last columns are."""
    plain_columns = len(head) - numbers

    def cell(at: int, value: str, kind: str) -> str:
        return f"<{kind}{' class=n' if at >= plain_columns else ''}>{value}</{kind}>"

    top = "".join(cell(at, name, "th") for at, name in enumerate(head))
    top = f"<thead><tr>{top}</tr></thead>" if any(head) else ""
    body = "".join(
        "<tr>" + "".join(cell(at, value, "td") for at, value in enumerate(row)) + "</tr>" for row in rows[:ROWS]
    )
    rest = f"<p>… and {len(rows) - ROWS:,} more.</p>" if len(rows) > ROWS else ""
    return f'<div class="scroll"><table>{top}<tbody>{body}</tbody></table></div>{rest}'
