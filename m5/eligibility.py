"""Who may play what, and when: rights (region x plan x window) and release dates, compiled for whole batches.

A title is playable for a viewer at time t when it has been released and, where the dataset has a rights table, some
row of it covers the viewer's scenario values and t. A row's scenario value 0 stands for "any"; a viewer whose value is
unknown (0) may play only what an "any" row allows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from m5.schema import ALWAYS, PreparedDataset

NEVER = np.iinfo(np.int32).max
# Elements of the mask made at a time: on a CPU what fits its cache (three times faster), on a GPU what bounds memory.
CPU_ELEMENTS, GPU_ELEMENTS = 2**18, 2**27


class Eligibility:
    """Windows in which every title may be played, per combination of the scenario values that rights speak of.

    Memory: W x S x N int32 twice, W the most disjoint windows that one title has in one combination, S the number of
    combinations (the product of the rights' vocabulary sizes); e.g. 70,000 titles, 10 regions, 3 plans and 2 windows
    take 49 MB. `mask` gathers rows of it and compares, block by block; its result takes B x N bytes.

    Attributes:
        start_WSN, end_WSN: int32 seconds after `origin`; a window is start <= t < end.
        column: of `mask`'s scenario argument, for each right's scenario.
    """

    def __init__(self, start_WSN: Tensor, end_WSN: Tensor, origin: int, columns: list[int], sizes: list[int]):
        self.start_WSN, self.end_WSN, self.origin = start_WSN, end_WSN, origin
        self.columns, self.sizes = columns, sizes

    @classmethod
    def from_dataset(cls, dataset: PreparedDataset, device: torch.device | str = "cpu") -> Eligibility | None:
        """None where there are neither rights nor release dates: every title is playable by everyone."""
        manifest = dataset.manifest
        released = dataset.titles["released"].to_numpy(np.int64)
        if dataset.rights is None and (released == ALWAYS).all():
            return None
        names = [vocabulary.name for vocabulary in manifest.scenarios]
        columns = [names.index(name) for name in manifest.rights_scenarios or ()]
        sizes = [manifest.scenarios[column].size for column in columns]
        timestamps = dataset.event_array("timestamp")
        origin = int(timestamps.min()) if len(timestamps) else 0
        start_WSN, end_WSN = _windows(dataset, columns, sizes, _relative(released, origin), origin)
        return cls(torch.from_numpy(start_WSN).to(device), torch.from_numpy(end_WSN).to(device), origin, columns, sizes)

    def of(self, title_C: Tensor) -> Eligibility:
        """The same for some titles only; int64 [C]."""
        return Eligibility(
            self.start_WSN.index_select(2, title_C),
            self.end_WSN.index_select(2, title_C),
            self.origin,
            self.columns,
            self.sizes,
        )

    def mask(self, scenario_BM: Tensor, timestamp_B: Tensor) -> Tensor:
        """Whether each title is playable.

        Args:
            scenario_BM: int64 [B, M], vocabulary indices in the manifest's scenario order, 0 = unknown.
            timestamp_B: int64 [B], seconds since the epoch.

        Returns:
            bool [B, N].
        """
        combination_B, time_B = self._placed(scenario_BM, timestamp_B)
        time_B1 = time_B.unsqueeze(-1)
        shape = len(timestamp_B), self.start_WSN.shape[-1]
        playable_BN = torch.zeros(shape, dtype=torch.bool, device=scenario_BM.device)
        for part, combination in self._blocks(combination_B):
            for start_SN, end_SN in zip(self.start_WSN, self.end_WSN, strict=True):
                playable_BN[part] |= (start_SN[combination] <= time_B1[part]) & (time_B1[part] < end_SN[combination])
        return playable_BN

    def allows(self, scenario_BM: Tensor, timestamp_B: Tensor, title_B: Tensor) -> Tensor:
        """Whether one title each is playable: as `mask`, and int64 [B] -> bool [B]."""
        combination_B, time_B = self._placed(scenario_BM, timestamp_B)
        start_WB, end_WB = (windows[:, combination_B, title_B] for windows in (self.start_WSN, self.end_WSN))
        return ((start_WB <= time_B) & (time_B < end_WB)).any(0)

    def _placed(self, scenario_BM: Tensor, timestamp_B: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [B] combinations of scenario values and int32 [B] seconds after the origin."""
        combination_B = torch.zeros(len(timestamp_B), dtype=torch.int64, device=scenario_BM.device)
        for column, size in zip(self.columns, self.sizes, strict=True):
            combination_B = combination_B * size + scenario_BM[:, column]
        limit = NEVER - 1
        return combination_B, (timestamp_B - self.origin).clamp(-limit, limit).to(torch.int32)

    def _blocks(self, combination_B: Tensor) -> Iterator[tuple[slice, int | Tensor]]:
        """Rows whose mask is made at a time, and their combination: a single one on a CPU, to copy no windows."""
        on_cpu, titles = combination_B.device.type == "cpu", max(1, self.start_WSN.shape[-1])
        rows = max(1, (CPU_ELEMENTS if on_cpu else GPU_ELEMENTS) // titles)
        if not on_cpu:
            for first in range(0, len(combination_B), rows):
                part = slice(first, first + rows)
                yield part, combination_B[part]
            return
        values, counts = torch.unique_consecutive(combination_B, return_counts=True)
        begin = 0
        for combination, count in zip(values.tolist(), counts.tolist(), strict=True):
            for first in range(begin, begin + count, rows):
                yield slice(first, min(first + rows, begin + count)), combination
            begin += count


class Playable:
    """Masks over the candidates of a batch, chunk by chunk; the windows of other titles are not looked at.

    The windows are cut once for as long as the candidates stay the same: over a full catalogue, once.
    """

    def __init__(self, eligibility: Eligibility):
        self.eligibility = eligibility
        self._asked: Tensor | None = None
        self._part = eligibility

    def __call__(self, rights_PM: Tensor, timestamp_P: Tensor, title_C: Tensor) -> Tensor:
        """int64 [P, M], [P], [C] -> bool [P, C]."""
        if title_C is not self._asked:
            # Another tensor is not yet another catalogue: every batch has its own.
            if self._asked is None or not torch.equal(self._asked, title_C):
                self._part = self.eligibility.of(title_C)
            self._asked = title_C
        return self._part.mask(rights_PM, timestamp_P)


def _relative(values: np.ndarray, origin: int) -> np.ndarray:
    """int64 seconds since the epoch -> int32 seconds after the origin; open ends saturate."""
    return np.clip(values - origin, -NEVER, NEVER).astype(np.int32)


def _windows(
    dataset: PreparedDataset, columns: list[int], sizes: list[int], released: np.ndarray, origin: int
) -> tuple[np.ndarray, np.ndarray]:
    """start, end: int32 [W, S, N] after the origin, windows of all combinations; an unused slot is empty."""
    combinations, titles, rights = int(np.prod(sizes, dtype=np.int64)), len(released), dataset.rights
    if rights is None:
        return released.reshape(1, 1, titles), np.full((1, 1, titles), NEVER, dtype=np.int32)
    combination, row = _covered_combinations(rights, dataset, columns, sizes)
    title = rights["title"].to_numpy(np.int64)[row]
    start = np.maximum(_relative(rights["start"].to_numpy(np.int64), origin)[row], released[title])
    end = _relative(rights["end"].to_numpy(np.int64), origin)[row]
    cell = combination * titles + title
    # Nearly all cells have one window, which needs no sorting.
    several = np.bincount(cell, minlength=combinations * titles)[cell] > 1
    joined = _disjoint(cell[several], start[several], end[several])
    slots = int(joined.slot.max()) + 1 if len(joined.slot) else 1
    starts = np.full((slots, combinations * titles), NEVER, dtype=np.int32)
    ends = starts.copy()
    starts[0, cell[~several]], ends[0, cell[~several]] = start[~several], end[~several]
    starts[joined.slot, joined.cell], ends[joined.slot, joined.cell] = joined.start, joined.end
    return starts.reshape(slots, combinations, titles), ends.reshape(slots, combinations, titles)


class _Joined(NamedTuple):
    """Windows that do not meet, and the number of each within its cell."""

    slot: np.ndarray
    cell: np.ndarray
    start: np.ndarray
    end: np.ndarray


def _disjoint(cell: np.ndarray, start: np.ndarray, end: np.ndarray) -> _Joined:
    """Union of the windows of each cell: W stays as small as the windows allow."""
    kept = np.flatnonzero(start < end)
    order = kept[np.lexsort((start[kept], cell[kept]))]
    cell, start, end = cell[order], start[order].astype(np.int64), end[order].astype(np.int64)
    # The latest end so far, within a cell: cells ascend, so a larger cell outweighs all ends of the ones before it.
    base = cell * 2**32 + 2**31
    reach = np.maximum.accumulate(base + end) - base
    opens = np.ones(len(cell), dtype=bool)
    opens[1:] = (cell[1:] != cell[:-1]) | (start[1:] > reach[:-1])
    first = np.flatnonzero(opens)
    last = np.append(first[1:], len(cell))[: len(first)] - 1
    _, head, count = np.unique(cell[first], return_index=True, return_counts=True)
    slot = np.arange(len(first)) - np.repeat(head, count)
    return _Joined(slot, cell[first], start[first], reach[last])


def _covered_combinations(
    rights: pd.DataFrame, dataset: PreparedDataset, columns: list[int], sizes: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Every (combination, rights row) pair in which the row applies."""
    row = np.arange(len(rights))
    combination = np.zeros(len(row), dtype=np.int64)
    for column, size in zip(columns, sizes, strict=True):
        value = rights[dataset.manifest.scenarios[column].name].to_numpy(np.int64)[row]
        # 0 = any: the row applies to every value, the viewer's unknown one included.
        repeats = np.where(value == 0, size, 1)
        offset = np.arange(repeats.sum()) - np.repeat(np.cumsum(repeats) - repeats, repeats)
        any_value = np.repeat(value == 0, repeats)
        combination = np.repeat(combination, repeats) * size + np.where(any_value, offset, np.repeat(value, repeats))
        row = np.repeat(row, repeats)
    return combination, row
