"""Options that benchmarks of the step have in common."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from m5.config import ConfigError


def positive(text: str) -> int:
    """The type of a whole number that is at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number from 1")
    return int(text)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Settings of the run, and the device."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, e.g. model.width=128")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))


def checked(overrides: Sequence[str], varied: Sequence[str]) -> list[str]:
    """The overrides.

    Raises:
        ConfigError: one of them sets what the benchmark itself varies.
    """
    if taken := [name for name in varied if any(override.startswith(f"{name}=") for override in overrides)]:
        raise ConfigError(f"{taken[0]} is what this benchmark varies; leave it out.")
    return list(overrides)
