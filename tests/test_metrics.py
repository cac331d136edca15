"""Metrics from ranks: by arithmetic, and against ranx."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m5 import metrics
from m5.metrics import (
    bootstrap_intervals,
    listed_rank,
    propensity_weights,
    ranking_metrics,
    tied_rank,
)


def test_by_arithmetic():
    rank = np.array([1.0, 3.0, 10.0, 11.0, 60.0])
    measured = ranking_metrics(rank, np.ones(5))
    assert measured["hr@10"] == pytest.approx(3 / 5)
    assert measured["hr@50"] == pytest.approx(4 / 5)
    assert measured["hr@200"] == pytest.approx(5 / 5)
    assert measured["mrr@10"] == pytest.approx((1 / 1 + 1 / 3 + 1 / 10) / 5)
    assert measured["ndcg@10"] == pytest.approx((1 + 1 / np.log2(1 + 3) + 1 / np.log2(1 + 10)) / 5)
    assert measured["ndcg@50"] == pytest.approx((1 + 1 / np.log2(4) + 1 / np.log2(11) + 1 / np.log2(12)) / 5)


def test_debiased_recall_weighs_hits_by_inverse_propensity():
    train_count = np.array([99, 3, 0])
    weight = propensity_weights(train_count, np.array([0, 1, 2]))
    np.testing.assert_allclose(weight, [1 / 10, 1 / 2, 1 / 1])
    # The popular title is found, the other two are not.
    measured = ranking_metrics(np.array([1.0, 500.0, 500.0]), weight)
    assert measured["debiased_hr@10"] == pytest.approx(0.1 / (0.1 + 0.5 + 1.0))
    assert measured["hr@10"] == pytest.approx(1 / 3)
    assert ranking_metrics(np.array([1.0, 5.0]), np.array([0.1, 1.0]))["debiased_hr@10"] == pytest.approx(1)


def test_no_requests_measure_zero():
    assert set(ranking_metrics(np.empty(0), np.empty(0)).values()) == {0.0}


def test_ties_count_half():
    score = torch.tensor([[3.0, 2.0, 2.0, 2.0, 1.0]])
    assert tied_rank(score, torch.tensor([0]))[0] == 1
    assert tied_rank(score, torch.tensor([1]))[0] == 1 + 1 + 2 / 2
    assert tied_rank(score, torch.tensor([4]))[0] == 5


def test_constant_scores_are_no_better_than_the_middle():
    rank = tied_rank(torch.zeros(7, 101), torch.arange(7))
    assert (rank == (101 + 1) / 2).all()
    assert ranking_metrics(rank, np.ones(7))["hr@10"] == 0.0


def test_no_candidates_do_not_tie():
    score = torch.tensor([[0.5, -torch.inf, -torch.inf, 0.7]])
    assert tied_rank(score, torch.tensor([0]))[0] == 2


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_rank_is_the_place_in_the_sorted_list(seed):
    generator = np.random.default_rng(seed)
    score = generator.permutation(40).reshape(1, 40).astype(np.float32)
    target = int(generator.integers(40))
    place = int(np.flatnonzero(np.argsort(-score[0]) == target)[0])
    assert tied_rank(torch.from_numpy(score), torch.tensor([target]))[0] == place + 1


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(1, 30))
def test_a_list_of_the_best_gives_the_same_rank(seed, best, levels):
    generator = np.random.default_rng(seed)
    score = torch.from_numpy(generator.integers(0, levels, (5, 30)).astype(np.float32))
    score[:, 25:] = -torch.inf
    target = torch.from_numpy(generator.integers(0, 25, 5))
    counted = tied_rank(score, target)
    listed = listed_rank(score, target, torch.topk(score, best).values)
    # A target that ties with the last of the list is counted, and its rank may lie beyond the list.
    np.testing.assert_array_equal(np.where(np.isinf(listed), counted, listed), counted)
    assert (counted[np.isinf(listed)] > best).all()


def test_ranks_beyond_the_cutoffs_measure_zero():
    assert set(ranking_metrics(np.array([np.inf, np.inf]), np.ones(2)).values()) == {0.0}


def test_agrees_with_ranx():
    from ranx import Qrels, Run, evaluate

    generator = np.random.default_rng(3)
    requests, titles = 60, 300
    score = generator.standard_normal((requests, titles)).astype(np.float32)
    target = generator.integers(0, titles, requests)
    score[np.arange(requests), target] += 2
    qrels = Qrels({f"q{row}": {f"t{title}": 1} for row, title in enumerate(target)})
    run = Run({f"q{row}": {f"t{title}": float(s) for title, s in enumerate(score[row])} for row in range(requests)})
    names = {"hr": "hit_rate", "ndcg": "ndcg", "mrr": "mrr"}
    oracle = evaluate(qrels, run, [f"{name}@{k}" for name in names.values() for k in metrics.CUTOFFS])
    rank = tied_rank(torch.from_numpy(score), torch.from_numpy(target))
    measured = ranking_metrics(rank, np.ones(requests))
    for ours, theirs in names.items():
        for k in metrics.CUTOFFS:
            assert measured[f"{ours}@{k}"] == pytest.approx(oracle[f"{theirs}@{k}"], abs=1e-9)


def test_interval_has_the_width_of_the_normal_approximation():
    generator = np.random.default_rng(0)
    value = (generator.random(4000) < 0.3).astype(float)
    low, high = bootstrap_intervals({"hr": value}, np.arange(4000), samples=1000, seed=1)["hr"]
    half = 1.96 * np.sqrt(0.3 * 0.7 / 4000)
    assert low < value.mean() < high
    assert (high - low) / 2 == pytest.approx(half, rel=0.12)


def test_requests_of_one_user_are_resampled_together():
    # Every user has ten equal values: ten times fewer independent observations, so sqrt(10) times the width.
    generator = np.random.default_rng(0)
    value = np.repeat((generator.random(500) < 0.3).astype(float), 10)
    together = bootstrap_intervals({"hr": value}, np.repeat(np.arange(500), 10), samples=1000, seed=1)["hr"]
    apart = bootstrap_intervals({"hr": value}, np.arange(5000), samples=1000, seed=1)["hr"]
    assert (together[1] - together[0]) / (apart[1] - apart[0]) == pytest.approx(np.sqrt(10), rel=0.15)


def test_grouping_of_many_users_keeps_the_width(monkeypatch):
    generator = np.random.default_rng(0)
    user = np.sort(generator.integers(0, 3000, 9000))
    value = generator.random(9000)
    exact = bootstrap_intervals({"x": value}, user, samples=1000, seed=1)["x"]
    monkeypatch.setattr(metrics, "MAX_CLUSTERS", 500)
    grouped = bootstrap_intervals({"x": value}, user, samples=1000, seed=1)["x"]
    assert grouped[1] - grouped[0] == pytest.approx(exact[1] - exact[0], rel=0.15)
    assert grouped != exact


def test_intervals_repeat_with_the_seed_and_need_data():
    value, user = {"x": np.array([0.0, 1.0, 1.0])}, np.array([4, 4, 9])
    assert bootstrap_intervals(value, user, samples=50, seed=2) == bootstrap_intervals(value, user, samples=50, seed=2)
    assert bootstrap_intervals(value, user, samples=0, seed=2) == {}
    assert bootstrap_intervals({"x": np.empty(0)}, np.empty(0, int), samples=50, seed=2) == {}
