"""What runs in a trial's processes: the product's own training, which tells Ray of each validation.

A trial is a run of `m5 train --resume` in a folder of its own. So a trial that is begun again goes on where it was, and
one that had come to its end just says so.
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from m5.best import BEST
from m5.checkpoint_files import checkpoints_in
from m5.config import RunConfig
from m5.data.loader import Loader
from m5.folders import holding
from m5.mistakes import explain
from m5.progress import TrainingLog
from m5.resume import CHECKPOINTS, LOCK, Position, Resume
from m5.step import Stepped
from m5.train import Schedule, Trainer, train
from tune.records import MEMORY, TARGETS_PER_SECOND, read_history, write_whole

OUT_OF_MEMORY = 137  # exit code, as of a process that the system has killed
LOOK_EVERY = 0.2  # seconds between two looks at the memory
# A process of an earlier attempt, or of a search that was killed, may still be on its way out.
PATIENCE = 60.0


class TrialTrainer(Trainer):
    """Training that measures its speed and memory, and reports what is new in its history after each validation."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.rates: list[float] = []
        self.reported = 0

    def _steps(self, loader: Loader, schedule: Schedule, position: Position) -> Iterator[Stepped]:
        began, requests = time.monotonic(), 0
        for taken in super()._steps(loader, schedule, position):
            requests += taken.requests
            yield taken
        self.rates.append(requests / max(time.monotonic() - began, 1e-9))

    def validate(self) -> tuple[dict[str, float], dict[str, Tensor]]:
        metrics, state = super().validate()
        return metrics | {TARGETS_PER_SECOND: statistics.median(self.rates), MEMORY: peak_memory_gb()}, state

    def validate_and_keep(self, position: Position, log: TrainingLog) -> None:
        super().validate_and_keep(position, log)
        self.report()

    def run(self, resume: Resume = "no") -> dict[str, float]:
        best = super().run(resume)
        if not self.reported:
            self.report()  # it had come to its end before
        return best

    def report(self) -> None:
        """Tell Ray of the validations that this process has not told it of. With several ranks, all call it."""
        rows = read_history(self.config.out)[self.reported :] if self.place.first else []
        self.reported += 1 if not self.place.first else len(rows)
        if self.place.size > 1:
            from ray import train as ray_train

            ray_train.report(self.row(rows[-1], rows) if rows else {})
            return
        from ray import tune as ray_tune

        # One by one: the scheduler looks at each.
        for row in rows:
            self.beat("telling Ray of a validation")
            ray_tune.report(self.row(row, [row]))

    def row(self, last: dict[str, float], rows: list[dict[str, float]]) -> dict[str, Any]:
        """What the scheduler goes by, and the validations whole."""
        score = last[self.config.training.metric]
        return {"epoch": int(last["epoch"]) + 1, "score": score, "rows": rows, "node": node()}


def node() -> str:
    from ray import get_runtime_context

    return get_runtime_context().get_node_id()


