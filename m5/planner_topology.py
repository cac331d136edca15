"""TorchRec's planner for machines of given figures: the one place where training and `m5 plan` get it from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torchrec import EmbeddingCollection
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError
from torchrec.distributed.types import ShardingPlan
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

# What is chosen from where the settings say nothing. `data_parallel` has no optimizer fused into backward. Column-wise
# tables are for those who ask: row-wise Adagrad then keeps a sum of squares for every part of a row, so that training
# depends on the cut and a checkpoint fits no other.
SHARDING_TYPES = {"cpu": ("row_wise",), "cuda": ("row_wise", "table_wise")}
ALONE = ("table_wise",)  # one rank has nothing to cut, and row-wise tables would have it reorder all rows all the same
OPTIMIZER_BYTES_PER_ROW = 4  # row-wise Adagrad: one float32 a row of a shard


@dataclass(frozen=True)
class Machines:
    """What the planner must know; memory in bytes a rank, bandwidths in bytes a second (None: TorchRec's guess)."""

    world_size: int
    local_ranks: int
    device: str
    table_memory: int | None = None
    host_memory: int | None = None
    device_bandwidth: float | None = None
    host_bandwidth: float | None = None
    device_to_host: float | None = None
    intra_node: float | None = None
    inter_node: float | None = None

    def topology(self) -> Topology:
        # TorchRec counts bandwidths in bytes a millisecond.
        bandwidths = {
            "hbm_mem_bw": self.device_bandwidth,
            "ddr_mem_bw": self.host_bandwidth,
            "hbm_to_ddr_mem_bw": self.device_to_host,
            "intra_host_bw": self.intra_node,
            "inter_host_bw": self.inter_node,
        }
        on_cpu = self.device == "cpu"
        return Topology(
            world_size=self.world_size,
            compute_device=self.device,
            hbm_cap=None if on_cpu else self.table_memory,
            ddr_cap=self.table_memory if on_cpu else self.host_memory,
            local_world_size=self.local_ranks,
            **{name: value / 1000 for name, value in bandwidths.items() if value},
        )


@dataclass(frozen=True)
class Shard:
    rank: int
    rows: int
    width: int

    @property
    def bytes(self) -> int:
        """Of weights, float32."""
        return 4 * self.rows * self.width

    @property
    def optimizer_bytes(self) -> int:
        return OPTIMIZER_BYTES_PER_ROW * self.rows


@dataclass(frozen=True)
class Placement:
    """Where one table lies."""

    table: str
    rows: int
    width: int
    sharding: str
    kernel: str
    shards: tuple[Shard, ...]


def collections(model: nn.Module) -> list[EmbeddingCollection]:
    return [module for module in model.modules() if isinstance(module, EmbeddingCollection)]


def make_planner(
    model: nn.Module,
    machines: Machines,
    *,
    lookups: Mapping[str, float],
    sharding: Mapping[str, Sequence[str]] | None = None,
) -> EmbeddingShardingPlanner:
    """A planner for the sharded collections of a model (which may be on `meta`).

    All of `machines.table_memory` is for tables: whoever asks has taken off what else needs memory.

    Args:
        lookups: values that a rank looks up in a step, by feature name; a feature that is absent counts as one. They
            weigh communication and computation of the candidate placements.
        sharding: allowed sharding types by table; for tables that are absent SHARDING_TYPES of the device, or ALONE.
    """
    usual = SHARDING_TYPES[machines.device] if machines.world_size > 1 else ALONE
    constraints = {
        table.name: ParameterConstraints(
            sharding_types=list((sharding or {}).get(table.name, usual)),
            compute_kernels=["fused"],
            pooling_factors=[float(lookups.get(name, 1.0)) for name in table.feature_names],
        )
        for collection in collections(model)
        for table in collection.embedding_configs()
    }
    return EmbeddingShardingPlanner(
        topology=machines.topology(),
        # `pooling_factors` are values a batch, not a sample.
        batch_size=1,
        constraints=constraints,
        storage_reservation=FixedPercentageStorageReservation(0.0),
        debug=False,
    )


def place(
    model: nn.Module,
    machines: Machines,
    *,
    lookups: Mapping[str, float],
    sharding: Mapping[str, Sequence[str]] | None = None,
) -> list[Placement] | None:
    """Placement of every table without a process group, or None where the tables do not fit."""
    for collection in collections(model):
        # The planner asks a parameter for its optimizer to count that one's memory; the learning rate is of no matter.
        apply_optimizer_in_backward(RowWiseAdagrad, list(collection.parameters()), {"lr": 0.0})
    planner = make_planner(model, machines, lookups=lookups, sharding=sharding)
    try:
        plan = planner.plan(model, [EmbeddingCollectionSharder()])
    except PlannerError:
        return None
    return placements(plan, model)


def placements(plan: ShardingPlan, model: nn.Module) -> list[Placement]:
    """A sharding plan as plain numbers, in the model's order of tables."""
    by_table = {name: sharding for module in plan.plan.values() for name, sharding in module.items()}  # type: ignore[attr-defined]
    result = []
    for collection in collections(model):
        for table in collection.embedding_configs():
            sharding = by_table[table.name]
            shards = tuple(Shard(shard.placement.rank(), *shard.shard_sizes) for shard in sharding.sharding_spec.shards)
            result.append(
                Placement(
                    table.name,
                    table.num_embeddings,
                    table.embedding_dim,
                    sharding.sharding_type,
                    sharding.compute_kernel,
                    shards,
                )
            )
    return result
