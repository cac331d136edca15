"""One system's part of the comparison, in a process of its own: tuned, trained on seeds, ranked on the test split."""

from __future__ import annotations

import json
import math
import os
import statistics
import time
import traceback
import warnings
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import machine, memory
from benchmarks.literature.data import Data
from benchmarks.literature.network import validate
from benchmarks.literature.system import CannotFeed, System
from benchmarks.literature.systems import system
from m5.config import ConfigError
from m5.evaluate import Ranked, Scorer, rank_rows
from m5.library_warnings import silence_known
from m5.schema import DataError, PreparedDataset

QUERY_REQUESTS, QUERY_REPEATS = 256, 5
HEAD_SHARE = 0.1  # of the titles, those watched most in training


@dataclass(frozen=True)
class Setup:
    """What all systems of a comparison share.

    Attributes:
        data: prepared dataset.
        content_hash: of it.
        preset: that M5's row starts from.
        history: most recent behaviours that a system reads.
        seconds: of training a system has altogether: a third for tuning, the rest for the seeds.
        trials: settings that tuning tries at most; validation decides.
        seeds: trainings of the settings it chose.
        filter_seen: whether rankings leave watched titles out.
        validation_targets: random part of the validation targets that choices are made on.
        max_targets: random part of the test targets; none: all.
        content: digests of the content vectors, which are not part of `content_hash`.
        threads: of a system; none: as many as torch has.
    """

    data: str
    content_hash: str
    preset: str
    history: int
    seconds: float
    trials: int
    seeds: int
    filter_seen: bool
    validation_targets: int
    max_targets: int | None
    content: str = ""
    threads: int | None = None

    def fitting_data(self) -> Data:
        return Data(
            PreparedDataset(self.data),
            history=self.history,
            filter_seen=self.filter_seen,
            validation_targets=self.validation_targets,
            preset=self.preset,
        )


def run(name: str, setup: Setup, out: Path) -> dict[str, Any]:
    """Run one system and leave OUT/NAME.json, OUT/NAME.npz with a row of ranks a seed, and OUT/NAME.log.

    Returns:
        What the JSON holds. A system that the dataset cannot feed has "skipped" instead of results, one that raises
        anything else, or whose training diverges, "failed"; both say why.
    """
    if setup.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(setup.threads)
        torch.set_num_threads(setup.threads)
    silence_known()
    warnings.simplefilter("ignore")
    with (out / f"{name}.log").open("w") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        return record_of(name, setup, out)


