"""Trainings under torchrun whose ranks are killed at random: what the tests and `benchmarks.soak` have in common."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Kill:
    """One kill -9."""

    seconds: float
    rank: int
    step: int


@dataclass
class Outcome:
    """How a job went.

    Attributes:
        code: exit code of torchrun.
        seconds: how long it ran.
        kills: in order.
        output: stdout and stderr together.
    """

    code: int
    seconds: float
    kills: list[Kill] = field(default_factory=list)
    output: str = ""


def command(arguments: list[str], *, ranks: int, restarts: int, module: str = "m5.train") -> list[str]:
    """`torchrun -m MODULE` on this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
    return [*launcher, "--max-restarts", str(restarts), "--monitor-interval", "0.1", "-m", module, *arguments]


def environment(**variables: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | variables


def steps_taken(run: Path) -> int:
    """The last step in RUN/metrics.jsonl; 0 before the first."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return max((json.loads(line)["step"] for line in lines), default=0)
    except (OSError, ValueError):
        return 0


def ranks_of(launcher: subprocess.Popen) -> dict[int, psutil.Process]:
    """The training processes by rank."""
    found = {}
    for process in psutil.Process(launcher.pid).children():
        try:
            variables = process.environ()
        except psutil.Error:
            continue
        if "RANK" in variables:
            found[int(variables["RANK"])] = process
    return found


def run(
    arguments: list[str],
    out: Path,
    *,
    log: Path,
    ranks: int = 2,
    kills: int = 0,
    pause: Callable[[], float] = lambda: 0.0,
    seed: int = 0,
    limit: float = 900,
    module: str = "m5.train",
    stop_killing_after: float = math.inf,
) -> Outcome:
    """Train under torchrun and kill -9 a random rank, `kills` times.

    Args:
        arguments: of `m5 train`.
        out: the run's folder; a kill waits until a step beyond the last one's has been logged, so that every kill hits
            a training and not an interpreter that is just starting.
        log: where stdout and stderr go.
        pause: seconds to wait from there to the kill, drawn anew for each.
        limit: seconds after which the job is ended.
        module: what torchrun starts.
        stop_killing_after: seconds after which no more rank is killed, so that the job can end.
    """
    generator = np.random.default_rng(seed)
    began, outcome, killed_at = time.monotonic(), Outcome(-1, 0.0), 0
    with log.open("w") as file:
        job = subprocess.Popen(
            command(arguments, ranks=ranks, restarts=kills, module=module),
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment(),
        )
        try:
            while job.poll() is None and time.monotonic() - began < limit:
                time.sleep(0.05)
                over = time.monotonic() - began > stop_killing_after
                if over or len(outcome.kills) >= kills or steps_taken(out) <= killed_at:
                    continue
                time.sleep(pause())
                rank = int(generator.integers(ranks))
                victim = ranks_of(job).get(rank)
                if victim is None or job.poll() is not None:
                    continue
                step = steps_taken(out)
                victim.send_signal(signal.SIGKILL)
                killed_at = step
                outcome.kills.append(Kill(time.monotonic() - began, rank, step))
        finally:
            if job.poll() is None:
                job.terminate()
            outcome.code = job.wait(60)
    outcome.seconds, outcome.output = time.monotonic() - began, log.read_text()
    return outcome
