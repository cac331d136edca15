"""The literature's systems: each recovers a planted structure that suits it, and knows ten viewers by heart.

Networks train by a clock that moves with each look at it, so that a slow machine trains as long as a fast one. Those of
ratings, graphs and agents are in test_literature_rating.py and test_literature_graph_and_rl.py.
"""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.literature import compare as comparison
from benchmarks.literature import job, network
from benchmarks.literature.data import Data
from benchmarks.literature.job import Setup, record_of
from benchmarks.literature.mind import squash
from benchmarks.literature.network import FullSoftmax, Network, SampledSoftmax
from benchmarks.literature.paired import against_m5
from benchmarks.literature.systems import MODULES, chosen, system
from m5.baselines import DAY
from m5.config import ConfigError
from m5.evaluate import evaluate, rank_rows
from m5.schema import TEST, TRAIN, VALID
from tests.handmade import write_handmade

TICK = 0.01  # seconds that a look at the clock takes
CLASSICAL = ("ease", "als", "svd", "user-knn", "item-knn")
SETS = ("amf", "bag-of-videos", "mind", "comirec", "mmoe")  # networks that pool a history
SEQUENCES = ("sasrec", "lstm", "bert")


@pytest.fixture
def clock(monkeypatch):
    """Trainings of a fixed number of steps, whose last weights are kept: validation always finds them better."""
    now, better = itertools.count(), itertools.count()
    monkeypatch.setattr(network, "time", SimpleNamespace(monotonic=lambda: TICK * next(now)))
    monkeypatch.setattr(network, "validate", lambda scorer, data: float(next(better)))
    torch.set_num_threads(1)


def fitted(name: str, dataset, *, steps: int, seed: int = 0, **settings):
    data = Data(dataset, history=8, validation_targets=100)
    found = system(name)
    return found.fit(data, {**found.settings[0], **settings}, seed, TICK * steps)


def watch(titles, splits):
    return [(int(title), DAY * place, split) for place, (title, split) in enumerate(zip(titles, splits, strict=True))]


PLAN = [TRAIN] * 6 + [VALID, TEST]


@pytest.fixture(scope="module")
def tastes(tmp_path_factory):
    """Two groups of viewers, each with a half of the 24 titles."""
    generator = np.random.default_rng(0)
    histories = [watch(generator.permutation(12)[:8] + 12 * (user % 2), PLAN) for user in range(80)]
    return write_handmade(tmp_path_factory.mktemp("tastes") / "d", histories, titles=24)


@pytest.fixture(scope="module")
def cycle(tmp_path_factory):
    """Every title is followed by the one behind it: which was watched last decides, and nothing else does."""
    generator = np.random.default_rng(0)
    plan = [TRAIN] * 18 + [VALID, TEST]
    histories = [watch((generator.integers(24) + np.arange(20)) % 24, plan) for _ in range(40)]
    return write_handmade(tmp_path_factory.mktemp("cycle") / "d", histories, titles=24)


@pytest.fixture(scope="module")
def ten(tmp_path_factory):
    """Ten viewers with titles of their own."""
    histories = [watch(range(8 * user, 8 * user + 8), PLAN) for user in range(10)]
    return write_handmade(tmp_path_factory.mktemp("ten") / "d", histories, titles=80)


@pytest.mark.parametrize("name", [*CLASSICAL, *SETS])
def test_two_tastes_are_told_apart(name, tastes, clock):
    scorer = fitted(name, tastes, steps=250, **({"rank": 2} if name == "svd" else {}))
    found = evaluate(tastes, [scorer], bootstrap=0)["models"][scorer.name]["overall"]
    # Five titles of the viewer's own half are left, seventeen of the whole catalogue.
    assert found["hr@10"] == 1.0
    assert found["ndcg@10"] > np.mean(1 / np.log2(1 + np.arange(1, 8)))  # of a place among the first seven


