"""Lund & Ng, Mu & Wu, Siet et al.: what each is made to find, and the rating task they share with Surprise."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks.literature import lund_ng, mu_wu, rating, siet
from benchmarks.literature.data import Data
from benchmarks.literature.network import Network, NetworkScorer
from benchmarks.literature.rating_data import Ratings, World, folds, read_world
from benchmarks.literature.rating_network import RatingNetwork, predict
from benchmarks.literature.rating_report import record, write_report
from m5.config import ConfigError
from m5.evaluate import evaluate
from m5.schema import TEST, TRAIN, VALID, DataError, Intensity, Manifest, PreparedDataset
from tests.handmade import write_handmade

LONG = 600.0  # seconds that no training here needs: validation ends it
MATCHERS: dict[str, Callable[[Data], Network]] = {
    "lund-ng": lambda data: lund_ng.LundNg(data, loss="softmax", width=32, layers=1, dropout=0, masked=0.4),
    "mu-wu": lambda data: mu_wu.MuWu(data, loss="softmax", width=16, channels=4, dropout=0),
    "siet": lambda data: siet.Siet(data, loss="softmax", width=16, blocks=1, dropout=0, negatives=100),
}
RATERS: dict[str, Callable[[World], RatingNetwork]] = {
    "lund-ng": lambda world: lund_ng.RatingAutoencoder(world, width=64, layers=1, dropout=0, masked=0),
    "mu-wu": lambda world: mu_wu.RatingTowers(world, width=16, channels=4, dropout=0),
    "siet": lambda world: siet.RatingTransformer(world, length=5, width=16, blocks=1, dropout=0),
}


def steps(network: Any, draw: Callable[[], Any], count: int, lr: float) -> None:
    """So many steps, however long they take."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0)
    network.train()
    for _ in range(count):
        optimizer.zero_grad()
        network.loss(draw()).backward()
        optimizer.step()
    network.eval()


def prepared(folder: Path, histories: list[list[int]], titles: int) -> PreparedDataset:
    """Histories of titles, the last two for validation and test, with ratings, genres, descriptions and posters."""
    split = [[TRAIN] * (len(history) - 2) + [VALID, TEST] for history in histories]
    events = [
        [(t, 60 * i, s) for i, (t, s) in enumerate(zip(h, p, strict=True))]
        for h, p in zip(histories, split, strict=True)
    ]
    write_handmade(folder, events, titles=titles)
    generator = np.random.default_rng(0)
    stars = generator.integers(1, 6, sum(map(len, histories))).astype(np.float32)
    np.save(folder / "events" / "intensity_rating.npy", stars)
    (folder / "content").mkdir()
    np.save(folder / "content" / "image.npy", generator.normal(size=(titles, 5)).astype(np.float32))
    table = pd.read_parquet(folder / "titles.parquet")
    table["genres"] = [[f"g{title % 3}"] for title in range(titles)]
    table["description"] = [f"A tale of number {title % 7}." for title in range(titles)]
    table.to_parquet(folder / "titles.parquet")
    rating_column = Intensity(name="rating", boundaries=(1.5, 2.5, 3.5, 4.5))
    manifest = Manifest.read(folder).model_copy(update={"intensities": (rating_column,), "metadata": ("genres",)})
    manifest.write(folder)
    return PreparedDataset(folder)


def world_of(ratings: Ratings, *, users: int, titles: int, **more: Any) -> World:
    """A world in which nothing is known of users and titles, `more` aside."""
    empty: dict[str, Any] = {"feature_UF": np.zeros((users, 0), np.int64), "feature_sizes": (), "digest": "x"}
    empty |= {"text": ["film"] * titles, "genres": [[] for _ in range(titles)], "name": "handmade"}
    return World(ratings=ratings, n_users=users, n_titles=titles, low=1.0, high=5.0, **(empty | more))


def rmse(predicted: np.ndarray, ratings: Ratings) -> float:
    return float(np.sqrt(np.square(predicted - ratings.value_R).mean()))


