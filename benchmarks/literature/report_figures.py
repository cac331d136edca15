"""What a comparison's report says, as numbers: means and spreads over seeds, who is first, where a system beats M5."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from m5.metrics import SMALL_USERS, small
from m5.report_slices import in_order

MEASURE = "ndcg@10"  # that systems are ordered and compared by
# Overall measures besides NDCG@10: label, slice, metric.
OTHERS = (
    ("HR@10", "overall", "hr@10"),
    ("HR@50", "overall", "hr@50"),
    ("HR@200", "overall", "hr@200"),
    ("MRR@10", "overall", "mrr@10"),
    ("coverage@10", "overall", "coverage@10"),
    ("debiased HR@10", "overall", "debiased_hr@10"),
    ("HR@50, cold titles", "cold", "hr@50"),
)
OVERRUN = 105  # percent of the time allowed, beyond which a system is named
COSTS = (
    ("seconds of a training", "train_seconds"),
    ("peak memory, MB", "peak_memory_mb"),
    ("ms a request", "query_ms"),
)


@dataclass(frozen=True)
class Row:
    """A system that has results."""

    record: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.record["name"])

    @property
    def label(self) -> str:
        """As the report prints it."""
        return "M5" if self.name == "m5" else self.name

    @property
    def runs(self) -> int:
        return len(self.record["seeds"])

    @property
    def ndcg(self) -> float:
        return self.mean(MEASURE)

    def mean(self, metric: str, part: str = "overall") -> float:
        """Over seeds; NaN where the slice has no requests."""
        if not self.requests(part):
            return math.nan
        return statistics.fmean(seed[part][metric] for seed in self.record["seeds"])

    def spread(self, metric: str, part: str = "overall") -> float | None:
        """Sample standard deviation over seeds; none of a single run."""
        if self.runs < 2 or not self.requests(part):
            return None
        return statistics.stdev(seed[part][metric] for seed in self.record["seeds"])

    def requests(self, part: str) -> int:
        return int(self.record["seeds"][0].get(part, {"n": 0})["n"])

    @property
    def head(self) -> float:
        """Share of list-of-ten places that the most watched titles take, mean over seeds."""
        return statistics.fmean(self.record["head"])

    def cost(self, name: str) -> float:
        return float(self.record["cost"][name])


@dataclass(frozen=True)
class Cell:
    """A system beside M5 in one slice, on NDCG@10; `better` is "m5", the system, or None where it is not clear.

    `low` and `high` are None where there is a single viewer.
    """

    row: Row
    part: str
    difference: float
    low: float | None
    high: float | None
    better: str | None

    @property
    def beats(self) -> bool:
        return self.better == self.row.name

    @property
    def ahead(self) -> bool:
        """Whether the system has the higher mean, but not clearly."""
        return self.difference < 0 and self.better is None


class Comparison:
    """A report's figures.

    Args:
        report: of `benchmarks.literature.compare.write`.

    Attributes:
        rows: systems with results, best NDCG@10 first, M5 before its equals.
        absent: records of systems that were skipped or failed.
        own: M5's row; None where it has no results.
        parts: slices that have requests: "overall", scenario values, "warm", "cold".
        scenarios: the scenario values among them.
    """

    def __init__(self, report: Mapping[str, Any]):
        self.report = report
        rows = [Row(record) for record in report["systems"] if "seeds" in record]
        self.rows = sorted(rows, key=lambda row: (-row.ndcg, row.name != "m5"))
        self.absent = [record for record in report["systems"] if "seeds" not in record]
        self.own = next((row for row in rows if row.name == "m5"), None)
        first = rows[0] if rows else None
        self.parts = [part for part in in_order(first.record["seeds"][0]) if first.requests(part)] if first else []
        self.scenarios = [part for part in self.parts if "=" in part]

    @property
    def others(self) -> list[Row]:
        return [row for row in self.rows if row is not self.own]

    @property
    def allowed_seconds(self) -> float:
        """Of one training on a seed."""
        setup = self.report["setup"]
        return float(setup["seconds"]) * 2 / 3 / setup["seeds"]

    @property
    def trial_seconds(self) -> float:
        """Allowed for one try of settings."""
        setup = self.report["setup"]
        return float(setup["seconds"]) / 3 / setup["trials"]

    def requests(self, part: str) -> int:
        return self.rows[0].requests(part) if self.rows else 0

    def small(self, part: str) -> bool:
        return small(self.requests(part), self.report.get("viewers", {}).get(part, SMALL_USERS))

    def cell(self, row: Row, part: str = "overall") -> Cell | None:
        """None for M5 itself, and where nothing was compared."""
        found = self.report["against_m5"].get(row.name, {}).get(part)
        if found is None:
            return None
        return Cell(row, part, found["difference"], found["low"], found["high"], found["better"])

    def cells(self) -> list[Cell]:
        """All systems in all slices."""
        return [cell for part in self.parts for row in self.others if (cell := self.cell(row, part)) is not None]

    def better_than_m5(self) -> list[tuple[str, float, list[tuple[Row, float]]]]:
        """Of each other measure: label, M5's value, the systems whose mean is better, best first."""
        if self.own is None:
            return []
        found = []
        for label, part, metric in OTHERS:
            if part in self.parts:
                own = self.own.mean(metric, part)
                better = [(row, row.mean(metric, part)) for row in self.others if row.mean(metric, part) > own]
                found.append((label, own, sorted(better, key=lambda one: -one[1])))
        for label, key in COSTS:
            own = self.own.cost(key)
            better = [(row, row.cost(key)) for row in self.others if row.cost(key) < own]
            found.append((label, own, sorted(better, key=lambda one: one[1])))
        return found


