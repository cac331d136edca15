"""How much each setting of a search had to do with being among its best trials."""

from __future__ import annotations

import random
import statistics
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

from tune.objective import Objective
from tune.records import Record
from tune.settings import Plan
from tune.study import make_study

BEST = 5  # trials that are the best, or a tenth of all where that is more; Optuna's documentation advises at least 5
FEWEST = 2 * BEST  # trials that it takes: of fewer, the best would be most
SHUFFLES = 40  # of the qualities, for what chance alone gives


@dataclass(frozen=True)
class Importance:
    """How much one setting had to do with being among the best.

    Attributes:
        name: of the setting.
        share: of the importances of all settings, which add up to 1.
        chance: what it would be above in one of ten shufflings of the trials' qualities, on the scale of `share`.
        trials: how many have the setting.
    """

    name: str
    share: float
    chance: float
    trials: int


def importances(plan: Plan, objective: Objective, records: Iterable[Record]) -> list[Importance]:
    """Optuna's conditional PED-ANOVA of quality, over trials that finished or were stopped; the largest first.

    How a setting's values are distributed among the best trials is compared with how they are among all. A setting that
    not all trials have is judged among those that have it, and weighted by how many of the best they are
    (https://arxiv.org/abs/2601.20800).

    Returns:
        Nothing where there are fewer than `FEWEST` trials in the space, or where no setting made a difference.
    """
    ended = [record for record in records if record.status in ("finished", "stopped")]
    rows = {record.name: record.best(objective.metric) for record in ended}
    qualities = {name: row[objective.metric] for name, row in rows.items() if row is not None}
    study = make_study(plan, objective, [record for record in ended if record.name in qualities])
    names = [trial.user_attrs["record"] for trial in study.trials]
    if len(names) < FEWEST:
        return []
    evaluator = PedAnovaImportanceEvaluator(target_quantile=max(0.1, BEST / len(names)))

    def evaluate(order: list[str]) -> dict[str, float]:
        """By setting, not normalised, with the quality of order[i] for the i-th trial."""
        quality = {name: qualities[other] for name, other in zip(names, order, strict=True)}
        with warnings.catch_warnings():
            # Lower targets are taken as better, hence the sign; and `normalize` is called experimental.
            warnings.simplefilter("ignore")
            return get_param_importances(
                study, evaluator=evaluator, target=lambda trial: -quality[trial.user_attrs["record"]], normalize=False
            )

    found = evaluate(names)
    total = sum(found.values())
    if total <= 0:
        return []
    dice = random.Random(0)
    shuffled = [evaluate(dice.sample(names, len(names))) for _ in range(SHUFFLES)]
    return [
        Importance(
            name=name,
            share=value / total,
            chance=statistics.quantiles([one[name] for one in shuffled], n=10)[-1] / total,
            trials=sum(name in trial.params for trial in study.trials),
        )
        for name, value in sorted(found.items(), key=lambda item: -item[1])
    ]
