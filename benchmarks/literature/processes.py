"""Systems in processes of their own: a few at a time, one comparison in a folder, none that outlives the command."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

import psutil

PR_SET_PDEATHSIG = 1  # of Linux's prctl
STOPS = {signal.SIGINT, signal.SIGTERM}


class Terminated(Exception):
    """SIGTERM has asked for the end; the command line exits with 128 + `signal`."""

    signal = int(signal.SIGTERM)


@contextmanager
def stoppable(message: str) -> Iterator[None]:
    """SIGTERM raises `Terminated` with the message; Ctrl-C prints it and goes through."""

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not disturb the tidying up
        raise Terminated(message)

    # Python takes signals in its main thread alone.
    here = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, end) if here else None
    try:
        yield
    except KeyboardInterrupt:
        print(f"\n{message}", file=sys.stderr)
        raise
    finally:
        if here:
            signal.signal(signal.SIGTERM, before)


def each_apart(
    target: Callable[..., Any], names: Iterable[str], arguments: tuple[Any, ...], *, jobs: int
) -> Generator[tuple[str, int], None, None]:
    """Call target(name, *arguments) in a process for each name, `jobs` at a time.

    Yields:
        Each name as its process ends, and the exit code: negative, the signal that ended it.

    Processes that still run when this generator is closed are killed, with all that they have started.
    """
    context = multiprocessing.get_context("spawn")
    resource_tracker.ensure_running()  # it would take off the mask below
    waiting, running = deque(names), dict[int, BaseProcess]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                process = context.Process(target=_within, args=(target, waiting[0], *arguments), name=waiting.popleft())
                # Ctrl-C reaches the whole group of processes, but this one decides; and none starts unrecorded.
                before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
                try:
                    process.start()
                    running[process.sentinel] = process
                finally:
                    signal.pthread_sigmask(signal.SIG_SETMASK, before)
            wait(list(running))
            for ended in [one for one in running.values() if one.exitcode is not None]:
                del running[ended.sentinel]
                yield ended.name, ended.exitcode or 0
    finally:
        _kill(running.values())


def _within(target: Callable[..., Any], *arguments: Any) -> None:
    parent = multiprocessing.parent_process()
    with contextlib.suppress(AttributeError, OSError):  # not Linux
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent.pid:
        return  # it has ended before it could be asked for
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    target(*arguments)


def _kill(processes: Iterable[BaseProcess]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
        process.kill()
        process.join()


def why_it_ended(code: int) -> str:
    """Of a process that has left no record."""
    if code == -signal.SIGKILL:
        return "its process was killed, most likely for memory"
    return (
        f"its process was ended by {signal.Signals(-code).name}" if code < 0 else f"its process ended with code {code}"
    )
