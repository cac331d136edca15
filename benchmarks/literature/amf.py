"""Asymmetric matrix factorisation: a viewer is the sum of what they watched; a linear autoencoder of low rank."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.literature.data import Data, Sequences
from benchmarks.literature.network import FullSoftmax, Network, NetworkScorer, train_network
from benchmarks.literature.system import Settings, System


class AsymmetricFactorisation(Network):
    """u = sum of p_i over the history / sqrt(its length); a title's score is u . q_n + b_n."""

    def __init__(self, data: Data, *, width: int, dropout: float):
        super().__init__()
        self.n_titles, self.dropout = data.n_titles, dropout
        self.watched = nn.Embedding(data.n_titles + 2, width, padding_idx=data.n_titles + 1)
        self.offered = nn.Embedding(data.n_titles, width)
        self.bias = nn.Parameter(torch.zeros(data.n_titles, 1))
        for part in (self.watched, self.offered):
            nn.init.normal_(part.weight, std=width**-0.5)
        self.softmax = FullSoftmax(data)

    def queries(self, batch: Sequences) -> Tensor:
        keep_BL = batch.title_BL < self.n_titles
        if self.training and self.dropout:
            keep_BL = keep_BL & (torch.rand(keep_BL.shape) >= self.dropout)
        weight_BL = keep_BL / keep_BL.sum(1, keepdim=True).clamp(min=1).sqrt()
        user_BD = (self.watched(batch.title_BL) * weight_BL.unsqueeze(-1)).sum(1)
        return functional.pad(user_BD, (0, 1), value=1.0)  # the last column meets the titles' bias

    def keys(self) -> Tensor:
        return torch.cat([self.offered.weight, self.bias], dim=-1)


def fit(data: Data, settings: Settings, seed: int, seconds: float) -> NetworkScorer:
    torch.manual_seed(seed)
    network = AsymmetricFactorisation(data, width=settings["width"], dropout=settings["dropout"])
    return train_network("amf", network, data, seed=seed, seconds=seconds, lr=settings["lr"], batch_size=256)


SYSTEM = System(
    name="amf",
    title="Asymmetric matrix factorisation",
    source=(
        "Steck et al., Deep learning for recommender systems: a Netflix case study, AI Magazine 42(3), 2021, "
        "doi 10.1609/aimag.v42i3.18140; the model is Paterek's, KDD Cup 2007"
    ),
    built_on="own, on torch",
    departures="Softmax over the next title, as the other systems of that article here.",
    settings=(
        {"width": 64, "dropout": 0.3, "lr": 5e-3},
        {"width": 128, "dropout": 0.5, "lr": 5e-3},
        {"width": 64, "dropout": 0.1, "lr": 1e-2},
        {"width": 32, "dropout": 0.3, "lr": 1e-2},
    ),
    fit=fit,
)
