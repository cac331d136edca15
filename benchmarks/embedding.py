"""The sharded title table, lookup and fused update, against plain PyTorch embeddings, by number of rows.

`sharded` is the table as training has it: TorchRec's sharded EmbeddingCollection, out of the product's own model
(`m5.parallel.distribute`, one rank), with row-wise Adagrad fused into backward. It is called with a KeyedJaggedTensor,
input distribution included. Beside it stand nn.EmbeddingBag (bags of one, sparse gradient) and nn.Embedding (sparse and
dense gradient) with torch.optim.Adagrad. All look up the same titles, which are Zipf-like.

    m5 bench embedding --rows 10000 1000000
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from benchmarks import harness, workload
from benchmarks.harness import GB, Promise, Report, Spread
from benchmarks.options import positive
from m5.assemble import table_sizes
from m5.batch import jagged
from m5.config import ConfigError, RunConfig
from m5.parallel import World, world

ROWS = (10_000, 100_000, 1_000_000, 10_000_000)
MOST_ROWS_DENSE = 1_000_000  # a dense gradient is as large as the table, and Adagrad goes over all of it
LARGE = 2**28  # bytes of the tensor that is copied to measure bandwidth: more than any cache
SHARDED, BAG, SPARSE, DENSE = "sharded", "EmbeddingBag, sparse", "Embedding, sparse", "Embedding, dense"
# No layer but the tables: no blocks, no content, no experts.
BARE = ("model.blocks=0", "model.content=[]", "model.subsidiary=false", "model.mixing=mlp")

Lookup = Callable[[], Tensor]
Update = Callable[[], None]


def zipf_ids(rows: int, count: int, seed: int = 0) -> np.ndarray:
    """int64 [count] rows, the r-th most frequent with probability near 1 / r; frequent ones lie anywhere."""
    generator = np.random.default_rng(seed)
    rank = np.minimum((rows + 1) ** generator.random(count), rows).astype(np.int64) - 1
    return generator.permutation(rows)[rank]


def floor_bytes(lookups: int, distinct: int, width: int) -> tuple[int, int]:
    """What a lookup, and lookup, backward and update together, must move: (bytes, bytes).

    A lookup reads rows and writes them out. The update reads a gradient a lookup, and reads and writes every distinct
    row and its sum of squares.
    """
    forward = 2 * lookups * width * 4
    return forward, forward + lookups * width * 4 + 2 * distinct * (width + 1) * 4


def sharded(rows: int, ids: Tensor, config: RunConfig, place: World) -> tuple[Lookup, Update]:
    """The product's table. Its optimizer is fused into backward, so there is nothing left to update."""
    dataset = workload.made_dataset(users=1, length=1, titles=rows)
    stepper = workload.stepper(dataset, config, place)
    tables = stepper.model.module.model.tables
    nothing = ids[:0]
    keys = {"history": ids, "candidates": nothing} | dict.fromkeys(table_sizes(dataset, config), nothing)
    batch = jagged(keys).to(place.device)
    return lambda: tables(batch)["history"].values(), lambda: None


def plain(rows: int, ids: Tensor, width: int, device: torch.device) -> dict[str, tuple[Lookup, Update]]:
    """PyTorch's own, all on one weight and one Adagrad: they are timed, not compared in what they learn."""
    # Its default, told: Adagrad warns of it otherwise.
    torch.sparse.check_sparse_tensor_invariants.disable()
    weight = nn.Parameter(torch.randn(rows, width, device=device) / width**0.5)
    optimizer = torch.optim.Adagrad([weight], lr=0.05)
    ids = ids.to(device)
    offsets = torch.arange(len(ids), device=device)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    functional = nn.functional
    lookups: dict[str, Lookup] = {
        BAG: lambda: functional.embedding_bag(ids, weight, offsets, mode="sum", sparse=True),
        SPARSE: lambda: functional.embedding(ids, weight, sparse=True),
    }
    if rows <= MOST_ROWS_DENSE:
        lookups[DENSE] = lambda: functional.embedding(ids, weight)
    return {name: (lookup, update) for name, lookup in lookups.items()}


def trained(lookup: Lookup, update: Update, gradient: Tensor) -> Callable[[], None]:
    def work() -> None:
        lookup().backward(gradient)
        update()

    return work


