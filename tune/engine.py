"""Runs trials by Ray Tune and keeps what becomes of each: the only file that starts Ray."""

from __future__ import annotations

import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import PlacementGroupID, cloudpickle
from ray import tune as ray_tune
from ray.air.constants import EXPR_ERROR_PICKLE_FILE
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError
from ray.tune import Callback, FailureConfig, RunConfig, TuneConfig
from ray.tune.experiment import Trial
from ray.util.placement_group import PlacementGroup, remove_placement_group

from m5.config import ConfigError
from m5.resume import CHECKPOINTS
from tune.records import Folder, Record
from tune.schedulers import Stops
from tune.settings import Plan
from tune.study import GivenSearcher
from tune.trial import TrialTrainer, run_trial

LISTENS = 10.0  # seconds in which a cluster's head must accept a connection
# Set before Ray is started; what the user has set stays.
ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune's own tables; tune.live has ours
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # CSV, JSON and TensorBoard files that repeat the runs' own
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C would have every trial count as complete
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    # A trial of several ranks that is ended early waits for Ray Train, which does not know of it.
    "TUNE_FORCE_TRIAL_CLEANUP_S": "3",
    "TUNE_MAX_PENDING_TRIALS_PG": "1",  # a trial is proposed when there is room for it, with all that is known by then
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_THRESHOLD_S": "30",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


class Recorder(Callback):
    """Writes down what Ray Tune says of each trial.

    Args:
        folder: where records are.
        scheduler: knows which trials it has ended.
        changed: called after each change, with the record, e.g. to show it.
    """

    def __init__(self, folder: Folder, scheduler: Stops, changed: Callable[[Record], None]):
        self.folder, self.scheduler, self.changed = folder, scheduler, changed
        self.refused: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Ray writes its own state down, with its callbacks; it is never read, since the records are enough

    def record(self, trial: Trial) -> Record:
        return self.folder.records[trial.config["record"]]

    def _keep(self, record: Record) -> None:
        self.folder.write(record)
        self.changed(record)

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        record = self.record(trial)
        record.status, record.attempts, record.history = "running", record.attempts + 1, []
        record.began_at = time.time()
        self._keep(record)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        record = self.record(trial)
        if "refused" in result:
            self.refused[record.name] = result["refused"]
            return
        record.history += result.get("rows", [])
        record.node = result.get("node", record.node)
        if record.history:
            record.seconds = record.history[-1]["seconds"]
        self._keep(record)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        record = self.record(trial)
        if reason := self.refused.pop(record.name, None):
            record.reasons.append(reason)
            record.status = "failed"
        elif not record.history:
            record.reasons.append("it ended without a validation")
            record.status = "failed"
        else:
            record.status = "stopped" if trial.trial_id in self.scheduler.stopped else "finished"
        self._end(record)

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        record = self.record(trial)
        record.reasons.append(self.reason(trial, record))
        give_back(self.folder.note(record, "placement"))
        record.status = "waiting"
        self._keep(record)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        record = self.record(trial)
        record.reasons.append(self.reason(trial, record))
        record.status = "failed"
        self._end(record)

    def _end(self, record: Record) -> None:
        give_back(self.folder.note(record, "placement"))
        self._keep(record)
        # The whole training state, optimizer included, is for going on; RUN/best stays.
        shutil.rmtree(self.folder.run(record) / CHECKPOINTS, ignore_errors=True)

    def reason(self, trial: Trial, record: Record) -> str:
        """Why an attempt has failed, in a line."""
        said = said_by(self.folder, record)
        # Tune forgets where it has put the error once it has decided to try again, so its getters find nothing.
        pickled = Path(trial.local_path or "") / EXPR_ERROR_PICKLE_FILE
        error = trial.get_error()
        if pickled.is_file():
            error = cloudpickle.loads(pickled.read_bytes())
            pickled.unlink()
        return said if said is not None else describe(error)


def give_back(path: Path) -> None:
    """Give the cores and GPUs of a trial's ranks back, and end the ranks if they live.

    A trial that is ended early is killed, and with it the part of Ray Train that would do so: the next trial would wait
    for ever.
    """
    if path.is_file():
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(path.read_text()))))
        path.unlink()


def said_by(folder: Folder, record: Record) -> str | None:
    """What a trial's process has left behind about its end: the memory guard's word, or the watchdog's."""
    note = folder.note(record, "said")
    if note.is_file():
        text = note.read_text()
        note.unlink()
        return text
    run = folder.run(record)
    stacks = sorted((run / "stalls").glob("rank-*.txt"))
    if not stacks:
        return None
    kept = run / f"stalls-attempt-{record.attempts}"
    shutil.rmtree(kept, ignore_errors=True)
    found = re.search(
        r"training has stalled: (for [\d.]+ s no rank has made progress).*\n\s*(.*)", stacks[0].read_text()
    )
    (run / "stalls").rename(kept)
    told = f"{found[1]}; {found[2]}" if found else "no progress"
    return f"hung: {told}. Stacks: {kept.relative_to(folder.path)}"


def describe(error: Any) -> str:
    """Ray's word about a failure, in a line."""
    if isinstance(error, OutOfMemoryError):
        return (
            "out of memory: Ray ended it because its node was running low. Give trials fewer at a time, or more room."
        )
    if isinstance(error, RayTaskError):
        cause = error.cause if error.cause is not None else error
        first = str(cause).strip().splitlines()
        name = "out of memory: OutOfMemoryError" if "OutOfMemory" in type(cause).__name__ else type(cause).__name__
        return (
            f"raised {name}: {first[-1] if len(first) > 1 and 'Traceback' in str(cause) else first[0] if first else ''}"
        )
    if isinstance(error, RayActorError):
        text = " ".join(str(error).split())
        if "OOM" in text and "memory monitor" in text:
            return "out of memory: Ray ended it because its node was running low."
        detail = re.search(r"Worker exit type: (\w+)(?: Worker exit detail: ([^.]*))?", text)
        return f"its process died ({detail[2] or detail[1] if detail else text[:200]}): killed, perhaps for memory"
    return " ".join(str(error or "no reason was given").split())[:300]


