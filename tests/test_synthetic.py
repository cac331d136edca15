"""The synthetic world: its tables keep their promises, and its oracle is the law that the events follow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from data_prep.sources import synthetic
from data_prep.sources.synthetic_artwork import draw_poster
from data_prep.sources.synthetic_text import GENRES, THEMES
from m5.oracle import OracleScorer
from m5.schema import DataError, Manifest, PreparedDataset, Split, Vocabulary

USERS, TITLES, EVENTS = 600, 240, 12_000
TABLES = ("events", "users", "titles", "rights")


def prepared(raw: Path, folder: Path) -> PreparedDataset:
    """What the oracle reads of a prepared dataset, with users and titles in another order than the truth's."""
    rng = np.random.default_rng(5)
    events = pd.read_parquet(raw / "events.parquet")
    users = pd.read_parquet(raw / "users.parquet").sample(frac=1, random_state=1).reset_index(drop=True)
    titles = pd.read_parquet(raw / "titles.parquet").sample(frac=1, random_state=2).reset_index(drop=True)
    user = pd.Index(users["user_id"]).get_indexer(events["user_id"].astype(str))
    order = np.lexsort((events["ts"], user))
    (folder / "events").mkdir(parents=True)

    def write(name: str, values: np.ndarray) -> None:
        np.save(folder / "events" / f"{name}.npy", values)

    write(
        "offsets",
        np.concatenate([[0], np.cumsum(np.bincount(user, minlength=len(users)))]),
    )
    write(
        "title",
        pd.Index(titles["title_id"]).get_indexer(events["title_id"].astype(str))[order].astype(np.int32),
    )
    write("timestamp", events["ts"].to_numpy()[order])
    scenarios = []
    for name in ("region", "plan"):
        values = rng.permutation(sorted(events[name].astype(str).unique()))
        index = pd.Index(values).get_indexer(events[name].astype(str))
        write(f"scenario_{name}", (index[order] + 1).astype(np.int32))
        scenarios.append(Vocabulary(name=name, values=tuple(values.tolist())))
    users.to_parquet(folder / "users.parquet")
    titles.to_parquet(folder / "titles.parquet")
    (folder / "truth.npz").write_bytes((raw / "truth.npz").read_bytes())
    Manifest(
        source="tables",
        name="synthetic",
        n_users=len(users),
        n_titles=len(titles),
        n_events=len(events),
        n_cold_titles=0,
        split=Split(kind="time"),
        split_counts={},
        categories=Vocabulary(name="kind", values=("series", "movie", "live")),
        scenarios=tuple(scenarios),
    ).write(folder)
    return PreparedDataset(folder)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.generate(
        tmp_path_factory.mktemp("world") / "RAW",
        users=USERS,
        titles=TITLES,
        events=EVENTS,
        seed=3,
    ).parent


