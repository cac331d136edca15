"""Where a training is, what it may be continued from, and how it is asked to stop."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch.distributed as dist

from m5.best import BEST, content_digest
from m5.checkpoint import Checkpoints
from m5.checkpoint_files import checkpoints_in, newest
from m5.config import ConfigError, RunConfig, TrainingConfig
from m5.folders import holding, recover
from m5.parallel import World
from m5.ranks import on_first
from m5.schema import PreparedDataset

Resume = Literal["no", "yes", "over"]
CHECKPOINTS = "checkpoints"
LOCK = ".lock"
JOB = ".job"  # torchrun's id of the job that has begun or continued the run
# Settings that change neither what is computed nor in which order; a resumed run may have others.
HARMLESS = {
    "preset",
    "name",
    "data",  # the dataset's own hash is compared instead
    "out",
    *(f"training.{name}" for name in ("device", "threads", "log_every", "pipeline", "compile", "stall_seconds")),
    *(f"training.{name}" for name in ("checkpoint_minutes", "checkpoint_every", "keep_checkpoints")),
    *("sequences.prefetch", "sharding.default", "sharding.tables"),
}


# Settings in which ranks may differ: nodes mount data where they like.
A_RANKS_OWN = {"data", "training.threads", "sequences.prefetch"}


@dataclass
class Position:
    """How far a training has come; with the tensors it is all that a checkpoint needs.

    There is no random state: the order of the data, negatives, masks and dropout follow from the seed, `epoch` and
    `batch` (see `m5.data` and `m5.model.keyed_dropout`).

    Attributes:
        step: steps taken in all.
        epoch, batch: passes finished; batches taken of the present one.
        planned: steps in all, which the schedule goes by.
        seconds: of training, by the first rank's clock.
        saved_at: what `seconds` was at the last checkpoint.
        best, stale: the best validation, and how many have followed it.
        finished: the training has come to its end.
        log: where its log is (`m5.progress`).
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    planned: int = 0
    seconds: float = 0.0
    saved_at: float = 0.0
    best: dict[str, float] = field(default_factory=dict)
    stale: int = 0
    finished: bool = False
    log: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, record: dict[str, Any] | None, identity: dict[str, Any]) -> Position:
        """The position in a checkpoint's record; the beginning where there is none.

        Raises:
            ConfigError: the checkpoint is of another dataset or of other settings.
        """
        if record is None:
            return cls()
        different = [name for name, value in identity.items() if record.get(name) != value]
        if different:
            hashes = {"manifest": "the dataset is another one", "content": "the content vectors are others"}
            changes = ", ".join(
                hashes.get(name, f"{name} was {record.get(name)} and is {identity[name]}") for name in different[:3]
            )
            raise ConfigError(
                f"cannot resume: {changes}. A run goes on with the dataset and settings that it began with; choose "
                "another --out, or start over with --restart."
            )
        return cls(**record["position"])

    def record(self) -> dict[str, Any]:
        return {"step": self.step, "position": asdict(self)}

    def checkpoint_due(self, settings: TrainingConfig, seconds: float) -> bool:
        if settings.checkpoint_every is not None:
            return self.step % settings.checkpoint_every == 0
        return seconds - self.saved_at >= 60 * settings.checkpoint_minutes


def identity(dataset: PreparedDataset, config: RunConfig) -> dict[str, Any]:
    """What must be the same when a run is resumed: dataset, content vectors, and the settings that matter."""
    manifest = hashlib.sha256(dataset.manifest.model_dump_json().encode()).hexdigest()
    content = ""
    if all((dataset.folder / "content" / f"{kind}.npy").is_file() for kind in config.model.content):
        content = content_digest(dataset, config.model.content)
    settings = {name: value for name, value in all_settings(config).items() if name not in HARMLESS}
    return {"manifest": manifest, "content": content} | settings