@pytest.fixture(scope="module")
def ten_users(tmp_path_factory: pytest.TempPathFactory) -> Data:
    generator = np.random.default_rng(1)
    histories = [generator.permutation(60)[:9].tolist() for _ in range(10)]
    return Data(prepared(tmp_path_factory.mktemp("ten") / "data", histories, 60), history=8)


@pytest.mark.parametrize("name", MATCHERS)
def test_matchers_overfit_ten_users(ten_users: Data, name: str) -> None:
    torch.manual_seed(0)
    network = MATCHERS[name](ten_users)
    windows = ten_users.training_windows(np.random.default_rng(0))
    batch, events = ten_users.sequences(windows), windows.last
    steps(network, lambda: batch, 250, 1e-2)
    # The ten last training events, each to be found among the titles that its viewer had not watched.
    score_BN = NetworkScorer(name, network, ten_users).score(events)
    score_BN.scatter_(1, batch.title_BL[:, 1:], -torch.inf)
    own_B1 = score_BN.gather(1, torch.from_numpy(ten_users.title[events])[:, None])
    assert bool(((score_BN > own_B1).sum(1) == 0).all())


@pytest.mark.parametrize("name", RATERS)
def test_raters_overfit_ten_users(name: str) -> None:
    generator = np.random.default_rng(2)
    user, title = np.divmod(generator.permutation(10 * 30)[:100], 30)
    ratings = Ratings(user, title, generator.integers(1, 6, 100).astype(np.float32), np.arange(100))
    torch.manual_seed(0)
    network = RATERS[name](world_of(ratings, users=10, titles=30))
    network.read(ratings)
    steps(network, lambda: np.arange(network.examples()), 300, 1e-2)
    assert rmse(predict(network, ratings), ratings) < 0.1


def test_lund_ng_finds_ratings_of_low_rank() -> None:
    generator = np.random.default_rng(3)
    users, titles = 300, 40
    taste_U, kind_N = generator.choice([-1.0, 1.0], users), generator.choice([-1.0, 1.0], titles)
    user, title = np.divmod(generator.permutation(users * titles)[: users * 20], titles)
    value = (3 + 1.5 * taste_U[user] * kind_N[title]).astype(np.float32)
    ratings = Ratings(user, title, value, np.arange(len(user)))
    train, test = ratings.take(np.arange(5000)), ratings.take(np.arange(5000, 6000))
    hidden = test._replace(value_R=np.full(1000, np.nan, np.float32))
    found = lund_ng.fit_predict(train, hidden, world_of(ratings, users=users, titles=titles), 0, LONG)
    assert rmse(found, test) < 0.5 * float(test.value_R.std())


def test_mu_wu_reads_words_and_groups() -> None:
    """One group likes love stories, the other war: also among titles that nobody has rated."""
    generator = np.random.default_rng(4)
    users, titles, rated = 60, 60, 40
    group_U, word_N = generator.integers(1, 3, users), generator.integers(1, 3, titles)
    user, title = np.divmod(np.arange(users * titles), titles)
    value = np.where(group_U[user] == word_N[title], 5, 1).astype(np.float32)
    ratings = Ratings(user, title, value, np.arange(len(user)))
    text = [f"Film {n} about {'love' if word_N[n] == 1 else 'war'} and the rest" for n in range(titles)]
    world = world_of(ratings, users=users, titles=titles, text=text, feature_UF=group_U[:, None], feature_sizes=(3,))
    torch.manual_seed(0)
    network = mu_wu.RatingTowers(world, width=8, channels=4, dropout=0.1)
    network.read(ratings.take(title < rated))
    steps(network, lambda: generator.integers(0, network.examples(), 128), 250, 1e-2)
    test = ratings.take(title >= rated)
    assert rmse(predict(network, test), test) < 0.5 * float(test.value_R.std())


