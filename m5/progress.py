"""What a training run shows and writes: progress bar or plain lines, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

SECONDS_PER_LINE = 15.0  # where the output is not a terminal


class Clock(Protocol):
    def progress(self, step: int, seconds: float) -> float: ...


class Place(Protocol):
    """Where training is; `log` is what `TrainingLog.state` had returned when it was saved."""

    step: int
    epoch: int
    seconds: float
    log: dict[str, float]


class TrainingLog:
    """Progress and metrics of the first rank; the other ranks make one with `enabled=False`, which does nothing.

    Args:
        folder: the run; metrics.jsonl and tensorboard/ go there.
        enabled: False for all ranks but the first.
        schedule: knows what share of the run is over.
        position: where training begins; what metrics.jsonl and TensorBoard hold of later steps, which a killed process
            had taken, is removed.
    """

    def __init__(self, folder: Path, *, enabled: bool, schedule: Clock, position: Place):
        self.folder, self.enabled, self.schedule, self.position = Path(folder), enabled, schedule, position
        self.console = Console(file=sys.stderr)
        self.terminal = enabled and self.console.is_terminal

    def __enter__(self) -> TrainingLog:
        if not self.enabled:
            return self
        from torch.utils.tensorboard import SummaryWriter

        saved = self.position.log
        purge = self.position.step + 1 if saved else None
        self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=purge)
        self.lines = (self.folder / "metrics.jsonl").open("a")
        # Never longer than it is: after a power cut it may be shorter than what was counted.
        self.lines.truncate(min(int(saved.get("bytes", 0)), self.lines.tell()))
        self.lines.seek(0, os.SEEK_END)
        self.last_line = self.window_began = time.monotonic()
        self.began = self.last_line - self.position.seconds
        self.loss_sum, self.targets, self.window_targets = saved.get("loss_sum", 0.0), int(saved.get("targets", 0)), 0
        self.bar = None
        if self.terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
            self.bar = Progress(*columns, TimeElapsedColumn(), console=self.console)
            self.task = self.bar.add_task("training", total=1.0)
            self.bar.start()
        if saved:
            self._say(f"resumed at step {self.position.step}, epoch {self.position.epoch + 1}")
        return self

    def __exit__(self, *exception: object) -> None:
        if self.enabled:
            if self.bar is not None:
                self.bar.stop()
            self.lines.close()
            self.board.close()

    def _say(self, text: str) -> None:
        (self.bar.console if self.bar is not None else self.console).print(text, highlight=False, markup=False)

    def state(self) -> dict[str, float]:
        """What is written and what is counted, for a checkpoint."""
        if not self.enabled:
            return {}
        self.lines.flush()
        os.fsync(self.lines.fileno())
        return {"bytes": self.lines.tell(), "loss_sum": self.loss_sum, "targets": self.targets}

    def step(self, place: Place, loss: float, targets: int) -> None:
        """Count one step: `loss` is the sum over `targets` in nats."""
        if not self.enabled:
            return
        self.loss_sum, self.targets = self.loss_sum + loss, self.targets + targets
        self.window_targets += targets
        now = time.monotonic()
        over = self.schedule.progress(place.step, now - self.began)
        if self.bar is None and now - self.last_line < SECONDS_PER_LINE:
            return
        left = (now - self.began) * (1 - over) / max(over, 1e-9)
        rate = self.window_targets / max(now - self.window_began, 1e-9)
        text = (
            f"epoch {place.epoch + 1}  loss {self.loss_sum / max(self.targets, 1):.4f}  {rate:,.0f} targets/s  "
            f"{left / 60:.1f} min left"
        )
        if self.bar is not None:
            self.bar.update(self.task, completed=over, description=text)
            return
        self.last_line = now
        self._say(f"step {place.step}  {text}")

    def write(self, place: Place, numbers: dict[str, float]) -> None:
        """Append the mean loss since the last call, the speed and `numbers` to metrics.jsonl and TensorBoard."""
        if not self.enabled:
            return
        now = time.monotonic()
        values = {
            "loss": self.loss_sum / max(self.targets, 1),
            "targets_per_second": self.window_targets / max(now - self.window_began, 1e-9),
            **numbers,
        }
        self._record("train", place, values)
        self.loss_sum, self.targets, self.window_targets, self.window_began = 0.0, 0, 0, now

    def validation(self, place: Place, metrics: dict[str, float], improved: bool) -> None:
        if not self.enabled:
            return
        self._record("valid", place, metrics)
        shown = "  ".join(f"{key} {metrics[key]:.4f}" for key in ("hr@10", "ndcg@10", "hr@200") if key in metrics)
        when = f"epoch {place.epoch + 1}" if place.step else "to begin with"
        self._say(f"{when}  validation  {shown}{'  (best so far)' if improved else ''}")
        self.window_began, self.window_targets = time.monotonic(), 0

    def _record(self, kind: str, place: Place, values: dict[str, float]) -> None:
        line: dict[str, Any] = {
            "kind": kind,
            "step": place.step,
            "epoch": place.epoch,
            "seconds": round(time.monotonic() - self.began, 2),
            **values,
        }
        self.lines.write(json.dumps(line) + "\n")
        self.lines.flush()
        for key, value in values.items():
            self.board.add_scalar(f"{kind}/{key}", value, place.step)
