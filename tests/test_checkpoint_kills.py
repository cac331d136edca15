"""kill -9 while a checkpoint is written: at random moments, and before every single change of the file system."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from m5.checkpoint import Checkpoints
from m5.checkpoint_files import checkpoints_in, newest
from m5.parallel import World, world
from tests.test_checkpoint import names, number_in, save_steps, state_of

pytestmark = pytest.mark.distributed

# Processes are forked from one that has imported torch: a fraction of a second each instead of five.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["m5.checkpoint"])
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")


@pytest.fixture(scope="module")
def place() -> Iterator[World]:
    with world("cpu") as place:
        yield place


def _save_for_ever(folder: Path, reports: Path) -> None:
    """Go on from the newest checkpoint, saving at every step, until killed; the file holds the last step on disk."""
    torch.set_num_threads(1)
    with world("cpu") as place, Checkpoints(folder, keep=2, place=place) as checkpoints:
        state = state_of(0)
        record = checkpoints.load(state) or {"step": 0}
        assert record["step"] == number_in(state)
        assert not [name for name in names(folder) if name.startswith(".")]
        step = record["step"]
        while True:
            step += 1
            for value in state.values():
                value.fill_(step)
            checkpoints.save(state, {"step": step})
            checkpoints.wait()
            reports.write_text(str(step))


def test_killed_at_any_moment(tmp_path: Path, place: World) -> None:
    """Ten times over, kill -9 of a process that writes without pause: what was on disk stays; the newest is whole."""
    folder, reports = tmp_path / "checkpoints", tmp_path / "reports"
    generator, reached, unfinished = random.Random(0), 0, 0
    for _ in range(10):
        process = FORKS.Process(target=_save_for_ever, args=(folder, reports))
        process.start()
        deadline = time.monotonic() + 60
        while not reports.exists() or int(reports.read_text() or 0) < reached + 3:
            assert process.is_alive() and time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 0.05))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        reached = int(reports.read_text() or 0)
        unfinished += any(name.startswith(".") for name in names(folder))
        record = newest(folder)
        assert record is not None and record["step"] >= reached
        reached = record["step"]
        reports.unlink()
    assert unfinished
    state = state_of(0)
    with Checkpoints(folder, keep=2, place=place) as checkpoints:
        assert checkpoints.load(state) == {"step": reached}
    assert number_in(state) == reached
    assert not [name for name in names(folder) if not name.startswith("step-")]


def _save_and_die(folder: Path, change: int) -> None:
    """Save step 20, killed before a file or folder is made, renamed or removed for the `change`-th time."""
    torch.set_num_threads(1)
    armed, seen = False, 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        writes = event == "open" and isinstance(arguments[1], str) and "w" in arguments[1]
        if armed and (writes or event in CHANGES):
            seen += 1
            if seen == change:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    with world("cpu") as place, Checkpoints(folder, keep=1, place=place) as checkpoints:
        armed = True
        checkpoints.save(state_of(20), {"step": 20})
        checkpoints.wait()
        armed = False


def test_killed_before_every_change(tmp_path: Path, place: World, capfd: pytest.CaptureFixture[str]) -> None:
    """Either the previous checkpoint or the new one is there, whole, and nothing looks damaged."""
    found: list[int] = []
    for change in range(1, 100):
        folder = tmp_path / str(change)
        save_steps(folder, place, [10], keep=1)
        process = FORKS.Process(target=_save_and_die, args=(folder, change))
        process.start()
        process.join(60)
        record, state = newest(folder), state_of(0)
        with Checkpoints(folder, keep=1, place=place) as checkpoints:
            assert checkpoints.load(state) == record == {"step": number_in(state)}
            # No half-removed one is left beside it, which the next damage would fall back to.
            assert all(checkpoints._verify(checkpoint)[1] == [] for checkpoint in checkpoints_in(folder))
        assert all(name.startswith("step-") for name in names(folder))
        assert "is not used" not in capfd.readouterr().err
        found.append(int(number_in(state)))
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert process.exitcode == 0
    assert len(found) > 10 and found == sorted(found) and found[0] == 10 and found[-1] == found[-2] == 20
