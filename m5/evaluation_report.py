"""Prints what `m5.evaluate` measured."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

OVERALL = ("hr@10", "ndcg@10", "mrr@10", "hr@50", "hr@200", "ndcg@200", "coverage@10", "debiased_hr@10")
LOG_WIDTH = 120  # of tables that go to a file, where rich would assume 80 columns and cut numbers


def print_report(report: dict[str, Any], console: Console | None = None) -> None:
    """Tables, a column for each row of the evaluation: metrics overall; NDCG@10 per slice; then warnings."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, LOG_WIDTH)
    models, settings = report["models"], report["settings"]
    first = next(iter(models.values()))
    seen = "seen titles filtered" if settings["filter_seen"] else "seen titles kept"
    requests = first["overall"]["n"]
    table = _table(models)
    for metric in OVERALL:
        table.add_row(metric, "", *(f"{model['overall'][metric]:.4f}" for model in models.values()))
        half = [_half_interval(model["overall"], metric) for model in models.values()]
        if any(half):
            table.add_row("  95% interval", "", *half, style="dim")
    # Above the table and not as its title, which would be wrapped to the width of a narrow table.
    console.print(f"{report['dataset']['name']}, {settings['split']}: {requests:,} requests, {seen}", style="italic")
    console.print(table)
    table = _table(models)
    for name in (*first["scenarios"], "warm", "cold"):
        metric = "hr@50" if name == "cold" else "ndcg@10"
        parts = [model["scenarios"].get(name) or model[name] for model in models.values()]
        table.add_row(name, f"{parts[0]['n']:,}", *(f"{part[metric]:.4f}" if part["n"] else "-" for part in parts))
    console.print("NDCG@10 by slice (HR@50 for cold titles)", style="italic")
    console.print(table)
    for warning in report["warnings"]:
        console.print(f"note: {warning}", markup=False, highlight=False)


def _table(models: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("")
    table.add_column("requests", justify="right")
    for name in models:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _half_interval(metrics: dict[str, Any], metric: str) -> str:
    """Half the width of a metric's 95% interval, "" where it has none."""
    interval = metrics["ci"].get(metric)
    return f"±{(interval[1] - interval[0]) / 2:.4f}" if interval else ""
