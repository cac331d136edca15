"""Ends a training run that stalls, with every rank's stack, instead of letting it hang.

The training thread of each rank beats (`Watchdog.beat`). A stall is a time limit in which *no* rank has beaten: during
validation one rank computes and beats for minutes while the others wait for it in a collective, and that is no stall.
So ranks tell each other through torchrun's store when they last beat. Three threads look after one rank:

- the *exchange* publishes this rank's state and reads the others'. It alone talks to the store, and may block there.
- the *monitor* judges. On a stall it writes who is where and the Python stacks of all threads, to stderr and to a file,
  waits for the other ranks to do so too, and ends the process with exit code `STALLED`.
- `faulthandler`'s timer, a thread in C, needs no GIL. The monitor winds it up while the job progresses; if C code holds
  the GIL so that no Python thread runs, it writes the stacks to stderr and ends the process with exit code 1.

Under `torchrun --max-restarts N` either exit restarts all ranks, like any other failure.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import json
import math
import os
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

STALLED = 3  # exit code of a rank that reports a stall
STDERR = 2  # the file descriptor: sys.stderr may be replaced or locked by the thread that hangs
RUNNING, REPORTED, LEFT = "running", "reported", "left"
# Ranks hear of each other ten times within the limit, and at least every ten seconds.
PER_LIMIT, LONGEST_INTERVAL = 10, 10.0
# Intervals between the monitor's verdict and the timer in C: time for ranks to hear of a verdict and to write stacks,
# before torchrun sees the first exit and kills the rest.
GRACE = 5
HURRY = 0.1  # seconds between two exchanges once a stall is being reported
THREADS = "m5-stall-"  # the names of the watchdog's threads begin so
CONNECT = timedelta(seconds=30)  # to the store; also what one answer of it may take, where torch counts that
# Modules whose Python functions wait for other ranks. Waits inside C++ (backward, a GPU's queue) are not seen as such.
COLLECTIVES = {"torch.distributed.distributed_c10d", "torchrec.distributed.comm_ops"}


@dataclass(frozen=True)
class Sighting:
    """What is known of one rank; times are this process's `time.monotonic()`, in seconds."""

    where: str  # the text of its last beat
    beat_at: float
    heard_at: float
    doing: str = "a place unknown"  # the innermost Python function of its training thread
    waiting: bool = False  # whether that function waits for other ranks
    state: str = RUNNING

    def record(self, number: int) -> str:
        """As it is published. Clocks of two hosts cannot be compared, so an age is sent; `number` makes it unique."""
        quiet = self.heard_at - self.beat_at
        return json.dumps([number, self.where, quiet, self.doing, self.waiting, self.state])

    @staticmethod
    def from_record(record: bytes, now: float) -> Sighting:
        _, where, quiet, doing, waiting, state = json.loads(record)
        return Sighting(where, now - quiet, now, doing, waiting, state)

    def describe(self, rank: int, now: float, silence: float) -> str:
        """One line for the report; a rank not heard of for more than `silence` seconds is called so."""
        if self.state == LEFT:
            return f"rank {rank}: has left training"
        if now - self.heard_at > silence:
            return (
                f"rank {rank}: not heard of for {now - self.heard_at:.1f} s, last seen in '{self.where}', {self.doing} "
                "(its process is stopped, gone or cut off, or C code holds its GIL)"
            )
        doing = f"waiting for other ranks in {self.doing}" if self.waiting else f"now in {self.doing}"
        return f"rank {rank}: no progress for {now - self.beat_at:.1f} s, last seen in '{self.where}', {doing}"


def by_suspicion(ranks: dict[int, Sighting], now: float, silence: float) -> list[int]:
    """Ranks, the likely cause of a stall first: silent ones, then those that wait for nobody, the longest quiet first.

    How often a rank has beaten says less: the first one beats alone during validation.
    """

    def innocence(rank: int) -> tuple[bool, bool, float]:
        sighting = ranks[rank]
        return now - sighting.heard_at <= silence, sighting.waiting, sighting.beat_at

    return sorted(ranks, key=innocence)


