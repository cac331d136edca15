"""`m5 compare`: every system on the same dataset, split, candidates, rights, budget and evaluator; one report.

OUT/systems has a record, the ranks and a log of each system. Those that are there are not run again, so that the same
command goes on after an interruption, and `--systems` may name more than before.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shlex
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console

from benchmarks.harness import machine
from benchmarks.literature import job
from benchmarks.literature.job import Setup
from benchmarks.literature.paired import against_m5
from benchmarks.literature.systems import MODULES, chosen
from m5.config import ConfigError, load_config
from m5.schema import DataError, PreparedDataset

VALIDATION_TARGETS = 2_000  # that every choice of settings and of weights is made on


def compare(
    *,
    data: Path,
    systems: list[str],
    out: Path,
    preset: str = "default",
    history: int = 50,
    seconds: float = 90.0,
    trials: int = 3,
    seeds: int = 3,
    jobs: int | None = None,
    keep_seen: bool = False,
    max_targets: int | None = None,
) -> int:
    """Run what is missing, then write OUT/compare.{json,md,html}; arguments as of `Setup`, `jobs` at a time.

    Returns:
        The exit code: 1 where a system failed.

    Raises:
        ConfigError: an unknown system or preset, or OUT holds a comparison of another setup.
        DataError: no dataset, or nothing in its validation or test split.
    """
    names = chosen(systems)
    if not seconds > 0:
        raise ConfigError(f"--seconds {seconds:g}: a system needs some time to train.")
    load_config(preset, [], data, out)  # a misspelt preset is told before an hour's work, not after
    manifest = PreparedDataset(data).manifest
    for split in ("train", "valid", "test"):
        if not manifest.split_counts[split]:
            raise DataError(f"{data}: the {split} split has no events; a comparison needs all three.")
    setup = Setup(
        data=str(data),
        content_hash=manifest.content_hash,
        preset=preset,
        history=history,
        seconds=seconds,
        trials=trials,
        seeds=seeds,
        filter_seen=not keep_seen,
        validation_targets=VALIDATION_TARGETS,
        max_targets=max_targets,
    )
    folder = out / "systems"
    folder.mkdir(parents=True, exist_ok=True)
    _refuse_other_setup(folder, setup)
    records = {name: record for name in MODULES if (record := _read(folder, name)) and "failed" not in record}
    missing = [name for name in names if name not in records]
    records |= _run(missing, setup, folder, jobs or os.cpu_count() or 1)
    ordered = [records[name] for name in MODULES if name in records]
    write(out, setup, ordered, jobs or os.cpu_count() or 1)
    return int(any("failed" in record for record in ordered))


def _read(folder: Path, name: str) -> dict[str, Any] | None:
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _refuse_other_setup(folder: Path, setup: Setup) -> None:
    """Raises ConfigError where a record in OUT was made under another setup: rows would not be comparable."""
    for name in MODULES:
        record = _read(folder, name)
        for key, value in asdict(setup).items():
            if record is not None and record["setup"][key] != value:
                raise ConfigError(
                    f"{folder.parent} holds a comparison with {key}={record['setup'][key]}, not {value}: its rows "
                    "could not stand beside new ones. Choose another --out, or remove it."
                )


def _run(names: list[str], setup: Setup, folder: Path, jobs: int) -> dict[str, dict[str, Any]]:
    """Records by name; systems run `jobs` at a time, each in a process of its own that shares the cores evenly."""
    console, records = Console(stderr=True), {}
    threads = max(1, (os.cpu_count() or 1) // jobs)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1)
    began = time.monotonic()
    try:
        waiting = {pool.submit(job.run, name, setup, folder, threads): name for name in names}
        for done in as_completed(waiting):
            name = waiting[done]
            records[name] = done.result()
            line = f"[{time.monotonic() - began:4.0f} s] {len(records)}/{len(names)}  {told(records[name])}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    except BaseException:
        # Trainings would otherwise be waited for to their end.
        for child in psutil.Process().children(recursive=True):
            child.kill()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()
    return records


def told(record: dict[str, Any]) -> str:
    """A system's result in a line."""
    for key in ("skipped", "failed"):
        if key in record:
            return f"{record['name']}: {key}: {record[key]}"
    values = [seed["overall"]["ndcg@10"] for seed in record["seeds"]]
    cost = record["cost"]
    return (
        f"{record['name']}: NDCG@10 {np.mean(values):.4f} ± {np.std(values):.4f} over {len(values)} "
        f"seed{'s' * (len(values) > 1)}, {cost['train_seconds']:.0f} s of training each"
    )


def write(out: Path, setup: Setup, records: list[dict[str, Any]], jobs: int) -> None:
    """compare.json, and the pages made from it."""
    from benchmarks.literature.report import write_pages

    measured = [record for record in records if "seeds" in record]
    manifest = PreparedDataset(setup.data).manifest
    ranked = [record["name"] for record in measured if record["name"] != "m5"]
    report = {
        "date": f"{datetime.now():%Y-%m-%d %H:%M}",
        "command": shlex.join(["m5", *sys.argv[1:]]),
        "machine": machine(),
        "dataset": {
            "name": manifest.name,
            "content_hash": manifest.content_hash,
            "users": manifest.n_users,
            "titles": manifest.n_titles,
            "events": manifest.n_events,
            "cold_titles": manifest.n_cold_titles,
            "notes": list(manifest.notes),
        },
        "setup": asdict(setup) | {"jobs": jobs},
        "systems": records,
        "against_m5": against_m5(out / "systems", ranked) if any(r["name"] == "m5" for r in measured) else {},
    }
    (out / "compare.json").write_text(json.dumps(report, indent=1))
    for path in write_pages(report, out):
        print(path)
