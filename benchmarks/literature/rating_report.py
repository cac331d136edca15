"""What the rating task found, as a record a system and as a table beside the published figures."""

from __future__ import annotations

import json
import shlex
import statistics
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.literature.rating_data import World
from benchmarks.literature.rating_network import RatingSystem


def record(system: RatingSystem, results: list[dict[str, float]], world: World) -> dict[str, Any]:
    """Per-fold figures of one system, their mean and standard deviation over folds, and what was published."""
    columns = {key: [result[key] for result in results] for key in ("rmse", "mae", "seconds", "peak_gb")}
    claimed = system.claimed.get(world.name)
    return {
        "name": system.name,
        "title": system.title,
        "folds": columns,
        "mean": {key: statistics.fmean(columns[key]) for key in ("rmse", "mae", "seconds")},
        "std": {key: statistics.pstdev(columns[key]) for key in ("rmse", "mae", "seconds")},
        "peak_gb": max(columns["peak_gb"]),
        "claimed": {name: {"rmse": rmse, "mae": mae} for name, (rmse, mae) in system.claimed.items()},
        "rmse_less_claimed": statistics.fmean(columns["rmse"]) - claimed[0] if claimed else None,
        "protocol": system.protocol,
        "source": system.source,
    }


def _row(row: dict[str, Any], name: str) -> str:
    claimed = row["claimed"].get(name, {"rmse": None, "mae": None})
    published = [f"{claimed[key]:.4f}" if claimed[key] is not None else "–" for key in ("rmse", "mae")]
    difference = f"{row['rmse_less_claimed']:+.4f}" if row["rmse_less_claimed"] is not None else "–"
    own = [f"{row['mean'][key]:.4f} ± {row['std'][key]:.4f}" for key in ("rmse", "mae")]
    cells = [row["title"], own[0], published[0], difference, own[1], published[1]]
    cells += [f"{row['mean']['seconds']:.0f}", f"{row['peak_gb']:.1f}", row["protocol"]]
    return f"| {' | '.join(cells)} |"


def write_report(
    out: Path,
    records: list[dict[str, Any]],
    world: World,
    notes: list[str],
    command: list[str],
    n_folds: int,
    seed: int,
) -> Path:
    """OUT/ratings.json and OUT/ratings.md; returns the latter.

    Args:
        out: the folder.
        records: of `record`.
        world: what was rated.
        notes: on the data, printed above the table.
        command: words of the command that made it.
        n_folds, seed: of the folds.
    """
    about = {
        "data": world.name,
        "ratings": len(world.ratings.user_R),
        "users": world.n_users,
        "titles": world.n_titles,
        "digest": world.digest,
        "folds": n_folds,
        "seed": seed,
        "date": f"{date.today():%Y-%m-%d}",
        "command": shlex.join(command),
        "notes": notes,
    }
    (out / "ratings.json").write_text(json.dumps({"about": about, "systems": records}, indent=1, allow_nan=False))
    lines = [
        f"# Rating prediction on {world.name}",
        "",
        f"{about['ratings']:,} ratings by {world.n_users:,} users, {n_folds} random folds over ratings (seed {seed}), "
        f"the same for every row; predictions clipped to {world.low:g}..{world.high:g}. Mean ± standard deviation over "
        f"folds. {about['date']}, `{about['command']}`.",
        "",
        *(line for note in notes for line in (f"**{note}**", "")),
        "| System | RMSE | published | difference | MAE | published | s a fold | peak GB | protocol |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_row(row, world.name) for row in records),
        "",
        "Sources:",
        "",
        *(f"- {source}" for source in dict.fromkeys(row["source"] for row in records)),
        "",
    ]
    path = out / "ratings.md"
    path.write_text("\n".join(lines))
    return path
