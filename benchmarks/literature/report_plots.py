"""Which figures the report of a comparison has; `plots` draws them."""

from __future__ import annotations

from benchmarks.literature.plots import Bar, Point, bars, scatter
from benchmarks.literature.report_document import Figure
from benchmarks.literature.report_figures import MEASURE, Comparison, Row, number

CLEAR, AHEAD = "▲", "△"  # beside a system's figure in a slice: clearly better than M5; ahead of it, not clearly
PANELS = 12  # of scenario values at most; the table has the others
SHORTEST = 1e-3  # seconds: what fits faster is drawn here


def mark(comparison: Comparison, row: Row, part: str) -> str:
    """Of a system in a slice: clearly better than M5, ahead of it, or neither."""
    cell = comparison.cell(row, part)
    return "" if cell is None else CLEAR if cell.beats else AHEAD if cell.ahead else ""


def quality_against_cost(comparison: Comparison) -> Figure:
    """Once for wide and once for narrow screens: scaled down, labels could not be read."""
    points = [
        Point(row.label, max(SHORTEST, row.cost("train_seconds")), row.ndcg, row is comparison.own)
        for row in comparison.rows
    ]
    title, names = "Quality against training cost", ("seconds of a training, logarithmic", "NDCG@10")
    clock = f"{comparison.allowed_seconds:.1f} s"
    level = (comparison.allowed_seconds, f"{clock} allowed")
    drawn = [
        f'<div class="{kind}">{scatter(title, points, *names, width=width, height=height, level=level)}</div>'
        for kind, width, height in (("wide", 860, 460), ("narrow", 370, 480))
    ]
    caption = (
        f"Mean over seeds. A training may take {clock}; points at the dashed line, or right of it, used it all. Higher "
        f"is better, further left is cheaper; what fits in less than {SHORTEST:g} s stands there. M5: the large point."
    )
    return Figure(drawn, caption)


def by_scenario(comparison: Comparison) -> Figure:
    """A panel of bars for each scenario value, systems in the order of the main table."""
    parts = sorted(comparison.scenarios, key=comparison.requests, reverse=True)[:PANELS]
    kept = [part for part in comparison.scenarios if part in parts]
    longest = max(row.mean(MEASURE, part) for part in kept for row in comparison.rows)
    drawn = []
    for part in kept:
        small = "*" if comparison.small(part) else ""
        entries = [
            _bar(comparison, row, row.mean(MEASURE, part), mark(comparison, row, part)) for row in comparison.rows
        ]
        drawn.append(bars(f"{part}{small} · {comparison.requests(part):,} requests", entries, longest=longest))
    rest = len(comparison.scenarios) - len(kept)
    more = f" The {rest} smallest scenario values are in the table alone." if rest else ""
    caption = f"NDCG@10, all panels on one scale. {CLEAR}: clearly better than M5; {AHEAD}: ahead, not clearly.{more}"
    return Figure(drawn, caption, "panels")


def cold(comparison: Comparison) -> Figure:
    rows = sorted(comparison.rows, key=lambda row: -row.mean("hr@50", "cold"))
    guess = 50 / comparison.report["dataset"]["titles"]
    entries = [_bar(comparison, row, row.mean("hr@50", "cold")) for row in rows]
    level = (guess, f"random order, at least {number(guess)}") if guess < 1 else None
    drawn = bars("HR@50 on cold titles", entries, level=level, width=420)
    return Figure([drawn], "Titles launched after the training period; mean over seeds.", "one")


def popularity(comparison: Comparison) -> Figure:
    rows = sorted(comparison.rows, key=lambda row: -row.head)
    targets = float(rows[0].record["head_of_targets"])
    entries = [_bar(comparison, row, row.head) for row in rows]
    level = (targets, f"of what was watched: {number(targets)}")
    drawn = bars("Share of list-of-ten places of the 10% most watched titles", entries, level=level, width=420)
    caption = "Right of the dashed line a system shows popular titles more often than viewers watched them."
    return Figure([drawn], caption, "one")


def _bar(comparison: Comparison, row: Row, value: float, sign: str = "") -> Bar:
    shown = f"{number(value)} {sign}".strip()
    return Bar(row.label, value, shown, row is comparison.own)
