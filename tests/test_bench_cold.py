"""`m5 bench cold`: which requests it asks, what guessing reaches, and its content kNN, by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks.cold import ColdCandidates, ContentKNN, cold_requests, described, guessed, held_out, with_content
from data_prep.sources.held_out import HELD_OUT, hold_out_newest
from m5.assemble import build_model
from m5.baselines import Interactions
from m5.data.sequences import BatchBuilder
from m5.evaluate import Candidates
from m5.predict import Predictor
from m5.schema import TEST, TRAIN, VALID, DataError
from tests.handmade import write_handmade
from tests.world import tiny_config, write_world

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


def test_a_setting_is_chosen_on_other_held_out_titles_than_it_is_measured_on(tmp_path: Path) -> None:
    """Titles 5 and 4 of six were held out, 5 is the newer one: nothing is newer than it, a sixth is newer than 4."""
    dataset = write_handmade(tmp_path / "data", HISTORIES, titles=60)
    assert held_out(dataset, None, None) is None
    with pytest.raises(DataError, match=r"held_out\.parquet is missing.*--hold-out-newest 0\.1"):
        held_out(dataset, 0.05, None)
    (tmp_path / "data-raw").mkdir()
    pd.DataFrame({"title_id": ["t5", "t4"], "newer": [0, 1 / 6]}).to_parquet(tmp_path / "data-raw" / HELD_OUT)
    for skip, most, asked in ((None, 0.1, [5, 5]), (0.1, None, [4]), (0.0, 1.0, [4, 5, 5])):
        assert cold_requests(dataset, None, held_out(dataset, skip, most)).target.tolist() == asked
    with pytest.raises(DataError, match="nothing can be asked"):
        cold_requests(dataset, None, held_out(dataset, 0.2, None))


def test_holding_out_leaves_the_age_of_the_titles(tmp_path: Path) -> None:
    """Of four watched titles, 3 and 4 are the newest; 4 was first watched later than 3."""
    watched = [(1, 1, 10), (1, 2, 11), (1, 3, 12), (2, 1, 10), (2, 2, 20), (2, 4, 30)]
    pd.DataFrame(watched, columns=["user_id", "title_id", "ts"]).to_parquet(tmp_path / "events.parquet")
    years = pd.DataFrame({"title_id": ["1", "2", "3", "4", "never watched"], "year": [1990, 1991, 2000, 2000, 2001]})
    years.to_parquet(tmp_path / "titles.parquet")
    hold_out_newest(tmp_path / "events.parquet", tmp_path / "titles.parquet", 0.5)
    assert pd.read_parquet(tmp_path / HELD_OUT).to_dict("list") == {"title_id": ["4", "3"], "newer": [0, 1 / 4]}


def test_other_content_vectors_are_other_keys(tmp_path: Path) -> None:
    dataset = write_world(tmp_path / "data")
    config = tiny_config(tmp_path / "data", tmp_path / "run")
    predictor = Predictor(build_model(dataset, config), BatchBuilder(dataset, config), config, torch.device("cpu"))
    before_NQ, content_NG = predictor.key_NQ.clone(), dataset.content("graph")
    content_NG[27] = -content_NG[27]
    changed = with_content(predictor, content_NG, "changed")
    assert changed.name == "changed"
    assert (changed.key_NQ != before_NQ).any(1).nonzero().flatten().tolist() == [27]
    del predictor.key_NQ  # the first model is left as it was
    assert torch.equal(predictor.key_NQ, before_NQ)
