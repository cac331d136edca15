"""Candidate softmax against the size of the catalogue: full and sampled, float32 and bfloat16, time and memory.

What is measured is the loss of a step: queries, keys and targets in, loss and the gradients of all three out. Beside it
stands what one would write without it, `cross_entropy` of all logits, where its logits fit.

    m5 bench softmax --requests 2048 --sizes 1000 70000
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.harness import Report, Spread, apart, in_turns, memory, run
from benchmarks.options import positive
from m5.losses import candidate_softmax

SIZES = (1_000, 10_000, 70_000, 300_000)
MB = 10**6
LOGITS_HELD = 3  # by cross_entropy: the logits, their log-softmax, and its gradient
SHARE = 0.5  # of the free memory that cross_entropy may take


class Case(NamedTuple):
    """`kind` is full, sampled or cross_entropy."""

    kind: str
    precision: str
    titles: int
    requests: int
    width: int
    negatives: int

    def __str__(self) -> str:
        return f"{self.kind}, {self.precision}, {self.titles}"

    @property
    def bytes_of_logits(self) -> int:
        return 4 * self.requests * self.titles * LOGITS_HELD

    def fits(self, device: torch.device) -> bool:
        """All but cross_entropy do."""
        cuda = device.type == "cuda"
        free = torch.cuda.mem_get_info(device)[0] if cuda else psutil.virtual_memory().available
        return self.kind != "cross_entropy" or self.bytes_of_logits < SHARE * free


class Operands(NamedTuple):
    """Leaves of the graph; which candidate each request asks for; how many candidates are negatives."""

    query_PQ: Tensor
    key_CQ: Tensor
    target_P: Tensor
    negative_C: Tensor


def operands(case: Case, device: torch.device) -> Operands:
    """Random, with logits of standard deviation 1; candidates as a batch has them: negatives, then other targets."""
    generator = torch.Generator(device).manual_seed(0)
    title_P = torch.randint(case.titles, (case.requests,), generator=generator, device=device)
    negative_C = torch.arange(case.titles, device=device)
    if case.kind == "sampled":
        negative_C = torch.randint(case.titles, (case.negatives,), generator=generator, device=device).unique()
    candidate_C = torch.cat([negative_C, title_P[~torch.isin(title_P, negative_C)].unique()])
    ascending_C, place_C = candidate_C.sort()
    query_PQ = torch.randn(case.requests, case.width, generator=generator, device=device) / case.width**0.5
    key_CQ = torch.randn(len(candidate_C), case.width, generator=generator, device=device)
    target_P = place_C[torch.searchsorted(ascending_C, title_P)]
    return Operands(query_PQ.requires_grad_(), key_CQ.requires_grad_(), target_P, negative_C)


def loss_of(case: Case, given: Operands) -> Callable[[], Tensor]:
    """The loss's forward."""
    precision, negatives = getattr(torch, case.precision), len(given.negative_C)
    log_q_C = torch.zeros(negatives, device=given.target_P.device) if case.kind == "sampled" else None
    own_G = torch.where(given.target_P < negatives, given.target_P, -1)

    def plain() -> Tensor:
        logits_PC = functional.linear(given.query_PQ.to(precision), given.key_CQ.to(precision)).float()
        return functional.cross_entropy(logits_PC, given.target_P, reduction="sum")

    def chunked() -> Tensor:
        return candidate_softmax(
            given.query_PQ,
            given.key_CQ[:negatives],
            given.key_CQ.index_select(0, given.target_P),
            log_q_C=log_q_C,
            own_G=own_G,
            precision=precision,
        )

    return plain if case.kind == "cross_entropy" else chunked


def work_of(case: Case, device: torch.device) -> Callable[[], float]:
    """Forward and backward; gives the loss a request."""
    given = operands(case, device)
    loss_of_case = loss_of(case, given)

    def work() -> float:
        loss = loss_of_case()
        loss.backward()
        for leaf in (given.query_PQ, given.key_CQ):
            leaf.grad = None
        return loss.item() / case.requests

    return work


def resident_peak(case: Case, threads: int) -> int:
    """Bytes by which the resident memory of this process peaks above what it was before the call."""
    torch.set_num_threads(threads)
    # A small call first: libraries and their threads' buffers are not the loss's memory.
    work_of(case._replace(titles=100, requests=10), torch.device("cpu"))()
    work = work_of(case, torch.device("cpu"))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is resident now
    before = memory("VmRSS")
    work()
    return memory("VmHWM") - before


def allocated_peak(case: Case, device: torch.device) -> int:
    """The same on a GPU, from the allocator's account."""
    work = work_of(case, device)
    work()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return torch.cuda.max_memory_allocated(device) - before


