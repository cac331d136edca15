"""Memory of a rank and of a node in training, item by item."""

from __future__ import annotations

import math
from dataclasses import dataclass

from m5.assemble import Inputs
from m5.config import RunConfig
from m5.eligibility import CPU_ELEMENTS, GPU_ELEMENTS
from m5.losses import chunk_rows
from m5.model.m5 import M5
from m5.model.multi_modal_embedding import SPECIAL_ROWS
from m5.plan.description import GB, Cluster, Dataset
from m5.plan.host_memory import HostMemory
from m5.plan.load import Load
from m5.plan.step_memory import StepMemory
from m5.planner_topology import Placement

# Batches on a GPU at a time with TorchRec's pipeline: one computed, one distributed, one copied.
PIPELINED = 3
# Host memory of a process that trains on a GPU: libraries, CUDA's host side, NCCL. An assumption.
GPU_PROCESS = 4 * GB


@dataclass(frozen=True)
class Item:
    """One line of the account; bytes, and in a few words what it depends on."""

    what: str
    bytes: float
    why: str = ""


def table_items(placements: list[Placement], cluster: Cluster) -> list[Item]:
    """Weights and optimizer of the rank that holds most; on a CPU also the checkpoint's copy, which is as large."""
    world_size = cluster.world_size
    weights, optimizer = [0] * world_size, [0] * world_size
    for placement in placements:
        for shard in placement.shards:
            weights[shard.rank] += shard.bytes
            optimizer[shard.rank] += shard.optimizer_bytes
    fullest = max(range(world_size), key=lambda rank: weights[rank] + optimizer[rank])
    items = [
        Item("embedding tables", weights[fullest], f"of rank {fullest}, which holds most"),
        Item("their optimizer", optimizer[fullest], "row-wise Adagrad: 4 bytes a row"),
    ]
    if cluster.device == "cpu":
        copy = weights[fullest] + optimizer[fullest]
        items.append(Item("checkpoint: copy of tables", copy, "with their optimizer, from the first one on"))
    return items


def dense_sizes(model: M5) -> list[int]:
    """Number of weights of every trained parameter outside the sharded tables."""
    tables = {id(p) for part in (model.tables, model.experts) if part is not None for p in part.parameters()}
    return [parameter.numel() for parameter in model.parameters() if id(parameter) not in tables]


def checkpoint_copy(placements: list[Placement], rank: int, dense: list[int]) -> list[int]:
    """Bytes of every tensor of which a rank keeps a copy for checkpoints (`m5.parallel.training_state`).

    Args:
        dense: number of weights of every dense parameter, which each rank copies whole, with two moments and a count.
    """
    shards = [shard for placement in placements for shard in placement.shards if shard.rank == rank]
    sharded = [number for shard in shards for number in (shard.bytes, shard.optimizer_bytes)]
    return sharded + [number for weights in dense for number in (4 * weights, 4 * weights, 4 * weights, 4)]


def pinned(sizes: list[int]) -> int:
    """What torch takes of page-locked memory for tensors of these bytes: powers of two."""
    return sum(1 << (size - 1).bit_length() for size in sizes if size)


def checkpoint_item(cluster: Cluster, placements: list[Placement], dense: list[int]) -> Item:
    """Page-locked copies of the node of GPUs that needs most for them."""
    nodes = [
        range(first, first + cluster.ranks_per_node) for first in range(0, cluster.world_size, cluster.ranks_per_node)
    ]
    copies = [[checkpoint_copy(placements, rank, dense) for rank in ranks] for ranks in nodes]
    taken, exact = max((sum(map(pinned, node)), sum(map(sum, node))) for node in copies)
    why = f"page-locked, from the first one on; {exact / GB:.3g} GB in blocks of powers of two"
    return Item("checkpoint: copy", taken, why)


def fixed_items(cluster: Cluster, dataset: Dataset, inputs: Inputs, dense: int) -> list[Item]:
    """What does not depend on the batch, tables left out."""
    content = 0 if inputs.content_NG is None else 4 * (dataset.titles + SPECIAL_ROWS) * inputs.content_NG.shape[1]
    rights = 0
    if dataset.rights is not None:
        combinations = math.prod(dataset.scenarios[name] + 1 for name in dataset.rights)
        rights = 2 * 4 * dataset.rights_windows * combinations * dataset.titles
    items = [
        Item("dense weights", 4 * dense),
        Item("dense gradients", 4 * dense, "they lie in the buckets of data parallelism"),
        Item("AdamW moments", 8 * dense),
        Item("content vectors", content, "frozen, on every rank"),
        Item("rights", rights, "windows by title and region, plan, ..."),
        Item("framework", cluster.figure("allowance") * GB, "allowance"),
    ]
    if cluster.device == "cpu":
        items.append(Item("checkpoint: copy of dense part", 12 * dense, "weights and moments, from the first one on"))
    return [item for item in items if item.bytes]


