"""Multi-modal graph attention: titles and the values of their metadata in one graph, text and images as features.

    x_title = W_text text + W_image image          x_value = embedding of the value + mean of its titles' x
    h_value = x_value + GAT(titles that have the value)
    h_title = x_title + GAT(values that the title has)

A viewer is no node, because a request may come with any history: the viewer's vector pools the titles' h by attention,
whose weight is learned from h and from how many watches ago it was.

Dimension legend of `network`, and K metadata values, H heads, E links.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch_geometric.nn import GATConv
from torch_geometric.utils import scatter

from benchmarks.literature.data import Data, Sequences
from benchmarks.literature.network import FullSoftmax, Network, NetworkScorer, SampledSoftmax, train_network
from benchmarks.literature.system import CannotFeed, Settings, System
from data_prep.metagraph import Metagraph, build_metagraph
from m5.schema import DataError

WIDTH = 64
HEADS = 4
ID_DROPOUT = 0.3
COMMON = 0.3  # a value of a larger share of the titles tells little and has most of the links


def links(graph: Metagraph, *, common: float = COMMON) -> tuple[Tensor, Tensor, int]:
    """The graph's links as PyG reads them, all metadata kinds numbered through; see `data_prep.metagraph` for leaks.

    Args:
        graph: titles and values; a value that one title alone has is not in it.
        common: values of a larger share of the titles are left out.

    Returns:
        int64 [2, E] from titles to values, int64 [2, E'] from values to titles, and K.
    """
    to_value, to_title, count = [], [], 0
    for relation in graph.relations:
        kept_K = np.diff(relation.value_offsets) <= max(2.0, common * graph.n_titles)
        number_K = count + np.cumsum(kept_K) - 1
        title_E, value_E = relation.value_links()
        to_value.append(np.stack([title_E, number_K[value_E]])[:, kept_K[value_E]])
        title_E, value_E = relation.title_links()
        to_title.append(np.stack([number_K[value_E], title_E])[:, kept_K[value_E]])
        count += int(kept_K.sum())
    none = np.zeros((2, 0), dtype=np.int64)
    to_value_2E, to_title_2E = (np.concatenate([none, *parts], axis=1) for parts in (to_value, to_title))
    return torch.from_numpy(to_value_2E), torch.from_numpy(to_title_2E), count


class HistoryPooling(nn.Module):
    """Attention pooling of what was watched before each request; every head has its own sense of what counts.

    Args:
        width: D, a multiple of `heads`.
        heads: H.
        longest: behaviours of a sequence at most.
    """

    def __init__(self, width: int, heads: int, longest: int):
        super().__init__()
        self.weight = nn.Linear(width, heads, bias=False)
        # Heads start with memories of different length; a learned correction per distance follows.
        decay_H = torch.logspace(-2, 0, heads)
        self.distance = nn.Parameter(-decay_H.unsqueeze(-1) * torch.arange(longest + 1))
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, h_BLD: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]: column c pools the columns up to c."""
        B, L, D = h_BLD.shape
        H = self.distance.shape[0]
        ago_LL = torch.arange(L).unsqueeze(-1) - torch.arange(L)
        logit_BHLL = self.weight(h_BLD).transpose(1, 2).unsqueeze(2) + self.distance[:, ago_LL.clamp(min=0)]
        share_BHLL = logit_BHLL.masked_fill(ago_LL < 0, -torch.inf).softmax(-1)
        value_BHLW = self.value(h_BLD).view(B, L, H, D // H).transpose(1, 2)
        return self.out((share_BHLL @ value_BHLW).transpose(1, 2).reshape(B, L, D))


class MultiModalGAT(Network):
    """See the module's text.

    Args:
        data: with text vectors, image vectors and metadata.
        dropout: of the titles' features and of the pooled vector.
        id_embedding: add a learned vector per title; a cold one's stays zero. The publication has none.
        negatives: titles drawn for each softmax; 0: all that training has seen.

    Raises:
        DataError: text vectors, image vectors or metadata that two titles share are missing.
    """

    windows = "every"

    def __init__(self, data: Data, *, dropout: float, id_embedding: bool, negatives: int = 0):
        super().__init__()
        self.text_NF: Tensor
        self.image_NF: Tensor
        self.to_value_2E: Tensor
        self.to_title_2E: Tensor
        self.register_buffer("text_NF", torch.from_numpy(data.content("text")), persistent=False)
        self.register_buffer("image_NF", torch.from_numpy(data.content("image")), persistent=False)
        to_value_2E, to_title_2E, count = links(build_metagraph(data.dataset))
        if not count:
            raise DataError(f"{data.dataset.folder}: no metadata value is shared by two titles, so there is no graph.")
        self.register_buffer("to_value_2E", to_value_2E, persistent=False)
        self.register_buffer("to_title_2E", to_title_2E, persistent=False)
        self.n_titles = data.n_titles
        self.text = nn.Linear(self.text_NF.shape[1], WIDTH)
        self.image = nn.Linear(self.image_NF.shape[1], WIDTH, bias=False)
        self.values = nn.Embedding(count, WIDTH)
        self.hear_titles = GATConv((WIDTH, WIDTH), WIDTH // HEADS, heads=HEADS, add_self_loops=False)
        self.hear_values = GATConv((WIDTH, WIDTH), WIDTH // HEADS, heads=HEADS, add_self_loops=False)
        self.ids = nn.Parameter(torch.zeros(data.n_titles, WIDTH)) if id_embedding else None
        self.start = nn.Parameter(torch.zeros(2, WIDTH))  # of column 0 and of padding
        self.pool = HistoryPooling(WIDTH, HEADS, data.history)
        self.norm = nn.LayerNorm(WIDTH)
        self.key = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.softmax = SampledSoftmax(data, negatives) if negatives else FullSoftmax(data)
        nn.init.normal_(self.values.weight, std=WIDTH**-0.5)
        self._titles_ND: Tensor | None = None

    def train(self, mode: bool = True) -> MultiModalGAT:
        """Forget the graph pass that scoring keeps: weights change between one mode and the next."""
        self._titles_ND = None
        return super().train(mode)

    def titles(self) -> Tensor:
        """[N, D] graph vectors; while scoring, the graph is passed once."""
        if self.training:
            return self._pass()
        if self._titles_ND is None:
            self._titles_ND = self._pass()
        return self._titles_ND

    def _kept(self) -> Tensor | float:
        """bool [N, 1], which titles keep their learned vector in this pass: without it, content has to speak."""
        return torch.rand(self.n_titles, 1) >= ID_DROPOUT if self.training else 1.0

    def _pass(self) -> Tensor:
        x_ND = self.text(self.text_NF) + self.image(self.image_NF)
        if self.ids is not None:
            x_ND = x_ND + self.ids * self._kept()
        x_ND = self.dropout(x_ND)
        source_E, target_E = self.to_value_2E
        K = self.values.num_embeddings
        x_KD = self.values.weight + scatter(x_ND[source_E], target_E, dim=0, dim_size=K, reduce="mean")
        h_KD = x_KD + functional.elu(self.hear_titles((x_ND, x_KD), self.to_value_2E))
        h_ND = x_ND + functional.elu(self.hear_values((h_KD, x_ND), self.to_title_2E))
        return self.norm(h_ND)

    def hidden(self, batch: Sequences, h_ND: Tensor) -> Tensor:
        """[B, L, D] of each column's request."""
        h_BLD = torch.cat([h_ND, self.start])[batch.title_BL]
        return self.dropout(self.pool(h_BLD))

    def queries(self, batch: Sequences) -> Tensor:
        return batch.last(self.hidden(batch, self.titles()))

    def keys(self) -> Tensor:
        return self.key(self.titles())

    def loss(self, batch: Sequences) -> Tensor:
        h_ND = self.titles()
        asked_BL = batch.asked_BL
        return self.softmax(self.hidden(batch, h_ND)[asked_BL], self.key(h_ND), batch.next_BL[asked_BL])


def fit(data: Data, settings: Settings, seed: int, seconds: float) -> NetworkScorer:
    torch.manual_seed(seed)
    shape = {"dropout": settings["dropout"], "id_embedding": settings["id"], "negatives": settings["negatives"]}
    try:
        network = MultiModalGAT(data, **shape)
    except DataError as error:
        raise CannotFeed(str(error)) from None
    # A batch costs a pass of the whole graph; without negatives drawn, its softmax costs more than that.
    size = 64 if settings["negatives"] else 32
    return train_network("chakder", network, data, seed=seed, seconds=seconds, lr=settings["lr"], batch_size=size)


SYSTEM = System(
    name="chakder",
    title="Multi-modal graph attention network",
    source=(
        "Chakder, Mondal, Raj, Saha, Ghosh and Onoe, Graph network based approaches for multi-modal movie "
        "recommendation system, IEEE SMC 2022, pages 409-414"
    ),
    built_on="torch-geometric (GATConv)",
    departures=(
        "Titles are ranked by a softmax over the warm ones for a regression of ratings; a viewer is the pooled history "
        "for a node, so that any history can be asked about; sentence and image encoders for noun-verb graphs of the "
        "summaries, video frames and audio; a learned vector per title is a setting."
    ),
    settings=(
        {"id": False, "dropout": 0.2, "negatives": 0, "lr": 3e-3},
        {"id": True, "dropout": 0.1, "negatives": 512, "lr": 6e-3},
        {"id": True, "dropout": 0.2, "negatives": 0, "lr": 3e-3},
        {"id": True, "dropout": 0.2, "negatives": 512, "lr": 1e-2},
    ),
    fit=fit,
)
