"""A stall is reported with every rank's stack and ends the job; waiting for a rank that works is no stall."""

from __future__ import annotations

import faulthandler
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from m5.watchdog import REPORTED, STALLED, THREADS, Sighting, Watchdog, by_suspicion

LIMIT = 3.0
PLENTY = 120.0  # seconds that no job here needs: one that hangs fails
RANK = Path(__file__).with_name("stalling_rank.py")
ALONE = """
import os, sys, threading, time
from pathlib import Path
from m5.watchdog import Sighting, Watchdog

def asleep_for_ever():
    time.sleep(600)

with Watchdog(limit=0.5, rank=0, size=1, folder=Path(sys.argv[1])) as watchdog:
    watchdog.beat("step 41: forward")
    asleep_for_ever()
"""


def alone(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """One process without torchrun."""
    environment = {key: value for key, value in os.environ.items() if key != "MASTER_ADDR"}
    return subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=PLENTY, env=environment
    )


def start(mode: str, folder: Path, restarts: int = 0) -> subprocess.Popen[str]:
    """Two ranks under torchrun; what they say goes to FOLDER/log, which a rank that is left behind cannot hold open."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", str(restarts)]
    with (folder / "log").open("w") as log:
        return subprocess.Popen(
            [*command, str(RANK), mode, str(folder), str(LIMIT)],
            stdout=log,
            stderr=log,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


def ended(process: int) -> bool:
    """Whether a process is gone or waits to be collected."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def ranks_of(folder: Path) -> list[int]:
    return [int(text) for path in folder.glob("pid-*") if (text := path.read_text())]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """For one job of torchrun; no rank of it outlives the test."""
    yield tmp_path
    for process in ranks_of(tmp_path):
        if not ended(process):
            os.kill(process, signal.SIGKILL)


def outcome(mode: str, folder: Path, restarts: int = 0) -> tuple[int, str]:
    """Exit code of torchrun and all that was printed, once every process has ended."""
    with start(mode, folder, restarts) as torchrun:
        try:
            code = torchrun.wait(PLENTY)
        finally:
            torchrun.kill()
    assert all(ended(process) for process in ranks_of(folder))
    return code, (folder / "log").read_text()


def stack_file(folder: Path, rank: int) -> str:
    return (folder / "stalls" / f"rank-{rank}.txt").read_text()


def first_suspect(report: str) -> str:
    return report.partition("The likely cause first:\n")[2].partition("\n")[0].strip()


@pytest.mark.distributed
def test_a_sleeping_rank_is_named_and_both_stacks_are_shown(folder: Path) -> None:
    code, printed = outcome("sleep", folder)
    assert code != 0
    for rank in (0, 1):
        report = stack_file(folder, rank)
        assert report in printed  # one block: the other rank's lines are not in between
        assert first_suspect(report).startswith("rank 1: no progress for ")
        assert "'step 2: batch', now in asleep_for_ever (stalling_rank.py" in first_suspect(report)
        assert "last seen in 'step 2: forward', waiting for other ranks in all_reduce" in report
        assert f"Stacks of rank {rank} " in report
    assert "in asleep_for_ever\n" in stack_file(folder, 1).partition("Stacks of")[2]
    assert "in all_reduce\n" in stack_file(folder, 0).partition("Stacks of")[2]
    assert f"exitcode  : {STALLED} " in printed  # torchrun may end the other one when the first is seen to leave


@pytest.mark.distributed
def test_a_rank_whose_gil_is_held_shows_its_stack_too(folder: Path) -> None:
    code, printed = outcome("hold", folder)
    assert code != 0
    assert first_suspect(stack_file(folder, 0)).startswith("rank 1: not heard of for ")
    assert "Timeout (" in printed and " in holding_the_gil\n" in printed
    assert "in holding_the_gil" not in stack_file(folder, 0)


