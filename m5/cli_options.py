"""What the files of the command line share: how a command is added, and options that several have."""

from __future__ import annotations

import argparse
from collections.abc import Callable

Command = Callable[[argparse.Namespace], int | None]


def add_command(commands, name: str, run: Command, help_text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help_text, description=help_text)
    parser.set_defaults(command=run)
    return parser


def add_world_sizes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--users", type=count, default=5000)
    parser.add_argument("--titles", type=count, default=1000)
    parser.add_argument("--events", type=count, default=200_000)
    parser.add_argument("--seed", type=int, default=0)


def count(text: str) -> int:
    """A whole number from 1; 5_000 works too."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 1")
    return number