def measure(options: argparse.Namespace) -> Report:
    lookups = 2_048 if options.smoke else options.lookups
    sizes = (1_000,) if options.smoke else options.rows
    config = workload.settings(*BARE, f"model.width={options.width}")
    found: list[dict[str, Any]] = []
    with world("auto") as place:
        size = LARGE // 64 if options.smoke else LARGE
        copy = Spread.rate(2 * size, harness.copy_seconds(place.device, size, options.repeats))
        skipped = []
        for rows in sizes:
            needed = rows_memory(rows, options.width)
            free = free_memory(place.device)
            if needed > free:
                skipped.append(f"{rows:,} rows were left out: {needed / GB:.1f} GB, with {free / GB:.1f} GB free.")
                continue
            found += measured(rows, zipf_ids(rows, lookups), config, place, options.repeats)
            gc.collect()
        if not found:
            raise ConfigError(" ".join(skipped))
    return report(found, copy, place.device.type, lookups, skipped, options)


def rows_memory(rows: int, width: int) -> int:
    """Bytes that a size takes: both tables, Adagrad's sums, where it is tried the dense gradient with a temporary."""
    return rows * width * 4 * (5 if rows <= MOST_ROWS_DENSE else 3)


def free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def measured(rows: int, ids: np.ndarray, config: RunConfig, place: World, repeats: int) -> list[dict[str, Any]]:
    """A line for every way to have a table of so many rows."""
    tensor = torch.from_numpy(ids)
    width = config.model.width
    ways = {SHARDED: sharded(rows, tensor, config, place), **plain(rows, tensor, width, place.device)}
    gradient = torch.randn(len(ids), width, device=place.device)
    forward = harness.in_turns({name: lookup for name, (lookup, _) in ways.items()}, repeats=repeats)
    both = harness.in_turns({name: trained(*way, gradient) for name, way in ways.items()}, repeats=repeats)
    distinct = len(np.unique(ids))
    read, moved = floor_bytes(len(ids), distinct, width)
    return [
        {
            "rows": rows,
            "table": name,
            "lookup, M rows/s": Spread.rate(len(ids) / 1e6, forward[name]),
            "lookup, GB/s": Spread.rate(read / GB, forward[name]),
            "and update, M rows/s": Spread.rate(len(ids) / 1e6, both[name]),
            "and update, GB/s": Spread.rate(moved / GB, both[name]),
            "distinct": f"{distinct / len(ids):.0%}",
        }
        for name in ways
    ]


def report(
    found: list[dict[str, Any]],
    copy: Spread,
    device: str,
    lookups: int,
    skipped: list[str],
    options: argparse.Namespace,
) -> Report:
    largest = next(row for row in reversed(found) if row["table"] == SHARDED)
    share = largest["lookup, GB/s"].median / (copy.median / GB)

    def plot(axes: Any) -> None:
        for name in dict.fromkeys(row["table"] for row in found):
            mine = [row for row in found if row["table"] == name]
            axes.plot([r["rows"] for r in mine], [r["and update, M rows/s"].median for r in mine], "o-", label=name)
        axes.set(xscale="log", yscale="log", xlabel="rows of the table", ylabel="lookups with update, M rows/s")
        axes.legend()

    promises = []
    if device == "cuda":
        promises.append(Promise("lookup in the largest table, of copy bandwidth", share, 0.6, at_least=True))
    return Report(
        title="Embedding tables: lookup and update",
        rows=found,
        notes=[
            f"Width {options.width}, float32, {lookups:,} lookups a call, Zipf-like (the r-th most frequent row about "
            "1 / r of them); 'distinct' is the share that are different rows. All tables look up the same rows, in "
            "turns.",
            f"A large copy moves {copy.median / GB:.1f} GB/s ({copy.p10 / GB:.1f} - {copy.p90 / GB:.1f}), reads and "
            "writes counted. GB/s of a table count what must move: rows read and written out; for the update also the "
            "gradients, and every distinct row with its sum of squares, read and written. Frequent rows stay in cache, "
            f"so a small table may be above the copy. In the largest the sharded lookup has {share:.0%} of it.",
            "'sharded' is the table of the product's model, through m5.parallel.distribute, input distribution "
            "included; its row-wise Adagrad (a sum of squares a row) is fused into backward. The plain ones use "
            "torch.optim.Adagrad (one a weight), which moves twice as much state. EmbeddingBag has bags of one title.",
            *([f"A dense gradient is tried up to {MOST_ROWS_DENSE:,} rows."] if max(options.rows) > 10**6 else []),
            *skipped,
        ],
        promises=promises,
        plot=plot,
        details={"copy_gb_per_second": copy.median / GB, "lookups": lookups, "width": options.width},
    )


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=positive, nargs="+", default=ROWS, help="sizes of the table")
    parser.add_argument("--lookups", type=positive, default=65_536, help="of a call (default 65,536)")
    parser.add_argument("--width", type=positive, default=64, help="of a row (default 64)")


def main(argv: list[str] | None = None) -> int:
    return harness.run(__spec__.name, __doc__ or "", measure, argv, arguments, repeats=9)


if __name__ == "__main__":
    sys.exit(main())
