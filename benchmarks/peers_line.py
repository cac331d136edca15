"""The line between `benchmarks.peers` and the systems that it compares, each in a process of its own.

Requests and answers are lines of JSON, and every answer tells the process' peak memory. Only the standard library: a
peer's environment has nothing of M5.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


class Ended(Exception):
    """A process has ended before it answered; the text is the end of what it wrote."""


def serve(start: Callable[..., Any]) -> None:
    """Answer on stdout until stdin ends.

    Args:
        start: called with the first request, and answered by `described()` of what it returns. The other requests name
            its methods, which return dictionaries that JSON can hold.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print, and must not print answers
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(requests,), daemon=True).start()
    side = None
    while True:
        name, arguments = json.loads(requests.get())
        if side is None:
            side, name, arguments = start(**arguments), "described", {}
        answer = getattr(side, name)(**arguments)
        print(json.dumps(answer | {"peak": peak_memory()}), file=answers, flush=True)


def _read(requests: queue.SimpleQueue[str]) -> None:
    """Hand the lines on. Where they end the asking process is gone, and this one must not train on alone."""
    # Not sys.stdin, which an interpreter that ends with an error would wait for.
    with os.fdopen(os.dup(0)) as lines:
        for line in lines:
            requests.put(line)
    os._exit(0)


def peak_memory() -> int:
    """Most bytes that were resident. Not getrusage: its figure begins with that of the process that forked this one."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM:"))


class Line:
    """One system in its process.

    Args:
        python: interpreter of its environment.
        module: calls `serve`.
        log: file for what it prints.
        threads: of the process.
        start: arguments of `serve`'s `start`.
    """

    def __init__(self, python: str | Path, module: str, log: Path, threads: int, start: dict[str, Any]):
        self.module, self.log = module, log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [str(python), "-m", module],
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
            )
        self.described = self.ask("start", **start)

    def ask(self, name: str, **arguments: Any) -> dict[str, Any]:
        """What the method of that name returns.

        Raises:
            Ended: it has failed, and the process with it.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        answer = ""
        try:
            self.process.stdin.write(json.dumps((name, arguments)) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            pass
        if not answer:
            self.process.wait()
            last = [line.strip() for line in self.log.read_text().splitlines() if line.strip()][-1:]
            raise Ended(f"{self.module} ended with {self.process.returncode}: {' '.join(last)}")
        return json.loads(answer)

    def close(self) -> None:
        """End the process, whatever it is doing."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
