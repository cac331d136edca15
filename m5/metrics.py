"""Ranking metrics for one relevant title per request, from its 1-based rank.

With a single relevant title, HR@k is recall@k, and NDCG@k is 1 / log2(1 + rank) for a rank up to k (the ideal is 1).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

CUTOFFS = (10, 50, 200)
SMALL_SLICE, SMALL_USERS = 100, 30  # requests of a slice, and users that they are of, below which it is small
PROPENSITY_POWER = 0.5
MAX_CLUSTERS = 5_000  # of users in the bootstrap


def small(requests: int, users: int) -> bool:
    """Whether a slice's numbers need their intervals: users are resampled, so few make an interval unsure of itself."""
    return requests < SMALL_SLICE or users < SMALL_USERS


def tied_rank(score_BN: Tensor, target_B: Tensor) -> np.ndarray:
    """Rank of each target; titles that tie with it count half, so that constant scores land in the middle.

    Args:
        score_BN: float [B, N], -inf where a title is no candidate.
        target_B: int64 [B], candidates.

    Returns:
        float64 [B], 1 = best.
    """
    own_B1 = score_BN.gather(1, target_B.unsqueeze(-1))
    better_B = (score_BN > own_B1).sum(-1)
    tied_B = (score_BN == own_B1).sum(-1) - 1
    return (1 + better_B.double() + tied_B.double() / 2).cpu().numpy()


def listed_rank(score_BN: Tensor, target_B: Tensor, best_BK: Tensor) -> np.ndarray:
    """`tied_rank` where it is at most K, else infinity: read off the K best scores, without counting all N.

    Args:
        score_BN, target_B: as in `tied_rank`.
        best_BK: the K highest scores of each row, descending.

    Returns:
        float64 [B].
    """
    own_B1 = score_BN.gather(1, target_B.unsqueeze(-1))
    better_B, tied_B = (best_BK > own_B1).sum(-1), (best_BK == own_B1).sum(-1)
    rank_B = torch.where(tied_B > 0, 1 + better_B + (tied_B.double() - 1) / 2, torch.inf).cpu().numpy()
    # A tie with the last of the K best may go on beyond them.
    open_X = (own_B1.squeeze(-1) == best_BK[:, -1]).nonzero().squeeze(-1)
    if len(open_X):
        rank_B[open_X.cpu().numpy()] = tied_rank(score_BN[open_X], target_B[open_X])
    return rank_B


def hits(rank: np.ndarray, k: int) -> np.ndarray:
    """float64 [B]: 1 where the target is among the first k."""
    return (rank <= k).astype(np.float64)


def gains(rank: np.ndarray, k: int) -> np.ndarray:
    """float64 [B]: discounted gain of the target within the first k."""
    return hits(rank, k) / np.log2(1 + rank)


def reciprocal_ranks(rank: np.ndarray, k: int) -> np.ndarray:
    """float64 [B]: 1 / rank within the first k."""
    return hits(rank, k) / rank


def propensity_weights(train_count: np.ndarray, target: np.ndarray) -> np.ndarray:
    """float64 [B]: inverse propensity of each target, propensity (training count + 1) ** PROPENSITY_POWER.

    Popular titles are observed more often than they are liked; weighting hits by the inverse corrects for it (Yang et
    al., "Unbiased offline recommender evaluation for missing-not-at-random implicit feedback", RecSys 2018,
    doi 10.1145/3240323.3240355). The weights are used self-normalised.
    """
    return (train_count[target] + 1.0) ** -PROPENSITY_POWER


def ranking_metrics(rank: np.ndarray, weight: np.ndarray, cutoffs: tuple[int, ...] = CUTOFFS) -> dict[str, float]:
    """hr@k, ndcg@k, mrr@k and the popularity-debiased recall debiased_hr@k; all 0 for no requests."""
    metrics: dict[str, float] = {}
    for k in cutoffs:
        hit = hits(rank, k)
        metrics[f"hr@{k}"] = _mean(hit)
        metrics[f"ndcg@{k}"] = _mean(gains(rank, k))
        metrics[f"mrr@{k}"] = _mean(reciprocal_ranks(rank, k))
        metrics[f"debiased_hr@{k}"] = float((hit * weight).sum() / weight.sum()) if len(rank) else 0.0
    return metrics


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0


def bootstrap_intervals(
    values: dict[str, np.ndarray], user: np.ndarray, *, samples: int, seed: int, level: float = 0.95
) -> dict[str, tuple[float, float]]:
    """Percentile intervals of means, resampling users (requests of one user are not independent).

    Beyond MAX_CLUSTERS users, random groups of users are resampled instead: still independent of each other, and their
    number is large enough for the tails; memory stays samples x MAX_CLUSTERS x 8 bytes.

    Args:
        values: metric -> float64 [B], one value a request.
        user: int64 [B].
        samples: bootstrap samples.
        seed: of the draws.
        level: share of the samples within the interval.
    """
    if not samples or not len(user):
        return {}
    generator = np.random.default_rng(seed)
    _, cluster = np.unique(user, return_inverse=True)
    users = int(cluster.max()) + 1
    clusters = min(users, MAX_CLUSTERS)
    if users > clusters:
        cluster = (generator.permutation(users) % clusters)[cluster]
    # A cluster drawn n times weighs n; multinomial counts are the resampling, and a product gives all means at once.
    draws = generator.multinomial(clusters, np.full(clusters, 1 / clusters), size=samples).astype(np.float64)
    size = draws @ np.bincount(cluster, minlength=clusters)
    tails = 100 * np.array([(1 - level) / 2, (1 + level) / 2])
    intervals = {}
    for name, value in values.items():
        means = draws @ np.bincount(cluster, weights=value, minlength=clusters) / size
        low, high = np.percentile(means, tails)
        intervals[name] = (float(low), float(high))
    return intervals
