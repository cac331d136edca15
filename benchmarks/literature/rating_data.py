"""MovieLens ratings, users and titles for the rating task, and the folds that all of its systems share.

Dimension legend: R ratings, U users, F features of a user.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from data_prep.sources import movielens
from m5.config import ConfigError
from m5.schema import DataError

FEATURES = ("gender", "age_band", "occupation")
# (ratings, users) -> what GroupLens calls it, and how many ratings of 1, 2, 3, 4 and 5 stars the official file has.
OFFICIAL = {
    (100_000, 943): ("ml-100k", (6_110, 11_370, 27_145, 34_174, 21_201)),
    (1_000_209, 6_040): ("ml-1m", (56_174, 107_557, 261_197, 348_971, 226_310)),
}


class Ratings(NamedTuple):
    """Ratings of equal length; see `World`.

    Attributes:
        user_R: int64 rows of the world's users.
        title_R: int64 rows of its titles.
        value_R: float32 stars.
        time_R: int64 seconds.
    """

    user_R: np.ndarray
    title_R: np.ndarray
    value_R: np.ndarray
    time_R: np.ndarray

    def take(self, index: np.ndarray) -> Ratings:
        """Rows of a mask or of indices."""
        return Ratings(*(column[index] for column in self))


@dataclass(frozen=True)
class World:
    """A MovieLens data set as the rating task reads it.

    Attributes:
        name: "ml-100k" or "ml-1m" where the numbers of ratings and users say so, else the file's name.
        ratings: in the order of the file.
        n_users, n_titles: which rows of users and titles lie below.
        low, high: the scale, to which predictions are clipped.
        feature_UF: int64 vocabulary indices of `FEATURES`; 0 is unknown. F is 0 where the layout has no users.
        feature_sizes: of the vocabularies.
        text: of every title, its name and, where given, its description.
        genres: of every title.
        digest: of all of it that a system reads.
        note: what the reader of figures must know of these ratings; "" where there is nothing.
    """

    name: str
    ratings: Ratings
    n_users: int
    n_titles: int
    low: float
    high: float
    feature_UF: np.ndarray
    feature_sizes: tuple[int, ...]
    text: list[str]
    genres: list[list[str]]
    digest: str
    note: str = ""


def read_world(path: Path, titles: Path | None = None) -> World:
    """The official zip or folder of a MovieLens data set.

    Args:
        path: as `m5 prepare movielens` takes it.
        titles: optional Parquet table with descriptions, as `m5 prepare movielens --titles` takes it.

    Raises:
        DataError: a file is missing or not of the official form.
    """
    with tempfile.TemporaryDirectory() as work:
        movielens.load(Path(path), Path(work), titles=titles)
        events = pd.read_parquet(Path(work, "events.parquet"))
        movies = pd.read_parquet(Path(work, "titles.parquet"))
        people = Path(work, "users.parquet")
        users = pd.read_parquet(people) if people.is_file() else None
    user, user_ids = pd.factorize(events["user_id"].astype(str))
    title = pd.Index(movies["title_id"].astype(str)).get_indexer(events["title_id"].astype(str))
    if (title < 0).any():
        example = events["title_id"][title < 0].iloc[0]
        raise DataError(
            f"{path}: {int((title < 0).sum())} ratings are of movies that the titles file lacks, for example "
            f"{example}. Unpack the official zip again."
        )
    columns = (user, title, events["rating"], events["ts"])
    ratings = Ratings(*(np.asarray(x, dtype=t) for x, t in zip(columns, "qqfq", strict=True)))
    feature_UF, sizes = _features(users, pd.Index(user_ids))
    name, note = _identify(ratings, len(user_ids), Path(path).stem)
    described = movies["description"].fillna("") if "description" in movies else pd.Series("", movies.index)
    text = (movies["name"].fillna("") + " " + described).tolist()
    genres = [list(values) for values in movies["genres"]]
    return World(
        name=name,
        ratings=ratings,
        n_users=len(user_ids),
        n_titles=len(movies),
        low=float(ratings.value_R.min()),
        high=float(ratings.value_R.max()),
        feature_UF=feature_UF,
        feature_sizes=sizes,
        text=text,
        genres=genres,
        digest=_digest(ratings, feature_UF, text, genres),
        note=note,
    )


def _digest(ratings: Ratings, feature_UF: np.ndarray, text: list[str], genres: list[list[str]]) -> str:
    """Of ratings and of what is known of users and titles: folds made with other descriptions are other folds."""
    found = hashlib.sha256(b"".join(column.tobytes() for column in ratings) + feature_UF.tobytes())
    found.update(json.dumps([feature_UF.shape, text, genres]).encode())
    return found.hexdigest()[:16]


def _features(users: pd.DataFrame | None, ids: pd.Index) -> tuple[np.ndarray, tuple[int, ...]]:
    """int64 [U, F] of the users in `ids` and the vocabularies' sizes."""
    if users is None:
        return np.zeros((len(ids), 0), dtype=np.int64), ()
    rows = users.set_index(users["user_id"].astype(str)).reindex(ids)
    coded = [pd.factorize(rows[name], sort=True) for name in FEATURES]  # -1 where missing
    return np.stack([code + 1 for code, _ in coded], axis=1).astype(np.int64), tuple(len(v) + 1 for _, v in coded)


def _identify(ratings: Ratings, users: int, stem: str) -> tuple[str, str]:
    """The data set's name, and a note where it has the official size and other ratings."""
    if (len(ratings.user_R), users) not in OFFICIAL:
        return stem, ""
    name, official = OFFICIAL[len(ratings.user_R), users]
    stars = [int((ratings.value_R == star).sum()) for star in range(1, 6)]
    if tuple(stars) == official:
        return name, ""
    counts = ", ".join(
        f"{star} stars {own:,} for {theirs:,}" for star, own, theirs in zip("12345", stars, official, strict=True)
    )
    return name, (
        f"These are not GroupLens's own ratings of {name}, although there are as many ({counts}): figures of this "
        "table may differ from published ones for that reason alone."
    )


def folds(count: int, n_folds: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Shuffled k-fold over ratings, as scikit-learn's and Surprise's `KFold` do it: int64 (train, test) of each fold.

    Raises:
        ConfigError: fewer than two folds, or fewer ratings than folds.
    """
    if not 2 <= n_folds <= count:
        raise ConfigError(f"{n_folds} folds of {count:,} ratings: there must be at least 2, and a rating in each.")
    parts = np.array_split(np.random.default_rng(seed).permutation(count), n_folds)
    for place, test in enumerate(parts):
        yield np.concatenate(parts[:place] + parts[place + 1 :]), test
