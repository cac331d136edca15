"""The split, and everything that may be learned from the training period only: vocabularies, boundaries, counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from m5.schema import TEST, TRAIN, VALID, DataError, Intensity, Split, Vocabulary

SplitKind = Literal["time", "leave-last-out"]
MAX_BUCKETS = 16
SPLIT_NAMES = {"train": TRAIN, "valid": VALID, "test": TEST}


def split_events(
    kind: SplitKind, timestamps: np.ndarray, offsets: np.ndarray, *, valid_fraction: float, test_fraction: float
) -> tuple[np.ndarray, Split]:
    """Assign every event to TRAIN, VALID or TEST.

    `time`: the same two moments for all users, quantiles of all timestamps, so that nothing of training lies after
    anything of validation. `leave-last-out`: each user's last event is TEST, the one before VALID; users with fewer
    than 3 events are all TRAIN.

    Args:
        kind: which of the two.
        timestamps: int64 [T] seconds, sorted within each user.
        offsets: int64 [U + 1], where each user's events begin.
        valid_fraction, test_fraction: shares of the events, in time, of a `time` split.

    Returns:
        uint8 [T] and its description.

    Raises:
        DataError: a split would be empty.
    """
    n_events = len(timestamps)
    split = np.full(n_events, TRAIN, dtype=np.uint8)
    if kind == "leave-last-out":
        last = offsets[1:][np.diff(offsets) >= 3] - 1
        split[last], split[last - 1] = TEST, VALID
        if len(last) == 0:
            raise DataError(
                "leave-last-out split: no user has 3 events or more, so validation and test would be empty."
            )
        return split, Split(kind=kind)
    if not (0 < valid_fraction < 1 and 0 < test_fraction < 1 and valid_fraction + test_fraction < 1):
        raise DataError(
            f"time split: valid_fraction {valid_fraction} and test_fraction {test_fraction} must be above 0 and sum "
            "below 1."
        )
    first_valid = min(round(n_events * (1 - valid_fraction - test_fraction)), n_events - 1)
    first_test = min(round(n_events * (1 - test_fraction)), n_events - 1)
    ordered = np.partition(timestamps, (first_valid, first_test))
    valid_start, test_start = int(ordered[first_valid]), int(ordered[first_test])
    split[timestamps >= valid_start] = VALID
    split[timestamps >= test_start] = TEST
    counts = np.bincount(split, minlength=3)
    if (counts == 0).any():
        empty = ", ".join(name for name, value in SPLIT_NAMES.items() if counts[value] == 0)
        raise DataError(
            f"time split: of {n_events:,} events, between timestamps {timestamps.min()} and {timestamps.max()}, none "
            f"falls into {empty} (too few events, or too many in one second). Give more events, other fractions, or "
            "use the leave-last-out split."
        )
    return split, Split(kind="time", valid_start=valid_start, test_start=test_start)


def keep_trained(
    name: str, values: Sequence[str], codes: np.ndarray, trained: np.ndarray
) -> tuple[Vocabulary, np.ndarray]:
    """Cut a vocabulary down to the values that occur where `trained`; all others become 0.

    Args:
        name: of the vocabulary.
        values: raw values; code i means `values[i - 1]`, 0 missing.
        codes: int [T] or [U].
        trained: bool, the same shape.

    Returns:
        The vocabulary and int32 codes in it, the same shape as `codes`.
    """
    counts = np.bincount(codes[trained], minlength=len(values) + 1)
    kept = counts[1:] > 0
    remap = np.concatenate([[0], np.where(kept, np.cumsum(kept), 0)]).astype(np.int32)
    return Vocabulary(name=name, values=tuple(v for v, keep in zip(values, kept, strict=True) if keep)), remap[codes]


def intensity_boundaries(name: str, values: np.ndarray) -> Intensity:
    """Bucket boundaries of a watch intensity.

    Up to 16 distinct values get a bucket each (boundaries half-way between neighbours); else the boundaries are 15
    quantiles, fewer where they coincide.

    Args:
        name: kind of intensity.
        values: float32 [n], of training events, NaN = missing.
    """
    ordered = np.sort(values[~np.isnan(values)]).astype(np.float64)
    if len(ordered) == 0:
        return Intensity(name=name, boundaries=())
    first_of_value = np.concatenate([[True], np.diff(ordered) > 0])
    if first_of_value.sum() <= MAX_BUCKETS:
        distinct = ordered[first_of_value]
        boundaries = (distinct[1:] + distinct[:-1]) / 2
    else:
        places = np.arange(1, MAX_BUCKETS) * len(ordered) // MAX_BUCKETS
        boundaries = np.unique(ordered[places])
        boundaries = boundaries[boundaries > ordered[0]]  # a boundary at the minimum would leave bucket 1 empty
    return Intensity(name=name, boundaries=tuple(float(b) for b in boundaries))