def test_siet_follows_the_last_title(tmp_path: Path) -> None:
    generator = np.random.default_rng(5)
    titles = 40
    following = generator.permutation(titles)
    histories = []
    for first in range(2 * titles):
        history = [first % titles]
        for _ in range(6):
            history.append(int(following[history[-1]]))
        histories.append(history)
    data = Data(prepared(tmp_path / "data", histories, titles), history=6)
    torch.manual_seed(0)
    network = MATCHERS["siet"](data)
    steps(network, lambda: data.sequences(generator.choice(data.train, 32)), 150, 1e-2)
    clusters = siet.genre_clusters(data, 3, 0)
    assert [len(set(clusters[kind::3].tolist())) for kind in range(3)] == [1, 1, 1]
    scorer = siet.SietScorer(network, data, clusters, 0.0)
    found = evaluate(data.dataset, [scorer], split="test", filter_seen=False, bootstrap=0)
    assert found["models"]["siet"]["overall"]["ndcg@10"] > 0.9


def test_clusters_take_turns() -> None:
    score_BN = torch.tensor([[9.0, 8.0, 7.0, 1.0]])
    cluster_N = torch.tensor([0, 0, 0, 1])
    assert torch.equal(siet.mixed(score_BN, cluster_N, 0.0), score_BN)
    spread = float(np.std([9.0, 8.0, 7.0, 1.0], ddof=1))
    lowered = [9.0, 8.0 - 2 * spread, 7.0 - 2 * spread * np.log2(3), 1.0]
    found_BN = siet.mixed(score_BN, cluster_N, 2.0)
    assert found_BN[0].tolist() == pytest.approx(lowered, rel=1e-5)
    assert found_BN.argsort(descending=True)[0].tolist() == [0, 3, 1, 2]


@pytest.mark.parametrize("module", [lund_ng, mu_wu, siet])
@pytest.mark.parametrize("loss", ["softmax", "rating"])
def test_systems_fit_with_either_loss(ten_users: Data, module: Any, loss: str) -> None:
    settings = next(settings for settings in module.SYSTEM.settings if settings["loss"] == loss)
    scorer = module.SYSTEM.fit(ten_users, settings, 0, 0.2)
    score_BN = scorer.score(ten_users.train[:3])
    assert scorer.name == module.SYSTEM.name
    assert score_BN.shape == (3, 60) and bool(torch.isfinite(score_BN).all())


def test_siet_reads_strictly_earlier_ratings() -> None:
    ratings = Ratings(
        np.array([0, 0, 0, 1]), np.array([0, 1, 2, 2]), np.array([1, 5, 3, 3], np.float32), np.array([5, 5, 9, 1])
    )
    torch.manual_seed(0)
    network = RATERS["siet"](world_of(ratings, users=2, titles=3)).eval()
    network.read(ratings)
    before = predict(network, ratings)
    network.read(ratings._replace(value_R=np.array([1, 5, 5, 1], np.float32)))  # the mean stays 3
    assert predict(network, ratings) == pytest.approx(before)
    network.read(ratings._replace(value_R=np.array([5, 1, 3, 3], np.float32)))
    changed = predict(network, ratings) != pytest.approx(before, abs=1e-6)
    assert changed and predict(network, ratings)[:2] == pytest.approx(before[:2])


def test_words_are_numbered() -> None:
    assert mu_wu.words_of(["Love, love & War (1995)"]) == [["love", "love", "war", "1995"]]
    table, size = mu_wu.numbered([["b", "a", "a"], ["a", "b"], ["rare"]], at_most=2)
    assert table.tolist() == [[2, 1], [1, 2], [0, 0]] and size == 3


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """40 users and 30 movies in the layout of MovieLens 100K."""
    generator = np.random.default_rng(6)
    folder = tmp_path / "ml-small"
    folder.mkdir()
    user, title = np.divmod(generator.permutation(40 * 30)[:400], 30)
    stars = generator.integers(1, 6, 400)
    rows = zip(user + 1, title + 1, stars, np.arange(400), strict=True)
    (folder / "u.data").write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))
    genre = ["1" if n % 2 else "0" for n in range(19)]
    movies = [f"{n}|Film {n} (1995)|||" + "|" + "|".join(genre) for n in range(1, 31)]
    (folder / "u.item").write_text("\n".join(movies) + "\n")
    (folder / "u.user").write_text("\n".join(f"{n}|{20 + n % 3}|{'MF'[n % 2]}|writer|85711" for n in range(1, 41)))
    return folder