def record_of(name: str, setup: Setup, out: Path) -> dict[str, Any]:
    """As `run`, in this process."""
    record: dict[str, Any] = {"name": name, "setup": asdict(setup), "made": _made()}
    try:
        found = system(name)
        record |= {key: value for key, value in asdict(found).items() if key not in ("fit", "settings")}
        record |= _measured(found, setup, out)
    except CannotFeed as error:
        record["skipped"] = str(error)
    except Exception as error:
        traceback.print_exc()
        record["failed"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return keep(record, out)


def keep(record: dict[str, Any], out: Path) -> dict[str, Any]:
    """Write the record to OUT/NAME.json, whole or not at all, and return it."""
    temporary = out / f".{record['name']}.json.writing"
    temporary.write_text(json.dumps(record, indent=1))
    temporary.replace(out / f"{record['name']}.json")
    return record


def _made() -> dict[str, Any]:
    """When, with what and beside how much else a record is made."""
    here = machine()
    return {
        "date": f"{datetime.now():%Y-%m-%d %H:%M}",
        "commit": here["commit"],
        "cpu": here["cpu"],
        "versions": here["versions"],
        "threads": torch.get_num_threads(),
        "load": here["load_before"],
    }


def _measured(found: System, setup: Setup, out: Path) -> dict[str, Any]:
    from threadpoolctl import threadpool_limits

    with threadpool_limits(torch.get_num_threads()):
        tuning, settings = _tune(found, setup)
        seeds = range(setup.seeds if found.by_chance else 1)
        scorers, seconds = [], []
        for seed in seeds:
            data = setup.fitting_data()  # each fit pays for what it derives from the data: nothing is cached yet
            began = time.monotonic()
            scorers.append(found.fit(data, settings, seed, setup.seconds * 2 / 3 / setup.seeds))
            seconds.append(time.monotonic() - began)
        peak = memory("VmHWM")
        return {
            "tuning": tuning,
            "chosen": dict(settings),
            "cost": {
                "train_seconds": statistics.mean(seconds),
                "tuning_seconds": sum(trial["seconds"] for trial in tuning),
                "peak_memory_mb": peak / 2**20,
                "query_ms": _query_ms(scorers[0], data),
                "parameters": _parameters(scorers[0]),
            },
            **_ranked(scorers, data, setup, out / f"{found.name}.npz"),
        }


def _tune(found: System, setup: Setup) -> tuple[list[dict[str, Any]], Any]:
    """Every trial with its validation NDCG@10, and the settings that did best.

    A trial whose training diverges, or whose scores are NaN, has None for a value, says why as "failed", and is below
    all others.

    Raises:
        CannotFeed: the dataset cannot feed the system.
        ValueError: all trials diverged.
    """
    tuning: list[dict[str, Any]] = []
    for settings in found.settings[: setup.trials]:
        data = setup.fitting_data()
        trial: dict[str, Any] = {"settings": dict(settings), "ndcg@10": None}
        began = time.monotonic()
        seconds = None
        try:
            scorer = found.fit(data, settings, 0, setup.seconds / 3 / setup.trials)
            seconds = time.monotonic() - began
            trial["ndcg@10"] = validate(scorer, data)
        except CannotFeed:
            raise
        except (DataError, ConfigError) as error:
            trial["failed"] = str(error).splitlines()[0]
        tuning.append(trial | {"seconds": seconds or time.monotonic() - began})
    values = [-math.inf if trial["ndcg@10"] is None else trial["ndcg@10"] for trial in tuning]
    if max(values) == -math.inf:
        raise ValueError(f"no setting could be validated; the first: {tuning[0]['failed']}")
    return tuning, found.settings[values.index(max(values))]


def _query_ms(scorer: Scorer, data: Data) -> float:
    """Milliseconds a request, all titles scored, in a batch of QUERY_REQUESTS."""
    events = np.linspace(0, len(data.title) - 1, QUERY_REQUESTS).astype(np.int64)
    taken = []
    for _ in range(1 + QUERY_REPEATS):
        began = time.monotonic()
        scorer.score(events)
        taken.append(time.monotonic() - began)
    return 1000 * statistics.median(taken[1:]) / len(events)


def _parameters(scorer: Any) -> int | None:
    model = getattr(scorer, "model", None)
    if isinstance(model, torch.nn.Module):
        return sum(parameter.numel() for parameter in model.parameters())
    return getattr(scorer, "parameters", None)


def _ranked(scorers: list[Any], data: Data, setup: Setup, path: Path) -> dict[str, Any]:
    """Test metrics of every seed by slice, how popular what they list is; the ranks go to `path`."""
    for seed, scorer in enumerate(scorers):
        scorer.name = str(seed)
    found = rank_rows(data.dataset, scorers, filter_seen=setup.filter_seen, max_targets=setup.max_targets)
    metrics = [found.measure(row, bootstrap=0, seed=0) for row in found.rows]
    which: dict[str, Any] = {"user": found.requests.user, "event": found.requests.event}
    ranks = np.stack([row.rank for row in found.rows]).astype(np.float32)
    np.savez_compressed(path, rank_SR=ranks, **which)
    requests = path.with_name("requests.npz")
    if not requests.exists():
        temporary = path.with_name(f".{path.stem}.requests.npz")
        arrays: dict[str, Any] = {f"slice/{part}": rows for part, rows in found.slices.items()}
        np.savez_compressed(temporary, **which, **arrays)
        temporary.replace(requests)
    head_N = np.zeros(data.n_titles, dtype=bool)
    head_N[np.argsort(-data.train_count, kind="stable")[: max(1, round(HEAD_SHARE * data.n_titles))]] = True
    return {
        "seeds": metrics,
        "head": [_head_share(row, head_N) for row in found.rows],
        "head_of_targets": float(head_N[found.requests.target].mean()),
        "warnings": found.warnings,
    }


def _head_share(row: Ranked, head_N: np.ndarray) -> float:
    """Share of the places in lists of ten that titles of the head take."""
    assert row.shown is not None
    count_N = row.shown.count[:-1].cpu().numpy()
    return float(count_N[head_N].sum() / max(1, count_N.sum()))
