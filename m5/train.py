"""Training: `m5 train`, or `torchrun -m m5.train` with the same arguments.

One visible loop; what it calls is the model's loss (`m5.losses`), the data (`m5.data`) and parallelism (`m5.parallel`).
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from m5.assemble import build_model
from m5.batch import Batch
from m5.best import BEST, content_digest, save_weights
from m5.config import ConfigError, RunConfig
from m5.data.loader import Loader
from m5.data.sequences import BatchBuilder
from m5.eligibility import Eligibility
from m5.evaluate import evaluate
from m5.health import Health
from m5.losses import M5Train
from m5.model.m5 import Scores
from m5.parallel import (
    DistributedModelParallel,
    World,
    dense_parameters,
    distribute,
    sum_over_ranks,
    whole_state,
    world,
)
from m5.predict import Predictor
from m5.progress import TrainingLog
from m5.schema import DataError, PreparedDataset


def train(config: RunConfig) -> dict[str, float]:
    """Train one run and leave its best-on-validation checkpoint in `config.out`.

    Returns:
        Validation metrics of that checkpoint.

    Raises:
        DataError, ConfigError: data or settings that cannot be trained on.
    """
    share = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(config.training.threads or int(os.environ.get("OMP_NUM_THREADS", max(1, share))))
    with world(config.training.device) as place:
        return Trainer(config, place).run()


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


class Trainer:
    """State of one rank's training; `run` is the loop."""

    def __init__(self, config: RunConfig, place: World):
        self.config, self.place = config, place
        self.dataset = PreparedDataset(config.data)
        self.builder = BatchBuilder(self.dataset, config)
        counts = self.dataset.manifest.split_counts
        if counts["train"] == 0:
            raise DataError(f"{config.data}: no event lies in the training period, so there is nothing to train on.")
        if counts["valid"] == 0:
            raise DataError(f"{config.data}: no event lies in the validation period, which chooses the checkpoint.")
        self.model = self._sharded_model()
        # The unsharded twin that validation scores with, on the first rank.
        self.twin = Predictor(build_model(self.dataset, config).to(place.device), self.builder, config, place.device)
        self.dense = dense_parameters(self.model)
        matrices = [p for p in self.dense.values() if p.ndim > 1]
        others = [p for p in self.dense.values() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": config.optimizer.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=config.optimizer.lr,
            fused=True,
        )
        self.table_optimizer = self.model.fused_optimizer
        self.table_lrs = [group["lr"] for group in self.table_optimizer.param_groups]

    def _sharded_model(self) -> DistributedModelParallel:
        eligibility = Eligibility.from_dataset(self.dataset, self.place.device)

        def playable(rights_PM: torch.Tensor, timestamp_P: torch.Tensor, title_C: torch.Tensor) -> torch.Tensor:
            assert eligibility is not None
            return eligibility.mask(rights_PM, timestamp_P).index_select(1, title_C)

        config = self.config
        model = M5Train(
            model=build_model(self.dataset, config, table_device="meta"),
            playable=playable if eligibility is not None else None,
            mlm_weight=config.model.mlm_weight,
            width=config.model.width,
            precision=softmax_precision(config.candidates.precision, self.place.device),
        )
        return distribute(model, config, self.place)

    def _set_learning_rates(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.optimizer.lr * factor
        for group, lr in zip(self.table_optimizer.param_groups, self.table_lrs, strict=True):
            group["lr"] = lr * factor
        # The fused optimizer has stepped in backward already; its step() only hands the learning rate down.
        self.table_optimizer.step()

    def step(self, batch: Batch, factor: float) -> tuple[float, int, Scores]:
        """One optimizer step; returns the local loss sum in nats, the local number of targets and what was scored."""
        self._set_learning_rates(factor)
        requests = batch.request_P.numel()
        everywhere = requests if self.place.size == 1 else sum_over_ranks(requests, self.place.device)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.place.device.type, torch.bfloat16, enabled=self.config.training.autocast):
            loss, scores = self.model(batch.to(self.place.device, non_blocking=True))
        # Gradients are averaged over ranks; the loss is a mean over the targets of all ranks.
        (loss * (self.place.size / everywhere)).backward()
        nn.utils.clip_grad_norm_(self.dense.values(), self.config.optimizer.clip)
        self.optimizer.step()
        return loss.item(), requests, scores

    def validate(self) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        """Validation metrics, the same on every rank, and the weights, whole, on the first (a collective call)."""
        state = whole_state(self.model, self.place.device)
        metrics: list[dict[str, float]] = [{}]
        if self.place.first:
            self.twin.update(state)
            report = evaluate(
                self.dataset,
                [self.twin],
                split="valid",
                filter_seen=self.config.training.filter_seen,
                max_targets=self.config.training.validation_targets,
                bootstrap=0,
                seed=self.config.seed,
            )
            overall = report["models"][self.twin.name]["overall"]
            metrics[0] = {key: value for key, value in overall.items() if isinstance(value, int | float)}
        dist.broadcast_object_list(metrics, src=0)
        return metrics[0], state

    def run(self) -> dict[str, float]:
        config, place = self.config, self.place
        if place.first:
            _fresh_folder(config)
        loader = Loader(self.builder, seed=config.seed, epoch=0, rank=place.rank, world_size=place.size)
        if not len(loader):
            raise DataError(f"{config.data}: fewer training sequences than ranks ({place.size}).")
        schedule = Schedule(config, total_steps=len(loader) * config.training.epochs)
        log = TrainingLog(config.out, enabled=place.first, schedule=schedule)
        best: dict[str, float] = {}
        began, step, stale, out_of_time = time.monotonic(), 0, 0, False
        with log:
            for epoch in range(config.training.epochs):
                loader = Loader(self.builder, seed=config.seed, epoch=epoch, rank=place.rank, world_size=place.size)
                self.model.train()
                for batch in loader:
                    loss, targets, scores = self.step(batch, schedule.factor(step, time.monotonic() - began))
                    if not math.isfinite(loss):
                        raise ConfigError(
                            f"training diverged: the loss is {loss} at step {step} of epoch {epoch + 1}. Lower "
                            "optimizer.lr, optimizer.table_lr or optimizer.expert_lr."
                        )
                    step += 1
                    log.step(step, epoch, loss, targets)
                    # once in a while: metrics, the clock
                    if step % config.training.log_every == 0:
                        log.write(step, epoch, Health.of(scores, batch, self.dataset.manifest).numbers())
                        if out_of_time := self._out_of_time(began):
                            break
                last = out_of_time or epoch + 1 == config.training.epochs
                # once in a while: evaluate, keep the best
                if last or (epoch + 1) % config.training.evaluate_every == 0:
                    metrics, state = self.validate()
                    improved = metrics[config.training.metric] > best.get(config.training.metric, -1.0)
                    stale = 0 if improved else stale + 1
                    if improved:
                        best = metrics
                        self._keep(
                            state, {"step": step, "epoch": epoch, "valid": metrics, "seconds": time.monotonic() - began}
                        )
                    log.validation(step, epoch, metrics, improved)
                if last or stale >= config.training.patience:
                    break
        dist.barrier()
        return best

    def _keep(self, state: dict[str, torch.Tensor], record: dict) -> None:
        """Make these weights RUN/best; they are whole on the first rank only."""
        if self.place.first:
            record["content"] = content_digest(self.dataset, self.config.model.content)
            save_weights(self.config.out, state, self.dataset.manifest, record)

    def _out_of_time(self, began: float) -> bool:
        """Whether the first rank's clock has passed `max_minutes`; all ranks stop together."""
        late = self.place.first and time.monotonic() - began > 60 * (self.config.training.max_minutes or math.inf)
        return sum_over_ranks(float(late), self.place.device) > 0


def _fresh_folder(config: RunConfig) -> None:
    """Make RUN, taking an earlier run's results away so that they cannot be read as this one's."""
    out = Path(config.out)
    if out.exists() and not (out / "config.yaml").is_file() and any(out.iterdir()):
        raise ConfigError(f"{out} exists and is not a run of m5; choose another --out.")
    for name in (BEST, "tensorboard"):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in ("metrics.jsonl", "evaluation.json"):
        (out / name).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    config.write(out / "config.yaml")


if __name__ == "__main__":
    from m5.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
