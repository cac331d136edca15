"""Where a training step's time goes, seen from outside: the product's own methods are wrapped while steps are split.

Parts nest (`Timeline`), and the time of an inner part is not the outer one's. On a CPU a part lasts as long as its
call; on a GPU as long as the stream is at it or waits for it, by CUDA events. The tables' lookups are found in
autograd's graph and timed by hooks, so that what they do in backward, the fused optimizer included, stands apart from
the dense part's.

What happens at the same time as something else cannot be timed so. The gradients' all-reduce runs beside backward:
`split` takes every step twice, with it and without, and counts what backward gains. TorchRec's pipeline is left out.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn.parallel import DistributedDataParallel

from benchmarks.harness import synchronise
from m5.batch import Batch
from m5.step import Stepper

COPY, INPUT, LOOKUP, DENSE = "copy to the device", "input distribution", "lookup", "dense forward"
LOSS, BACKWARD, UPDATE = "loss", "backward", "tables: backward and optimizer"
ALL_REDUCE, OPTIMIZER = "all-reduce beyond backward", "dense optimizer"
PARTS = (COPY, INPUT, LOOKUP, DENSE, LOSS, BACKWARD, UPDATE, ALL_REDUCE, OPTIMIZER)
WRAPPER, MEASURING = "wrapper", "measuring"  # DistributedDataParallel's own forward; the search for lookups
FACTOR = 0.1  # on the learning rates: the contents do not matter, and must stay finite
LOOKUP_NODE = "LookupFunction"  # in the names of FBGEMM's autograd nodes


class Timeline:
    """Which part is at work when.

    Args:
        now: a stamp of this moment.
        between: seconds from one stamp to another.
    """

    def __init__(self, now: Callable[[], Any], between: Callable[[Any, Any], float]):
        self._now, self._between = now, between
        self._open: list[str] = []
        self._stamps: list[tuple[str | None, Any]] = []

    @classmethod
    def on(cls, device: torch.device) -> Timeline:
        """By the clock, or by events on the GPU's current stream."""
        if device.type != "cuda":
            return cls(time.perf_counter, lambda first, second: second - first)

        def event() -> torch.cuda.Event:
            made = torch.cuda.Event(enable_timing=True)
            made.record()
            return made

        return cls(event, lambda first, second: first.elapsed_time(second) / 1000)

    def enter(self, part: str) -> None:
        self._open.append(part)
        self._stamps.append((part, self._now()))

    def leave(self) -> None:
        self._open.pop()
        self._stamps.append((self._open[-1] if self._open else None, self._now()))

    def around(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work`, timed as that part."""

        def timed(*arguments: Any, **named: Any) -> Any:
            self.enter(part)
            try:
                return work(*arguments, **named)
            finally:
                self.leave()

        return timed

    def totals(self) -> dict[str, float]:
        """Seconds of every part, of all times that it was entered; 0 for one that never was."""
        synchronise()
        seconds: dict[str, float] = defaultdict(float)
        for (part, first), (_, second) in zip(self._stamps, self._stamps[1:], strict=False):
            if part is not None:
                seconds[part] += self._between(first, second)
        return seconds


def lookup_nodes(loss: Tensor) -> Iterator[Node]:
    """The nodes of the sharded tables' lookups in the graph behind a loss."""
    seen: set[Node] = set()
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [before for before, _ in node.next_functions]
        if LOOKUP_NODE in node.name():
            yield node


@contextmanager
def watched(stepper: Stepper, timeline: Timeline) -> Iterator[None]:
    """While it lasts, `stepper.step` tells the timeline of its parts."""
    whole = stepper.model.module
    backward = timeline.around(BACKWARD, stepper.backward)

    def backward_of(loss: Tensor, batch: Batch) -> None:
        timeline.enter(MEASURING)
        for node in lookup_nodes(loss):
            node.register_prehook(lambda gradients: timeline.enter(UPDATE))
            node.register_hook(lambda *gradients: timeline.leave())
        timeline.leave()
        backward(loss, batch)

    with ExitStack() as patches:

        def replace(owner: Any, method: str, new: Callable[..., Any]) -> None:
            patches.enter_context(patch.object(owner, method, new))

        # All that is not within another part: gradients set to zero, learning rates, clipping, AdamW.
        replace(stepper, "step", timeline.around(OPTIMIZER, stepper.step))
        replace(stepper, "backward", backward_of)
        replace(Batch, "to", timeline.around(COPY, Batch.to))
        replace(stepper.model, "forward", timeline.around(WRAPPER, stepper.model.forward))
        replace(whole.model, "forward", timeline.around(DENSE, whole.model.forward))
        replace(whole.loss, "forward", timeline.around(LOSS, whole.loss.forward))
        for module in whole.modules():
            if hasattr(module, "compute_and_output_dist"):  # TorchRec's sharded modules
                replace(module, "forward", timeline.around(INPUT, module.forward))
                replace(module, "compute_and_output_dist", _waited(timeline, module.compute_and_output_dist))
        yield


def _waited(timeline: Timeline, work: Callable[..., Any]) -> Callable[..., Any]:
    """A lookup that ends when its rows are there: TorchRec's waits for other ranks at their first use, a part later."""
    return timeline.around(LOOKUP, lambda *arguments, **named: work(*arguments, **named).wait())


def split(stepper: Stepper, batches: Sequence[Batch]) -> dict[str, float]:
    """Seconds of every one of PARTS, over these batches, each of which is stepped on twice (a collective call).

    Afterwards the weights are good for nothing: ranks have stepped without hearing of each other.
    """
    together, alone = (Timeline.on(stepper.place.device) for _ in range(2))
    replicas = [m for m in stepper.model.modules() if isinstance(m, DistributedDataParallel)]
    for number, batch in enumerate(batches):
        quiet = replicas[0].no_sync() if replicas else nullcontext()
        turns: list[tuple[Timeline, AbstractContextManager]] = [(together, nullcontext()), (alone, quiet)]
        # The second of the two finds the batch's rows in cache: they take turns in being the second.
        for timeline, mode in turns if number % 2 else turns[::-1]:
            with mode, watched(stepper, timeline):
                stepper.step(batch, FACTOR)
    seconds = together.totals()
    exposed = max(0.0, seconds[BACKWARD] - alone.totals()[BACKWARD])
    seconds[BACKWARD], seconds[ALL_REDUCE] = seconds[BACKWARD] - exposed, exposed
    seconds[DENSE] += seconds[WRAPPER]
    return {part: seconds[part] for part in PARTS}
