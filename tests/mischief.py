"""A trainer for tests of searches: what goes wrong is chosen by a setting that changes little, the warm-up."""

from __future__ import annotations

import time
from typing import Any

from m5.data.loader import Loader
from m5.resume import Position
from m5.train import Schedule
from tune.trial import TrialTrainer

RAISES, HOGS, HANGS, ONCE, FINE = 1, 2, 3, 4, 5
BLOCK = 2**28  # bytes, filled, since memory that nobody has written is not there yet


class Mischief(TrialTrainer):
    def _steps(self, loader: Loader, schedule: Schedule, position: Position) -> Any:
        what = self.config.optimizer.warmup_steps
        mark = self.config.out / "once"
        if what == RAISES:
            raise ArithmeticError("a fault of the program")
        hoard = []
        while what == HOGS:
            hoard.append(b"x" * BLOCK)
            self.beat("hoarding")
            time.sleep(0.1)
        while what == HANGS:
            time.sleep(1)
        if what == ONCE and position.epoch == 1 and not mark.exists():
            mark.touch()
            raise ConnectionError("the network has gone away")
        yield from super()._steps(loader, schedule, position)
