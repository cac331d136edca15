"""The printed plan and its JSON."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from m5.config import ConfigError, RunConfig
from m5.plan.description import Cluster, Dataset, described, read_description
from m5.plan.memory import Item, total
from m5.plan.plan import Plan, make_plan
from m5.planner_topology import Placement
from m5.schema import PreparedDataset

UNITS = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


def size(number: float) -> str:
    """Bytes with three digits and a decimal unit."""
    for unit, name in UNITS:
        if number >= unit:
            return f"{number / unit:.3g} {name}" if number < 999.5 * unit else f"{number / unit:,.0f} {name}"
    return f"{number:.0f} B"


def read_cluster(path: Path | None, hardware: str | None, nodes: int | None, ranks_per_node: int | None) -> Cluster:
    """A described cluster, or one of known hardware.

    Raises:
        ConfigError: the description does not fit, or both a file and its figures were given.
    """
    given = {"nodes": nodes, "ranks_per_node": ranks_per_node}
    given_names = {name: value for name, value in given.items() if value is not None}
    if path is None:
        return described(Cluster, {"hardware": hardware, **given_names}, f"--hardware {hardware}")
    if given_names:
        raise ConfigError(
            f"{' and '.join(given_names)} are part of {path}; give --nodes and --ranks-per-node with --hardware."
        )
    return read_description(Cluster, path)


def read_dataset(path: Path) -> Dataset:
    """A description in YAML, or that of a prepared dataset's folder."""
    return Dataset.of(PreparedDataset(path)) if path.is_dir() else read_description(Dataset, path)


def report(cluster: Cluster, dataset: Dataset, config: RunConfig, json_file: Path | None) -> int:
    """Print the plan; 0 where it fits, 1 where it does not."""
    plan = make_plan(cluster, dataset, config)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(record(cluster, dataset, config, plan), indent=1))
    console = Console()
    console.print(
        f"{cluster.nodes} x {cluster.ranks_per_node} ranks of {cluster.hardware}; {dataset.users:,} users, "
        f"{dataset.titles:,} titles, {dataset.events:,} events; preset {config.preset}",
        highlight=False,
    )
    for table in tables(cluster, plan):
        console.print(table)
    console.print(summary(cluster, plan), highlight=False, markup=False)
    return 0 if plan.fits else 1


def record(cluster: Cluster, dataset: Dataset, config: RunConfig, plan: Plan) -> dict:
    """Everything that the plan says, what it was made from, and by which versions."""
    settings = config.model_dump(mode="json", exclude={"data", "out"})
    return {
        "cluster": cluster.model_dump(),
        "dataset": dataset.model_dump(),
        "config": settings,
        "versions": {name: version(name) for name in ("torch", "torchrec")},
        "rank_bytes": total(plan.rank),
        "host_bytes": total(plan.host),
        **plan.record(),
    }


def tables(cluster: Cluster, plan: Plan) -> list[Table]:
    parts = [_placements(plan.placements)] if plan.placements else []
    owner = "GPU" if cluster.device == "cuda" else "CPU rank"
    parts.append(_account(f"Memory of a {owner}", plan.rank, plan.rank_room))
    if plan.host:
        parts.append(_account("Host memory of a node", plan.host, plan.host_room))
    if plan.traffic:
        parts.append(_traffic(plan))
    return parts


def _placements(placements: list[Placement]) -> Table:
    table = Table(title="Tables", title_justify="left", box=None, pad_edge=False)
    for heading, justify in (
        ("table", "left"),
        ("rows x width", "right"),
        ("sharding", "left"),
        ("kernel", "left"),
        ("ranks", "right"),
        ("a rank's shard", "right"),
        ("with optimizer", "right"),
    ):
        table.add_column(heading, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for placement in placements:
        largest = max(placement.shards, key=lambda shard: shard.bytes)
        ranks = sorted({shard.rank for shard in placement.shards if shard.rows})
        table.add_row(
            placement.table,
            f"{placement.rows:,} x {placement.width}",
            placement.sharding,
            placement.kernel,
            str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}",
            f"{largest.rows:,} x {largest.width}",
            size(largest.bytes + largest.optimizer_bytes),
        )
    return table


def _account(title: str, items: list[Item], room: float) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, show_footer=True)
    table.add_column("", footer="total")
    table.add_column("", justify="right", footer=size(total(items)), no_wrap=True)
    table.add_column("", footer=f"of {size(room)} usable")
    for item in items:
        table.add_row(item.what, size(item.bytes), item.why)
    return table


def _traffic(plan: Plan) -> Table:
    parts = plan.traffic
    table = Table(
        title="Sent by a rank in a step of full sequences",
        title_justify="left",
        box=None,
        pad_edge=False,
        show_footer=True,
    )
    table.add_column("", footer="total")
    table.add_column("", justify="right", footer=size(sum(part.bytes for part in parts)), no_wrap=True)
    table.add_column("at least", justify="right", footer=f"{1000 * sum(part.seconds for part in parts):.3f} ms")
    for part in parts:
        table.add_row(part.kind, size(part.bytes), f"{1000 * part.seconds:.3f} ms")
    return table


def summary(cluster: Cluster, plan: Plan) -> str:
    lines = [
        f"\nAn epoch has about {plan.steps:,} steps of {plan.sequences} sequences; an average sequence makes "
        f"{plan.fill:.0%} of the requests of a full one. A rank computes some {plan.operations / 1e9:,.3g} GFLOP in a "
        "step of full sequences (matrix products, forward and backward).",
    ]
    if plan.host:
        lines.append(
            f"The event arrays, {size(plan.mapped)} on every node's disk, are mapped into memory as far as "
            "there is room."
        )
    if plan.tables_fit and plan.largest:
        lines.append(f"Largest batch that fits: sequences.sequences={plan.largest}.")
    verdict = "It fits" if plan.fits else "It does not fit"
    lines.append(f"{verdict}, within {cluster.usable:.0%} of the memory. {plan.advice}".rstrip())
    return "\n".join(lines)
