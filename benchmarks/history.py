"""Cost of a behaviour against the length of the history, and attention's own part of it.

A step has the same number of behaviours at every length: fewer sequences as they lengthen. Attention's own part, which
grows with the length, is told apart: the calls of scaled_dot_product_attention that a step makes are recorded, and made
again alone, forward and backward. The rest of the step should cost the same for a behaviour at any length.

    m5 bench history --lengths 50 400 model.blocks=4
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from torch.nn import functional
from torch.overrides import TorchFunctionMode

from benchmarks import workload
from benchmarks.harness import Promise, Report, Spread, in_turns, run
from benchmarks.options import add_run_arguments, checked, positive
from m5.config import RunConfig
from m5.parallel import World, world

LENGTHS = (50, 100, 200, 400, 800)
BEHAVIOURS = 6_400  # of a batch
# Few negatives, so that the softmax, which costs a behaviour the same at any length, does not hide the rest.
SETTINGS = ("candidates.kind=sampled", "candidates.count=1024")
PROMISED = 1.5
MICRO = 10**6


class Recorder(TorchFunctionMode):
    """Keeps the arguments of every call of scaled_dot_product_attention made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[tuple, dict[str, Any]]] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is functional.scaled_dot_product_attention:
            self.calls.append(workload.detached((args, kwargs)))
        return function(*args, **kwargs)


class Histories(workload.Trained):
    """Training on histories of one length."""

    def __init__(self, length: int, options: argparse.Namespace, place: World):
        self.length = length
        self.sequences = max(1, options.behaviours // length)
        users, titles = self.sequences * options.steps, 300 if options.smoke else 10_000
        dataset = workload.made_dataset(users=users, length=length, titles=titles)
        super().__init__(dataset, settings(length, self.sequences, options), place, options.steps)

    @property
    def behaviours(self) -> int:
        return sum(len(batch.history_T) for batch in self.batches)

    def attention(self) -> Callable[[], None]:
        """The attention calls of all batches alone, forward and backward."""
        with Recorder() as recorder:
            self.whole()

        def work() -> None:
            for arguments, settings in recorder.calls:
                functional.scaled_dot_product_attention(*arguments, **settings).sum().backward()

        return work


def settings(length: int, sequences: int, options: argparse.Namespace) -> RunConfig:
    varied = {"sequences.history": length, "sequences.requests": length, "sequences.sequences": sequences}
    overrides = checked(options.overrides, tuple(varied))
    return workload.settings(*SETTINGS, *overrides, *(f"{name}={value}" for name, value in varied.items()))


def measure(options: argparse.Namespace) -> Report:
    if options.smoke:
        options.lengths, options.behaviours, options.steps = [10, 40], 200, 1
    with world(options.device) as place:
        trained = {str(length): Histories(length, options, place) for length in sorted(set(options.lengths))}
        attentions = {f"attention {name}": each.attention() for name, each in trained.items()}
        taken = in_turns({name: each.whole for name, each in trained.items()} | attentions, repeats=options.repeats)
    rows, rest = [], {}
    for name, each in trained.items():
        a_behaviour = MICRO / each.behaviours
        step, attention = taken[name], taken[f"attention {name}"]
        without = [whole - part for whole, part in zip(step, attention, strict=True)]
        rest[name] = Spread.of([a_behaviour * second for second in without])
        rows.append(
            {
                "history": each.length,
                "sequences": each.sequences,
                "behaviours/s": Spread.rate(each.behaviours, step),
                "step, us a behaviour": Spread.of([a_behaviour * second for second in step]),
                "attention alone, us a behaviour": Spread.of([a_behaviour * second for second in attention]),
                "the rest, us a behaviour": rest[name],
                "rest / least rest": 0.0,
            }
        )
    least = min(spread.median for spread in rest.values())
    for row in rows:
        row["rest / least rest"] = row["the rest, us a behaviour"].median / least
    most = max(row["rest / least rest"] for row in rows)
    span = f"{rows[0]['history']} to {rows[-1]['history']}"
    return Report(
        title="Histories: cost of a behaviour against their length",
        rows=rows,
        notes=[
            f"{options.steps} batches of about {options.behaviours:,} behaviours, made beforehand; every behaviour is "
            "a target. A behaviour's position counts, and so does the start position of a sequence. Sampled negatives.",
            "The rest is the step less attention, which was measured alone, on the tensors of the same steps.",
        ],
        promises=[Promise(f"dearest over cheapest behaviour without attention, histories of {span}", most, PROMISED)],
        plot=lambda axes: draw(axes, rows),
    )


def draw(axes: Any, rows: list[dict[str, Any]]) -> None:
    lengths = [row["history"] for row in rows]
    for name in ("step, us a behaviour", "attention alone, us a behaviour", "the rest, us a behaviour"):
        axes.plot(lengths, [row[name].median for row in rows], marker="o", label=name.partition(",")[0])
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("history")
    axes.set_ylabel("us a behaviour")
    axes.legend(fontsize="small")


def arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    parser.add_argument("--lengths", type=positive, nargs="+", default=list(LENGTHS), help="of histories")
    parser.add_argument("--behaviours", type=positive, default=BEHAVIOURS, help=f"of a batch (default {BEHAVIOURS})")
    parser.add_argument("--steps", type=positive, default=3, help="batches of a turn (default 3)")


def main(argv: list[str] | None = None) -> int:
    return run("benchmarks.history", __doc__ or "", measure, argv, arguments)


if __name__ == "__main__":
    sys.exit(main())
