"""Parallelism, applied from outside the model: optimizer in backward -> plan -> DistributedModelParallel.

With `planner_topology`, which knows the planner, the only module that imports `torchrec.distributed`.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from m5.assemble import initial_rows, rows_per_seed
from m5.batch import Batch
from m5.config import ConfigError, RunConfig
from m5.losses import M5Train
from m5.model.m5 import Tower
from m5.planner_topology import Machines, collections, make_planner
from m5.ranks import on_first

EXPERT_TABLES = "experts_"
# Of a device's memory, for the tables; the rest is for the dense part, activations and logits (`m5 plan` counts it).
TABLE_SHARE = 0.6
# Ranks wait in a collective while the first one validates. Hanging is the watchdog's business, not the timeout's.
PATIENCE = timedelta(hours=6)
# For all ranks to come; a machine that never does must not keep the others.
GATHERING = timedelta(minutes=15)


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
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"local rank {local_rank} has no GPU: there are {torch.cuda.device_count()}. Start as many processes "
                "per node as it has GPUs."
            )
        torch.cuda.set_device(target)
    owned = not dist.is_initialized()
    if owned:
        backend = "cpu:gloo,cuda:nccl" if target.type == "cuda" else "gloo"
        if "RANK" in os.environ:
            store, rank, size = next(dist.rendezvous("env://", timeout=GATHERING))
            store = dist.PrefixStore(_name_of_this_start(store, rank, size), store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
        else:
            # A store in memory: no port to choose, no address to find.
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), target)
    finally:
        if owned:
            dist.destroy_process_group()


def _name_of_this_start(store: dist.Store, rank: int, size: int) -> str:
    """A name that these processes, and no earlier ones, know.

    torchrun's store outlives the processes that it restarts, and torch puts no restart into its keys: a new rank would
    read where a dead one had listened (gloo: "connectFullMesh failed"; seen with torch 2.13). The restart count is no
    name: nodes count differently once one of them has restarted for another's sake. So ranks greet the first with a
    number never used before; it welcomes them with theirs and the name, and goes on until all have confirmed that name.
    """
    name, hello = uuid.uuid4().hex, uuid.uuid4().hex
    others = range(1, size)
    deadline = time.monotonic() + GATHERING.total_seconds()
    if rank:
        store.set(f"m5/hello/{rank}", hello)
    while True:
        if rank:
            welcome = json.loads(store.get("m5/welcome")) if store.check(["m5/welcome"]) else {}
            if welcome.get(str(rank)) == hello:
                store.set(f"m5/confirmed/{rank}", welcome["name"])
                return welcome["name"]
        else:
            greetings = {r: store.get(f"m5/hello/{r}").decode() for r in others if store.check([f"m5/hello/{r}"])}
            store.set("m5/welcome", json.dumps({"name": name, **greetings}))
            keys = [f"m5/confirmed/{r}" for r in others]
            if all(store.check([key]) and store.get(key).decode() == name for key in keys):
                return name
        if time.monotonic() > deadline:
            raise RuntimeError(f"rank {rank}: the other ranks have not come within {GATHERING}")
        time.sleep(0.02)


def distribute(model: M5Train, config: RunConfig, world: World) -> DistributedModelParallel:
    """Shard the tables and replicate the rest.

    The tables' optimizer is row-wise Adagrad fused into backward (FBGEMM has no Adam for sharded tables on CPU).

    Raises:
        ConfigError: `sharding.tables` names a table that the model does not have, or the tables do not fit.
    """
    experts = model.model.experts
    apply_optimizer_in_backward(
        RowWiseAdagrad, list(model.model.tables.parameters()), {"lr": config.optimizer.table_lr}
    )
    if experts is not None:
        apply_optimizer_in_backward(RowWiseAdagrad, list(experts.parameters()), {"lr": config.optimizer.expert_lr})
    if config.training.compile:
        # Not the mixture: its loop over the scenario values of a batch would be compiled anew for every number of them.
        for tower in model.model.towers.values():
            assert isinstance(tower, Tower)
            tower.extraction.compile(dynamic=True)
    planner = make_planner(model, this_machine(world), lookups={}, sharding=sharding_types(model, config))
    sharders = [EmbeddingCollectionSharder()]
    try:
        # Not `collective_plan`, which leaves the other ranks waiting where the first one finds no plan.
        plan = on_first(lambda: planner.plan(model, sharders))
    except PlannerError as error:
        raise ConfigError(
            f"TorchRec's planner finds no place for the tables on {world.size} ranks. `m5 plan` says what would fit. "
            f"{str(error).strip().splitlines()[0]}"
        ) from None
    parallel = DistributedModelParallel(model, device=world.device, plan=plan, sharders=sharders)
    _initialise_tables(parallel, config)
    return parallel


def this_machine(world: World) -> Machines:
    """What the planner must know of the machine that this process runs on."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if world.device.type == "cuda":
        memory = torch.cuda.get_device_properties(world.device).total_memory
    else:
        memory = psutil.virtual_memory().total // local_ranks
    return Machines(
        world_size=world.size,
        local_ranks=local_ranks,
        device=world.device.type,
        table_memory=int(TABLE_SHARE * memory),
    )


