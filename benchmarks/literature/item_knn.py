"""Item-kNN: titles that share viewers with what was watched."""

from __future__ import annotations

from benchmarks.literature.data import Data
from benchmarks.literature.system import Settings, System
from m5.baselines import ItemKNN


class CountedItemKNN(ItemKNN):
    """Item-kNN that tells how many similarities it keeps."""

    def __init__(self, data: Data, neighbours: int):
        super().__init__(data.interactions, neighbours)
        self.parameters = int(self.similarity_NN.nnz)


def fit(data: Data, settings: Settings, seed: int, seconds: float) -> CountedItemKNN:
    return CountedItemKNN(data, settings["neighbours"])


SYSTEM = System(
    name="item-knn",
    title="Item-kNN, cosine",
    source=(
        "Sarwar, Karypis, Konstan and Riedl, Item-based collaborative filtering recommendation algorithms, WWW 2001, "
        "doi 10.1145/371920.372071"
    ),
    built_on="m5.baselines, on SciPy",
    departures="Cosine of who watched, not of ratings.",
    settings=({"neighbours": 50}, {"neighbours": 20}, {"neighbours": 100}, {"neighbours": 200}),
    fit=fit,
    by_chance=False,
)
