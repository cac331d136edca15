"""What a checkpoint costs the steps beside it: `python -m benchmarks.checkpoint_cost --data DATA key=value...`.

One rank trains; for half of the rounds a checkpoint is begun before the first step, so that it is written while the
steps run. Shown are how long `save` holds the training, how long the write takes in the background, and the median step
with and without a write beside it, from rounds that alternate.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import chain, count
from pathlib import Path

import torch

from m5.checkpoint import Checkpoints
from m5.config import load_config
from m5.library_warnings import silence_known
from m5.parallel import training_state, world
from m5.resume import Position
from m5.step import Stepped
from m5.train import Trainer

STEPS = 6  # a round


def timed_round(steps: Iterator[Stepped]) -> list[float]:
    """Seconds per 1,000 requests of each step: batches differ in size."""
    times = []
    for _ in range(STEPS):
        began = time.perf_counter()
        taken = next(steps)
        times.append(1000 * (time.perf_counter() - began) / taken.requests)
    return times


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checkpoint_cost", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--preset", default="default")
    parser.add_argument("--rounds", type=int, default=5, help="of each kind")
    options, overrides = parser.parse_known_args(argv)
    silence_known()
    with tempfile.TemporaryDirectory() as folder, world("cpu") as place:
        run = Path(folder)
        config = load_config(options.preset, ["training.stall_seconds=null", *overrides], options.data, run)
        torch.set_num_threads(config.training.threads or 1)
        trainer = Trainer(config, place)
        state = training_state(trainer.model, trainer.stepper.optimizer, trainer.stepper.dense)
        batches = chain.from_iterable(trainer.loader(Position(epoch=epoch)) for epoch in count())
        steps = trainer.stepper.steps(batches, lambda: 0.1)
        held, written, beside, alone = [], [], [], []
        with Checkpoints(run / "checkpoints", keep=1, place=place) as checkpoints:
            timed_round(steps)
            checkpoints.save(state, {"step": 0})  # the first one touches fresh memory
            checkpoints.wait()
            for number in range(options.rounds):
                alone += timed_round(steps)
                held.append(checkpoints.save(state, {"step": 1 + number}).copied)
                beside += timed_round(steps)
                checkpoints.wait()
                written.append(checkpoints.seconds)
    size = sum(value.numel() * value.element_size() for value in state.values() if not hasattr(value, "local_shards"))
    shards = (
        shard.tensor for value in state.values() if hasattr(value, "local_shards") for shard in value.local_shards()
    )
    size += sum(tensor.numel() * tensor.element_size() for tensor in shards)
    ratio = statistics.median(beside) / statistics.median(alone)
    print(f"state: {size / 1e6:.1f} MB")
    print(f"save() holds the training for {1000 * statistics.median(held):.1f} ms")
    print(f"the write takes {statistics.median(written):.2f} s in the background")
    print(f"a step beside a write takes {ratio:.2f} times as long as one without (medians of {len(alone)} steps each)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
