"""Lund & Ng's autoencoder over rating vectors: what a viewer rated goes in with a part masked out, all of it comes out.

Dimension legend of `data`, and D width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.literature.data import Data, Sequences
from benchmarks.literature.network import Network, NetworkScorer, train_network
from benchmarks.literature.rating_data import Ratings, World
from benchmarks.literature.rating_network import RatingNetwork, RatingSystem, train_ratings
from benchmarks.literature.system import Settings, System

SOURCE = (
    "Lund and Ng, Movie recommendations using the deep learning approach, IEEE IRI 2018, doi 10.1109/IRI.2018.00015"
)


class Autoencoder(nn.Module):
    """Sparse rating vectors in, a code, and a weight and bias of every title out.

    A title enters by two weights, one times its rating and one for having been rated at all, so that an average rating
    differs from none. The sum is divided by the root of the number of ratings.
    """

    def __init__(self, n_titles: int, width: int, *, layers: int, dropout: float):
        super().__init__()
        self.rating = nn.Embedding(n_titles + 2, width)  # the last two are a sequence's start and padding
        self.rated = nn.Embedding(n_titles + 2, width)
        for part in (self.rating, self.rated):
            nn.init.normal_(part.weight, std=width**-0.5)
        deeper = [part for _ in range(layers - 1) for part in (nn.Linear(width, width), nn.Tanh())]
        self.encoder = nn.Sequential(nn.Tanh(), nn.Dropout(dropout), *deeper)
        self.decoder = nn.Linear(width, n_titles)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, title_BL: Tensor, value_BL: Tensor, shown_BL: Tensor) -> Tensor:
        """int64, float32 and bool (what is not masked out), each [B, L] -> codes [B, D]."""
        shown_BL = shown_BL.float()
        weight_BL = shown_BL / shown_BL.sum(-1, keepdim=True).clamp(min=1).sqrt()
        how_BD = functional.embedding_bag(
            title_BL, self.rating.weight, mode="sum", per_sample_weights=weight_BL * value_BL
        )
        which_BD = functional.embedding_bag(title_BL, self.rated.weight, mode="sum", per_sample_weights=weight_BL)
        return self.encoder(how_BD + which_BD)


class LundNg(Network):
    """The autoencoder as a matcher: the decoder's outputs rank the titles.

    `loss` "rating" is the publication's: the squared error of observed values. "softmax" asks which titles were
    masked out, among all.
    """

    windows = "every"

    def __init__(self, data: Data, *, loss: str, width: int, layers: int, dropout: float, masked: float):
        super().__init__()
        self.autoencoder = Autoencoder(data.n_titles, width, layers=layers, dropout=dropout)
        self.kind, self.masked, self.n_titles = loss, masked, data.n_titles
        self.mean = float(data.value[data.train].mean())
        self.cold_N: Tensor
        self.register_buffer("cold_N", torch.from_numpy(data.cold.copy()))

    def queries(self, batch: Sequences) -> Tensor:
        shown_BL = batch.title_BL < self.n_titles
        code_BD = self.autoencoder(batch.title_BL, batch.value_BL - self.mean, shown_BL)
        return functional.pad(code_BD, (0, 1), value=1.0)

    def keys(self) -> Tensor:
        return torch.cat([self.autoencoder.decoder.weight, self.autoencoder.decoder.bias.unsqueeze(-1)], dim=-1)

    def loss(self, batch: Sequences) -> Tensor:
        # All of a stretch, whatever its order: an autoencoder knows none. What another stretch asks for is only read.
        rated_BL, value_BL = batch.valid_BL, batch.next_value_BL - self.mean
        hidden_BL = batch.asked_BL & (torch.rand(rated_BL.shape) < self.masked)
        code_BD = self.autoencoder(batch.next_BL, value_BL, rated_BL & ~hidden_BL)
        score_BN = self.autoencoder.decoder(code_BD)
        if self.kind == "rating":
            score_BL = score_BN.gather(1, batch.next_BL.clamp(max=self.n_titles - 1))
            return functional.mse_loss(score_BL[batch.asked_BL], value_BL[batch.asked_BL])
        log_share_BN = score_BN.masked_fill(self.cold_N, -torch.inf).log_softmax(-1)
        log_share_BL = log_share_BN.gather(1, batch.next_BL.clamp(max=self.n_titles - 1))
        return -log_share_BL[hidden_BL].sum() / hidden_BL.sum().clamp(min=1)


def fit(data: Data, settings: Settings, seed: int, seconds: float) -> NetworkScorer:
    torch.manual_seed(seed)
    shape = {name: settings[name] for name in ("loss", "width", "layers", "dropout", "masked")}
    network = LundNg(data, **shape)
    return train_network("lund-ng", network, data, seed=seed, seconds=seconds, lr=settings["lr"], batch_size=32)


class RatingAutoencoder(RatingNetwork):
    """The autoencoder as a predictor of ratings; an example is a user with all known ratings.

    Ratings go in and out less the user's mean, drawn towards the mean of all by `DRAWN` ratings.
    """

    DRAWN = 5.0

    def __init__(self, world: World, *, width: int, layers: int, dropout: float, masked: float):
        super().__init__()
        self.autoencoder = Autoencoder(world.n_titles, width, layers=layers, dropout=dropout)
        self.world, self.masked = world, masked

    def read(self, known: Ratings) -> None:
        order = np.argsort(known.user_R, kind="stable")
        self.title_R, value_R = known.title_R[order], known.value_R[order]
        count_U = np.bincount(known.user_R, minlength=self.world.n_users)
        sum_U = np.bincount(known.user_R, known.value_R, minlength=self.world.n_users)
        self.mean_U = (sum_U + self.DRAWN * value_R.mean()) / (count_U + self.DRAWN)
        self.value_R = value_R - self.mean_U[known.user_R[order]]
        self.first_U = np.concatenate([[0], np.cumsum(count_U)])
        self.users = np.flatnonzero(count_U)

    def examples(self) -> int:
        return len(self.users)

    def _vectors(self, user_B: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Known titles, values and where there are any, each [B, L]."""
        count_B = self.first_U[user_B + 1] - self.first_U[user_B]
        column_L = np.arange(max(1, count_B.max()))
        rated_BL = column_L < count_B[:, None]
        place_BL = np.where(rated_BL, self.first_U[user_B][:, None] + column_L, 0)
        title_BL, value_BL = self.title_R[place_BL], self.value_R[place_BL].astype(np.float32)
        return torch.from_numpy(title_BL), torch.from_numpy(value_BL), torch.from_numpy(rated_BL)

    def loss(self, example_B: np.ndarray) -> Tensor:
        title_BL, value_BL, rated_BL = self._vectors(self.users[example_B])
        hidden_BL = rated_BL & (torch.rand(rated_BL.shape) < self.masked)
        score_BN = self.autoencoder.decoder(self.autoencoder(title_BL, value_BL, rated_BL & ~hidden_BL))
        return functional.mse_loss(score_BN.gather(1, title_BL)[rated_BL], value_BL[rated_BL])

    def predict(self, pairs: Ratings) -> Tensor:
        user_B, row_R = np.unique(pairs.user_R, return_inverse=True)
        parts = [
            self.autoencoder.decoder(self.autoencoder(*self._vectors(user_B[first : first + 256])))
            for first in range(0, len(user_B), 256)
        ]
        score_R = torch.cat(parts)[torch.from_numpy(row_R), torch.from_numpy(pairs.title_R)]
        return score_R + torch.from_numpy(self.mean_U[pairs.user_R]).float()


