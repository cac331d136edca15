"""A report card as one HTML page without scripts; `m5.report` says what is in a card.

Bars are boxes of plain HTML, and not Plotly's: they keep the page small, and they bend to a phone and to a dark screen.
All text is escaped where it enters.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from string import Template
from typing import Any

from m5.report_slices import grouped
from m5.report_text import (
    COLUMNS,
    COMPARISON_HEAD,
    COMPARISON_NOTE,
    FEW,
    INTEREST_HEAD,
    INTERVAL,
    NO_BEHAVIOUR,
    comparison_rows,
    facts,
    interest_notes,
    starred,
    verdict,
    with_interval,
)

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root { color-scheme: light dark; --page: #fcfcfb; --text: #262c33; --pale: #5c6670; --line: #d9dee2; --bar: #6f9cc4;
  --small: #b4c2cf; --mark: #262c33; --bad: #b3402a; --tint: #f8e6e2; --track: #eef1f3; --whole: #16794f;
  --a0: #4a7ba6; --a1: #86b0d4; --a2: #d08a3e; --a3: #7a9c59; --a4: #9b6fa8; --a5: #c0708a; }
@media (prefers-color-scheme: dark) { :root { --page: #16191c; --text: #e3e6e8; --pale: #a0a9b1; --line: #363d44;
  --bar: #4a7ba6; --small: #47525d; --mark: #f2f4f5; --bad: #f08a74; --tint: #40241e; --track: #22272c;
  --whole: #4fbf8f; } }
body { margin: 0 auto; max-width: 1080px; padding: 20px 18px 60px; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 25px; margin: 8px 0 4px; overflow-wrap: anywhere; } h2 { font-size: 19px; margin: 40px 0 6px; }
h3 { font-size: 15px; margin: 18px 0 4px; overflow-wrap: anywhere; }
p { max-width: 75ch; margin: 6px 0 12px; } .note { color: var(--pale); } .bad { color: var(--bad); font-weight: 600; }
.verdict { font-size: 17px; } ul { padding-left: 20px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 18px; margin: 16px 0; }
dt { color: var(--pale); } dd { margin: 0; overflow-wrap: anywhere; min-width: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; margin: 8px 0 14px; }
th, td { padding: 4px 14px 4px 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; } th { vertical-align: bottom; }
td small { display: block; color: var(--pale); font-size: 11.5px; }
tr.worse td { background: var(--tint); } tr.group td { border-top: 2px solid var(--line); }
table.titles :is(th, td) { text-align: left; vertical-align: top; white-space: normal; min-width: 110px; }
.row { display: grid; grid-template-columns: minmax(90px, 170px) 1fr 120px; gap: 0 12px; align-items: center;
  font-size: 13.5px; margin: 3px 0; } .row > :first-child { overflow-wrap: anywhere; }
.row > :last-child { font-variant-numeric: tabular-nums; }
.track { position: relative; height: 16px; background: var(--track); border-radius: 2px; overflow: hidden;
  display: flex; }
.track i { position: absolute; top: 0; bottom: 0; } .track b { height: 100%; }
.bar { background: var(--bar); left: 0; } .bar.small { background: var(--small); }
.span { border: solid var(--mark); border-width: 0 1.5px; }
.span::after { content: ""; position: absolute; left: 0; right: 0; top: 50%; border-top: 1.5px solid var(--mark); }
.line { width: 0; border-left: 1.5px dashed var(--whole); } .dot { width: 7px; margin-left: -3.5px;
  background: var(--bar); } .worse .dot { background: var(--bad); }
.key { font-size: 13.5px; color: var(--pale); } .key span { margin-right: 14px; white-space: nowrap; }
.key i { display: inline-block; width: 11px; height: 11px; margin-right: 5px; border-radius: 2px; }
@media (max-width: 600px) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: 6px; }
  .row { grid-template-columns: 104px 1fr 56px; gap: 0 8px; font-size: 12.5px; } .row small { display: none; } }
</style>
</head>
<body>
$body
</body>
</html>
""")
COLOURS = 6  # --a0, --a1, ...
SMALL = f"* and pale bars: {FEW}; read these numbers with their intervals."


