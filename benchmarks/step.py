"""The whole training step: targets and sequences a second, memory, and where the time goes.

First come plain steps as `m5 train` takes them: they give the figures. Then the same batches are stepped on again while
`benchmarks.step_parts` watches. Without --data the dataset is made in memory.

    m5 bench step --ranks 2 model.width=128
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from typing import Any

from benchmarks import harness
from benchmarks.harness import GB, Promise, Report, Spread
from benchmarks.ranks import (
    Found,
    Job,
    add_job_arguments,
    described,
    device_kind,
    in_ranks,
    job_of,
    number_of,
    train_some,
)
from benchmarks.step_parts import PARTS
from m5.config import ConfigError


def measure(options: argparse.Namespace) -> Report:
    if options.ranks < 1:
        raise ConfigError("--ranks must be at least 1")
    job = job_of(options, threads=max(1, options.threads // options.ranks), parts=True)
    device = device_kind(job.config.training.device, options.ranks)
    return report(in_ranks(options.ranks, device, partial(train_some, job=job)), job, device)


def report(ranks: list[Found], job: Job, device: str) -> Report:
    """The page of what the ranks have found."""
    # Ranks step together, so the slowest clock is everybody's.
    seconds = [max(times) for times in zip(*(found.seconds for found in ranks), strict=True)]
    sequences = [sum(counts) for counts in zip(*(found.sequences for found in ranks), strict=True)]
    waits = mean_of_rounds([found.waits for found in ranks])
    targets_per_second = Spread.of([count / t for count, t in zip(ranks[0].targets, seconds, strict=True)])
    sequences_per_second = Spread.of([count / t for count, t in zip(sequences, seconds, strict=True)])
    apart = {part: mean_of_rounds([[r[part] for r in found.parts] for found in ranks]) for part in PARTS}
    whole = sum(seconds)
    rest = [t - wait - sum(times) for t, wait, *times in zip(seconds, waits, *apart.values(), strict=True)]
    shown = {"data wait": waits, **apart, "other": rest}

    def row(what: str, value: Any, unit: str, share: str = "") -> dict[str, Any]:
        return {"": what, "value": value, "unit": unit, "share": share}

    def divided(spread: Spread) -> Spread:
        return Spread(*(value / len(ranks) for value in spread))

    rows = [
        row("targets, all ranks", targets_per_second, "a second"),
        row("targets, a rank", divided(targets_per_second), "a second"),
        row("sequences, all ranks", sequences_per_second, "a second"),
        row("sequences, a rank", divided(sequences_per_second), "a second"),
        row("step", milliseconds(seconds, job.steps), "ms", "100%"),
        *(row(part, milliseconds(t, job.steps), "ms", f"{100 * sum(t) / whole:.1f}%") for part, t in shown.items()),
        *(
            row(f"peak memory, {kind}, a rank", max(found.memory[kind] for found in ranks) / GB, "GB")
            for kind in ranks[0].memory
        ),
    ]
    share = sum(waits) / whole
    promises = [Promise("share of the step that waits for data", share, 0.05)] if device == "cuda" else []

    def plot(axes: Any) -> None:
        names = list(shown)[::-1]
        axes.barh(names, [1000 * sum(shown[name]) / len(seconds) / job.steps for name in names])
        axes.set(xlabel="milliseconds of a step", title=f"{number_of(len(ranks), 'rank')} on {device}")

    return Report(
        title=f"The training step on {number_of(len(ranks), 'rank')}",
        rows=rows,
        notes=notes(ranks, job, device, covered=1 - sum(rest) / whole),
        promises=promises,
        plot=plot,
        details={"ranks": [vars(found) for found in ranks], "config": job.config.model_dump(mode="json")},
    )


def notes(ranks: list[Found], job: Job, device: str, covered: float) -> list[str]:
    said = [
        f"{described(job)} {number_of(len(ranks), 'rank')} with {number_of(job.threads, 'thread')} each, "
        f"{job.rounds} rounds of {job.steps} steps.",
        "Step, data wait and memory are of plain steps, as `m5 train` takes them"
        + (", in TorchRec's pipeline." if device == "cuda" else ".")
        + f" The parts are of the same batches, stepped on again, watched and without pipeline; they and the data "
        f"wait add up to {100 * covered:.0f}% of the plain step. 'other' is the rest: what the loader's thread takes "
        "from the plain steps and what no part holds, less what watching costs and, on a GPU, what the pipeline hides.",
        "Not told apart: the tables' optimizer is fused into their backward; the candidate softmax takes its gradients "
        "in forward, so that 'loss' holds its backward too; 'lookup' ends when the rows of other ranks are there, and "
        "'backward' holds the way of their gradients. The all-reduce runs beside backward, so what counts is how much "
        "longer backward is with it than without; a rank that waits in it for a slower one counts too.",
    ]
    if device == "cpu" and len(ranks) * job.threads > (os.cpu_count() or 1):
        said.append("There are more threads than cores: the ranks take each other's time.")
    return said


def mean_of_rounds(by_rank: list[list[float]]) -> list[float]:
    """[ranks][rounds] -> the mean over ranks of every round."""
    return [sum(values) / len(values) for values in zip(*by_rank, strict=True)]


def milliseconds(seconds: list[float], steps: int) -> Spread:
    return Spread.of([1000 * value / steps for value in seconds])


def arguments(parser: argparse.ArgumentParser) -> None:
    add_job_arguments(parser)
    parser.add_argument("--ranks", type=int, default=1, help="processes of this machine (default 1)")


def main(argv: list[str] | None = None) -> int:
    return harness.run(__spec__.name, __doc__ or "", measure, argv, arguments)


if __name__ == "__main__":
    sys.exit(main())