@pytest.mark.parametrize("name", SEQUENCES)
def test_order_is_learned(name, cycle, clock):
    settings = {"dropout": 0.0} | ({"lr": 2e-3} if name == "bert" else {})
    scorer = fitted(name, cycle, steps=600 if name == "bert" else 250, **settings)
    targets = np.flatnonzero(np.asarray(cycle.event_array("split")) == TEST)
    best = np.asarray(scorer.score(targets)).argmax(1)
    assert (best == np.asarray(cycle.event_array("title"))[targets]).mean() > 0.95


@pytest.mark.parametrize("name", SEQUENCES + SETS)
def test_ten_viewers_are_known_by_heart(name, ten, clock):
    settings = {"dropout": 0.0} if "dropout" in system(name).settings[0] else {}
    scorer = fitted(name, ten, steps=600 if name == "mind" else 300, **settings)
    data = Data(ten, history=8)
    asked = data.train[data.train > ten.offsets[data.dataset.user_of(data.train)]]  # someone has watched something
    best = torch.as_tensor(scorer.score(asked)).topk(2).indices.numpy()
    assert (best == data.title[asked][:, None]).any(1).mean() > 0.85


@pytest.mark.parametrize("name", [name for name in CLASSICAL if name != "user-knn"])
def test_ten_viewers_keep_their_titles(name, ten):
    scorer = fitted(name, ten, steps=1)
    data = Data(ten, history=8)
    asked = ten.offsets[:-1] + 6  # six titles watched in training before
    best = np.argsort(-np.asarray(scorer.score(asked)), axis=1)[:, :6] // 8
    assert (best == data.dataset.user_of(asked)[:, None]).all()


