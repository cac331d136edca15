"""M5 itself, trained by `m5 train` as anyone would, within the seconds that a system has."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.literature.data import Data
from benchmarks.literature.system import Settings, System
from m5.config import RunConfig, load_config
from m5.parallel import World
from m5.predict import Predictor
from m5.train import Beat, Trainer, train

COMMON = {
    "name": "m5",
    "training.device": "cpu",
    "training.checkpoint_minutes": 1000,  # longer than any training here
    "training.epochs": 1000,  # the clock ends it
    "training.patience": 3,
}
SPARE = 0.02  # of the time, for what is not foreseen
LEAST = 0.1  # of the time, that steps get in any case


class TimedTrainer(Trainer):
    """A training that ends early enough for its last validation, its checkpoint and reading it to fit in the time.

    The last validation takes as long as a first one, which is tried for it; checkpoint and reading it take about as
    long as building.

    Args:
        config, place, beat: as of `Trainer`.
        began: `time.monotonic()` when the fitting began.
        seconds: from then on.
    """

    def __init__(self, config: RunConfig, place: World, beat: Beat, *, began: float, seconds: float):
        building = time.monotonic()
        super().__init__(config, place, beat)
        built = time.monotonic()
        self.validate()
        now = time.monotonic()
        left = seconds * (1 - SPARE) - (now - began) - (now - built) - (built - building)
        minutes = max(left, LEAST * seconds) / 60
        # The schedule and the end of the steps go by it.
        training = config.training.model_copy(update={"max_minutes": minutes})
        self.config = config.model_copy(update={"training": training})


def fit(data: Data, settings: Settings, seed: int, seconds: float) -> Predictor:
    began = time.monotonic()
    values: dict[str, Any] = COMMON | dict(settings)
    values |= {
        "seed": seed,
        "sequences.history": data.history,
        "sequences.requests": data.history,
        "training.threads": torch.get_num_threads(),
        "training.max_minutes": seconds / 60,
        "training.validation_targets": data.validation_targets,
        "training.filter_seen": str(data.filter_seen).lower(),
    }
    overrides = [f"{name}={value}" for name, value in values.items()]

    def timed(config: RunConfig, place: World, beat: Beat) -> Trainer:
        return TimedTrainer(config, place, beat, began=began, seconds=seconds)

    with tempfile.TemporaryDirectory() as folder:
        config = load_config(data.preset, overrides, data.dataset.folder, Path(folder) / "run")
        train(config, resume="over", trainer=timed)
        return Predictor.load(config.out, "cpu")


SYSTEM = System(
    name="m5",
    title="M5: multi-modal, multi-interest, multi-scenario",
    source=(
        "Zhao, Gao, Xu and Chen, M5: Multi-modal multi-interest multi-scenario matching for over-the-top "
        "recommendation, KDD 2023, doi 10.1145/3580305.3599863"
    ),
    built_on="m5.train, on TorchRec",
    departures="Every position is a target; rights decide the negatives; m5/model/README.md has the rest.",
    # On top of the preset. One block and small learning rates of the tables did best in a search on the synthetic
    # world; large ones, and no dropout, on MovieLens, where a training of a minute is half an epoch. Warm-up is short,
    # because trainings are.
    settings=(
        {"model.blocks": 1, "optimizer.lr": 0.005, "optimizer.table_lr": 0.05, "optimizer.warmup_steps": 20},
        {
            "model.blocks": 1,
            "sequences.sequences": 48,
            "optimizer.lr": 0.004,
            "optimizer.table_lr": 0.5,
            "optimizer.warmup_steps": 20,
            "model.dropout": 0,
            "model.id_dropout": 0,
            "model.scenario_dropout": 0,
        },
        {"optimizer.warmup_steps": 20},
    ),
    fit=fit,
)
