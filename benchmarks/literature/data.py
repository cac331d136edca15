"""What the systems of the literature read of a prepared dataset: histories, features, content; all vectorised.

Dimension legend: B sequences, L columns of a sequence, F features of a request, N titles, R requests.

A sequence of n behaviours has n + 1 columns: column 0 is the start, column c the c-th behaviour, then padding. What
*follows* a column is the request that its viewer makes next: its features stand at that column, and its title is what a
model has to find there. The last valid column's request is the one that a target event makes. In training, the requests
of some columns may be asked for elsewhere: those columns are there to be read, and `asked_BL` leaves them out.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from m5.baselines import Interactions
from m5.data.sequences import Windows, age_bucket
from m5.schema import TRAIN, ContentKind, DataError, PreparedDataset

RATING_LIKE = ("rating", "completion")  # which intensity is the value of a watch, where there are several


class Sequences(NamedTuple):
    """A batch of histories; see the module's text.

    Attributes:
        title_BL: int64, N at the start and N + 1 where padded.
        value_BL: float32 in 0..1, how much the behaviour was watched or liked; 0 at the start and where padded.
        age_BL: int64 below AGE_BUCKETS, log2 of the seconds until what follows; 0 at the start and where padded.
        feature_BLF: int64, vocabulary indices of the request that follows.
        next_BL: int64, the title that follows; N + 1 where padded.
        next_value_BL: float32, the value of what follows. Models may learn to predict it, never read it.
        length_B: int64, valid columns, at least 1.
        asked_BL: bool, columns whose request is asked for here; the last valid one always is.
    """

    title_BL: Tensor
    value_BL: Tensor
    age_BL: Tensor
    feature_BLF: Tensor
    next_BL: Tensor
    next_value_BL: Tensor
    length_B: Tensor
    asked_BL: Tensor

    @property
    def valid_BL(self) -> Tensor:
        """bool, where there is no padding."""
        return torch.arange(self.title_BL.shape[1]) < self.length_B.unsqueeze(-1)

    def last(self, x_BLX: Tensor) -> Tensor:
        """[B, L, ...] -> [B, ...] at the last valid column, where the target event's request is."""
        return x_BLX[torch.arange(len(x_BLX)), self.length_B - 1]


