"""The `m5 adapt` command."""

from __future__ import annotations

import argparse
from pathlib import Path

from m5.cli_options import add_command


def add_adapt(commands) -> None:
    text = "let a new region or plan join a trained run, training its own rows alone"
    parser = add_command(commands, "adapt", _adapt, text)
    parser.add_argument("run", type=Path, help="folder of `m5 train`; it stays as it is")
    parser.add_argument("--scenario", required=True, metavar="NAME=VALUE", help="what is new, e.g. region=XX")
    parser.add_argument("--data", type=Path, required=True, help="prepared dataset that has the new value's events")
    parser.add_argument("--out", type=Path, required=True, metavar="NEW", help="folder of the new run")
    earlier = parser.add_mutually_exclusive_group()
    earlier.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out, if any")
    earlier.add_argument("--restart", action="store_true", help="start over, though --out holds an earlier run")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="e.g. training.epochs=5")


def _adapt(options: argparse.Namespace) -> None:
    from m5.adapt import adapt
    from m5.best import read_record
    from m5.config import ConfigError

    name, separator, value = options.scenario.partition("=")
    if not (name and separator and value):
        raise ConfigError(f"--scenario {options.scenario}: give one scenario and its new value, as region=XX.")
    best = adapt(
        options.run,
        (name, value),
        options.data,
        options.out,
        options.overrides,
        resume="yes" if options.resume else "over" if options.restart else "no",
    )
    record = read_record(options.out)
    blend = sorted(record["adapted"]["blend"].items(), key=lambda item: -item[1])
    print(f"{options.scenario} began as {', '.join(f'{share:.0%} {other}' for other, share in blend[:5])}")
    if (fit := record["adapted"]["content_fit"]) < 1:
        print(f"content vectors were learnt anew: a linear map finds {fit:.1%} of what the run knew them by")
    kept = f"after step {record['step']}" if record["step"] else "the blend itself, which training did not make better"
    shown = ", ".join(f"{key} {metric:.4f}" for key, metric in best.items() if key.endswith("@10"))
    print(f"best validation, {options.scenario} alone: {shown} ({kept})")
    print(f"next: m5 evaluate {options.out}")