def step_items(
    cluster: Cluster, dataset: Dataset, config: RunConfig, load: Load, step: StepMemory, rows_exchanged: int
) -> list[Item]:
    """What a step holds besides, at its peak.

    Args:
        rows_exchanged: bytes of the table rows that a rank looks up for others (and gets from them).
    """
    on_gpu = cluster.device == "cuda"
    held = step(load.sizes)
    copies = PIPELINED if on_gpu else config.sequences.prefetch + 2
    kept, working = loss_bytes(cluster, dataset, config, load)
    return [
        Item("input batches", copies * held.batch, f"{copies} at a time"),
        Item("activations", held.kept, "kept for the backward pass"),
        Item("loss", kept, "gathered queries, gradients of queries and keys"),
        Item("working memory", max(held.peak - held.kept, working), "the larger of backward and a chunk of logits"),
        Item("exchange of rows", rows_exchanged, "buffers of the all-to-all"),
    ]


def loss_bytes(cluster: Cluster, dataset: Dataset, config: RunConfig, load: Load) -> tuple[float, float]:
    """What the candidate softmax holds throughout, and what one chunk of its logits needs besides (`m5.losses`)."""
    branches = 2 if config.model.content else 1
    G, C, P = load.everywhere, load.negatives, load.sizes.requests
    Q = config.model.width * branches
    # The products' operands are copied where they are not float32; `auto` takes bfloat16 where it is native.
    narrow = 0 if config.candidates.precision == "float32" else 2
    gathered = 4 * G * (Q + 1) + 8 * G * load.facts
    partial = 2 * 4 * G * Q if cluster.world_size > 1 else 4 * G * Q
    key_gradients = (4 + 4 + narrow) * C * Q
    # Gradients of query, target's key and candidates' keys: kept, then scaled by the gradient of the loss.
    gradients = 2 * 4 * (2 * P + C) * Q
    on_gpu = cluster.device == "cuda"
    rows = min(G, chunk_rows(C, on_cpu=not on_gpu))
    working = rows * C * (4 + narrow)
    if dataset.rights is not None:
        # The mask of the whole catalogue and of the slice, its inverse; and in a block of it an int32 and two bytes.
        block = min(rows * dataset.titles, GPU_ELEMENTS if on_gpu else CPU_ELEMENTS)
        working += rows * (dataset.titles + 2 * C) + 6 * block
    return gathered + partial + key_gradients + gradients, working


def validation_items(fixed: list[Item], step: list[Item], whole: int, dense: int) -> list[Item]:
    """The first rank's unsharded copy, with which validation scores, and the weights gathered to fill it.

    They are gathered between steps, into what a step has freed.

    Args:
        fixed, step: the account without them.
        whole: bytes of all tables.
        dense: dense parameters.
    """
    content = sum(item.bytes for item in fixed if item.what == "content vectors")
    return [
        Item("validation: unsharded copy", whole + 4 * dense + content, "first rank only"),
        Item("validation: gathered tables", max(0.0, whole - total(step)), "beyond what a step has freed"),
    ]


def host_items(cluster: Cluster, config: RunConfig, host: HostMemory, batch: float, whole: int) -> list[Item]:
    """A node of GPUs: what its processes hold in the host's memory, the checkpoint's copy left out.

    On a CPU this is part of the ranks' account.

    Args:
        batch: bytes of one.
        whole: bytes of all tables, which the first rank copies to the host when it makes or saves the unsharded model.
    """
    ranks = cluster.ranks_per_node
    return [
        Item("processes", ranks * GPU_PROCESS, f"{ranks} ranks, allowance"),
        Item("dataset", ranks * host.resident, "columns of events and users, once a rank"),
        Item("vocabularies and ids", ranks * host.words, "as text, once a rank"),
        Item("order of an epoch", ranks * host.order, "once a rank, while it is made"),
        Item("batches ahead", ranks * (config.sequences.prefetch + 2) * batch),
        Item("validation: unsharded copy", whole, "first node only"),
    ]


def dataset_items(host: HostMemory) -> list[Item]:
    """The dataset's part of a CPU rank."""
    return [
        Item("dataset", host.resident, "columns of events and users"),
        Item("vocabularies and ids", host.words, "as text"),
        Item("order of an epoch", host.order, "while it is made"),
    ]


def total(items: list[Item]) -> float:
    return sum(item.bytes for item in items)