def cases_of(titles: int, options: argparse.Namespace) -> list[Case]:
    sizes = (titles, options.requests, options.width, options.negatives)
    cases = [Case(kind, p, *sizes) for kind in ("full", "sampled") for p in ("float32", "bfloat16")]
    return [*cases, Case("cross_entropy", "float32", *sizes), Case("cross_entropy", "bfloat16", *sizes)]


def measure(options: argparse.Namespace) -> Report:
    cuda = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if cuda else "cpu")
    if options.smoke:
        options.requests, options.negatives, options.sizes = 64, 32, [500, 1_000]
    rows, losses = [], []
    for titles in options.sizes:
        cases = cases_of(titles, options)
        fitting = {str(case): work_of(case, device) for case in cases if case.fits(device)}
        taken = in_turns(fitting, repeats=options.repeats)
        losses.append({name: work() for name, work in fitting.items()})
        del fitting
        for case in cases:
            peak = memory_of(case, device, options) if str(case) in taken else None
            rows.append(row_of(case, taken.get(str(case)), peak))
    return Report(
        title="Candidate softmax: time and memory against catalogue size",
        rows=rows,
        notes=notes(losses, options),
        plot=lambda axes: draw(axes, rows),
        details={"loss_a_request": losses},
    )


def memory_of(case: Case, device: torch.device, options: argparse.Namespace) -> int | None:
    """Peak bytes; on a CPU in a process of its own, which a smoke run spends on one case only."""
    if device.type == "cuda":
        return allocated_peak(case, device)
    if options.smoke and (case.kind, case.precision, case.titles) != ("full", "float32", options.sizes[-1]):
        return None
    return apart(resident_peak, case, options.threads)[0]


def row_of(case: Case, seconds: list[float] | None, peak: int | None) -> dict[str, Any]:
    """Without seconds: a case that did not fit."""
    return {
        "titles": case.titles,
        "softmax": case.kind if case.kind != "sampled" else f"sampled, {case.negatives:,}",
        "precision of products": case.precision,
        "forward and backward, ms": Spread.of([1000 * second for second in seconds]) if seconds else "does not fit",
        "requests/s": Spread.rate(case.requests, seconds) if seconds else "-",
        "peak memory, MB": peak / MB if peak is not None else "-",
        "logits in full, MB": 4 * case.requests * case.titles / MB,
    }


def notes(losses: list[dict[str, float]], options: argparse.Namespace) -> list[str]:
    differences = [
        abs(found["full"] - found["cross_entropy"])
        for found in ({name.split(",")[0]: loss for name, loss in size.items() if "float32" in name} for size in losses)
        if "cross_entropy" in found
    ]
    agreement = f"{max(differences):.1e} nats" if differences else "not compared, since it did not fit"
    return [
        f"{options.requests:,} requests, keys of width {options.width}. Memory is the peak above what stood before the "
        "call (on a CPU resident memory, each in a process of its own; on a GPU the allocator's account); the gradient "
        "of the keys, as large as they are, is part of it.",
        f"Largest difference between full softmax and cross_entropy in the loss of a request, both in float32: "
        f"{agreement}.",
        "Sampled negatives are given, with a correction of zero; drawing them is the loader's work. Their "
        "keys, and those of targets that are not among them, are all that the loss sees of a catalogue.",
        f"cross_entropy is left out where its logits, held {LOGITS_HELD} times, would take more than half of the free "
        "memory.",
    ]


def draw(axes: Any, rows: list[dict[str, Any]]) -> None:
    timed = [row for row in rows if isinstance(row["forward and backward, ms"], Spread)]
    kinds = dict.fromkeys((row["softmax"].partition(",")[0], row["precision of products"]) for row in timed)
    for kind, precision in kinds:
        own = [r for r in timed if r["softmax"].startswith(kind) and r["precision of products"] == precision]
        axes.plot(
            [row["titles"] for row in own],
            [row["forward and backward, ms"].median for row in own],
            marker="o",
            linestyle="--" if precision == "bfloat16" else "-",
            label=f"{kind}, {precision}",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("titles")
    axes.set_ylabel("ms, forward and backward")
    axes.legend(fontsize="small")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", type=positive, nargs="+", default=list(SIZES), help="of the catalogue")
    parser.add_argument("--requests", type=positive, default=2_048, help="of a step (default 2048)")
    parser.add_argument("--width", type=positive, default=128, help="of query and key (default 128)")
    parser.add_argument("--negatives", type=positive, default=1_024, help="of the sampled softmax (default 1024)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))


def main(argv: list[str] | None = None) -> int:
    return run("benchmarks.softmax", __doc__ or "", measure, argv, arguments)


if __name__ == "__main__":
    sys.exit(main())
