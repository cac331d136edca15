"""What the benchmarks share: repeats, spreads, the machine, and the page, JSON and plot that each of them leaves.

A benchmark is a module with `main(argv) -> int` that hands `run` a function from options to `Report`:

    m5 bench step --repeats 5            or      python -m benchmarks.step --repeats 5

Machines are noisy, so what is compared is measured in one run, in turns (`in_turns`), and told as median, P10 and P90.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table

from m5.config import ConfigError
from m5.library_warnings import silence_known
from m5.schema import DataError

T = TypeVar("T")
PACKAGES = ("torch", "torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu", "numpy", "pyarrow", "duckdb")
GB = 10**9


class Spread(NamedTuple):
    """Of repeated measurements, in whatever unit they have."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        low, high = np.quantile(values, [0.1, 0.9])
        return cls(statistics.median(values), float(low), float(high))

    @classmethod
    def rate(cls, amount: float, seconds: Sequence[float]) -> Spread:
        """`amount` per second; P10 is the slow end."""
        return cls.of([amount / second for second in seconds])


@dataclass(frozen=True)
class Promise:
    """A figure that is to stay above (`at_least`) or below its limit."""

    text: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def kept(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit


@dataclass
class Report:
    """What a benchmark has found.

    Attributes:
        title: of the page.
        rows: of the table; a value is text, a number or a Spread. All rows have the keys of the first.
        notes: paragraphs below the table: what was measured and what it does not show.
        promises: figures with limits.
        plot: draws on the matplotlib axes that it is given.
        spread_over: what medians and P10 - P90 are over, where it is not --repeats.
        details: more for the JSON.
    """

    title: str
    rows: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    promises: list[Promise] = field(default_factory=list)
    plot: Callable[[Any], None] | None = None
    spread_over: str = ""
    details: dict[str, Any] = field(default_factory=dict)


# ---- measuring -----------------------------------------------------------------------------------------------


def seconds(work: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call; on a GPU until it has finished."""
    synchronise()
    began = time.perf_counter()
    work()
    synchronise()
    return time.perf_counter() - began


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_turns(works: Mapping[str, Callable[[], Any]], *, repeats: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of every call, by name. Works take turns, so that a slow moment of the machine meets all of them."""
    for work in works.values():
        for _ in range(warm_up):
            work()
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            taken[name].append(seconds(work))
    return taken


def apart(work: Callable[..., T], *arguments: Any) -> tuple[T, int]:
    """Run a module's function in its own process: what it returns, and its peak resident memory in bytes."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_with_peak, work, arguments).result()


def _with_peak(work: Callable[..., T], arguments: tuple) -> tuple[T, int]:
    silence_known()
    result = work(*arguments)
    return result, memory("VmHWM")


def memory(figure: str) -> int:
    """Bytes of this process, as /proc/self/status has them: VmRSS, VmHWM (its peak), RssAnon.

    Not getrusage, whose peak begins with that of the process that this one was started from.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{figure}:"))


def copy_seconds(device: torch.device, size: int, repeats: int) -> list[float]:
    """Of copies that read, and write, `size` bytes: with sizes beyond all caches, as fast as memory is."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return in_turns({"": lambda: target.copy_(source)}, repeats=repeats)[""]


# ---- the machine ---------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Hardware and versions, for the page."""
    model = next((line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if "model name" in line), "")
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "cpu": f"{model or platform.machine()}, {os.cpu_count()} cores",
        "memory_gb": round(psutil.virtual_memory().total / GB, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions,
        "commit": _commit(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []


def _commit() -> str:
    """Short hash of the source, with a mark where it was changed; empty outside a git checkout."""

    def git(*words: str) -> str:
        try:
            return subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True).stdout
        except OSError:
            return ""

    commit = git("rev-parse", "--short", "HEAD").strip()
    return f"{commit} with changes" if commit and git("status", "--porcelain", "-uno").strip() else commit


# ---- the command ---------------------------------------------------------------------------------------------


def run(
    module: str,
    description: str,
    measure: Callable[[argparse.Namespace], Report],
    argv: list[str] | None,
    arguments: Callable[[argparse.ArgumentParser], None] | None = None,
    repeats: int = 5,
) -> int:
    """Parse the command line, measure, print, and write OUT/DATE-NAME.{json,md,png}.

    Args:
        module: the benchmark's `__spec__.name` or `__name__`, for its name.
        description: the module's docstring; its first line is shown.
        measure: options -> Report.
        argv: of the command line, None for the process's.
        arguments: adds options of the benchmark's own.
        repeats: unless --repeats says otherwise.

    Returns:
        The exit code: 1 where a promise is broken. With --smoke promises are neither looked at nor printed, because
        sizes are too small for them.
    """
    name = module.rpartition(".")[2]
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder of page, JSON and plot")
    parser.add_argument("--repeats", type=int, default=repeats, help=f"of every measurement (default {repeats})")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch (default: all cores)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, a few seconds: does it still run?")
    if arguments is not None:
        arguments(parser)
    words = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(words)
    if options.repeats < 1 or options.threads < 1:
        parser.error("--repeats and --threads must be at least 1")
    silence_known()
    torch.set_num_threads(options.threads)
    found = machine() | {"command": shlex.join(["python", "-m", f"benchmarks.{name}", *words])}
    found |= {"date": f"{datetime.now():%Y-%m-%d %H:%M}", "threads": options.threads, "repeats": options.repeats}
    try:
        options.out.mkdir(parents=True, exist_ok=True)  # before hours of measuring
        report = measure(options)
    except (ConfigError, DataError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{parser.prog}: interrupted", file=sys.stderr)
        return 130
    found["load_after"] = round(os.getloadavg()[0], 2)
    if options.smoke:
        report.promises = []
        report.spread_over = "as many repeats as a smoke test has time for: these figures say nothing about speed"
    show(report)
    stem = f"{found['date'][:10]}-{name}{'-smoke' if options.smoke else ''}"
    for path in write(report, found, options.out, stem):
        print(path)
    return int(any(not promise.kept for promise in report.promises))


def show(report: Report) -> None:
    table = Table(*report.rows[0], box=None, title=report.title)
    for row in report.rows:
        table.add_row(*(cell(value) for value in row.values()))
    console = Console()
    # A narrow terminal, or none, must not cut figures off.
    console.width = max(console.width, 140)
    console.print(table)
    for promise in report.promises:
        console.print(promised(promise))


def promised(promise: Promise) -> str:
    bound = "at least" if promise.at_least else "at most"
    return (
        f"{'kept' if promise.kept else 'MISSED'}: {promise.text}: {number(promise.value)} ({bound} {promise.limit:g})"
    )


def number(value: float) -> str:
    """Three digits that count, without an exponent."""
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def cell(value: Any) -> str:
    if isinstance(value, Spread):
        return f"{number(value.median)} ({number(value.p10)} - {number(value.p90)})"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return number(value)


def write(report: Report, found: dict[str, Any], out: Path, stem: str) -> list[Path]:
    """The three files; a plot only where there is one."""
    record = {
        "title": report.title,
        "machine": found,
        "rows": [{key: _plain(value) for key, value in row.items()} for row in report.rows],
        "promises": [asdict(promise) | {"kept": promise.kept} for promise in report.promises],
        "notes": report.notes,
        **report.details,
    }
    paths = [out / f"{stem}.json", out / f"{stem}.md"]
    paths[0].write_text(json.dumps(record, indent=1) + "\n")
    picture = out / f"{stem}.png"
    paths[1].write_text(page(report, found, picture.name if report.plot is not None else None))
    if report.plot is not None:
        _draw(report, picture)
        paths.append(picture)
    return paths


def _plain(value: Any) -> Any:
    return value._asdict() if isinstance(value, Spread) else value


def _draw(report: Report, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    assert report.plot is not None
    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=110, layout="constrained")
    report.plot(axes)
    figure.savefig(path)
    pyplot.close(figure)


def page(report: Report, found: dict[str, Any], picture: str | None) -> str:
    """The Markdown page."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    head = list(report.rows[0])
    repeated = f"{found['repeats']} repeats"
    lines = [
        f"# {report.title}",
        "",
        f"{found['date']}, commit {found['commit'] or 'unknown'}. {found['cpu']}, {found['memory_gb']} GB, "
        f"{found['gpu'] or 'no GPU'}; {found['threads']} threads. Load average {found['load_before']} before, "
        f"{found['load_after']} after. {versions}.",
        "",
        "```sh",
        found["command"],
        "```",
        "",
        f"Median (P10 - P90) of {report.spread_over or repeated}.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(cell(row[key]) for key in head) + " |" for row in report.rows),
    ]
    if report.promises:
        lines += ["", *(f"- {promised(promise)}" for promise in report.promises)]
    for note in report.notes:
        lines += ["", note]
    if picture is not None:
        lines += ["", f"![{report.title}]({picture})"]
    return "\n".join(lines) + "\n"
