"""BERT-style transformer with heterogeneous features: attention in both directions, trained on masked titles."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.literature.data import Data, Sequences
from benchmarks.literature.network import BehaviourEmbedding, FullSoftmax, Network, NetworkScorer, train_network
from benchmarks.literature.system import Settings, System
from m5.torchvision_shim import declare_missing_operators

LAST_SHARE = 0.5  # of the training sequences that end at a request and hide its title alone, as they do when asked


class BertStyle(Network):
    """Tokens are a viewer's watches, the last one asked for: its title is hidden, what is known of its request is not.

    Args:
        data: for sizes.
        width, blocks, dropout: of `transformers.BertModel`.
        mask_share: of the titles hidden in training.
    """

    windows = "every"

    def __init__(self, data: Data, *, width: int, blocks: int, dropout: float, mask_share: float):
        super().__init__()
        self.mask, self.mask_share = data.n_titles + 2, mask_share
        self.embedding = BehaviourEmbedding(data, width)
        # From torch's own start, 4.6 long, the value would drown the titles that attention compares.
        nn.init.normal_(self.embedding.value.weight, std=0.5 * width**-0.5)
        declare_missing_operators()  # transformers imports torchvision
        from transformers import BertConfig, BertModel

        self.bert = BertModel(
            BertConfig(
                vocab_size=1,
                hidden_size=width,
                num_hidden_layers=blocks,
                num_attention_heads=2,
                intermediate_size=4 * width,
                max_position_embeddings=data.history + 1,
                hidden_dropout_prob=dropout,
                attention_probs_dropout_prob=dropout,
            ),
            add_pooling_layer=False,
        )
        self.softmax = FullSoftmax(data)

    def hidden(self, batch: Sequences, masked_BL: Tensor) -> Tensor:
        """[B, L, D] at each token; token c is the watch that follows column c, unless it is masked.

        A watch's value stands one column on, where it is a behaviour; the last one's is not known.
        """
        title_BL = torch.where(masked_BL, self.mask, batch.next_BL)
        value_BL = torch.where(masked_BL, 0.0, nn.functional.pad(batch.value_BL[:, 1:], (0, 1)))
        x_BLD = self.embedding.title(title_BL) + self.embedding.value(value_BL.unsqueeze(-1))
        x_BLD = x_BLD + self.embedding.age(batch.age_BL) + self.embedding.request(batch.feature_BLF)
        return self.bert(inputs_embeds=x_BLD, attention_mask=batch.valid_BL.long()).last_hidden_state

    def queries(self, batch: Sequences) -> Tensor:
        return batch.last(self.hidden(batch, self._last(batch)))

    def keys(self) -> Tensor:
        return self.embedding.keys()

    def _last(self, batch: Sequences) -> Tensor:
        return torch.arange(batch.title_BL.shape[1]) == batch.length_B.unsqueeze(-1) - 1

    def _end(self, batch: Sequences) -> Tensor:
        """int64 [B] lengths that end each sequence at any of its asked columns with equal chance.

        Were it always the whole sequence, one with a viewer's latest events would ask for the same event every epoch.
        """
        return torch.multinomial(batch.asked_BL.float(), 1).squeeze(-1) + 1

    def loss(self, batch: Sequences) -> Tensor:
        cut_B = torch.rand(len(batch.length_B)) < LAST_SHARE
        batch = batch._replace(length_B=torch.where(cut_B, self._end(batch), batch.length_B))
        masked_BL = torch.rand(batch.title_BL.shape) < self.mask_share
        masked_BL &= batch.asked_BL & batch.valid_BL & ~cut_B.unsqueeze(-1)
        masked_BL |= self._last(batch)
        return self.softmax(self.hidden(batch, masked_BL)[masked_BL], self.keys(), batch.next_BL[masked_BL])


def fit(data: Data, settings: Settings, seed: int, seconds: float) -> NetworkScorer:
    torch.manual_seed(seed)
    network = BertStyle(
        data, width=64, blocks=settings["blocks"], dropout=settings["dropout"], mask_share=settings["mask_share"]
    )
    return train_network("bert", network, data, seed=seed, seconds=seconds, lr=settings["lr"], batch_size=32)


SYSTEM = System(
    name="bert",
    title="BERT-style transformer with features",
    source=(
        "Steck et al., Deep learning for recommender systems: a Netflix case study, AI Magazine 42(3), 2021, "
        "doi 10.1609/aimag.v42i3.18140; after Sun et al., BERT4Rec, CIKM 2019, doi 10.1145/3357384.3357895"
    ),
    built_on="transformers' BertModel",
    departures="Half of the sequences are cut at a random watch and only its title masked, which is what ranking asks.",
    settings=(
        {"blocks": 1, "dropout": 0.1, "mask_share": 0.3, "lr": 5e-3},
        {"blocks": 2, "dropout": 0.1, "mask_share": 0.3, "lr": 3e-3},
        {"blocks": 1, "dropout": 0.1, "mask_share": 0.6, "lr": 5e-3},
        {"blocks": 1, "dropout": 0.2, "mask_share": 0.2, "lr": 2e-3},
    ),
    fit=fit,
)
