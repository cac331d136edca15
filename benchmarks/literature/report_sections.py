"""Text and tables of a comparison's report, section by section, as blocks of `report_document`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.literature import report_plots as plots
from benchmarks.literature.report_document import (
    Block,
    Bullets,
    Heading,
    Strong,
    Table,
    paragraph,
)
from benchmarks.literature.report_figures import (
    MEASURE,
    OVERRUN,
    Comparison,
    Row,
    interval,
    number,
    overran,
    reason_of,
    signed,
    time_used,
)
from m5.metrics import SMALL_SLICE, SMALL_USERS

RATING = ("lund-ng", "mu-wu", "siet")  # published for the prediction of ratings
SEARCH = "docs/results/2026-11-27-search.md"


def main_table(comparison: Comparison) -> list[Block]:
    columns = ("hr@10", "hr@50", "hr@200", "mrr@10", "coverage@10")
    names = [column.upper() if column != "coverage@10" else column for column in columns]
    rows = []
    for row in comparison.rows:
        cell = comparison.cell(row)
        against = ["—", "—"]
        if cell is not None:
            clear = {"m5": "M5 better", None: "not clear"}.get(cell.better, f"{row.label} better")
            against = [f"{signed(cell.difference)} ({interval(cell)})", clear]
        measured = [number(row.mean(column)) for column in columns]
        spread = number(row.spread(MEASURE))
        rows.append(_own(comparison, row, [row.label, number(row.ndcg), spread, *measured, *against]))
    table_head = ["system", "NDCG@10", "±", *names, "M5 less system (95%)", "clear?"]
    note = (
        "All requests; mean over seeds, best NDCG@10 first. ±: sample standard deviation over seeds, — with one run. "
        "Coverage is the share of candidates that stand in a list of ten of anyone."
    )
    return [
        Heading("All requests"),
        paragraph(note, kind="note"),
        Table(table_head, rows, _own_at(comparison)),
        plots.quality_against_cost(comparison),
    ]


def _own(comparison: Comparison, row: Row, cells: Sequence[str]) -> list[str]:
    return [Strong(cell) for cell in cells] if row is comparison.own else list(cells)


def _own_at(comparison: Comparison, rows: Sequence[Row] | None = None) -> int | None:
    rows = comparison.rows if rows is None else rows
    return next((index for index, row in enumerate(rows) if row is comparison.own), None)


def where_m5_is_beaten(comparison: Comparison) -> list[Block]:
    """Cells in which a system is clearly better, those where it is ahead, and measures besides NDCG@10."""
    own = comparison.own
    if own is None or not comparison.others:
        return []
    cells = comparison.cells()
    beaten, ahead = [cell for cell in cells if cell.beats], [cell for cell in cells if cell.ahead]
    blocks: list[Block] = [Heading("Where a system beats M5")]
    if beaten:
        rows = [
            [
                cell.row.label,
                _starred(comparison, cell.part),
                f"{comparison.requests(cell.part):,}",
                number(cell.row.mean(MEASURE, cell.part)),
                number(own.mean(MEASURE, cell.part)),
                f"{signed(cell.difference)} ({interval(cell)})",
            ]
            for cell in beaten
        ]
        note = f"Clearly better than M5 on NDCG@10 in {len(beaten)} of {len(cells)} cells:"
        table_head = ["system", "slice", "requests", "its NDCG@10", "M5's", "M5 less system (95%)"]
        blocks += [paragraph(note), Table(table_head, rows)]
    else:
        blocks.append(paragraph(f"Clearly, on NDCG@10: nowhere, in {len(cells)} cells."))
    if ahead:
        listed = [
            f"{row.label}: "
            + ", ".join(f"{_starred(comparison, cell.part)} ({signed(cell.difference)})" for cell in own_cells)
            for row in comparison.others
            if (own_cells := [cell for cell in ahead if cell.row is row])
        ]
        blocks += [paragraph("Higher mean than M5, not clearly (M5 less system):"), Bullets(listed)]
    else:
        blocks.append(paragraph("Higher mean without being clear: nowhere."))
    rows = [
        [label, _amount(label, value), ", ".join(f"{row.label} {_amount(label, one)}" for row, one in better) or "none"]
        for label, value, better in comparison.better_than_m5()
    ]
    text = "Better than M5 at other measures, by the mean alone and untested, best first:"
    return [
        *blocks,
        paragraph(text),
        Table(["measure", "M5", "better than M5"], rows, kind="long"),
        *_small(comparison),
    ]


def _amount(label: str, value: float) -> str:
    """A metric as .1234; seconds, memory and milliseconds with the digits that matter."""
    return number(value) if "@" in label else amount(value)


def amount(value: float) -> str:
    """Three significant digits, whole above 100."""
    if value >= 100:
        return f"{value:,.0f}"
    return "<0.001" if 0 < value < 0.001 else f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def _starred(comparison: Comparison, part: str) -> str:
    return f"{part}*" if comparison.small(part) else part


def _small(comparison: Comparison) -> list[Block]:
    if not any(map(comparison.small, comparison.parts)):
        return []
    few = f"* fewer than {SMALL_SLICE} requests or {SMALL_USERS} viewers: read its numbers with their intervals."
    return [paragraph(few, kind="note")]


def scenarios(comparison: Comparison) -> list[Block]:
    if not comparison.scenarios:
        return [Heading("By scenario"), paragraph("The dataset has no scenarios.")]
    names = [_starred(comparison, part) for part in comparison.scenarios]
    rows = [["requests", *(f"{comparison.requests(part):,}" for part in comparison.scenarios)]]
    for row in comparison.rows:
        cells = []
        for part in comparison.scenarios:
            sign = plots.mark(comparison, row, part)
            text = f"{number(row.mean(MEASURE, part))} {sign}".strip()
            cells.append(Strong(text) if sign == plots.CLEAR else text)
        rows.append(_own(comparison, row, [row.label, *cells]))
    own = _own_at(comparison)
    note = f"NDCG@10. {plots.CLEAR} and bold: clearly better than M5. {plots.AHEAD}: ahead of M5, not clearly."
    return [
        Heading("By scenario"),
        paragraph(note, kind="note"),
        Table(["system", *names], rows, None if own is None else own + 1),
        *_small(comparison),
        plots.by_scenario(comparison),
    ]


def cold_titles(comparison: Comparison) -> list[Block]:
    if "cold" not in comparison.parts:
        return [
            Heading("Cold titles"),
            paragraph("No test request asks for a title launched after the training period."),
        ]
    rows = sorted(comparison.rows, key=lambda row: -row.mean("hr@50", "cold"))
    warm = "warm" in comparison.parts
    table = []
    for row in rows:
        cells = [row.label, number(row.mean("hr@50", "cold")), number(row.spread("hr@50", "cold"))]
        cells += [number(row.mean(MEASURE, "cold")), number(row.mean(MEASURE, "warm") if warm else None)]
        table.append(_own(comparison, row, cells))
    guess = 50 / comparison.report["dataset"]["titles"]
    note = (
        f"Cold titles were launched after the training period: {comparison.requests('cold'):,} requests ask for one. A "
        "system that knows titles by their watches alone cannot rank them. A random order would reach HR@50 of at "
        f"least {number(min(1.0, guess))} (50 of all titles; rights leave fewer to choose from)."
    )
    table_head = ["system", "HR@50, cold", "± over seeds", "NDCG@10, cold", "NDCG@10, warm"]
    own = _own_at(comparison, rows)
    return [Heading("Cold titles"), paragraph(note), Table(table_head, table, own), plots.cold(comparison)]


def popularity(comparison: Comparison) -> list[Block]:
    rows = sorted(comparison.rows, key=lambda row: -row.head)
    targets = number(float(rows[0].record["head_of_targets"]))
    table = [
        _own(
            comparison,
            row,
            [
                row.label,
                number(row.head),
                *(number(row.mean(name)) for name in ("coverage@10", "debiased_hr@10", "hr@10")),
            ],
        )
        for row in rows
    ]
    note = (
        "Share of all places in lists of ten that the 10% most watched titles of the training period take. Of what "
        f"viewers watched in the test period it is {targets}. "
        "Debiased HR@10 weighs a hit against its title's popularity."
    )
    table_head = ["system", "share of the head", "coverage@10", "debiased HR@10", "HR@10"]
    own = _own_at(comparison, rows)
    return [Heading("Popularity bias"), paragraph(note), Table(table_head, table, own), plots.popularity(comparison)]


def cost(comparison: Comparison) -> list[Block]:
    rows = []
    for row in comparison.rows:
        parameters = row.record["cost"]["parameters"]
        costs = [amount(row.cost(key)) for key in ("train_seconds", "tuning_seconds", "peak_memory_mb", "query_ms")]
        used = f"{100 * time_used(comparison, row):.0f}%"
        cells = [row.label, costs[0], used, *costs[1:], f"{parameters:,}" if parameters is not None else "—"]
        rows.append(_own(comparison, row, cells))
    note = (
        f"Seconds of one training, mean over seeds; {comparison.allowed_seconds:.1f} were allowed. From about 90% on "
        "the clock probably ended a training, and it may be undertrained. What is built before and after counts too, "
        f"so that more than 100% is possible; above {OVERRUN}%: {', '.join(overran(comparison)) or 'none'}; a try of "
        f"settings had {comparison.trial_seconds:.1f} s. Parameters: numbers learned and kept. Memory is the peak "
        "of the system's process, libraries and data included. A request is scored against all titles, in a batch "
        "of 256. Systems ran beside each other, so times are rough."
    )
    table_head = [
        "system",
        "training, s",
        "of the time allowed",
        "tuning, s",
        "peak memory, MB",
        "ms a request",
        "parameters",
    ]
    return [Heading("Cost"), paragraph(note), Table(table_head, rows, _own_at(comparison))]


def systems(comparison: Comparison) -> list[Block]:
    """What each is, where it comes from, what was tried; reasons of those without results."""
    records = [row.record for row in comparison.rows]
    about = [
        [
            _name(record),
            *(str(record.get(key, "—")) for key in ("title", "source", "built_on", "departures")),
        ]
        for record in [*records, *comparison.absent]
    ]
    tried = [
        [
            _name(record),
            number(trial["ndcg@10"]),
            amount(trial["seconds"]),
            f"failed: {trial['failed']}"
            if "failed" in trial
            else "chosen"
            if trial["settings"] == record["chosen"]
            else "",
            _settings(trial["settings"]),
        ]
        for record in records
        for trial in record["tuning"]
    ]
    about_head = ["system", "what", "source", "built on", "departures from the publication"]
    blocks: list[Block] = [Heading("Systems"), Table(about_head, about, kind="long")]
    if tried:
        tried_head = ["system", "validation NDCG@10", "seconds", "choice", "settings"]
        blocks += [Heading("Settings tried", 3), Table(tried_head, tried, kind="long")]
    if comparison.absent:
        reasons = [f"{record['name']}: {reason_of(record)}" for record in comparison.absent]
        blocks += [Heading("Skipped and failed", 3), Bullets(reasons)]
    return blocks


def _name(record: Mapping[str, Any]) -> str:
    return Strong("M5") if record["name"] == "m5" else str(record["name"])


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items()) or "nothing to set"


def limits(comparison: Comparison) -> list[Block]:
    """Warnings, notes on the data, and what the comparison cannot say."""
    dataset = comparison.report["dataset"]
    warned = dict.fromkeys(warning for row in comparison.rows for warning in row.record["warnings"])
    blocks: list[Block] = [Heading("Warnings, notes and limits")]
    if warned:
        blocks += [Heading("Warnings", 3), Bullets(list(warned))]
    if dataset["notes"]:
        blocks += [Heading("Notes on the dataset", 3), Bullets(list(dataset["notes"]))]
    here = " This dataset is the synthetic world, so that favours M5." if dataset["name"] == "synthetic" else ""
    said = [
        "Systems were trained within a bounded time on a CPU. The publications' own data, hardware and figures are not "
        "reproduced here.",
        "M5's presets and the settings tried for it were chosen with looks at validation data of the synthetic world "
        f"(among them a search of 20 trials, {SEARCH}) and of MovieLens-1M (a few one-epoch trials); the other "
        f"systems' settings with a few tries on the same validation data. M5 had more of them.{here}",
    ]
    if dataset["name"] == "synthetic":
        said.append(
            "The synthetic world was made for this project. Its viewers follow scenarios, interests and rights, which "
            "M5 has parts for; a real service may not."
        )
    present = [record["name"] for record in comparison.report["systems"] if record["name"] in RATING]
    if present:
        said.append(
            f"Published for predicting ratings: {', '.join(present)}. In matching they are at a disadvantage; a loss "
            'of "softmax" among their settings is a departure that trains them to rank. The rating task has them as '
            "published: python -m benchmarks.literature.rating."
        )
    said.append(
        "One test period of one dataset: neither the intervals nor the seeds cover how other data would come out."
    )
    return [*blocks, Heading("Limits", 3), Bullets(said)]
