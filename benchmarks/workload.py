"""What the benchmarks train on: a dataset in memory of any size, and the product's own model, loss, loader and step."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_map

from m5.assemble import build_model
from m5.batch import Batch
from m5.config import RunConfig, load_config
from m5.data.loader import Loader
from m5.data.sequences import BatchBuilder
from m5.parallel import World, distribute
from m5.plan.description import Dataset
from m5.plan.stand_in import StandIn
from m5.ranks import Exchange
from m5.schema import PreparedDataset
from m5.step import Stepper
from m5.train import training_model

NOWHERE = Path("unused")  # a configuration must name its folders; a dataset in memory has none


def made_dataset(
    *, users: int, length: int, titles: int, values: int = 8, content_width: int = 64, seed: int = 0
) -> StandIn:
    """A streaming service in memory: region, plan and device, watch time, content vectors, popular and rare titles.

    Args:
        users, length: every viewer has `length` training events.
        titles: of the catalogue, all of them warm.
        values: of every vocabulary. A viewer has one region and one plan, as viewers do.
        content_width: of the graph vectors.
    """
    like = Dataset(
        users=users,
        titles=titles,
        events=users * length,
        longest_history=length,
        categories=4,
        scenarios={"region": values, "plan": values},
        contexts={"device": values},
        user_features={"age_band": values},
        intensities={"seconds": 8},
        content={"graph": content_width},
    )
    dataset = StandIn(like, lengths=[length] * users, titles=titles, cold=0, values=values, seed=seed)
    generator = np.random.default_rng(seed)
    for name in like.scenarios:
        dataset.arrays[f"scenario_{name}"] = np.repeat(generator.integers(1, values + 1, users, dtype=np.int32), length)
    # Squaring a uniform number makes the catalogue's first tenth get a third of the watches.
    dataset.arrays["title"] = (titles * generator.random(users * length) ** 2).astype(np.int32)
    counts = np.bincount(dataset.arrays["title"], minlength=titles)
    dataset.titles["train_count"], dataset.titles["cold"] = counts, False
    return dataset


def settings(*overrides: str, preset: str = "default") -> RunConfig:
    """A configuration for a dataset in memory, without the watchdog."""
    return load_config(preset, ["training.stall_seconds=null", *overrides], NOWHERE, NOWHERE)


def stepper(dataset: PreparedDataset, config: RunConfig, place: World) -> Stepper:
    """Model, loss and optimizers as `m5 train` has them, ready to step."""
    exchange = Exchange(place.rank, place.size)
    bare = build_model(dataset, config, table_device="meta")
    whole = training_model(dataset, config, bare, place.device, exchange)
    made = Stepper(distribute(whole, config, place), config, place)
    made.model.train()
    return made


def endless(builder: BatchBuilder, config: RunConfig, place: World) -> Iterator[Batch]:
    """This rank's training batches, epoch after epoch, from the product's loader and its thread."""
    loaders = (
        Loader(builder, seed=config.seed, epoch=epoch, rank=place.rank, world_size=place.size) for epoch in count()
    )
    return chain.from_iterable(loaders)


class Trained:
    """A model with its step on some batches, made beforehand.

    Args:
        dataset, config, place: as for `stepper`.
        steps: number of batches.
    """

    def __init__(self, dataset: PreparedDataset, config: RunConfig, place: World, steps: int):
        self.stepper = stepper(dataset, config, place)
        made = endless(BatchBuilder(dataset, config), config, place)
        self.batches = [batch.to(place.device) for batch in islice(made, steps)]

    def whole(self) -> None:
        """All batches, a step each."""
        for batch in self.batches:
            self.stepper.step(batch, 0.1)


def detached(arguments: Any) -> Any:
    """The same with tensors that stand at the beginning of a graph."""

    def cut(value: Any) -> Any:
        return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value

    return tree_map(cut, arguments)
