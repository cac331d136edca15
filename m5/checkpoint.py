"""Checkpoints of the whole training, written while it goes on, whole or not at all, loadable by any number of ranks.

Tensors go through torch.distributed.checkpoint: each rank writes its own shards and its share of the replicated
tensors, and a rank of another world reads the parts that it needs. What makes a checkpoint trustworthy is around that
(`m5.checkpoint_files`): checkpoint.json with the sha256 of every file, and one rename as the last act.

Do not load checkpoints of strangers. torch keeps the table of contents, .metadata, as a pickle, and a pickle runs code.
It is unpickled only after its sha256 was found to be the one in checkpoint.json: that proves that nothing has changed
since both were written, not who wrote them. Everything else is JSON, or tensors that torch reads without unpickling
objects.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist
from torch import Tensor

from m5.checkpoint_files import (
    Damaged,
    Description,
    FileMark,
    TensorShape,
    checkpoints_in,
    mark_of,
    open_folder,
    problem_of,
    publish,
    set_aside,
    sync,
    temporary_folder,
)
from m5.checkpoint_tensors import Part, Staging, State, load_tensors, save_tensors
from m5.parallel import World
from m5.schema import DataError

T = TypeVar("T")

# The slowest rank may write for this much longer than the fastest before the background gives up.
PATIENCE = timedelta(minutes=30)
# How long a training that has failed waits for a write under way: other ranks may be gone.
LAST_WAIT_SECONDS = 60.0


class Held(NamedTuple):
    """Seconds that `save` kept its caller: for the write before it, and for the copy."""

    waited: float
    copied: float


class Checkpoints:
    """The checkpoints of one run, seen from one rank. Every method is a collective call: all ranks make it.

        with Checkpoints(run / "checkpoints", keep=2, place=place) as checkpoints:
            record = checkpoints.load(state)            # None: nothing to resume
            ...
            checkpoints.save(state, {"step": step, ...})  # training goes on at once

    Leaving the `with` waits for what was begun. After an exception it waits a minute at most, so that ranks whose peer
    has died end, and drops the background's error in favour of the one that came first.

    Attributes:
        seconds: how long the last finished write took in the background; 0 before the first.
    """

    def __init__(self, folder: Path, *, keep: int, place: World, beat: Callable[[str], None] = lambda where: None):
        """Open the folder and remove what a killed process left in it.

        Args:
            folder: of the checkpoints alone, on a file system that all ranks share.
            keep: how many to keep, at least 1.
            place: this process among the ranks.
            beat: called with a few words wherever a caller has to wait, for a watchdog.

        Raises:
            DataError: the ranks do not see the same folder.
        """
        if keep < 1:
            raise ValueError(f"keep={keep}: at least one checkpoint must be kept")
        self.folder, self.keep, self.place, self.beat = folder, keep, place, beat
        self.seconds = 0.0
        self._staging = Staging(place.device)
        # Its own group: the background's collectives run at the same time as those of training. gloo: they carry
        # Python objects between threads of the CPU.
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._first(lambda: open_folder(folder))
        self._everywhere(self._see_folder)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and self._thread is not None:
            self._thread.join(LAST_WAIT_SECONDS)
            if self._thread.is_alive():
                print("m5: a checkpoint was still being written and is given up", file=sys.stderr)
                return  # with the group left alone, since the thread still uses it
            if self._error is not None:
                error.add_note(f"A checkpoint was not written either: {self._error}")
            self._thread = None
        try:
            self.wait()
        finally:
            dist.destroy_process_group(self._group)

    def save(self, state: State, record: Mapping[str, Any]) -> Held:
        """Copy `state` and write it in the background. The caller may change its tensors as soon as this returns.

        A write still under way is waited for first: there are never two.

        Args:
            state: plain tensors (the same on every rank) and ShardedTensors, by key.
            record: JSON-able, with the number `step`; the first rank's is kept.

        Returns:
            How long the caller was held.

        Raises:
            OSError, DataError, RuntimeError: what the write before this one failed with; nothing is begun then.
            TypeError: a value that is no tensor, or a record that is no JSON.
        """
        began = time.monotonic()
        self.wait()
        waited = time.monotonic()
        if strangers := [key for key, value in state.items() if not isinstance(value, Tensor)]:
            raise TypeError(f"{', '.join(strangers[:3])}: only tensors belong in the state; put numbers in the record")
        text, step = json.dumps(record), int(record["step"])
        copy = self._staging.copy(state)
        # A daemon: an interpreter that ends although a peer hangs must not wait for the group's time limit.
        self._thread = threading.Thread(
            target=self._background, args=(dict(state), copy, step, text), name="checkpoint", daemon=True
        )
        self._thread.start()
        return Held(waited - began, time.monotonic() - waited)

    def wait(self) -> None:
        """Return when what was begun is on disk; raise what it failed with, once."""
        if self._thread is None:
            return
        while self._thread.is_alive():
            self._thread.join(1.0)
            self.beat("waiting for a checkpoint to be written")
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error

    def load(self, state: State) -> dict[str, Any] | None:
        """Fill `state` in place from the newest checkpoint that is whole, whatever number of ranks wrote it.

        Every file is verified first, shared out among the ranks. A damaged checkpoint is reported on stderr and, when
        another was loaded instead, renamed to damaged-...

        Args:
            state: as given to `save`, with the same keys, shapes and dtypes.

        Returns:
            The record given to `save`, or None where there is no checkpoint.

        Raises:
            DataError: no checkpoint is whole, or the whole one is of another model.
        """
        self.wait()
        names = self._first(lambda: [path.name for path in checkpoints_in(self.folder)])
        damaged: dict[Path, str] = {}
        for name in names:
            checkpoint = self.folder / name
            description, problems = self._verify(checkpoint)
            if description is not None and not problems:
                self._fill(checkpoint, description, state)
                self._first(lambda: [set_aside(path) for path in damaged])
                return description.record
            damaged[checkpoint] = "; ".join(problems)
            if self.place.first:
                print(f"m5: checkpoint {name} is not used: {damaged[checkpoint]}", file=sys.stderr)
        if damaged:
            raise DataError(
                f"{self.folder}: no checkpoint is whole ({'. '.join(damaged.values())}). Bring an intact copy back, or "
                "start over with --restart."
            )
        return None

    def _background(self, state: State, copy: Mapping[Part, Tensor], step: int, record: str) -> None:
        began = time.monotonic()
        try:
            self._write(state, copy, step, record)
        except BaseException as error:
            self._error = error
        self.seconds = time.monotonic() - began

    def _write(self, state: State, copy: Mapping[Part, Tensor], step: int, record: str) -> None:
        temporary = self._first(lambda: temporary_folder(self.folder, step))
        try:
            self._everywhere(lambda: save_tensors(state, copy, temporary, self._group))
            written = self._everywhere(lambda: self._describe(temporary))
            shapes = self._everywhere(lambda: _shapes_of(state))
            # Every rank is past its last write now: only then does the first rank describe and rename.
            description = Description(json.loads(record), self.place.size, _merged(shapes), _merged(written))
            self._first(lambda: self._publish(temporary, description, step))
        except BaseException:
            if self.place.first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _describe(self, temporary: Path) -> dict[str, FileMark]:
        """Sync the files that this rank wrote, and say what they are. torch's names for them begin with the rank."""
        paths = [*temporary.glob(f"__{self.place.rank}_*"), *(temporary.glob(".metadata") if self.place.first else ())]
        for path in paths:
            sync(path)
        return {path.name: mark_of(path) for path in paths}

    def _publish(self, temporary: Path, description: Description, step: int) -> None:
        there = {path.name for path in temporary.iterdir()}
        if missing := sorted(description.files.keys() - there):
            raise DataError(
                f"{self.folder}: the first rank does not see {', '.join(missing[:3])}, which others have written. Put "
                "--out on a file system that all machines share."
            )
        assert there == description.files.keys(), f"no rank has described {there - description.files.keys()}"
        description.write(temporary)
        publish(temporary, step, self.keep)

    def _verify(self, checkpoint: Path) -> tuple[Description | None, list[str]]:
        """The description and what is wrong with the checkpoint; the same on every rank where nothing is wrong."""

        def look() -> tuple[Description | None, list[str]]:
            try:
                description = Description.read(checkpoint)
            except Damaged as damage:
                return None, [str(damage)]
            by_size = sorted(description.files.items(), key=lambda item: item[1].bytes)
            share = by_size[self.place.rank :: self.place.size]
            found = []
            for name, mark in share:
                self.beat(f"verifying {name}")
                found.append(problem_of(checkpoint / name, mark))
            return description, [problem for problem in found if problem is not None]

        looks = self._everywhere(look)
        problems = dict.fromkeys(problem for _, part in looks for problem in part)
        return looks[self.place.rank][0], list(problems)

    def _fill(self, checkpoint: Path, description: Description, state: State) -> None:
        asked = _merged(self._everywhere(lambda: _shapes_of(state)))
        _refuse_other_model(checkpoint, description.tensors, asked)
        self._everywhere(lambda: load_tensors(state, checkpoint, self._group))

    def _see_folder(self) -> None:
        if not self.folder.is_dir():
            raise DataError(f"{self.folder}: rank {self.place.rank} does not see it. All ranks must share --out.")

    def _first(self, work: Callable[[], T]) -> T:
        """What `work` returns on the first rank, which alone runs it; raises on all ranks what it fails with."""
        return self._everywhere(lambda: work() if self.place.first else None)[0]  # type: ignore[return-value]

    def _everywhere(self, work: Callable[[], T]) -> list[T]:
        """What `work` returns on each rank, once all have done it; raises on all ranks what it fails with on one."""
        mine: tuple[T | None, Exception | None]
        here: Exception | None = None
        try:
            mine = work(), None
        except Exception as error:
            here, mine = error, (None, _portable(error, self.place.rank))
        everyone: list[Any] = [None] * self.place.size
        dist.all_gather_object(everyone, mine, group=self._group)
        for _, failure in everyone:
            if failure is not None:
                raise failure from here
        return [value for value, _ in everyone]


