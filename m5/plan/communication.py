"""What ranks send each other in one step, in bytes, and the least time that the described links need for it."""

from __future__ import annotations

from dataclasses import dataclass

from m5.config import RunConfig
from m5.plan.description import GB, Cluster
from m5.plan.load import Load
from m5.planner_topology import Placement

INDEX, FLOAT = 8, 4


@dataclass(frozen=True)
class Traffic:
    """One kind of exchange, per rank and step.

    Attributes:
        bytes: that a rank sends.
        seconds: the least time, by the slower of the two kinds of link; nothing is said of latency.
    """

    kind: str
    bytes: float
    seconds: float


def traffic(
    cluster: Cluster,
    placements: list[Placement],
    features: dict[str, list[str]],
    load: Load,
    dense: int,
    config: RunConfig,
) -> list[Traffic]:
    """All exchanges of a training step.

    Args:
        features: of every table.
        dense: dense parameters.
    """
    values = {p.table: sum(load.lookups[name] for name in features[p.table]) for p in placements}
    # A column-wise shard needs every index and returns its columns of every row.
    indices = INDEX * sum(values[p.table] * (len(p.shards) if p.sharding == "column_wise" else 1) for p in placements)
    rows = FLOAT * sum(values[p.table] * p.width for p in placements)
    query = config.model.width * (2 if config.model.content else 1)
    requests, masked = load.everywhere, load.masked_everywhere
    # With its query a request sends the target's score; its target, time and rights go ahead as whole numbers.
    gathered = FLOAT * (requests * (query + 1) + masked * (config.model.width + 1))
    gathered += INDEX * (requests * load.facts + masked)
    scattered = FLOAT * (requests * query + masked * config.model.width)
    pairs = 2 * FLOAT * (requests + masked)
    return [
        _all_to_all(cluster, "indices to the tables' owners", indices),
        _all_to_all(cluster, "rows back", rows),
        _all_to_all(cluster, "gradients of rows", rows),
        _all_reduce(cluster, "dense gradients, summed", FLOAT * dense),
        _all_gather(cluster, "queries, gathered", gathered),
        _all_to_all(cluster, "gradients of queries, to their owners", scattered),
        _all_gather(cluster, "log-sum-exp: two numbers a request and rank", pairs * cluster.world_size),
    ]


def _seconds(cluster: Cluster, within: float, across: float) -> float:
    """Bytes that a rank sends within its node and to other nodes; the links work at the same time."""
    return max(within / (cluster.figure("intra_node") * GB), across / (cluster.figure("inter_node") * GB))


def _all_to_all(cluster: Cluster, kind: str, size: float) -> Traffic:
    """Every rank sends `size` bytes, an equal part to each rank, itself included."""
    world, local = cluster.world_size, cluster.ranks_per_node
    within, across = size * (local - 1) / world, size * (world - local) / world
    return Traffic(kind, within + across, _seconds(cluster, within, across))


def _all_gather(cluster: Cluster, kind: str, size: float) -> Traffic:
    """Every rank ends with all `size` bytes; what other nodes hold enters a node once, then spreads within."""
    world, local, nodes = cluster.world_size, cluster.ranks_per_node, cluster.nodes
    across = size * (nodes - 1) / nodes / local
    within = size * (local - 1) / local
    return Traffic(kind, size * (world - 1) / world, _seconds(cluster, within, across))


def _all_reduce(cluster: Cluster, kind: str, size: float) -> Traffic:
    """A reduce-scatter and an all-gather of `size` bytes."""
    half = _all_gather(cluster, kind, size)
    return Traffic(kind, 2 * half.bytes, 2 * half.seconds)
