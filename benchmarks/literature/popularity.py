"""Popularity: the titles watched most in the last days of training."""

from __future__ import annotations

from benchmarks.literature.data import Data
from benchmarks.literature.system import Settings, System
from m5.baselines import Popularity


def fit(data: Data, settings: Settings, seed: int, seconds: float) -> Popularity:
    return Popularity(data.interactions, settings["days"])


SYSTEM = System(
    name="popularity",
    title="Popularity of the last days",
    source="folklore",
    built_on="m5.baselines",
    departures="None.",
    settings=({"days": 90}, {"days": 30}, {"days": 7}, {"days": 100_000}),
    fit=fit,
    by_chance=False,
)