class Exchange:
    """A thread that keeps `peers` up to date. Its store client is its own, so that c10d's is never locked for long.

    Should the store vanish or block, `peers` just grows old.

    Args:
        own: gives this rank's state.
        interval: seconds between two exchanges.
        prefix: of the keys in the store; never used before, the same on all ranks.
    """

    def __init__(self, *, own: Callable[[], Sighting], rank: int, size: int, interval: float, prefix: str):
        self.own, self.rank, self.pause, self.prefix = own, rank, interval, prefix
        self.host, self.port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        now = time.monotonic()
        self.peers = {peer: Sighting("the start", now, now) for peer in range(size) if peer != rank}
        self.answered_at, self.error = now, "no answer"  # when the store last answered, and what has failed since
        self._records: dict[int, bytes] = {}
        self._numbers = itertools.count()
        self._wake, self._closing = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name=f"{THREADS}exchange", daemon=True)
        self._thread.start()

    def hurry(self) -> None:
        """A stall is being reported: tell it now, and look often for who else has done so."""
        self.pause = HURRY
        self._wake.set()

    def close(self) -> None:
        """Publish the last state and end; a thread that blocks in the store is left behind (it is a daemon)."""
        self._closing = True
        self._wake.set()
        self._thread.join(timeout=1.0)

    def _run(self) -> None:
        store: dist.TCPStore | None = None
        while True:
            closing = self._closing
            try:
                if store is None and not closing:
                    store = dist.TCPStore(self.host, self.port, timeout=CONNECT, wait_for_workers=False)
                if store is not None:
                    store.set(f"{self.prefix}/{self.rank}", self.own().record(next(self._numbers)))
                    self._read(store)
                    self.answered_at, self.error = time.monotonic(), "no answer"
            # torch's DistStoreError and DistNetworkError: the store is gone. Nothing but a new connection can help.
            except RuntimeError as error:
                store, self.error = None, str(error).partition("\n")[0]
            if closing:
                return
            self._wake.wait(self.pause)
            self._wake.clear()

    def _read(self, store: dist.TCPStore) -> None:
        # get() would wait for a key that is not there yet; check() answers at once.
        there = [peer for peer in self.peers if peer in self._records or store.check([f"{self.prefix}/{peer}"])]
        if not there:
            return
        records = store.multi_get([f"{self.prefix}/{peer}" for peer in there])
        now = time.monotonic()
        changed = {
            peer: record
            for peer, record in zip(there, records, strict=True)
            if record != self._records.get(peer)  # an unchanged record is a rank that does not publish any more
        }
        self._records |= changed
        # Replaced as a whole: the monitor reads it without a lock.
        self.peers = self.peers | {peer: Sighting.from_record(record, now) for peer, record in changed.items()}


