"""`m5 report`: the scenario report card of one trained run, and whether it serves any scenario worse than another run.

RUN/report/report.json holds all numbers; report.md and report.html, which needs no network, show them.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from m5.best import read_record
from m5.evaluate import Evaluation, Scorer, rank_rows
from m5.metrics import gains
from m5.predict import Predictor
from m5.report_compare import LEVEL, compare
from m5.report_model import inner_life
from m5.report_page import page
from m5.report_slices import BOOTSTRAP_SAMPLES, in_order, measure_slices, tenure_slices
from m5.report_text import markdown, print_card
from m5.schema import DataError, PreparedDataset

WORSE = 4  # the exit code; a crash has 1
FILES = ("report.json", "report.md", "report.html")


def report_run(
    run: Path,
    *,
    against: Path | None = None,
    out: Path | None = None,
    filter_seen: bool | None = None,
    max_targets: int | None = None,
    seed: int = 0,
) -> int:
    """Measure the checkpoint that validation chose on the test split; write and print its report card.

    Args:
        run: folder of `m5 train`.
        against: another run on the same dataset.
        out: folder of the report; RUN/report by default.
        filter_seen: as in `evaluate`; by default as the run's training.filter_seen.
        max_targets: as in `evaluate`.
        seed: of the part of the targets, of bootstraps and of the sample whose gates are read.

    Returns:
        The exit code: WORSE where the run serves a slice significantly worse than `against`, else 0.

    Raises:
        ConfigError: a folder is no run.
        DataError: no checkpoint, `against` has another dataset, or `out` is a file or holds something else.
    """
    run = Path(run)
    folder = Path(out) if out is not None else run / "report"
    refuse_foreign(folder)
    predictor = Predictor.load(run)
    record = read_record(run)
    scorers: list[Scorer] = [predictor]
    if against is not None:
        scorers.append(_other(Path(against), run, predictor))
    dataset = predictor.dataset
    seen = predictor.config.training.filter_seen if filter_seen is None else filter_seen
    found = rank_rows(
        dataset,
        scorers,
        filter_seen=seen,
        max_targets=max_targets,
        seed=seed,
        more_slices=lambda requests: tenure_slices(dataset, requests),
    )
    card: dict[str, Any] = {
        "name": predictor.name,
        "run": str(run),
        "dataset": {"name": dataset.manifest.name, "content_hash": dataset.manifest.content_hash},
        "checkpoint": {key: record[key] for key in ("step", "epoch", "weights_sha256")},
        "settings": {"filter_seen": seen, "max_targets": max_targets, "bootstrap": BOOTSTRAP_SAMPLES, "seed": seed},
        "slices": measure_slices(found, found.rows[0], seed=seed),
        "model": inner_life(predictor, found.requests, _with_scenarios(dataset, found), seed=seed),
        "against": _compared(found, Path(against), seed=seed) if against is not None else None,
        "warnings": found.warnings,
    }
    write_card(folder, card)
    print_card(card, folder / "report.html")
    return WORSE if card["against"] is not None and card["against"]["worse"] else 0


def _other(against: Path, run: Path, predictor: Predictor) -> Predictor:
    other = Predictor.load(against)
    if other.dataset.manifest.content_hash != predictor.dataset.manifest.content_hash:
        raise DataError(f"{against} was trained on another dataset than {run}; they cannot be compared.")
    # Rows of an evaluation have different names, and a run may be compared with another one of its name.
    other.name = f"{other.name} of {against}"
    return other


def _with_scenarios(dataset: PreparedDataset, found: Evaluation) -> dict[str, np.ndarray]:
    """Of the slices the whole and the scenario values: what a gate may depend on."""
    dimensions = {vocabulary.name for vocabulary in dataset.manifest.scenarios}
    return {
        name: rows
        for name, rows in found.slices.items()
        if name == "overall" or ("=" in name and name.partition("=")[0] in dimensions)
    }


def _compared(found: Evaluation, against: Path, *, seed: int) -> dict[str, Any]:
    """The second row of the evaluation is the other run's."""
    run, other = (gains(row.rank, 10) for row in found.rows)
    slices = {name: found.slices[name] for name in in_order(found.slices)}
    differences = compare(slices, found.requests.user, run, other, seed=seed)
    return {
        "run": str(against),
        "checkpoint": {"weights_sha256": read_record(against)["weights_sha256"]},
        "level": LEVEL,
        "slices": [asdict(one) for one in differences],
        "worse": [one.name for one in differences if one.worse],
    }


def refuse_foreign(folder: Path) -> None:
    """Raises DataError where a report cannot be written to the folder, or would replace what is none."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"--out {folder} is a file; the report needs a folder.")
    present = [name for name in FILES if (folder / name).exists()]
    if not present:
        return
    try:
        known = "slices" in json.loads((folder / FILES[0]).read_text())
    except (OSError, ValueError, TypeError):
        known = False
    if not known:
        raise DataError(f"{folder / present[0]} exists and is no report card of a run; name another folder by --out.")


def write_card(folder: Path, card: dict[str, Any]) -> None:
    """Each file whole or not at all; the JSON, by which the folder is known as a report's, comes first."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip(FILES, (json.dumps(card, indent=1), markdown(card), page(card)), strict=True):
        temporary = folder / f".{name}.writing"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(folder / name)
