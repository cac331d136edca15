"""Parallelism, applied from outside the model: optimizer in backward -> plan -> DistributedModelParallel.

The only module that imports `torchrec.distributed`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from m5.assemble import initial_rows
from m5.config import ConfigError, RunConfig
from m5.losses import M5Train

EXPERT_TABLES = "experts_"


@dataclass(frozen=True)
class World:
    """This process among the ranks."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0


@contextmanager
def world(device: str) -> Iterator[World]:
    """The process group: torchrun's, or one of a single rank. NCCL on CUDA, gloo on CPU.

    Args:
        device: `auto`, `cpu` or `cuda`.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("training.device=cuda, but torch finds no CUDA device. `m5 doctor` says what it does find.")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    target = torch.device("cuda", local_rank) if device == "cuda" else torch.device("cpu")
    if target.type == "cuda":
        torch.cuda.set_device(target)
    owned = not dist.is_initialized()
    if owned:
        backend = "cpu:gloo,cuda:nccl" if target.type == "cuda" else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timedelta(minutes=30))
        else:
            # A store in memory: no port to choose, no address to find.
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), target)
    finally:
        if owned:
            dist.destroy_process_group()


def distribute(model: M5Train, config: RunConfig, world: World) -> DistributedModelParallel:
    """Shard the tables and replicate the rest.

    The tables' optimizer is row-wise Adagrad fused into backward (FBGEMM has no Adam for sharded tables on CPU). On
    CPU every table is sharded row-wise; on CUDA the planner chooses.
    """
    experts = model.model.experts
    tables = list(model.model.tables.parameters())
    apply_optimizer_in_backward(RowWiseAdagrad, tables, {"lr": config.optimizer.table_lr})
    names = [table.name for table in model.model.tables.embedding_configs()]
    if experts is not None:
        apply_optimizer_in_backward(RowWiseAdagrad, list(experts.parameters()), {"lr": config.optimizer.expert_lr})
        names += [table.name for table in experts.embedding_configs()]
    constraints = None
    if world.device.type == "cpu":
        constraints = {name: ParameterConstraints(sharding_types=["row_wise"]) for name in names}
    sharders = [EmbeddingCollectionSharder()]
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=world.size, local_world_size=_local_ranks(), compute_device=world.device.type),
        constraints=constraints,
    )
    plan = planner.collective_plan(model, sharders, dist.GroupMember.WORLD)
    parallel = DistributedModelParallel(model, device=world.device, plan=plan, sharders=sharders)
    _initialise_tables(parallel, config)
    return parallel


def _local_ranks() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _table_name(key: str) -> str:
    return key.removesuffix(".weight").rsplit(".", 1)[-1]


def _initialise_tables(parallel: DistributedModelParallel, config: RunConfig) -> None:
    """Give every local shard the values that its rows have in the whole table (see `initial_rows`)."""
    bare = parallel.module.model
    expert = (config.model.mixing_width, bare.expert_shape[0])
    for key, value in parallel.state_dict().items():
        if not isinstance(value, ShardedTensor):
            continue
        name = _table_name(key)
        for shard in value.local_shards():
            first, column = shard.metadata.shard_offsets
            rows, width = shard.metadata.shard_sizes
            values = initial_rows(
                name,
                first,
                rows,
                value.size(1),
                seed=config.seed,
                expert=expert if name.startswith(EXPERT_TABLES) else None,
            )
            shard.tensor.copy_(values[:, column : column + width])


def dense_parameters(parallel: DistributedModelParallel) -> dict[str, nn.Parameter]:
    """Parameters that the dense optimizer owns: all but the sharded tables."""
    tables = {key for key, value in parallel.state_dict().items() if isinstance(value, ShardedTensor)}
    return {name: parameter for name, parameter in parallel.named_parameters() if name not in tables}


def whole_state(parallel: DistributedModelParallel, device: torch.device) -> dict[str, Tensor]:
    """The bare model's weights with every table gathered; filled on rank 0, empty elsewhere (a collective call)."""
    state: dict[str, Tensor] = {}
    first = dist.get_rank() == 0
    for key, value in parallel.state_dict().items():
        if isinstance(value, ShardedTensor):
            whole = torch.empty(value.size(), device=device) if first else None
            value.gather(dst=0, out=whole)
            value = whole
        if first and key.startswith("model."):
            state[key.removeprefix("model.")] = value.detach()
    return state


def sum_over_ranks(value: float, device: torch.device) -> float:
    """Sum of a number over all ranks (a collective call)."""
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return float(total)
