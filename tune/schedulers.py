"""Early stopping: Ray Tune's schedulers, which here know the trials of before a resumption, too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from tune.records import Record
from tune.settings import Plan


class Stops(TrialScheduler):
    """A scheduler that remembers which trials it has ended, and lets those be that have come to their end anyway.

    Mixed into one of Ray's, whose `on_trial_result` it wraps.

    Attributes:
        stopped: Ray's ids of the trials.
    """

    stopped: set[str]

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if "score" not in result:
            return TrialScheduler.CONTINUE
        decision = super().on_trial_result(tune_controller, trial, result)
        if decision != TrialScheduler.STOP or result["epoch"] >= trial.config["run"]["training"]["epochs"]:
            return TrialScheduler.CONTINUE
        self.stopped.add(trial.trial_id)
        return decision


class Asha(Stops, ASHAScheduler):
    """Asynchronous successive halving (Li et al. 2020)."""


class Median(Stops, MedianStoppingRule):
    """Ends a trial whose best is below the median of the others' running averages (Golovin et al. 2017)."""


class All(Stops, FIFOScheduler):
    """Ends nothing early."""


class _Earlier:
    """Stands for Ray's trial, and its controller, while an ended trial's results are told again."""

    def __init__(self, record: Record, epochs: int):
        self.trial_id = f"earlier-{record.name}"
        self.config = {"run": {"training": {"epochs": epochs}}}

    def get_live_trials(self) -> list[Any]:
        return []


def make_scheduler(plan: Plan, records: Sequence[Record] = (), *, early: bool = True) -> Stops:
    """The scheduler that a search asks for.

    Args:
        records: ended trials, with which the next ones are compared.
        early: False: none ends early, whatever is asked for.
    """
    settings, kind, metric = plan.config.search, plan.config.scheduler, plan.preset.training.metric
    common: dict[str, Any] = {"time_attr": "epoch", "metric": "score", "mode": "max"}
    scheduler: Stops
    longest = max(plan.preset.training.epochs, *_epochs(plan))
    if not early or kind == "none":
        scheduler = All()
    elif kind == "asha":
        grace = min(settings.grace_epochs, longest)
        scheduler = Asha(
            **common, max_t=longest, grace_period=grace, reduction_factor=settings.reduction, stop_last_trials=False
        )
    else:
        # Never pause a trial to give way to another: each is a training that would have to be begun again.
        never: Any = math.inf
        scheduler = Median(**common, grace_period=settings.grace_epochs, min_time_slice=never)
    scheduler.stopped = set()
    for record in records:
        earlier: Any = _Earlier(record, longest + 1)
        scheduler.on_trial_add(earlier, earlier)
        for row in record.history:
            result = {"epoch": int(row["epoch"]) + 1, "score": row[metric]}
            scheduler.on_trial_result(earlier, earlier, result)
    scheduler.stopped.clear()
    return scheduler


def _epochs(plan: Plan) -> list[int]:
    """The most epochs that the space allows, if it varies them."""
    parameter = plan.space.parameters.get("training.epochs")
    return [max(int(value) for value in parameter.ends())] if parameter is not None else [0]