class Data:
    """A prepared dataset as the systems read it.

    Args:
        dataset: prepared dataset.
        history: most recent behaviours that a system reads.
        filter_seen: whether rankings leave watched titles out.
        validation_targets: random part of the validation targets that choices are made on.
        preset: that M5's row starts from.
    """

    def __init__(
        self,
        dataset: PreparedDataset,
        *,
        history: int,
        filter_seen: bool = True,
        validation_targets: int = 2_000,
        preset: str = "default",
    ):
        manifest = dataset.manifest
        self.preset = preset
        self.dataset, self.history = dataset, history
        self.filter_seen, self.validation_targets = filter_seen, validation_targets
        self.n_titles, self.n_users = manifest.n_titles, manifest.n_users
        self.title = np.asarray(dataset.event_array("title"), dtype=np.int64)
        self.timestamp = np.asarray(dataset.event_array("timestamp"))
        self.train = np.flatnonzero(np.asarray(dataset.event_array("split")) == TRAIN)
        if not len(self.train):
            raise DataError(f"{dataset.folder}: no event lies in the training period, so there is nothing to fit.")
        self.cold = dataset.titles["cold"].to_numpy(bool).copy()
        self.train_count = dataset.titles["train_count"].to_numpy(np.float64)
        self.scenarios = [v.name for v in manifest.scenarios]
        per_event = [(f"scenario_{v.name}", v.size) for v in manifest.scenarios]
        per_event += [(f"context_{v.name}", v.size) for v in manifest.contexts]
        self._event_features = [dataset.event_array(name) for name, _ in per_event]
        self._user_features = [dataset.users[v.name].to_numpy(np.int64) for v in manifest.user_features]
        # Scenarios come first.
        self.feature_sizes = [size for _, size in per_event] + [v.size for v in manifest.user_features]

    @cached_property
    def interactions(self) -> Interactions:
        """Training matrix and histories of the classical rows."""
        return Interactions(self.dataset)

    @cached_property
    def value(self) -> np.ndarray:
        """float32 [T] in 0..1: an event's rating, completion or other intensity between the training period's extremes.

        1% at either end is cut off; what is missing is the training mean. Without any intensity all are 1.
        """
        names = [intensity.name for intensity in self.dataset.manifest.intensities]
        if not names:
            return np.ones(len(self.title), dtype=np.float32)
        name = next((name for name in RATING_LIKE if name in names), names[0])
        raw = np.asarray(self.dataset.event_array(f"intensity_{name}"), dtype=np.float32)
        known = raw[self.train][~np.isnan(raw[self.train])]
        if not len(known):
            return np.ones(len(self.title), dtype=np.float32)
        low, high = np.quantile(known, [0.01, 0.99])
        scaled = np.clip((raw - low) / max(high - low, 1e-6), 0.0, 1.0)
        return np.where(np.isnan(scaled), np.nanmean(scaled[self.train]), scaled).astype(np.float32)

    def content(self, kind: ContentKind) -> np.ndarray:
        """float32 [N, d] content vectors.

        Raises:
            DataError: the dataset was prepared without them.
        """
        vectors = self.dataset.content(kind)
        if vectors is None:
            raise DataError(f"{self.dataset.folder} has no {kind} vectors: run `m5 encode` and `m5 graph` first.")
        return vectors

    @cached_property
    def metadata(self) -> dict[str, list[list[str]]]:
        """Kind (genres, actors, ...) -> the values of every title."""
        return {
            kind: [list(values) if values is not None else [] for values in self.dataset.titles[kind]]
            for kind in self.dataset.manifest.metadata
        }

    def training_windows(self, generator: np.random.Generator) -> Windows:
        """Stretches of training events that together ask for every one of them once, cut as M5's loader cuts them.

        A viewer's training events are cut from the newest to the oldest into stretches of `history`; the first cut is
        moved at random, so that epochs differ in what a target sees before it. Each stretch is read with as much of
        what lies before it as `history` leaves room for.
        """
        begin = self.dataset.offsets[:-1]
        count = np.searchsorted(self.train, self.dataset.offsets[1:]) - np.searchsorted(self.train, begin)
        size = self.history
        shift = np.where(count > size, generator.integers(0, size, len(count)), 0)
        parts = np.where(count > 0, -(-(count + shift) // size), 0)
        user = np.repeat(np.arange(self.n_users), parts)
        part = np.arange(len(user)) - np.repeat(np.cumsum(parts) - parts, parts)
        end = (begin + count + shift)[user] - part * size
        last = np.minimum(end, (begin + count)[user]) - 1
        first, start = np.maximum(end - size, begin[user]), np.maximum(last - size, begin[user])
        return Windows(start, last, np.maximum(first, start))

    def sequences(self, event: np.ndarray | Windows, history: int | None = None) -> Sequences:
        """int64 [B] target events -> what their viewers had done before, at most `history` (or fewer) behaviours.

        Only what lies before the target event is read, and the time and features of its request. Every column's request
        is asked for, unless training windows say which.
        """
        windows = event if isinstance(event, Windows) else None
        event = windows.last if windows else np.asarray(event, dtype=np.int64)
        user = self.dataset.user_of(event)
        start = np.maximum(self.dataset.offsets[user], event - min(history or self.history, self.history))
        length = event - start + 1
        column_L = np.arange(int(length.max()))
        inside_BL = column_L < length[:, None]
        behaviour_BL = inside_BL & (column_L > 0)
        follows_BL = np.where(inside_BL, start[:, None] + column_L, event[:, None])
        event_BL = np.where(behaviour_BL, follows_BL - 1, event[:, None])
        pad_BL = np.where(inside_BL, self.n_titles, self.n_titles + 1)
        features = [values[follows_BL] for values in self._event_features]
        features += [np.broadcast_to(values[user][:, None], follows_BL.shape) for values in self._user_features]
        age_BL = np.where(behaviour_BL, age_bucket(self.timestamp[follows_BL] - self.timestamp[event_BL]), 0)
        empty = np.zeros((*follows_BL.shape, 0), dtype=np.int64)
        return Sequences(
            title_BL=torch.from_numpy(np.where(behaviour_BL, self.title[event_BL], pad_BL)),
            value_BL=torch.from_numpy(np.where(behaviour_BL, self.value[event_BL], 0).astype(np.float32)),
            age_BL=torch.from_numpy(age_BL),
            feature_BLF=torch.from_numpy(np.stack(features, axis=-1).astype(np.int64) if features else empty),
            next_BL=torch.from_numpy(np.where(inside_BL, self.title[follows_BL], self.n_titles + 1)),
            next_value_BL=torch.from_numpy(np.where(inside_BL, self.value[follows_BL], 0).astype(np.float32)),
            length_B=torch.from_numpy(length),
            asked_BL=torch.from_numpy(inside_BL & (follows_BL >= (windows.first if windows else start)[:, None])),
        )
