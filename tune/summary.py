"""What a search has found, in numbers and sentences."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from tune.objective import Objective
from tune.records import PRESET, Folder, Record


@dataclass(frozen=True)
class Spread:
    """Quality over seeds: its mean and standard deviation (of a sample; 0 for a single one)."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float:
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.deviation:.4f} ({len(self.values)} seeds)"


def spread(records: list[Record], trial: Record | None, metric: str) -> Spread | None:
    """Quality of those trainings on several seeds that are of that trial: an earlier winner's may be there, too."""
    own = [record for record in of_trial(records, trial) if record.status == "finished"]
    values = tuple(row[metric] for record in own if (row := record.best(metric)) is not None)
    return Spread(values) if values else None


def of_trial(records: list[Record], trial: Record | None) -> list[Record]:
    """Those that have all settings of a trial; `search.final` may have added others."""
    return [record for record in records if trial is not None and record.values | trial.values == record.values]


@dataclass(frozen=True)
class Summary:
    """The outcome of a search.

    Attributes:
        metric: what quality is, e.g. "ndcg@10".
        winner: the best trial; None where none was trained to its end within the constraint.
        preset, again: over seeds, the preset's quality and the winner's; None where they were not trained.
        pareto: of several measures, the trials that no other one beats.
        counts: trials by status.
        failed: the trials that failed.
        note: why the search has ended before all trials, or an empty string.
    """

    metric: str
    winner: Record | None
    preset: Spread | None
    again: Spread | None
    pareto: tuple[Record, ...]
    counts: dict[str, int]
    failed: tuple[Record, ...]
    note: str = ""

    @classmethod
    def of(cls, folder: Folder, objective: Objective, note: str = "") -> Summary:
        records = folder.of("search")
        winner, first = objective.winner(records), folder.records.get(PRESET)
        return cls(
            metric=objective.metric,
            winner=winner,
            preset=spread(folder.of("preset"), first, objective.metric),
            again=spread(folder.of("winner"), winner, objective.metric),
            pareto=tuple(objective.pareto(records)) if objective.settings.kind == "pareto" else (),
            counts={
                status: sum(record.status == status for record in records)
                for status in ("finished", "stopped", "failed", "running", "waiting")
            },
            failed=tuple(record for record in folder.records.values() if record.status == "failed"),
            note=note,
        )

    def verdict(self) -> str:
        """Whether the search has found something better than what it began with."""
        if self.winner is None and self.counts.get("failed") and self.counts["failed"] == sum(self.counts.values()):
            return "All trials have failed, so there is no winner."
        if self.winner is None:
            return "No trial was trained to its end within what the objective asks for: there is no winner."
        if self.winner.name == PRESET:
            return "No trial was better than the preset, which is the first of them: it was there already."
        if self.preset is None or self.again is None:
            return "Trained once each; the seeds of search.seeds would say how much of the difference is chance."
        if min(len(self.again.values), len(self.preset.values)) < 2:
            return "Trained on one other seed each, which tells nothing of the spread: see search.seeds."
        difference = self.again.mean - self.preset.mean
        spread = max(self.again.deviation, self.preset.deviation)
        apart = min(self.again.values) > max(self.preset.values)
        share = f"{difference:+.4f} ({difference / self.preset.mean:+.1%})"
        if difference > spread and apart:
            return (
                f"Better than the preset by {share}: more than the spread over seeds, and each seed above each of its."
            )
        if difference > spread:
            return f"Better than the preset by {share}: more than the spread over seeds, though their ranges overlap."
        return f"Within chance of the preset: {share}, where the spread over seeds is {spread:.4f}."
