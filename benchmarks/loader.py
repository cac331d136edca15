"""Prepared arrays to batches, alone: behaviours and requests a second of one core, by history length and candidates.

An epoch of the product's Loader is read to its end, the making of its order included, with nothing else to do. Without
--data the arrays are made, written to a temporary folder and mapped into memory as a prepared dataset's are.

    m5 bench loader --data DATA
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import harness, workload
from benchmarks.harness import Promise, Report, Spread
from m5.config import RunConfig
from m5.data.loader import Loader
from m5.data.sequences import BatchBuilder
from m5.parallel import world
from m5.schema import DataError, PreparedDataset

BEHAVIOURS = 1_280_000  # of an epoch, about
DEFAULT = "default settings"
HISTORIES = (50, 200, 800)
STEPS = 3  # of the training step that a batch is compared with
MADE = {"users": 3_000, "length": 1_000, "titles": 20_000}
TINY = {"users": 100, "length": 100, "titles": 500}


def cases() -> dict[str, tuple[str, ...]]:
    """Overrides by row: one thing at a time is other than the default."""
    longer = {f"history {n}": (f"sequences.history={n}", f"sequences.requests={n}") for n in HISTORIES}
    one_request = ("model.attention=bidirectional", "sequences.requests=1")
    return {
        DEFAULT: (),
        **longer,
        "sampled candidates": ("candidates.kind=sampled",),
        "in-batch candidates": ("candidates.kind=in-batch",),
        "8 times the sequences": ("sequences.sequences=512",),
        "one request, bidirectional": one_request,
        "the same, masked titles": (*one_request, "model.mlm_weight=0.2"),
    }


def mapped(folder: Path, **sizes: int) -> PreparedDataset:
    """A made dataset whose event arrays lie in `folder`, as those of a prepared one do."""
    dataset = workload.made_dataset(**sizes)
    for name, array in dataset.arrays.items():
        np.save(folder / f"{name}.npy", array)
        dataset.arrays[name] = np.load(folder / f"{name}.npy", mmap_mode="r")
    return dataset


def configured(overrides: tuple[str, ...], behaviours: int) -> RunConfig:
    """Settings with an epoch of about so many behaviours."""
    config = workload.settings(*overrides)
    count = max(2 * config.sequences.sequences, math.ceil(behaviours / config.sequences.history))
    return workload.settings(*overrides, f"sequences.sequences_per_epoch={count}")


def read(builder: BatchBuilder, counts: dict[str, int], cpu: list[float]) -> None:
    """One epoch; says in `counts` what was in it, and adds to `cpu` the seconds that all threads have computed."""
    began = time.process_time()
    counts |= {"behaviours": 0, "requests": 0, "batches": 0}
    for batch in Loader(builder, seed=0, epoch=0):
        counts["behaviours"] += batch.history_T.numel() - batch.size[0]  # without the start positions
        counts["requests"] += batch.target_P.numel()
        counts["batches"] += 1
    cpu.append(time.process_time() - began)


def step_seconds(dataset: PreparedDataset, config: RunConfig, threads: int) -> float:
    """Of a training step under these settings, median, its batch ready beforehand."""
    torch.set_num_threads(threads)
    if any(dataset.content(kind) is None for kind in config.model.content):
        config = config.model_copy(update={"model": config.model.model_copy(update={"content": ()})})
    with world(config.training.device) as place:
        stepper = workload.stepper(dataset, config, place)
        batches = workload.endless(BatchBuilder(dataset, config), config, place)
        stepper.step(next(batches), 0.1)
        ready = [next(batches) for _ in range(STEPS)]
        times = [harness.seconds(partial(stepper.step, batch, 0.1)) for batch in ready]
    return Spread.of(times).median


def measure(options: argparse.Namespace) -> Report:
    if options.data is not None:
        dataset = PreparedDataset(options.data)
        if dataset.manifest.split_counts["train"] == 0:
            raise DataError(f"{options.data}: no event lies in the training period, so there is no batch to make.")
        return measured(dataset, options)
    with tempfile.TemporaryDirectory() as folder:
        return measured(mapped(Path(folder), **(TINY if options.smoke else MADE)), options)


def measured(dataset: PreparedDataset, options: argparse.Namespace) -> Report:
    """The page for this dataset."""
    torch.set_num_threads(1)
    behaviours, fewer = (1_000, ("sequences.sequences=8",)) if options.smoke else (BEHAVIOURS, ())
    configs = {name: configured((*fewer, *overrides), behaviours) for name, overrides in cases().items()}
    counts: dict[str, dict[str, int]] = {name: {} for name in configs}
    # One case after the other, not in turns: each builder holds the buckets of all intensities.
    times: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {name: [] for name in configs}
    for name, config in configs.items():
        builder = BatchBuilder(dataset, config)
        times |= harness.in_turns({name: partial(read, builder, counts[name], cpu[name])}, repeats=options.repeats)
        cpu[name] = cpu[name][-options.repeats :]  # without the warm-up
    rows = [
        {
            "": name,
            "behaviours/s of a core": Spread.rate(counts[name]["behaviours"], cpu[name]),
            "requests/s of a core": Spread.rate(counts[name]["requests"], cpu[name]),
            "behaviours/s of the clock": Spread.rate(counts[name]["behaviours"], times[name]),
            "CPU ms a batch": Spread.of([1000 * t / counts[name]["batches"] for t in cpu[name]]),
            "behaviours a batch": counts[name]["behaviours"] // counts[name]["batches"],
        }
        for name in configs
    ]
    rates = {name: Spread.rate(counts[name]["behaviours"], cpu[name]).median for name in configs}
    batch = Spread.of(cpu[DEFAULT]).median / counts[DEFAULT]["batches"]
    step = step_seconds(dataset, configs[DEFAULT], options.threads)

    def plot(axes: Any) -> None:
        axes.barh(list(rates)[::-1], [rate / 1e6 for rate in list(rates.values())[::-1]])
        axes.axvline(2, color="grey", linestyle=":")
        axes.set(xlabel="million behaviours a second on one core")

    return Report(
        title="Prepared arrays to batches, on one core",
        rows=rows,
        notes=[
            f"{dataset.manifest.n_users:,} viewers, {dataset.manifest.n_events:,} events, "
            f"{dataset.manifest.n_titles:,} titles; their arrays are mapped into memory and were read before. One "
            "thread makes the batches and another takes them from its queue. 'Of a core' is a second of CPU time of "
            "both, which other processes do not change; by the clock it takes longer where cores are busy. A behaviour "
            "is an event that the model reads, a request one whose title it is to predict.",
            f"With the default settings a batch takes {1000 * batch:.2f} ms of CPU time. A training step on such a "
            f"batch, ready beforehand, takes {1000 * step:.0f} ms with {options.threads} threads: making the batch "
            f"costs {100 * batch / step:.2g}% of it, of one core, beside the step.",
        ],
        promises=[
            Promise("behaviours a second of one core, default settings", rates[DEFAULT], 2_000_000, at_least=True)
        ],
        plot=plot,
        details={"step_seconds": step, "counts": counts},
    )


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, help="prepared dataset (default: one is made)")


def main(argv: list[str] | None = None) -> int:
    return harness.run(__spec__.name, __doc__ or "", measure, argv, arguments)


if __name__ == "__main__":
    sys.exit(main())
