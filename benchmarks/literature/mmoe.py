"""MMoE two-tower: experts that all scenarios share, a gate for each; titles by id and content."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.literature.data import Data, Sequences
from benchmarks.literature.network import BehaviourEmbedding, FullSoftmax, Network, NetworkScorer, train_network
from benchmarks.literature.system import Settings, System

ID_DROPOUT = 0.1  # of titles in a batch, so that content learns to carry them


class MultiGateTwoTower(Network):
    """User tower: watches and features -> experts -> the gates of the request's scenarios. Title tower: id, content.

    Args:
        data: for sizes and content; without text or image vectors a title is its id.
        width: D.
        experts, hidden: how many, and of what width.
    """

    def __init__(self, data: Data, *, width: int, experts: int, hidden: int, dropout: float):
        super().__init__()
        self.n_titles, self.scenarios = data.n_titles, len(data.scenarios)
        self.embedding = BehaviourEmbedding(data, width)
        kinds = [vectors for kind in ("text", "image") if (vectors := data.dataset.content(kind)) is not None]
        self.content_NX: Tensor
        self.register_buffer("content_NX", torch.cat([torch.from_numpy(v) for v in kinds], 1) if kinds else None)
        self.content = nn.Linear(self.content_NX.shape[1], width) if kinds else None
        self.warm_N1: Tensor
        self.register_buffer("warm_N1", torch.from_numpy(~data.cold).float().unsqueeze(-1))
        self.recency = nn.Linear(2 * width, 1)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(3 * width, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, width))
            for _ in range(experts)
        )
        sizes = data.feature_sizes[: self.scenarios] or [1]
        self.gates = nn.ModuleList(nn.Embedding(size, experts * (3 * width + 1)) for size in sizes)
        for parameter in self.gates.parameters():
            nn.init.normal_(parameter, std=0.01)
        self.softmax = FullSoftmax(data)

    def queries(self, batch: Sequences) -> Tensor:
        x_BLD = self.embedding.behaviours(batch)
        feature_BF = batch.last(batch.feature_BLF)
        request = self.embedding.request(feature_BF)
        request_BD = request if isinstance(request, Tensor) else torch.zeros_like(x_BLD[:, 0])
        weight_BL1 = self.recency(torch.cat([x_BLD, request_BD.unsqueeze(1).expand_as(x_BLD)], dim=-1))
        weight_BL1 = torch.softmax(weight_BL1.masked_fill(~batch.valid_BL.unsqueeze(-1), -torch.inf), dim=1)
        pooled_BD, latest_BD = (weight_BL1 * x_BLD).sum(1), batch.last(x_BLD)
        joined_BX = torch.cat([pooled_BD, latest_BD, request_BD], dim=-1)
        logit_BE = self._gate(joined_BX, feature_BF)
        expert_BED = torch.stack([expert(joined_BX) for expert in self.experts], dim=1)
        return pooled_BD + latest_BD + (torch.softmax(logit_BE, -1).unsqueeze(-1) * expert_BED).sum(1)

    def _gate(self, joined_BX: Tensor, feature_BF: Tensor) -> Tensor:
        """[B, E]: the gates of a request's scenario values add up; one gate for all where there are no scenarios."""
        one_BX = functional.pad(joined_BX, (0, 1), value=1.0)
        logits = []
        for m, gate in enumerate(self.gates):
            value_B = feature_BF[:, m] if self.scenarios else torch.zeros(len(one_BX), dtype=torch.int64)
            logits.append(torch.einsum("bex,bx->be", gate(value_B).view(len(one_BX), -1, one_BX.shape[1]), one_BX))
        return torch.stack(logits).sum(0)

    def keys(self) -> Tensor:
        id_ND = self.embedding.keys() * self.warm_N1  # a cold title's id was never trained
        if self.content is None:
            return id_ND
        if self.training:
            id_ND = id_ND * (torch.rand(self.n_titles, 1) >= ID_DROPOUT)
        return id_ND + self.content(self.content_NX)


def fit(data: Data, settings: Settings, seed: int, seconds: float) -> NetworkScorer:
    torch.manual_seed(seed)
    network = MultiGateTwoTower(
        data, width=64, experts=settings["experts"], hidden=settings["hidden"], dropout=settings["dropout"]
    )
    return train_network("mmoe", network, data, seed=seed, seconds=seconds, lr=settings["lr"], batch_size=256)


SYSTEM = System(
    name="mmoe",
    title="MMoE two-tower, a gate per scenario",
    source=(
        "Ma et al., Modeling task relationships in multi-task learning with multi-gate mixture-of-experts, KDD 2018, "
        "doi 10.1145/3219819.3220007; two towers after Yi et al., RecSys 2019, doi 10.1145/3298689.3346996"
    ),
    built_on="own, on torch",
    departures="Scenarios take the place of tasks; the gates of region and plan add up.",
    settings=(
        {"experts": 4, "hidden": 128, "dropout": 0.1, "lr": 3e-3},
        {"experts": 8, "hidden": 128, "dropout": 0.1, "lr": 3e-3},
        {"experts": 4, "hidden": 128, "dropout": 0.2, "lr": 5e-3},
        {"experts": 4, "hidden": 256, "dropout": 0.2, "lr": 2e-3},
    ),
    fit=fit,
)
