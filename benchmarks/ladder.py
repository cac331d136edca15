"""What each optimisation brings: one more per row, with the validation NDCG beside the speed.

Every row trains for the same epochs from the same seeds and is validated alike, so no speed is bought with quality
unseen. The first rows take optimisations away that the product always has; the last ones add, one at a time, what its
settings leave off.

    m5 bench ladder --data DATA --preset ml1m --epochs 1 sequences.history=50 sequences.requests=50
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks import harness
from benchmarks.harness import Report, Spread
from benchmarks.invariance import SMALL, synthetic_data
from benchmarks.options import checked, positive
from m5.batch import Batch
from m5.config import load_config
from m5.data import loader, sequences
from m5.parallel import World, world
from m5.resume import Position
from m5.train import Schedule, Trainer

ROUND = 10  # steps over which a speed is taken


def _nothing_shared(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """In place of `distinct_rows`: every row on its own."""
    each = np.arange(max(1, len(values)))
    return each[: len(values)], each[: len(values)]


def _on_demand(self: loader.Loader) -> Iterator[Batch]:
    """In place of the loader's thread: a batch is built when the step asks for it."""
    return (self._make(index) for index in range(self.first, len(self.batches)))


@dataclass(frozen=True)
class Rung:
    """A row: settings, and whether the product's optimisations are on."""

    name: str
    overrides: tuple[str, ...] = ()
    shared: bool = True
    bucketed: bool = True
    ahead: bool = True

    def taken_away(self) -> list[Any]:
        """Patches that take away what is not on."""
        patches: list[Any] = []
        if not self.shared:
            patches.append(patch.object(sequences, "distinct_rows", _nothing_shared))
        if not self.bucketed:
            patches.append(patch.object(loader, "POOL_BATCHES", 1))
        if not self.ahead:
            patches.append(patch.object(loader.Loader, "__iter__", _on_demand))
        return patches


FP32 = ("candidates.precision=float32",)
RUNGS = (
    Rung("every position a target", FP32, shared=False, bucketed=False, ahead=False),
    Rung("+ sequences of like length share a batch", FP32, shared=False, ahead=False),
    Rung("+ batches built by a thread during the step", FP32, shared=False),
    Rung("+ shared combinations computed once", FP32),
    Rung("+ softmax products in bfloat16 where native (the product)"),
    Rung("the product, but autocast", ("training.autocast=true",)),
    Rung("the product, but compiled", ("training.compile=true",)),
    Rung("the product, but TorchRec's pipeline", ("training.pipeline=true",)),
    Rung("the product, but 1,024 sampled negatives", ("candidates.kind=sampled", "candidates.count=1024")),
)
VARIED = (
    "candidates.kind",
    "candidates.precision",
    "seed",
    "training.autocast",
    "training.compile",
    "training.pipeline",
)


@dataclass(frozen=True)
class Climbed:
    """One training of a row: targets a second, stretch by stretch, and validation metrics."""

    rates: list[float]
    ndcg: float
    hr: float

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)


def climb(rung: Rung, options: argparse.Namespace, overrides: list[str], place: World) -> Climbed:
    """Train and validate one row."""
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        for taken_away in rung.taken_away():
            stack.enter_context(taken_away)
        config = load_config(options.preset, [*overrides, *rung.overrides], options.data, Path(folder))
        trainer = Trainer(config, place)
        rates = train(trainer, options.epochs)
        metrics, _ = trainer.validate()
    return Climbed(rates, metrics["ndcg@10"], metrics["hr@10"])


def train(trainer: Trainer, epochs: int) -> list[float]:
    """Targets a second of every ROUND steps, or of all where they are fewer."""
    loaders = [trainer.loader(Position(epoch=epoch)) for epoch in range(epochs)]
    total = sum(len(one) for one in loaders)
    schedule, steps, rates = Schedule(trainer.config, total_steps=total), count(), []
    trainer.model.train()
    taken = trainer.stepper.steps(chain.from_iterable(loaders), lambda: schedule.factor(next(steps), 0))
    for _ in range(total // min(ROUND, total)):
        began = time.perf_counter()
        targets = sum(one.requests for one in islice(taken, ROUND))
        rates.append(targets / (time.perf_counter() - began))
    for _ in taken:  # what is left of the epoch
        pass
    return rates


def measure(options: argparse.Namespace) -> Report:
    given = checked(options.overrides, VARIED)
    fixed = ["training.stall_seconds=null", f"training.threads={options.threads}", *given]
    rungs = RUNGS
    with tempfile.TemporaryDirectory() as folder, world("auto") as place:
        made = options.data is None
        if made:
            options.data = synthetic_data(Path(folder))
            fixed = [*SMALL[:3], "sequences.sequences=32", "sequences.history=20", "sequences.requests=20", *fixed]
        if options.smoke:
            fixed.append("sequences.sequences_per_epoch=64")
            rungs = tuple(rung for rung in RUNGS if "compiled" not in rung.name)
        climb(rungs[-1], options, [*fixed, "sequences.sequences_per_epoch=64"], place)  # the first run pays for loading
        found: dict[str, list[Climbed]] = {rung.name: [] for rung in rungs}
        for seed in range(1 if options.smoke else options.repeats):
            for rung in rungs:
                found[rung.name].append(climb(rung, options, [*fixed, f"seed={seed}"], place))
    first = found[rungs[0].name]
    rows = [
        {
            "": name,
            "targets a second": Spread.of([rate for one in turns for rate in one.rates]),
            "times the first": Spread.of([one.rate / base.rate for one, base in zip(turns, first, strict=True)]),
            "valid NDCG@10": Spread.of([one.ndcg for one in turns]),
            "valid HR@10": Spread.of([one.hr for one in turns]),
        }
        for name, turns in found.items()
    ]

    def plot(axes: Any) -> None:
        names = list(found)[::-1]
        axes.barh(names, [statistics.median(one.rate for one in found[name]) for name in names])
        axes.set(xlabel="targets a second")

    settings = " ".join(fixed)
    return Report(
        title="The ladder: one optimisation a row",
        rows=rows,
        notes=[
            f"Dataset {'made, 14,800 watches of 600 viewers' if made else options.data}. "
            f"Preset {options.preset} {settings}, {options.epochs} epochs a training. Rows took turns, each turn "
            f"with a seed of its own. The spread of targets a second is over stretches of {ROUND} steps.",
        ],
        plot=plot,
    )


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, e.g. model.width=128")
    parser.add_argument("--data", type=Path, help="prepared dataset (default: a small synthetic one is made)")
    parser.add_argument("--preset", default="default", help="where the settings start from")
    parser.add_argument("--epochs", type=positive, default=1, help="of every row (default 1)")


def main(argv: list[str] | None = None) -> int:
    return harness.run(__spec__.name, __doc__ or "", measure, argv, arguments, repeats=3)


if __name__ == "__main__":
    sys.exit(main())
