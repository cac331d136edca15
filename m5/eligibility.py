"""Who may play what, and when: rights (region x plan x window) and release dates, compiled for whole batches.

A title is playable for a viewer at time t when it has been released and, where the dataset has a rights table, some
row of it covers the viewer's scenario values and t. A row's scenario value 0 stands for "any"; a viewer whose value is
unknown (0) may play only what an "any" row allows.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from m5.schema import ALWAYS, PreparedDataset

NEVER = np.iinfo(np.int32).max


class Eligibility:
    """Windows in which every title may be played, per combination of the scenario values that rights speak of.

    Memory: W x S x N int32 twice, W the most disjoint windows that one title has in one combination, S the number of
    combinations (the product of the rights' vocabulary sizes). `mask` gathers rows of it and compares.

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
        windows = _windows(dataset, columns, sizes, released)
        start_WSN, end_WSN = (torch.from_numpy(_relative(values, origin)).to(device) for values in windows)
        return cls(start_WSN, end_WSN, origin, columns, sizes)

    def mask(self, scenario_BM: Tensor, timestamp_B: Tensor) -> Tensor:
        """Whether each title is playable.

        Args:
            scenario_BM: int64 [B, M], vocabulary indices in the manifest's scenario order, 0 = unknown.
            timestamp_B: int64 [B], seconds since the epoch.

        Returns:
            bool [B, N].
        """
        combination_B = torch.zeros(len(timestamp_B), dtype=torch.int64, device=scenario_BM.device)
        for column, size in zip(self.columns, self.sizes, strict=True):
            combination_B = combination_B * size + scenario_BM[:, column]
        limit = NEVER - 1
        time_B1 = (timestamp_B - self.origin).clamp(-limit, limit).to(torch.int32).unsqueeze(-1)
        playable_BN = None
        for start_SN, end_SN in zip(self.start_WSN, self.end_WSN, strict=True):
            inside_BN = (start_SN[combination_B] <= time_B1) & (time_B1 < end_SN[combination_B])
            playable_BN = inside_BN if playable_BN is None else playable_BN | inside_BN
        return playable_BN


def _relative(values: np.ndarray, origin: int) -> np.ndarray:
    """int64 seconds since the epoch -> int32 seconds after the origin; open ends saturate."""
    return np.clip(values - origin, -NEVER, NEVER).astype(np.int32)


def _windows(
    dataset: PreparedDataset, columns: list[int], sizes: list[int], released: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """start, end: int64 [W, S, N], windows of all combinations; an unused slot is empty (start = end = -ALWAYS)."""
    combinations = int(np.prod(sizes)) if sizes else 1
    titles = len(released)
    rights = dataset.rights
    if rights is None:
        return released.reshape(1, 1, titles), np.full((1, 1, titles), -ALWAYS)
    combination, row = _covered_combinations(rights, dataset, columns, sizes)
    title = rights["title"].to_numpy(np.int64)[row]
    start = np.maximum(rights["start"].to_numpy(np.int64)[row], released[title])
    end = rights["end"].to_numpy(np.int64)[row]
    cell = combination * titles + title
    order = np.lexsort((start, cell))
    cell, start, end = cell[order], start[order], end[order]
    # Overlapping rows need no merging: a title is playable when any of its windows holds t.
    _, first, count = np.unique(cell, return_index=True, return_counts=True)
    slot = np.arange(len(cell)) - np.repeat(first, count)
    slots = int(count.max()) if len(count) else 1
    starts = np.full((slots, combinations * titles), -ALWAYS)
    ends = np.full((slots, combinations * titles), -ALWAYS)
    starts[slot, cell], ends[slot, cell] = start, end
    return starts.reshape(slots, combinations, titles), ends.reshape(slots, combinations, titles)


def _covered_combinations(
    rights, dataset: PreparedDataset, columns: list[int], sizes: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Every (combination, rights row) pair in which the row applies, duplicates of a row removed."""
    unique = ~rights.duplicated().to_numpy()
    row = np.flatnonzero(unique)
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
