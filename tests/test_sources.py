"""Sources: MovieLens' official layouts and the Globo log, written small; and the real ML-1M where M5_DATA is set."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data_prep.prepare import prepare_dataset
from data_prep.sources import globo, movielens
from data_prep.sources.held_out import hold_out_newest
from m5.cli import main
from m5.schema import TEST, VALID, DataError, PreparedDataset

RATINGS_1M = ["1::10::5::300", "1::20::3::300", "1::30::4::300", "2::20::1::50", "2::10::2::40", "2::30::5::60"]
USERS_1M = ["1::F::1::10::48067", "2::M::56::16::00000"]
MOVIES_1M = ["10::Misérables, Les (1995)::Drama|Musical", "20::Heat (1995)::Action|Crime", "30::No Genre::"]


def ml_1m(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, lines in (("ratings", RATINGS_1M), ("users", USERS_1M), ("movies", MOVIES_1M)):
        (folder / f"{name}.dat").write_text("\n".join(lines) + "\n", encoding="latin-1")
    return folder


def ml_100k(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "u.data").write_text("1\t1\t5\t10\n1\t2\t3\t20\n1\t3\t4\t30\n")
    (folder / "u.user").write_text("1|24|M|technician|T8H1N\n")
    flags = {1: "Comedy", 2: "Horror", 3: None}
    (folder / "u.item").write_text(
        "".join(
            f"{movie}|Film {movie} (1984)|01-Jan-1984||http://x|"
            + "|".join("1" if name == genre else "0" for name in movielens.GENRES_100K)
            + "\n"
            for movie, genre in flags.items()
        ),
        encoding="latin-1",
    )
    return folder


def ml_latest(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,1,4.5,10\n1,2,0.5,20\n1,3,3.0,30\n")
    (folder / "movies.csv").write_text(
        'movieId,title,genres\n1,"American President, The (1995)",Comedy|Drama\n2,X (2001),(no genres listed)\n'
        "3,Y,War\n"
    )
    return folder


def prepare(spec: object, out: Path) -> PreparedDataset:
    prepare_dataset(spec, out, split="leave-last-out")
    return PreparedDataset(out)


def test_ml_1m_layout(tmp_path: Path) -> None:
    dataset = prepare(movielens.load(ml_1m(tmp_path / "ml-1m"), tmp_path / "work"), tmp_path / "data")
    manifest = dataset.manifest
    assert (manifest.source, manifest.name) == ("movielens", "ml-1m")
    # The file's order breaks user 1's ties; user 2 is sorted by time.
    assert dataset.titles["title_id"].to_numpy()[dataset.event_array("title")].tolist() == [
        "10",
        "20",
        "30",
        "10",
        "20",
        "30",
    ]
    assert dataset.event_array("intensity_rating").tolist() == [5, 3, 4, 2, 1, 5]
    assert dataset.titles["title"].tolist() == ["Misérables, Les (1995)", "Heat (1995)", "No Genre"]
    assert [list(genres) for genres in dataset.titles["genres"]] == [["Drama", "Musical"], ["Action", "Crime"], []]
    assert [list(decade) for decade in dataset.titles["decade"]] == [["1990s"], ["1990s"], []]
    categories = [manifest.categories.values[index - 1] for index in dataset.titles["category"]]
    assert categories == ["drama", "action", "other"]
    assert [scenario.name for scenario in manifest.scenarios] == ["region", "age_band"]
    assert manifest.scenarios[0].values == ("Midwest",)
    assert dataset.event_array("scenario_region").tolist() == [1, 1, 1, 0, 0, 0]
    assert manifest.scenarios[1].values == ("56-and-over", "under-18")
    features = {feature.name: feature.values for feature in manifest.user_features}
    assert features["occupation"] == ("k12-student", "self-employed")
    assert features["gender"] == ("F", "M")


def test_zip_equals_folder(tmp_path: Path) -> None:
    folder = ml_1m(tmp_path / "ml-1m")
    with zipfile.ZipFile(tmp_path / "ml-1m.zip", "w") as archive:
        for path in folder.iterdir():
            archive.write(path, f"ml-1m/{path.name}")
    one = prepare(movielens.load(folder, tmp_path / "work1"), tmp_path / "data1")
    two = prepare(movielens.load(tmp_path / "ml-1m.zip", tmp_path / "work2"), tmp_path / "data2")
    assert one.manifest.content_hash == two.manifest.content_hash


def test_ml_100k_layout(tmp_path: Path) -> None:
    dataset = prepare(movielens.load(ml_100k(tmp_path / "ml-100k"), tmp_path / "work"), tmp_path / "data")
    assert dataset.event_array("intensity_rating").tolist() == [5, 3, 4]
    assert dataset.titles["title"].tolist() == ["Film 1 (1984)", "Film 2 (1984)", "Film 3 (1984)"]
    assert [list(genres) for genres in dataset.titles["genres"]] == [["Comedy"], ["Horror"], []]
    assert dataset.manifest.scenarios[0].values == ()  # a Canadian post code is no US region
    assert dataset.manifest.scenarios[1].values == ("18-24",)
    assert dataset.manifest.user_features[1].values == ("technician",)


def test_ml_latest_layout(tmp_path: Path) -> None:
    dataset = prepare(movielens.load(ml_latest(tmp_path / "ml-latest-small"), tmp_path / "work"), tmp_path / "data")
    assert dataset.manifest.scenarios == ()
    assert dataset.event_array("intensity_rating").tolist() == [4.5, 0.5, 3.0]
    assert dataset.titles["title"].tolist() == ["American President, The (1995)", "X (2001)", "Y"]
    assert [list(genres) for genres in dataset.titles["genres"]] == [["Comedy", "Drama"], [], ["War"]]


@pytest.mark.parametrize(
    ("zip_code", "region"),
    [
        ("02139", "Northeast"),
        ("19104", "Northeast"),
        ("30303", "South"),
        ("73301", "South"),
        ("60601-1234", "Midwest"),
        ("80202", "West"),
        ("94105", "West"),
        ("09012", None),  # military
        ("00901", None),  # Puerto Rico
        ("00000", None),
        ("V5K0A", None),
    ],
)
def test_regions_of_zip_codes(tmp_path: Path, zip_code: str, region: str | None) -> None:
    folder = ml_1m(tmp_path / "ml-1m")
    (folder / "users.dat").write_text(f"1::F::25::0::{zip_code}\n2::M::25::0::60601\n")
    movielens.load(folder, tmp_path / "work")
    found = pd.read_parquet(tmp_path / "work" / "users.parquet")["region"].iloc[0]
    assert found == region if region else pd.isna(found)


def make_extras(folder: Path) -> tuple[Path, Path]:
    """A titles table that knows two of the movies, and a tar with one poster and one other file."""
    pd.DataFrame(
        {
            "show_id": [20, 10],
            "description": ["A heist.", None],
            "genres": [["Thriller", "Heist"], []],
            "actors": [["Pacino", "De Niro"], []],
            "year": [1985, 1985],
        }
    ).to_parquet(folder / "titles.parquet")
    with tarfile.open(folder / "posters.tar", "w") as archive:
        for name, content in (("posters/20.jpg", b"jpeg"), ("../../evil.jpg", b"evil"), ("readme.txt", b"text")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return folder / "titles.parquet", folder / "posters.tar"


def test_titles_and_posters_are_joined(tmp_path: Path) -> None:
    titles, posters = make_extras(tmp_path)
    spec = movielens.load(ml_1m(tmp_path / "ml-1m"), tmp_path / "work", titles=titles, posters=posters)
    dataset = prepare(spec, tmp_path / "data")
    frame = dataset.titles
    assert dataset.manifest.metadata == ("genres", "actors", "decade")
    assert frame["description"].tolist() == ["", "A heist.", ""]
    assert [list(genres) for genres in frame["genres"]] == [["Drama", "Musical"], ["Thriller", "Heist"], []]
    assert [list(actors) for actors in frame["actors"]] == [[], ["Pacino", "De Niro"], []]
    assert [list(decade) for decade in frame["decade"]] == [["1980s"], ["1980s"], []]
    assert frame["artwork"].iloc[[0, 2]].tolist() == ["", ""]
    poster = Path(frame["artwork"].iloc[1])
    assert poster.is_absolute()
    assert poster.read_bytes() == b"jpeg"
    # Nothing of the tar lands outside the work folder, and it is unpacked once.
    assert sorted(path.name for path in poster.parent.iterdir()) == ["20.jpg", "evil.jpg"]
    poster.write_bytes(b"touched")
    movielens.load(tmp_path / "ml-1m", tmp_path / "work", titles=titles, posters=posters)
    assert poster.read_bytes() == b"touched"


def test_mistakes_with_movielens_are_explained(tmp_path: Path) -> None:
    folder = ml_1m(tmp_path / "ml-1m")
    titles, _ = make_extras(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    cases = [
        ((tmp_path / "absent", None, None), "does not exist"),
        ((tmp_path / "empty", None, None), "holds none of u.data, ratings.dat, ratings.csv"),
        ((tmp_path / "file", None, None), "neither a folder nor a zip"),
        ((folder, tmp_path / "absent.parquet", None), "--titles .* does not exist"),
        ((folder, None, tmp_path / "file"), "neither a folder nor a tar"),
        ((folder, None, tmp_path / "empty"), "no file is named after a movie id"),
    ]
    for (path, titles_path, posters), message in cases:
        with pytest.raises(DataError, match=message):
            movielens.load(path, tmp_path / "work", titles=titles_path, posters=posters)
    pd.read_parquet(titles).rename(columns={"show_id": "imdb"}).to_parquet(titles)
    with pytest.raises(DataError, match="no movie id column"):
        movielens.load(folder, tmp_path / "work", titles=titles)
    (folder / "movies.dat").unlink()
    with pytest.raises(DataError, match=r"has no movies\.dat"):
        movielens.load(folder, tmp_path / "work")
    (folder / "ratings.dat").write_text("1::10::five::300\n")
    with pytest.raises(DataError, match="cannot be read as MovieLens ratings"):
        movielens.load(folder, tmp_path / "work")


def test_globo(tmp_path: Path) -> None:
    clicks = pd.DataFrame(
        {
            "user_id": [5, 5, 5, 5, 6],
            "click_article_id": [100, 200, 100, 300, 100],
            "click_timestamp": np.array([4, 3, 2, 6, 5]) * 1000 + 1506826800000,
            "click_environment": [4, 4, 4, 2, 4],
            "click_deviceGroup": [1, 1, 3, 1, 1],
            "click_os": 2,
            "click_country": 1,
            "click_region": [21, 21, 21, 21, 9],
            "click_referrer_type": 1,
        }
    )
    clicks.to_parquet(tmp_path / "clicks.parquet")
    dataset = prepare(globo.load(tmp_path / "clicks.parquet", tmp_path / "work"), tmp_path / "data")
    assert dataset.titles["title_id"].tolist() == ["100", "200", "300"]
    # User 5's first click on article 100 is the third row; the later one is a repeat.
    assert dataset.event_array("title").tolist() == [0, 1, 2, 0]
    assert dataset.event_array("timestamp").tolist() == [1506826802, 1506826803, 1506826806, 1506826805]
    assert dataset.event_array("split").tolist()[1:3] == [VALID, TEST]
    assert [scenario.values for scenario in dataset.manifest.scenarios] == [("9", "21")]
    assert [context.name for context in dataset.manifest.contexts] == ["device", "environment", "os", "referrer"]
    assert any(note.startswith("1 of 5 clicks repeat") for note in dataset.manifest.notes)
    clicks.rename(columns={"click_region": "click_regions"}).to_parquet(tmp_path / "clicks.parquet")
    with pytest.raises(DataError, match=r"no column click_region \(there is click_regions\)"):
        globo.load(tmp_path / "clicks.parquet", tmp_path / "work")


@pytest.mark.skipif(
    not (Path(os.environ.get("M5_DATA", "")) / "ml-1m" / "ml-1m.zip").is_file() or "M5_DATA" not in os.environ,
    reason="M5_DATA does not name a folder with ml-1m/ml-1m.zip",
)
def test_the_real_ml_1m(tmp_path: Path) -> None:
    folder = Path(os.environ["M5_DATA"]) / "ml-1m"
    spec = movielens.load(folder / "ml-1m.zip", tmp_path / "work", titles=folder / "titles.parquet")
    dataset = prepare(spec, tmp_path / "data")
    manifest = dataset.manifest
    assert (manifest.n_events, manifest.n_users, manifest.n_titles) == (1_000_209, 6_040, 3_883)
    assert manifest.split_counts == {"train": 1_000_209 - 2 * 6_040, "valid": 6_040, "test": 6_040}
    assert (np.bincount(dataset.event_array("title"), minlength=3_883) > 0).sum() == 3_706
    assert manifest.intensities[0].boundaries == (1.5, 2.5, 3.5, 4.5)
    assert manifest.scenarios[0].values == ("Midwest", "Northeast", "South", "West")
    # A stable sort of the ratings file gives the same sequence of every user.
    with zipfile.ZipFile(folder / "ml-1m.zip") as archive:
        lines = archive.read("ml-1m/ratings.dat").decode().split()
    raw = np.array([line.split("::") for line in lines], dtype=np.int64)
    expected = raw[np.lexsort((np.arange(len(raw)), raw[:, 3], raw[:, 0]))]
    titles = dataset.titles["title_id"].astype(np.int64).to_numpy()[dataset.event_array("title")]
    np.testing.assert_array_equal(titles, expected[:, 1])
    np.testing.assert_array_equal(dataset.event_array("timestamp"), expected[:, 3])


def held_out_tables(folder: Path, rows: list[tuple[int, int, int]]) -> tuple[Path, Path]:
    """Events (user, title, ts) of ten titles: 1 to 6 of 1990, 7 to 9 of 2000, 10 without a year."""
    folder.mkdir(parents=True)
    frame = pd.DataFrame(rows, columns=["user_id", "title_id", "ts"]).assign(rating=np.arange(len(rows)))
    years = [1990.0] * 6 + [2000.0] * 3 + [None]
    frame.to_parquet(folder / "events.parquet")
    pd.DataFrame({"title_id": [str(i) for i in range(1, 11)], "year": years}).to_parquet(folder / "titles.parquet")
    return folder / "events.parquet", folder / "titles.parquet"


def test_newest_titles_are_held_out_by_hand(tmp_path: Path) -> None:
    # Watched: 1, 2, 3, 5, 7, 8, 9, 10. A quarter is two of them: 9, which was first watched at 15, and 8, at 14, before
    # 7, at 10. Title 10 has no year.
    rows = [
        (1, 1, 10), (1, 2, 11), (1, 9, 15), (1, 3, 20), (1, 8, 30), (1, 5, 40),  # the last one, 8, is asked for
        (2, 8, 14), (2, 1, 15), (2, 2, 16), (2, 10, 17),  # 8 comes before two others: dropped, nothing is asked for
        (3, 7, 10), (3, 8, 50), (3, 2, 50), (3, 9, 50), (3, 1, 50),  # ties keep the order of the rows: 9 is asked for
        (4, 9, 60),  # nothing is left
        (5, 9, 61), (5, 1, 3), (5, 2, 2), (5, 3, 99),  # by time, not by row
    ]  # fmt: skip
    events, titles = held_out_tables(tmp_path / "work", rows)
    note = hold_out_newest(events, titles, 0.25)
    found = pd.read_parquet(events)
    assert found.columns.tolist() == ["user_id", "title_id", "ts", "rating"]
    assert found[["user_id", "title_id", "ts"]].to_numpy().tolist() == [
        [1, 1, 10], [1, 2, 11], [1, 3, 20], [1, 8, 30],
        [2, 1, 15], [2, 2, 16], [2, 10, 17],
        [3, 7, 10], [3, 2, 50], [3, 9, 50],
        [5, 9, 61], [5, 1, 3], [5, 2, 2],
    ]  # fmt: skip
    assert found["rating"].tolist() == [0, 1, 3, 4, 7, 8, 9, 10, 12, 13, 16, 17, 18]
    assert "newest 2 of 8 watched titles" in note
    assert "last event of 3 viewers; 7 of 20 events were dropped" in note


def test_held_out_titles_are_in_the_test_split_alone(tmp_path: Path) -> None:
    folder = ml_1m(tmp_path / "ml-1m")
    movies = [f"{movie}::Film ({1990 + movie})::Drama" for movie in range(1, 11)]
    rng = np.random.default_rng(0)
    ratings = [
        f"{user}::{movie}::{1 + place % 5}::{100 * user + place}"
        for user in range(1, 21)
        for place, movie in enumerate(rng.permutation(10) + 1)
    ]
    (folder / "movies.dat").write_text("\n".join(movies) + "\n")
    (folder / "ratings.dat").write_text("\n".join(ratings) + "\n")
    (folder / "users.dat").write_text("\n".join(f"{user}::F::25::0::60601" for user in range(1, 21)) + "\n")
    dataset = prepare(movielens.load(folder, tmp_path / "work", hold_out=0.2), tmp_path / "data")
    held = dataset.titles["title_id"].isin(["9", "10"]).to_numpy()
    assert dataset.titles["cold"].tolist() == held.tolist()
    title, split = np.asarray(dataset.event_array("title")), np.asarray(dataset.event_array("split"))
    assert set(split[held[title]]) == {TEST}
    last = np.zeros(len(title), dtype=bool)
    last[dataset.offsets[1:] - 1] = True
    assert last[held[title]].all() and held[title].sum() == 20  # so no history holds a held-out title
    assert "newest 2 of 10" in dataset.manifest.notes[-1]


@pytest.mark.parametrize(("share", "told"), [(0.0, "between 0 and 1"), (1.0, "between 0 and 1"), (0.9, "larger share")])
def test_shares_that_cannot_be_held_out(tmp_path: Path, share: float, told: str) -> None:
    events, titles = held_out_tables(tmp_path / "work", [(1, 1, 1), (1, 2, 2), (1, 3, 3)])
    before = events.read_bytes()
    with pytest.raises(DataError, match=told):
        hold_out_newest(events, titles, share)
    assert events.read_bytes() == before


def test_holding_out_is_for_leave_last_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["prepare", "movielens", str(ml_1m(tmp_path / "ml-1m")), "--out", str(tmp_path / "data")]
    assert main([*arguments, "--hold-out-newest", "0.5"]) == 2
    assert "--split leave-last-out" in capsys.readouterr().err
    assert not (tmp_path / "data-raw").exists()
