"""What the tests of `benchmarks.literature.processes` run apart: a module that is imported quickly."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from benchmarks.literature.processes import each_apart


def work(name: str, folder: Path) -> None:
    """Leave the process's number in FOLDER/NAME; "killed" does not come to it, "long" goes on."""
    if name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    unfinished = folder / f".{name}"
    unfinished.write_text(str(os.getpid()))
    unfinished.rename(folder / name)
    if name == "long":
        time.sleep(600)


def parent(folder: Path) -> None:
    list(each_apart(work, ["long"], (folder,), jobs=1))