def fit_predict(train: Ratings, test: Ratings, world: World, seed: int, seconds: float) -> np.ndarray:
    torch.manual_seed(seed)
    network = RatingAutoencoder(world, width=256, layers=1, dropout=0.5, masked=0.5)
    return train_ratings(network, train, test, seed=seed, seconds=seconds, lr=1e-3, batch_size=64, weight_decay=0.05)


SYSTEM = System(
    name="lund-ng",
    title="Lund & Ng autoencoder",
    source=SOURCE,
    built_on="own, on torch",
    departures=(
        "A vector holds the history that all systems read, not everything that was ever rated, and says what was rated "
        'beside how. With loss "softmax" the decoder says which titles were masked out instead of how they were rated; '
        "the publication ranks by predicted rating, which learns nothing of what is not watched."
    ),
    settings=(
        {"loss": "softmax", "width": 128, "layers": 1, "dropout": 0.2, "masked": 0.5, "lr": 3e-3},
        {"loss": "rating", "width": 128, "layers": 1, "dropout": 0.2, "masked": 0.5, "lr": 1e-3},
        {"loss": "softmax", "width": 64, "layers": 1, "dropout": 0.2, "masked": 0.5, "lr": 3e-3},
        {"loss": "softmax", "width": 256, "layers": 2, "dropout": 0.4, "masked": 0.3, "lr": 1e-3},
    ),
    fit=fit,
)
RATING_SYSTEM = RatingSystem(
    name="lund-ng",
    title="Lund & Ng autoencoder",
    source=SOURCE,
    fit_predict=fit_predict,
    protocol="No figure to compare with is recorded here. Ratings less the user's mean; hidden width 256.",
)
