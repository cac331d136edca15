"""The rating task: RMSE and MAE of Surprise's algorithms and of three of the literature's systems on the same folds.

    python -m benchmarks.literature.rating ml-1m.zip --systems all --folds 5 --out runs/ratings

It reads MovieLens 100K or 1M in the official layout, holds every fold's ratings out once, and writes OUT/ratings.json
and OUT/ratings.md. A fold that is finished lies in OUT/folds/SYSTEM.json and is not run again: after Ctrl-C, or with
more systems, the same command goes on. M5 is no row: it ranks titles, it does not rate them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.literature import lund_ng, mu_wu, siet
from benchmarks.literature.rating_data import World, folds, read_world
from benchmarks.literature.rating_network import RatingSystem
from benchmarks.literature.rating_report import record, write_report
from benchmarks.literature.rating_surprise import RATING_SYSTEMS
from benchmarks.options import positive
from m5.config import ConfigError
from m5.schema import DataError

# The rows, in the table's order. A system of the literature joins by a `RATING_SYSTEM` of its own.
SYSTEMS: tuple[RatingSystem, ...] = (
    *RATING_SYSTEMS,
    lund_ng.RATING_SYSTEM,
    mu_wu.RATING_SYSTEM,
    siet.RATING_SYSTEM,
)
Fold = dict[str, float]


def chosen(words: list[str]) -> list[RatingSystem]:
    """Systems of a list with spaces or commas, or all, alone or beside names, in the table's order.

    Raises:
        ConfigError: there is no system of that name.
    """
    known = {system.name: system for system in SYSTEMS}
    names = [name for text in words for name in text.replace(",", " ").split()]
    if unknown := [name for name in names if name != "all" and name not in known]:
        raise ConfigError(f"there is no rating system '{unknown[0]}'. Systems: all, or some of {', '.join(known)}.")
    return [system for name, system in known.items() if "all" in names or name in names]


def errors(predicted_R: np.ndarray, value_R: np.ndarray, world: World) -> tuple[float, float]:
    """RMSE and MAE of predictions clipped to the scale.

    Raises:
        DataError: a prediction is not finite.
    """
    if not np.isfinite(predicted_R).all():
        raise DataError("a prediction is not finite: the training did not converge. Try another --seed.")
    difference_R = np.clip(predicted_R.astype(np.float64), world.low, world.high) - value_R
    return float(np.sqrt(np.square(difference_R).mean())), float(np.abs(difference_R).mean())


def run_fold(name: str, world: World, fold: int, n_folds: int, seed: int, seconds: float) -> Fold:
    """One fold of one system: rmse, mae, seconds (reading aside), and peak_gb of the process."""
    torch.set_num_threads(1)
    train, test = (world.ratings.take(part) for part in list(folds(len(world.ratings.user_R), n_folds, seed))[fold])
    hidden = test._replace(value_R=np.full_like(test.value_R, np.nan))
    system = next(system for system in SYSTEMS if system.name == name)
    began = time.monotonic()
    predicted_R = system.fit_predict(train, hidden, world, seed, seconds)
    took = time.monotonic() - began
    rmse, mae = errors(predicted_R, test.value_R, world)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {"rmse": rmse, "mae": mae, "seconds": took, "peak_gb": peak}


class Kept:
    """Finished folds of one system, in a file.

    Args:
        path: of the file.
        key: data, folds, seed and time that they were made with.

    Raises:
        DataError: the file is damaged, or its folds were made otherwise.
    """

    def __init__(self, path: Path, key: dict[str, Any]):
        self.path, self.key, self.folds = path, key, dict[int, Fold]()
        if not path.is_file():
            return
        try:
            found = json.loads(path.read_text())
            self.folds = {int(fold): result for fold, result in found["folds"].items()}
            other = [name for name in key if found["key"].get(name) != key[name]]
        except (ValueError, KeyError, AttributeError):
            raise DataError(f"{path} is damaged. Remove it, and its folds run again.") from None
        if other:
            raise DataError(
                f"{path} has folds of another {other[0]} ({found['key'].get(other[0])}, now {key[other[0]]}). Give "
                "another --out, or remove the file."
            )

    def add(self, fold: int, result: Fold) -> None:
        """Keep a fold; the file is replaced as a whole."""
        self.folds[fold] = result
        unfinished = self.path.with_suffix(".unfinished")
        in_order = {str(number): self.folds[number] for number in sorted(self.folds)}
        unfinished.write_text(json.dumps({"key": self.key, "folds": in_order}, indent=1))
        os.replace(unfinished, self.path)


def in_processes(tasks: list[tuple[str, int]], world: World, jobs: int, *rest: Any) -> Iterator[tuple[str, int, Fold]]:
    """Each task in a process of its own, whose peak memory is the task's; `jobs` at a time, in the order they end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module.__name__ for module in (lund_ng, mu_wu, siet)])  # torch is imported once
    with ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as pool:
        waiting = list(reversed(tasks))
        running: dict[Future[Fold], tuple[str, int]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    name, fold = waiting.pop()
                    running[pool.submit(run_fold, name, world, fold, *rest)] = (name, fold)
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    name, fold = running.pop(done)
                    yield name, fold, done.result()
        except BrokenProcessPool:
            raise ConfigError("a fold's process was killed, most likely for memory. Give fewer --jobs.") from None
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def measure(options: argparse.Namespace) -> Path:
    """Run what is not finished, write the report; returns its path.

    Raises:
        ConfigError, DataError: see `main`.
    """
    systems = chosen(options.systems)
    world = read_world(options.data, options.titles)
    list(folds(len(world.ratings.user_R), options.folds, options.seed))  # refuse before anything is written
    (options.out / "folds").mkdir(parents=True, exist_ok=True)
    kept = {}
    for system in systems:
        key: dict[str, Any] = {"data": world.digest, "folds": options.folds, "seed": options.seed}
        if system.by_time:
            key["seconds"] = options.seconds
        kept[system.name] = Kept(options.out / "folds" / f"{system.name}.json", key)
    tasks = [(name, fold) for name, own in kept.items() for fold in range(options.folds) if fold not in own.folds]
    rest = (options.folds, options.seed, options.seconds)
    if options.jobs:
        results = in_processes(tasks, world, options.jobs, *rest)
    else:
        results = ((name, fold, run_fold(name, world, fold, *rest)) for name, fold in tasks)
    for name, fold, result in results:
        kept[name].add(fold, result)
        print(
            f"{name} fold {fold + 1}/{options.folds}: RMSE {result['rmse']:.4f}, MAE {result['mae']:.4f}, "
            f"{result['seconds']:.0f} s, {result['peak_gb']:.1f} GB",
            flush=True,
        )
    records = [record(system, [kept[system.name].folds[f] for f in range(options.folds)], world) for system in systems]
    command = ["python", "-m", "benchmarks.literature.rating", *options.words]
    notes = [note for note in (world.note, options.note) if note]
    return write_report(options.out, records, world, notes, command, options.folds, options.seed)


def main(argv: list[str] | None = None) -> int:
    """The command line; 0, 2 after a mistake of the user's, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.literature.rating", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("data", type=Path, help="official zip or folder of MovieLens 100K or 1M")
    parser.add_argument("--systems", nargs="+", default=["all"], metavar="NAME", help="all (default), or names")
    parser.add_argument("--folds", type=positive, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/ratings"), help="folder of results")
    parser.add_argument("--seconds", type=float, default=300.0, help="at most, for training a neural system on a fold")
    parser.add_argument("--jobs", type=int, default=1, help="folds at a time, a process each; 0: in this process")
    parser.add_argument("--seed", type=int, default=0, help="of folds and trainings")
    parser.add_argument("--titles", type=Path, help="Parquet table with descriptions, as of `m5 prepare movielens`")
    parser.add_argument("--note", default="", help="what to say of the data beside the figures")
    words = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(words)
    options.words = words
    try:
        if options.seconds <= 0 or options.jobs < 0:
            raise ConfigError("--seconds must be above 0, and --jobs at least 0.")
        print(f"Wrote {measure(options)}.")
    except (ConfigError, DataError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nStopped. Finished folds are in {options.out / 'folds'}: the same command goes on.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
