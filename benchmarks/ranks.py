"""Steps of training on ranks that are processes of this machine (gloo on CPUs, NCCL on GPUs).

Every rank runs the product's loader, model and step, as under torchrun; what it has found comes back to the benchmark.
"""

from __future__ import annotations

import argparse
import os
import pickle
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import multiprocessing

from benchmarks import harness, workload
from benchmarks.step_parts import FACTOR, split
from m5.batch import Batch
from m5.config import ConfigError, RunConfig, load_config
from m5.data.sequences import BatchBuilder
from m5.library_warnings import silence_known
from m5.parallel import World, world
from m5.schema import DataError, PreparedDataset

T = TypeVar("T")
PROCESSES = multiprocessing.get_context("forkserver")
WARM_UP = 3  # steps; the loader's queue, full at first, has to be emptied besides
MADE = {"users": 2_000, "length": 500, "titles": 20_000}
TINY = {"users": 60, "length": 60, "titles": 500}
TINY_SETTINGS = ("sequences.sequences=8", "sequences.history=20", "sequences.requests=20", "model.blocks=1")


@dataclass(frozen=True)
class Job:
    """What ranks train on, and for how long.

    Attributes:
        config: the run.
        made: sizes of the dataset in memory (`workload.made_dataset`); None: the one in `config.data`.
        rounds, steps: how often, and how many steps each time.
        threads: of a rank.
        parts: whether to split steps after the plain ones.
    """

    config: RunConfig
    made: dict[str, int] | None
    rounds: int
    steps: int
    threads: int
    parts: bool = False


@dataclass
class Found:
    """Of one rank, a figure a round.

    Attributes:
        seconds, waits: of the plain steps, and what of them was waiting for a batch.
        targets: of all ranks together.
        sequences: of this rank.
        parts: seconds by part.
        memory: peaks in bytes.
    """

    seconds: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    sequences: list[int] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)


# ---- one rank ------------------------------------------------------------------------------------------------


class Waiting:
    """An iterator that adds up how long others wait for it."""

    def __init__(self, batches: Iterator[Batch]):
        self.batches, self.seconds = batches, 0.0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        began = time.perf_counter()
        try:
            return next(self.batches)
        finally:
            self.seconds += time.perf_counter() - began


def train_some(place: World, job: Job, ready: Callable[[], Any] | None = None) -> Found:
    """Plain steps and, where the job asks for it, split ones, on one rank (a collective call).

    `ready` is called when the machine is warm: it may wait for others.
    """
    torch.set_num_threads(job.threads)
    config = job.config
    dataset = workload.made_dataset(**job.made) if job.made is not None else PreparedDataset(config.data)
    builder, stepper = BatchBuilder(dataset, config), workload.stepper(dataset, config, place)
    warm_up = WARM_UP + config.sequences.prefetch
    waiting = Waiting(workload.endless(builder, config, place))
    steps = stepper.steps(islice(waiting, warm_up + job.rounds * job.steps), lambda: FACTOR)
    for _ in islice(steps, warm_up):
        pass
    if ready is not None:
        ready()
    if place.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found = Found()
    for _ in range(job.rounds):
        waited, targets, sequences = waiting.seconds, 0, 0

        def work() -> None:
            nonlocal targets, sequences
            for taken in islice(steps, job.steps):
                targets += taken.requests
                sequences += taken.batch.size[0]

        found.seconds.append(harness.seconds(work))
        found.waits.append(waiting.seconds - waited)
        found.targets.append(targets)
        found.sequences.append(sequences)
    # To the end, where the pipeline leaves the model as it was.
    for _ in steps:
        raise AssertionError("a batch too many")
    found.memory["resident"] = harness.memory("VmHWM")
    if place.device.type == "cuda":
        found.memory["allocated"] = torch.cuda.max_memory_allocated()
        found.memory["reserved"] = torch.cuda.max_memory_reserved()
    if job.parts:
        again = workload.endless(builder, config, place)
        for _ in islice(again, warm_up):
            pass
        found.parts = [split(stepper, list(islice(again, job.steps))) for _ in range(job.rounds)]
    return found


