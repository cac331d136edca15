"""Exact evaluation on datasets whose ranks are worked out by hand."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console

from m5 import evaluate as evaluation
from m5.eligibility import Eligibility
from m5.evaluate import evaluate, select_requests
from m5.evaluate_run import evaluate_run
from m5.evaluation_report import print_report
from m5.schema import ALWAYS, TEST, TRAIN, VALID, DataError
from tests.handmade import rights_table, write_handmade

TITLES = 12


class Fixed:
    """The same scores for everybody."""

    def __init__(self, score_N, name: str = "fixed"):
        self.name, self.score_N = name, np.asarray(score_N, dtype=np.float32)

    def score(self, event_index: np.ndarray) -> np.ndarray:
        return np.tile(self.score_N, (len(event_index), 1))


class Knowing:
    """Scores the target highest: reads what a scorer must not read."""

    name = "knowing"

    def __init__(self, dataset):
        self.title, self.titles = dataset.event_array("title"), dataset.manifest.n_titles

    def score(self, event_index: np.ndarray) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.as_tensor(self.title[event_index]).long(), self.titles).float()


DESCENDING = Fixed(-np.arange(TITLES))  # without filters, title i has rank i + 1


def train_events(*titles: int) -> list[tuple[int, int, int]]:
    return [(title, 10 + place, TRAIN) for place, title in enumerate(titles)]


@pytest.fixture
def plain(tmp_path):
    """Three users; test targets 3, 5 and 11, the last one never watched in training (cold)."""
    histories = [
        [*train_events(0, 1), (2, 20, VALID), (3, 30, TEST)],
        [*train_events(6), (7, 20, VALID), (5, 30, TEST)],
        [*train_events(0, 3, 5), (1, 20, VALID), (11, 30, TEST)],
    ]
    return write_handmade(tmp_path / "plain", histories, titles=TITLES)


def overall(dataset, scorer, **settings):
    return evaluate(dataset, [scorer], bootstrap=0, **settings)["models"][scorer.name]["overall"]


def test_ranks_of_the_whole_catalogue(plain):
    measured = overall(plain, DESCENDING, filter_seen=False)
    assert measured["mrr@200"] == pytest.approx((1 / 4 + 1 / 6 + 1 / 12) / 3)
    assert measured["hr@10"] == pytest.approx(2 / 3)
    assert measured["n"] == 3


def test_seen_titles_are_filtered_validation_ones_too(plain):
    # User 0 has seen 0, 1 and 2; user 1 only 6 and 7, which rank lower; user 2 has seen 0, 1, 3 and 5.
    measured = overall(plain, DESCENDING)
    assert measured["mrr@200"] == pytest.approx((1 / (4 - 3) + 1 / 6 + 1 / (12 - 4)) / 3)


def test_validation_targets_do_not_see_the_test(plain):
    measured = overall(plain, DESCENDING, split="valid")
    assert measured["mrr@200"] == pytest.approx((1 / (3 - 2) + 1 / (8 - 1) + 1 / (2 - 1)) / 3)


def test_a_rewatched_target_stays_a_candidate(tmp_path):
    dataset = write_handmade(tmp_path / "d", [[*train_events(0, 1, 4), (4, 30, TEST)]], titles=TITLES)
    assert overall(dataset, DESCENDING)["mrr@200"] == pytest.approx(1 / (5 - 2))


def test_warm_and_cold_apart(plain):
    models = evaluate(plain, [DESCENDING], filter_seen=False, bootstrap=0)["models"]["fixed"]
    assert models["warm"]["n"] == 2
    assert models["warm"]["mrr@200"] == pytest.approx((1 / 4 + 1 / 6) / 2)
    assert models["cold"]["n"] == 1
    assert models["cold"]["mrr@200"] == pytest.approx(1 / 12)
    assert models["scenarios"] == {}


def test_debiased_recall_uses_training_counts(plain):
    # Targets 3 and 5 were watched once each in training, 11 never: propensities (1 + 1) ** .5 and (0 + 1) ** .5.
    weight = np.array([2**-0.5, 2**-0.5, 1.0])
    assert overall(plain, DESCENDING, filter_seen=False)["debiased_hr@10"] == pytest.approx(
        weight[:2].sum() / weight.sum()
    )


def test_coverage_is_a_share_of_the_candidates(plain):
    # Nothing filtered: everybody's ten best of twelve are the same.
    assert overall(plain, DESCENDING, filter_seen=False)["coverage@10"] == pytest.approx(10 / 12)
    # Filtered, user 2 gets the 8 titles that are left, 10 and 11 among them.
    assert overall(plain, DESCENDING)["coverage@10"] == 1.0


def test_scenario_slices(tmp_path):
    histories = [[*train_events(0), (title, 30, TEST)] for title in (1, 3, 5)]
    dataset = write_handmade(
        tmp_path / "d", histories, titles=TITLES, scenario=[[(1, 1), (1, 1)], [(1, 1), (2, 2)], [(1, 1), (2, 0)]]
    )
    report = evaluate(dataset, [DESCENDING], bootstrap=0)
    scenarios = report["models"]["fixed"]["scenarios"]
    assert set(scenarios) == {"region=US", "region=BR", "plan=unknown", "plan=ads", "plan=premium"}
    assert scenarios["region=US"]["mrr@200"] == pytest.approx(1 / 1)
    assert scenarios["region=BR"]["mrr@200"] == pytest.approx((1 / 3 + 1 / 5) / 2)
    assert scenarios["plan=unknown"]["mrr@200"] == pytest.approx(1 / 5)
    assert any("region=BR: only 2 requests" in warning for warning in report["warnings"])


def test_unplayable_titles_are_no_candidates_and_unplayable_targets_left_out(tmp_path):
    histories = [[*train_events(0), (4, 30, TEST)], [*train_events(0), (2, 30, TEST)]]
    rows = [(title, 0, 0, ALWAYS, -ALWAYS) for title in range(TITLES) if title not in (1, 2)]
    dataset = write_handmade(
        tmp_path / "d",
        histories,
        titles=TITLES,
        scenario=[[(1, 1), (1, 1)], [(2, 1), (2, 1)]],
        rights=rights_table([*rows, (1, 2, 0, ALWAYS, -ALWAYS)]),
    )
    report = evaluate(dataset, [DESCENDING], bootstrap=0)
    measured = report["models"]["fixed"]["overall"]
    # Of the titles before the target, 0 is seen, 1 is not for region 1, 2 is for nobody; 3 remains.
    assert measured["n"] == 1
    assert measured["mrr@200"] == pytest.approx(1 / 2)
    assert report["warnings"][-1] == "1 test targets were left out: their viewer may not play them."
    assert measured["coverage@200"] == 1.0


def test_no_playable_target_is_refused(tmp_path):
    dataset = write_handmade(tmp_path / "d", [[(0, 10, TRAIN), (1, 30, TEST)]], titles=3, released=[ALWAYS, 31, ALWAYS])
    with pytest.raises(DataError, match="none of the 1 test targets"):
        evaluate(dataset, [Fixed(np.zeros(3))])


def test_a_split_without_events_is_refused(tmp_path):
    dataset = write_handmade(tmp_path / "d", [[(0, 10, TRAIN)]], titles=3)
    with pytest.raises(DataError, match="valid split has no events"):
        evaluate(dataset, [Fixed(np.zeros(3))], split="valid")


def test_bounds(plain):
    best = overall(plain, Knowing(plain))
    assert best["hr@10"] == best["ndcg@10"] == best["mrr@10"] == 1.0
    # Constant scores stand in the middle of the candidates: users have 12 - 3, 12 - 2 and 12 - 4 of them.
    constant = overall(plain, Fixed(np.zeros(TITLES)))
    assert constant["mrr@200"] == pytest.approx((1 / 5 + 1 / 5.5 + 1 / 4.5) / 3)


def test_candidates_with_minus_infinity_stand_before_none(plain):
    # Everything -inf ties among the candidates, exactly as zeros do.
    assert overall(plain, Fixed(np.full(TITLES, -np.inf))) == overall(plain, Fixed(np.zeros(TITLES)))


def test_nan_and_equal_names_are_refused(plain):
    with pytest.raises(DataError, match="'broken' scored a title with NaN"):
        evaluate(plain, [Fixed(np.full(TITLES, np.nan), "broken")])
    with pytest.raises(DataError, match="one name"):
        evaluate(plain, [DESCENDING, DESCENDING])


@pytest.fixture
def busy(tmp_path):
    """Forty users with random histories, rights for a region, and release dates."""
    generator = np.random.default_rng(0)
    histories, scenario = [], []
    for _ in range(40):
        titles = generator.integers(0, 30, int(generator.integers(3, 9)))
        splits = [TRAIN] * (len(titles) - 2) + [VALID, TEST]
        histories.append(
            [(int(title), 100 + place, split) for place, (title, split) in enumerate(zip(titles, splits, strict=True))]
        )
        scenario.append([(int(generator.integers(0, 3)), int(generator.integers(0, 3))) for _ in titles])
    rows = [(title, title % 4 if title % 4 < 3 else 0, 0, 0, 1000) for title in range(30)]
    released = np.where(np.arange(30) % 7 == 0, 104, ALWAYS)
    return write_handmade(
        tmp_path / "busy", histories, titles=30, scenario=scenario, rights=rights_table(rows), released=released
    )


class Random:
    name = "random"

    def score(self, event_index: np.ndarray) -> np.ndarray:
        return np.stack([np.random.default_rng(int(event)).standard_normal(30) for event in event_index])


def test_equals_a_slow_loop(busy):
    eligibility = Eligibility.from_dataset(busy)
    offsets, title = busy.offsets, busy.event_array("title")
    split, region, plan, time = (
        busy.event_array(name) for name in ("split", "scenario_region", "scenario_plan", "timestamp")
    )
    reciprocal = []
    for user in range(busy.manifest.n_users):
        for event in range(offsets[user], offsets[user + 1]):
            viewer = torch.tensor([[int(region[event]), int(plan[event])]])
            playable = eligibility.mask(viewer, torch.tensor([int(time[event])]))[0]
            if split[event] != TEST or not playable[title[event]]:
                continue
            score = Random().score(np.array([event]))[0].astype(np.float32)
            seen = set(title[offsets[user] : event].tolist()) - {int(title[event])}
            better = [t for t in range(30) if playable[t] and t not in seen and score[t] > score[title[event]]]
            reciprocal.append(1 / (1 + len(better)))
    measured = overall(busy, Random())
    assert 0 < len(reciprocal) == measured["n"] < 40
    assert measured["mrr@200"] == pytest.approx(np.mean(reciprocal))


def test_chunks_change_nothing(busy, monkeypatch):
    whole = evaluate(busy, [Random(), Fixed(np.arange(30))], bootstrap=20)
    monkeypatch.setattr(evaluation, "CHUNK_ELEMENTS", 7 * 30)
    assert evaluate(busy, [Random(), Fixed(np.arange(30))], bootstrap=20) == whole


def test_a_part_of_the_targets_is_fixed_by_the_seed(busy):
    def chosen(seed: int) -> list[int]:
        return select_requests(busy, "test", eligibility=None, max_targets=10, seed=seed).event.tolist()

    assert len(chosen(0)) == 10
    assert chosen(0) == chosen(0)
    assert chosen(0) != chosen(1)
    assert set(chosen(0)) <= set(np.flatnonzero(busy.event_array("split") == TEST).tolist())


def test_intervals_hold_the_mean_and_the_report_is_json(busy):
    report = evaluate(busy, [Random()], bootstrap=200)
    for part in (report["models"]["random"]["overall"], *report["models"]["random"]["scenarios"].values()):
        for metric in ("hr@10", "ndcg@10"):
            low, high = part["ci"][metric]
            assert low <= part[metric] <= high
    assert (
        json.loads(json.dumps(report))["models"]["random"]["overall"]["n"] == report["models"]["random"]["overall"]["n"]
    )


@pytest.mark.parametrize("bootstrap", [0, 20])
def test_report_prints_rows_slices_and_warnings(busy, bootstrap):
    report = evaluate(busy, [Random(), Fixed(np.arange(30))], bootstrap=bootstrap)
    stream = io.StringIO()
    print_report(report, Console(file=stream))
    lines = stream.getvalue().splitlines()
    models = report["models"].values()
    for metric in ("hr@10", "debiased_hr@10"):
        assert [metric, *(f"{model['overall'][metric]:.4f}" for model in models)] in [line.split() for line in lines]
    region = [model["scenarios"]["region=US"] for model in models]
    expected = ["region=US", str(region[0]["n"]), *(f"{part['ndcg@10']:.4f}" for part in region)]
    assert expected in [line.split() for line in lines]
    assert sum("95% interval" in line for line in lines) == (2 if bootstrap else 0)
    assert f"note: {report['warnings'][-1]}" in lines


class Loaded:
    """What `Predictor.load` hands back, without a model."""

    def __init__(self, dataset, name):
        self.dataset, self.name = dataset, name
        self.config = type("Config", (), {"training": type("Training", (), {"filter_seen": True})})

    def score(self, event_index: np.ndarray) -> np.ndarray:
        return Random().score(event_index)


@pytest.fixture
def runs(busy, tmp_path, monkeypatch):
    """Two runs on the busy dataset, with a checkpoint record each."""
    pytest.importorskip("torchrec")
    from m5.predict import Predictor

    for name in ("m5", "other"):
        (tmp_path / name / "best").mkdir(parents=True)
        record = {"dataset": "handmade", "weights_sha256": f"sha-{name}", "step": 7, "epoch": 1}
        (tmp_path / name / "best" / "checkpoint.json").write_text(json.dumps(record))
    monkeypatch.setattr(Predictor, "load", lambda run: Loaded(busy, "m5"))
    return tmp_path


def test_a_run_is_written_beside_its_references(runs):
    report = evaluate_run(runs / "m5", rows={"m5-other": runs / "other"})
    written = json.loads((runs / "m5" / "evaluation.json").read_text())
    assert list(written["models"]) == ["m5", "m5-other", "popularity", "item-knn", "ease"]
    assert written["checkpoint"] == {"step": 7, "epoch": 1, "weights_sha256": "sha-m5"}
    assert written["models"]["m5"]["overall"]["hr@10"] == report["models"]["m5"]["overall"]["hr@10"]
    assert written["models"]["m5"]["overall"] == written["models"]["m5-other"]["overall"]
    assert any(warning.startswith("ease: validation chose") for warning in written["warnings"])
    assert sorted(path.name for path in (runs / "m5").iterdir()) == ["best", "evaluation.json"]


def test_a_second_look_at_the_test_split_is_said(runs):
    target = runs / "shared.json"
    first = evaluate_run(runs / "m5", target, references=False)
    again = evaluate_run(runs / "m5", target, references=False)
    other = evaluate_run(runs / "other", target, references=False)
    assert not any("looked at before" in warning for warning in first["warnings"] + again["warnings"])
    assert any("looked at before" in warning for warning in other["warnings"])


def test_another_file_is_not_overwritten(runs):
    (runs / "notes.json").write_text('{"mine": 1}')
    with pytest.raises(DataError, match="is no evaluation report"):
        evaluate_run(runs / "m5", runs / "notes.json", references=False)
    assert (runs / "notes.json").read_text() == '{"mine": 1}'
