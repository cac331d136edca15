"""Training: `m5 train`, or `torchrun -m m5.train` with the same arguments.

One visible loop; what it calls is a step (`m5.step`), the data (`m5.data`), checkpoints and the watchdog.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from m5.assemble import build_model
from m5.batch import Batch
from m5.best import save_weights
from m5.checkpoint import Checkpoints
from m5.checkpoint_tensors import local_parts
from m5.config import ConfigError, RunConfig
from m5.data.loader import Loader
from m5.data.sequences import BatchBuilder
from m5.eligibility import Eligibility, Playable
from m5.evaluate import Scorer, evaluate
from m5.health import Health
from m5.losses import M5Train, MatchingLoss
from m5.metrics import SMALL_SLICE
from m5.model.m5 import M5
from m5.parallel import World, distribute, sum_over_ranks, training_state, whole_state, world
from m5.predict import Predictor
from m5.progress import TrainingLog
from m5.ranks import ALONE, Exchange, Pulse, agree, on_first
from m5.replay import save_replay
from m5.resume import A_RANKS_OWN, Position, Resume, Stopped, StopRequest, all_settings, begin, identity
from m5.schema import DataError, PreparedDataset
from m5.step import NonFinite, Stepped, Stepper
from m5.watchdog import Watchdog

Beat = Callable[[str], None]


def train(
    config: RunConfig, resume: Resume = "no", trainer: Callable[[RunConfig, World, Beat], Trainer] | None = None
) -> dict[str, float]:
    """Train one run and leave its best-on-validation weights in `config.out`.

    Args:
        resume: what to do with an earlier training in `config.out`: "yes" continues from its newest checkpoint, "no"
            refuses to lose it, "over" starts over. A job that torchrun has restarted goes on with what it has begun,
            whatever is said here.
        trainer: makes the `Trainer`, or one that does more.

    Returns:
        Validation metrics of those weights.

    Raises:
        DataError, ConfigError: data or settings that cannot be trained on.
        Stopped: a signal has asked for it; the checkpoint is written.
    """
    share = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(config.training.threads or int(os.environ.get("OMP_NUM_THREADS", max(1, share))))
    with world(config.training.device) as place:
        # Before anything is compared by it: a limit on one rank alone would be a hang of its own.
        agree(place.size, {"training.stall_seconds": config.training.stall_seconds})
        limit, folder = config.training.stall_seconds, config.out / "stalls"
        with Watchdog(limit=limit, rank=place.rank, size=place.size, folder=folder) as watchdog:
            return (trainer or Trainer)(config, place, watchdog.beat).run(resume)


def softmax_precision(setting: str, device: torch.device) -> torch.dtype:
    """The dtype of the candidate softmax's products; `auto` takes bfloat16 only where it is not emulated."""
    if setting != "auto":
        return getattr(torch, setting)
    native = (
        torch.cuda.is_bf16_supported(including_emulation=False)
        if device.type == "cuda"
        else torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )
    return torch.bfloat16 if native else torch.float32


def training_model(
    dataset: PreparedDataset,
    config: RunConfig,
    model: M5,
    device: torch.device | str = "cpu",
    exchange: Exchange = ALONE,
) -> M5Train:
    """A model with the loss that the settings ask for."""
    eligibility = Eligibility.from_dataset(dataset, device)
    loss = MatchingLoss(
        playable=Playable(eligibility) if eligibility is not None else None,
        sampled=config.candidates.kind != "full",
        mlm_weight=config.model.mlm_weight,
        width=config.model.width,
        precision=softmax_precision(config.candidates.precision, torch.device(device)),
        exchange=exchange,
    )
    return M5Train(model, loss)


class Schedule:
    """Factor on all learning rates: linear warm-up, then constant or cosine over the planned steps or minutes."""

    def __init__(self, config: RunConfig, total_steps: int):
        self.settings, self.total_steps = config.optimizer, total_steps
        self.max_seconds = 60 * (config.training.max_minutes or math.inf)

    def progress(self, step: int, seconds: float) -> float:
        """Share of the run that is over, 0 to 1: by steps, or by the clock where that ends it earlier."""
        return min(1.0, max(step / self.total_steps, seconds / self.max_seconds))

    def factor(self, step: int, seconds: float) -> float:
        warm = min(1.0, (step + 1) / max(1, self.settings.warmup_steps))
        if self.settings.schedule == "constant":
            return warm
        cosine = 0.5 * (1 + math.cos(math.pi * self.progress(step, seconds)))
        return warm * (self.settings.final_lr + (1 - self.settings.final_lr) * cosine)


class _Watched:
    """A scorer that tells the watchdog of its progress."""

    def __init__(self, scorer: Scorer, beat: Beat):
        self.scorer, self.beat, self.name = scorer, beat, scorer.name

    def score(self, event_index: np.ndarray) -> Tensor | np.ndarray:
        self.beat("validation")
        return self.scorer.score(event_index)


