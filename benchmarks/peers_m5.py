"""M5, for `benchmarks.peers`: the product's step and its training, in a process of their own."""

from __future__ import annotations

import time
from contextlib import ExitStack
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import synchronise
from benchmarks.peers_line import serve
from benchmarks.workload import endless, stepper
from m5.best import read_record
from m5.config import load_config
from m5.data.sequences import BatchBuilder
from m5.library_warnings import silence_known
from m5.parallel import World, world
from m5.schema import PreparedDataset
from m5.step import Stepper
from m5.train import train


class Product:
    """One model with its data.

    Args:
        data: the prepared dataset.
        out: folder for the run.
        preset, overrides: its settings.
    """

    def __init__(self, *, data: str, out: str, preset: str, overrides: list[str]):
        silence_known()
        self.config = load_config(preset, overrides, Path(data), Path(out))
        self.dataset = PreparedDataset(data)
        self.turn, self.open = 0, ExitStack()

    def described(self) -> dict[str, Any]:
        """The targets of an epoch: every training watch."""
        return {"epoch_targets": self.dataset.manifest.split_counts["train"]}

    @cached_property
    def place(self) -> World:
        assert self.config.training.threads is not None
        torch.set_num_threads(self.config.training.threads)
        return self.open.enter_context(world(self.config.training.device))

    @cached_property
    def builder(self) -> BatchBuilder:
        return BatchBuilder(self.dataset, self.config)

    @cached_property
    def stepper(self) -> Stepper:
        return stepper(self.dataset, self.config, self.place)

    def steps(self, skip: int, batches: int) -> dict[str, Any]:
        """Targets and seconds of `batches` training batches after `skip` others, from a new loader."""
        self.turn += 1  # another order of the epoch in every turn
        feed = endless(self.builder, self.config.model_copy(update={"seed": self.turn}), self.place)
        # A hundredth of the learning rates: the warm-up that training has is not here.
        taken = self.stepper.steps(islice(feed, skip + batches), lambda: 0.01)
        for _ in islice(taken, skip):
            pass
        synchronise()
        began, targets = time.perf_counter(), 0
        for step in taken:
            targets += step.requests
        synchronise()
        return {"targets": targets, "seconds": time.perf_counter() - began, "batches": batches}

    def train(self, minutes: float) -> dict[str, Any]:
        """`m5 train` for so long; its one validation and its checkpoint come when the time is over."""
        forever = {"epochs": 10**6, "evaluate_every": 10**6, "checkpoint_minutes": 1e6, "max_minutes": minutes}
        training = self.config.training.model_copy(update=forever)
        train(self.config.model_copy(update={"training": training}))
        record = read_record(self.config.out)
        return {"seconds": record["seconds"], "batches": record["step"]}


if __name__ == "__main__":
    serve(Product)
