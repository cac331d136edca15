"""Exact evaluation over the whole catalogue: users a second, beside a training epoch over the same users.

Viewers have 100 training events and one validation event each, which is their request: every title that they may play
and have not seen is scored. Some titles are licensed in one region only. An epoch is estimated from steps of it, and
evaluation from a part of the requests; with --full both are run to the end.

    m5 bench evaluate --users 100000 --titles 70000
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from benchmarks import harness, workload
from benchmarks.harness import Promise, Report, Spread, in_turns, run
from benchmarks.options import add_run_arguments, checked, positive
from m5.assemble import build_model
from m5.config import ConfigError, RunConfig
from m5.data.loader import Loader
from m5.data.sequences import BatchBuilder
from m5.evaluate import evaluate
from m5.parallel import World, world
from m5.plan.stand_in import StandIn
from m5.predict import Predictor
from m5.schema import ALWAYS, VALID

TRAINING_EVENTS = 100  # of a viewer
LOCAL = 0.1  # share of the titles that are licensed in one region only
PROMISED = 5.0
TINY = {"users": 300, "titles": 1_000, "targets": 100, "steps": 1}


def made_service(users: int, titles: int, seed: int = 0) -> StandIn:
    """A dataset in memory with rights; the last event of every viewer is the validation split."""
    dataset = workload.made_dataset(users=users, length=TRAINING_EVENTS + 1, titles=titles, seed=seed)
    dataset.arrays["split"][dataset.offsets[1:] - 1] = VALID
    generator = np.random.default_rng(seed)
    regions = next(vocabulary.size for vocabulary in dataset.manifest.scenarios if vocabulary.name == "region")
    local = generator.random(titles) < LOCAL
    dataset.rights = pd.DataFrame(
        {
            "title": np.arange(titles),
            "region": np.where(local, generator.integers(1, regions, titles), 0),
            "start": ALWAYS,
            "end": -ALWAYS,
        }
    )
    counts = {"train": users * TRAINING_EVENTS, "valid": users, "test": 0}
    dataset.manifest = dataset.manifest.model_copy(update={"rights_scenarios": ("region",), "split_counts": counts})
    return dataset


class Timed:
    """A scorer that adds up the time spent in it."""

    def __init__(self, predictor: Predictor):
        self.predictor, self.name, self.seconds = predictor, predictor.name, 0.0

    def score(self, event_index: np.ndarray) -> Tensor:
        found: list[Tensor] = []
        self.seconds += harness.seconds(lambda: found.append(self.predictor.score(event_index)))
        return found[0]


class Evaluation:
    """One evaluation a call, as validation does it: no bootstrap."""

    def __init__(self, dataset: StandIn, config: RunConfig, place: World, targets: int | None):
        model = build_model(dataset, config).to(place.device)
        self.scorer = Timed(Predictor(model, BatchBuilder(dataset, config), config, place.device))
        self.dataset, self.targets = dataset, targets
        self.requests = 0
        self.scoring: list[float] = []

    def __call__(self) -> None:
        self.scorer.seconds = 0.0
        report = evaluate(self.dataset, [self.scorer], split="valid", max_targets=self.targets, bootstrap=0)
        self.scoring.append(self.scorer.seconds)
        self.requests = report["models"][self.scorer.name]["overall"]["n"]


class Epochs:
    """Some steps a call, as training takes them, from the loader and its thread."""

    def __init__(self, dataset: StandIn, config: RunConfig, place: World, steps: int | None):
        builder = BatchBuilder(dataset, config)
        self.batches = len(Loader(builder, seed=config.seed, epoch=0))
        self.steps = min(steps or self.batches, self.batches)
        self.stepper = workload.stepper(dataset, config, place)
        self.ahead = workload.endless(builder, config, place)

    def __call__(self) -> None:
        for _ in self.stepper.steps(islice(self.ahead, self.steps), lambda: 0.1):
            pass


def measure(options: argparse.Namespace) -> Report:
    if options.smoke:
        for name, value in TINY.items():
            setattr(options, name, value)
    if options.users < 100 or options.titles < 100:
        raise ConfigError("--users and --titles must be at least 100 each: a smaller service has too few to rank.")
    targets, steps = (None, None) if options.full else (options.targets, options.steps)
    smoke = ("sequences.sequences=8", "model.blocks=1") if options.smoke else ()
    config = workload.settings(*smoke, *checked(options.overrides, ()))
    dataset = made_service(options.users, options.titles)
    with world(options.device) as place:
        evaluation = Evaluation(dataset, config, place, targets)
        epochs = Epochs(dataset, config, place, steps)
        # A whole epoch needs no warming up.
        works: dict[str, Callable[[], None]] = {"evaluation": evaluation, "epoch": epochs}
        taken = in_turns(works, repeats=options.repeats, warm_up=0 if options.full else 1)
    users, part = options.users, options.users / evaluation.requests
    whole = [part * second for second in taken["evaluation"]]
    scoring = [part * second for second in evaluation.scoring[-options.repeats :]]
    epoch = [epochs.batches / epochs.steps * second for second in taken["epoch"]]
    rest = [all_of_it - scores for all_of_it, scores in zip(whole, scoring, strict=True)]
    rows = [
        row("evaluation", users, whole),
        row("- of it the model and the scores of all titles", users, scoring),
        row("- of it rights, seen titles, ranks, coverage", users, rest),
        row("training epoch", users, epoch),
    ]
    ratio = Spread.of([learnt / ranked for learnt, ranked in zip(epoch, whole, strict=True)])
    return Report(
        title=f"Exact evaluation of {users:,} users against {options.titles:,} titles",
        rows=rows,
        notes=notes(options, config, evaluation, epochs, ratio),
        promises=[Promise("training epoch over evaluation of its users", ratio.median, PROMISED, at_least=True)],
        plot=lambda axes: draw(axes, rows),
    )


def row(what: str, users: int, seconds: list[float]) -> dict[str, Any]:
    return {
        "what": what,
        f"s for {users:,} users": Spread.of(seconds),
        "users/s": Spread.rate(users, seconds),
        "ms a user": Spread.of([1000 * second / users for second in seconds]),
    }


def notes(
    options: argparse.Namespace, config: RunConfig, evaluation: Evaluation, epochs: Epochs, ratio: Spread
) -> list[str]:
    extent = f"Run whole: {evaluation.requests:,} requests, {epochs.steps:,} steps."
    if not options.full:
        extent = (
            f"Estimated: evaluation from {evaluation.requests:,} requests of {options.users:,}, what it does once "
            f"included, and the epoch from {epochs.steps} steps a turn of {epochs.batches:,}."
        )
    return [
        f"{extent} An epoch takes {harness.cell(ratio)} times as long.",
        f"{TRAINING_EVENTS} training events a user, each a target of the '{config.candidates.kind}' softmax; preset "
        f"{config.preset}, width {config.model.width}, history {config.sequences.history}, "
        f"{config.sequences.sequences} sequences a batch. Evaluation has one request a user; "
        f"{LOCAL:.0%} of the titles are licensed in one region only, and requests for a title that its viewer may not "
        "play are left out. Without confidence intervals.",
    ]


def draw(axes: Any, rows: list[dict[str, Any]]) -> None:
    names = [row["what"].removeprefix("- of it ") for row in rows]
    axes.barh(names, [row["ms a user"].median for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("ms a user")


def arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    parser.add_argument("--users", type=positive, default=100_000)
    parser.add_argument("--titles", type=positive, default=70_000)
    parser.add_argument("--targets", type=positive, default=4_000, help="requests of an evaluation (default 4000)")
    parser.add_argument("--steps", type=positive, default=3, help="steps of the epoch in a turn (default 3)")
    parser.add_argument("--full", action="store_true", help="all requests, whole epochs: an hour each on 2 cores")


def main(argv: list[str] | None = None) -> int:
    return run("benchmarks.evaluate", __doc__ or "", measure, argv, arguments)


if __name__ == "__main__":
    sys.exit(main())