def page(card: dict[str, Any]) -> str:
    """The whole page."""
    title = f"Report card of {card['name']}"
    listed = "".join(f"<dt>{_text(label)}</dt><dd>{_text(value)}</dd>" for label, value in facts(card).items())
    sections = [
        f"<h1>{_text(title)}</h1>",
        _paragraph(verdict(card), "verdict bad" if card["against"]["worse"] else "verdict") if card["against"] else "",
        f"<dl>{listed}</dl>",
        _warnings(card["warnings"]),
        _comparison(card) if card["against"] else "",
        _chart(card, "ndcg@10"),
        _chart(card, "hr@50"),
        _metrics(card),
        _experts(card["model"]),
        _gate(card["model"]),
        _interests(card["model"]),
    ]
    return PAGE.substitute(title=_text(title), body="\n".join(part for part in sections if part))


def _text(text: str) -> str:
    return html.escape(text)


def _paragraph(text: str, kind: str = "note") -> str:
    return f'<p class="{kind}">{_text(text)}</p>'


def _warnings(warnings: Sequence[str]) -> str:
    if not warnings:
        return ""
    return "<h2>Warnings</h2><ul>" + "".join(f"<li>{_text(warning)}</li>" for warning in warnings) + "</ul>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], classes: Iterable[str], kind: str = "") -> str:
    """A table whose cells are HTML already."""
    heads = "".join(f"<th>{cell}</th>" for cell in head)
    lines = "\n".join(
        f'<tr class="{name}">{"".join(f"<td>{cell}</td>" for cell in row)}</tr>'
        for name, row in zip(classes, rows, strict=True)
    )
    return f'<div class="scroll"><table class="{kind}"><thead><tr>{heads}</tr></thead><tbody>\n{lines}\n</tbody>' + (
        "</table></div>"
    )


def _row(name: str, track: str, value: str, kind: str = "") -> str:
    """A line of a chart: name and value are text, the track is HTML."""
    return (
        f'<div class="row {kind}"><span>{_text(name)}</span><span class="track">{track}</span>'
        f"<span>{value}</span></div>"
    )


