"""A large table, really trained over several CPU ranks: is a rank's memory what `m5 plan` says?

    python -m benchmarks.table_memory --rows 20000000 --width 32 --ranks 2

The dataset is one user feature of that many values and little else. Each rank is a process of its own, as under
torchrun. Its memory is counted from where it has trained a tiny table, so that every library is loaded, and compared
with the plan's account without the framework's allowance, without validation, which is not run, and without the
feature's values as text, which this dataset does not have: its column holds row numbers. The whole process is then
compared with the account and the allowance. After the steps a checkpoint is written, whose copy stays, as it does in
`m5 train`. Exits with 1 where resident memory after that, its peak since, or that of the whole process is off by more
than a tenth.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from rich.console import Console
from rich.table import Table

from m5.assemble import assemble
from m5.batch import Batch
from m5.checkpoint import Checkpoints
from m5.config import RunConfig, load_config
from m5.data.loader import Loader
from m5.data.sequences import BatchBuilder
from m5.library_warnings import silence_known
from m5.parallel import World, distribute, training_state
from m5.plan.description import Cluster, Dataset
from m5.plan.memory import total
from m5.plan.plan import Plan, make_plan
from m5.plan.stand_in import StandIn
from m5.ranks import Exchange
from m5.step import Stepper
from m5.train import training_model

TOLERANCE = 0.10
TINY = 1_000  # rows of the table that is trained first
MB = 10**6
FEATURE = "user_id"
# Parts of the account that are not here: measured beside, not run, and text that the dataset of this trial lacks.
LEFT_OUT = ("framework", "validation", "vocabularies and ids")


def described(rows: int) -> Dataset:
    """`rows` includes the unknown value's."""
    return Dataset(
        users=20_000,
        titles=1_000,
        events=400_000,
        longest_history=20,
        scenarios={"region": 4},
        user_features={FEATURE: rows - 1},
    )


def settings(width: int, out: Path) -> RunConfig:
    overrides = [
        f"model.width={width}",
        "model.content=[]",
        "training.device=cpu",
        "training.threads=1",
        "candidates.precision=float32",
    ]
    return load_config("default", overrides, out, out)


def memory(field: str) -> int:
    """Bytes of this process: `VmRSS`, resident now, or `VmHWM`, the most since the last reset."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


def reset_peak() -> None:
    """Let VmHWM start from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def _rank(rank: int, ranks: int, rows: int, width: int, steps: int, folder: Path) -> None:
    silence_known()
    torch.set_num_threads(1)
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    place, config = World(rank, ranks, torch.device("cpu")), settings(width, folder)
    _train(place, TINY, config, steps)
    dist.barrier()
    reset_peak()
    before = memory("VmRSS")
    after, losses = _train(place, rows, config, steps)
    found = {"before": before, "after": after, "peak": memory("VmHWM"), "losses": losses}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _train(place: World, rows: int, config: RunConfig, steps: int) -> tuple[int, list[float]]:
    """Resident bytes while the model of `steps` steps and its checkpoint's copy still stand; losses a request."""
    dataset = described(rows)
    stand_in = StandIn(
        dataset,
        lengths=np.full(dataset.users, dataset.events // dataset.users),
        titles=dataset.titles,
        cold=0,
        values=4,
    )
    stand_in.users[FEATURE] = np.random.default_rng(1).integers(0, rows, dataset.users)
    builder = BatchBuilder(stand_in, config)
    model = assemble(dataset.inputs(config), config, table_device="meta")
    whole = training_model(stand_in, config, model, place.device, Exchange(place.rank, place.size))
    stepper = Stepper(distribute(whole, config, place), config, place)
    stepper.model.train()
    loader = Loader(builder, seed=0, epoch=0, rank=place.rank, world_size=place.size)
    batches: Iterator[Batch] = islice(iter(loader), steps)
    losses = [taken.loss / taken.requests for taken in stepper.steps(batches, lambda: 1.0)]
    state = training_state(stepper.model, stepper.optimizer, stepper.dense)
    with Checkpoints(config.out / f"checkpoints-{rows}", keep=1, place=place) as checkpoints:
        checkpoints.save(state, {"step": steps})
        checkpoints.wait()
        return memory("VmRSS"), losses


def compare(plan: Plan, found: list[dict]) -> bool:
    """Print plan, measurement and their ratio for every rank; whether all are within the tolerance."""
    counted = [item for item in plan.rank if not item.what.startswith(LEFT_OUT)]
    expected = total(counted)
    table = Table(title="Memory of a rank, in MB", title_justify="left")
    for heading in ("rank", "what", "plan", "measured", "measured / plan"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    within = True
    for rank, numbers in enumerate(found):
        for name, what in (("after", "resident after a checkpoint"), ("peak", "peak")):
            measured = numbers[name] - numbers["before"]
            within &= abs(measured / expected - 1) <= TOLERANCE
            table.add_row(
                str(rank), what, f"{expected / MB:,.0f}", f"{measured / MB:,.0f}", f"{measured / expected:.3f}"
            )
        allowance = total([item for item in plan.rank if item.what == "framework"])
        whole = expected + allowance
        within &= abs(numbers["after"] / whole - 1) <= TOLERANCE
        table.add_row(
            str(rank),
            "whole process, with the framework's allowance",
            f"{whole / MB:,.0f}",
            f"{numbers['after'] / MB:,.0f}",
            f"{numbers['after'] / whole:.3f}",
        )
    console = Console()
    for item in counted:
        console.print(f"  {item.what:30} {item.bytes / MB:10,.1f} MB  {item.why}", highlight=False)
    console.print(table)
    console.print(
        f"loss a request: {found[0]['losses'][0]:.3f} at the first step, {found[0]['losses'][-1]:.3f} at the last"
    )
    return within


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="a rank's memory with a large table, beside what the plan says")
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(argv)
    silence_known()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cluster = Cluster(hardware="cpu", ranks_per_node=options.ranks)
        plan = make_plan(cluster, described(options.rows), settings(options.width, folder))
        spawned = (options.ranks, options.rows, options.width, options.steps, folder)
        multiprocessing.spawn(_rank, args=spawned, nprocs=options.ranks)
        found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(options.ranks)]
    within = compare(plan, found)
    print(f"within {TOLERANCE:.0%}" if within else f"off by more than {TOLERANCE:.0%}")
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
