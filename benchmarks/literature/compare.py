"""`m5 compare`: every system on the same dataset, split, candidates, rights, budget and evaluator; one report.

OUT/systems has a record, the ranks and a log of each system. Those that have results are not run again, so that the
same command goes on after an interruption, and `--systems` may name more than before. What was skipped or failed is
tried again where it is named, and stays on the page where it is not.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import sys
import time
from contextlib import closing
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.harness import machine
from benchmarks.literature import job
from benchmarks.literature.job import Setup
from benchmarks.literature.paired import REQUESTS, against_m5, refuse_other_requests, viewers
from benchmarks.literature.processes import each_apart, stoppable, why_it_ended
from benchmarks.literature.systems import MODULES, chosen
from m5.best import content_digest
from m5.config import ConfigError, RunConfig, load_config
from m5.resume import LOCK, locked
from m5.schema import ContentKind, DataError, PreparedDataset

KINDS: tuple[ContentKind, ...] = ("text", "image", "graph")
FILES = ("compare.json", "compare.md", "compare.html")
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
        The exit code: 1 where a system on the page failed, or M5 has no result.

    Raises:
        ConfigError: an unknown system or preset, OUT holds a comparison of another setup or something else, or is in
            use.
        DataError: no dataset, nothing in one of its splits, no content vectors for M5, or a damaged file in OUT.
        Terminated: SIGTERM has come.
    """
    names = chosen(systems)
    if not seconds > 0:
        raise ConfigError(f"--seconds {seconds:g}: a system needs some time to train.")
    config = load_config(preset, [], data, out)  # a misspelt preset is told before an hour's work, not after
    dataset = PreparedDataset(data)
    for split in ("train", "valid", "test"):
        if not dataset.manifest.split_counts[split]:
            raise DataError(f"{data}: the {split} split has no events; a comparison needs all three.")
    if "m5" in names:
        _refuse_without_content(dataset, config)
    jobs = jobs or os.cpu_count() or 1
    setup = Setup(
        data=str(data),
        content_hash=dataset.manifest.content_hash,
        preset=preset,
        history=history,
        seconds=seconds,
        trials=trials,
        seeds=seeds,
        filter_seen=not keep_seen,
        validation_targets=VALIDATION_TARGETS,
        max_targets=max_targets,
        content=_content(dataset),
        threads=max(1, (os.cpu_count() or 1) // jobs),
    )
    _refuse_foreign(out)
    folder = out / "systems"
    folder.mkdir(parents=True, exist_ok=True)
    message = f"Stopped. Finished systems are in {folder}: the same command goes on."
    with locked(out / LOCK, "comparison"), stoppable(message):
        records = _kept(folder, setup)
        measured = [name for name, record in records.items() if "seeds" in record]
        if not measured:
            (folder / REQUESTS).unlink(missing_ok=True)  # of an earlier comparison: the first system writes it anew
        refuse_other_requests(folder, measured)
        records |= _run([name for name in names if name not in measured], setup, folder, jobs)
        # Hours may have passed.
        _kept(folder, setup)
        now = PreparedDataset(data)
        if (now.manifest.content_hash, _content(now)) != (setup.content_hash, setup.content):
            raise DataError(f"{data} was written anew while systems ran: their rows cannot stand beside each other.")
        ordered = [records[name] for name in MODULES if name in records]
        write(out, setup, ordered, jobs)
    return int(any("failed" in one or (one["name"] == "m5" and "seeds" not in one) for one in ordered))


def _content(dataset: PreparedDataset) -> str:
    """Which content vectors there are, with the start of each one's digest."""
    present = [kind for kind in KINDS if (dataset.folder / "content" / f"{kind}.npy").is_file()]
    return ", ".join(f"{kind} {content_digest(dataset, (kind,))[:16]}" for kind in present)


def _refuse_without_content(dataset: PreparedDataset, config: RunConfig) -> None:
    """Raises DataError where M5's preset asks for content vectors that the dataset lacks."""
    lacking = [kind for kind in config.model.content if not (dataset.folder / "content" / f"{kind}.npy").is_file()]
    if lacking:
        raise DataError(
            f"{dataset.folder} has no {' and no '.join(lacking)} vectors, which M5's preset asks for (model.content). "
            "Run `m5 encode` and `m5 graph` first, or give another --preset."
        )


def _refuse_foreign(out: Path) -> None:
    """Raises ConfigError where results cannot be written to OUT, or would replace what is none of a comparison."""
    for place in (out, out / "systems"):
        if place.exists() and not place.is_dir():
            raise ConfigError(f"--out {out}: {place} is a file; the comparison needs a folder.")
    present = [name for name in FILES if (out / name).exists()]
    try:
        known = not present or "against_m5" in json.loads((out / FILES[0]).read_text())
    except (OSError, ValueError, TypeError):
        known = False
    if not known:
        raise ConfigError(f"{out / present[0]} exists and is no result of `m5 compare`; choose another --out.")


def _kept(folder: Path, setup: Setup) -> dict[str, dict[str, Any]]:
    """Records by name of what has been run.

    Raises:
        ConfigError: a record was made under another setup: rows would not be comparable.
        DataError: a record is damaged.
    """
    records = {name: record for name in MODULES if (record := _read(folder, name)) is not None}
    for record in records.values():
        for key, value in asdict(setup).items():
            # The dataset is known by its hash, wherever it lies.
            if key != "data" and (before := record["setup"].get(key)) != value:
                hint = " (it follows from --jobs and the machine's cores)" if key == "threads" else ""
                raise ConfigError(
                    f"{folder.parent} holds a comparison with {key}={before}, not {value}{hint}: its rows could not "
                    "stand beside new ones. Choose another --out, or remove it."
                )
    return records


def _read(folder: Path, name: str) -> dict[str, Any] | None:
    path = folder / f"{name}.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text())
        whole = record["name"] == name and isinstance(record["setup"], dict)
        whole &= any(key in record for key in ("seeds", "skipped", "failed"))
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise DataError(f"{path} is damaged. Remove it, and {name} runs again.")
    return record


def _run(names: list[str], setup: Setup, folder: Path, jobs: int) -> dict[str, dict[str, Any]]:
    """Records by name; systems run `jobs` at a time, each in a process of its own that shares the cores evenly.

    A system whose process has ended without a record has failed.
    """
    console, records = Console(stderr=True), dict[str, dict[str, Any]]()
    earlier = {name: _stamp(folder, name) for name in names}
    began = time.monotonic()
    # Closing kills what still runs: trainings would otherwise be waited for to their end.
    with closing(each_apart(job.run, names, (setup, folder), jobs=jobs)) as ended:
        for name, code in ended:
            record = _read(folder, name) if _stamp(folder, name) != earlier[name] else None
            if record is None:
                failed = {"name": name, "setup": asdict(setup), "failed": why_it_ended(code)}
                record = job.keep(failed, folder)
            records[name] = record
            line = f"[{time.monotonic() - began:4.0f} s] {len(records)}/{len(names)}  {told(record)}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    return records


def _stamp(folder: Path, name: str) -> tuple[int, int] | None:
    """What tells a record from an earlier one."""
    path = folder / f"{name}.json"
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.is_file() else None


def told(record: dict[str, Any]) -> str:
    """A system's result in a line."""
    for key in ("skipped", "failed"):
        if key in record:
            return f"{record['name']}: {key}: {record[key]}"
    values = [seed["overall"]["ndcg@10"] for seed in record["seeds"]]
    cost = record["cost"]
    # The sample's deviation, as on the page.
    spread = f" ± {statistics.stdev(values):.4f} over {len(values)} seeds" if len(values) > 1 else " with one seed"
    found = f"NDCG@10 {statistics.fmean(values):.4f}{spread}"
    return f"{record['name']}: {found}, {cost['train_seconds']:.0f} s of training each"


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
        "viewers": viewers(out / "systems") if measured else {},
    }
    temporary = out / f".{FILES[0]}.writing"
    temporary.write_text(json.dumps(report, indent=1))
    temporary.replace(out / FILES[0])
    for path in write_pages(report, out):
        print(path)
