"""ALS: weighted matrix factorisation for implicit feedback; a viewer's vector is solved from the present history."""

from __future__ import annotations

import warnings

import numpy as np
import torch

from benchmarks.literature.data import Data
from benchmarks.literature.system import Settings, System


class ALS:
    """`implicit`'s factors of titles; each request's viewer is fitted to them in closed form.

    Args:
        data: histories and the training matrix.
        factors, regularisation, alpha: of the factorisation; a watch weighs alpha, everything else 1.
        seed: of its start.
    """

    def __init__(self, data: Data, *, factors: int, regularisation: float, alpha: float, seed: int):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on BLAS threads, which the comparison bounds itself
            from implicit.cpu.als import AlternatingLeastSquares

            self.model = AlternatingLeastSquares(
                factors=factors,
                regularization=regularisation,
                alpha=alpha,
                random_state=seed,
                num_threads=torch.get_num_threads(),  # as many as the other systems have
            )
        self.name, self.data, self.alpha = "als", data, alpha
        self.model.fit(data.interactions.matrix_UN, show_progress=False)
        self.factor_ND = self.model.item_factors
        self.parameters = self.factor_ND.size + self.model.user_factors.size

    def score(self, event_index: np.ndarray) -> np.ndarray:
        """int64 [B] -> float32 [B, N]."""
        history_BN = self.data.interactions.histories(event_index)
        user_BD = self.model.recalculate_user(np.arange(len(event_index)), history_BN)
        return user_BD @ self.factor_ND.T


def fit(data: Data, settings: Settings, seed: int, seconds: float) -> ALS:
    return ALS(data, **settings, seed=seed)


SYSTEM = System(
    name="als",
    title="Implicit ALS",
    source=(
        "Hu, Koren and Volinsky, Collaborative filtering for implicit feedback datasets, ICDM 2008, "
        "doi 10.1109/ICDM.2008.22"
    ),
    built_on="implicit",
    departures="None.",
    settings=(
        {"factors": 64, "regularisation": 1.0, "alpha": 10.0},
        {"factors": 32, "regularisation": 1.0, "alpha": 10.0},
        {"factors": 64, "regularisation": 10.0, "alpha": 2.0},
        {"factors": 128, "regularisation": 10.0, "alpha": 10.0},
    ),
    fit=fit,
)
