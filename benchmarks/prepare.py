"""Raw tables to a prepared dataset: events/s and peak memory, stage by stage, against the number of events.

Each preparation runs in a process of its own and reads Parquet tables that are made beforehand in a temporary folder: a
watch log in the order of time, as services keep it, with ids as text, some rows twice, a region and a device; viewers
with a plan and an age band; a catalogue with metadata; rights by region and plan. The middle size is also prepared
with a DuckDB limit that is far too small for its table, to see that preparation is out of core.
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import GB, Promise, Report, Spread, apart, memory, run
from benchmarks.raw_tables import Size, described, write_tables
from data_prep.prepare import prepare_dataset
from m5.config import ConfigError

SAMPLING_SECONDS = 0.02
LEAST_EVENTS, SMOKE_EVENTS = 1_000, 20_000
TIGHT_LIMIT = "250MB"  # of DuckDB, for the row out of core
NUMPY_BYTES = 30  # an event, beyond DuckDB's limit, as `prepare_dataset` says
EVENTS_PROMISED, SECONDS_PROMISED, GB_PROMISED = 20_000_000, 600, 6


@dataclass
class Run:
    """One preparation.

    Attributes:
        seconds: in all.
        stages: seconds by what `prepare_dataset` said it was doing.
        before: anonymous bytes when it began: the libraries.
        anonymous: the most anonymous bytes, sampled; the rest of `peak` is pages of files, which the system may drop.
        peak: the most resident bytes, as the kernel counts them.
    """

    seconds: float
    stages: dict[str, float]
    before: int
    anonymous: int
    peak: int


@contextmanager
def sampled_peak(field_name: str) -> Iterator[list[int]]:
    """Yields a list whose only item grows to the most bytes seen."""
    most, over = [memory(field_name)], threading.Event()

    def watch() -> None:
        while not over.wait(SAMPLING_SECONDS):
            most[0] = max(most[0], memory(field_name))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        over.set()
        thread.join()


def prepared(raw: Path, out: Path, memory_limit: str) -> Run:
    """Prepare the tables in `raw`; in a process of its own, for its peak."""
    marks: list[tuple[str, float]] = []
    before = memory("RssAnon")
    with sampled_peak("RssAnon") as anonymous:
        began = time.perf_counter()
        prepare_dataset(
            described(raw),
            out,
            memory_limit=memory_limit,
            progress=lambda text: marks.append((text, time.perf_counter())),
        )
        taken = time.perf_counter() - began
    # The last line says that all is done; each other one begins a stage.
    stages = {stage(text): after - at for (text, at), (_, after) in pairwise(marks)}
    return Run(taken, stages, before, anonymous[0], memory("VmHWM"))


def stage(text: str) -> str:
    """The first word of a line of progress: checking, reading, sorting, vocabularies."""
    return text.split()[0]


def runs_of(raw: Path, work: Path, memory_limit: str, repeats: int) -> list[Run]:
    found = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory(dir=work) as out:
            found.append(apart(prepared, raw, Path(out) / "data", memory_limit)[0])
    return found


def row(size: Size, memory_limit: str, found: list[Run]) -> dict[str, Any]:
    """One line of the table; of stages only the median."""
    return {
        "events": size.events,
        "DuckDB limit": memory_limit,
        "repeats": len(found),
        "events/s": Spread.rate(size.events, [one.seconds for one in found]),
        "seconds": Spread.of([one.seconds for one in found]),
        **{f"{name} s": statistics.median(one.stages[name] for one in found) for name in found[0].stages},
        "peak GB": Spread.of([one.peak / GB for one in found]),
        "anonymous GB": Spread.of([one.anonymous / GB for one in found]),
    }


def in_bytes(limit: str) -> int:
    """DuckDB's way of writing sizes, such as 3GB and 250MB."""
    return int(limit[:-2]) * {"MB": 10**6, "GB": GB}[limit[-2:]]


def check(options: argparse.Namespace) -> None:
    """Raises ConfigError for values that make no sense."""
    if not re.fullmatch(r"[1-9]\d*(MB|GB)", options.memory_limit):
        raise ConfigError(f"--memory-limit {options.memory_limit}: write it as 3GB or 500MB.")
    if options.work is not None and not options.work.is_dir():
        raise ConfigError(f"--work {options.work}: there is no such folder.")
    if min(options.events) < LEAST_EVENTS:
        raise ConfigError(f"--events {min(options.events)}: at least {LEAST_EVENTS:,}, so that every split has some.")
    if options.repeats_largest is not None and options.repeats_largest < 1:
        raise ConfigError(f"--repeats-largest {options.repeats_largest}: at least 1.")


