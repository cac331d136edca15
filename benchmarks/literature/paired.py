"""M5 beside each system on the same requests: paired tests over viewers of the difference in NDCG@10, by slice.

A difference is clear where its bootstrap interval does not hold 0 and a randomisation test agrees (`m5.report_compare`
has both, and says why): u viewers who all agree give no p below 2^-u, so fewer than six are never clear.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from m5.metrics import bootstrap_intervals, gains
from m5.report_compare import ROUNDING, random_sign_sums, user_groups
from m5.schema import DataError

SAMPLES = 1_000
TAIL = 0.025  # of each side, as the interval has
REQUESTS = "requests.npz"


def against_m5(folder: Path, names: list[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """System -> slice -> {"difference", "low", "high", "better"}: M5's NDCG@10 less the system's, 95% interval.

    A request's gain is the mean over the seeds, so the interval is on viewers, given these trainings. `better` is "m5",
    the system, or None where it is not clear. Of a single viewer there is no interval: `low` and `high` are None.

    Args:
        folder: of the ranks, NAME.npz each, and of requests.npz.
        names: of the systems, without M5.

    Raises:
        DataError: as of `refuse_other_requests`.
    """
    refuse_other_requests(folder, ["m5", *names])
    user_R, slices = _requests(folder)
    own_R = _gain(folder / "m5.npz")
    return {
        name: {
            part: _beside(own_R[rows] - gain_R[rows], user_R[rows], name) for part, rows in slices.items() if len(rows)
        }
        for name in names
        for gain_R in (_gain(folder / f"{name}.npz"),)
    }


def viewers(folder: Path) -> dict[str, int]:
    """Slice -> how many viewers its requests are of."""
    user_R, slices = _requests(folder)
    return {part: len(np.unique(user_R[rows])) for part, rows in slices.items() if len(rows)}


def refuse_other_requests(folder: Path, names: list[str]) -> None:
    """Raises DataError where a system was ranked on other requests than requests.npz holds, or a file is missing."""
    if not names:
        return
    remedy = f"Remove {folder / REQUESTS} and the system's .json, and the same command makes them again."
    asked = _which(folder / REQUESTS, remedy)
    for name in names:
        path = folder / f"{name}.npz"
        ranked = _which(path, remedy)
        if not all(np.array_equal(*both) for both in zip(asked, ranked, strict=True)):
            raise DataError(f"{path} holds the ranks of other requests than {folder / REQUESTS}. {remedy}")


def _which(path: Path, remedy: str) -> tuple[np.ndarray, np.ndarray]:
    """Users and events that a file says its requests are of."""
    try:
        with np.load(path) as archive:
            return archive["user"], archive["event"]
    except FileNotFoundError:
        raise DataError(f"{path} is missing. {remedy}") from None
    except Exception:  # a damaged zip raises what it likes
        raise DataError(f"{path} is damaged, or of an earlier version. {remedy}") from None


def _requests(folder: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """int64 [R] users, and the slices' rows."""
    with np.load(folder / REQUESTS) as archive:
        slices = {key.partition("/")[2]: archive[key] for key in archive.files if "/" in key}
        return archive["user"], slices


def _beside(difference: np.ndarray, user: np.ndarray, name: str) -> dict[str, Any]:
    """float64 [R] and int64 [R] of one slice -> its entry."""
    mean = float(difference.mean())
    if len(np.unique(user)) < 2:
        return {"difference": mean, "low": None, "high": None, "better": None}
    low, high = bootstrap_intervals({"": difference}, user, samples=SAMPLES, seed=0)[""]
    generator = np.random.default_rng(0)
    sums = random_sign_sums(difference, user_groups(user, generator), SAMPLES, generator)
    total = difference.sum()
    reached = (sums >= total - ROUNDING).sum(), (sums <= total + ROUNDING).sum()
    p_better, p_worse = ((1 + int(count)) / (SAMPLES + 1) for count in reached)
    better = "m5" if low > 0 and p_better <= TAIL else name if high < 0 and p_worse <= TAIL else None
    return {"difference": mean, "low": low, "high": high, "better": better}


def _gain(path: Path) -> np.ndarray:
    """float64 [R]."""
    with np.load(path) as archive:
        return gains(archive["rank_SR"].astype(np.float64), 10).mean(0)
