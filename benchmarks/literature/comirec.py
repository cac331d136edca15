"""ComiRec-SA: several self-attentive interests; the one nearest to the target learns from it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.literature.data import Data, Sequences
from benchmarks.literature.network import BehaviourEmbedding, Network, NetworkScorer, SampledSoftmax, train_network
from benchmarks.literature.system import Settings, System

HISTORY = 20  # behaviours that are read, as in the publication


class ComiRec(Network):
    """V = softmax(W2 tanh(W1 H)) H: interest i is an attention-weighted sum of the behaviours.

    `contrast` "chosen": negatives meet the target's interest, as published; "best": each meets its own best one, as it
    does when titles are ranked. Under the first, an interest never learns what it should not score high.
    """

    def __init__(self, data: Data, *, width: int, interests: int, negatives: int, contrast: str):
        super().__init__()
        self.contrast = contrast
        self.history = min(HISTORY, data.history)
        self.embedding = BehaviourEmbedding(data, width)
        self.position = nn.Embedding(self.history + 1, width)
        nn.init.normal_(self.position.weight, std=width**-0.5)
        self.attention = nn.Sequential(nn.Linear(width, 4 * width), nn.Tanh(), nn.Linear(4 * width, interests))
        self.norm = nn.LayerNorm(width)
        self.softmax = SampledSoftmax(data, negatives)

    def queries(self, batch: Sequences) -> Tensor:
        """[B, I, D]. Positions count back from the request."""
        x_BLD = self.embedding.behaviours(batch)
        back_BL = (batch.length_B.unsqueeze(-1) - 1 - torch.arange(x_BLD.shape[1])).clamp(min=0)
        logit_BLI = self.attention(x_BLD + self.position(back_BL))
        weight_BLI = torch.softmax(logit_BLI.masked_fill(~batch.valid_BL.unsqueeze(-1), -torch.inf), dim=1)
        request = self.embedding.request(batch.last(batch.feature_BLF))
        # Averages are short; without the norm it takes long until products with titles are large enough for a softmax.
        return self.norm(weight_BLI.mT @ x_BLD + (request.unsqueeze(1) if isinstance(request, Tensor) else 0.0))

    def keys(self) -> Tensor:
        return self.embedding.keys()

    def loss(self, batch: Sequences) -> Tensor:
        query_BID, key_ND, target_B = self.queries(batch), self.keys(), batch.last(batch.next_BL)
        if self.contrast == "best":
            return self.softmax(query_BID, key_ND, target_B)
        nearest_B = (query_BID @ key_ND[target_B].unsqueeze(-1)).squeeze(-1).argmax(-1)
        return self.softmax(query_BID[torch.arange(len(query_BID)), nearest_B], key_ND, target_B)


def fit(data: Data, settings: Settings, seed: int, seconds: float) -> NetworkScorer:
    torch.manual_seed(seed)
    network = ComiRec(data, width=64, interests=settings["interests"], negatives=512, contrast=settings["contrast"])
    # Without the warm-up four of ten trainings at the larger rate never recovered from their first steps.
    return train_network(
        "comirec",
        network,
        data,
        seed=seed,
        seconds=seconds,
        lr=settings["lr"],
        weight_decay=0.01,
        batch_size=128,
        warmup_steps=200,
    )


SYSTEM = System(
    name="comirec",
    title="ComiRec-SA: self-attentive interests",
    source=(
        "Cen et al., Controllable multi-interest framework for recommendation, KDD 2020, doi 10.1145/3394486.3403344"
    ),
    built_on="own, on torch",
    departures="Log Q correction; features and a layer norm added; negatives by best interest; no diversification.",
    settings=(
        {"interests": 4, "contrast": "best", "lr": 1e-2},
        {"interests": 4, "contrast": "chosen", "lr": 2e-2},
        {"interests": 2, "contrast": "best", "lr": 2e-2},
        {"interests": 8, "contrast": "best", "lr": 1e-2},
    ),
    fit=fit,
)