def sharding_types(model: nn.Module, config: RunConfig) -> dict[str, list[str]]:
    """Sharding types that the settings prescribe, by table; tables that are left to the device's default are absent.

    Raises:
        ConfigError: a setting names a table that the model does not have.
    """
    tables = [table.name for collection in collections(model) for table in collection.embedding_configs()]
    if unknown := sorted(set(config.sharding.tables) - set(tables)):
        raise ConfigError(f"sharding.tables: there is no table {', '.join(unknown)}. Tables: {', '.join(tables)}.")
    chosen: dict[str, list[str]] = {}
    if config.sharding.default != "auto":
        chosen = {name: [config.sharding.default] for name in tables}
    return chosen | {name: [kind] for name, kind in config.sharding.tables.items()}


def pipelined(
    model: DistributedModelParallel,
    optimizer: Any,
    device: torch.device,
    backward: Callable[[Tensor, Batch], None],
) -> TrainPipelineSparseDist:
    """TorchRec's pipeline: while one batch is computed, the next is distributed and the one after it copied.

    Args:
        optimizer: what the pipeline calls `zero_grad` and `step` of.
        backward: takes the loss and its batch, in place of `loss.backward()`.
    """

    class Pipeline(TrainPipelineSparseDist):
        def _backward(self, losses: Tensor) -> None:
            backward(losses, self.batches[0])

    return Pipeline(model, optimizer, device, execute_all_batches=True)


def table_name(key: str) -> str:
    """Name of a table, from its key in a state dict."""
    return key.removesuffix(".weight").rsplit(".", 1)[-1]


def _initialise_tables(parallel: DistributedModelParallel, config: RunConfig) -> None:
    """Give every local shard the values that its rows have in the whole table (see `initial_rows`)."""
    bare = parallel.module.model
    expert = (config.model.mixing_width, *bare.expert_shape)
    for key, value in parallel.state_dict().items():
        if not isinstance(value, ShardedTensor):
            continue
        name = table_name(key)
        for shard in value.local_shards():
            first, column = shard.metadata.shard_offsets
            rows, width = shard.metadata.shard_sizes
            # Block by block: a shard may fill most of the memory.
            step = rows_per_seed(value.size(1))
            for block in range(0, rows, step):
                count = min(step, rows - block)
                values = initial_rows(
                    name,
                    first + block,
                    count,
                    value.size(1),
                    seed=config.seed,
                    expert=expert if name.startswith(EXPERT_TABLES) else None,
                )
                shard.tensor[block : block + count].copy_(values[:, column : column + width])


def dense_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that the dense optimizer owns: all that are trained but the sharded tables."""
    tables = {key for key, value in model.state_dict().items() if isinstance(value, ShardedTensor)}
    return {name: value for name, value in model.named_parameters() if name not in tables and value.requires_grad}


def fused_optimizer(model: nn.Module) -> Any | None:
    """The sharded tables' optimizer, which steps inside backward; None where no table is sharded."""
    return model.fused_optimizer if isinstance(model, DistributedModelParallel) else None


def whole_state(parallel: nn.Module, device: torch.device, prefix: str = "model.") -> dict[str, Tensor]:
    """Weights with every table gathered; filled on rank 0, empty elsewhere (a collective call).

    Args:
        prefix: of the names to take, cut off; by default the bare model, "" for the model with its loss.
    """
    state: dict[str, Tensor] = {}
    first = dist.get_rank() == 0
    for key, value in parallel.state_dict().items():
        if isinstance(value, ShardedTensor):
            whole = torch.empty(value.size(), device=device) if first else None
            value.gather(dst=0, out=whole)
            value = whole
        if first and key.startswith(prefix):
            state[key.removeprefix(prefix)] = value.detach()
    return state


def training_state(
    parallel: nn.Module, optimizer: torch.optim.Optimizer, dense: dict[str, nn.Parameter]
) -> dict[str, Any]:
    """Everything that a step changes, by name: tables and their optimizers' sums (sharded), dense weights and moments.

    The tensors are the live ones: what is copied into them is trained on.

    Args:
        optimizer: of the dense part; its empty state is filled with the zeros that its first step would begin with.
        dense: its parameters by name.
    """
    state: dict[str, Any] = {f"weights.{key}": value for key, value in parallel.state_dict().items()}
    fused = fused_optimizer(parallel)
    for key, sums in fused.state_dict()["state"].items() if fused is not None else ():
        # The name of a sum repeats the table's: `title.momentum_1`.
        state |= {f"table_optimizer.{key}.{name.rsplit('.', 1)[-1]}": value for name, value in sums.items()}
    for name, parameter in dense.items():
        moments = optimizer.state[parameter]
        if not moments:
            moments["step"] = torch.zeros((), device=parameter.device)
            moments["exp_avg"], moments["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state |= {f"optimizer.{name}.{moment}": value for moment, value in moments.items()}
    return state


def sum_over_ranks(value: float, device: torch.device) -> float:
    """Sum of a number over all ranks (a collective call)."""
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return float(total)
