"""User-kNN: what the viewers with the most similar histories watched."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from sklearn.neighbors import NearestNeighbors

from benchmarks.literature.data import Data
from benchmarks.literature.system import Settings, System


class UserKNN:
    """Cosine of histories; a viewer's own training row is no neighbour.

    Args:
        data: histories and the training matrix.
        neighbours: K.
    """

    def __init__(self, data: Data, neighbours: int):
        self.name, self.data = "user-knn", data
        self.matrix_UN = data.interactions.matrix_UN
        self.neighbours = min(neighbours + 1, self.matrix_UN.shape[0])
        self.index = NearestNeighbors(n_neighbors=self.neighbours, metric="cosine", algorithm="brute")
        self.index.fit(self.matrix_UN)

    def score(self, event_index: np.ndarray) -> np.ndarray:
        """int64 [B] -> float32 [B, N]."""
        history_BN = self.data.interactions.histories(event_index)
        distance_BK, user_BK = self.index.kneighbors(history_BN)
        similarity_BK = np.where(user_BK == self.data.dataset.user_of(event_index)[:, None], 0.0, 1.0 - distance_BK)
        row = np.repeat(np.arange(len(event_index)), self.neighbours)
        shape = (len(event_index), self.matrix_UN.shape[0])
        weight_BU = sp.csr_matrix((similarity_BK.ravel().astype(np.float32), (row, user_BK.ravel())), shape)
        return (weight_BU @ self.matrix_UN).toarray()


def fit(data: Data, settings: Settings, seed: int, seconds: float) -> UserKNN:
    return UserKNN(data, settings["neighbours"])


SYSTEM = System(
    name="user-knn",
    title="User-kNN, cosine",
    source=(
        "Herlocker, Konstan, Borchers and Riedl, An algorithmic framework for performing collaborative filtering, "
        "SIGIR 1999, doi 10.1145/312624.312682"
    ),
    built_on="scikit-learn's NearestNeighbors",
    departures="Cosine of who watched what, not correlation of ratings.",
    settings=({"neighbours": 100}, {"neighbours": 300}, {"neighbours": 50}, {"neighbours": 500}),
    fit=fit,
    by_chance=False,
)