class Watchdog:
    """Context manager around training; enter it in the training thread, on all ranks, once the process group exists.

        with Watchdog(limit=600, rank=rank, size=size, folder=run / "stalls") as watchdog:
            watchdog.beat("step 41: forward")

    With MASTER_ADDR unset (one process, or ranks started without torchrun), a rank goes by its own beats alone.
    `faulthandler.dump_traceback_later` belongs to the watchdog meanwhile: a process has one such timer. A job that was
    suspended (SIGSTOP on all ranks) for longer than the limit is ended when it goes on.

    Args:
        limit: seconds without a beat of any rank that make a stall: more than the longest stretch between two beats,
            the first step's compilation included. None switches all of this off.
        rank, size: this process among the ranks.
        folder: rank-N.txt is written there on a stall, appended to what an earlier stall left.

    Raises:
        ValueError: a limit of 0 or less.
    """

    def __init__(self, *, limit: float | None, rank: int, size: int, folder: Path):
        if limit is not None and limit <= 0:
            raise ValueError(f"the limit of a stall is {limit} s; it must be more than 0, or None for no watchdog.")
        self.limit, self.rank, self.size, self.folder = limit, rank, size, Path(folder)
        self._last = ("the start", time.monotonic())
        self._state = RUNNING

    def beat(self, where: str) -> None:
        """This rank progresses. Called by the training thread, as often as it likes: one tuple is stored."""
        self._last = (where, time.monotonic())

    def __enter__(self) -> Watchdog:
        if self.limit is None:
            return self
        self.interval = min(self.limit / PER_LIMIT, LONGEST_INTERVAL)
        self.grace = GRACE * self.interval
        self.exchange: Exchange | None = None
        self._training_thread, self._stop = threading.get_ident(), threading.Event()
        self._state = RUNNING
        self.beat("the start")
        self._wind_up(self.limit + self.grace)
        try:
            if self.size > 1 and os.environ.get("MASTER_ADDR"):
                self.exchange = self._begin_exchange()
        except BaseException:
            faulthandler.cancel_dump_traceback_later()
            raise
        self._monitor = threading.Thread(target=self._watch, name=f"{THREADS}monitor", daemon=True)
        self._monitor.start()
        return self

    def _begin_exchange(self) -> Exchange:
        # What a store holds outlives its ranks, and TORCHELASTIC_RESTART_COUNT differs between nodes once one of them
        # has restarted for another's sake. So the ranks agree on a name that was never used before.
        name = [uuid.uuid4().hex]
        dist.broadcast_object_list(name, src=0)
        return Exchange(
            own=self._own, rank=self.rank, size=self.size, interval=self.interval, prefix=f"m5/stall/{name[0]}"
        )

    def __exit__(self, *exception: object) -> None:
        if self.limit is None:
            return
        self._stop.set()
        self._monitor.join()
        faulthandler.cancel_dump_traceback_later()
        self._state = LEFT
        if self.exchange is not None:
            self.exchange.close()

    def _wind_up(self, seconds: float) -> None:
        faulthandler.dump_traceback_later(max(seconds, 0.01), file=STDERR, exit=True)

    def _own(self) -> Sighting:
        where, beat_at = self._last
        doing, waiting = innermost(self._training_thread)
        return Sighting(where, beat_at, time.monotonic(), doing, waiting, self._state)

    def _sightings(self) -> dict[int, Sighting]:
        return {self.rank: self._own()} | (self.exchange.peers if self.exchange is not None else {})

    def _watch(self) -> None:
        assert self.limit is not None
        while not self._stop.wait(self.interval):
            ranks = self._sightings()
            quiet = time.monotonic() - max(sighting.beat_at for sighting in ranks.values())
            # Another rank may judge a little earlier. It is about to leave, so this one reports as well.
            if quiet > self.limit or any(sighting.state == REPORTED for sighting in ranks.values()):
                self._leave(ranks)
            self._wind_up(self.limit + self.grace - quiet)

    def _leave(self, ranks: dict[int, Sighting]) -> NoReturn:
        """Report, wait until every other rank has reported too or cannot, and end the process."""
        # A rank whose GIL is held is ended by its timer within this time. Leaving earlier would have torchrun kill it
        # before it has written its stack.
        wait = self.grace + 2 * self.interval
        # Whatever hangs below, a full pipe or a dead file system, this thread ends the process; so does the timer in C.
        end = threading.Timer(wait, os._exit, [STALLED])
        end.daemon, end.name = True, f"{THREADS}end"
        end.start()
        self._wind_up(2 * wait)
        text = self._report(ranks)
        write_whole(text)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / f"rank-{self.rank}.txt").open("a") as file:
                file.write(text)
        except OSError as error:
            write_whole(f"m5: rank {self.rank} could not write its stacks to {self.folder}: {error}\n")
        self._state = REPORTED
        if self.exchange is not None:
            self.exchange.hurry()
            while any(peer.state == RUNNING for peer in self.exchange.peers.values()):
                time.sleep(HURRY)
            time.sleep(HURRY)  # the exchange is publishing that this rank has reported
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(STALLED)

    def _report(self, ranks: dict[int, Sighting]) -> str:
        """Who is where, the likely cause first, then the stacks of this rank."""
        assert self.limit is not None
        now, silence = time.monotonic(), self.limit / 2
        store_silent = 0.0 if self.exchange is None else now - self.exchange.answered_at
        # Where the store is silent, the silence of ranks says nothing.
        order = by_suspicion(ranks, now, silence if store_silent <= silence else math.inf)
        process = f"process {os.getpid()} on {socket.gethostname()}"
        lines = [
            "",  # a progress bar may have left the cursor in the middle of a line
            f"m5: {datetime.now():%Y-%m-%d %H:%M:%S}, rank {self.rank}: training has stalled: for {self.limit:g} s no "
            "rank has made progress. The likely cause first:",
            *(f"  {ranks[rank].describe(rank, now, silence)}" for rank in order),
        ]
        if self.exchange is None and self.size > 1:
            lines.append("  Nothing is known of the other ranks: MASTER_ADDR is not set.")
        elif self.exchange is not None and store_silent > silence:
            store = f"{self.exchange.host}:{self.exchange.port}"
            lines.append(f"  Ranks hear of each other through {store}: {self.exchange.error} for {store_silent:.1f} s.")
        lines.append(f"Stacks of rank {self.rank} ({process}), innermost call first:")
        return "\n".join([*lines, *stacks(self._training_thread), ""])


def innermost(thread: int) -> tuple[str, bool]:
    """The innermost Python function of a thread, and whether it is one that waits for other ranks."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return "a thread that has ended", False
    code = frame.f_code
    place = f"{code.co_name} ({os.path.basename(code.co_filename)}:{frame.f_lineno})"
    return place, frame.f_globals.get("__name__") in COLLECTIVES


def stacks(training_thread: int) -> list[str]:
    """Lines with the Python stacks of all threads but the watchdog's own, the training thread's first.

    Source lines are left out: reading them can hang where the stall is a file system's.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = {
        ident: frame for ident, frame in sys._current_frames().items() if not names.get(ident, "").startswith(THREADS)
    }
    lines = []
    for ident in sorted(frames, key=lambda ident: ident != training_thread):
        lines.append(f"Thread {names.get(ident, ident)}{' (training)' if ident == training_thread else ''}:")
        lines += [
            f'  File "{frame.f_code.co_filename}", line {line}, in {frame.f_code.co_name}'
            for frame, line in traceback.walk_stack(frames[ident])
        ]
    return lines


def write_whole(text: str) -> None:
    """Write a block to stderr at once, so that the blocks of two ranks do not mix line by line."""
    rest = text.encode(errors="backslashreplace")
    with contextlib.suppress(OSError):
        while rest:
            rest = rest[os.write(STDERR, rest) :]