class Trainer:
    """State of one rank's training; `run` is the loop.

    Args:
        config: the run.
        place: this rank.
        beat: tells the watchdog of progress.

    Attributes:
        within: a scenario's name and value, of which alone the requests validate; None: all do.
        wanted: bool [T], the training events that are asked for; None: all are.
        origin: what else the record of the best weights is to hold.
    """

    within: tuple[str, str] | None = None
    wanted: np.ndarray | None = None
    origin: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, config: RunConfig, place: World, beat: Beat = lambda where: None):
        self.config, self.place, self.beat = config, place, beat
        beat("reading the dataset")
        self.dataset = PreparedDataset(config.data)
        self.identity = identity(self.dataset, config)
        shared = {name: value for name, value in all_settings(config).items() if name not in A_RANKS_OWN}
        agree(place.size, {"manifest": self.identity["manifest"], "content": self.identity["content"], **shared})
        self.builder = BatchBuilder(self.dataset, config)
        counts = self.dataset.manifest.split_counts
        if counts["train"] == 0:
            raise DataError(f"{config.data}: no event lies in the training period, so there is nothing to train on.")
        if counts["valid"] == 0:
            raise DataError(f"{config.data}: no event lies in the validation period, which chooses the checkpoint.")
        beat("building the model")
        self.model = self.build()
        # The unsharded twin that validation scores with, on the first rank.
        self.twin: Predictor | None = None
        if place.first:
            twin = build_model(self.dataset, config).to(place.device)
            self.twin = Predictor(twin, self.builder, config, place.device)
        self.stepper = Stepper(self.model, config, place)

    def build(self) -> nn.Module:
        """What is trained: the model with its loss, its tables sharded."""
        config, place = self.config, self.place
        bare = build_model(self.dataset, config, table_device="meta")
        whole = training_model(self.dataset, config, bare, place.device, Exchange(place.rank, place.size))
        self.beat("sharding the tables")
        return distribute(whole, config, place)

    def weights(self, prefix: str = "model.") -> dict[str, Tensor]:
        """The weights, whole, on the first rank (a collective call); `prefix` as of `whole_state`."""
        return whole_state(self.model, self.place.device, prefix)

    def validate(self) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Validation metrics, the same on every rank, and the weights, whole, on the first (a collective call).

        `training.metric` also stands there per scenario value, e.g. as "ndcg@10/region=US" beside "n/region=US".
        """
        state = self.weights()
        return on_first(lambda: self._measure(state)), state

    def _measure(self, state: dict[str, Tensor]) -> dict[str, float]:
        """On the first rank: metrics of these weights."""
        assert self.twin is not None
        self.twin.update(state)
        report = evaluate(
            self.dataset,
            [_Watched(self.twin, self.beat)],
            split="valid",
            filter_seen=self.config.training.filter_seen,
            max_targets=self.config.training.validation_targets,
            bootstrap=0,
            seed=self.config.seed,
            within=self.within,
        )
        measured, metric = report["models"][self.twin.name], self.config.training.metric
        metrics = {key: value for key, value in measured["overall"].items() if isinstance(value, int | float)}
        # Per scenario value the metric alone, where there are requests enough for it to mean anything.
        for name, scenario in measured["scenarios"].items():
            if scenario["n"] >= SMALL_SLICE:
                metrics |= {f"{metric}/{name}": scenario[metric], f"n/{name}": scenario["n"]}
        return metrics

    def loader(self, position: Position) -> Loader:
        place = self.place
        return Loader(
            self.builder,
            seed=self.config.seed,
            epoch=position.epoch,
            rank=place.rank,
            world_size=place.size,
            first=position.batch,
            wanted=self.wanted,
        )

    def run(self, resume: Resume = "no") -> dict[str, float]:
        """Train to the end; see `train`."""
        config, place = self.config, self.place
        with begin(config, place, resume, self.identity, self.beat) as checkpoints, StopRequest() as self.asked:
            state = training_state(self.model, self.stepper.optimizer, self.stepper.dense)
            position = Position.of(checkpoints.load(state), self.identity)
            if position.finished:
                return position.best
            self.beat("the order of the epoch")
            loader = self.loader(position)
            # Epochs differ by a batch or two; a resumed run plans with what it began with.
            position.planned = position.planned or len(loader) * config.training.epochs
            schedule = Schedule(config, total_steps=position.planned)
            self.pulse = Pulse(rank=place.rank, size=place.size, seconds=position.seconds)
            self.began = time.monotonic() - position.seconds
            with TrainingLog(config.out, enabled=place.first, schedule=schedule, position=position) as log:
                self.before_the_first_step(position, log)
                while not position.finished:
                    for taken in self._steps(loader, schedule, position):
                        position.step, position.batch = position.step + 1, position.batch + 1
                        log.step(position, taken.loss, taken.requests)
                        self._tell()
                        # once in a while: the model's health, a checkpoint
                        if position.step % config.training.log_every == 0:
                            log.write(position, Health.of(taken.scores, taken.batch, self.dataset.manifest).numbers())
                        if self.pulse.stop or self._out_of_time():
                            break
                        if position.checkpoint_due(config.training, self.pulse.seconds):
                            self._checkpoint(checkpoints, state, position, log)
                    self._stop_if_asked(checkpoints, state, position, log)
                    # once an epoch, or less often: evaluate, keep the best
                    last = self._out_of_time() or position.epoch + 1 == config.training.epochs
                    if last or (position.epoch + 1) % config.training.evaluate_every == 0:
                        self.validate_and_keep(position, log)
                    position.finished = last or position.stale >= config.training.patience
                    position.epoch, position.batch = position.epoch + 1, 0
                    if not position.finished:
                        self._stop_if_asked(checkpoints, state, position, log)
                        self.beat("the order of the epoch")
                        loader = self.loader(position)
                self._checkpoint(checkpoints, state, position, log)
                checkpoints.wait()
        return position.best

    def before_the_first_step(self, position: Position, log: TrainingLog) -> None:
        """Nothing: weights that start at random are not worth a validation."""

    def _tell(self) -> None:
        self.pulse.tell(stop=self.asked.signal is not None, seconds=time.monotonic() - self.began)

    def _stop_if_asked(self, checkpoints: Checkpoints, state: dict, position: Position, log: TrainingLog) -> None:
        """Raises Stopped, with all saved, where some rank was asked to stop (a collective call)."""
        self._tell()
        self.pulse.read()
        if self.pulse.stop:
            self._checkpoint(checkpoints, state, position, log)
            checkpoints.wait()
            raise Stopped(self.asked.signal, position.step, self.config.out)

    def _steps(self, loader: Loader, schedule: Schedule, position: Position) -> Iterator[Stepped]:
        """One epoch's steps from the position on.

        Raises:
            ConfigError: the loss or the gradient is not finite; the batch is kept for `m5 replay`.
        """
        self.model.train()

        def watched() -> Iterator[Batch]:
            for batch in loader:
                self.beat(f"epoch {position.epoch + 1}, step {position.step + 1}")
                yield batch

        try:
            yield from self.stepper.steps(watched(), lambda: schedule.factor(position.step, self.pulse.seconds))
        except NonFinite as error:
            self._keep_for_replay(loader, position, error)

    def _keep_for_replay(self, loader: Loader, position: Position, error: NonFinite) -> None:
        state = self.weights(prefix="")
        place = {"epoch": position.epoch, "step": position.step, "batch": position.batch, "found": str(error)}
        # All ranks stay until it is written: torchrun ends the others of a rank that leaves.
        on_first(lambda: save_replay(self.config.out, loader.whole(position.batch), state, place))
        raise ConfigError(
            f"training diverged: {error} at step {position.step} of epoch {position.epoch + 1}. Start over (--restart) "
            "with a lower optimizer.lr, optimizer.table_lr or optimizer.expert_lr. "
            f"`m5 replay {self.config.out}` runs the batch again and names the first layer that is not finite."
        )

    def validate_and_keep(self, position: Position, log: TrainingLog) -> None:
        """Validate; make these weights RUN/best if they are."""
        metrics, state = self.validate()
        improved = metrics[self.config.training.metric] > position.best.get(self.config.training.metric, -1.0)
        position.stale = 0 if improved else position.stale + 1
        if improved:
            position.best = metrics
            record = {"step": position.step, "epoch": position.epoch, "valid": metrics, "seconds": self.pulse.seconds}
            record |= {"content": self.identity["content"], **self.origin}
            on_first(lambda: save_weights(self.config.out, state, self.dataset.manifest, record))
        log.validation(position, metrics, improved)

    def _checkpoint(self, checkpoints: Checkpoints, state: dict, position: Position, log: TrainingLog) -> None:
        """Save where training is. Weights that are not finite are not saved: they would displace those that are."""
        broken = sum(not value.isfinite().all() for value in local_parts(state).values())
        if sum_over_ranks(float(broken), self.place.device):
            raise ConfigError(
                f"training diverged: weights are not finite after step {position.step}. Start over (--restart) with a "
                "lower optimizer.lr, optimizer.table_lr or optimizer.expert_lr; checkpoints from before are kept."
            )
        position.seconds = position.saved_at = self.pulse.seconds
        position.log = log.state()
        checkpoints.save(state, {**position.record(), **self.identity, "config": self.config.model_dump(mode="json")})

    def _out_of_time(self) -> bool:
        """Whether the first rank's clock has passed `max_minutes`; all ranks go by it."""
        return self.pulse.seconds > 60 * (self.config.training.max_minutes or math.inf)


if __name__ == "__main__":
    from m5.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
