"""Slices of the test requests and every metric in them, for the report card of a run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from m5.evaluate import Evaluation, Ranked, Requests
from m5.metrics import CUTOFFS, bootstrap_intervals, gains, hits, ranking_metrics, reciprocal_ranks, small
from m5.schema import PreparedDataset

TENURE = ((0, 0), (1, 4), (5, 19), (20, 49), (50, 199), (200, None))  # events before the request, both ends included
METRICS = (*(f"{name}@{k}" for name in ("hr", "ndcg") for k in CUTOFFS), "mrr@10", "debiased_hr@10")
BOOTSTRAP_SAMPLES = 1_000


def tenure_slices(dataset: PreparedDataset, requests: Requests) -> dict[str, np.ndarray]:
    """Rows of the requests by how many events their viewer had before: "tenure=0", "tenure=1-4", ...; none empty."""
    before = requests.event - dataset.offsets[requests.user]
    # A dataset may have a scenario dimension of that name.
    taken = any(vocabulary.name == "tenure" for vocabulary in dataset.manifest.scenarios)
    slices = {}
    for low, high in TENURE:
        name = f"{low}+" if high is None else f"{low}-{high}" if high > low else f"{low}"
        rows = np.flatnonzero((before >= low) & (before <= (np.inf if high is None else high)))
        if len(rows):
            slices[f"{'events before' if taken else 'tenure'}={name}"] = rows
    return slices


def grouped(names: Iterable[str]) -> dict[str, list[str]]:
    """Slices by what tells them apart: "overall", "region", ..., "tenure", "title" (warm and cold)."""
    groups: dict[str, list[str]] = {}
    for name in names:
        group = name.partition("=")[0] if "=" in name else "overall" if name == "overall" else "title"
        groups.setdefault(group, []).append(name)
    # Whether a title is new comes last, as it is a matter of titles and not of viewers.
    return {group: groups[group] for group in sorted(groups, key=lambda group: group == "title")}


def in_order(slices: Iterable[str]) -> list[str]:
    """Names of slices, group after group."""
    return [name for names in grouped(slices).values() for name in names]


def measure_slices(found: Evaluation, row: Ranked, *, seed: int) -> dict[str, dict[str, Any]]:
    """Every metric of one row by slice; slices without requests are left out.

    Returns:
        name -> {"n": requests, "users", "small": few requests or users, the METRICS, "coverage@10", "ci": 95%
        intervals of the METRICS}.
    """
    assert row.shown is not None, "select_requests leaves at least one request"
    measured = {}
    for name in in_order(found.slices):
        rows = found.slices[name]
        if not len(rows):
            continue
        rank, weight, user = row.rank[rows], found.weight[rows], found.requests.user[rows]
        metrics, users = ranking_metrics(rank, weight), len(np.unique(user))
        measured[name] = {
            "n": len(rows),
            "users": users,
            "small": small(len(rows), users),
            **{metric: metrics[metric] for metric in METRICS},
            "coverage@10": row.shown.coverage(name)["coverage@10"],
            "ci": _intervals(rank, weight, user, seed=seed),
        }
    return measured


def _intervals(rank: np.ndarray, weight: np.ndarray, user: np.ndarray, *, seed: int) -> dict[str, tuple[float, float]]:
    """95% intervals of the METRICS, users resampled."""
    values = {f"hr@{k}": hits(rank, k) for k in CUTOFFS} | {f"ndcg@{k}": gains(rank, k) for k in CUTOFFS}
    values["mrr@10"] = reciprocal_ranks(rank, 10)
    # A ratio of sums, sum w h / sum w = q, varies as the mean of q + w (h - q) / mean(w) does, to first order.
    hit = hits(rank, 10)
    ratio = (hit * weight).sum() / weight.sum()
    values["debiased_hr@10"] = ratio + weight * (hit - ratio) / weight.mean()
    intervals = bootstrap_intervals(values, user, samples=BOOTSTRAP_SAMPLES, seed=seed)
    return {name: (max(0.0, low), min(1.0, high)) for name, (low, high) in intervals.items()}
