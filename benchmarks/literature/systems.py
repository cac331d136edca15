"""Which systems there are, in the order of the report."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Sequence

from benchmarks.literature.system import System
from m5.config import ConfigError

# Row name -> module. Imported when asked for: each brings libraries of its own.
MODULES = {
    "m5": "m5",
    "mmoe": "mmoe",
    "mind": "mind",
    "comirec": "comirec",
    "sasrec": "sasrec",
    "lstm": "lstm",
    "bert": "bert",
    "bag-of-videos": "bag_of_videos",
    "amf": "amf",
    "ease": "ease",
    "chakder": "chakder",
    "mu-wu": "mu_wu",
    "siet": "siet",
    "peng": "peng",
    "lund-ng": "lund_ng",
    "als": "als",
    "svd": "svd",
    "user-knn": "user_knn",
    "item-knn": "item_knn",
    "popularity": "popularity",
}
# What a system reads of a viewer's behaviours, where that is not the last --history of them.
SHORT, SHORT_HISTORY = ("mind", "comirec"), 20  # at most
READS = {
    **dict.fromkeys(("ease", "als", "svd", "user-knn", "item-knn"), "all earlier behaviours"),
    "popularity": "no behaviour",
}


def system(name: str) -> System:
    """The system of a row."""
    return importlib.import_module(f"benchmarks.literature.{MODULES[name]}").SYSTEM


def chosen(names: Sequence[str]) -> list[str]:
    """Row names of `--systems`: names with spaces or commas between them, or `all`, alone or beside others.

    M5 is always among them, since all are compared with it.

    Raises:
        ConfigError: a name that is none.
    """
    names = [name for words in names for name in words.replace(",", " ").split()]
    for name in names:
        if name != "all" and name not in MODULES:
            close = difflib.get_close_matches(name, MODULES, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ConfigError(f"--systems: there is no '{name}'.{hint} There are: all, {', '.join(MODULES)}.")
    return [name for name in MODULES if "all" in names or name == "m5" or name in names]
