"""A report card as Markdown and as a summary in the terminal; `m5.report` says what is in a card."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from m5.evaluation_report import LOG_WIDTH
from m5.metrics import SMALL_SLICE, SMALL_USERS
from m5.report_slices import METRICS, grouped

FEW = f"fewer than {SMALL_SLICE} requests or {SMALL_USERS} users"
INTERVAL = "95% intervals: 2.5 and 97.5 percentiles over {samples:,} bootstrap samples of users; coverage has none."
SMALL = f"\\* {FEW}: read its numbers with their intervals."
COLUMNS = (*METRICS, "coverage@10")

NO_BEHAVIOUR = "no behaviour: learned default"
INTEREST_HEAD = ("category", "last watched, newest first", "nearest titles, cosine", "nearest, less the viewers' mean")


def verdict(card: dict[str, Any]) -> str:
    """One sentence on the comparison."""
    against = card["against"]
    tested, worse = against["slices"], against["worse"]
    if not worse:
        return f"No slice is significantly worse than in {against['run']} ({len(tested)} tested together)."
    return f"Significantly worse than in {against['run']}: {', '.join(worse)} ({len(tested)} slices tested together)."


def comparison_rows(card: dict[str, Any]) -> list[list[str]]:
    """Of each slice: name, requests, NDCG@10 of the other run and of this one, difference, interval, p, verdict."""
    return [
        [
            starred(one["name"], one),
            f"{one['requests']:,}",
            f"{one['other']:.4f}",
            f"{one['run']:.4f}",
            f"{one['difference']:+.4f}",
            f"{one['interval'][0]:+.4f} to {one['interval'][1]:+.4f}",
            f"{one['adjusted_p']:.4f}",
            "worse" if one["worse"] else "",
        ]
        for one in card["against"]["slices"]
    ]


COMPARISON_HEAD = ("slice", "requests", "other", "this run", "difference", "95% interval", "adjusted p", "")
COMPARISON_NOTE = (
    "Difference of NDCG@10 at the same requests, this run minus the other; intervals are each slice's own. "
    "Significantly worse: p is one-sided, the larger of a bootstrap's and a randomisation test's over users, and at "
    "most 0.05 after Holm's adjustment for all slices, so that any wrong accusation has a chance of about 5% at most."
)


def starred(name: str, part: dict[str, Any]) -> str:
    """The slice's name, marked where it is small."""
    return f"{name} *" if part["small"] else name


def with_interval(part: dict[str, Any], metric: str) -> str:
    """0.1234 [0.1200, 0.1260], or the number alone where it has no interval."""
    interval = part["ci"].get(metric)
    return f"{part[metric]:.4f}" + (f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else "")


def facts(card: dict[str, Any]) -> dict[str, str]:
    """What was measured, by label."""
    settings, overall = card["settings"], card["slices"]["overall"]
    part = f", at most {settings['max_targets']:,} of its targets" if settings["max_targets"] else ""
    return {
        "run": card["run"],
        "checkpoint": f"step {card['checkpoint']['step']}, weights {card['checkpoint']['weights_sha256'][:12]}",
        "dataset": f"{card['dataset']['name']} ({card['dataset']['content_hash'][:12]}), test split{part}",
        "requests": f"{overall['n']:,} of {overall['users']:,} users",
        "candidates": "all titles that the viewer may play"
        + (", but for those watched before" if settings["filter_seen"] else ", those watched before too"),
    }


def interest_notes(model: dict[str, Any]) -> list[str]:
    """What the lists of titles are, and how much one viewer's differ from another's."""
    alike = ", ".join(f"{name} {value:.3f}" for name, value in model["alike"].items())
    notes = [
        "Of some viewers at a test request, as the model sees their recent history: the interest of each behaviour "
        "category in the ID branch, and the titles whose ID embeddings have the highest cosine with it. Titles never "
        "watched in training have no ID embedding and are not named. Recommendations mix all interests, so they are "
        "not these lists. ✓: among what the viewer has watched. A category without behaviour has a learned default "
        "interest, the same for every viewer.",
        "The last column tells what sets a viewer apart: nearest to the interest less the mean of the viewers who have "
        "behaviours of the category.",
    ]
    if alike:
        notes.append(
            f"Mean cosine between the interests of two viewers: {alike}. Near 1 all have the same nearest titles."
        )
    return notes


