"""Folders that are replaced as a whole, and who may do it: a run's best weights, an artifact.

The new folder is written beside its place, as .NAME.writing, and then takes it. Linux lets two folders change places in
one step. Where a file system cannot, the old one steps aside first, as .NAME.previous; `recover` brings it back where a
process was killed before the new one had come. A link to a folder stays a link: what it leads to is replaced.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from m5.config import ConfigError

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of renameat2(2), which Python's os does not have
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # what file systems say that have none


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A new, empty folder that takes the place of `target` at the end; after an exception `target` is what it was."""
    place = target.resolve()
    temporary = place.with_name(f".{place.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)  # a killed process has left it
    temporary.mkdir(parents=True)
    try:
        yield temporary
        put_in_place(temporary, place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def put_in_place(temporary: Path, target: Path) -> None:
    """Let a whole folder take the place of `target`, which keeps its earlier content until then.

    Args:
        temporary: on the file system of the folder that `target` is, or is a link to.
        target: need not exist.
    """
    place = target.resolve()
    previous = _previous(place)
    if _exchanged(temporary, place):
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        recover(place)  # so that what is removed next is not the only one
        shutil.rmtree(previous, ignore_errors=True)
        while not _moved(temporary, place, previous):
            pass
    shutil.rmtree(previous, ignore_errors=True)


def _moved(temporary: Path, place: Path, previous: Path) -> bool:
    """The swap in two steps; False where a reader has brought back what had just stepped aside."""
    with suppress(FileNotFoundError):
        place.rename(previous)
    try:
        temporary.rename(place)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        return False
    return True


def recover(target: Path) -> None:
    """Bring back what had stepped aside for a new folder that never came; nothing where `target` is there."""
    place = target.resolve()
    with suppress(OSError):  # nothing is to be brought back, or this process may only read
        if not place.exists():
            _previous(place).rename(place)


def _previous(place: Path) -> Path:
    return place.with_name(f".{place.name}.previous")


def _exchanged(one: Path, other: Path) -> bool:
    """Let two folders change places in one step; False where one is missing or the system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    return rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0


@contextmanager
def holding(path: Path, message: str, seconds: float = 0.0) -> Iterator[None]:
    """Hold a file's lock, which the system gives back when its process ends, however it does; the file stays.

    Raises:
        ConfigError: with `message`, where another still holds it after `seconds`.
    """
    deadline = time.monotonic() + seconds
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise ConfigError(message) from None
                time.sleep(0.05)
            except OSError as error:
                if error.errno not in WITHOUT_LOCKS:
                    raise
                break
        yield
