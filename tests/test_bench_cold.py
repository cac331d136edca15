"""`m5 bench cold`: which requests it asks, what guessing reaches, and its content kNN, by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.cold import ColdCandidates, ContentKNN, cold_requests, described, guessed
from m5.baselines import Interactions
from m5.evaluate import Candidates
from m5.schema import TEST, TRAIN, VALID, DataError
from tests.handmade import write_handmade

# Titles 0 to 3 are watched in training, 4 and 5 are not; two viewers end with a cold title, one with a warm one.
HISTORIES = [
    [(0, 10, TRAIN), (1, 20, TRAIN), (2, 30, VALID), (4, 40, TEST), (5, 50, TEST)],
    [(1, 10, TRAIN), (2, 20, TRAIN), (5, 30, TEST)],
    [(0, 10, TRAIN), (3, 20, TRAIN), (2, 30, TEST)],
]


def test_only_requests_for_cold_titles_are_asked(tmp_path: Path) -> None:
    dataset = write_handmade(tmp_path / "data", HISTORIES, titles=60)
    requests = cold_requests(dataset, None)
    assert (requests.event.tolist(), requests.target.tolist(), requests.user.tolist()) == (
        [3, 4, 7],
        [4, 5, 5],
        [0, 0, 1],
    )
    warm = write_handmade(tmp_path / "warm", [[(0, 10, TRAIN), (0, 20, TEST)]], titles=60)
    with pytest.raises(DataError, match="--hold-out-newest"):
        cold_requests(warm, None)


@pytest.mark.parametrize(("filter_seen", "sizes"), [(True, [57, 56, 58]), (False, [60, 60, 60])])
def test_guessing_is_exact(tmp_path: Path, filter_seen: bool, sizes: list[int]) -> None:
    dataset = write_handmade(tmp_path / "data", HISTORIES, titles=60)
    candidates = Candidates(dataset, cold_requests(dataset, None), {}, eligibility=None, filter_seen=filter_seen)
    found = guessed(candidates, 3)
    np.testing.assert_allclose(found[50], [50 / size for size in sizes])
    np.testing.assert_allclose(found[10], [10 / size for size in sizes])
    assert found[200].tolist() == [1, 1, 1]
    # Of the 60 titles 56 are cold; the first viewer has seen one of them before their second request.
    cold = ColdCandidates(dataset, cold_requests(dataset, None), {}, eligibility=None, filter_seen=filter_seen)
    of_cold = [56, 55, 56] if filter_seen else [56, 56, 56]
    np.testing.assert_allclose(guessed(cold, 3)[10], [10 / size for size in of_cold])


def test_content_knn_by_hand(tmp_path: Path) -> None:
    dataset = write_handmade(tmp_path / "data", HISTORIES, titles=6)
    content_NG = np.array([[1, 0], [0, 1], [0, 2], [-1, 0], [0.6, 0.8], [0, 0]], dtype=np.float32)
    score_BN = ContentKNN(Interactions(dataset), content_NG).score(np.array([0, 3, 7]))
    # No history; titles 0, 1 and 2: (1, 0) + (0, 1) + (0, 2); titles 1 and 2: along the second axis.
    mean = np.array([1, 3]) / 10**0.5
    np.testing.assert_allclose(score_BN[0], np.zeros(6))
    np.testing.assert_allclose(score_BN[1], [mean[0], mean[1], mean[1], -mean[0], mean @ [0.6, 0.8], 0], rtol=1e-6)
    np.testing.assert_allclose(score_BN[2], [0, 1, 1, 0, 0.8, 0], atol=1e-6)


def test_titles_are_described_as_json_describes_them(tmp_path: Path) -> None:
    dataset = write_handmade(tmp_path / "data", HISTORIES, titles=6, released=[0, 5, 5, 5, 5, 5])
    records, posters = described(dataset, np.array([1, 4]))
    expected = {"description": "", "category": None, "released": 5, "metadata": {}}
    assert records == [expected | {"title_id": f"t{row}", "title": f"Title {row}"} for row in (1, 4)]
    assert posters == [None, None]
