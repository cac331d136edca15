"""LSTM over the history with heterogeneous features; every position is a target."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.literature.data import Data, Sequences
from benchmarks.literature.network import BehaviourEmbedding, CausalNetwork, FullSoftmax, NetworkScorer, train_network
from benchmarks.literature.system import Settings, System


class LSTM(CausalNetwork):
    """Behaviours, with the features of the request that follows, -> LSTM -> softmax over titles."""

    def __init__(self, data: Data, *, width: int, layers: int, dropout: float):
        super().__init__()
        self.embedding = BehaviourEmbedding(data, width)
        self.dropout = nn.Dropout(dropout)
        self.lstm = nn.LSTM(width, width, layers, batch_first=True, dropout=dropout if layers > 1 else 0.0)
        self.output = nn.Linear(2 * width, width)
        self.softmax = FullSoftmax(data)

    def hidden(self, batch: Sequences) -> Tensor:
        """[B, L, D] after each column."""
        x_BLD = self.dropout(self.embedding(batch))
        return self.output(torch.cat([self.dropout(self.lstm(x_BLD)[0]), x_BLD], dim=-1))


def fit(data: Data, settings: Settings, seed: int, seconds: float) -> NetworkScorer:
    torch.manual_seed(seed)
    network = LSTM(data, width=64, layers=settings["layers"], dropout=settings["dropout"])
    return train_network("lstm", network, data, seed=seed, seconds=seconds, lr=settings["lr"], batch_size=16)


SYSTEM = System(
    name="lstm",
    title="LSTM with features",
    source=(
        "Steck et al., Deep learning for recommender systems: a Netflix case study, AI Magazine 42(3), 2021, "
        "doi 10.1609/aimag.v42i3.18140; LSTM for sessions: Hidasi et al., arXiv 1511.06939"
    ),
    built_on="own, on torch's LSTM",
    departures="The article gives no sizes and no features: age and value of each watch, and the request's, stand in.",
    settings=(
        {"layers": 1, "dropout": 0.2, "lr": 5e-3},
        {"layers": 1, "dropout": 0.1, "lr": 1e-2},
        {"layers": 2, "dropout": 0.2, "lr": 5e-3},
        {"layers": 1, "dropout": 0.4, "lr": 3e-3},
    ),
    fit=fit,
)
