"""A small dataset in memory that stands in for a described one: same columns, any size, random contents.

From it the real `BatchBuilder` makes real batches, so that whatever reads or weighs them need not know how batches are
made.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from m5.data.sequences import BatchBuilder, Windows
from m5.plan.description import Dataset
from m5.schema import ALWAYS, TRAIN, ContentKind, Intensity, Manifest, PreparedDataset, Split, Vocabulary

DAY = 86_400


class StandIn(PreparedDataset):
    """A prepared dataset that lies in memory.

    Args:
        like: whose columns to have; its sizes are not read.
        lengths: events of each user, all in the training period.
        titles, cold: of the catalogue, and how many of them have no training event.
        values: size of every vocabulary.
        seed: of the contents.
    """

    def __init__(
        self, like: Dataset, *, lengths: Sequence[int] | np.ndarray, titles: int, cold: int, values: int, seed: int = 0
    ):
        generator = np.random.default_rng(seed)
        lengths = np.asarray(lengths, dtype=np.int64)
        users, events = len(lengths), int(lengths.sum())
        self._like, self._generator = like, generator
        self.folder = Path("in memory")  # for messages
        self.manifest = _manifest(like, users, titles, cold, events, values)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        self.arrays: dict[str, np.ndarray] = {
            "title": generator.integers(0, titles, events, dtype=np.int32),
            "timestamp": np.sort(generator.integers(0, 1000 * DAY, events)),
            "split": np.full(events, TRAIN, dtype=np.uint8),
        }
        self.arrays |= {f"intensity_{name}": generator.random(events, dtype=np.float32) for name in like.intensities}
        for kind, names in (("scenario", like.scenarios), ("context", like.contexts)):
            for name in names:
                self.arrays[f"{kind}_{name}"] = generator.integers(0, values + 1, events, dtype=np.int32)
        cold_title = np.arange(titles) >= titles - cold
        catalogue = pd.DataFrame(
            {
                "category": generator.integers(0, like.categories + 1, titles).astype(np.int32),
                "released": np.full(titles, ALWAYS),
                "train_count": np.where(cold_title, 0, 1),
                "cold": cold_title,
            }
        )
        viewers = pd.DataFrame(
            {name: generator.integers(0, values + 1, users).astype(np.int32) for name in like.user_features},
            index=range(users),
        )
        # What PreparedDataset would read from files on first use.
        self.offsets, self.titles, self.users, self.rights = offsets, catalogue, viewers, None

    def event_array(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def content(self, kind: ContentKind) -> np.ndarray | None:
        if kind not in self._like.content:
            return None
        shape = (self.manifest.n_titles, self._like.content[kind])
        return self._generator.standard_normal(shape).astype(np.float32)


def _manifest(like: Dataset, users: int, titles: int, cold: int, events: int, values: int) -> Manifest:
    words = tuple(str(value) for value in range(values))

    def vocabularies(names: dict[str, int]) -> tuple[Vocabulary, ...]:
        return tuple(Vocabulary(name=name, values=words) for name in names)

    return Manifest(
        source="stand-in",
        name="stand-in",
        n_users=users,
        n_titles=titles,
        n_events=events,
        n_cold_titles=cold,
        split=Split(kind="time", valid_start=1000 * DAY, test_start=1001 * DAY),
        split_counts={"train": events, "valid": 0, "test": 0},
        categories=Vocabulary(name="category", values=tuple(str(k) for k in range(like.categories))),
        scenarios=vocabularies(like.scenarios),
        contexts=vocabularies(like.contexts),
        user_features=vocabularies(like.user_features),
        intensities=tuple(Intensity(name=name, boundaries=(0.5,)) for name in like.intensities),
    )


def whole_histories(builder: BatchBuilder, requests: int) -> Windows:
    """One window a user: all that the model reads, the last `requests` watches as targets."""
    offsets = builder.dataset.offsets
    last = offsets[1:] - 1
    start = np.maximum(offsets[:-1], last - builder.config.sequences.history)
    return Windows(start, last, np.maximum(start, last - requests + 1))