def _merged(parts: list[dict[str, T]]) -> dict[str, T]:
    return {key: value for part in parts for key, value in part.items()}


def _portable(error: Exception, rank: int) -> Exception:
    """The error as all ranks can raise it: what a command line explains keeps its type, the rest its words."""
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, error.strerror, error.filename)
    if isinstance(error, DataError):
        return DataError(str(error))
    return RuntimeError(f"rank {rank}: {type(error).__name__}: {error}")


def _shapes_of(state: State) -> dict[str, TensorShape]:
    return {
        key: TensorShape(list(value.size()), str(value.dtype).removeprefix("torch.")) for key, value in state.items()
    }


def _refuse_other_model(checkpoint: Path, saved: dict[str, TensorShape], asked: dict[str, TensorShape]) -> None:
    """Raises DataError where the tensors are not the same by key, shape and dtype."""
    different = sorted(key for key in saved.keys() | asked.keys() if saved.get(key) != asked.get(key))
    if not different:
        return

    def word(shape: TensorShape | None) -> str:
        return "none" if shape is None else f"{'x'.join(map(str, shape.shape)) or 'scalar'} {shape.dtype}"

    examples = "; ".join(f"{key}: {word(saved.get(key))} there, {word(asked.get(key))} here" for key in different[:3])
    raise DataError(
        f"{checkpoint} was written by another model: {len(different)} tensors differ ({examples}). Resume with the "
        "configuration that it was trained with (a table cut column-wise has optimizer sums that fit no other cut), or "
        "start over with --restart."
    )