@pytest.mark.slow  # torchrun gives the stopped process 30 seconds to react to SIGTERM
@pytest.mark.distributed
def test_a_stopped_rank_is_reported_by_the_other(folder: Path) -> None:
    code, printed = outcome("stop", folder)
    assert code != 0
    assert first_suspect(stack_file(folder, 0)).startswith("rank 1: not heard of for ")
    assert f"exitcode  : {STALLED} " in printed and "(SIGKILL)" in printed


@pytest.mark.distributed
def test_a_rank_that_has_left_does_not_keep_the_other_waiting(folder: Path) -> None:
    code, _ = outcome("leave", folder)
    assert code != 0
    assert first_suspect(stack_file(folder, 0)) == "rank 1: has left training"
    assert not (folder / "stalls" / "rank-1.txt").exists()


@pytest.mark.distributed
def test_waiting_for_a_rank_that_computes_is_no_stall(folder: Path) -> None:
    code, printed = outcome("compute", folder)
    assert code == 0 and "stalled" not in printed
    assert not (folder / "stalls").exists()


@pytest.mark.distributed
def test_an_elastic_restart_follows_a_stall(folder: Path) -> None:
    """And what the first attempt left in torchrun's store does not stop the second."""
    code, printed = outcome("sleep-once", folder, restarts=1)
    assert code == 0
    assert printed.count("training has stalled") == 2


@pytest.mark.distributed
@pytest.mark.parametrize("fate", [signal.SIGKILL, signal.SIGSTOP])
def test_ranks_end_by_themselves_without_torchrun(folder: Path, fate: signal.Signals) -> None:
    """The store goes with torchrun: it refuses (killed), or never answers (stopped)."""
    until = time.monotonic() + PLENTY
    with start("sleep", folder) as torchrun:
        try:
            while len(ranks := ranks_of(folder)) < 2 and time.monotonic() < until:
                time.sleep(0.05)
            time.sleep(LIMIT / 5)  # two exchanges
            torchrun.send_signal(fate)
            while not all(ended(process) for process in ranks) and time.monotonic() < until:
                time.sleep(0.05)
            assert len(ranks) == 2 and all(ended(process) for process in ranks)
        finally:
            torchrun.kill()
    for rank in (0, 1):
        assert "asleep_for_ever" in first_suspect(stack_file(folder, rank))
        assert "Ranks hear of each other through" in stack_file(folder, rank)


def test_one_rank_alone(tmp_path: Path) -> None:
    done = alone(ALONE, tmp_path / "stalls")
    assert done.returncode == STALLED
    report = (tmp_path / "stalls" / "rank-0.txt").read_text()
    assert done.stderr == report
    assert "last seen in 'step 41: forward', now in asleep_for_ever" in first_suspect(report)
    assert "in asleep_for_ever\n" in report.partition("Stacks of rank 0 ")[2]


def test_training_need_not_be_in_the_main_thread(tmp_path: Path) -> None:
    begin, training = ALONE.split("with Watchdog")
    indented = ("with Watchdog" + training).replace("\n", "\n    ")
    done = alone(
        f"{begin}def train():\n    {indented}\nthreading.Thread(target=train, name='trainer').start()", tmp_path
    )
    assert done.returncode == STALLED
    assert "now in asleep_for_ever" in first_suspect(done.stderr)
    assert "Thread trainer (training):\n" in done.stderr and "Thread MainThread:\n" in done.stderr


def test_a_second_report_does_not_replace_the_first(tmp_path: Path) -> None:
    first, second = alone(ALONE, tmp_path), alone(ALONE, tmp_path)
    assert (tmp_path / "rank-0.txt").read_text() == first.stderr + second.stderr


def test_a_folder_that_cannot_be_written_does_not_keep_a_rank_alive(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = alone(ALONE, tmp_path / "file" / "stalls")
    assert done.returncode == STALLED
    assert "in asleep_for_ever" in done.stderr and "could not write its stacks" in done.stderr


@pytest.mark.parametrize("call", ["os.write(2, bytes(10**6))", "time.sleep(600)"])
def test_a_report_that_hangs_ends_too(tmp_path: Path, call: str) -> None:
    """A full pipe that nobody reads, or a file system that does not answer."""
    code = ALONE.replace("with Watchdog", f"Watchdog._report = lambda *_: {call}\nwith Watchdog", 1)
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.PIPE) as process:
        try:
            assert process.wait(PLENTY) == STALLED
        finally:
            process.kill()


