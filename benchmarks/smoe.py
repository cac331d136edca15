"""Split mixture of experts: the step's time against 2, 20, 200 and 2,000 scenario values.

Every scenario value owns an expert, so a model of 2,000 regions and 2,000 plans has a thousand times as many as one of
2 and 2; a request still runs through two of them and the shared ones. Beside it the controls of the same active width:
`mmoe`, all experts for everybody and a gate for each value, and `mlp`, blind to scenarios. Viewers have one region and
one plan. All models step on batches made beforehand, in turns; all but the scenarios is equal.

    m5 bench smoe model.expert_hidden=256
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks import workload
from benchmarks.harness import Promise, Report, Spread, in_turns, run
from benchmarks.options import add_run_arguments, checked, positive
from m5.config import RunConfig
from m5.model.m5 import M5
from m5.model.multi_scenario_mixing import MultiScenarioMixing
from m5.parallel import World, world
from m5.plan.stand_in import StandIn
from m5.schema import Vocabulary

VALUES = (2, 20, 200, 2_000)
MIXINGS = ("smoe", "mmoe", "mlp")
# Few negatives, so that the softmax does not hide what the mixing costs.
SETTINGS = ("candidates.kind=sampled", "candidates.count=1024")
TINY = ("sequences.sequences=8", "sequences.history=20", "sequences.requests=20", "model.blocks=1")
PROMISED = 1.2


class Case(NamedTuple):
    """A mixing layer and the number of regions, and of plans, that it knows."""

    mixing: str
    values: int

    def __str__(self) -> str:
        return f"{self.mixing}, {self.values:,} values"


def made_scenarios(values: int, *, users: int, length: int, titles: int, seed: int = 0) -> StandIn:
    """The same service with another number of regions and plans; devices and age bands stay as many as they are."""
    dataset = workload.made_dataset(users=users, length=length, titles=titles, seed=seed)
    words = tuple(str(value) for value in range(values))
    scenarios = tuple(Vocabulary(name=old.name, values=words) for old in dataset.manifest.scenarios)
    dataset.manifest = dataset.manifest.model_copy(update={"scenarios": scenarios})
    generator = np.random.default_rng(seed)
    for vocabulary in scenarios:
        of_user = generator.integers(1, vocabulary.size, users, dtype=np.int32)
        dataset.arrays[f"scenario_{vocabulary.name}"] = np.repeat(of_user, length)
    return dataset


class Scenarios(workload.Trained):
    """Training of one case."""

    def __init__(self, case: Case, options: argparse.Namespace, place: World):
        self.case, config = case, settings(case, options)
        users, titles = config.sequences.sequences * options.steps, 300 if options.smoke else 10_000
        dataset = made_scenarios(case.values, users=users, length=config.sequences.history, titles=titles)
        super().__init__(dataset, config, place, options.steps)
        self.model: M5 = self.stepper.model.module.model

    @property
    def targets(self) -> int:
        return sum(sum(batch.ranks_P) for batch in self.batches)

    def mixing(self) -> Callable[[], None]:
        """Forward and backward of the mixing layers of both branches alone, on what the first batch brings them."""
        calls: list[tuple[MultiScenarioMixing, Any]] = []
        layers = [module for module in self.model.modules() if isinstance(module, MultiScenarioMixing)]
        hooks = [
            layer.register_forward_pre_hook(lambda layer, given: calls.append((layer, workload.detached(given))))
            for layer in layers
        ]
        self.stepper.step(self.batches[0], 0.1)
        for hook in hooks:
            hook.remove()
        assert len(calls) == len(layers)

        def work() -> None:
            for layer, arguments in calls:
                layer(*arguments).user_PD.sum().backward()

        return work

    def experts(self) -> Callable[[], None]:
        """Look the owned experts of the first batch up, and update them, as backward does."""
        tables, asked = self.model.experts, self.batches[0].experts
        if tables is None or asked is None:
            return lambda: None

        def work() -> None:
            torch.cat([rows.values().flatten() for rows in tables(asked).values()]).sum().backward()

        return work


def settings(case: Case, options: argparse.Namespace) -> RunConfig:
    overrides = checked(options.overrides, ("model.mixing",))
    tiny = TINY if options.smoke else ()
    return workload.settings(*SETTINGS, *tiny, *overrides, f"model.mixing={case.mixing}")


def measure(options: argparse.Namespace) -> Report:
    values = (2, 20) if options.smoke else VALUES
    cases = [Case("smoe", value) for value in values]
    cases += [Case(mixing, value) for mixing in MIXINGS[1:] for value in (values[0], values[-1])]
    with world(options.device) as place:
        trained = {str(case): Scenarios(case, options, place) for case in cases}
        steps = in_turns({name: each.whole for name, each in trained.items()}, repeats=options.repeats)
        layers = in_turns({name: each.mixing() for name, each in trained.items()}, repeats=options.repeats)
        tables = in_turns({name: each.experts() for name, each in trained.items()}, repeats=options.repeats)
    rows, ratios = [], {}
    for case in cases:
        name, first = str(case), str(Case(case.mixing, values[0]))
        step = Spread.of([1000 * second / options.steps for second in steps[name]])
        ratios[name] = Spread.of([own / few for own, few in zip(steps[name], steps[first], strict=True)]).median
        rows.append(
            {
                "mixing": case.mixing,
                "values of each of 2 scenarios": case.values,
                "step, ms": step,
                "targets/s": Spread.rate(trained[name].targets, steps[name]),
                "mixing layers, ms": Spread.of([1000 * second for second in layers[name]]),
                "owned experts looked up and updated, ms": Spread.of([1000 * second for second in tables[name]])
                if case.mixing == "smoe"
                else "-",
                f"step / step at {values[0]} values": ratios[name],
            }
        )
    last = str(Case("smoe", values[-1]))
    promise = Promise(
        f"a step with {values[-1]:,} scenario values over one with {values[0]}", ratios[last], limit=PROMISED
    )
    return Report(
        title="Split mixture of experts: time against scenario values",
        rows=rows,
        notes=notes(trained[last], options),
        promises=[promise],
        plot=lambda axes: draw(axes, rows),
    )


def notes(trained: Scenarios, options: argparse.Namespace) -> list[str]:
    batch = trained.batches[0]
    found = [
        f"{options.steps} batches of {len(batch.length_B)} sequences and {len(batch.target_P):,} targets, made "
        f"beforehand; {len(batch.log_q_C):,} sampled negatives. Ratios are medians over the turns.",
        "The mixing layers (forward and backward, both branches) and the owned experts' tables (lookup, and the update "
        "in backward) are measured alone, on one batch.",
    ]
    if batch.experts is not None:
        occur = [len(np.unique(column)) for column in batch.scenario_PM.T.cpu().numpy()]
        found.append(
            f"With {trained.case.values:,} values a batch holds {' and '.join(map(str, occur))} of them, the unknown "
            "value included: it looks up and updates so many experts in each branch."
        )
    return found


def draw(axes: Any, rows: list[dict[str, Any]]) -> None:
    for mixing in MIXINGS:
        own = [row for row in rows if row["mixing"] == mixing]
        at = [row["values of each of 2 scenarios"] for row in own]
        (line,) = axes.plot(at, [row["step, ms"].median for row in own], marker="o", label=f"{mixing}: step")
        alone = [row["mixing layers, ms"].median for row in own]
        axes.plot(at, alone, marker="o", linestyle="--", color=line.get_color(), label=f"{mixing}: mixing layers")
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("values of each scenario")
    axes.set_ylabel("ms")
    axes.legend(fontsize="small")


def arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    parser.add_argument("--steps", type=positive, default=3, help="batches of a turn (default 3)")


def main(argv: list[str] | None = None) -> int:
    return run("benchmarks.smoe", __doc__ or "", measure, argv, arguments)


if __name__ == "__main__":
    sys.exit(main())
