"""Prints what `m5.evaluate` measured."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

OVERALL = ("hr@10", "ndcg@10", "mrr@10", "hr@50", "hr@200", "ndcg@200", "coverage@10", "debiased_hr@10")


def print_report(report: dict[str, Any], console: Console | None = None) -> None:
    """Tables: all rows overall; NDCG@10 of all rows per scenario value and for warm and cold titles; warnings."""
    console = console or Console()
    models, settings = report["models"], report["settings"]
    first = next(iter(models.values()))
    seen = "seen titles filtered" if settings["filter_seen"] else "seen titles kept"
    title = f"{report['dataset']['name']}, {settings['split']}: {first['overall']['n']:,} requests, {seen}"
    table = Table(title=title, title_justify="left")
    table.add_column("row")
    for metric in OVERALL:
        table.add_column(metric, justify="right")
    for name, metrics in models.items():
        table.add_row(name, *(_cell(metrics["overall"], metric) for metric in OVERALL))
    console.print(table)
    slices = {name: first["scenarios"][name]["n"] for name in first["scenarios"]}
    slices |= {name: first[name]["n"] for name in ("warm", "cold")}
    table = Table(title="NDCG@10 by slice (HR@50 for cold titles)", title_justify="left")
    table.add_column("slice")
    table.add_column("requests", justify="right")
    for name in models:
        table.add_column(name, justify="right")
    for name, requests in slices.items():
        metric = "hr@50" if name == "cold" else "ndcg@10"
        values = [(m["scenarios"].get(name) or m.get(name))[metric] for m in models.values()]
        table.add_row(name, f"{requests:,}", *(f"{value:.4f}" if requests else "-" for value in values))
    console.print(table)
    for warning in report["warnings"]:
        console.print(f"note: {warning}", markup=False, highlight=False)


def _cell(metrics: dict[str, Any], metric: str) -> str:
    """Value, with half the width of its 95% interval where there is one."""
    interval = metrics["ci"].get(metric)
    spread = f" ±{(interval[1] - interval[0]) / 2:.4f}" if interval else ""
    return f"{metrics[metric]:.4f}{spread}"