@pytest.fixture(scope="module")
def dataset(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    return prepared(raw, tmp_path_factory.mktemp("prepared") / "DATA")


@pytest.fixture(scope="module")
def law(dataset: PreparedDataset) -> tuple[np.ndarray, np.ndarray]:
    """The oracle's probability of every title at every event (float64 [T, N]), and the titles that were watched."""
    events = np.arange(dataset.manifest.n_events)
    return OracleScorer(dataset).score(events).astype(np.float64), np.asarray(dataset.event_array("title"))


def test_tables_have_the_columns_that_dataset_yaml_names(raw: Path) -> None:
    roles = yaml.safe_load((raw / "dataset.yaml").read_text())
    for table in TABLES:
        columns = set(pd.read_parquet(raw / roles[table].pop("path")).columns)
        named = pd.json_normalize(roles[table]).iloc[0].explode().tolist()
        assert set(named) <= columns, table
    assert (raw / roles["truth"]).is_file()
    titles = pd.read_parquet(raw / "titles.parquet")
    assert len(titles) == TITLES and titles["name"].is_unique and titles["title_id"].is_unique
    assert {Image.open(raw / path).size for path in titles["poster"]} == {(96, 128)}


def test_nobody_watches_a_title_twice_or_two_at_once(raw: Path) -> None:
    events = pd.read_parquet(raw / "events.parquet")
    assert 0.97 * EVENTS < len(events) <= EVENTS
    assert not events.duplicated(["user_id", "title_id"]).any()
    assert (events.groupby("user_id", observed=True)["ts"].diff().dropna() > 0).all()
    assert events["completion"].between(0, 1).all() and (events["watch_s"] > 0).all()


def test_every_event_was_allowed(raw: Path) -> None:
    events = pd.read_parquet(raw / "events.parquet").astype({"title_id": str, "region": str, "plan": str}).reset_index()
    rights = pd.read_parquet(raw / "rights.parquet").rename(columns={"plan": "right"})
    rows = events.merge(rights, on=["title_id", "region"])
    moment = pd.to_datetime(rows["ts"], unit="s")
    begins, ends = pd.to_datetime(rows["from"]), pd.to_datetime(rows["to"])
    covers = (rows["right"].isna() | (rows["right"] == rows["plan"])) & ~(moment < begins) & ~(moment >= ends)
    assert set(rows.loc[covers, "index"]) == set(events["index"])
    launched = events["title_id"].map(pd.read_parquet(raw / "titles.parquet").set_index("title_id")["launch_date"])
    assert (pd.to_datetime(launched) <= pd.to_datetime(events["ts"], unit="s")).all()


def test_some_titles_are_launched_after_the_training_period(raw: Path) -> None:
    events = pd.read_parquet(raw / "events.parquet")
    training = events["ts"] < events["ts"].quantile(0.8)
    cold = set(pd.read_parquet(raw / "titles.parquet")["title_id"]) - set(events.loc[training, "title_id"])
    assert 0.04 < len(cold) / TITLES < 0.14
    assert events.loc[~training, "title_id"].isin(cold).mean() > 0.05


def test_same_seed_same_world(raw: Path, tmp_path: Path) -> None:
    size = {"users": USERS, "titles": TITLES, "events": EVENTS, "posters": False}
    again = synthetic.generate(tmp_path / "again", seed=3, **size).parent
    other = synthetic.generate(tmp_path / "other", seed=4, **size).parent
    for table in ("events", "users", "rights"):
        assert (again / f"{table}.parquet").read_bytes() == (raw / f"{table}.parquet").read_bytes()
    assert (other / "events.parquet").read_bytes() != (raw / "events.parquet").read_bytes()
    assert not (again / "posters").exists()
    assert "artwork" not in yaml.safe_load((again / "dataset.yaml").read_text())["titles"]
    with np.load(again / "truth.npz") as truth, np.load(raw / "truth.npz") as expected:
        assert all(np.array_equal(truth[name], expected[name]) for name in expected.files)


def test_oracle_rows_are_distributions_that_allow_what_happened(
    law: tuple[np.ndarray, np.ndarray],
) -> None:
    probability, watched = law
    np.testing.assert_allclose(probability.sum(1), 1, atol=1e-5)
    assert (probability[np.arange(len(watched)), watched] > 0).all()


def test_oracle_is_calibrated(law: tuple[np.ndarray, np.ndarray]) -> None:
    """Titles given probability p are watched with frequency p: in bins of p, and for every title."""
    probability, watched = law
    hit = np.zeros_like(probability, dtype=bool)
    hit[np.arange(len(watched)), watched] = True
    variance = probability * (1 - probability)
    bins = np.digitize(probability, [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.2, 0.3, 0.5])
    for chosen in (bins == b for b in np.unique(bins)):
        surprise = hit[chosen].sum() - probability[chosen].sum()
        assert abs(surprise) < 4 * np.sqrt(variance[chosen].sum()) + 1
    z_title = (hit.sum(0) - probability.sum(0)) / np.sqrt(variance.sum(0) + 1e-9)
    busy = probability.sum(0) > 10
    assert np.abs(z_title[busy]).max() < 4.5
    assert 0.8 < np.mean(z_title[busy] ** 2) < 1.25  # the mean of squared normal scores is 1


def test_oracle_predicts_its_own_entropy(law: tuple[np.ndarray, np.ndarray]) -> None:
    """mean log P(watched) = mean of sum P log P: fails when P is too sharp, too flat, or somebody else's."""
    probability, watched = law
    row = np.arange(len(watched))
    log = np.log(np.maximum(probability, 1e-30))
    expected = (probability * log).sum(1)
    spread = np.sqrt(((probability * log**2).sum(1) - expected**2).sum())
    assert abs((log[row, watched] - expected).sum()) < 4 * spread
    blurred = np.log(0.8 * probability + 0.2 / probability.shape[1])
    assert log[row, watched].mean() > blurred[row, watched].mean() + 0.01


def test_oracle_equals_its_definition(dataset: PreparedDataset) -> None:
    """The docstring's formula, spelled out with loops over interests and titles."""
    truth = dict(np.load(dataset.folder / "truth.npz"))
    scorer, titles, users = (
        OracleScorer(dataset),
        dataset.titles["title_id"],
        dataset.users["user_id"],
    )
    title_of, time_of = dataset.event_array("title"), dataset.event_array("timestamp")
    scenario = {v.name: dataset.event_array(f"scenario_{v.name}") for v in dataset.manifest.scenarios}
    names = {v.name: v.values for v in dataset.manifest.scenarios}
    events = np.random.default_rng(0).choice(dataset.manifest.n_events, 12, replace=False)
    events[0] = dataset.offsets[7]  # a viewer's first event
    for event, row in zip(events, scorer.score(events), strict=True):
        user = int(np.searchsorted(dataset.offsets, event, side="right")) - 1
        place = list(truth["user_id"]).index(users[user])
        region, plan = (list(truth[n]).index(names[n][scenario[n][event] - 1]) for n in ("region", "plan"))
        week = int(time_of[event] - truth["start"]) // int(truth["week"])
        previous = truth["previous"][truth["offset"][place] + event - dataset.offsets[user]]
        themes, weights = (
            truth["interest_theme"][place],
            truth["interest_weight"][place].astype(float),
        )
        share = [
            w * np.exp(float(truth["theme_appeal"][region, plan, week, t]))
            for t, w in zip(themes, weights, strict=True)
        ]
        share = [s / sum(share) for s in share]
        if previous >= 0:
            stay = float(truth["persistence"])
            share = [stay * (k == previous) + (1 - stay) * s for k, s in enumerate(share)]
        expected = np.zeros(len(titles))
        for i, title_id in enumerate(titles):
            j = list(truth["title_id"]).index(title_id)
            theme = truth["title_theme"][j]
            followed = sum(s * truth["spill"][t, theme] for t, s in zip(themes, share, strict=True))
            mixed = (1 - truth["noise"]) * followed + truth["noise"] * truth["noise_theme"][theme]
            expected[i] = truth["title_probability"][region, plan, week, j] * mixed
        expected[title_of[dataset.offsets[user] : event]] = 0
        np.testing.assert_allclose(row, expected / expected.sum(), rtol=1e-4, atol=1e-9)


def test_scenario_matters(dataset: PreparedDataset, law: tuple[np.ndarray, np.ndarray]) -> None:
    """The best guess without region and plan, among playable titles, is worth much less: NDCG@10 down by over 15%."""
    probability, watched = law
    scorer = OracleScorer(dataset)
    events = np.arange(len(watched))
    region, plan, week = scorer.cell(events)
    cells, share = np.unique(np.stack([region, plan]), axis=1, return_counts=True)
    blind = np.zeros_like(probability)
    for (r, p), weight in zip(cells.T, share / share.sum(), strict=True):
        scorer.cell = lambda _, r=r, p=p: (
            np.full_like(region, r),
            np.full_like(plan, p),
            week,
        )
        blind += weight * scorer.score(events)
    blind[probability == 0] = 0
    assert _ndcg(probability, watched) > 1.15 * _ndcg(blind, watched)


def _ndcg(score: np.ndarray, watched: np.ndarray) -> float:
    target = score[np.arange(len(watched)), watched]
    rank = 1 + (score > target[:, None]).sum(1)
    return float(np.where(rank <= 10, 1 / np.log2(rank + 1), 0).mean())


def test_watch_time_follows_utility(raw: Path, dataset: PreparedDataset, law: tuple[np.ndarray, np.ndarray]) -> None:
    probability, watched = law
    events = pd.read_parquet(raw / "events.parquet").astype({"user_id": str})
    events["user"] = pd.Index(dataset.users["user_id"]).get_indexer(events["user_id"])
    completion = events.sort_values(["user", "ts"])["completion"].to_numpy()
    likely = probability[np.arange(len(watched)), watched]
    low, high = np.quantile(likely, [0.25, 0.75])
    assert completion[likely > high].mean() > completion[likely < low].mean() + 0.15
    accidents = (completion < 0.2).mean()
    assert 0.03 < accidents < 0.2  # over `noise`, because in so small a world much of what viewers like was seen
    assert likely[completion < 0.1].mean() < 0.5 * likely[completion > 0.5].mean()


def test_posters_carry_the_genre() -> None:
    """The nearest poster by 12 x 16 pixels has the same genre."""
    labels = np.repeat(np.arange(len(GENRES)), 40)
    rng = np.random.default_rng(1)
    posters = [draw_poster(int(genre), int(rng.integers(4)), rng).resize((12, 16)) for genre in labels]
    pixels = np.stack([np.asarray(poster, dtype=np.float64).ravel() for poster in posters])
    half = np.arange(len(labels)) % 2 == 0
    distance = ((pixels[~half][:, None] - pixels[half]) ** 2).sum(2)
    assert (labels[half][distance.argmin(1)] == labels[~half]).mean() > 0.9  # chance is 1 / 12


def test_descriptions_carry_the_theme(raw: Path) -> None:
    """Counting words shared with the other titles' descriptions finds a title of the same theme."""
    texts = pd.read_parquet(raw / "titles.parquet")["text"]
    theme = np.load(raw / "truth.npz")["title_theme"]
    words = texts.str.lower().str.findall("[a-z]{4,}").explode()
    present = pd.crosstab(words.index, words).clip(upper=1).to_numpy(dtype=float)
    present = present * np.log(len(texts) / present.sum(0))
    unit = present / np.linalg.norm(present, axis=1, keepdims=True)
    similarity = unit @ unit.T - 2 * np.eye(len(texts))
    assert (theme[similarity.argmax(1)] == theme).mean() > 0.9  # chance is 1 / 48
    assert len(THEMES) == 48 and all(len(theme.nouns) == 4 for theme in THEMES)


@pytest.mark.parametrize(
    ("size", "word"),
    [
        ({"titles": 10}, "10 titles"),
        ({"users": 100, "events": 50}, "50 events"),
        ({"users": 10, "events": 1000, "titles": 96}, "none watched twice"),
        ({"regions": 9}, "9 regions"),
        ({"plans": ()}, "0 plans"),
    ],
)
def test_impossible_sizes_are_refused(tmp_path: Path, size: dict, word: str) -> None:
    with pytest.raises(DataError, match=word):
        synthetic.generate(tmp_path / "RAW", **size)
    assert list(tmp_path.iterdir()) == []


def test_failure_leaves_the_old_world_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "RAW").mkdir()
    for name in ("mine.txt", "truth.npz", "dataset.yaml"):  # an earlier world, which may be replaced
        (tmp_path / "RAW" / name).write_text("kept")

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(synthetic, "draw_posters", full_disk)
    with pytest.raises(OSError, match="No space"):
        synthetic.generate(tmp_path / "RAW", users=20, titles=96, events=100)
    assert [path.name for path in tmp_path.iterdir()] == ["RAW"]
    assert (tmp_path / "RAW" / "mine.txt").read_text() == "kept"


def test_one_region_and_three_plans(tmp_path: Path) -> None:
    raw = synthetic.generate(
        tmp_path / "RAW",
        users=200,
        titles=200,
        events=2000,
        regions=1,
        plans=("free", "ads", "premium"),
        posters=False,
    ).parent
    data = prepared(raw, tmp_path / "DATA")
    probability = OracleScorer(data).score(np.arange(data.manifest.n_events))
    assert (probability[np.arange(len(probability)), data.event_array("title")] > 0).all()


def test_oracle_refuses_a_dataset_that_is_not_its_own(raw: Path, tmp_path: Path) -> None:
    other = synthetic.generate(
        tmp_path / "RAW",
        users=USERS,
        titles=TITLES,
        events=EVENTS,
        seed=9,
        posters=False,
    ).parent
    data = prepared(raw, tmp_path / "DATA")
    (data.folder / "truth.npz").write_bytes((other / "truth.npz").read_bytes())
    with pytest.raises(DataError, match="does not belong to this dataset"):
        OracleScorer(data)
    (data.folder / "truth.npz").unlink()
    with pytest.raises(DataError, match="synthetic world"):
        OracleScorer(data)