def all_settings(config: RunConfig) -> dict[str, Any]:
    """Every setting by its dotted name."""

    def flat(section: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in section.items():
            if isinstance(value, dict) and f"{prefix}{name}" != "sharding.tables":
                yield from flat(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", value

    return dict(flat(config.model_dump(mode="json"), ""))


@contextmanager
def begin(
    config: RunConfig, place: World, resume: Resume, identity: dict[str, Any], beat: Callable[[str], None]
) -> Iterator[Checkpoints]:
    """Make RUN ready and open its checkpoints (a collective call).

    Args:
        identity: of the training that is about to begin.
        beat: tells the watchdog of progress.

    Raises:
        ConfigError: RUN is no run, belongs to another training, is in use, or holds results that nobody gave up.
    """
    # Nodes count restarts differently once one of them has restarted for another's sake.
    restarts: list[int] = [0] * place.size
    dist.all_gather_object(restarts, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))
    with ExitStack() as stack:
        on_first(lambda: _take(stack, config, resume, max(restarts) > 0, identity))
        keep = config.training.keep_checkpoints
        with Checkpoints(config.out / CHECKPOINTS, keep=keep, place=place, beat=beat) as checkpoints:
            yield checkpoints


def _take(stack: ExitStack, config: RunConfig, resume: Resume, restarted: bool, identity: dict[str, Any]) -> None:
    """Make RUN this training's; nothing is changed before it is clear that it may be."""
    out, job = Path(config.out), os.environ.get("TORCHELASTIC_RUN_ID", "")
    _refuse_foreign(out)
    out.mkdir(parents=True, exist_ok=True)
    stack.enter_context(locked(out / LOCK, "training"))
    recover(out / BEST)
    # What this very job has begun it goes on with. A job that was refused, and that torchrun starts again all the same,
    # has begun nothing.
    own = restarted and (out / JOB).is_file() and (out / JOB).read_text() == job
    there = checkpoints_in(out / CHECKPOINTS)
    if own or resume == "yes":
        if there and (record := newest(out / CHECKPOINTS)) is None:
            raise ConfigError(
                f"{out / CHECKPOINTS}: no checkpoint can be read. Bring an intact copy back, or start over with "
                "--restart."
            )
        if there:
            Position.of(record, identity)
        elif not own and (out / BEST).is_dir():
            raise ConfigError(f"{out} has weights but no checkpoint to resume from. Start over with --restart.")
    elif resume == "no" and (there or (out / BEST).is_dir()):
        raise ConfigError(
            f"{out} holds {_description(out)}. Continue it with --resume, replace it with --restart, or choose another "
            "--out."
        )
    if resume == "over" and not own:
        for name in (CHECKPOINTS, "replay", "stalls"):
            shutil.rmtree(out / name, ignore_errors=True)
        there = []
    if not there:
        # Nothing of an earlier training may be read as this one's.
        for name in (BEST, "tensorboard"):
            shutil.rmtree(out / name, ignore_errors=True)
        for name in ("metrics.jsonl", "evaluation.json"):
            (out / name).unlink(missing_ok=True)
    config.write(out / "config.yaml")
    if job:
        (out / JOB).write_text(job)


def _refuse_foreign(out: Path) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        RunConfig.read(out / "config.yaml")
    except ConfigError:
        raise ConfigError(f"{out} exists and is not a run of m5; choose another --out.") from None


@contextmanager
def locked(path: Path, work: str) -> Iterator[None]:
    """One training, or other work, at a time in the folder of the lock file `path`.

    Raises:
        ConfigError: another process holds it.
    """
    with holding(path, f"{path.parent} is in use: another {work} writes to it. Choose another --out."):
        yield


def _description(out: Path) -> str:
    """What training RUN holds, by its newest readable checkpoint."""
    record = newest(out / CHECKPOINTS)
    if record is None:
        return "the results of a training, without a checkpoint that can be read"
    if record["position"]["finished"]:
        return "a finished training"
    return f"an unfinished training ({record['step']:,} steps taken)"


class Stopped(Exception):
    """Training was asked to stop and has saved where it is.

    Attributes:
        signal: the signal that asked; 128 + signal is the exit code.
    """

    def __init__(self, asked: int | None, step: int, out: Path):
        # Another rank may have been asked; this one goes by the usual signal then.
        self.signal = asked or int(signal.SIGTERM)
        super().__init__(f"stopped at step {step} and saved in {out}. The same command with --resume goes on there.")


class StopRequest:
    """Context in which SIGTERM, and the first Ctrl-C, ask for a stop instead of ending the process at once.

    Attributes:
        signal: number of the signal that has come, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        # Python takes signals in its main thread alone; elsewhere (a notebook's worker, Ray) they keep their meaning.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
