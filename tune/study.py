"""The sampler: an Optuna study that is rebuilt from the records, behind Ray Tune's `Searcher`."""

from __future__ import annotations

import itertools
import json
import time
import warnings
from collections.abc import Callable
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search import Searcher

from m5.config import ConfigError
from m5.resume import all_settings
from tune.objective import Objective
from tune.records import PRESET, Folder, Record
from tune.settings import Plan
from tune.space import Parameter

CONSTRAINT = "violation"
ATTEMPTS = 200  # to draw settings that are allowed and new


def distribution(parameter: Parameter) -> BaseDistribution:
    if parameter.choices:
        return CategoricalDistribution(parameter.labels())
    if parameter.integer:
        step = 1 if parameter.step is None else int(parameter.step)
        return IntDistribution(int(parameter.low), int(parameter.high), log=parameter.log, step=step)
    return FloatDistribution(parameter.low, parameter.high, log=parameter.log, step=parameter.step)


def frozen(plan: Plan, objective: Objective, record: Record) -> FrozenTrial | None:
    """A record as Optuna's trial; None where it lies outside of the space (the preset's own settings may).

    An ended trial is complete, whether or not the scheduler ended it early: its value is then of fewer epochs, and
    lower than that of the trials it was compared with, which is what the sampler should learn.
    """
    parameters = {name: plan.space.parameters[name] for name in record.values}
    if any(not parameter.holds(record.values[name]) for name, parameter in parameters.items()):
        return None
    row = record.best(objective.metric)
    state = TrialState.RUNNING if not record.ended else TrialState.COMPLETE if row is not None else TrialState.FAIL
    params = {
        name: parameter.labels()[parameter.choices.index(record.values[name])]
        if parameter.choices
        else record.values[name]
        for name, parameter in parameters.items()
    }
    constrained = objective.settings.kind == "constrained"
    ended = row if state == TrialState.COMPLETE else None
    return optuna.trial.create_trial(
        state=state,
        values=objective.values(ended) if ended is not None else None,
        params=params,
        distributions={name: distribution(parameter) for name, parameter in parameters.items()},
        constraints={CONSTRAINT: objective.violation(ended)} if ended is not None and constrained else None,
        intermediate_values={int(one["epoch"]) + 1: one[objective.metric] for one in record.history},
        user_attrs={"record": record.name},
    )


def make_study(plan: Plan, objective: Objective, records: list[Record], seed: int = 0) -> optuna.Study:
    """A study in memory that knows these records."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler: optuna.samplers.BaseSampler
    if plan.config.search.sampler == "random":
        sampler = optuna.samplers.RandomSampler(seed=seed)
    else:
        with warnings.catch_warnings():
            # `multivariate` and `group` are called experimental; together they are how TPE treats conditions.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(
                n_startup_trials=plan.config.search.random_trials, multivariate=True, group=True, seed=seed
            )
    study = optuna.create_study(directions=objective.directions, sampler=sampler)
    for record in records:
        trial = frozen(plan, objective, record)
        if trial is not None:
            study.add_trial(trial)
    return study


def preset_record(plan: Plan, folder: Folder) -> Record:
    """The first trial: the preset as it is, also where it lies outside of the space."""
    settings = all_settings(plan.preset)
    values = plan.space.of(settings)
    if values is None:
        values = {name: settings[name] for name in plan.space.parameters}
    record = Record(name=PRESET, role="search", values=values, seed=plan.preset.seed)
    folder.renew(record)
    return record


class GivenSearcher(Searcher):
    """Gives Ray Tune trials whose records exist already.

    Args:
        given: the records.
        task: what a trial's process is told, from its record.
        concurrent: trials at a time.
    """

    def __init__(self, given: list[Record], *, task: Callable[[Record], dict[str, Any]], concurrent: int):
        super().__init__()
        self.waiting, self.task, self.concurrent = list(given), task, concurrent
        self.live: set[str] = set()

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict, **spec: Any) -> bool:
        return True  # Tune's own metric is not used

    def suggest(self, trial_id: str) -> Any:
        if len(self.live) >= self.concurrent:
            return None
        record = self.next()
        if record is None:
            return Searcher.FINISHED
        self.live.add(trial_id)
        return self.task(record)

    def next(self) -> Record | None:
        """The record that is run next, or None where there is no other."""
        return self.waiting.pop(0) if self.waiting else None

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        self.live.discard(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: all is in the records."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: all is in the records."""


class StudySearcher(GivenSearcher):
    """Gives Ray Tune the trials of a search: first those that were left unfinished, then what the study proposes.

    Args:
        plan, objective: of the search.
        folder: where records are; the searcher makes new ones there.
        options: of `GivenSearcher`.
    """

    def __init__(self, plan: Plan, objective: Objective, folder: Folder, **options: Any):
        super().__init__([record for record in folder.of("search") if not record.ended], **options)
        self.plan, self.objective, self.folder = plan, objective, folder
        self.note = ""  # why no more trials are begun, where it is not that all have been
        minutes = plan.config.search.max_minutes
        self.deadline = time.monotonic() + 60 * minutes if minutes is not None else None

    def next(self) -> Record | None:
        if self.deadline is not None and time.monotonic() > self.deadline:
            self.note = "the time of search.max_minutes is over"
            return None
        return super().next() or self._new()

    def _new(self) -> Record | None:
        records = self.folder.of("search")
        if len(records) >= self.plan.config.search.trials:
            return None
        # The first that is missing: a damaged record may have been taken away.
        name = next(
            name for name in (f"{number:04}" for number in itertools.count()) if name not in self.folder.records
        )
        if name == PRESET:
            return preset_record(self.plan, self.folder)
        values = self._propose(records)
        if values is None:
            return None
        record = Record(name=name, role="search", values=values, seed=self.plan.preset.seed)
        self.folder.renew(record)
        return record

    def _propose(self, records: list[Record]) -> dict[str, Any] | None:
        """New settings that the configuration allows; None where the space has no more of them."""
        # Made anew each time, it knows what has ended and what is running, and a resumed search goes on like any other.
        study = make_study(self.plan, self.objective, records, seed=self.plan.preset.seed + len(records))
        tried = {json.dumps(record.values, sort_keys=True) for record in records}
        for _ in range(ATTEMPTS):
            trial = study.ask()
            values = self.plan.space.draw(trial)
            if json.dumps(values, sort_keys=True) not in tried and self._allowed(values):
                return values
            study.tell(trial, state=TrialState.FAIL)
        self.note = f"no new settings were found in {ATTEMPTS} draws: the space has been tried out"
        return None

    def _allowed(self, values: dict[str, Any]) -> bool:
        try:
            self.plan.run(values, seed=0, data="data", out=self.folder.path)
        except ConfigError:
            return False
        return True