def test_a_rank_that_beats_follows_another_that_has_reported(tmp_path: Path) -> None:
    code = (
        ALONE.replace("limit=0.5, rank=0, size=1", "limit=5, rank=0, size=2")
        .replace(
            "with Watchdog",
            f"""
class Exchange:
    def __init__(self):
        now = time.monotonic()
        self.answered_at, self.peers = now, {{1: Sighting("step 41: batch", now, now, state={REPORTED!r})}}
    def hurry(self):
        pass

os.environ["MASTER_ADDR"] = "localhost"
Watchdog._begin_exchange = lambda self: Exchange()
with Watchdog""",
        )
        .replace("time.sleep(600)", "[watchdog.beat('step 41: forward') or time.sleep(0.01) for _ in range(60_000)]")
    )
    done = alone(code, tmp_path)
    assert done.returncode == STALLED, done.stderr
    assert "rank 1: no progress" in done.stderr and "in asleep_for_ever" in done.stderr


def watchdog_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(THREADS)]


def test_entering_and_leaving_leaves_nothing_behind(tmp_path: Path) -> None:
    for _ in range(3):
        with Watchdog(limit=1.0, rank=0, size=1, folder=tmp_path / "stalls") as watchdog:
            until = time.monotonic() + 1.5
            while time.monotonic() < until:
                watchdog.beat("step 1: batch")
            assert watchdog_threads()
        assert not watchdog_threads()
    with pytest.raises(KeyError), Watchdog(limit=1.0, rank=0, size=1, folder=tmp_path / "stalls"):
        raise KeyError
    assert not watchdog_threads()
    time.sleep(2)  # longer than limit and grace: the timer in C would have ended this process
    assert not (tmp_path / "stalls").exists()


def test_a_failed_start_leaves_no_timer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    cancelled: list[bool] = []
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: cancelled.append(True))
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda *_, **__: None)
    with pytest.raises(ValueError, match="process group"), Watchdog(limit=9.0, rank=0, size=2, folder=tmp_path):
        pass
    assert cancelled and not watchdog_threads()


def test_without_a_limit_it_does_nothing(tmp_path: Path) -> None:
    with Watchdog(limit=None, rank=0, size=2, folder=tmp_path) as watchdog:
        watchdog.beat("step 1: batch")
        assert not watchdog_threads()
    with pytest.raises(ValueError, match="more than 0"):
        Watchdog(limit=0, rank=0, size=1, folder=tmp_path)


def test_suspicion() -> None:
    now = 100.0
    ranks = {
        0: Sighting("step 9: forward", beat_at=91.0, heard_at=now, waiting=True),
        1: Sighting("step 9: forward", beat_at=93.0, heard_at=now),
        2: Sighting("step 9: batch", beat_at=92.0, heard_at=now),
        3: Sighting("step 9: forward", beat_at=94.0, heard_at=94.5, waiting=True),
    }
    assert by_suspicion(ranks, now, silence=5.0) == [3, 2, 1, 0]
    assert by_suspicion(ranks, now, silence=math.inf) == [2, 1, 0, 3]


def test_records_carry_ages_not_clocks() -> None:
    """The reader's clock may show anything; between two reads the age goes on growing on that clock."""
    sent = Sighting("step 3: batch", beat_at=70.0, heard_at=72.5, doing="read (a.py:1)", waiting=True, state=REPORTED)
    read = Sighting.from_record(sent.record(7).encode(), now=1000.0)
    assert read == Sighting("step 3: batch", 1000.0 - 2.5, 1000.0, "read (a.py:1)", True, REPORTED)
    assert sent.record(7) != sent.record(8)
