"""What a search shows while it runs: a live table in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tune.objective import Objective
from tune.records import TARGETS_PER_SECOND, Folder, Record

ROWS = 20  # of the table: what is running, then the best
STYLES = {"running": "bold", "finished": "", "stopped": "dim", "failed": "red", "waiting": "dim"}
AGAIN = ("failed", "waiting")  # a waiting trial with a reason is begun again


def shown(value: Any) -> str:
    """A setting's value in few characters."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def settings_of(record: Record) -> str:
    return "  ".join(f"{name.rpartition('.')[2]}={shown(value)}" for name, value in record.values.items())


class LiveTable:
    """Context in which `changed` shows what has become of a record.

    Args:
        folder: where records are.
        objective: of the search.
        trials: how many there will be.
    """

    def __init__(self, folder: Folder, objective: Objective, trials: int):
        self.folder, self.objective, self.trials = folder, objective, trials
        self.console = Console(file=sys.stderr)
        self.began = time.monotonic()
        self.told: dict[str, str] = {}
        self.live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None

    def __enter__(self) -> LiveTable:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.live is not None:
            self.live.update(self.table(), refresh=True)
            self.live.stop()

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def changed(self, record: Record) -> None:
        if self.live is not None:
            self.live.update(self.table(), refresh=True)
            return
        news = f"{record.status} {record.attempts} {len(record.reasons)}"
        if self.told.get(record.name) != news:
            self.told[record.name] = news
            self.say(self.line(record))

    def line(self, record: Record) -> str:
        """News of one trial."""
        parts = [f"[{time.monotonic() - self.began:5.0f} s] {record.name}  {record.status}"]
        best = record.best(self.objective.metric)
        if record.status == "running":
            parts.append(settings_of(record) if record.attempts == 1 else f"attempt {record.attempts}")
        elif record.reasons and record.status in AGAIN:
            parts.append(f"attempt {record.attempts}: {record.reasons[-1]}")
        elif best is not None:
            last = int(record.history[-1]["epoch"]) + 1
            parts.append(f"{self.objective.metric} {best[self.objective.metric]:.4f}  after {last} epochs")
        return "  ".join(parts)

    def table(self) -> Group:
        metric = self.objective.metric
        records = list(self.folder.records.values())
        table = Table(box=None, pad_edge=False, expand=True)
        for title, justify in (("trial", "left"), ("status", "left"), ("epoch", "right"), (metric, "right")):
            table.add_column(title, justify=justify, no_wrap=True)  # type: ignore[arg-type]
        table.add_column("targets/s", justify="right", no_wrap=True)
        table.add_column("settings, or why it failed", overflow="ellipsis", no_wrap=True, ratio=1)
        for record in sorted(records, key=self._place)[:ROWS]:
            best = record.best(metric)
            table.add_row(
                record.name,
                record.status,
                str(int(record.history[-1]["epoch"]) + 1) if record.history else "",
                f"{best[metric]:.4f}" if best else "",
                f"{best[TARGETS_PER_SECOND]:,.0f}" if best else "",
                # As text: what an exception has said may look like rich's markup.
                Text(record.reasons[-1] if record.status in AGAIN and record.reasons else settings_of(record)),
                style=STYLES[record.status],
            )
        ended = sum(record.ended for record in self.folder.of("search"))
        head = f"{ended} of {self.trials} trials ended, {time.monotonic() - self.began:.0f} s"
        if len(records) > ROWS:
            head += f"; the {ROWS} that run or are best are shown"
        return Group(Text(head), table)

    def _place(self, record: Record) -> tuple[bool, float]:
        best = record.best(self.objective.metric)
        return record.status != "running", -best[self.objective.metric] if best else 1.0