def markdown(card: dict[str, Any]) -> str:
    """The whole card."""
    parts = [f"# Report card of {_plain(card['name'])}", ""]
    parts += [f"- {label}: {_plain(value)}" for label, value in facts(card).items()]
    if card["against"] is not None:
        parts += ["", "## Against the other run", "", _plain(verdict(card)), ""]
        parts += [_markdown_table(COMPARISON_HEAD, comparison_rows(card)), "", COMPARISON_NOTE]
    parts += ["", "## Metrics by slice", ""]
    for names in grouped(card["slices"]).values():
        rows = [
            [starred(name, part), f"{part['n']:,}", *(with_interval(part, metric) for metric in COLUMNS)]
            for name in names
            for part in (card["slices"][name],)
        ]
        parts += [_markdown_table(("slice", "requests", *COLUMNS), rows), ""]
    parts += [INTERVAL.format(samples=card["settings"]["bootstrap"])]
    if any(part["small"] for part in card["slices"].values()):
        parts += ["", SMALL]
    parts += ["", *_markdown_model(card["model"])]
    if card["warnings"]:
        parts += ["", "## Warnings", "", *(f"- {_plain(warning)}" for warning in card["warnings"])]
    return "\n".join(parts) + "\n"


def _markdown_model(model: dict[str, Any]) -> list[str]:
    parts = ["## Expert use", ""]
    if not model["experts"]:
        parts += ["The mixing layer is a single perceptron (mlp): there are no experts to tell apart.", ""]
    for branch, use in model["experts"].items():
        rows = [[name, *(f"{weight:.3f}" for weight in load)] for name, load in use["load"].items()]
        head = (f"{branch} branch", *use["names"])
        parts += [_markdown_table(head, rows), ""]
    parts += ["## Gate weight of the ID branch", ""]
    if model["gate"] is None:
        parts += ["The model has no content branch, so nothing is weighed.", ""]
    else:
        parts += [_markdown_table(("slice", "w"), [[name, f"{w:.3f}"] for name, w in model["gate"].items()]), ""]
    parts += [f"Means over {model['requests']:,} test requests.", "", "## Interests and their nearest titles"]
    for note in interest_notes(model):
        parts += ["", _plain(note)]
    for viewer in model["viewers"]:
        parts += ["", f"Viewer {_plain(viewer['user'])} {_plain(viewer['scenario'])}".rstrip(), ""]
        rows = [
            [
                one["category"] + (f" ({NO_BEHAVIOUR})" if one["learned_default"] else ""),
                "; ".join(one["last_watched"]) or "-",
                *(
                    "; ".join(f"{t['title']} ({t['cosine']:.2f})" for t in one[kind]) or "-"
                    for kind in ("nearest", "apart")
                ),
            ]
            for one in viewer["interests"]
        ]
        parts.append(_markdown_table(INTEREST_HEAD, rows))
    return parts


def _markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_plain(cell) for cell in line)} |" for line in lines)


def _plain(text: str) -> str:
    """Names may hold what Markdown would read as a table, a tag or emphasis."""
    for mark in "\\|<`*[_":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())


def print_card(card: dict[str, Any], where: Path, console: Console | None = None) -> None:
    """A summary: metrics by slice, the comparison, warnings, and where the page is."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, LOG_WIDTH)
    for label, value in facts(card).items():
        console.print(f"{label}: {value}", markup=False, highlight=False)
    shown = ("ndcg@10", "hr@10", "hr@50", "hr@200", "debiased_hr@10", "coverage@10")
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("slice")
    for column in ("requests", "ndcg@10", "95% interval", *shown[1:]):
        table.add_column(column, justify="right", no_wrap=True)
    for names in grouped(card["slices"]).values():
        for name in names:
            part = card["slices"][name]
            low, high = part["ci"]["ndcg@10"]
            numbers = [f"{part[metric]:.4f}" for metric in shown]
            row = [f"{part['n']:,}", numbers[0], f"{low:.4f} to {high:.4f}", *numbers[1:]]
            table.add_row(escape(starred(name, part)), *row)
        table.add_section()
    console.print(table)
    if card["against"] is not None:
        table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
        for index, column in enumerate(COMPARISON_HEAD):
            table.add_column(column, justify="right" if index else "left", no_wrap=bool(index))
        for one, cells in zip(card["against"]["slices"], comparison_rows(card), strict=True):
            table.add_row(*map(escape, cells), style="red" if one["worse"] else "")
        console.print(f"NDCG@10 against {escape(card['against']['run'])}", style="italic", highlight=False)
        console.print(table)
        console.print(verdict(card), markup=False, highlight=False)
    for warning in card["warnings"]:
        console.print(f"note: {warning}", markup=False, highlight=False)
    console.print(f"report: {where}", markup=False, highlight=False, soft_wrap=True)
