"""M5 itself, trained by `m5 train` as anyone would."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.literature.data import Data
from benchmarks.literature.system import Settings, System
from m5.config import load_config
from m5.predict import Predictor
from m5.train import train

COMMON = {
    "name": "m5",
    "training.threads": 1,
    "training.device": "cpu",
    "training.checkpoint_minutes": 1000,  # longer than any training here
    "training.epochs": 1000,  # the clock ends it
    "training.patience": 3,
}


def fit(data: Data, settings: Settings, seed: int, seconds: float) -> Predictor:
    values: dict[str, Any] = COMMON | dict(settings)
    values |= {
        "seed": seed,
        "sequences.history": data.history,
        "sequences.requests": data.history,
        "training.max_minutes": seconds / 60,
        "training.validation_targets": data.validation_targets,
        "training.filter_seen": str(data.filter_seen).lower(),
    }
    overrides = [f"{name}={value}" for name, value in values.items()]
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(data.preset, overrides, data.dataset.folder, Path(folder) / "run")
        train(config, resume="over")
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
    # world, large ones on MovieLens; warm-up is short, because trainings are.
    settings=(
        {"model.blocks": 1, "optimizer.lr": 0.005, "optimizer.table_lr": 0.05, "optimizer.warmup_steps": 20},
        {"model.blocks": 1, "optimizer.lr": 0.003, "optimizer.table_lr": 0.5, "optimizer.warmup_steps": 20},
        {"optimizer.warmup_steps": 20},
    ),
    fit=fit,
)
