"""A training step against the floor that this machine sets: operations over GEMM rate, bytes over copy bandwidth.

The rates are measured in the same run: a large matrix product in each precision, and a large copy (bytes read and
written). Of each part the floor is the time of its matrix products at that rate and of the bytes that it cannot but
move at that bandwidth:

    dense     products of `m5.plan`'s count; what forward keeps for backward, written once and read once
    softmax   three products of all requests with the candidates, in the precision of `candidates.precision`
    lookup    rows read and handed on, gradients read, distinct rows read and written by the fused optimizer

    m5 bench roofline --data DATA --preset ml1m sequences.sequences=128
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch

from benchmarks import harness, workload
from benchmarks.harness import GB, Promise, Report, Spread
from benchmarks.ranks import Job, add_job_arguments, described, device_kind, in_ranks, job_of
from benchmarks.step_parts import BACKWARD, DENSE, INPUT, LOOKUP, LOSS, UPDATE, split
from m5.assemble import Inputs, assemble, build_model
from m5.batch import Batch
from m5.data.sequences import BatchBuilder
from m5.model.m5 import M5
from m5.parallel import World
from m5.plan.description import Dataset
from m5.plan.load import operations, rank_load
from m5.plan.step_memory import Sizes, kept_for_backward
from m5.schema import PreparedDataset
from m5.train import softmax_precision

LIMIT_CPU = 2.5  # times the floor, of the whole step
GEMM_SHARE_GPU, COPY_SHARE_GPU = 0.35, 0.60
MEMBERS = {"dense": (DENSE, BACKWARD), "softmax": (LOSS,), "lookup": (INPUT, LOOKUP, UPDATE)}
SIDE, COPIED = {"cpu": 2048, "cuda": 8192}, {"cpu": 2**27, "cuda": 2**30}  # side of the matrices; bytes


@dataclass(frozen=True)
class Work:
    """Of one part of a step: floating-point operations, their precision, and bytes that must be moved."""

    operations: float
    precision: torch.dtype
    bytes: float


@dataclass(frozen=True)
class Rates:
    """Of the machine: operations a second by precision, and bytes a second that a copy reads and writes."""

    gemm: dict[torch.dtype, float]
    copy: float

    @classmethod
    def measured(cls, device: torch.device, repeats: int) -> Rates:
        def usual(work: Callable[[], Any]) -> float:
            return statistics.median(harness.in_turns({"": work}, repeats=repeats, warm_up=2)[""])

        side, gemm = SIDE[device.type], {}
        for precision in (torch.float32, torch.bfloat16):
            a = torch.randn(side, side, device=device).to(precision)
            out = torch.empty_like(a)
            gemm[precision] = 2 * side**3 / usual(partial(torch.mm, a, a, out=out))
        size = COPIED[device.type]
        return cls(gemm, 2 * size / statistics.median(harness.copy_seconds(device, size, repeats)))

    @classmethod
    def usual(cls, rates: list[Rates]) -> Rates:
        """Medians of several measurements."""
        gemm = {kind: statistics.median(one.gemm[kind] for one in rates) for kind in rates[0].gemm}
        return cls(gemm, statistics.median(one.copy for one in rates))

    def floor(self, work: Work) -> float:
        """Seconds."""
        return work.operations / self.gemm[work.precision] + work.bytes / self.copy


def work_of(batch: Batch, dataset: PreparedDataset, job: Job, device: torch.device) -> dict[str, Work]:
    """The work of a step on one rank, by part."""
    config = job.config
    description = Dataset.of(dataset)
    load = rank_load(description, Inputs.of(dataset, config), config, 1)
    requests, negatives = len(batch.request_P), len(batch.log_q_C)
    load = replace(
        load,
        sizes=Sizes.of(batch),
        columns=batch.size[1],
        everywhere=requests,
        negatives=negatives,
        masked_everywhere=len(batch.masked_Q),
    )
    bare = assemble(Inputs.of(dataset, config), config, table_device="meta")
    key = config.model.width * len(bare.towers)
    softmax = 6 * negatives * (requests * key + len(batch.masked_Q) * config.model.width)
    dense = operations(bare, load, config) - softmax
    model = build_model(dataset, config).train()
    with kept_for_backward(model, batch) as kept, torch.autocast("cpu", torch.bfloat16, config.training.autocast):
        model(batch)
    narrow = torch.bfloat16 if config.training.autocast else torch.float32
    return {
        "dense": Work(dense, narrow, 2 * sum(kept)),
        "softmax": Work(softmax, softmax_precision(config.candidates.precision, device), 0),
        "lookup": Work(0, torch.float32, lookup_bytes(batch, bare)),
    }


def lookup_bytes(batch: Batch, model: M5) -> float:
    """float32 rows: read, handed on, their gradients read; each distinct row read and written by the optimizer."""
    total = 0.0
    for features, tables in ((batch.sparse, model.tables), (batch.experts, model.experts)):
        if features is not None and tables is not None:
            columns = tables.embedding_configs()[0].embedding_dim
            for part in features.to_dict().values():
                values = part.values()
                total += 4 * columns * (3 * len(values) + 2 * len(values.unique()))
    return total


@dataclass
class Found:
    """Rates, work of a step, and per round the seconds of a plain step and of its parts."""

    rates: Rates
    work: dict[str, Work]
    steps: list[float]
    parts: dict[str, list[float]]


def on_one_rank(place: World, job: Job) -> Found:
    torch.set_num_threads(job.threads)
    dataset = workload.made_dataset(**job.made) if job.made is not None else PreparedDataset(job.config.data)
    builder, stepper = BatchBuilder(dataset, job.config), workload.stepper(dataset, job.config, place)
    batches = list(islice(workload.endless(builder, job.config, place), job.steps))
    for batch in batches:
        stepper.step(batch, 0.1)
    steps: list[float] = []
    parts: dict[str, list[float]] = {name: [] for name in MEMBERS}
    rates: list[Rates] = []
    for _ in range(job.rounds):
        # The machine's rates, and the same batches plain and split, in turns.
        rates.append(Rates.measured(place.device, repeats=3))
        steps.append(harness.seconds(lambda: [stepper.step(batch, 0.1) for batch in batches]) / len(batches))
        found = split(stepper, batches)
        for name, members in MEMBERS.items():
            parts[name].append(sum(found[member] for member in members) / len(batches))
    each = [work_of(batch, dataset, job, place.device) for batch in batches]
    work = {
        name: Work(
            statistics.mean(one[name].operations for one in each),
            each[0][name].precision,
            statistics.mean(one[name].bytes for one in each),
        )
        for name in parts
    }
    return Found(Rates.usual(rates), work, steps, parts)


def measure(options: argparse.Namespace) -> Report:
    job = job_of(options, threads=options.threads)
    device = device_kind(job.config.training.device, 1)
    return report(in_ranks(1, device, partial(on_one_rank, job=job))[0], job, device)


def report(found: Found, job: Job, device: str) -> Report:
    rates, floors = found.rates, {name: found.rates.floor(work) for name, work in found.work.items()}
    times = found.parts | {"whole step": found.steps}
    floors["whole step"] = sum(floors.values())
    rows = []
    for name, seconds in times.items():
        work = found.work.get(name)
        rows.append(
            {
                "part": name,
                "measured, ms": Spread.of([1000 * second for second in seconds]),
                "floor, ms": 1000 * floors[name],
                "times the floor": Spread.of([second / floors[name] for second in seconds]),
                "GFLOP": work.operations / 1e9 if work else sum(w.operations for w in found.work.values()) / 1e9,
                "MB": (work.bytes if work else sum(w.bytes for w in found.work.values())) / 1e6,
            }
        )
    gemm = {str(kind).removeprefix("torch."): value / 1e9 for kind, value in rates.gemm.items()}
    products = sum(work.operations / rates.gemm[work.precision] for work in found.work.values())

    def plot(axes: Any) -> None:
        names = list(times)
        axes.bar(names, [1000 * statistics.median(times[name]) for name in names], label="measured")
        axes.bar(names, [1000 * floors[name] for name in names], width=0.5, label="floor")
        axes.set(ylabel="milliseconds of a step")
        axes.legend()

    return Report(
        title="The training step against the machine's floor",
        rows=rows,
        notes=[
            described(job),
            f"Measured here: {', '.join(f'{value:,.0f} GFLOP/s in {kind}' for kind, value in gemm.items())} (a product "
            f"of matrices of side {SIDE[device]:,}), {rates.copy / GB:.1f} GB/s copied (read and written). By its "
            f"matrix products alone, without any byte, the step could take {1000 * products:.1f} ms.",
            "What forward keeps is this implementation's choice: one that keeps less would have a lower floor. "
            f"Against its products alone the step takes {statistics.median(found.steps) / products:.2f} times as long. "
            "'dense' is forward and backward of all but tables and loss. The whole step has the dense optimizer, "
            "clipping and all overhead besides, for which the floor has nothing.",
        ],
        promises=promises(found, floors, device, job),
        plot=plot,
        details={"gflops": gemm, "copy_gb_per_second": rates.copy / GB},
    )


def promises(found: Found, floors: dict[str, float], device: str, job: Job) -> list[Promise]:
    """On a CPU for the whole step, on a GPU for parts, the dense one from width 256 on."""
    if device == "cpu":
        ratio = statistics.median(found.steps) / floors["whole step"]
        return [Promise("whole step, times its floor", ratio, LIMIT_CPU)]
    dense, lookup = (statistics.median(found.parts[name]) for name in ("dense", "lookup"))
    work = found.work["dense"]
    share = work.operations / dense / found.rates.gemm[torch.bfloat16]
    kept = [Promise("lookups' share of the copy bandwidth", floors["lookup"] / lookup, COPY_SHARE_GPU, at_least=True)]
    if job.config.model.width >= 256:
        kept.append(Promise("dense part's share of the bf16 GEMM rate", share, GEMM_SHARE_GPU, at_least=True))
    return kept


def main(argv: list[str] | None = None) -> int:
    return harness.run(__spec__.name, __doc__ or "", measure, argv, add_job_arguments)


if __name__ == "__main__":
    sys.exit(main())