def large(parts: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those by which a chart is scaled: the wide intervals of small slices may leave it."""
    parts = list(parts)
    return [part for part in parts if not part["small"]] or parts


def _at(share: float) -> str:
    return f"{100 * min(1.0, max(0.0, share)):.2f}%"


def _span(low: float, high: float) -> str:
    """An interval, from and to a share of the track's width."""
    width = max(0.0, min(1.0, high) - max(0.0, low))
    return f'<i class="span" style="left: {_at(low)}; width: {_at(width)}"></i>'


def _chart(card: dict[str, Any], metric: str) -> str:
    """Bars with intervals, by group of slices; a dashed line where everybody is."""
    slices = card["slices"]
    longest = max(part["ci"][metric][1] for part in large(slices.values())) or 1.0
    whole = f'<i class="line" style="left: {_at(slices["overall"][metric] / longest)}"></i>'
    parts = [f"<h2>{_text(metric.upper())} by slice</h2>", _paragraph("Dashed: overall. Whiskers: 95% intervals.")]
    for group, names in grouped(slices).items():
        parts.append(f"<h3>{_text(group)}</h3>")
        for name in names:
            part = slices[name]
            low, high = part["ci"][metric]
            bar = f'<i class="bar{" small" if part["small"] else ""}" style="width: {_at(part[metric] / longest)}"></i>'
            value = f"{part[metric]:.4f} <small>n {part['n']:,}</small>"
            label = starred(name.partition("=")[2] or name, part)
            parts.append(_row(label, bar + whole + _span(low / longest, high / longest), value))
    if any(part["small"] for part in slices.values()):
        parts.append(_paragraph(SMALL))
    return "\n".join(parts)


def _metrics(card: dict[str, Any]) -> str:
    """Every metric of every slice."""
    rows, classes = [], []
    for names in grouped(card["slices"]).values():
        for name in names:
            part = card["slices"][name]
            cells = [
                with_interval(part, metric).replace(" [", "<small>[").replace("]", "]</small>") for metric in COLUMNS
            ]
            rows.append([_text(starred(name, part)), f"{part['n']:,}", f"{part['users']:,}", *cells])
            classes.append("group" if name == names[0] else "")
    text = (
        INTERVAL.format(samples=card["settings"]["bootstrap"]) + " Tenure is how many events a viewer had before the "
        "request. debiased_hr weighs hits against their title's popularity. Coverage is the share of the slice's "
        "candidates that stand in one of its lists."
    )
    head = ("slice", "requests", "users", *COLUMNS)
    return f"<h2>All metrics by slice</h2>{_paragraph(text)}{_table(head, rows, classes)}"


def _comparison(card: dict[str, Any]) -> str:
    """Differences as points with intervals around a line at 0, and as a table."""
    slices = card["against"]["slices"]
    reach = max(*(abs(end) for one in large(slices) for end in one["interval"]), 1e-9)
    zero = f'<i class="line" style="left: {_at(0.5)}"></i>'
    lines = []
    for one in slices:
        low, here, high = (
            (value / reach + 1) / 2 for value in (one["interval"][0], one["difference"], one["interval"][1])
        )
        dot = f'<i class="dot" style="left: {_at(here)}"></i>'
        value = f"{one['difference']:+.4f} <small>p {one['adjusted_p']:.3f}</small>"
        kind = "worse" if one["worse"] else ""
        lines.append(_row(starred(one["name"], one), zero + dot + _span(low, high), value, kind))
    rows = [[_text(cell) for cell in row] for row in comparison_rows(card)]
    classes = ["worse" if one["worse"] else "" for one in slices]
    return "\n".join(
        [
            f"<h2>NDCG@10 against {_text(card['against']['run'])}</h2>",
            _paragraph("Dashed: no difference. Left of it this run is worse, right of it better."),
            *lines,
            _table(COMPARISON_HEAD, rows, classes),
            _paragraph(COMPARISON_NOTE),
        ]
    )


def _experts(model: dict[str, Any]) -> str:
    """A bar per slice, cut into the experts' mean gate weights."""
    heading = "<h2>Expert use</h2>"
    if not model["experts"]:
        return heading + _paragraph("The mixing layer is a single perceptron (mlp): no experts to tell apart.")
    parts = [
        heading,
        _paragraph(
            f"Mean gate weight of each active expert over {model['requests']:,} test requests. All weight on one "
            "expert means that the mixture has collapsed; the same bar everywhere, that it tells no scenarios apart."
        ),
    ]
    for branch, use in model["experts"].items():
        names = use["names"]
        colours = [f"var(--a{index % COLOURS})" for index in range(len(names))]
        key = "".join(
            f'<span><i style="background: {colour}"></i>{_text(name)}</span>'
            for name, colour in zip(names, colours, strict=True)
        )
        parts += [f"<h3>{'ID' if branch == 'id' else 'content'} branch</h3>", f'<p class="key">{key}</p>']
        for name, load in use["load"].items():
            track = "".join(
                f'<b style="width: {_at(weight)}; background: {colour}" title="{_text(expert)} {weight:.3f}"></b>'
                for expert, weight, colour in zip(names, load, colours, strict=True)
            )
            parts.append(_row(name, track, ""))
        rows = [[_text(name), *(f"{weight:.3f}" for weight in load)] for name, load in use["load"].items()]
        parts.append(_table(("slice", *map(_text, names)), rows, [""] * len(rows)))
    return "\n".join(parts)


def _gate(model: dict[str, Any]) -> str:
    heading = "<h2>Gate weight of the ID branch</h2>"
    if model["gate"] is None:
        return heading + _paragraph("The model has no content branch, so nothing is weighed.")
    text = f"Mean w over {model['requests']:,} test requests: 1 trusts title ids alone, 0 their content alone."
    bars = [_row(name, f'<i class="bar" style="width: {_at(w)}"></i>', f"{w:.3f}") for name, w in model["gate"].items()]
    return "\n".join([heading, _paragraph(text), *bars])


def _interests(model: dict[str, Any]) -> str:
    """Per viewer a table: category, what they watched of it, what lies nearest to their interest."""
    parts = ["<h2>Interests and their nearest titles</h2>", *map(_paragraph, interest_notes(model))]
    for viewer in model["viewers"]:
        scenario = f" ({viewer['scenario']})" if viewer["scenario"] else ""
        parts.append(f"<h3>{_text('viewer ' + viewer['user'] + scenario)}</h3>")
        rows = []
        for one in viewer["interests"]:
            count = NO_BEHAVIOUR if one["learned_default"] else f"{one['behaviours']:,} watched"
            lists = ("<br>".join(_nearest(title) for title in one[kind]) or "—" for kind in ("nearest", "apart"))
            watched = "<br>".join(map(_text, one["last_watched"])) or "—"
            rows.append([f"{_text(one['category'])}<small>{count}</small>", watched, *lists])
        parts.append(_table(INTEREST_HEAD, rows, [""] * len(rows), "titles"))
    return "\n".join(parts)


def _nearest(title: dict[str, Any]) -> str:
    mark = " ✓" if title["watched"] else ""
    return f'{_text(title["title"])}{mark} <span class="note">{title["cosine"]:.2f}</span>'
