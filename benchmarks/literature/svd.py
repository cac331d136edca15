"""SVD: histories projected on the leading singular vectors of the training matrix, and back."""

from __future__ import annotations

import numpy as np
from sklearn.decomposition import TruncatedSVD

from benchmarks.literature.data import Data
from benchmarks.literature.system import CannotFeed, Settings, System


class PureSVD:
    """A title's score is its part of the history's projection; any history has one, also that of a new viewer."""

    def __init__(self, data: Data, rank: int, seed: int):
        self.name, self.data = "svd", data
        matrix_UN = data.interactions.matrix_UN
        model = TruncatedSVD(min(rank, min(matrix_UN.shape) - 1), random_state=seed).fit(matrix_UN)
        self.component_DN = model.components_.astype(np.float32)
        self.parameters = self.component_DN.size

    def score(self, event_index: np.ndarray) -> np.ndarray:
        """int64 [B] -> float32 [B, N]."""
        return (self.data.interactions.histories(event_index) @ self.component_DN.T) @ self.component_DN


def fit(data: Data, settings: Settings, seed: int, seconds: float) -> PureSVD:
    if min(data.n_users, data.n_titles) < 2:
        raise CannotFeed("singular vectors need at least two viewers and two titles")
    return PureSVD(data, settings["rank"], seed)


SYSTEM = System(
    name="svd",
    title="PureSVD",
    source=(
        "Cremonesi, Koren and Turrin, Performance of recommender algorithms on top-N recommendation tasks, "
        "RecSys 2010, doi 10.1145/1864708.1864721"
    ),
    built_on="scikit-learn's TruncatedSVD",
    departures="A watch is 1, whatever was rated.",
    settings=({"rank": 50}, {"rank": 20}, {"rank": 100}, {"rank": 200}),
    fit=fit,
)
