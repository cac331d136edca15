"""Who may play what, as one bit a title: `m5.eligibility`'s windows, compiled for a service that asks about "now".

For a combination of scenario values (a region and a plan, say) the set of playable titles changes only when some
window opens or closes. So a combination is kept as the titles that are playable before everything, and the sorted
times at which a title's state toggles; mask(t) = mask(t0) XOR the toggles in (t0, t]. The mask last asked for is kept
and moved by the few toggles between then and now, forwards or backwards.

Dimension legend, besides `m5.batch`'s: Y = ceil(N / 8) bytes of a mask, S combinations of scenario values, T toggles of
all combinations, W windows of one title in one combination, X new titles. Title n is bit n & 7 of byte n >> 3, the
order that faiss.IDSelectorBitmap and numpy's bitorder="little" read; bits beyond N are 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from m5.eligibility import NEVER, Eligibility
from m5.schema import ALWAYS, DataError

BIT = (1 << np.arange(8)).astype(np.uint8)
ARRAYS = {"base": (np.uint8, 2), "first": (np.int64, 1), "time": (np.int32, 1), "title": (np.int32, 1)}


class Header(BaseModel):
    """What the arrays do not say by themselves; JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    origin: int = Field(description="Seconds since the epoch that times count from.")
    titles: int = Field(ge=0, description="N.")
    columns: list[int] = Field(description="Place of every right's scenario among the manifest's scenarios.")
    sizes: list[int] = Field(description="Vocabulary size of every right's scenario, the unknown value included.")

    @property
    def combinations(self) -> int:
        return math.prod(self.sizes)


@dataclass(frozen=True)
class Grant:
    """One row of a rights table: who may play a title, and when.

    Attributes:
        start, end: seconds since the epoch, start <= t < end; open unless given.
        scenario: vocabulary index by place in the manifest's scenario order; a scenario that is missing, or 0, is any.
    """

    start: int = ALWAYS
    end: int = -ALWAYS
    scenario: Mapping[int, int] = field(default_factory=dict)


class Toggles(NamedTuple):
    """Compiled windows of all combinations.

    Attributes:
        base_SY: uint8, the mask before all toggles.
        first: int64 [S + 1], the toggles of combination s are first[s] .. first[s + 1] - 1.
        time_T: int32 seconds after the origin, ascending within a combination.
        title_T: int32.
    """

    base_SY: np.ndarray
    first: np.ndarray
    time_T: np.ndarray
    title_T: np.ndarray


class _Latest(NamedTuple):
    """A combination's mask after all toggles before `place`; never written to again."""

    place: int
    bits_Y: np.ndarray


