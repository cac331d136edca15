"""`m5 plan`: what training would need on a described cluster, with a described dataset and the settings of a run.

The model is put together without memory (device `meta`), TorchRec's planner places its tables, and everything else is
counted: see `load`, `step_memory`, `memory`, `communication`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch

from m5.assemble import Inputs, assemble
from m5.config import RunConfig
from m5.model.m5 import M5
from m5.parallel import sharding_types
from m5.plan.communication import FLOAT, Traffic, traffic
from m5.plan.description import GB, Cluster, Dataset
from m5.plan.host_memory import host_memory
from m5.plan.load import Load, operations, rank_load
from m5.plan.memory import (
    Item,
    checkpoint_item,
    dataset_items,
    dense_sizes,
    fixed_items,
    host_items,
    step_items,
    table_items,
    total,
    validation_items,
)
from m5.plan.step_memory import StepMemory
from m5.planner_topology import OPTIMIZER_BYTES_PER_ROW, Machines, Placement, collections, place

LARGEST = 2**24  # sequences a batch, beyond which the search for the largest one does not look


@dataclass(frozen=True)
class Plan:
    """The answer; bytes and seconds.

    Attributes:
        fits: a rank's account and a node's host account stay within the usable share of their memory.
        tables_fit: the planner found a placement, beside the smallest batch.
        placements: of the tables; empty where there is none.
        rank: the account of the first rank, which has most; `rank_room` is the usable share of its memory.
        host: the account of a node's host memory (GPUs only), and its usable share.
        mapped: event arrays of a node, which the system keeps in memory as far as there is room.
        sequences, largest: sequences of a batch as asked for, and the most that would fit (0: none would).
        fill: how many requests an average sequence makes, as a share of those of a full one.
        steps: of an epoch.
        traffic: per rank and step, for full sequences.
        operations: per rank and step, for full sequences; a rough count.
        advice: what would fit, where this does not.
    """

    fits: bool
    tables_fit: bool
    placements: list[Placement]
    rank: list[Item]
    rank_room: float
    host: list[Item]
    host_room: float
    mapped: float
    sequences: int
    largest: int
    fill: float
    steps: int
    traffic: list[Traffic]
    operations: float
    advice: str

    def record(self) -> dict:
        return asdict(self)


class Planner:
    """Everything that does not depend on the number of sequences in a batch, worked out once."""

    def __init__(self, cluster: Cluster, dataset: Dataset, config: RunConfig):
        self.cluster, self.dataset, self.config = cluster, dataset, config
        self.inputs: Inputs = dataset.inputs(config)
        with torch.device("meta"):
            self.model: M5 = assemble(self.inputs, config, table_device="meta")
        self.dense_sizes = dense_sizes(self.model)
        if config.model.mlm_weight:
            self.dense_sizes += [config.model.width**2, config.model.width]
        self.dense = sum(self.dense_sizes)
        self.sharding = sharding_types(self.model, config)
        self.features = {
            table.name: table.feature_names
            for collection in collections(self.model)
            for table in collection.embedding_configs()
        }
        self.widths = {
            name: table.embedding_dim
            for collection in collections(self.model)
            for table in collection.embedding_configs()
            for name in table.feature_names
        }
        self.whole = sum(FLOAT * parameter.numel() for c in collections(self.model) for parameter in c.parameters())
        self.step = StepMemory(dataset, config)
        self.host = host_memory(dataset, config)
        self.rank_room = cluster.usable * cluster.memory_per_rank
        self.host_room = cluster.usable * cluster.figure("host_memory") * GB

    def load(self, sequences: int) -> Load:
        config = self.config.model_copy(
            update={"sequences": self.config.sequences.model_copy(update={"sequences": sequences})}
        )
        return rank_load(self.dataset, self.inputs, config, self.cluster.world_size)

    def besides_tables(self, sequences: int) -> list[Item]:
        """The first rank's account without its tables."""
        load, cluster = self.load(sequences), self.cluster
        exchanged = sum(FLOAT * values * self.widths[name] for name, values in load.lookups.items())
        fixed = fixed_items(cluster, self.dataset, self.inputs, self.dense)
        if cluster.device == "cpu":
            fixed += dataset_items(self.host)
        step = step_items(cluster, self.dataset, self.config, load, self.step, exchanged)
        return fixed + step + validation_items(fixed, step, self.whole, self.dense)

    def node(self, placements: list[Placement], sequences: int) -> list[Item]:
        """A node's host memory; empty on CPU ranks, whose account it is part of."""
        if self.cluster.device == "cpu":
            return []
        batch = self.step(self.load(sequences).sizes).batch
        items = host_items(self.cluster, self.config, self.host, batch, self.whole)
        return [*items, checkpoint_item(self.cluster, placements, self.dense_sizes)]

    def table_room(self, sequences: int) -> float:
        """Bytes of a rank that a batch of that size leaves for tables; a CPU rank holds the checkpoint's copy, too."""
        free = self.rank_room - total(self.besides_tables(sequences))
        return free / 2 if self.cluster.device == "cpu" else free

    def placed(self, sequences: int) -> list[Placement] | None:
        """Tables placed in what a batch of that size leaves free."""
        cluster = self.cluster
        free = int(self.table_room(sequences))
        if free <= 0:
            return None
        bandwidths = ("device_bandwidth", "host_bandwidth", "device_to_host", "intra_node", "inter_node")
        machines = Machines(
            world_size=cluster.world_size,
            local_ranks=cluster.ranks_per_node,
            device=cluster.device,
            table_memory=free,
            host_memory=int(self.host_room / cluster.ranks_per_node),
            **{name: cluster.figure(name) * GB for name in bandwidths},
        )
        return place(self.model, machines, lookups={}, sharding=self.sharding)

    def fits(self, placements: list[Placement], sequences: int) -> bool:
        needed = total(table_items(placements, self.cluster)) + total(self.besides_tables(sequences))
        return needed <= self.rank_room and total(self.node(placements, sequences)) <= self.host_room

    def largest(self, placements: list[Placement]) -> int:
        """Most sequences of a batch that fit beside these placements, found by bisection; 0 where none does."""
        if not self.fits(placements, 1):
            return 0
        low, high = 1, 2
        while high < LARGEST and self.fits(placements, high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.fits(placements, middle) else (low, middle)
        return low

    def plan(self) -> Plan:
        config, sequences = self.config, self.config.sequences.sequences
        # Where the batch asked for leaves no room, the tables are placed beside the smallest one.
        placements = self.placed(sequences) or self.placed(1)
        tables = placements or []
        load = self.load(sequences)
        rank = (table_items(tables, self.cluster) if tables else []) + self.besides_tables(sequences)
        largest = self.largest(tables) if tables else 0
        fits = bool(tables) and self.fits(tables, sequences)
        per_epoch = self.dataset.sequences_per_epoch(config)
        share = min(1.0, per_epoch / self.dataset.sequences_per_epoch(self._all_sequences()))
        full = load.everywhere / sequences
        return Plan(
            fits=fits,
            tables_fit=bool(tables),
            placements=tables,
            rank=rank,
            rank_room=self.rank_room,
            host=self.node(tables, sequences),
            host_room=self.host_room,
            mapped=self.host.mapped,
            sequences=sequences,
            largest=largest,
            fill=min(1.0, share * self.dataset.events / per_epoch / full)
            if config.model.attention == "causal"
            else 1.0,
            steps=math.ceil(per_epoch / sequences),
            traffic=traffic(self.cluster, tables, self.features, load, self.dense, config) if tables else [],
            operations=operations(self.model, load, config),
            advice="" if fits else self._advice(tables, largest),
        )

    def _all_sequences(self) -> RunConfig:
        settings = self.config.sequences.model_copy(update={"sequences_per_epoch": None})
        return self.config.model_copy(update={"sequences": settings})

    def _advice(self, placements: list[Placement], largest: int) -> str:
        cluster, host = self.cluster, total(self.node(placements, 1))
        if host > self.host_room:
            return (
                f"A node's host memory is too small: {host / GB:.0f} GB are needed, {self.host_room / GB:.0f} GB are "
                "usable. Most of it is needed once a rank: fewer ranks a node, or machines with more memory."
            )
        if placements and largest:
            return f"A smaller batch fits: sequences.sequences={largest}."
        sizes = [(t.num_embeddings, t.embedding_dim) for c in collections(self.model) for t in c.embedding_configs()]
        needed = sum(rows * (FLOAT * width + OPTIMIZER_BYTES_PER_ROW) for rows, width in sizes)
        besides = self.besides_tables(1)
        free = self.table_room(1)
        validation = sum(item.bytes for item in besides if item.what.startswith("validation"))
        if free <= 0 < self.rank_room - total(besides) + validation:
            return (
                f"Validation scores with an unsharded copy of the model on the first rank: {validation / GB:.1f} GB, "
                f"which leave no room in {self.rank_room / GB:.1f} GB. More ranks do not help; a narrower "
                "model.width would."
            )
        if free <= 0:
            return "One sequence alone does not fit: a shorter sequences.history, a narrower model, or more memory."
        ranks = math.ceil(needed / free)
        copied = ", and as much again for the checkpoint's copy" if cluster.device == "cpu" else ""
        advice = (
            f"Tables and their optimizer need {needed / GB:.1f} GB in all, and a rank has {free / GB:.1f} GB for "
            f"them{copied}: about {ranks} ranks like these hold them row-wise."
        )
        width, step = self.config.model.width, max(4, 2 * self.config.model.heads)
        rows = sum(rows for rows, table_width in sizes if table_width == width)
        others = needed - rows * (FLOAT * width + OPTIMIZER_BYTES_PER_ROW)
        narrow = int((free * cluster.world_size - others) / max(1, rows) - OPTIMIZER_BYTES_PER_ROW) // FLOAT
        narrow = narrow // step * step
        if 0 < narrow < width:
            advice += f" On {cluster.world_size} of them, model.width={narrow} would do."
        return advice


def make_plan(cluster: Cluster, dataset: Dataset, config: RunConfig) -> Plan:
    """Plan a run.

    Raises:
        ConfigError: settings that the dataset's description, or the model, cannot meet.
    """
    return Planner(cluster, dataset, config).plan()
