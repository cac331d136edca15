"""The report of `m5 compare`: compare.md, and compare.html, which holds plots as well and loads nothing.

`report_figures` has the arithmetic, `report_head` and `report_sections` the text and the tables, `report_plots` the
figures and `report_document` the two renderings.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.literature import report_sections as sections
from benchmarks.literature.report_document import Block, markdown, page
from benchmarks.literature.report_figures import Comparison
from benchmarks.literature.report_head import head


def write_pages(report: Mapping[str, Any], out: Path) -> list[Path]:
    """OUT/compare.md and OUT/compare.html of a report as in compare.json; returns both paths."""
    comparison = Comparison(report)
    title = f"Systems of the literature beside M5 on {report['dataset']['name']}"
    blocks = document(comparison)
    written = []
    for name, text in (("compare.md", markdown(title, blocks)), ("compare.html", page(title, blocks))):
        temporary = out / f".{name}.writing"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(out / name)
        written.append(out / name)
    return written


def document(comparison: Comparison) -> list[Block]:
    """All of the report, in order; sections that need results are left out where there are none."""
    blocks = head(comparison)
    if comparison.rows:
        blocks += sections.main_table(comparison)
        blocks += sections.where_m5_is_beaten(comparison)
        blocks += sections.scenarios(comparison)
        blocks += sections.cold_titles(comparison)
        blocks += sections.popularity(comparison)
        blocks += sections.cost(comparison)
    return [*blocks, *sections.systems(comparison), *sections.limits(comparison)]
