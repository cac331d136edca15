"""Exact evaluation over the full eligible catalogue, overall, per scenario value, for warm and cold titles.

Every row (M5, references, the oracle) answers the same requests with the same candidates: titles that the viewer may
play at that time and, unless told otherwise, has not watched before. The target itself always is a candidate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from m5.eligibility import Eligibility
from m5.metrics import (
    CUTOFFS,
    SMALL_SLICE,
    bootstrap_intervals,
    gains,
    hits,
    listed_rank,
    propensity_weights,
    ranking_metrics,
    small,
)
from m5.schema import TEST, VALID, DataError, PreparedDataset

CHUNK_ELEMENTS = 2**23  # scores held at a time
BOOTSTRAP_SAMPLES = 500


class Scorer(Protocol):
    """Anything that ranks: `score` may read the user's events before the target and the target's time and scenario."""

    name: str

    def score(self, event_index: np.ndarray) -> Tensor | np.ndarray:
        """int64 [B] places of the target events in `events/*.npy` -> float32 [B, N], higher is better.

        The result is the caller's, who overwrites it.
        """


@dataclass(frozen=True)
class Requests:
    """The requests that all rows answer; arrays of length R."""

    event: np.ndarray
    user: np.ndarray
    target: np.ndarray
    timestamp: np.ndarray
    scenario: np.ndarray
    left_out: int


def select_requests(
    dataset: PreparedDataset,
    split: Literal["valid", "test"],
    *,
    eligibility: Eligibility | None,
    max_targets: int | None = None,
    seed: int = 0,
    within: tuple[str, str] | None = None,
) -> Requests:
    """Events of a split as requests; a target that its viewer may not play is left out for all rows.

    Args:
        within: a scenario's name and value, of which alone the events are taken.

    Raises:
        DataError: the split has no events, or none that its viewer may play.
    """
    wanted = VALID if split == "valid" else TEST
    event, of = np.flatnonzero(np.asarray(dataset.event_array("split")) == wanted), ""
    if within is not None:
        event, of = event[in_scenario(dataset, *within)[event]], f" of {'='.join(within)}"
    if not len(event):
        raise DataError(f"{dataset.folder}: the {split} split has no events{of}, so there is nothing to evaluate.")
    if max_targets is not None and len(event) > max_targets:
        event = np.sort(np.random.default_rng(seed).choice(event, max_targets, replace=False))
    names = [vocabulary.name for vocabulary in dataset.manifest.scenarios]
    scenario = np.stack(
        [np.asarray(dataset.event_array(f"scenario_{name}")[event], dtype=np.int64) for name in names]
        or [np.zeros(len(event), dtype=np.int64)],
        axis=1,
    )
    target = np.asarray(dataset.event_array("title")[event], dtype=np.int64)
    timestamp = np.asarray(dataset.event_array("timestamp")[event], dtype=np.int64)
    keep = np.ones(len(event), dtype=bool)
    if eligibility is not None:
        asked = (torch.from_numpy(values) for values in (scenario, timestamp, target))
        keep = eligibility.allows(*asked).numpy()
    if not keep.any():
        raise DataError(
            f"{dataset.folder}: none of the {len(event):,} {split} targets may be played by its viewer at that time: "
            "there is nothing to evaluate. Compare rights.parquet and the titles' release dates with the events."
        )
    user = dataset.user_of(event)
    return Requests(event[keep], user[keep], target[keep], timestamp[keep], scenario[keep], int(len(keep) - keep.sum()))


def in_scenario(dataset: PreparedDataset, name: str, value: str) -> np.ndarray:
    """bool [T]: events that were watched in a scenario, e.g. region, of this value."""
    vocabulary = next(vocabulary for vocabulary in dataset.manifest.scenarios if vocabulary.name == name)
    return np.asarray(dataset.event_array(f"scenario_{name}")) == vocabulary.index(value)


class Candidates:
    """Which titles a request chooses from, and which were a candidate anywhere in a slice; shared by all rows.

    Args:
        slices: name -> int64 rows of the requests.
        eligibility: None where everything may be played.
        filter_seen: whether titles that the viewer had watched before are left out.
    """

    def __init__(
        self,
        dataset: PreparedDataset,
        requests: Requests,
        slices: dict[str, np.ndarray],
        *,
        eligibility: Eligibility | None,
        filter_seen: bool,
    ):
        self.dataset, self.requests = dataset, requests
        self.eligibility, self.filter_seen = eligibility, filter_seen
        self.member = {name: np.zeros(len(requests.event), dtype=bool) for name in slices}
        for name, rows in slices.items():
            self.member[name][rows] = True
        self.found = {name: np.zeros(dataset.manifest.n_titles, dtype=bool) for name in slices}

    def of(self, rows: np.ndarray) -> Tensor:
        """int64 [B] requests -> bool [B, N]; a target stays a candidate although its viewer has seen it."""
        requests, target_B = self.requests, torch.from_numpy(self.requests.target[rows])
        allowed_BN = torch.ones(len(rows), self.dataset.manifest.n_titles, dtype=torch.bool)
        if self.eligibility is not None:
            allowed_BN = self.eligibility.mask(
                torch.from_numpy(requests.scenario[rows]), torch.from_numpy(requests.timestamp[rows])
            )
        if self.filter_seen:
            row, title = self.dataset.watched_before(requests.event[rows])
            allowed_BN[torch.from_numpy(row), torch.from_numpy(title)] = False
        allowed_BN.scatter_(1, target_B.unsqueeze(-1), True)
        for name, member in self.member.items():
            inside = member[rows]
            if inside.any():
                # NumPy's reduction over rows: torch's `any` takes fifteen times as long.
                self.found[name] |= np.logical_or.reduce(allowed_BN.numpy()[inside], axis=0)
        return allowed_BN


class Shown:
    """Which titles stood in a list of a row, gathered chunk by chunk.

    Args:
        candidates: whose slices are told apart.
        device: where lists are.

    Attributes:
        count: int64 [N + 1], how often each title stood in a list of the shortest cutoff; the last place is no title.
    """

    def __init__(self, candidates: Candidates, device: torch.device):
        self.candidates = candidates
        # One place beyond the catalogue takes what fills up lists that are shorter than the cutoff.
        places = candidates.dataset.manifest.n_titles + 1
        self.listed = {
            (name, k): torch.zeros(places, dtype=torch.bool, device=device)
            for name in candidates.member
            for k in CUTOFFS
        }
        self.count = torch.zeros(places, dtype=torch.int64, device=device)

    def add(self, rows: np.ndarray, top_BK: Tensor) -> None:
        """int64 [B] requests and int64 [B, K] their lists, best first, N where there is no title."""
        self.count += torch.bincount(top_BK[:, : CUTOFFS[0]].flatten(), minlength=len(self.count))
        for name, member in self.candidates.member.items():
            inside = np.flatnonzero(member[rows])
            if not len(inside):
                continue
            lists_BK = top_BK[torch.from_numpy(inside).to(top_BK.device)]
            for k in CUTOFFS:
                self.listed[name, k].index_fill_(0, lists_BK[:, :k].flatten(), True)

    def coverage(self, name: str) -> dict[str, float]:
        """Share of the titles that were a candidate in the slice which stand in one of its lists."""
        eligible = max(1, int(self.candidates.found[name].sum()))
        return {f"coverage@{k}": int(self.listed[name, k][:-1].sum()) / eligible for k in CUTOFFS}


class Ranked:
    """Ranks of the targets in one row, float64 [R], infinite beyond the longest cutoff, and what its lists showed."""

    def __init__(self, scorer: Scorer, candidates: Candidates):
        self.scorer, self.candidates = scorer, candidates
        self.rank = np.empty(len(candidates.requests.event))
        self.shown: Shown | None = None

    def add(self, rows: np.ndarray, allowed_BN: Tensor) -> None:
        """Score and rank some requests, on the device that the scores are on; int64 [B] and bool [B, N].

        Raises:
            DataError: a score is NaN.
        """
        requests, titles = self.candidates.requests, allowed_BN.shape[1]
        score_BN = torch.as_tensor(self.scorer.score(requests.event[rows])).float()
        lowest, highest = score_BN.aminmax()
        if lowest.isnan() or highest.isnan():
            raise DataError(
                f"row '{self.scorer.name}' scored a title with NaN: its weights are damaged. Train it again."
            )
        if lowest == -torch.inf:
            # A row may itself score with -inf; a candidate still ranks before what is none.
            score_BN.clamp_(min=torch.finfo(torch.float32).min)
        score_BN.masked_fill_(~allowed_BN.to(score_BN.device), -torch.inf)
        best = torch.topk(score_BN, min(max(CUTOFFS), titles))
        target_B = torch.from_numpy(requests.target[rows]).to(score_BN.device)
        self.rank[rows] = listed_rank(score_BN, target_B, best.values)
        self.shown = self.shown or Shown(self.candidates, score_BN.device)
        self.shown.add(rows, best.indices.masked_fill(best.values == -torch.inf, titles))


def rank_targets(scorers: list[Scorer], candidates: Candidates) -> list[Ranked]:
    """Score all candidates of every request by every row, chunk by chunk.

    Raises:
        DataError: a score is NaN.
    """
    ranked = [Ranked(scorer, candidates) for scorer in scorers]
    dataset, event = candidates.dataset, candidates.requests.event
    # Requests with like histories go together: a model pads them to the longest.
    order = np.argsort(event - dataset.offsets[dataset.user_of(event)], kind="stable")
    size = max(1, CHUNK_ELEMENTS // dataset.manifest.n_titles)
    for first in range(0, len(order), size):
        rows = order[first : first + size]
        allowed_BN = candidates.of(rows)
        for row in ranked:
            row.add(rows, allowed_BN)
    return ranked


@dataclass(frozen=True)
class Evaluation:
    """Rows ranked on the same requests.

    Attributes:
        requests: that all rows answered.
        slices: name -> int64 rows of the requests: "overall", "region=US", ..., "warm", "cold".
        weight: float64 [R], of `debiased_hr@k`.
        rows: in the order of the scorers.
        warnings: what to tell the reader of the numbers.
    """

    requests: Requests
    slices: dict[str, np.ndarray]
    weight: np.ndarray
    rows: list[Ranked]
    warnings: list[str]

    def measure(self, row: Ranked, *, bootstrap: int, seed: int) -> dict[str, dict[str, Any]]:
        """Metrics of one row by slice; see `evaluate`."""
        assert row.shown is not None, "select_requests leaves at least one request"
        user, rank, weight = self.requests.user, row.rank, self.weight
        return {
            name: _measure(rank[rows], weight[rows], user[rows], bootstrap=bootstrap, seed=seed)
            | row.shown.coverage(name)
            for name, rows in self.slices.items()
        }


def rank_rows(
    dataset: PreparedDataset,
    scorers: list[Scorer],
    *,
    split: Literal["valid", "test"] = "test",
    filter_seen: bool = True,
    max_targets: int | None = None,
    seed: int = 0,
    within: tuple[str, str] | None = None,
    more_slices: Callable[[Requests], dict[str, np.ndarray]] | None = None,
) -> Evaluation:
    """Ranks of every row on the same requests; arguments and errors as of `evaluate`.

    `more_slices` names further rows of the requests.
    """
    names = [scorer.name for scorer in scorers]
    if len(set(names)) < len(names):
        raise DataError(f"two rows of the evaluation have one name: {', '.join(names)}. Train with another name=NAME.")
    eligibility = Eligibility.from_dataset(dataset)
    requests = select_requests(
        dataset, split, eligibility=eligibility, max_targets=max_targets, seed=seed, within=within
    )
    slices = _slices(dataset, requests) | (more_slices(requests) if more_slices is not None else {})
    counts = {name: (len(rows), len(np.unique(requests.user[rows]))) for name, rows in slices.items() if len(rows)}
    warnings = [
        f"{name}: {f'only {count} requests' if count < SMALL_SLICE else f'requests of only {users} users'}; read its "
        "numbers with their intervals."
        for name, (count, users) in counts.items()
        if small(count, users)
    ]
    if requests.left_out:
        warnings.append(f"{requests.left_out} {split} targets were left out: their viewer may not play them.")
    weight = propensity_weights(dataset.titles["train_count"].to_numpy(np.float64), requests.target)
    candidates = Candidates(dataset, requests, slices, eligibility=eligibility, filter_seen=filter_seen)
    return Evaluation(requests, slices, weight, rank_targets(scorers, candidates), warnings)


def evaluate(
    dataset: PreparedDataset,
    scorers: list[Scorer],
    *,
    split: Literal["valid", "test"] = "test",
    filter_seen: bool = True,
    max_targets: int | None = None,
    bootstrap: int = BOOTSTRAP_SAMPLES,
    seed: int = 0,
    within: tuple[str, str] | None = None,
) -> dict[str, Any]:
    """Metrics of every row on the same requests.

    Args:
        dataset: prepared dataset.
        scorers: the rows.
        split: whose events are the targets.
        filter_seen: leave titles out that the viewer had watched before.
        max_targets: a random part of the targets, fixed by the seed; none: all.
        bootstrap: samples of the confidence intervals of hr@10 and ndcg@10; 0: no intervals.
        within: a scenario's name and value, of which alone the requests are taken.

    Returns:
        {"models": {row: {"overall": {...}, "scenarios": {"region=US": {...}}, "warm": {...}, "cold": {...}}},
        "dataset": {...}, "settings": {...}, "warnings": [...]}; each {...} of a row holds hr@k, ndcg@k, mrr@k,
        debiased_hr@k, coverage@k, "ci" (95% intervals) and "n" (requests).

    Raises:
        DataError: two rows of one name, a split without events, or a NaN score.
    """
    found = rank_rows(
        dataset, scorers, split=split, filter_seen=filter_seen, max_targets=max_targets, seed=seed, within=within
    )
    models: dict[str, Any] = {}
    for row in found.rows:
        measured = found.measure(row, bootstrap=bootstrap, seed=seed)
        models[row.scorer.name] = {
            "overall": measured["overall"],
            "scenarios": {name: metrics for name, metrics in measured.items() if "=" in name},
            "warm": measured["warm"],
            "cold": measured["cold"],
        }
    return {
        "models": models,
        "dataset": {"name": dataset.manifest.name, "content_hash": dataset.manifest.content_hash},
        "settings": {"split": split, "filter_seen": filter_seen, "max_targets": max_targets, "bootstrap": bootstrap},
        "warnings": found.warnings,
    }


def _slices(dataset: PreparedDataset, requests: Requests) -> dict[str, np.ndarray]:
    """Rows of everybody, of each scenario value, of warm and cold targets."""
    slices = {"overall": np.arange(len(requests.event))}
    for column, vocabulary in enumerate(dataset.manifest.scenarios):
        missing = "unknown"
        while missing in vocabulary.values:  # a value may be called that
            missing = f"({missing})"
        for index in np.unique(requests.scenario[:, column]):
            value = vocabulary.values[index - 1] if index else missing
            slices[f"{vocabulary.name}={value}"] = np.flatnonzero(requests.scenario[:, column] == index)
    is_cold = dataset.titles["cold"].to_numpy(bool)[requests.target]
    return slices | {"warm": np.flatnonzero(~is_cold), "cold": np.flatnonzero(is_cold)}


def _measure(rank: np.ndarray, weight: np.ndarray, user: np.ndarray, *, bootstrap: int, seed: int) -> dict[str, Any]:
    values = {"hr@10": hits(rank, 10), "ndcg@10": gains(rank, 10)}
    return ranking_metrics(rank, weight) | {
        "ci": bootstrap_intervals(values, user, samples=bootstrap, seed=seed),
        "n": len(rank),
    }
