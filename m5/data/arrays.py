"""Index arithmetic of a batch, in NumPy: what rows share, what is of one kind, what belongs to which rank."""

from __future__ import annotations

import numpy as np

TABLE = 2**16  # possible combinations of values of which a table is made


def distinct_rows(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int64 [P, X] of numbers from 0 -> places of the J distinct rows, [J], and which of them each row is, [P].

    Rows are compared as one number each, which is several times faster than sorting rows; it is made small again
    wherever another column could overflow it.
    """
    code, radix = np.zeros(len(values), dtype=np.int64), 1
    for column in values.T:
        size = int(column.max(initial=0)) + 1
        if radix * size >= 2**62:
            _, code = np.unique(code, return_inverse=True)
            radix = len(values)
        code, radix = code * size + column, radix * size
    if radix > TABLE:
        _, first, place = np.unique(code, return_index=True, return_inverse=True)
        return first, place
    # Few possible combinations: a table of them is faster than sorting.
    present = np.zeros(radix, dtype=bool)
    present[code] = True
    place = (np.cumsum(present) - 1)[code]
    first = np.empty(np.count_nonzero(present), dtype=np.int64)
    first[place[::-1]] = np.arange(len(code) - 1, -1, -1)  # the first occurrence is written last
    return first, place


def sorted_by_value(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """int64 [P] of numbers from 0 -> the distinct ones, how often each occurs, and [P] a stable order by value."""
    counts = np.bincount(values)
    distinct = np.flatnonzero(counts)
    # Numbers of 16 bits are sorted by radix, several times faster than by comparison.
    narrow = values.astype(np.uint16) if len(counts) <= 2**16 else values
    return distinct, counts[distinct], np.argsort(narrow, kind="stable")


def by_category(category: np.ndarray, categories: int) -> tuple[np.ndarray, tuple[int, ...]]:
    """int64 [B, L], -1 outside behaviours -> flat positions of the others sorted by category, and how many each has."""
    category = category.ravel()
    inside = np.flatnonzero(category >= 0)
    _, _, order = sorted_by_value(category[inside])
    return inside[order], tuple(np.bincount(category[inside], minlength=categories).tolist())


def sum_by_rank(value_B: np.ndarray, rank_B: np.ndarray, world_size: int) -> tuple[int, ...]:
    """Sums of `value_B` over the sequences of each rank."""
    return tuple(np.bincount(rank_B, weights=value_B, minlength=world_size).astype(int).tolist())


def columns(arrays: list[np.ndarray], rows: np.ndarray) -> np.ndarray:
    """The same rows of several arrays side by side: int64 [rows, arrays]."""
    if not arrays:
        return np.zeros((len(rows), 0), dtype=np.int64)
    return np.stack([array[rows] for array in arrays], axis=1).astype(np.int64)