def test_user_knn_knows_ten_viewers_by_their_twins(tmp_path):
    """A viewer's own row is no neighbour, so that nobody is known by heart; a second viewer alike is."""
    histories = [watch(range(8 * (user // 2), 8 * (user // 2) + 8), PLAN) for user in range(20)]
    dataset = write_handmade(tmp_path / "d", histories, titles=80)
    score = np.asarray(fitted("user-knn", dataset, steps=1).score(dataset.offsets[:-1] + 6))
    own = np.arange(80) // 8 == np.arange(20)[:, None] // 2
    watched_in_training = np.arange(80) % 8 < 6
    assert (score[own & watched_in_training] > 0.99).all()
    assert not score[~(own & watched_in_training)].any()


def test_popularity_lists_what_is_watched_now(tmp_path):
    """Its structure: taste moves on. It cannot know viewers by heart, since all of them get one list."""
    histories = [watch([0, 1, 2 + user], [TRAIN] * 3) for user in range(3)]
    late = [[(5, 100 * DAY, TRAIN), (5, 101 * DAY, TRAIN), (5, 102 * DAY, TRAIN), (0, 103 * DAY, TEST)]]
    dataset = write_handmade(tmp_path / "d", histories + late * 2, titles=6)
    score = np.asarray(fitted("popularity", dataset, steps=1, days=30).score(np.array([2, 12])))
    assert score.argmax(1).tolist() == [5, 5]
    assert not score[:, :5].any()
    everything = np.asarray(fitted("popularity", dataset, steps=1, days=100_000).score(np.array([2])))[0]
    assert everything.tolist() == [3, 3, 1, 1, 1, 6]


def test_the_gate_of_a_scenario_decides(tmp_path, clock):
    """Which half of the catalogue comes next depends on the request's region alone."""
    generator = np.random.default_rng(0)
    region = generator.integers(1, 3, (80, 8))
    titles = generator.integers(0, 12, (80, 8)) + 12 * (region - 1)
    histories = [watch(row, PLAN) for row in titles]
    scenario = [[(int(value), 1) for value in row] for row in region]
    dataset = write_handmade(tmp_path / "d", histories, titles=24, scenario=scenario)
    scorer = fitted("mmoe", dataset, steps=250, dropout=0.0)
    targets = np.flatnonzero(np.asarray(dataset.event_array("split")) == TEST)
    best = np.asarray(scorer.score(targets)).argmax(1) // 12
    assert (best == region[:, 7] - 1).mean() > 0.95


def test_themes_are_learned(tmp_path, clock):
    """Viewers follow two of four themes in turn, and lists keep to them; test_literature_interests.py asks for both."""
    generator = np.random.default_rng(0)
    histories, own = [], []
    for _ in range(600):
        pair = generator.choice(4, 2, replace=False)
        first, second = (generator.permutation(20)[:4] + 20 * theme for theme in pair)
        histories.append(watch(np.stack([first, second], 1).ravel(), PLAN))
        own.append(np.isin(np.arange(80) // 20, pair))
    dataset = write_handmade(tmp_path / "d", histories, titles=80)
    scorer = fitted("mind", dataset, steps=300, power=2.0)
    targets = np.flatnonzero(np.asarray(dataset.event_array("split")) == TEST)
    score = torch.as_tensor(scorer.score(targets)).clone()
    row, seen = dataset.watched_before(targets)
    score[row, seen] = -torch.inf
    best = score.topk(5).indices.numpy()
    assert np.take_along_axis(np.array(own), best, 1).mean() > 0.9  # by chance: 33 of 73


def test_a_title_meets_its_best_interest(tastes):
    """Softmax over the best of two interests, by arithmetic."""
    softmax = FullSoftmax(Data(tastes, history=3))
    query = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    key = torch.zeros(24, 2)
    key[0], key[1] = torch.tensor([2.0, 1.0]), torch.tensor([0.0, 3.0])
    expected = -np.log(np.exp(2) / (np.exp(2) + np.exp(3) + 22))
    assert softmax(query, key, torch.tensor([0])).item() == pytest.approx(expected)


def test_popularity_is_the_count_of_training(tastes):
    scorer = fitted("popularity", tastes, steps=1, days=100_000)
    count = tastes.titles["train_count"].to_numpy()
    assert np.asarray(scorer.score(np.array([7])))[0].tolist() == count.tolist()


def test_user_knn_by_arithmetic(tmp_path):
    """Viewers 0 {0, 1}, 1 {0, 2}, 2 {3}: from viewer 0's history, viewer 1 lies at 1 / sqrt(2 * 2)."""
    histories = [
        [(0, 0, TRAIN), (1, DAY, TRAIN), (3, 5 * DAY, TEST)],
        [(0, 0, TRAIN), (2, DAY, TRAIN), (3, 5 * DAY, TEST)],
        [(3, 0, TRAIN), (0, 4 * DAY, VALID), (1, 5 * DAY, TEST)],
    ]
    scorer = fitted("user-knn", write_handmade(tmp_path / "d", histories, titles=4), steps=1)
    np.testing.assert_allclose(scorer.score(np.array([2]))[0], [1 / 2, 0, 1 / 2, 0], atol=1e-6)


# ---- what they share -----------------------------------------------------------------------------------------


def test_sequences_hold_what_came_before_and_nothing_after(tmp_path):
    histories = [[(4, 0, TRAIN), (2, 3 * DAY, TRAIN), (1, 4 * DAY, TEST)], [(3, 0, TRAIN), (0, DAY, VALID)]]
    scenario = [[(1, 1), (2, 1), (1, 2)], [(2, 2), (1, 1)]]
    data = Data(write_handmade(tmp_path / "d", histories, titles=5, scenario=scenario), history=2)
    batch = data.sequences(np.array([2, 4, 0]))
    start, pad = 5, 6
    assert batch.title_BL.tolist() == [[start, 4, 2], [start, 3, pad], [start, pad, pad]]
    assert batch.next_BL.tolist() == [[4, 2, 1], [3, 0, pad], [4, pad, pad]]
    assert batch.length_B.tolist() == [3, 2, 1]
    assert batch.last(batch.next_BL).tolist() == [1, 0, 4]
    assert batch.last(batch.feature_BLF).tolist() == [[1, 2], [1, 1], [1, 1]]
    assert data.sequences(np.array([2]), 1).title_BL.tolist() == [[start, 2]]


def test_sampled_softmax_over_all_titles_is_the_full_one(tastes):
    data = Data(tastes, history=3)
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(6, 4, generator=generator), torch.randn(24, 4, generator=generator)
    target = torch.arange(6)
    torch.manual_seed(0)
    sampled = SampledSoftmax(data, 24)
    sampled.count = 100_000  # every title is drawn, and log Q is 0
    torch.testing.assert_close(sampled(query, key, target), FullSoftmax(data)(query, key, target), rtol=1e-4, atol=1e-4)


def test_cold_titles_are_no_negatives(tmp_path):
    histories = [[(0, 0, TRAIN), (1, DAY, TRAIN), (2, 2 * DAY, TEST)]]
    softmax = FullSoftmax(Data(write_handmade(tmp_path / "d", histories, titles=3), history=2))
    query, key = torch.ones(1, 1), torch.tensor([[1.0], [2.0], [50.0]])
    assert softmax(query, key, torch.tensor([1])).item() == pytest.approx(np.log(1 + np.exp(-1.0)))


def test_squash_keeps_the_direction():
    assert squash(torch.tensor([[3.0, 4.0]]))[0].tolist() == pytest.approx([25 / 26 * 3 / 5, 25 / 26 * 4 / 5])


def test_the_best_weights_are_kept(tastes, clock, monkeypatch):
    """Validation says that the second of four looks was the best; the network ends with what it had then."""

    class Steps(Network):
        def __init__(self, data):
            super().__init__()
            self.place = torch.nn.Parameter(torch.zeros(1, 1))
            self.softmax = FullSoftmax(data)

        def queries(self, batch):
            return self.place.expand(len(batch.length_B), 1)

        def keys(self):
            return torch.ones(24, 1)

        def loss(self, batch):
            return -self.place.sum()

    places, values = [], iter([0.1, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1])
    monkeypatch.setattr(
        network, "validate", lambda scorer, data: places.append(float(scorer.network.place)) or next(values)
    )
    best = Steps(Data(tastes, history=3))
    network.train_network("x", best, Data(tastes, history=3), seed=0, seconds=1.0)
    assert len(places) == 5  # the fifth look is the third without a better one
    assert float(best.place) == places[1]


# ---- the comparison ------------------------------------------------------------------------------------------


def setup_of(dataset, **settings) -> Setup:
    values = {"preset": "default", "history": 8, "seconds": 3.0, "trials": 2, "seeds": 2, "filter_seen": True}
    values |= {"validation_targets": 50, "max_targets": None} | settings
    return Setup(data=str(dataset.folder), content_hash=dataset.manifest.content_hash, **values)


def test_a_record_has_what_was_measured(tastes, tmp_path):
    record = record_of("svd", setup_of(tastes), tmp_path)
    assert [trial["settings"] for trial in record["tuning"]] == [{"rank": 50}, {"rank": 20}]
    best = max(record["tuning"], key=lambda trial: trial["ndcg@10"])
    assert record["chosen"] == best["settings"]
    assert len(record["seeds"]) == len(record["head"]) == 2
    assert record["seeds"][0]["overall"]["n"] == 80
    with np.load(tmp_path / "svd.npz") as ranks:
        assert np.mean(ranks["rank_SR"][1] <= 10) == record["seeds"][1]["overall"]["hr@10"]
    assert json.loads((tmp_path / "svd.json").read_text()) == json.loads(json.dumps(record))


def test_a_system_without_chance_is_fitted_once(tastes, tmp_path):
    assert len(record_of("ease", setup_of(tastes), tmp_path)["seeds"]) == 1


def test_what_a_dataset_lacks_is_told_and_what_breaks_is_no_end(tastes, tmp_path, monkeypatch):
    assert "no text vectors" in record_of("chakder", setup_of(tastes), tmp_path)["skipped"]
    monkeypatch.setattr(job, "_measured", lambda *arguments: 1 / 0)
    assert record_of("svd", setup_of(tastes), tmp_path)["failed"] == "ZeroDivisionError: division by zero"


def test_lists_full_of_the_head_are_seen(tmp_path):
    """Title 0 is a tenth of the catalogue and stands in every list that popularity gives."""
    titles = np.arange(1, 10)
    histories = [
        [(0, 0, TRAIN), (int(title), DAY, TRAIN), (11, 2 * DAY, VALID), (10, 3 * DAY, TEST)] for title in titles
    ]
    dataset = write_handmade(tmp_path / "d", histories, titles=12)
    record = record_of("popularity", setup_of(dataset, filter_seen=False), tmp_path)
    assert record["head"] == [pytest.approx(1 / 10)]  # of the ten places in a list it has one
    assert record["head_of_targets"] == 0


def test_paired_differences(tastes, tmp_path):
    for name in ("ease", "popularity"):
        record_of(name, setup_of(tastes), tmp_path)
    (tmp_path / "m5.npz").write_bytes((tmp_path / "ease.npz").read_bytes())
    found = against_m5(tmp_path, ["ease", "popularity"])
    assert found["ease"]["overall"] == {"difference": 0.0, "low": 0.0, "high": 0.0, "better": None}
    assert found["popularity"]["overall"]["better"] == "m5"
    assert found["popularity"]["overall"]["low"] > 0
    (tmp_path / "m5.npz").write_bytes((tmp_path / "popularity.npz").read_bytes())
    assert against_m5(tmp_path, ["ease"])["ease"]["overall"]["better"] == "ease"


def test_names_are_checked_and_m5_is_always_there():
    assert chosen(["all"]) == list(MODULES)
    assert chosen(["svd", "ease"]) == ["m5", "ease", "svd"]
    with pytest.raises(ConfigError, match=r"no 'sasrek'\. Did you mean sasrec"):
        chosen(["sasrek"])


def test_every_system_says_where_it_comes_from():
    for name in MODULES:
        found = system(name)
        assert found.name == name
        assert all((found.title, found.source, found.built_on, found.departures, found.settings))


def run_here(monkeypatch):
    """Systems in this process, and no pages: what is left is the order of things."""
    ran = []

    def run(names, setup, folder, jobs):
        ran.append(list(names))
        return {name: record_of(name, setup, folder) for name in names}

    monkeypatch.setattr(comparison, "_run", run)
    monkeypatch.setattr(comparison, "chosen", lambda names: list(names))
    monkeypatch.setattr(comparison, "write", lambda *arguments: None)
    return ran


def test_what_is_done_is_kept_and_other_setups_are_refused(tastes, tmp_path, monkeypatch):
    ran = run_here(monkeypatch)
    common = {"data": tastes.folder, "out": tmp_path / "c", "trials": 1, "seeds": 1}
    assert comparison.compare(systems=["ease"], **common) == 0
    assert comparison.compare(systems=["ease", "item-knn"], **common) == 0
    assert ran == [["ease"], ["item-knn"]]
    with pytest.raises(ConfigError, match="holds a comparison with trials=1, not 2"):
        comparison.compare(systems=["ease"], **(common | {"trials": 2}))


def test_what_failed_is_tried_again_and_tells_in_the_exit_code(tastes, tmp_path, monkeypatch):
    ran = run_here(monkeypatch)
    common = {"data": tastes.folder, "out": tmp_path / "c", "trials": 1, "seeds": 1, "systems": ["ease"]}
    with monkeypatch.context() as broken:
        broken.setattr(job, "_measured", lambda *arguments: 1 / 0)
        assert comparison.compare(**common) == 1
    assert comparison.compare(**common) == 0
    assert ran == [["ease"], ["ease"]]


def test_mistakes_are_told_before_anything_runs(tastes, tmp_path):
    with pytest.raises(ConfigError, match="--seconds 0"):
        comparison.compare(data=tastes.folder, systems=["all"], out=tmp_path / "c", seconds=0)
    with pytest.raises(ConfigError, match="no preset 'demoo'"):
        comparison.compare(data=tastes.folder, systems=["all"], out=tmp_path / "c", preset="demoo")
    assert not (tmp_path / "c").exists()


def test_ranks_of_rows_share_their_slices(tastes):
    scorers = [fitted("ease", tastes, steps=1), fitted("item-knn", tastes, steps=1)]
    found = rank_rows(tastes, scorers, more_slices=lambda requests: {"even": np.flatnonzero(requests.user % 2 == 0)})
    assert len(found.slices["even"]) == 40
    assert [found.measure(row, bootstrap=0, seed=0)["even"]["n"] for row in found.rows] == [40, 40]
    # Every list has ten of the 24 titles.
    assert [int(row.shown.count[:-1].sum()) for row in found.rows] == [800, 800]
