"""M5 beside each system on the same requests: paired bootstrap over viewers of the difference in NDCG@10, by slice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from m5.metrics import bootstrap_intervals, gains

SAMPLES = 1_000


def against_m5(folder: Path, names: list[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """System -> slice -> {"difference", "low", "high", "better"}: M5's NDCG@10 less the system's, 95% interval.

    A request's gain is the mean over the seeds, so the interval is on viewers, given these trainings. `better` is "m5",
    the system, or None where the interval holds 0.

    Args:
        folder: of the ranks, NAME.npz each, and of requests.npz.
        names: of the systems, without M5.
    """
    with np.load(folder / "requests.npz") as archive:
        user_R = archive["user"]
        slices = {key.partition("/")[2]: archive[key] for key in archive.files if key != "user"}
    own_R = _gain(folder / "m5.npz")
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name in names:
        difference_R = own_R - _gain(folder / f"{name}.npz")
        found[name] = {}
        for part, rows in slices.items():
            if not len(rows):
                continue
            value = {"ndcg@10": difference_R[rows]}
            low, high = bootstrap_intervals(value, user_R[rows], samples=SAMPLES, seed=0)["ndcg@10"]
            better = "m5" if low > 0 else name if high < 0 else None
            mean = float(difference_R[rows].mean())
            found[name][part] = {"difference": mean, "low": low, "high": high, "better": better}
    return found


def _gain(path: Path) -> np.ndarray:
    """float64 [R]."""
    with np.load(path) as archive:
        return gains(archive["rank_SR"].astype(np.float64), 10).mean(0)
