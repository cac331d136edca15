"""Bag-of-videos autoencoder: what was watched, in no order, with heterogeneous features, through hidden layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.literature.data import Data, Sequences
from benchmarks.literature.network import BehaviourEmbedding, FullSoftmax, Network, NetworkScorer, train_network
from benchmarks.literature.system import Settings, System


class BagOfVideos(Network):
    """Sum of the behaviours' embeddings and of the request's features -> perceptron -> softmax over titles."""

    def __init__(self, data: Data, *, width: int, hidden: int, dropout: float):
        super().__init__()
        self.n_titles = data.n_titles
        self.embedding = BehaviourEmbedding(data, width)
        self.dropout = nn.Dropout(dropout)
        self.perceptron = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.Tanh(), nn.Dropout(dropout), nn.Linear(hidden, width)
        )
        self.offered = nn.Embedding(data.n_titles, width)
        self.bias = nn.Parameter(torch.zeros(data.n_titles, 1))
        nn.init.normal_(self.offered.weight, std=width**-0.5)
        self.softmax = FullSoftmax(data)

    def queries(self, batch: Sequences) -> Tensor:
        x_BLD = self.embedding.behaviours(batch)
        keep_BL = self.dropout((batch.title_BL < self.n_titles).float())
        weight_BL = keep_BL / keep_BL.sum(1, keepdim=True).clamp(min=1).sqrt()
        bag_BD = (x_BLD * weight_BL.unsqueeze(-1)).sum(1) + self.embedding.request(batch.last(batch.feature_BLF))
        return functional.pad(bag_BD + self.perceptron(bag_BD), (0, 1), value=1.0)

    def keys(self) -> Tensor:
        return torch.cat([self.offered.weight, self.bias], dim=-1)


def fit(data: Data, settings: Settings, seed: int, seconds: float) -> NetworkScorer:
    torch.manual_seed(seed)
    network = BagOfVideos(data, width=settings["width"], hidden=settings["hidden"], dropout=settings["dropout"])
    return train_network("bag-of-videos", network, data, seed=seed, seconds=seconds, lr=settings["lr"], batch_size=256)


SYSTEM = System(
    name="bag-of-videos",
    title="Bag-of-videos autoencoder with features",
    source=(
        "Steck et al., Deep learning for recommender systems: a Netflix case study, AI Magazine 42(3), 2021, "
        "doi 10.1609/aimag.v42i3.18140"
    ),
    built_on="own, on torch",
    departures="The article gives no sizes and no features: age and value of each watch, and the request's, stand in.",
    settings=(
        {"width": 64, "hidden": 128, "dropout": 0.3, "lr": 3e-3},
        {"width": 64, "hidden": 128, "dropout": 0.1, "lr": 5e-3},
        {"width": 128, "hidden": 256, "dropout": 0.5, "lr": 3e-3},
        {"width": 64, "hidden": 256, "dropout": 0.3, "lr": 1e-3},
    ),
    fit=fit,
)