def test_the_official_layout_is_read(official: Path) -> None:
    world = read_world(official)
    assert (world.name, world.n_users, world.n_titles, world.low, world.high, world.note) == (
        "ml-small",
        40,
        30,
        1,
        5,
        "",
    )
    assert world.feature_sizes == (3, 2, 2) and world.feature_UF.min() == 1
    assert world.text[2] == "Film 3 (1995) " and "Action" in world.genres[0]
    first = (official / "u.data").read_text().split("\n")[0].split("\t")
    assert world.ratings.value_R[0] == float(first[2]) and world.ratings.title_R[0] == int(first[1]) - 1


def test_every_rating_is_tested_once() -> None:
    parts = list(folds(23, 5, 0))
    assert sorted(np.concatenate([test for _, test in parts]).tolist()) == list(range(23))
    assert [len(test) for _, test in parts] == [5, 5, 5, 4, 4]
    for train, test in parts:
        assert sorted(np.concatenate([train, test]).tolist()) == list(range(23))
    assert parts[0][1].tolist() == next(folds(23, 5, 0))[1].tolist() != next(folds(23, 5, 1))[1].tolist()
    with pytest.raises(ConfigError, match="at least 2"):
        next(folds(23, 1, 0))


def test_predictions_are_clipped() -> None:
    nothing = np.zeros(0)
    world = world_of(Ratings(nothing, nothing, nothing, nothing), users=0, titles=0)
    found = rating.errors(np.array([9.0, -3.0, 2.0]), np.array([5.0, 2.0, 4.0]), world)
    assert found == pytest.approx((np.sqrt((0 + 1 + 4) / 3), (0 + 1 + 2) / 3))
    with pytest.raises(DataError, match="not finite"):
        rating.errors(np.array([np.nan]), np.array([3.0]), world)


def test_published_figures_stand_in_the_table(official: Path, tmp_path: Path) -> None:
    world = dataclasses.replace(read_world(official), name="ml-100k")
    results = [
        {"rmse": 0.93, "mae": 0.7, "seconds": 1.0, "peak_gb": 0.5},
        {"rmse": 0.95, "mae": 0.8, "seconds": 3.0, "peak_gb": 0.4},
    ]
    records = [record(system, results, world) for system in rating.SYSTEMS]
    page = write_report(tmp_path, records, world, ["Mind the data."], ["python"], 2, 0).read_text()
    assert "| Surprise SVD++ | 0.9400 ± 0.0100 | 0.9190 | +0.0210 | 0.7500 ± 0.0500 | 0.7210 | 2 | 0.5 |" in page
    assert "| Siet et al. transformer | 0.9400 ± 0.0100 | 1.0756 | -0.1356 | 0.7500 ± 0.0500 | – |" in page
    assert "| Mu & Wu multi-modal CNN | 0.9400 ± 0.0100 | 0.9908 |" in page
    assert "**Mind the data.**" in page
    kept = json.loads((tmp_path / "ratings.json").read_text())["systems"]
    assert {row["name"]: row["claimed"].get("ml-1m", {}).get("rmse") for row in kept} == {
        "svd": 0.873,
        "svdpp": 0.862,
        "knn-basic": 0.923,
        "knn-means": 0.929,
        "knn-baseline": 0.895,
        "baseline": 0.909,
        "lund-ng": None,
        "mu-wu": 0.9096,
        "siet": None,
    }


def test_other_ratings_of_the_official_size_are_told() -> None:
    count, users = 100_000, 943
    world_ratings = Ratings(
        np.arange(count) % users, np.zeros(count, np.int64), np.full(count, 3, np.float32), np.arange(count)
    )
    from benchmarks.literature.rating_data import _identify

    name, note = _identify(world_ratings, users, "mine")
    assert name == "ml-100k" and "1 stars 0 for 6,110" in note


