"""What a system of the literature is to `m5 compare`: where it comes from, what may be tuned, how it is fitted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.literature.data import Data
from m5.evaluate import Scorer
from m5.schema import DataError

Settings = Mapping[str, Any]
# (data, settings, seed, seconds) -> a scorer of the system's name. `seconds` bounds the training, validations included.
Fit = Callable[[Data, Settings, int, float], Scorer]


class CannotFeed(DataError):
    """The dataset lacks what a system reads, or is too large or small for it. Raised where a system is built.

    A system whose training or ranking goes wrong raises something else: it has failed.
    """


@dataclass(frozen=True)
class System:
    """One row of the comparison.

    Attributes:
        name: of the row, e.g. "sasrec".
        title: what it is, in a few words.
        source: authors, title, venue, year and doi or arXiv number.
        built_on: the library, or the m5 module, that does the work; "own, on torch" where none has it.
        departures: how this differs from the publication, in a sentence or two.
        settings: what tuning may choose from, best guess first: a smaller budget tries the first few.
        fit: trains it once.
        by_chance: whether a seed changes anything; if not it is fitted once.
    """

    name: str
    title: str
    source: str
    built_on: str
    departures: str
    settings: tuple[Settings, ...]
    fit: Fit
    by_chance: bool = True
