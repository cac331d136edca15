"""SASRec with sampled softmax: causal self-attention over titles alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.literature.data import Data, Sequences
from benchmarks.literature.network import (
    BehaviourEmbedding,
    CausalNetwork,
    NetworkScorer,
    SampledSoftmax,
    train_network,
)
from benchmarks.literature.system import Settings, System


class SASRec(CausalNetwork):
    """Embeddings and learned positions, pre-norm causal blocks; a title's key is its embedding."""

    def __init__(self, data: Data, *, width: int, blocks: int, dropout: float, negatives: int):
        super().__init__()
        self.embedding = BehaviourEmbedding(data, width, heterogeneous=False)
        self.position = nn.Embedding(data.history + 1, width)
        nn.init.normal_(self.position.weight, std=width**-0.5)
        layer = nn.TransformerEncoderLayer(
            width, 2, 4 * width, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, blocks, nn.LayerNorm(width), enable_nested_tensor=False)
        self.dropout = nn.Dropout(dropout)
        self.softmax = SampledSoftmax(data, negatives)

    def hidden(self, batch: Sequences) -> Tensor:
        """[B, L, D] after each column; right padding lies ahead, so causality is all the mask that is needed."""
        L = batch.title_BL.shape[1]
        x_BLD = self.dropout(self.embedding(batch) + self.position.weight[:L])
        mask_LL = nn.Transformer.generate_square_subsequent_mask(L)
        return self.blocks(x_BLD, mask=mask_LL, is_causal=True)


def fit(data: Data, settings: Settings, seed: int, seconds: float) -> NetworkScorer:
    torch.manual_seed(seed)
    network = SASRec(
        data, width=64, blocks=settings["blocks"], dropout=settings["dropout"], negatives=settings["negatives"]
    )
    return train_network("sasrec", network, data, seed=seed, seconds=seconds, lr=settings["lr"], batch_size=16)


SYSTEM = System(
    name="sasrec",
    title="SASRec with sampled softmax",
    source=(
        "Kang and McAuley, Self-attentive sequential recommendation, ICDM 2018, doi 10.1109/ICDM.2018.00035; softmax "
        "for its binary loss after Klenitskiy and Vasilev, RecSys 2023, doi 10.1145/3604915.3610644"
    ),
    built_on="own, on torch's TransformerEncoder (RecTools' needs NumPy 1)",
    departures="Sampled softmax with log Q correction for binary cross-entropy with one negative.",
    settings=(
        {"blocks": 1, "dropout": 0.1, "negatives": 256, "lr": 5e-3},
        {"blocks": 2, "dropout": 0.1, "negatives": 256, "lr": 3e-3},
        {"blocks": 1, "dropout": 0.2, "negatives": 512, "lr": 5e-3},
        {"blocks": 1, "dropout": 0.2, "negatives": 256, "lr": 1e-2},
    ),
    fit=fit,
)