def test_finished_folds_are_not_run_again(
    official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = rating.run_fold
    done: list[tuple[str, int]] = []

    def counted(name: str, world: World, fold: int, *rest: Any) -> rating.Fold:
        if len(done) == 1 and fold == 1:
            done.append(("stopped", fold))
            raise KeyboardInterrupt
        done.append((name, fold))
        return run(name, world, fold, *rest)

    monkeypatch.setattr(rating, "run_fold", counted)
    words = [str(official), "--out", str(tmp_path / "out"), "--folds", "3", "--jobs", "0"]
    assert rating.main([*words, "--systems", "svd"]) == 130
    assert "same command goes on" in capsys.readouterr().err
    assert rating.main([*words, "--systems", "baseline,svd"]) == 0
    assert done == [("svd", 0), ("stopped", 1), ("svd", 1), ("svd", 2), *[("baseline", fold) for fold in range(3)]]
    found = json.loads((tmp_path / "out" / "ratings.json").read_text())
    assert [row["name"] for row in found["systems"]] == ["svd", "baseline"]
    assert all(len(row["folds"]["rmse"]) == 3 for row in found["systems"])
    assert found["systems"][0]["mean"]["rmse"] == pytest.approx(np.mean(found["systems"][0]["folds"]["rmse"]))
    assert rating.main([*words, "--systems", "svd", "--seed", "1"]) == 2
    assert "another seed (0, now 1)" in capsys.readouterr().err


def test_all_wins_and_spaces_are_as_good_as_commas() -> None:
    names = [system.name for system in rating.SYSTEMS]
    assert [system.name for system in rating.chosen(["all", "svd"])] == names
    assert [system.name for system in rating.chosen(["baseline,svd"])] == ["svd", "baseline"]
    assert [system.name for system in rating.chosen(["baseline", "svd"])] == ["svd", "baseline"]


def test_folds_with_other_descriptions_are_other_folds(
    official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(official), "--out", str(tmp_path / "out"), "--folds", "2", "--jobs", "0", "--systems", "baseline"]
    assert rating.main(words) == 0
    (official / "u.user").write_text((official / "u.user").read_text().replace("writer", "doctor", 1))
    assert rating.main(words) == 2
    assert "has folds of another data" in capsys.readouterr().err
    items = official / "u.item"
    before = read_world(official).digest
    items.write_text(items.read_text().replace("Film 3 ", "Movie 3 "))
    renamed = read_world(official).digest
    items.write_text(items.read_text().replace("|0|1|", "|1|1|"))
    assert len({before, renamed, read_world(official).digest}) == 3


def test_folds_run_in_processes(official: Path, tmp_path: Path) -> None:
    words = [str(official), "--folds", "2", "--systems", "baseline"]
    assert rating.main([*words, "--out", str(tmp_path / "apart"), "--jobs", "2"]) == 0
    assert rating.main([*words, "--out", str(tmp_path / "here"), "--jobs", "0"]) == 0
    apart, here = (
        json.loads((tmp_path / name / "ratings.json").read_text())["systems"][0] for name in ("apart", "here")
    )
    assert apart["folds"]["rmse"] == here["folds"]["rmse"] and apart["peak_gb"] > 0


def test_values_of_the_tested_fold_are_hidden(official: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cheat = dataclasses.replace(rating.SYSTEMS[0], fit_predict=lambda train, test, *rest: test.value_R)
    monkeypatch.setattr(rating, "SYSTEMS", (cheat,))
    with pytest.raises(DataError, match="not finite"):
        rating.run_fold("svd", read_world(official), 0, 2, 0, 1.0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.zip"], "nowhere.zip does not exist"),
        (["{data}", "--systems", "svd,slope-one"], "there is no rating system 'slope-one'"),
        (["{data}", "--folds", "1"], "at least 2"),
        (["{data}", "--seconds", "0"], "--seconds must be above 0"),
    ],
)
def test_mistakes_are_told(
    official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    out = tmp_path / "out"
    assert rating.main([*(word.format(data=official) for word in words), "--out", str(out)]) == 2
    assert message in capsys.readouterr().err and not out.exists()


def test_a_damaged_file_of_folds_is_told(official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folds").mkdir()
    (tmp_path / "folds" / "baseline.json").write_text("{")
    assert rating.main([str(official), "--out", str(tmp_path), "--systems", "baseline", "--jobs", "0"]) == 2
    assert "is damaged. Remove it" in capsys.readouterr().err
