"""EASE: the linear case of the bag-of-videos autoencoder, in closed form."""

from __future__ import annotations

from benchmarks.literature.data import Data
from benchmarks.literature.system import CannotFeed, Settings, System
from m5.baselines import EASE, MAX_EASE_TITLES


class CountedEASE(EASE):
    """EASE that tells its number of weights: all but the zero diagonal."""

    def __init__(self, data: Data, regularisation: float):
        super().__init__(data.interactions, regularisation)
        self.parameters = self.weight_NN.size - data.n_titles


def fit(data: Data, settings: Settings, seed: int, seconds: float) -> CountedEASE:
    if data.n_titles > MAX_EASE_TITLES:
        raise CannotFeed(f"its {data.n_titles:,} x N matrix would not fit in memory")
    return CountedEASE(data, settings["regularisation"])


SYSTEM = System(
    name="ease",
    title="EASE, linear autoencoder",
    source=(
        "Steck, Embarrassingly shallow autoencoders for sparse data, WWW 2019, doi 10.1145/3308558.3313710; as the "
        "linear case in Steck et al., Deep learning for recommender systems: a Netflix case study, AI Magazine 42(3), "
        "2021, doi 10.1609/aimag.v42i3.18140"
    ),
    built_on="m5.baselines, on torch",
    departures="None.",
    settings=tuple({"regularisation": value} for value in (200, 500, 50, 1000)),
    fit=fit,
    by_chance=False,
)
