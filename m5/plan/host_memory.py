"""What a rank's process holds of the dataset: the columns that it has changed, and an epoch's order.

Measured: the real `BatchBuilder` and `Loader` run over a stand-in with fewer viewers of the same histories, and what
they hold is proportional to the viewers. Event arrays are memory-mapped and shared by the ranks of a node; the system
keeps of them what it has room for, so they are told beside, not counted.
"""

from __future__ import annotations

import tracemalloc
from dataclasses import dataclass

import numpy as np

from m5.config import RunConfig
from m5.data.loader import Loader
from m5.data.sequences import BatchBuilder
from m5.plan.description import Dataset
from m5.plan.stand_in import StandIn

PROBE_EVENTS = 200_000
# Text of 12 characters, as ids have, measured: 73 bytes a value of a vocabulary, 72 a user
STRING = 73


@dataclass(frozen=True)
class HostMemory:
    """Bytes of one rank's process.

    Attributes:
        resident: columns of events and users, as long as the run lasts.
        words: vocabularies and ids, which are text, as long as the run lasts.
        order: most that is held besides while an epoch's order is made.
        mapped: the event arrays on disk, per node.
    """

    resident: float
    words: float
    order: float
    mapped: float


def host_memory(dataset: Dataset, config: RunConfig) -> HostMemory:
    """Measure on the stand-in and scale up. Histories are taken as exponential around their mean, up to the longest."""
    generator = np.random.default_rng(0)
    users = max(20, min(dataset.users, int(PROBE_EVENTS / dataset.mean_history)))
    lengths = np.minimum(np.ceil(generator.exponential(dataset.mean_history, users)), dataset.longest_history)
    stand_in = StandIn(dataset, lengths=lengths.astype(np.int64), titles=100, cold=0, values=1)
    # A batch is a view of a few windows; with fewer batches than that there would be none to measure.
    tracemalloc.start()
    try:
        builder = BatchBuilder(stand_in, config)
        resident = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        loader = Loader(builder, seed=0, epoch=0)
        peak = tracemalloc.get_traced_memory()[1]
        assert len(loader) > 0
    finally:
        tracemalloc.stop()
    scale = dataset.events / int(lengths.sum())
    ids = dataset.users + dataset.titles
    values = sum(sum(sizes.values()) for sizes in (dataset.user_features, dataset.scenarios, dataset.contexts))
    # offsets and the users' columns of the prepared dataset itself
    tables = 8 * dataset.users + 4 * dataset.users * len(dataset.user_features)
    columns = 4 + 8 + 1 + 4 * (len(dataset.intensities) + len(dataset.scenarios) + len(dataset.contexts))
    return HostMemory(
        resident=resident * scale + tables,
        words=float(STRING * (ids + values)),
        order=(peak - resident) * scale,
        mapped=float(columns * dataset.events),
    )
