"""`m5 evaluate`: a trained run, further runs and the reference rows on the test split, printed and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from m5.baselines import reference_scorers
from m5.best import read_record
from m5.evaluate import Scorer, evaluate
from m5.evaluation_report import print_report
from m5.predict import Predictor
from m5.schema import DataError


def evaluate_run(
    run: Path,
    json_path: Path | None = None,
    *,
    rows: dict[str, Path] | None = None,
    filter_seen: bool | None = None,
    max_targets: int | None = None,
    references: bool = True,
) -> dict[str, Any]:
    """Test metrics of the checkpoint that validation chose, beside the reference rows; printed and written.

    Args:
        run: folder of `m5 train`.
        json_path: where the JSON goes; RUN/evaluation.json by default.
        rows: further runs on the same dataset, by row name.
        filter_seen: as in `evaluate`; by default as the run's training.filter_seen.
        max_targets: as in `evaluate`.
        references: whether to fit popularity, item-kNN and EASE too (and the oracle where the world has its truth).

    Raises:
        DataError: no checkpoint, a row of another dataset, or `json_path` holds something else than a report.
    """
    run = Path(run)
    target = Path(json_path) if json_path is not None else run / "evaluation.json"
    record = read_record(run)
    notes = _earlier_look(target, record["weights_sha256"])
    predictor = Predictor.load(run)
    scorers: list[Scorer] = [predictor]
    for name, folder in (rows or {}).items():
        other = Predictor.load(folder)
        if other.dataset.manifest.content_hash != predictor.dataset.manifest.content_hash:
            raise DataError(f"{folder} was trained on another dataset than {run}; their rows cannot be compared.")
        other.name = name
        scorers.append(other)
    seen = predictor.config.training.filter_seen if filter_seen is None else filter_seen
    if references:
        found, choices = reference_scorers(predictor.dataset, filter_seen=seen)
        scorers += found
        notes += choices
    report = evaluate(predictor.dataset, scorers, filter_seen=seen, max_targets=max_targets)
    report["checkpoint"] = {key: record[key] for key in ("step", "epoch", "weights_sha256")}
    report["warnings"] += notes
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.writing")
    temporary.write_text(json.dumps(report, indent=1))
    temporary.replace(target)
    print_report(report)
    return report


def _earlier_look(report: Path, weights: str) -> list[str]:
    """A note where the report to be replaced measured other weights: test data are for one checkpoint, once."""
    if not report.is_file():
        return []
    try:
        earlier = json.loads(report.read_text())["checkpoint"]["weights_sha256"]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{report} exists and is no evaluation report; name another file, or remove it.") from None
    if earlier == weights:
        return []
    return [
        f"{report.name} held the test metrics of other weights ({earlier[:12]}): the test split was looked at before."
    ]