def number(value: float | None, digits: int = 4) -> str:
    """.1234: a share without its leading zero; a dash for what there is none of."""
    if value is None or math.isnan(value):
        return "—"
    text = f"{value:.{digits}f}"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def signed(value: float) -> str:
    """+.0123 or -.0123."""
    return ("+" if value >= 0 else "-") + number(abs(value))


def interval(cell: Cell) -> str:
    if cell.low is None or cell.high is None:
        return "one viewer, no interval"
    return f"{signed(cell.low)} to {signed(cell.high)}"


def verdict(comparison: Comparison) -> str:
    """Who is first on overall NDCG@10, by how much, and whether that is clear."""
    own, rows = comparison.own, comparison.rows
    if own is None:
        reason = next((reason_of(record) for record in comparison.absent if record["name"] == "m5"), "not run")
        first = f" Of the others {rows[0].label} is first with NDCG@10 {number(rows[0].ndcg)}." if rows else ""
        return f"M5 has no results here ({reason}), so nothing is compared with it.{first}"
    if len(rows) == 1:
        return f"M5 alone has results here (NDCG@10 {number(own.ndcg)}): there is nothing to compare it with."
    if rows[0] is own:
        other, place = rows[1], ""
        start = f"M5 is first on NDCG@10 over all requests with {number(own.ndcg)}, ahead of {other.label} "
        start += f"({number(other.ndcg)}) by {number(own.ndcg - other.ndcg)}"
    else:
        other = rows[0]
        start = f"M5 is not first on NDCG@10 over all requests: {other.label} is, with {number(other.ndcg)}, ahead of "
        start += f"M5 ({number(own.ndcg)}) by {number(other.ndcg - own.ndcg)}"
        place = f" M5 has place {rows.index(own) + 1} of {len(rows)}"
        clear = [row for row in rows[: rows.index(own)] if (cell := comparison.cell(row)) is not None and cell.beats]
        place += (
            f"; {len(clear)} of the {rows.index(own)} above it clearly ahead." if clear else "; none clearly ahead."
        )
    cell = comparison.cell(other)
    if cell is None:
        return f"{start}.{place}"
    holds = cell.low is not None and cell.high is not None and cell.low <= 0 <= cell.high
    unclear = "not clear, it holds 0" if holds else "not clear, too few viewers"
    clear_text = "clear" if cell.better is not None else unclear
    return f"{start} (95% interval of M5 less {other.label}: {interval(cell)}; {clear_text}).{place}"


def why_not_first(comparison: Comparison) -> list[str]:
    """Where M5's distance to the first system arises, as far as the figures tell; empty where M5 is first."""
    own, rows = comparison.own, comparison.rows
    if own is None or rows[0] is own:
        return []
    first, total, said = rows[0], comparison.requests("overall"), []
    parts = [
        f"{part} titles {signed(cell.difference * comparison.requests(part) / total)} ({signed(cell.difference)} on "
        f"{comparison.requests(part):,} requests)"
        for part in ("warm", "cold")
        if part in comparison.parts and (cell := comparison.cell(first, part)) is not None
    ]
    if parts:
        said.append(f"What adds up to M5 less {first.label}: {', '.join(parts)}.")
    scenarios = [cell for part in comparison.scenarios if (cell := comparison.cell(first, part)) is not None]
    if scenarios:
        worst, best = (choose(scenarios, key=lambda cell: cell.difference) for choose in (min, max))
        said.append(
            f"By scenario value it goes from {signed(worst.difference)} ({worst.part}) to {signed(best.difference)} "
            f"({best.part})."
        )
    times = [f"{row.label} {row.cost('train_seconds'):.1f} s" for row in (own, first)]
    more = " M5 used all of it: more time may help." if time_used(comparison, own) >= 0.9 else ""
    said.append(f"A training took {', '.join(times)}, of {comparison.allowed_seconds:.1f} s allowed.{more}")
    said.append("This says where the distance lies, not what causes it.")
    return said


def time_used(comparison: Comparison, row: Row) -> float:
    """Seconds of a training over those allowed; near 1 or above, the clock ended it and it may be undertrained."""
    return row.cost("train_seconds") / comparison.allowed_seconds


def overran(comparison: Comparison) -> list[str]:
    """Systems with a training, or a try of settings, of which the page prints more than OVERRUN percent."""
    said = []
    for row in comparison.rows:
        tried = max((trial["seconds"] / comparison.trial_seconds for trial in row.record["tuning"]), default=0.0)
        parts = (("", time_used(comparison, row)), (" in tuning", tried))
        over = [f"{100 * share:.0f}%{where}" for where, share in parts if round(100 * share) > OVERRUN]
        said += [f"{row.label} {' and '.join(over)}"] if over else []
    return said


def reason_of(record: Mapping[str, Any]) -> str:
    """ "skipped: ..." or "failed: ..."."""
    return next((f"{key}: {record[key]}" for key in ("skipped", "failed") if key in record), "no results")
