"""What a search leaves beside its report: trials.parquet, best.yaml, and TensorBoard's HParams."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from m5.config import changed
from tune.objective import Objective
from tune.records import MEMORY, TARGETS_PER_SECOND, Folder, Record, write_whole
from tune.settings import Plan
from tune.summary import Summary


def trials_table(folder: Folder, objective: Objective) -> pd.DataFrame:
    """A row per training, those on several seeds included.

    Columns: name, role, status, seed, attempts, reason (of the last failed attempt), epochs, seconds, the metric,
    targets_per_second, peak_memory_gb, "violation" of a constrained search, every setting of the space by its dotted
    name (missing where its condition does not hold), and the metric by scenario, e.g. "ndcg@10/region=US".
    """
    rows = []
    for record in folder.records.values():
        best = record.best(objective.metric) or {}
        row: dict[str, Any] = {
            "name": record.name,
            "role": record.role,
            "status": record.status,
            "seed": record.seed,
            "attempts": record.attempts,
            "reason": record.reasons[-1] if record.reasons else None,
            "epochs": int(record.history[-1]["epoch"]) + 1 if record.history else 0,
            "seconds": record.seconds,
            **{name: best.get(name) for name in (objective.metric, TARGETS_PER_SECOND, MEMORY)},
        }
        if objective.settings.kind == "constrained":
            row["violation"] = objective.violation(best) if best else None
        row |= {name: ",".join(map(str, v)) if isinstance(v, list) else v for name, v in record.values.items()}
        row |= {name: value for name, value in best.items() if name.startswith(f"{objective.metric}/")}
        rows.append(row)
    return pd.DataFrame(rows).convert_dtypes()


def write_table(path: Path, table: pd.DataFrame) -> None:
    temporary = path.with_name(f".{path.name}.writing")
    # A choice may have values of several types; a column of Parquet has one.
    mixed = [name for name in table if table[name].dtype == object]
    table.astype(dict.fromkeys(mixed, "string")).to_parquet(temporary, index=False)
    os.replace(temporary, path)


def best_preset(plan: Plan, record: Record, summary: Summary, out: Path) -> str:
    """A trial's settings as a preset, which `m5 train --preset` takes as it is."""
    settings = changed({"name": "m5"} | plan.fixed, record.values)
    settings.pop("preset", None)
    best = record.best(summary.metric)
    told = f"validation {summary.metric} {best[summary.metric]:.4f}" if best else "not validated"
    again = ""
    if record is summary.winner and summary.again is not None and summary.preset is not None:
        again = f"# Over seeds: {summary.again}; the preset {summary.preset}.\n"
    preset = plan.base["preset"]
    return (
        f"# Trial {record.name} of {out.name}, which began with preset {preset}; seed {record.seed}: {told}.\n"
        f"{again}#   m5 train --preset THIS_FILE --data DATA --out RUN\n" + yaml.safe_dump(settings, sort_keys=False)
    )


def write_outputs(plan: Plan, objective: Objective, folder: Folder, summary: Summary) -> None:
    """Replace trials.parquet, best.yaml and, of several measures, pareto/NNNN.yaml."""
    write_table(folder.path / "trials.parquet", trials_table(folder, objective))
    best = folder.path / "best.yaml"
    if summary.winner is not None:
        write_whole(best, best_preset(plan, summary.winner, summary, folder.path))
    else:
        best.unlink(missing_ok=True)
    front = folder.path / "pareto"
    kept = {f"{record.name}.yaml" for record in summary.pareto}
    for path in front.glob("*.yaml"):
        if path.name not in kept:
            path.unlink()
    for record in summary.pareto:
        write_whole(front / f"{record.name}.yaml", best_preset(plan, record, summary, folder.path))


def write_hparams(run: Path, record: Record, metric: str) -> None:
    """Tell TensorBoard's HParams of a trial, beside the scalars that its training has written: --logdir DIR/trials."""
    from torch.utils.tensorboard import SummaryWriter

    best = record.best(metric)
    if best is None:
        return
    measures = {f"best/{name}": best[name] for name in (metric, TARGETS_PER_SECOND, MEMORY)}
    values = {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in record.values.items()
    }
    with SummaryWriter(str(run / "tensorboard")) as writer:
        writer.add_hparams(values | {"seed": record.seed}, measures, run_name=".")
