"""Weak and strong scaling of the training step over 1..n ranks of this machine, and what the machine itself allows.

On CPUs every rank has one thread. Weak: as many sequences for every rank as one rank has alone. Strong: as many in all.
Apart: n trainings of one rank each at the same time, which have nothing to tell each other; what they lose, no
communication has cost. Efficiency is targets a second, over n times those of one rank. Nothing is extrapolated.

    m5 bench scaling --ranks 1 2 4
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import psutil
import torch

from benchmarks import harness
from benchmarks.harness import GB, Report, Spread
from benchmarks.ranks import (
    PROCESSES,
    Found,
    Job,
    add_job_arguments,
    described,
    device_kind,
    in_ranks,
    job_of,
    train_some,
)
from m5.config import ConfigError

ALONE, THREADS, WEAK, STRONG, APART = "one rank", "one rank, more threads", "weak", "strong", "apart"
ENOUGH = 0.9  # efficiency of trainings apart, below which the machine has not n ranks' worth of hardware

BUSY = 0.5  # load average that others may cause


@dataclass(frozen=True)
class Case:
    """One way to train: kind, ranks and threads of each, sequences of a batch over all ranks."""

    kind: str
    ranks: int
    threads: int
    sequences: int


def cases(ranks: list[int], sequences: int, threads: int, device: str, smoke: bool) -> list[Case]:
    """One rank first, then every number of ranks in every kind."""
    found = [Case(ALONE, 1, threads, sequences)]
    for n in ranks:
        if n == 1:
            continue
        found += [Case(WEAK, n, threads, n * sequences), Case(APART, n, threads, sequences)]
        # They run what the others run; a smoke test has no time for them.
        if not smoke:
            found.append(Case(STRONG, n, threads, sequences))
            if device == "cpu":
                found.append(Case(THREADS, 1, n * threads, sequences))
    return found


def up_to(most: int) -> list[int]:
    """1, 2, 4, ... and `most` itself."""
    return sorted({min(2**power, most) for power in range(most.bit_length() + 1)})


def train(case: Case, job: Job) -> list[Found]:
    """What each rank has found."""
    sequences = job.config.sequences.model_copy(update={"sequences": case.sequences})
    config = job.config.model_copy(update={"sequences": sequences})
    mine = replace(job, config=config, threads=case.threads)
    apart = case.kind == APART
    ready = PROCESSES.Barrier(case.ranks).wait if apart else None
    return in_ranks(case.ranks, config.training.device, partial(train_some, job=mine, ready=ready), apart=apart)


def rate(case: Case, found: list[Found]) -> float:
    """Targets a second of all ranks. A rank counts those of its whole world."""
    if case.kind == APART:
        return sum(sum(rank.targets) / sum(rank.seconds) for rank in found)
    return sum(found[0].targets) / max(sum(rank.seconds) for rank in found)


def measure(options: argparse.Namespace) -> Report:
    # A round of every case, then again: each repeat compares what was measured within a few minutes.
    job = replace(job_of(options, threads=1), rounds=1)
    busy = os.getloadavg()[0]
    device = device_kind(job.config.training.device, 1)
    most = torch.cuda.device_count() if device == "cuda" else os.cpu_count() or 1
    ranks = sorted(set(options.ranks or ([1, 2] if options.smoke else up_to(most))))
    sequences = job.config.sequences.sequences
    if ranks[0] < 1 or ranks[-1] > sequences:
        raise ConfigError(f"--ranks must be from 1 to the sequences of a batch, {sequences}")
    device_kind(job.config.training.device, ranks[-1])
    if device == "cuda":
        job = replace(job, threads=max(1, options.threads // ranks[-1]))
    repeats = 1 if options.smoke else options.repeats
    listed = cases(ranks, sequences, job.threads, device, options.smoke)
    found = [{case: train(case, job) for case in listed} for _ in range(repeats)]
    page = report(listed, found, job, device)
    if busy > BUSY:
        page.notes.append(f"Other programs were at work before (load average {busy:.1f}): this page does not count.")
    return page


def report(listed: list[Case], found: list[dict[Case, list[Found]]], job: Job, device: str) -> Report:
    """The page: `found` has a turn of all cases a repeat."""
    rates = {case: [rate(case, turn[case]) for turn in found] for case in listed}
    alone = rates[listed[0]]
    efficiency = {
        case: Spread.of([mine / (workers(case, job) * one) for mine, one in zip(rates[case], alone, strict=True)])
        for case in listed
    }
    rows = [
        {
            "": case.kind,
            "ranks": case.ranks,
            "threads each": case.threads,
            "sequences a batch": case.sequences,
            "targets/s, all ranks": Spread.of(rates[case]),
            "efficiency": efficiency[case],
            "ms a step": Spread.of([1000 * rank.seconds[0] / job.steps for turn in found for rank in turn[case]]),
            "waits for data": Spread.of([rank.waits[0] / rank.seconds[0] for turn in found for rank in turn[case]]),
            "peak resident, GB a rank": max(rank.memory["resident"] for turn in found for rank in turn[case]) / GB,
        }
        for case in listed
    ]

    def plot(axes: Any) -> None:
        for kind in (WEAK, STRONG, APART, THREADS):
            mine = [case for case in listed if case.kind == kind]
            if mine:
                counts = [1, *(workers(case, job) for case in mine)]
                axes.plot(counts, [1, *(efficiency[case].median for case in mine)], "o-", label=kind)
        axes.axhline(1, color="grey", linestyle=":")
        axes.set(xlabel="ranks (or threads of one rank)", ylabel="efficiency", ylim=(0, None))
        axes.legend()

    return Report(
        title=f"Scaling over ranks of one machine ({device})",
        rows=rows,
        notes=[
            f"{described(job)} Every repeat takes {job.steps} steps of every row, in turns.",
            "Efficiency is targets a second over those of one rank and as many times its hardware (its threads, for "
            "'one rank, more threads'), in the same turn.",
            *limits(listed, {case: spread.median for case, spread in efficiency.items()}, device),
        ],
        plot=plot,
        details={"targets_per_second": [{"case": vars(case), "turns": rates[case]} for case in listed]},
    )


def workers(case: Case, job: Job) -> int:
    """How many times one rank's hardware a case has."""
    return case.ranks * case.threads // job.threads


