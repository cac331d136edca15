"""A checkpoint as files: names, checkpoint.json, publication by one rename, verification. Neither torch nor processes.

RUN/checkpoints/
  step-00000120/                whole: it has this name only since the rename that came last
    checkpoint.json             Description: the record, size and sha256 of every other file, and of itself
    ...                         the tensors (see m5.checkpoint)
  step-00000120.1/              written at the same step again (say, after an evaluation); newer than the one above
  damaged-step-00000100/        failed its verification while another was loaded; kept for its owner to look at
  .step-00000130.writing/       being written, or left by a killed process: removed when the next run opens
  .step-00000110.removing/      being removed, likewise
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from m5.schema import DataError

SCHEMA_VERSION = 1
DESCRIPTION = "checkpoint.json"
NAME = re.compile(r"step-(\d{8,})(?:\.(\d+))?")
DAMAGED = "damaged-"
LEFTOVERS = (".step-", f".{DAMAGED}step-")


class Damaged(Exception):
    """A checkpoint is not what was written; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class FileMark:
    """What a file was when it was written."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class TensorShape:
    """Global shape and dtype (as in `float32`) of a tensor of the state."""

    shape: list[int]
    dtype: str


@dataclass(frozen=True)
class Description:
    """Contents of checkpoint.json.

    Attributes:
        record: what the trainer wants back: step, epoch, position in the data, metrics, configuration, ...
        ranks: how many processes wrote it.
        tensors: every tensor of the state by key.
        files: every file of the checkpoint by name, this description aside.
    """

    record: dict[str, Any]
    ranks: int
    tensors: dict[str, TensorShape]
    files: dict[str, FileMark]

    def write(self, checkpoint: Path) -> None:
        """Write checkpoint.json, on disk when this returns. It holds the sha256 of its own contents."""
        body = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        path = checkpoint / DESCRIPTION
        path.write_text(json.dumps({"sha256": _digest_of(body), **body}, indent=1))
        sync(path)

    @classmethod
    def read(cls, checkpoint: Path) -> Description:
        """Raises Damaged where checkpoint.json is missing, changed or of another schema."""
        path = checkpoint / DESCRIPTION
        try:
            body = json.loads(path.read_text())
            written = body.pop("sha256")
        except FileNotFoundError:
            raise Damaged(f"{path} is missing") from None
        except OSError as error:
            raise Damaged(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, AttributeError, TypeError):
            raise Damaged(f"{path} is no JSON of a checkpoint") from None
        if _digest_of(body) != written:
            raise Damaged(f"{path} has changed: its contents do not have the sha256 that it gives")
        if body["schema_version"] != SCHEMA_VERSION:
            raise Damaged(f"{path} has schema {body['schema_version']}, and this version of m5 reads {SCHEMA_VERSION}")
        return cls(
            record=body["record"],
            ranks=body["ranks"],
            tensors={key: TensorShape(**shape) for key, shape in body["tensors"].items()},
            files={name: FileMark(**mark) for name, mark in body["files"].items()},
        )


def _digest_of(body: dict) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def mark_of(path: Path) -> FileMark:
    """Size and sha256 of a file."""
    with path.open("rb") as stream:
        return FileMark(os.fstat(stream.fileno()).st_size, hashlib.file_digest(stream, "sha256").hexdigest())


def problem_of(path: Path, mark: FileMark) -> str | None:
    """What is wrong with a file that `mark` describes; None where nothing is. Sizes are looked at first: cheap."""
    try:
        size = path.stat().st_size
        if size != mark.bytes:
            return f"{path} has {size} bytes, and {mark.bytes} were written"
        return None if mark_of(path) == mark else f"{path} has changed: its sha256 is not the one in {DESCRIPTION}"
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"


def checkpoints_in(folder: Path) -> list[Path]:
    """Checkpoints, newest first: by step, then by the order of writing."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if NAME.fullmatch(path.name)), key=_age, reverse=True)


def _age(path: Path) -> tuple[int, int]:
    match = NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1]), int(match[2] or 0)


def newest(folder: Path) -> dict[str, Any] | None:
    """Record of the newest checkpoint that looks whole, or None: for a command line that asks what would be resumed.

    Cheap: checkpoint.json is verified, the other files only by their sizes. `Checkpoints.load` verifies everything.
    """
    for checkpoint in checkpoints_in(folder):
        try:
            description = Description.read(checkpoint)
            if all((checkpoint / name).stat().st_size == mark.bytes for name, mark in description.files.items()):
                return description.record
        except (Damaged, OSError):
            continue
    return None


def open_folder(folder: Path) -> None:
    """Make the folder, and remove what a killed process left in it."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.name.startswith(LEFTOVERS):
            shutil.rmtree(path)


def temporary_folder(folder: Path, step: int) -> Path:
    """Make the folder in which a checkpoint is written.

    Raises:
        DataError: checkpoints of later steps are there; the one to be written would not count as the newest.
    """
    existing = checkpoints_in(folder)
    if existing and _age(existing[0])[0] > step:
        raise DataError(
            f"{existing[0]} is of a later step than {step}, so another training has left it. Start over with "
            "--restart, or choose another --out."
        )
    temporary = folder / f".step-{step:08d}.writing"
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir()
    return temporary


def publish(temporary: Path, step: int, keep: int) -> Path:
    """Make a written and synced folder the newest checkpoint in one step, and remove all but the last `keep`."""
    folder = temporary.parent
    sync(temporary)
    steps = [_age(path) for path in checkpoints_in(folder)]
    again = max((number + 1 for other, number in steps if other == step), default=0)
    target = folder / (f"step-{step:08d}.{again}" if again else f"step-{step:08d}")
    temporary.rename(target)
    sync(folder)
    for old in checkpoints_in(folder)[keep:]:
        _remove(old)
    return target


def _remove(checkpoint: Path) -> None:
    # Renamed first: a process killed half-way through leaves no checkpoint that looks damaged. What cannot be removed
    # now (a file that a network file system still holds, say) goes when the next run opens the folder.
    doomed = _unused(checkpoint.with_name(f".{checkpoint.name}.removing"))
    checkpoint.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _unused(path: Path) -> Path:
    """`path`, or `path` with the first number behind it that is free."""
    number, candidate = 0, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}.{number}")
    return candidate


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, so that it neither counts among the last k nor is verified again."""
    target = _unused(checkpoint.with_name(f"{DAMAGED}{checkpoint.name}"))
    checkpoint.rename(target)
    return target
