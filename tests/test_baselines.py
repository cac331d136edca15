"""Reference rows against their definitions, on small hand-made histories."""

from __future__ import annotations

import numpy as np
import pytest

from m5 import baselines
from m5.baselines import DAY, EASE, Interactions, ItemKNN, Popularity, reference_scorers
from m5.evaluate import evaluate
from m5.schema import TEST, TRAIN, VALID
from tests.handmade import write_handmade

TITLES = 20


@pytest.fixture
def small(tmp_path):
    histories = [
        [(0, 0, TRAIN), (1, 1 * DAY, TRAIN), (1, 2 * DAY, TRAIN), (2, 50 * DAY, VALID), (3, 51 * DAY, TEST)],
        [(0, 0, TRAIN), (1, 1 * DAY, TRAIN), (3, 40 * DAY, TRAIN), (0, 50 * DAY, VALID), (2, 51 * DAY, TEST)],
        [(0, 0, TRAIN), (3, 39 * DAY, TRAIN), (1, 50 * DAY, VALID), (4, 51 * DAY, TEST)],
        [(4, 50 * DAY, TEST)],
    ]
    return write_handmade(tmp_path / "small", histories, titles=5)


@pytest.fixture
def tastes(tmp_path):
    """Two groups of viewers who watch different halves of the catalogue; the halves are equally popular."""
    generator = np.random.default_rng(0)
    histories = []
    for user in range(60):
        titles = generator.permutation(TITLES // 2)[:7] + (user % 2) * (TITLES // 2)
        splits = [TRAIN] * 5 + [VALID, TEST]
        histories.append(
            [(int(title), DAY * place, split) for place, (title, split) in enumerate(zip(titles, splits, strict=True))]
        )
    return write_handmade(tmp_path / "tastes", histories, titles=TITLES)


def targets_of(dataset) -> np.ndarray:
    return np.flatnonzero(np.asarray(dataset.event_array("split")) == TEST)


def test_popularity_counts_training_watches_in_its_window(small):
    data = Interactions(small)
    # Training ends on day 40: ten days back only title 3 was watched, on days 39 and 40.
    assert Popularity(data, 10).score(targets_of(small))[0].tolist() == [0, 0, 0, 2, 0]
    assert Popularity(data, 1_000).score(targets_of(small))[0].tolist() == [3, 3, 0, 2, 0]


def test_training_matrix_counts_a_title_once_a_viewer_and_no_later_events(small):
    expected = [[1, 1, 0, 0, 0], [1, 1, 0, 1, 0], [1, 0, 0, 1, 0], [0, 0, 0, 0, 0]]
    assert Interactions(small).matrix_UN.toarray().tolist() == expected


def test_histories_end_before_the_target_and_hold_validation(small):
    history = Interactions(small).histories(targets_of(small)).toarray()
    assert history.tolist() == [[1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 1, 0], [0, 0, 0, 0, 0]]


def test_item_knn_by_arithmetic(small):
    # Viewers of the titles: 0 {0, 1, 2}, 1 {0, 1}, 3 {1, 2}.
    cosine = {(0, 1): 2 / np.sqrt(3 * 2), (0, 3): 2 / np.sqrt(3 * 2), (1, 3): 1 / np.sqrt(2 * 2)}
    score = ItemKNN(Interactions(small), 20).score(targets_of(small))
    expected = [cosine[0, 1], cosine[0, 1], 0, cosine[0, 3] + cosine[1, 3], 0]
    np.testing.assert_allclose(score[0], expected, rtol=1e-6)
    assert not score[3].any()  # no history


def test_item_knn_keeps_the_nearest(small):
    score = ItemKNN(Interactions(small), 1).score(targets_of(small))
    # Of titles 1 and 3, title 3 keeps 0, to which it is more similar.
    assert score[0, 3] == pytest.approx(2 / np.sqrt(6))


def test_ease_solves_its_problem(tastes):
    data, regularisation = Interactions(tastes), 5.0
    weight = EASE(data, regularisation).weight_NN.astype(np.float64)
    matrix = data.matrix_UN.toarray().astype(np.float64)
    np.testing.assert_allclose(np.diag(weight), 0)
    # Each column is the ridge regression of a title on all the others.
    for title in (0, 7, 15):
        others = np.arange(TITLES) != title
        inputs = matrix[:, others]
        ridge = np.linalg.solve(inputs.T @ inputs + regularisation * np.eye(TITLES - 1), inputs.T @ matrix[:, title])
        np.testing.assert_allclose(weight[others, title], ridge, atol=1e-4)


def test_blocks_change_nothing(tastes, monkeypatch):
    whole = Interactions(tastes)
    gram, score = whole.gram_NN, ItemKNN(whole, 5).score(targets_of(tastes))
    monkeypatch.setattr(baselines, "GRAM_ROWS", 3)
    np.testing.assert_array_equal(Interactions(tastes).gram_NN, gram)
    np.testing.assert_allclose(ItemKNN(Interactions(tastes), 5).score(targets_of(tastes)), score, rtol=1e-6)


def test_rows_are_chosen_on_validation_and_know_tastes(tastes):
    scorers, notes = reference_scorers(tastes, filter_seen=True)
    assert [scorer.name for scorer in scorers] == ["popularity", "item-knn", "ease"]
    assert [note.split(":")[0] for note in notes] == ["popularity", "item-knn", "ease"]
    models = evaluate(tastes, scorers, bootstrap=0)["models"]
    # Four titles of the viewer's own half are left, fourteen of the whole catalogue.
    for name in ("item-knn", "ease"):
        assert models[name]["overall"]["hr@10"] == 1.0
        assert models[name]["overall"]["ndcg@10"] > models["popularity"]["overall"]["ndcg@10"]


@pytest.mark.parametrize(("watched", "days"), [(1, 7), (0, 90)])
def test_the_setting_that_ranks_validation_best_is_taken(tmp_path, watched, days):
    # Title 0 was popular 49 days before the end of training, title 1 in the last week; validation watches one of them.
    old = [[(0, 0, TRAIN), (2, 50 * DAY, VALID), (3, 51 * DAY, TEST)] for _ in range(9)]
    new = [[(1, 49 * DAY, TRAIN), (2, 50 * DAY, VALID), (3, 51 * DAY, TEST)] for _ in range(4)]
    asked = [[(3, 0, TRAIN), (watched, 50 * DAY, VALID), (1 - watched, 51 * DAY, TEST)] for _ in range(9)]
    dataset = write_handmade(tmp_path / "d", [*old, *new, *asked], titles=4)
    popularity = reference_scorers(dataset, filter_seen=True)[0][0]
    assert popularity.setting == {"days": days}


def test_ease_is_left_out_of_a_large_catalogue(tastes, monkeypatch):
    monkeypatch.setattr(baselines, "MAX_EASE_TITLES", TITLES - 1)
    scorers, notes = reference_scorers(tastes, filter_seen=True)
    assert [scorer.name for scorer in scorers] == ["popularity", "item-knn"]
    assert any(note.startswith("ease: left out") for note in notes)