def peak_memory_gb() -> float:
    """The most that this process has had: of the GPU's memory where it has one, else of the host's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class MemoryGuard(threading.Thread):
    """Ends the process, having said why, once it has more memory of its own than the limit.

    Without it the system would end some process of the machine, perhaps another trial. Pages of files, such as the
    dataset's, are not counted: the system takes them back when it needs them.
    """

    def __init__(self, limit_gb: float, said: Path):
        super().__init__(name="m5-memory", daemon=True)
        self.limit_gb, self.said = limit_gb, said

    def run(self) -> None:
        process = psutil.Process()
        while True:
            memory = process.memory_info()
            if (used := (memory.rss - memory.shared) / 1e9) > self.limit_gb:
                try:
                    write_whole(self.said, f"out of memory: {used:.2f} GB, and trial.memory_gb is {self.limit_gb:g}")
                finally:
                    os._exit(OUT_OF_MEMORY)
            time.sleep(LOOK_EVERY)


def work(task: dict[str, Any]) -> None:
    """One rank of a trial.

    Args:
        task: "run": the configuration; "data": folder or URL; "memory_gb", "gpus": limits of this rank or None; "said":
            file for the reason of an end that no exception can tell; "ranks", "placement": how many, and the file for
            where they are; "trainer": `TrialTrainer`, or one that does more.
    """
    import logging

    from m5.library_warnings import silence_known
    from tune.data import local_dataset

    # Ray has every logger of a worker print what is INFO; TorchRec prints its whole configuration so.
    logging.getLogger().setLevel(logging.WARNING)
    silence_known()
    config = RunConfig.model_validate(task["run"] | {"data": str(local_dataset(task["data"]))})
    if task["memory_gb"] is not None:
        MemoryGuard(task["memory_gb"], Path(task["said"])).start()
    if 0 < task["gpus"] < 1:
        torch.cuda.set_per_process_memory_fraction(task["gpus"])
    if task["ranks"] > 1:
        _note_placement(Path(task["placement"]))
    train(config, resume="yes", trainer=task["trainer"])


def _note_placement(path: Path) -> None:
    """The first rank tells which cores and GPUs Ray has put the ranks on, for `tune.engine` to give them back."""
    import ray
    from ray import train as ray_train

    if ray_train.get_context().get_world_rank() == 0:
        placement = ray.util.get_current_placement_group()
        assert placement is not None, "Ray Train places its workers as a group"
        write_whole(path, placement.id.hex())


def run_trial(task: dict[str, Any]) -> None:
    """One trial, Ray Tune's function trainable. What is the settings' own fault is reported as "refused", not raised:

    another attempt would meet it again.
    """
    from ray import tune as ray_tune

    lock = Path(task["run"]["out"]) / LOCK
    try:
        if lock.is_file():
            with holding(lock, f"{lock} is held: the earlier attempt has not ended in {PATIENCE:.0f} s.", PATIENCE):
                pass
        for note in ("said", "placement"):
            Path(task[note]).unlink(missing_ok=True)
        run = Path(task["run"]["out"])
        if not checkpoints_in(run / CHECKPOINTS):
            # Killed between its first validation and its first checkpoint: `--resume` would refuse to lose the weights.
            shutil.rmtree(run / BEST, ignore_errors=True)
        if task["ranks"] == 1:
            work(task)
        else:
            _ranks(task)
    except Exception as error:
        # Of several ranks, Ray Train tells what each has raised.
        failures = list(getattr(error, "worker_failures", {}).values()) or [error]
        refused = [said for failure in failures if (said := explain(getattr(failure, "cause", None) or failure))]
        if not refused:
            raise
        ray_tune.report({"refused": refused[0]})


def _ranks(task: dict[str, Any]) -> None:
    """Several ranks, by Ray Train. They belong to this process and end with it."""
    from ray.train import RunConfig as TrainRunConfig
    from ray.train import ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
    from ray.tune.integration.ray_train import TuneReportCallback

    class Ranks(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            # Ray's cleaner of what a killed trial leaves asks the dashboard, which is off, and so never ends itself.
            # `tune.engine` does its work.
            callbacks = super()._create_default_callbacks()  # type: ignore[misc]  # of Ray Train's second version
            return [one for one in callbacks if not isinstance(one, PlacementGroupCleanerCallback)]

    gpus = task["gpus"] > 0
    tell: Any = TuneReportCallback()  # by Ray's annotations it is of another class than `callbacks` takes
    Ranks(
        work,
        train_loop_config=task,
        # The model's collectives run on the GPUs, those that agree on metrics and settings on the CPU.
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=task["ranks"],
            use_gpu=gpus,
            resources_per_worker={"CPU": task["cpus"], **({"GPU": 1} if gpus else {})},
        ),
        run_config=TrainRunConfig(name=Path(task["run"]["out"]).name, storage_path=task["ray"], callbacks=[tell]),
    ).fit()