class RightsMasks:
    """Bit masks of the playable titles per viewer and time.

    Threads may share one: what is kept per combination is an immutable pair that is replaced as a whole, so that two
    threads at worst both compute it.

    Memory: 8 bytes a toggle, at most two a window (70,000 titles with one window each in 30 combinations: 34 MB), and
    two masks a combination.
    """

    def __init__(self, header: Header, toggles: Toggles):
        self.header, self.toggles = header, toggles
        toggles.base_SY.flags.writeable = False
        self._latest = [
            _Latest(int(place), bits_Y) for place, bits_Y in zip(toggles.first[:-1], toggles.base_SY, strict=True)
        ]

    @classmethod
    def compiled(cls, eligibility: Eligibility | None, titles: int) -> RightsMasks:
        """Of a dataset's `Eligibility`; None: all N titles are playable by everyone at all times."""
        if eligibility is None:
            base_SY = np.packbits(np.ones((1, titles), dtype=bool), axis=1, bitorder="little")
            nothing = np.zeros(0, dtype=np.int32)
            header = Header(origin=0, titles=titles, columns=[], sizes=[])
            return cls(header, Toggles(base_SY, np.zeros(2, dtype=np.int64), nothing, nothing))
        start_WSN, end_WSN = eligibility.start_WSN.cpu().numpy(), eligibility.end_WSN.cpu().numpy()
        if start_WSN.shape[-1] != titles:
            raise ValueError(f"windows of {start_WSN.shape[-1]} titles for a catalogue of {titles}")
        header = Header(origin=eligibility.origin, titles=titles, columns=eligibility.columns, sizes=eligibility.sizes)
        return cls(header, _compiled(start_WSN, end_WSN))

    @classmethod
    def restored(cls, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> RightsMasks:
        """What `header.model_dump()` and `arrays()` gave.

        Raises:
            DataError: they do not fit together.
        """
        try:
            read = Header.model_validate(dict(header))
        except ValidationError as error:
            raise DataError(f"the rights' header is damaged: {str(error).splitlines()[0]}.") from None
        if problem := _problem(read, arrays):
            raise DataError(f"the rights' masks are damaged: {problem}.")
        return cls(read, Toggles(*(np.ascontiguousarray(arrays[name]) for name in ARRAYS)))

    def arrays(self) -> dict[str, np.ndarray]:
        """What has to be kept, beside the header; see `Toggles`."""
        return dict(zip(ARRAYS, self.toggles, strict=True))

    def bits(self, scenario_M: np.ndarray, timestamp: int) -> np.ndarray:
        """Which titles one viewer may play.

        Args:
            scenario_M: int64 [M], vocabulary indices in the manifest's scenario order, 0 = unknown.
            timestamp: seconds since the epoch.

        Returns:
            uint8 [Y], read-only.

        Raises:
            ValueError: a scenario value that its vocabulary does not have.
        """
        combination = self._combination(scenario_M)
        seconds = np.int32(min(max(int(timestamp) - self.header.origin, 1 - NEVER), NEVER - 1))
        first, last = self.toggles.first[combination : combination + 2].tolist()
        # An int32 needle: with any other type numpy would convert all times first.
        place = first + int(np.searchsorted(self.toggles.time_T[first:last], seconds, side="right"))
        latest = self._latest[combination]
        if place == latest.place:
            return latest.bits_Y
        bits_Y = latest.bits_Y.copy()
        title = self.toggles.title_T[min(place, latest.place) : max(place, latest.place)]
        np.bitwise_xor.at(bits_Y, title >> 3, BIT[title & 7])
        bits_Y.flags.writeable = False
        self._latest[combination] = _Latest(place, bits_Y)
        return bits_Y

    def _combination(self, scenario_M: np.ndarray) -> int:
        combination = 0
        for column, size in zip(self.header.columns, self.header.sizes, strict=True):
            value = int(scenario_M[column]) if column < len(scenario_M) else -1
            if not 0 <= value < size:
                raise ValueError(f"scenario {column} has no value {value}: its vocabulary has {size}")
            combination = combination * size + value
        return combination

    def with_titles(self, grants: Sequence[Sequence[Grant]]) -> RightsMasks:
        """The same with X more titles behind the last one; this one stays as it is.

        Args:
            grants: of each new title; `[Grant()]` is playable by everyone at all times, `[]` by nobody. A release date
                belongs into every `start`.

        Raises:
            ValueError: a grant speaks of a scenario that the rights do not depend on, or of an unknown value.
        """
        start_WSX, end_WSX = self._windows(grants)
        added, old = _compiled(start_WSX, end_WSX), self.toggles
        titles = self.header.titles + len(grants)
        allowed = [
            np.unpackbits(base_SY, axis=1, count=count, bitorder="little")
            for base_SY, count in ((old.base_SY, self.header.titles), (added.base_SY, len(grants)))
        ]
        base_SY = np.packbits(np.concatenate(allowed, axis=1), axis=1, bitorder="little")
        places = [
            old.first[row] + np.searchsorted(old.time_T[slice(*old.first[row : row + 2])], added.time_T[first:last])
            for row, (first, last) in enumerate(zip(added.first[:-1], added.first[1:], strict=True))
        ]
        place_T = np.concatenate(places)
        time_T = np.insert(old.time_T, place_T, added.time_T)
        title_T = np.insert(old.title_T, place_T, added.title_T + np.int32(self.header.titles))
        header = self.header.model_copy(update={"titles": titles})
        return RightsMasks(header, Toggles(base_SY, old.first + added.first, time_T, title_T))

    def _windows(self, grants: Sequence[Sequence[Grant]]) -> tuple[np.ndarray, np.ndarray]:
        """start, end: int32 [W, S, X] of new titles, as `Eligibility` has them."""
        header = self.header
        shape = max([1, *map(len, grants)]), header.combinations, len(grants)
        start_WSX = np.full(shape, NEVER, dtype=np.int32)
        end_WSX = start_WSX.copy()
        value_RS = np.array(np.unravel_index(np.arange(shape[1]), header.sizes)) if header.sizes else ()
        size_of = dict(zip(header.columns, header.sizes, strict=True))
        for title, rows in enumerate(grants):
            for slot, grant in enumerate(rows):
                for column, value in grant.scenario.items():
                    if value and not 0 < value < size_of.get(column, 0):
                        raise ValueError(f"rights know no value {value} of scenario {column}")
                covered_S = np.ones(shape[1], dtype=bool)
                for column, value_S in zip(header.columns, value_RS, strict=True):
                    if wanted := grant.scenario.get(column, 0):
                        covered_S &= value_S == wanted
                for windows, moment in ((start_WSX, grant.start), (end_WSX, grant.end)):
                    windows[slot, covered_S, title] = min(max(moment - header.origin, -NEVER), NEVER)
        return start_WSX, end_WSX


# ---- compiling -----------------------------------------------------------------------------------------------


def _compiled(start_WSN: np.ndarray, end_WSN: np.ndarray) -> Toggles:
    """Windows int32 [W, S, N], which may overlap or be empty -> toggles of all combinations."""
    titles = start_WSN.shape[2]
    bases, times, changed = [], [], []
    for start_WN, end_WN in zip(start_WSN.swapaxes(0, 1), end_WSN.swapaxes(0, 1), strict=True):
        time, title = _changes(start_WN, end_WN)
        always = time == -NEVER
        base_N = np.zeros(titles, dtype=bool)
        base_N[title[always]] = True
        later = np.flatnonzero(~always & (time < NEVER))  # NEVER lies behind every time that can be asked for
        order = later[np.argsort(time[later], kind="stable")]
        bases.append(np.packbits(base_N, bitorder="little"))
        times.append(time[order])
        changed.append(title[order].astype(np.int32))
    first = np.cumsum([0, *map(len, times)], dtype=np.int64)
    return Toggles(np.stack(bases), first, np.concatenate(times), np.concatenate(changed))


def _changes(start_WN: np.ndarray, end_WN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(time, title) of all changes in one combination, in no order."""
    window, title = np.nonzero(start_WN < end_WN)
    start, end = start_WN[window, title], end_WN[window, title]
    # Nearly all titles have one window, which needs no sorting.
    several = np.bincount(title, minlength=start_WN.shape[1])[title] > 1
    joined_time, joined_title = _union(title[several], start[several], end[several])
    time = np.concatenate([start[~several], end[~several], joined_time])
    return time, np.concatenate([title[~several], title[~several], joined_title])


def _union(title: np.ndarray, start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(time, title) at which a title begins or ceases to be in any of its windows."""
    step = np.repeat([1, -1], len(title))
    time, title = np.concatenate([start, end]), np.concatenate([title, title])
    # Openings come before closings, so that windows that touch are one. Each title's steps sum to 0.
    order = np.lexsort((-step, time, title))
    step, time, title = step[order], time[order], title[order]
    open_windows = np.cumsum(step)
    change = (open_windows == 0) | ((open_windows == 1) & (step == 1))
    return time[change], title[change]


def _problem(header: Header, arrays: Mapping[str, np.ndarray]) -> str:
    """What is wrong with arrays from a file; empty where nothing is."""
    for name, (dtype, dimensions) in ARRAYS.items():
        if name not in arrays:
            return f"{name} is missing"
        if arrays[name].dtype != dtype or arrays[name].ndim != dimensions:
            return f"{name} is no {np.dtype(dtype).name} array of {dimensions} dimensions"
    base_SY, first, time_T, title_T = (arrays[name] for name in ARRAYS)
    fits = len(header.columns) == len(header.sizes) == len(set(header.columns))
    if not fits or min([0, *header.columns]) < 0 or min([1, *header.sizes]) < 1:
        return "columns and sizes do not fit together"
    if base_SY.shape != (header.combinations, -(-header.titles // 8)):
        return f"masks of shape {base_SY.shape} for {header.combinations} combinations of {header.titles} titles"
    if header.titles % 8 and (base_SY[:, -1] >> (header.titles % 8)).any():
        return "a mask speaks of titles that do not exist"
    if len(first) != header.combinations + 1 or first[0] != 0 or first[-1] != len(time_T) or (np.diff(first) < 0).any():
        return "the combinations' bounds do not ascend from 0 to the number of toggles"
    if len(title_T) != len(time_T):
        return "there are not as many titles as times"
    if len(title_T) and not 0 <= title_T.min() <= title_T.max() < header.titles:
        return "a toggle is of a title that does not exist"
    descends = np.diff(time_T.astype(np.int64)) < 0
    begins = first[(first > 0) & (first < len(time_T))] - 1
    descends[begins] = False
    return "times do not ascend" if descends.any() else ""