# ---- ranks ---------------------------------------------------------------------------------------------------


def in_ranks(size: int, device: str, work: Callable[[World], T], *, apart: bool = False) -> list[T]:
    """What `work` returns on each of `size` ranks, which are new processes of this machine.

    Args:
        device: `training.device` of the run.
        apart: every process is the only rank of its own world.

    Raises:
        DataError, ConfigError: of a rank.
    """
    kind = device_kind(device, size)
    # Forked from a process that has only imported: starting one takes a moment instead of seconds.
    PROCESSES.set_forkserver_preload(["benchmarks.ranks"])
    with tempfile.TemporaryDirectory() as folder:
        arguments = size, kind, Path(folder), work, apart
        multiprocessing.start_processes(_process, arguments, nprocs=size, start_method="forkserver")
        outcomes = [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(size)]
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return outcomes


def device_kind(device: str, ranks: int) -> str:
    """`cpu` or `cuda`, for `auto` what this machine has. Raises ConfigError where GPUs are fewer than ranks."""
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if kind == "cuda" and ranks > torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ConfigError(f"every rank needs a GPU: {number_of(ranks, 'rank')}, {number_of(found, 'GPU')}.")
    return kind


def _process(number: int, size: int, kind: str, folder: Path, work: Callable[[World], Any], apart: bool) -> None:
    silence_known()
    os.environ |= {"LOCAL_RANK": str(number), "LOCAL_WORLD_SIZE": str(size)}
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    rank, ranks, store = (0, 1, f"store-{number}") if apart else (number, size, "store")
    dist.init_process_group(backend, init_method=f"file://{folder}/{store}", rank=rank, world_size=ranks)
    outcome: Any
    with world(kind) as place:
        try:
            outcome = work(place)
        except (ConfigError, DataError) as error:
            outcome = error
    (folder / str(number)).write_bytes(pickle.dumps(outcome))
    dist.destroy_process_group()


# ---- the command line ----------------------------------------------------------------------------------------


def add_job_arguments(parser: argparse.ArgumentParser, steps: int = 10) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, e.g. model.width=128")
    parser.add_argument("--data", type=Path, help="prepared dataset (default: one is made in memory)")
    parser.add_argument("--preset", default="default", help="where the settings start from")
    parser.add_argument("--steps", type=int, default=steps, help=f"of every repeat (default {steps})")


def job_of(options: argparse.Namespace, *more: str, threads: int, parts: bool = False) -> Job:
    """The job that the command line asks for, with `more` overrides.

    Raises:
        DataError, ConfigError: data or settings that cannot be trained on.
    """
    if options.steps < 1:
        raise ConfigError("--steps must be at least 1")
    smoke = TINY_SETTINGS if options.smoke else ()
    overrides = ["training.stall_seconds=null", *smoke, *options.overrides, *more]
    config = load_config(options.preset, overrides, options.data or workload.NOWHERE, workload.NOWHERE)
    if options.data is not None and PreparedDataset(options.data).manifest.split_counts["train"] == 0:
        raise DataError(f"{options.data}: no event lies in the training period, so there is nothing to train on.")
    made = (TINY if options.smoke else MADE) if options.data is None else None
    rounds, steps = (1, 2) if options.smoke else (options.repeats, options.steps)
    return Job(config, made, rounds, steps, config.training.threads or threads, parts)


def described(job: Job) -> str:
    """What is trained on, as a sentence of the page."""
    data, config = f"The dataset is {job.config.data}", job.config
    if job.made is not None:
        sizes = " viewers with ".join(f"{job.made[name]:,}" for name in ("users", "length"))
        data = f"The dataset is made: {sizes} watches each, {job.made['titles']:,} titles"
    return (
        f"{data}. Preset {config.preset}: {config.sequences.sequences} sequences a batch, history "
        f"{config.sequences.history}, width {config.model.width}, softmax '{config.candidates.kind}'."
    )


def number_of(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
