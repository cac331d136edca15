"""A document of headings, paragraphs, lists, tables and figures, written once and rendered as Markdown and as HTML.

Text is plain and escaped when it is rendered. `Strong` and `Code` mark a piece of it.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from string import Template

from m5.report_page import PAGE

# On top of the report card's style, whose colours follow the reader's light or dark screen.
STYLE = """:root { --own: #b4561a; --point: #4a7ba6; }
@media (prefers-color-scheme: dark) { :root { --own: #f0a566; --point: #86b0d4; } }
tr.own td { background: var(--track); } table.long :is(th, td) { text-align: left; vertical-align: top;
  white-space: normal; min-width: 90px; } table.long td:last-child { min-width: 260px; }
code { overflow-wrap: anywhere; } figure { margin: 10px 0 18px; } figcaption { color: var(--pale); max-width: 75ch; }
svg { display: block; width: 100%; height: auto; font: 11px system-ui, -apple-system, "Segoe UI", sans-serif; }
svg text { fill: var(--text); paint-order: stroke; stroke: var(--page); stroke-width: 3px; }
svg .pale { fill: var(--pale); } svg .strong { font-weight: 700; fill: var(--own); }
svg .grid { stroke: var(--line); } svg .level { stroke: var(--text); stroke-dasharray: 4 3; }
svg .leader { stroke: var(--pale); stroke-width: .7; } svg .bar { fill: var(--bar); } svg .point { fill: var(--point); }
svg .own { fill: var(--own); }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(290px, 1fr)); gap: 14px 22px; }
.one { max-width: 540px; } li { max-width: 95ch; } th, td { padding-right: 12px; } .narrow { display: none; }
@media (max-width: 600px) { .wide { display: none; } .narrow { display: block; } }"""
LAYOUT = Template(PAGE.template.replace("</style>", STYLE + "\n</style>"))


class Strong(str):
    """Bold."""


class Code(str):
    """As typed."""


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Pieces that follow each other; `kind` is a class of the page's style."""

    pieces: Sequence[str]
    kind: str = "plain"


@dataclass(frozen=True)
class Bullets:
    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Rows of text; `own` is the number of M5's row, `kind` "long" where cells hold sentences."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    own: int | None = None
    kind: str = ""


@dataclass(frozen=True)
class Figure:
    """SVG, on the HTML page alone: a table beside it holds the numbers."""

    svg: Sequence[str]
    caption: str
    kind: str = ""


Block = Heading | Paragraph | Bullets | Table | Figure


def paragraph(*pieces: str, kind: str = "plain") -> Paragraph:
    return Paragraph(pieces, kind)


def markdown(title: str, blocks: Sequence[Block]) -> str:
    """The document as Markdown, without figures."""
    parts = [f"# {_escaped(title)}", *(_markdown_of(block) for block in blocks if not isinstance(block, Figure))]
    return "\n\n".join(parts) + "\n"


def _markdown_of(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_escaped(text)}"
        case Paragraph(pieces, _):
            return " ".join(map(_escaped, pieces))
        case Bullets(items):
            return "\n".join(f"- {_escaped(item)}" for item in items)
        case Table(head, rows, _, kind):
            sides = ["---"] + ["---" if kind == "long" else "---:"] * (len(head) - 1)
            cells = [[*map(_cell, head)], sides, *([*map(_cell, row)] for row in rows)]
            return "\n".join(f"| {' | '.join(row)} |" for row in cells)
        case Figure():
            return ""


def _cell(text: str) -> str:
    # A | ends a table's cell in a span of code, too, unless it is escaped.
    return _escaped(text).replace("|", "\\|") if isinstance(text, Code) else _escaped(text)


def _escaped(text: str) -> str:
    if isinstance(text, Code):
        # A span of code ends at its first backtick.
        return f"`{' '.join(text.split()).replace('`', chr(39))}`"
    plain = re.sub(r"([\\`*|\[\]])", r"\\\1", " ".join(text.split())).replace("<", "&lt;").replace(">", "&gt;")
    # Underscores inside a word, as in table_lr, mean nothing in Markdown.
    plain = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", plain)
    return f"**{plain}**" if isinstance(text, Strong) else plain


def page(title: str, blocks: Sequence[Block]) -> str:
    """The document as one HTML page that loads nothing."""
    body = "\n".join([f"<h1>{html.escape(title)}</h1>", *map(_html_of, blocks)])
    return LAYOUT.substitute(title=html.escape(title), body=body)


def _html_of(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Paragraph(pieces, kind):
            return f'<p class="{kind}">{" ".join(map(_marked, pieces))}</p>'
        case Bullets(items):
            return "<ul>" + "".join(f"<li>{_marked(item)}</li>" for item in items) + "</ul>"
        case Table():
            return _html_table(block)
        case Figure(svg, caption, kind):
            drawn = "\n".join(svg)
            return f'<figure><div class="{kind}">{drawn}</div><figcaption>{html.escape(caption)}</figcaption></figure>'


def _html_table(table: Table) -> str:
    heads = "".join(f'<th scope="col">{_marked(cell)}</th>' for cell in table.head)
    lines = [
        f"<tr{' class=own' if index == table.own else ''}>{''.join(f'<td>{_marked(cell)}</td>' for cell in row)}</tr>"
        for index, row in enumerate(table.rows)
    ]
    kind = f' class="{table.kind}"' if table.kind else ""
    body = "\n".join(lines)
    return f'<div class="scroll"><table{kind}><thead><tr>{heads}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _marked(text: str) -> str:
    tag = "strong" if isinstance(text, Strong) else "code" if isinstance(text, Code) else ""
    return f"<{tag}>{html.escape(text)}</{tag}>" if tag else html.escape(text)
