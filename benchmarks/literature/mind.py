"""MIND: behaviours routed to interest capsules; the one that fits the target learns from it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.literature.data import Data, Sequences
from benchmarks.literature.network import BehaviourEmbedding, Network, NetworkScorer, SampledSoftmax, train_network
from benchmarks.literature.system import Settings, System

ROUNDS = 3  # of dynamic routing
HISTORY = 20  # behaviours that are read
INFINITE = 1e9  # a power of the label-aware attention
STRETCH = 3.0  # of the bilinear map at the start


def squash(x_XD: Tensor) -> Tensor:
    """Same direction, length n^2 / (1 + n^2)."""
    square_X1 = x_XD.square().sum(-1, keepdim=True)
    return square_X1 / (1 + square_X1) * x_XD * torch.rsqrt(square_X1 + 1e-9)


class MIND(Network):
    """Behaviour-to-interest routing with one bilinear map, then a perceptron with the request's features.

    Args:
        data: for sizes.
        width: D.
        interests: I capsules.
        power: of the label-aware attention. Infinite: only the best interest learns, and negatives meet their best one,
            as they do when titles are ranked.
        negatives: of the sampled softmax.
    """

    def __init__(self, data: Data, *, width: int, interests: int, power: float, negatives: int):
        super().__init__()
        self.n_titles, self.power, self.history = data.n_titles, power, min(HISTORY, data.history)
        self.embedding = BehaviourEmbedding(data, width)
        # Capsules are averages: from torch's own start, 4.6 long, the value would be all that is left of behaviours.
        nn.init.normal_(self.embedding.value.weight, std=0.5 * width**-0.5)
        self.bilinear = nn.Linear(width, width, bias=False)
        # Interests begin among the titles that they are made of. A capsule is shorter than 1, so that the agreement of
        # behaviours of length 1 with it would be drowned by the logits' draws, and all interests would stay alike.
        nn.init.eye_(self.bilinear.weight)
        with torch.no_grad():
            self.bilinear.weight *= STRETCH
        # Routing logits start from standard normal draws that are not trained, so that capsules differ. They are one to
        # a place in the sequence: the same viewer is always routed alike.
        self.start_LI: Tensor
        self.register_buffer("start_LI", torch.randn(self.history + 1, interests))
        self.perceptron = nn.Sequential(nn.Linear(2 * width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
        self.scale = nn.Parameter(torch.tensor(8.0))
        self.softmax = SampledSoftmax(data, negatives)

    def queries(self, batch: Sequences) -> Tensor:
        """[B, I, D]."""
        x_BLD = self.bilinear(self.embedding.behaviours(batch))
        # The start column stands for a viewer without history.
        valid_BL1 = ((batch.title_BL < self.n_titles) | (batch.length_B.unsqueeze(-1) == 1)).unsqueeze(-1)
        valid_BL1 = valid_BL1 & batch.valid_BL.unsqueeze(-1)
        logit_BLI = self.start_LI[: x_BLD.shape[1]].expand(len(x_BLD), -1, -1)
        fixed_BLD = x_BLD.detach()
        for turn in range(ROUNDS):
            weight_BLI = torch.softmax(logit_BLI, dim=-1) * valid_BL1
            last = turn == ROUNDS - 1
            capsule_BID = squash(weight_BLI.mT @ (x_BLD if last else fixed_BLD))
            if not last:
                logit_BLI = logit_BLI + fixed_BLD @ capsule_BID.mT
        request = self.embedding.request(batch.last(batch.feature_BLF))
        request_BD = request if isinstance(request, Tensor) else torch.zeros_like(capsule_BID[:, 0])
        joined_BIX = torch.cat([capsule_BID, request_BD.unsqueeze(1).expand_as(capsule_BID)], dim=-1)
        return self.scale * functional.normalize(capsule_BID + self.perceptron(joined_BIX), dim=-1)

    def keys(self) -> Tensor:
        return self.embedding.keys()

    def loss(self, batch: Sequences) -> Tensor:
        query_BID, key_ND, target_B = self.queries(batch), self.keys(), batch.last(batch.next_BL)
        if self.power >= INFINITE:
            return self.softmax(query_BID, key_ND, target_B)
        fit_BI = (query_BID @ key_ND[target_B].unsqueeze(-1)).squeeze(-1)
        weight_BI = torch.softmax(self.power * fit_BI, dim=-1)
        return self.softmax((weight_BI.unsqueeze(-1) * query_BID).sum(1), key_ND, target_B)


def fit(data: Data, settings: Settings, seed: int, seconds: float) -> NetworkScorer:
    torch.manual_seed(seed)
    network = MIND(data, width=64, interests=settings["interests"], power=settings["power"], negatives=512)
    return train_network("mind", network, data, seed=seed, seconds=seconds, lr=settings["lr"], batch_size=128)


SYSTEM = System(
    name="mind",
    title="MIND: capsules of interests",
    source=(
        "Li et al., Multi-interest network with dynamic routing for recommendation at Tmall, CIKM 2019, "
        "doi 10.1145/3357384.3357814"
    ),
    built_on="own, on torch",
    departures=(
        "As many interests for all viewers; sampled softmax with log Q correction; unit queries, learned scale; the "
        "bilinear map starts as three times the identity, and routing's draws are one to a place, not to a viewer."
    ),
    settings=(
        {"interests": 4, "power": INFINITE, "lr": 5e-3},
        {"interests": 4, "power": 2.0, "lr": 5e-3},
        {"interests": 4, "power": INFINITE, "lr": 1e-2},
        {"interests": 8, "power": 2.0, "lr": 3e-3},
    ),
    fit=fit,
)
