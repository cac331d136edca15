"""RecTools' transformers, for `benchmarks.peers`; runs in an environment of its own and imports nothing of m5.

The model, its data loader and PyTorch Lightning's trainer are used as RecTools' users have them, without progress bar,
logger, checkpoints and validation. What is not given here has RecTools' own default.
"""

from __future__ import annotations

import time
import warnings
from importlib import metadata
from typing import Any

import numpy as np
import pandas as pd
import torch
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from rectools import Columns
from rectools.dataset import Dataset
from rectools.dataset.context import get_context
from rectools.models import HSTUModel, SASRecModel

from benchmarks.peers_line import serve

MODELS = {"sasrec": SASRecModel, "hstu": HSTUModel}
TRAIN, VALID, TEST = 0, 1, 2  # of `m5.schema`


class Clock(Callback):
    """Counts targets and seconds, and ends the training.

    Args:
        skip: batches that come before the clock starts.
        batches: stop after so many more.
        seconds: stop after so long.
    """

    def __init__(self, *, skip: int = 0, batches: int | None = None, seconds: float | None = None):
        self.skip, self.batches, self.limit = skip, batches, seconds
        self.done, self.targets, self.seconds, self.began = 0, 0, 0.0, 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.done == 0:
            self._start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: dict, batch_idx: int
    ) -> None:
        self.done += 1
        self.targets += int((batch["y"] != 0).sum())
        if self.done == self.skip:
            self._start()
            return
        enough = self.batches is not None and self.done == self.skip + self.batches
        if enough or (self.limit is not None and time.perf_counter() - self.began > self.limit):
            _wait()
            self.seconds = time.perf_counter() - self.began
            trainer.should_stop = True

    def _start(self) -> None:
        _wait()
        self.targets, self.began = 0, time.perf_counter()


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class RecTools:
    """One model with its data.

    Args:
        events: .npz of `user`, `title`, `timestamp` in seconds and `split`, in each viewer's order.
        model: a key of MODELS.
        device: `cpu` or `cuda`.
        threads: of torch.
        settings: of the model's constructor.
    """

    def __init__(self, *, events: str, model: str, device: str, threads: int, settings: dict[str, Any]):
        warnings.filterwarnings("ignore")
        torch.set_num_threads(threads)
        self.model_class, self.accelerator = MODELS[model], "gpu" if device == "cuda" else "cpu"
        self.settings = settings
        with np.load(events) as arrays:
            self.split = arrays["split"]
            self.events = pd.DataFrame(
                {
                    Columns.User: arrays["user"],
                    Columns.Item: arrays["title"],
                    Columns.Weight: 1.0,
                    Columns.Datetime: pd.to_datetime(arrays["timestamp"], unit="s"),
                }
            )
        # RecTools sorts by time with a stable sort, so that events of one second stay in the given order.
        self.train_events = self.events[self.split == TRAIN]

    def described(self) -> dict[str, Any]:
        """Versions, and the targets of an epoch: a viewer's newest `history` watches, each but the first of all."""
        watches = self.train_events.groupby(Columns.User).size()
        newest = watches[watches >= 2].clip(upper=self.settings["session_max_len"] + 1)
        versions = {name: metadata.version(name) for name in ("rectools", "torch", "numpy", "pandas")}
        return {"versions": versions, "epoch_targets": int((newest - 1).sum())}

    def steps(self, skip: int, batches: int) -> dict[str, Any]:
        """Targets and seconds of `batches` training batches after `skip` others, of a new model."""
        return self._fit(Clock(skip=skip, batches=batches))

    def train(self, minutes: float) -> dict[str, Any]:
        return self._fit(Clock(seconds=60 * minutes))

    def _fit(self, clock: Clock) -> dict[str, Any]:
        seed_everything(0)

        def trainer() -> Trainer:
            return Trainer(
                max_epochs=-1,
                accelerator=self.accelerator,
                devices=1,
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                enable_checkpointing=False,
                callbacks=[clock],
            )

        self.model = self.model_class(verbose=0, get_trainer_func=trainer, **self.settings)
        self.model.fit(Dataset.construct(self.train_events))
        # RecTools trains with a deep copy of its trainer.
        (counted,) = (c for c in self.model.fit_trainer.callbacks if isinstance(c, Clock))
        return {"targets": counted.targets, "seconds": counted.seconds, "batches": counted.done - counted.skip}

    def recommend(self, k: int, out: str) -> dict[str, Any]:
        """Write `user`, `title`, `rank` of the K best unseen titles for every viewer with a test event.

        What came before that event is read, the validation event included. HSTU also gets the event's time, as M5 does.
        """
        test = self.events[self.split == TEST]
        before = self.events[self.split != TEST]
        lists = self.model.recommend(
            users=test[Columns.User].unique(),
            dataset=Dataset.construct(before[before[Columns.User].isin(test[Columns.User])]),
            k=min(k, self.train_events[Columns.Item].nunique()),
            filter_viewed=True,
            on_unsupported_targets="warn",
            context=get_context(test) if self.model.require_recommend_context else None,
        )
        np.savez(
            out,
            user=lists[Columns.User].to_numpy(np.int64),
            title=lists[Columns.Item].to_numpy(np.int64),
            rank=lists[Columns.Rank].to_numpy(np.int64),
        )
        return {"lists": int(lists[Columns.User].nunique())}


if __name__ == "__main__":
    serve(RecTools)
