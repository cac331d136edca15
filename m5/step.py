"""One optimizer step, plain or in TorchRec's pipeline: learning rates, forward, backward, clipping, AdamW.

The tables' optimizer is fused into backward. The loss is looked at before backward: a loss that is not finite must not
reach the tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from m5.batch import Batch
from m5.config import RunConfig
from m5.model.m5 import Scores
from m5.parallel import World, dense_parameters, fused_optimizer, pipelined


class NonFinite(Exception):
    """The loss, or the norm of the dense gradient, is NaN or infinite on all ranks.

    The dense part has not been updated by this step; the tables have not where it is the loss.
    """

    def __init__(self, what: str, value: float):
        super().__init__(f"the {what} is {value}")


@dataclass(frozen=True)
class Stepped:
    """A step that was taken: the loss in nats and the requests, summed over all ranks; this rank's batch and scores."""

    loss: float
    requests: int
    batch: Batch
    scores: Scores


class Stepper:
    """Model and optimizers of one rank.

    Args:
        model: with its loss; its tables sharded, or, in a single process, ordinary ones that the dense optimizer owns.
        config: the run; reads `optimizer` and `training`.
        place: this rank.
    """

    def __init__(self, model: nn.Module, config: RunConfig, place: World):
        self.model, self.config, self.place = model, config, place
        self.dense = dense_parameters(model)
        decayed = [parameter for parameter in self.dense.values() if parameter.ndim > 1]
        others = [parameter for parameter in self.dense.values() if parameter.ndim <= 1]
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": config.optimizer.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=config.optimizer.lr,
            eps=config.optimizer.eps,
            fused=True,
        )
        self.table_optimizer = fused_optimizer(model)
        groups = self.table_optimizer.param_groups if self.table_optimizer is not None else ()
        self.table_lrs = [group["lr"] for group in groups]
        self.loss: float = 0.0
        self.batch: Batch | None = None

    @property
    def pipelines(self) -> bool:
        setting = self.config.training.pipeline
        if self.table_optimizer is None:
            return False  # no table is sharded: nothing to distribute ahead
        return self.place.device.type == "cuda" if setting == "auto" else bool(setting)

    def steps(self, batches: Iterator[Batch], factor: Callable[[], float]) -> Iterator[Stepped]:
        """Take a step for every batch.

        Args:
            batches: on the CPU; in the pipeline two of them are read ahead.
            factor: on all learning rates, asked before each step.
        """
        if not self.pipelines:
            for batch in batches:
                yield self.step(batch, factor())
            return
        pipeline = pipelined(self.model, _Clipped(self), self.place.device, self.backward)
        try:
            while True:
                self._set_learning_rates(factor())
                try:
                    with self._autocast():
                        scores = pipeline.progress(batches)
                except StopIteration:
                    return
                yield self._stepped(scores)
        finally:
            # The model gets its own forward back: the next pipeline, or a plain step, finds it as it was.
            pipeline.detach()

    def step(self, batch: Batch, factor: float) -> Stepped:
        """One plain step."""
        self._set_learning_rates(factor)
        self.optimizer.zero_grad(set_to_none=True)
        batch = batch.to(self.place.device, non_blocking=True)
        with self._autocast():
            loss, scores = self.model(batch)
        self.backward(loss, batch)
        _Clipped(self).step()
        return self._stepped(scores)

    def backward(self, loss: Tensor, batch: Batch) -> None:
        """Raises NonFinite before anything is changed; all ranks have the same loss, so all raise it."""
        self.loss, self.batch = loss.item(), batch
        if not math.isfinite(self.loss):
            raise NonFinite("loss", self.loss)
        # Gradients are averaged over ranks; the loss is a mean over the requests of all ranks.
        with torch.autocast(self.place.device.type, enabled=False):
            (loss * (self.place.size / sum(batch.ranks_P))).backward()

    def _stepped(self, scores: Scores) -> Stepped:
        assert self.batch is not None
        return Stepped(self.loss, sum(self.batch.ranks_P), self.batch, scores)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.place.device.type, torch.bfloat16, enabled=self.config.training.autocast)

    def _set_learning_rates(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.optimizer.lr * factor
        if self.table_optimizer is None:
            return
        for group, lr in zip(self.table_optimizer.param_groups, self.table_lrs, strict=True):
            group["lr"] = lr * factor
        # The fused optimizer steps in backward; its step() only hands the learning rate down.
        self.table_optimizer.step()


class _Clipped:
    """The dense optimizer as TorchRec's pipeline calls it: its step clips the gradients first.

    They have been averaged over ranks by then, so that all ranks clip alike.
    """

    def __init__(self, stepper: Stepper):
        self.stepper = stepper

    def zero_grad(self) -> None:
        self.stepper.optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        norm = nn.utils.clip_grad_norm_(self.stepper.dense.values(), self.stepper.config.optimizer.clip).item()
        if not math.isfinite(norm):
            raise NonFinite("gradient's norm", norm)
        self.stepper.optimizer.step()
