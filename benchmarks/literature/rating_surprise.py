"""Surprise's algorithms with the library's defaults: the rating task's reference rows.

Source: Hug, Surprise: a Python library for recommender systems, JOSS 5(52), 2020, doi 10.21105/joss.02174.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.literature.rating_data import Ratings, World
from benchmarks.literature.rating_network import RatingSystem
from m5.config import ConfigError

SOURCE = "Hug, Surprise, JOSS 5(52), 2020, doi 10.21105/joss.02174; figures of the package's README, release 1.1.5"
PROTOCOL = "5 random folds over ratings, library defaults, as here; another shuffle."
# name -> (title, class, arguments beside the defaults, whether it draws, published figures)
ALGORITHMS: dict[str, tuple[str, str, dict[str, Any], bool, dict[str, tuple[float, float]]]] = {
    "svd": ("Surprise SVD", "SVD", {}, True, {"ml-100k": (0.934, 0.737), "ml-1m": (0.873, 0.686)}),
    # The cache changes how long it takes, not what it finds.
    "svdpp": (
        "Surprise SVD++",
        "SVDpp",
        {"cache_ratings": True},
        True,
        {"ml-100k": (0.919, 0.721), "ml-1m": (0.862, 0.672)},
    ),
    "knn-basic": ("Surprise KNNBasic", "KNNBasic", {}, False, {"ml-100k": (0.980, 0.774), "ml-1m": (0.923, 0.727)}),
    "knn-means": (
        "Surprise KNNWithMeans",
        "KNNWithMeans",
        {},
        False,
        {"ml-100k": (0.951, 0.749), "ml-1m": (0.929, 0.738)},
    ),
    "knn-baseline": (
        "Surprise KNNBaseline",
        "KNNBaseline",
        {},
        False,
        {"ml-100k": (0.931, 0.733), "ml-1m": (0.895, 0.706)},
    ),
    "baseline": (
        "Surprise BaselineOnly",
        "BaselineOnly",
        {},
        False,
        {"ml-100k": (0.944, 0.748), "ml-1m": (0.909, 0.719)},
    ),
}


def fit_predict(name: str, train: Ratings, test: Ratings, world: World, seed: int) -> np.ndarray:
    """float64 [R] estimates of one of `ALGORITHMS`.

    Raises:
        ConfigError: Surprise is not installed.
    """
    try:
        import surprise
    except ImportError as error:
        raise ConfigError(
            f"Surprise cannot be imported ({error}). Install it: pip install scikit-surprise==1.1.5."
        ) from None
    _, kind, arguments, by_chance, _ = ALGORITHMS[name]
    arguments = arguments | {"verbose": False} | ({"random_state": seed} if by_chance else {})
    reader = surprise.Reader(rating_scale=(world.low, world.high))
    rows = zip(train.user_R.tolist(), train.title_R.tolist(), train.value_R.tolist(), strict=True)
    # `construct_trainset` takes rows as a file's reader gives them, the fourth being the time.
    trainset = surprise.Dataset(reader).construct_trainset([(*row, None) for row in rows])
    algorithm = getattr(surprise, kind)(**arguments)
    algorithm.fit(trainset)
    pairs = zip(test.user_R.tolist(), test.title_R.tolist(), strict=True)
    return np.array([algorithm.predict(user, title).est for user, title in pairs])


def _system(name: str) -> RatingSystem:
    title, _, _, _, claimed = ALGORITHMS[name]
    return RatingSystem(
        name=name,
        title=title,
        source=SOURCE,
        fit_predict=lambda train, test, world, seed, seconds: fit_predict(name, train, test, world, seed),
        by_time=False,
        claimed=claimed,
        protocol=PROTOCOL,
    )


RATING_SYSTEMS = tuple(_system(name) for name in ALGORITHMS)
