"""Training on a Ray cluster: each worker of Ray Train is one rank of `m5.train`.

python docker/ray_train.py --workers 16 --gpu --preset default --data DATA --out RUN model.width=128

DATA and RUN lie on a file system that all nodes share. What a run leaves in RUN is what `m5 train` leaves there; a run
that is there already is gone on with.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer


def rank(arguments: dict) -> None:
    """What one worker does. Ray has joined the workers to a process group already, which `m5.parallel` takes over."""
    from m5.config import load_config
    from m5.library_warnings import silence_known
    from m5.train import train

    # Ray has every logger of a worker print what is INFO; TorchRec prints its whole configuration so.
    logging.getLogger().setLevel(logging.WARNING)
    silence_known()
    train(load_config(**arguments), resume="yes")


def main() -> None:
    parser = argparse.ArgumentParser(description="m5 train, by Ray Train")
    parser.add_argument("--workers", type=int, required=True, help="ranks")
    parser.add_argument("--gpu", action="store_true", help="a GPU for each; otherwise a core")
    parser.add_argument("--max-failures", type=int, default=3, help="restarts of all workers after one has died")
    parser.add_argument("--preset", default="default")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    options = parser.parse_intermixed_args()
    out = options.out.resolve()
    TorchTrainer(
        rank,
        train_loop_config={
            "preset": options.preset,
            "overrides": options.overrides,
            "data": options.data.resolve(),
            "out": out,
        },
        # The model's collectives run on the GPUs, those that agree on metrics and settings on the CPU.
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if options.gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=options.workers, use_gpu=options.gpu),
        run_config=RunConfig(
            name=out.name,
            storage_path=str(out.with_name(f"{out.name}-ray")),
            failure_config=FailureConfig(max_failures=options.max_failures),
        ),
    ).fit()


if __name__ == "__main__":
    main()
