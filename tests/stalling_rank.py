"""One rank of a gloo job that stalls, or seems to: `torchrun ... tests/stalling_rank.py MODE FOLDER LIMIT`.

Modes of rank 1, while rank 0 waits for it in all_reduce: `sleep` for ever in Python, `stop` its own process, `hold` the
GIL in C, `compute` for longer than the limit but beat, `sleep-once` (asleep before the first elastic restart only),
`leave` and never take part. Each rank writes its process id to FOLDER/pid-N.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from m5.watchdog import Watchdog

LONG = 600


def asleep_for_ever() -> None:
    time.sleep(LONG)


def holding_the_gil() -> None:
    ctypes.PyDLL(None).sleep(LONG)


def computing(watchdog: Watchdog, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        watchdog.beat("step 2: batch")
        time.sleep(0.01)


def misbehave(mode: str, watchdog: Watchdog, limit: float) -> None:
    if mode == "sleep" or (mode == "sleep-once" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"):
        asleep_for_ever()
    elif mode == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif mode == "hold":
        holding_the_gil()
    elif mode == "compute":
        computing(watchdog, 2.5 * limit)


def join() -> None:
    """Join the process group. torchrun's store outlives a restart, and gloo would read dead ranks' addresses in it."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), wait_for_workers=False)
    attempt = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    dist.init_process_group("gloo", store=attempt, rank=rank, world_size=size)


def main(mode: str, folder: Path, limit: float) -> None:
    join()
    rank, size = dist.get_rank(), dist.get_world_size()
    # Twice: what an earlier watchdog of this process left in the store must not disturb a later one.
    for part in (1, 2):
        with Watchdog(limit=limit, rank=rank, size=size, folder=folder / "stalls") as watchdog:
            watchdog.beat(f"step {part}: batch")
            if part == 2:
                (folder / f"pid-{rank}").write_text(str(os.getpid()))
            if part == 2 and rank == 1:
                misbehave(mode, watchdog, limit)
                if mode == "leave":
                    continue
            watchdog.beat(f"step {part}: forward")
            total = torch.ones(1)
            dist.all_reduce(total)
            assert total.item() == size
    if mode == "leave":
        asleep_for_ever()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]))