@contextmanager
def cluster(address: str | None, plan: Plan) -> Iterator[int]:
    """Join a Ray cluster, or start one on this machine; gives how many trials it can run at a time.

    Raises:
        ConfigError: no cluster at the address, or none that has room for one trial.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # On a cluster, processes get what this one has set by the job's environment.
    variables = {name: os.environ[name] for name in ENVIRONMENT} | {
        name: value for name, value in os.environ.items() if name.startswith("M5_")
    }
    options: dict[str, Any] = {"runtime_env": {"env_vars": variables}, "log_to_driver": False}
    if address is None:
        options |= {"address": "local", "include_dashboard": False}
    else:
        _require_listener(address)
        options |= {"address": address}
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)  # which trials have failed is told by name and reason
    try:
        ray.init(**options, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        what = "Ray could not be started" if address is None else f"--address {address}: the cluster cannot be joined"
        raise ConfigError(f"{what}: {error}") from None
    try:
        yield room(plan)
    finally:
        ray.shutdown()


def _require_listener(address: str) -> None:
    """Raises ConfigError where nothing answers at the address: Ray would try for a minute, then end the process."""
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or address  # as Ray reads it
    if "://" in address:
        raise ConfigError(
            f"--address {address}: run m5 tune on a node of the cluster, with auto or the head's host:port; Ray Client "
            "would have the search's folder be another machine's."
        )
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=LISTENS).close()
        except OSError as error:
            raise ConfigError(f"--address {address}: no Ray cluster answers there ({error}).") from None


def room(plan: Plan) -> int:
    """How many trials fit at a time, node by node.

    Raises:
        ConfigError: not even one does.
    """
    trial = plan.config.trial
    ranks = 0
    for node in ray.nodes():
        if node["Alive"]:
            has = node["Resources"]
            fits = [has.get("CPU", 0) // trial.cpus]
            if trial.gpus:
                # Half a GPU and a quarter do not add up over two of them.
                per_gpu = int(1 / trial.gpus)
                fits.append(has.get("GPU", 0) * per_gpu)
            ranks += int(min(fits))
    trials = ranks // trial.ranks
    if trials < 1:
        has = ray.cluster_resources()
        raise ConfigError(
            f"a trial of {trial.ranks} x ({trial.cpus} CPUs, {trial.gpus:g} GPUs) has no room in this cluster of "
            f"{has.get('CPU', 0):g} CPUs and {has.get('GPU', 0):g} GPUs. See trial.ranks, trial.cpus and trial.gpus."
        )
    return min(trials, plan.config.search.concurrent or trials)


class Engine:
    """Runs records as trials.

    Args:
        plan: of the search.
        folder: of the search.
        data: as trials are told it: folder or URL.
        concurrent: trials at a time.
        trainer: what trains; `TrialTrainer`, or one that does more.
    """

    def __init__(
        self, plan: Plan, folder: Folder, *, data: str, concurrent: int, trainer: type[TrialTrainer] = TrialTrainer
    ):
        self.plan, self.folder, self.data, self.concurrent, self.trainer = plan, folder, data, concurrent, trainer

    def task(self, record: Record) -> dict[str, Any]:
        """What a trial's process is told; see `tune.trial.work`."""
        run = self.plan.run(record.values, seed=record.seed, data="data", out=self.folder.run(record))
        training = run.training.model_dump(mode="json")
        # How often the training state is kept changes no result. A trial is short, and may be killed.
        training["checkpoint_minutes"] = min(training["checkpoint_minutes"], 1.0)
        trial = self.plan.config.trial
        return {
            "record": record.name,
            "run": run.model_dump(mode="json") | {"training": training},
            "data": self.data,
            "said": str(self.folder.note(record, "said")),
            "placement": str(self.folder.note(record, "placement")),
            "ray": str(self.folder.path / "ray"),
            "trainer": self.trainer,
            **trial.model_dump(),
        }

    def run(self, searcher: GivenSearcher, scheduler: Stops, changed: Callable[[Record], None]) -> None:
        """Run what the searcher gives until it gives no more; failures are kept in the records, not raised.

        Raises:
            KeyboardInterrupt: Ctrl-C; trials that were running stay unfinished.
        """
        trial = self.plan.config.trial
        # The driver of several ranks needs next to nothing, and Ray Train asks for what they need; but Tune wants every
        # trial to have something. A core would be missing where ranks take all of them; a megabyte is not.
        own: dict[str, float] = {"cpu": trial.cpus, "gpu": trial.gpus}
        wanted = own if trial.ranks == 1 else {"memory": 1e6}
        storage = self.folder.path / "ray"
        shutil.rmtree(storage, ignore_errors=True)

        def name(trial: Trial) -> str:
            return f"{trial.config['record']}_{trial.trial_id}"

        tuner = ray_tune.Tuner(
            ray_tune.with_resources(run_trial, wanted),
            tune_config=TuneConfig(
                search_alg=searcher,
                scheduler=scheduler,
                num_samples=-1,
                trial_name_creator=name,
                trial_dirname_creator=name,
            ),
            run_config=RunConfig(
                name="tune",
                storage_path=str(storage),
                failure_config=FailureConfig(max_failures=self.plan.config.search.retries),
                callbacks=[Recorder(self.folder, scheduler, changed)],
                verbose=0,
            ),
        )
        tuner.fit()
        shutil.rmtree(storage, ignore_errors=True)
