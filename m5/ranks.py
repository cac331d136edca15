"""What ranks tell each other outside the sharded tables: rows within the loss, a few words once a step, and before the
first step whether they are about to train the same thing.

Every function with a collective is called by all ranks in the same order; with one rank none of them communicates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from m5.config import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Exchange:
    """Rows that ranks exchange within the loss. G rows of all ranks stand in the order of the ranks."""

    rank: int
    size: int

    def own(self, ranks_P: tuple[int, ...]) -> slice:
        """Where this rank's rows stand among those of all ranks."""
        first = sum(ranks_P[: self.rank])
        return slice(first, first + ranks_P[self.rank])

    def gather_rows(self, x_PX: Tensor, ranks_P: tuple[int, ...]) -> Tensor:
        """[P, X] of every rank -> [G, X]; `ranks_P` says how many rows each rank has."""
        if self.size == 1 or not any(ranks_P):
            return x_PX
        most = max(ranks_P)
        padded = x_PX.new_zeros(most, x_PX.shape[1])
        padded[: len(x_PX)] = x_PX
        gathered = [torch.empty_like(padded) for _ in ranks_P]
        dist.all_gather(gathered, padded)
        return torch.cat([rows_X[:count] for rows_X, count in zip(gathered, ranks_P, strict=True)])

    def sum_rows(self, x_GX: Tensor, ranks_P: tuple[int, ...]) -> Tensor:
        """Partial sums [G, X] on every rank -> the total of this rank's rows, [P, X], added in the ranks' order."""
        if self.size == 1 or not any(ranks_P):
            return x_GX
        rows = ranks_P[self.rank]
        received = x_GX.new_empty(self.size * rows, x_GX.shape[1])
        dist.all_to_all_single(received, x_GX.contiguous(), [rows] * self.size, list(ranks_P))
        return received.view(self.size, rows, x_GX.shape[1]).sum(0)

    def gather_pairs(self, first_G: Tensor, second_G: Tensor) -> tuple[Tensor, Tensor]:
        """Two numbers per row of every rank -> [W, G] each, the same on every rank."""
        if self.size == 1:
            return first_G.unsqueeze(0), second_G.unsqueeze(0)
        pair = torch.stack([first_G, second_G])
        gathered = [torch.empty_like(pair) for _ in range(self.size)]
        dist.all_gather(gathered, pair)
        both_W2G = torch.stack(gathered)
        return both_W2G[:, 0], both_W2G[:, 1]


ALONE = Exchange(rank=0, size=1)


def on_first(work: Callable[[], T]) -> T:
    """What `work` returns on the first rank, which alone runs it; its error is raised on all (a collective call)."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


class Pulse:
    """Once a step, without waiting for it: does some rank want to stop, and what does the first rank's clock say?

    What is told at one step is known at the next, on all ranks, so that they act together.

    Attributes:
        stop: some rank has asked all to stop.
        seconds: of the first rank's training, as told one step ago. All learning rates and limits go by it: by clocks
            of their own, ranks would step at different rates and drift apart.
    """

    def __init__(self, *, rank: int, size: int, seconds: float):
        self.first, self.size, self.stop, self.seconds = rank == 0, size, False, seconds
        # The clock travels over gloo, beside the gradients and not in their queue.
        self.group = dist.new_group(backend="gloo") if size > 1 else None
        self._told: tuple[Tensor, dist.Work | None] | None = None

    def tell(self, *, stop: bool, seconds: float) -> None:
        """Read what was told at the last call, then tell this; `seconds` counts on the first rank only."""
        self.read()
        words = torch.tensor([float(stop), seconds if self.first else 0.0], dtype=torch.float64)
        work = dist.all_reduce(words, group=self.group, async_op=True) if self.size > 1 else None
        self._told = words, work

    def read(self) -> None:
        if self._told is None:
            return
        words, work = self._told
        if work is not None:
            work.wait()
        self.stop, self.seconds, self._told = bool(words[0]), float(words[1]), None


def agree(size: int, what: dict[str, Any]) -> None:
    """Refuse to train where ranks differ in what they were given (a collective call).

    Args:
        what: e.g. the dataset's hash and every setting, by name.

    Raises:
        ConfigError: on all ranks, with the first differing name and who has which value.
    """
    if size == 1:
        return
    all_ranks: list[dict[str, Any]] = [{} for _ in range(size)]
    dist.all_gather_object(all_ranks, what)
    for name, value in all_ranks[0].items():
        for rank, theirs in enumerate(all_ranks):
            if theirs.get(name) != value:
                raise ConfigError(
                    f"ranks do not train the same thing: {name} is {value} on rank 0 and {theirs.get(name)} on rank "
                    f"{rank}. Give all nodes the same command, version and prepared dataset."
                )