def limits(listed: list[Case], efficiency: dict[Case, float], device: str) -> list[str]:
    """What this machine can show and what it cannot."""
    most = max(case.ranks for case in listed)
    said = []
    threads = max(case.ranks * case.threads for case in listed if case.kind != THREADS)
    cores, logical = psutil.cpu_count(logical=False) or 1, os.cpu_count() or 1
    if threads > logical:
        said.append(f"{threads} threads share {logical} cores: beyond {logical}, rows show only what sharing costs.")
    elif threads > cores and device == "cpu":
        said.append(f"The {logical} logical cores are threads of {cores} physical ones, which ranks share.")
    for case in listed:
        if case.kind != APART:
            continue
        together = efficiency[next(c for c in listed if c.kind == WEAK and c.ranks == case.ranks)]
        note = (
            f"{case.ranks} trainings apart reach {efficiency[case]:.2f} of {case.ranks} times one, together (weak) "
            f"{together:.2f}: what the ranks' exchange costs is the difference."
        )
        if efficiency[case] < ENOUGH:
            note += (
                " The rest is the machine's: processes share caches, memory bandwidth and clock, the loaders' threads "
                f"share the ranks' cores. It cannot show what {case.ranks} ranks with hardware of their own would do."
            )
        said.append(note)
    said.append(f"Nothing is said here of more than {most} ranks, or of several machines.")
    return said


def arguments(parser: argparse.ArgumentParser) -> None:
    add_job_arguments(parser, steps=5)
    parser.add_argument(
        "--ranks", type=int, nargs="+", help="numbers of ranks (default: 1, 2, 4, ... all cores or GPUs)"
    )


def main(argv: list[str] | None = None) -> int:
    return harness.run(__spec__.name, __doc__ or "", measure, argv, arguments, repeats=3)


if __name__ == "__main__":
    sys.exit(main())