def measured(options: argparse.Namespace) -> Iterator[tuple[Size, str, list[Run]]]:
    """Size, DuckDB's limit and the preparations with it."""
    sizes = [Size.of(events) for events in ([SMOKE_EVENTS] if options.smoke else sorted(options.events))]
    repeats = 1 if options.smoke else options.repeats
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        for place, size in enumerate(sizes):
            raw = Path(name) / "raw"
            raw.mkdir()
            write_tables(raw, size)
            largest, middle = place == len(sizes) - 1, place == (len(sizes) - 1) // 2
            times = (options.repeats_largest if largest and not options.smoke else None) or repeats
            for limit in [options.memory_limit, *([TIGHT_LIMIT] if middle else [])]:
                found = runs_of(raw, Path(name), limit, times)
                taken = ", ".join(f"{one.seconds:.1f}" for one in found)
                print(f"{size.events:,} events, DuckDB limit {limit}: {taken} s", file=sys.stderr, flush=True)
                yield size, limit, found
            shutil.rmtree(raw)


def promises(found: list[tuple[Size, str, list[Run]]], limit: str) -> list[Promise]:
    """`limit` is DuckDB's of the promised size."""
    made = []
    for size, its_limit, runs in found:
        if size.events == EVENTS_PROMISED and its_limit == limit:
            seconds, peak = statistics.median(one.seconds for one in runs), max(one.peak for one in runs)
            made.append(Promise("seconds to prepare 20M events, median", seconds, SECONDS_PROMISED))
            made.append(Promise("GB of peak memory for 20M events, highest", peak / GB, GB_PROMISED))
    shares = (
        (one.anonymous - one.before) / (in_bytes(its_limit) + NUMPY_BYTES * size.events)
        for size, its_limit, runs in found
        for one in runs
    )
    bound = f"anonymous memory added, as a share of DuckDB's limit plus {NUMPY_BYTES} bytes an event, highest"
    return [*made, Promise(bound, max(shares), 1)]


def measure(options: argparse.Namespace) -> Report:
    check(options)
    found = list(measured(options))
    rows = [row(size, limit, runs) for size, limit, runs in found]
    usual = [line for line, (_, limit, _) in zip(rows, found, strict=True) if limit == options.memory_limit]
    libraries = max(one.before for _, _, runs in found for one in runs) / GB
    return Report(
        title="Preparation: from raw tables to a prepared dataset",
        rows=rows,
        spread_over="as many repeats as the column `repeats` says",
        notes=[
            "Every preparation was a process of its own; `repeats` says how many there were of each size. The log has "
            "fifty events a viewer on average and up to 20,000 titles. Stages are medians of the seconds from one line "
            "of progress to the next; what they lack of the whole is the hash of the result and moving it into place.",
            "Peak memory is the kernel's high-water mark (VmHWM) of the whole process, DuckDB and the libraries "
            f"included. Anonymous memory, {libraries:.2f} GB of which are there before it begins, was sampled every "
            f"{1000 * SAMPLING_SECONDS:.0f} ms; what the peak has beyond it are pages of files, of libraries and "
            "of the arrays being written, which the system may drop.",
            f"The row of {TIGHT_LIMIT} is out of core: DuckDB spills to disk what it may not hold. The raw tables had "
            "just been written, so that reading them was reading the page cache.",
        ],
        promises=promises(found, options.memory_limit),
        plot=lambda axes: draw(axes, usual),
        details={"runs": [[size._asdict(), limit, [asdict(one) for one in runs]] for size, limit, runs in found]},
    )


def draw(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Seconds of each stage, stacked, and peak memory, against events."""
    labels = [f"{line['events'] / 1e6:g}M" for line in rows]
    floor = np.zeros(len(rows))
    for key in (key for key in rows[0] if key.endswith(" s")):
        heights = np.array([line[key] for line in rows])
        axes.bar(labels, heights, bottom=floor, label=key.removesuffix(" s"), width=0.5)
        floor += heights
    axes.set_xlabel("events")
    axes.set_ylabel("seconds")
    axes.legend(loc="upper left")
    beside = axes.twinx()
    beside.plot(labels, [line["peak GB"].median for line in rows], "ko-")
    beside.set_ylabel("peak memory, GB (line)")
    beside.set_ylim(bottom=0)


def arguments(parser: argparse.ArgumentParser) -> None:
    sizes = [1_000_000, 5_000_000, EVENTS_PROMISED]
    parser.add_argument("--events", type=int, nargs="+", default=sizes, help="sizes of the watch log")
    parser.add_argument("--repeats-largest", type=int, help="of the largest size (default: --repeats)")
    parser.add_argument("--memory-limit", default="3GB", help="what DuckDB may hold, such as 3GB or 500MB")
    parser.add_argument("--work", type=Path, help="folder for raw tables and datasets (default: the temporary folder)")


def main(argv: list[str] | None = None) -> int:
    return run(__spec__.name if __spec__ else __name__, __doc__ or "", measure, argv, arguments, repeats=3)


if __name__ == "__main__":
    sys.exit(main())
