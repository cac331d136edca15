"""What makes one trial better than another: quality, quality under a constraint, or several measures at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from tune.records import MEMORY, TARGETS_PER_SECOND, Record
from tune.settings import ObjectiveSettings

Direction = Literal["maximize", "minimize"]
DIRECTIONS: dict[str, Direction] = {"quality": "maximize", "targets_per_second": "maximize", "memory": "minimize"}
COLUMNS = {"targets_per_second": TARGETS_PER_SECOND, "memory": MEMORY}


@dataclass(frozen=True)
class Loss:
    """What the worst scenario lost against the baseline, as a share of the baseline's metric; below 0: it gained."""

    scenario: str
    share: float


class Objective:
    """How trials compare.

    Args:
        settings: which kind.
        metric: the validation metric that is quality, e.g. "ndcg@10".
        baseline: of a constrained search, the baseline's validation metrics, e.g. "ndcg@10/region=US", "n/region=US".
    """

    def __init__(self, settings: ObjectiveSettings, metric: str, baseline: Mapping[str, float] | None = None):
        self.settings, self.metric, self.baseline = settings, metric, baseline

    @property
    def directions(self) -> list[Direction]:
        return [DIRECTIONS[name] for name in self.measures]

    @property
    def measures(self) -> tuple[str, ...]:
        return self.settings.measures if self.settings.kind == "pareto" else ("quality",)

    def values(self, row: Mapping[str, float]) -> list[float]:
        """The measures of one validation, as `directions` has them."""
        return [row[COLUMNS.get(name, self.metric)] for name in self.measures]

    def scenarios(self, row: Mapping[str, float]) -> dict[str, float]:
        """Quality by scenario value, of those that have targets enough to be judged."""
        prefix = f"{self.metric}/"
        judged = {name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix)}
        return {name: value for name, value in judged.items() if row[f"n/{name}"] >= self.settings.smallest_scenario}

    def loss(self, row: Mapping[str, float]) -> Loss | None:
        """What the worst scenario lost; None where nothing is compared."""
        if self.settings.kind != "constrained" or self.baseline is None:
            return None
        before = {name: value for name, value in self.scenarios(self.baseline).items() if value > 0}
        now = self.scenarios(row)
        losses = [Loss(name, 1 - now[name] / value) for name, value in before.items() if name in now]
        return max(losses, key=lambda loss: loss.share, default=None)

    def violation(self, row: Mapping[str, float]) -> float:
        """By how much the worst loss is above what is tolerated; 0 or less: the constraint holds."""
        loss = self.loss(row)
        return loss.share - self.settings.tolerance if loss is not None else 0.0

    def winner(self, records: Iterable[Record]) -> Record | None:
        """The trial with the best quality, of those that were trained to their end and hold the constraint."""
        best, highest = None, float("-inf")
        for record in records:
            row = record.best(self.metric) if record.status == "finished" else None
            if row is not None and row[self.metric] > highest and self.violation(row) <= 0:
                best, highest = record, row[self.metric]
        return best

    def pareto(self, records: Iterable[Record]) -> list[Record]:
        """Trials that were trained to their end and that no other one equals or beats in all measures, best first."""
        signs = [1 if direction == "maximize" else -1 for direction in self.directions]
        points = {}
        for record in records:
            row = record.best(self.metric) if record.status == "finished" else None
            if row is not None:
                points[record.name] = (record, [s * v for s, v in zip(signs, self.values(row), strict=True)])

        def dominated(mine: list[float]) -> bool:
            return any(
                all(a >= b for a, b in zip(other, mine, strict=True)) and other != mine for _, other in points.values()
            )

        front = [(record, point) for record, point in points.values() if not dominated(point)]
        return [record for record, _ in sorted(front, key=lambda one: -one[1][0])]
