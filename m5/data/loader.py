"""Training order and the background thread that keeps batches ready.

The order is a function of the seed and the epoch alone. Sequences of like length share a batch, so that padding stays
small, and batches are shuffled. Every rank walks the same order and takes its share of each batch.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import numpy as np

from m5.batch import Batch
from m5.data.sequences import BatchBuilder, Windows
from m5.schema import TRAIN

POOL_BATCHES = 32  # sequences are sorted by length within pools of this many batches


def training_windows(builder: BatchBuilder, generator: np.random.Generator) -> Windows:
    """Windows in which every training event is requested exactly once.

    A user's training events are cut from the newest to the oldest into pieces of `requests`; the first cut is moved
    at random, so that epochs differ in what a target sees before it. Each window then reaches back to `history`.
    """
    offsets = builder.dataset.offsets
    requests = builder.config.sequences.requests
    split = builder.dataset.event_array("split")
    # Training events come first within a user, under both kinds of split.
    before = np.concatenate([[0], np.cumsum(np.asarray(split) == TRAIN)])
    counts = before[offsets[1:]] - before[offsets[:-1]]
    shift = np.where(counts > requests, generator.integers(0, requests, len(counts)), 0)
    pieces = np.where(counts > 0, -(-(counts + shift) // requests), 0)
    user = np.repeat(np.arange(len(counts)), pieces)
    piece = np.arange(len(user)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    end = offsets[:-1][user] + counts[user] + shift[user]
    last = np.minimum(end - piece * requests, offsets[:-1][user] + counts[user]) - 1
    first = np.maximum(end - (piece + 1) * requests, offsets[:-1][user])
    start = np.maximum(offsets[:-1][user], last - builder.config.sequences.history)
    return Windows(start, last, np.maximum(first, start))


def cut_to(windows: Windows, wanted: np.ndarray, builder: BatchBuilder) -> Windows:
    """The same windows with fewer requests: one window for every unbroken stretch of wanted events in a window.

    Args:
        wanted: bool [T], events that may be asked for; the others stay what they are in histories.
    """
    count = windows.last - windows.first + 1
    row = np.repeat(np.arange(len(windows)), count)
    event = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count) + windows.first[row]
    keep = wanted[event]
    row, event = row[keep], event[keep]
    joined = (row[1:] == row[:-1]) & (event[1:] == event[:-1] + 1)
    first, last = event[np.append(True, ~joined)[: len(event)]], event[np.append(~joined, True)[: len(event)]]
    dataset = builder.dataset
    start = np.maximum(dataset.offsets[dataset.user_of(last)], last - builder.config.sequences.history)
    return Windows(start, last, first)


def epoch_batches(builder: BatchBuilder, *, seed: int, epoch: int, wanted: np.ndarray | None = None) -> list[Windows]:
    """The epoch's global batches of `sequences` windows, in order; `wanted` as in `cut_to`, None: every event is."""
    generator = np.random.default_rng([seed, epoch])
    windows = training_windows(builder, generator)
    if wanted is not None:
        windows = cut_to(windows, wanted, builder)
    settings = builder.config.sequences
    order = generator.permutation(len(windows))
    if settings.sequences_per_epoch is not None:
        order = order[: settings.sequences_per_epoch]
    length = (windows.last - windows.start)[order]
    pool = np.arange(len(order)) // (POOL_BATCHES * settings.sequences)
    order = order[np.lexsort((length, pool))]
    cuts = np.arange(settings.sequences, len(order), settings.sequences)
    batches = [windows[rows] for rows in np.split(order, cuts)]
    return [batches[index] for index in generator.permutation(len(batches))]


class Loader:
    """Batches of one rank for one epoch, built ahead by a thread.

    Args:
        builder: makes the batches.
        seed, epoch: fix the order and every random choice in it.
        rank, world_size: every rank takes each world_size-th sequence of a global batch. All make as many batches: one
            whose share is empty makes a batch without request.
        first: number of the epoch's batch to begin with, for a run that is resumed.
        wanted: bool [T], the training events that are asked for; None: all.
    """

    def __init__(
        self,
        builder: BatchBuilder,
        *,
        seed: int,
        epoch: int,
        rank: int = 0,
        world_size: int = 1,
        first: int = 0,
        wanted: np.ndarray | None = None,
    ):
        self.builder, self.seed, self.epoch = builder, seed, epoch
        self.rank, self.world_size, self.first, self.wanted = rank, world_size, first, wanted
        self.batches = epoch_batches(builder, seed=seed, epoch=epoch, wanted=wanted)

    def __len__(self) -> int:
        """Batches of the whole epoch, those before `first` included."""
        return len(self.batches)

    def _make(self, index: int) -> Batch:
        # Counted from 1, because NumPy pads seeds with zeros: [seed, epoch, 0] would repeat the order's stream.
        generator = np.random.default_rng([self.seed, self.epoch, 1 + index])
        return self.builder.build(self.batches[index], generator, rank=self.rank, world_size=self.world_size)

    def whole(self, index: int) -> Batch:
        """The epoch's batch of that number as a single rank would have it."""
        return Loader(self.builder, seed=self.seed, epoch=self.epoch, wanted=self.wanted)._make(index)

    def __iter__(self) -> Iterator[Batch]:
        ready: queue.Queue[Batch | BaseException | None] = queue.Queue(self.builder.config.sequences.prefetch)
        stop = threading.Event()

        def offer(item: Batch | BaseException | None) -> None:
            while not stop.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    continue

        def produce() -> None:
            try:
                for index in range(self.first, len(self.batches)):
                    if stop.is_set():
                        return
                    offer(self._make(index))
                offer(None)
            except BaseException as error:  # handed to the consumer, which raises it
                offer(error)

        thread = threading.Thread(target=produce, name="m5-loader", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()
