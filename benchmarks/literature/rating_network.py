"""What a system is to the rating task, and the loop that trains the neural ones: squared error, stopped by validation.

The neural systems' sizes, dropout and learning rates are fixed numbers in each system's file; nothing tunes them,
on any data set. Held-out ratings decide only when a training ends.

Dimension legend: B examples, R ratings.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.literature.rating_data import Ratings, World

HELD_OUT = 0.05  # of the training ratings, on which the weights are chosen
PATIENCE = 4  # epochs without a better error before it ends
PREDICTED = 4096  # ratings predicted at a time

# (train, test, world, seed, seconds) -> float [R] predictions for `test`, whose values it must not read.
FitPredict = Callable[[Ratings, Ratings, World, int, float], np.ndarray]


@dataclass(frozen=True)
class RatingSystem:
    """One row of the rating task.

    Attributes:
        name: as given to --systems.
        title: as the table prints it.
        source: where it was published.
        fit_predict: trains it and predicts.
        by_time: whether `seconds` bounds its training.
        claimed: data set -> published (RMSE, MAE); None where it is not known.
        protocol: how the published figures were made, in a line, and how ours differ.
    """

    name: str
    title: str
    source: str
    fit_predict: FitPredict
    by_time: bool = True
    claimed: Mapping[str, tuple[float, float | None]] = field(default_factory=dict)
    protocol: str = ""


class RatingNetwork(nn.Module):
    """What the loop needs. `read` comes before anything else, and again when more ratings are known."""

    def read(self, known: Ratings) -> None:
        """Take in the ratings that may be looked at: histories, means and the like."""
        raise NotImplementedError

    def examples(self) -> int:
        """Training examples of the known ratings, e.g. ratings or users."""
        raise NotImplementedError

    def loss(self, example_B: np.ndarray) -> Tensor:
        """int64 [B] numbers below `examples` -> scalar, to be minimised."""
        raise NotImplementedError

    def predict(self, pairs: Ratings) -> Tensor:
        """[R] stars; the pairs' values are not read."""
        raise NotImplementedError


def train_ratings(
    network: RatingNetwork,
    train: Ratings,
    test: Ratings,
    *,
    seed: int,
    seconds: float,
    lr: float,
    batch_size: int,
    weight_decay: float = 0.0,
) -> np.ndarray:
    """Train with AdamW, keep the weights of the best held-out error, read all of `train` and predict `test`.

    Args:
        network: freshly initialised; draw its weights after `torch.manual_seed(seed)`.
        train: of which a part is held out.
        test: whose values are not read.
        seed: of the held-out part, the order and all draws.
        seconds: of wall-clock time; an epoch that has begun is cut short.
        lr, batch_size, weight_decay: of AdamW. The learning rate is halved after every two epochs that were no better.

    Returns:
        float32 [R], not clipped.
    """
    began, generator = time.monotonic(), np.random.default_rng(seed)
    torch.manual_seed(seed)
    order = generator.permutation(len(train.user_R))
    cut = max(1, round(HELD_OUT * len(order)))
    held = train.take(order[:cut])
    network.read(train.take(order[cut:]))
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=weight_decay)
    best, best_error, stale = copy.deepcopy(network.state_dict()), np.inf, 0
    while stale < PATIENCE and time.monotonic() - began < seconds:
        network.train()
        examples = generator.permutation(network.examples())
        for first in range(0, len(examples), batch_size):
            if time.monotonic() - began >= seconds:
                break
            loss = network.loss(examples[first : first + batch_size])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
        error = float(np.square(predict(network, held) - held.value_R).mean())
        stale = 0 if error < best_error else stale + 1
        if error < best_error:
            best, best_error = copy.deepcopy(network.state_dict()), error
        elif stale % 2 == 0:
            optimizer.param_groups[0]["lr"] /= 2
    network.load_state_dict(best)
    network.read(train)
    return predict(network, test)


@torch.no_grad()
def predict(network: RatingNetwork, pairs: Ratings) -> np.ndarray:
    """float32 [R] stars."""
    network.eval()
    # By user: a network that reads whole users reads each once.
    order_R = np.argsort(pairs.user_R, kind="stable")
    predicted_R = np.zeros(len(order_R), dtype=np.float32)
    for first in range(0, len(order_R), PREDICTED):
        part = order_R[first : first + PREDICTED]
        predicted_R[part] = network.predict(pairs.take(part)).numpy()
    return predicted_R
