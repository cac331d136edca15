"""Siet et al.: a transformer over the last titles and their ratings, an MLP that rates a title, K-means that mixes.

Dimension legend of `data`, and D width, H width of the head, P requests, C candidates, X titles.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.literature.data import Data, Sequences
from benchmarks.literature.network import Network, train_network
from benchmarks.literature.rating_data import Ratings, World
from benchmarks.literature.rating_network import RatingNetwork, RatingSystem, train_ratings
from benchmarks.literature.system import Settings, System
from m5.eligibility import Eligibility

SOURCE = (
    "Siet, Peng, Ilkhomjon, Kang and Park, Enhancing sequence movie recommendation system using deep learning and "
    "KMeans, Applied Sciences 14(6):2505, 2024, doi 10.3390/app14062505"
)
CLUSTERS = 8
SCORED = 2**22  # elements of a request-title pair's hidden layer that are held at a time


class History(nn.Module):
    """Titles, values, places and features, summed, through causal transformer blocks.

    Args:
        n_titles: numbers N and N + 1 are a sequence's start and padding.
        length: longest sequence, its start included.
        sizes: of the features' vocabularies.
    """

    def __init__(self, n_titles: int, length: int, sizes: Sequence[int], *, width: int, blocks: int, dropout: float):
        super().__init__()
        self.title = nn.Embedding(n_titles + 2, width)
        self.value = nn.Linear(1, width, bias=False)
        self.position = nn.Embedding(length, width)
        self.features = nn.ModuleList(nn.Embedding(size, width) for size in sizes)
        for part in (self.title, self.position, *self.features):
            nn.init.normal_(part.weight, std=width**-0.5)
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, blocks, nn.LayerNorm(width), enable_nested_tensor=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, title_BL: Tensor, value_BL: Tensor, feature_BLF: Tensor) -> Tensor:
        """int64, float32, int64 -> [B, L, D] after each column; padding lies to the right, out of sight."""
        L = title_BL.shape[1]
        x_BLD = self.title(title_BL) + self.value(value_BL.unsqueeze(-1)) + self.position.weight[:L]
        for f, part in enumerate(self.features):
            x_BLD = x_BLD + part(feature_BLF[..., f])
        mask_LL = nn.Transformer.generate_square_subsequent_mask(L)
        return self.blocks(self.dropout(x_BLD), mask=mask_LL, is_causal=True)


class Head(nn.Module):
    """MLP over [u; e; u * e] and a bias of the title; what a side adds to its first layer is computed once."""

    def __init__(self, n_titles: int, *, width: int, hidden: int):
        super().__init__()
        self.viewer = nn.Linear(width, hidden)
        self.title = nn.Linear(width, hidden, bias=False)
        self.product = nn.Linear(width, hidden, bias=False)
        self.out = nn.Linear(hidden, 1)
        self.bias = nn.Embedding(n_titles + 2, 1)
        nn.init.zeros_(self.bias.weight)

    def pairs(self, u_PD: Tensor, e_PD: Tensor, title_P: Tensor) -> Tensor:
        """[P, D], [P, D], int64 [P] -> [P]: each viewer with a title of its own."""
        hidden_PH = self.viewer(u_PD) + self.title(e_PD) + self.product(u_PD * e_PD)
        return (self.out(hidden_PH.relu()) + self.bias(title_P)).squeeze(-1)

    def every(self, u_PD: Tensor, e_CD: Tensor, title_C: Tensor) -> Tensor:
        """[P, D], [C, D], int64 [C] -> [P, C]: each viewer with every title."""
        # W (u * e) = (W diag(u)) e: one matrix product for each viewer.
        own_PHD = self.product.weight * u_PD.unsqueeze(1)
        hidden_PCH = (e_CD @ own_PHD.transpose(1, 2)) + self.viewer(u_PD).unsqueeze(1) + self.title(e_CD)
        return (self.out(hidden_PCH.relu()) + self.bias(title_C)).squeeze(-1)


class Siet(Network):
    """The publication's first process as a matcher: titles ranked by what the head says of them.

    `loss` "rating" is the publication's, the squared error of the value of the next title; "softmax" tells the next
    title from others, drawn evenly.
    """

    windows = "every"

    def __init__(
        self,
        data: Data,
        *,
        loss: str,
        width: int,
        blocks: int,
        dropout: float,
        negatives: int = 128,
        positions: int = 256,
    ):
        super().__init__()
        self.encoder = History(
            data.n_titles, data.history + 1, data.feature_sizes, width=width, blocks=blocks, dropout=dropout
        )
        self.head = Head(data.n_titles, width=width, hidden=width)
        self.kind, self.n_titles, self.negatives, self.positions = loss, data.n_titles, negatives, positions
        self.warm = torch.from_numpy(np.flatnonzero(~data.cold))
        self.mean = float(data.value[data.train].mean())

    def hidden(self, batch: Sequences) -> Tensor:
        """[B, L, D]."""
        watched_BL = batch.title_BL < self.n_titles
        return self.encoder(batch.title_BL, (batch.value_BL - self.mean) * watched_BL, batch.feature_BLF)

    def queries(self, batch: Sequences) -> Tensor:
        """[B, N] scores: the head is no inner product, so the query is its outcome, and the keys are unit vectors."""
        u_BD, title_N = batch.last(self.hidden(batch)), torch.arange(self.n_titles)
        e_ND = self.encoder.title(title_N)
        size = max(1, SCORED // (self.n_titles * u_BD.shape[1]))
        return torch.cat([self.head.every(part_PD, e_ND, title_N) for part_PD in u_BD.split(size)])

    def keys(self) -> Tensor:
        """[N, N], sparse."""
        place_N = torch.arange(self.n_titles)
        shape = (self.n_titles, self.n_titles)
        one_N = torch.ones(self.n_titles)
        return torch.sparse_coo_tensor(torch.stack([place_N, place_N]), one_N, shape, check_invariants=False).coalesce()

    def loss(self, batch: Sequences) -> Tensor:
        asked_BL = batch.asked_BL
        u_PD, target_P = self.hidden(batch)[asked_BL], batch.next_BL[asked_BL]
        if self.kind == "rating":
            value_P = self.head.pairs(u_PD, self.encoder.title(target_P), target_P) + self.mean
            return functional.mse_loss(value_P, batch.next_value_BL[asked_BL])
        chosen_P = torch.randperm(len(u_PD))[: self.positions]
        u_PD, target_P = u_PD[chosen_P], target_P[chosen_P]
        # Each as likely as any other: the correction by log Q is the same for all, and left out.
        drawn_C = self.warm[torch.randperm(len(self.warm))[: self.negatives]]
        logit_PC = self.head.every(u_PD, self.encoder.title(drawn_C), drawn_C)
        logit_PC = logit_PC.masked_fill(drawn_C == target_P.unsqueeze(-1), -torch.inf)
        own_P = self.head.pairs(u_PD, self.encoder.title(target_P), target_P)
        return (torch.logsumexp(torch.cat([own_P.unsqueeze(-1), logit_PC], dim=-1), dim=-1) - own_P).mean()


def genre_clusters(data: Data, count: int, seed: int) -> Tensor:
    """int64 [N] K-means clusters of the titles' genres as 0 and 1; without genres, the categories."""
    from sklearn.cluster import KMeans

    genres = data.metadata.get("genres")
    if genres is None:
        return torch.from_numpy(data.dataset.titles["category"].to_numpy(np.int64))
    names = sorted({name for row in genres for name in row})
    flag_NG = np.array([[name in row for name in names] for row in map(set, genres)], dtype=np.float32)
    distinct = len(np.unique(flag_NG, axis=0))
    if not names or distinct < 2:
        return torch.zeros(data.n_titles, dtype=torch.int64)
    means = KMeans(min(count, distinct), n_init=4, random_state=seed).fit(flag_NG)
    return torch.from_numpy(means.labels_.astype(np.int64))


def listed(data: Data, event: np.ndarray) -> Tensor:
    """bool [B, N]: titles that may stand in a list at the events' requests: playable and, if rankings ask, not seen.

    The event's own title is no exception, though it is ranked even where its viewer had seen it: to make one would tell
    which title is asked for.
    """
    eligibility = Eligibility.from_dataset(data.dataset)
    listed_BN = torch.ones(len(event), data.n_titles, dtype=torch.bool)
    if eligibility is not None:
        columns = [np.asarray(data.dataset.event_array(f"scenario_{name}")[event], np.int64) for name in data.scenarios]
        scenario_BM = np.stack(columns or [np.zeros(len(event), np.int64)], axis=1)
        listed_BN = eligibility.mask(torch.from_numpy(scenario_BM), torch.from_numpy(data.timestamp[event]))
    if data.filter_seen:
        row, title = data.dataset.watched_before(event)
        listed_BN[torch.from_numpy(row), torch.from_numpy(title)] = False
    return listed_BN


def mixed(score_BN: Tensor, cluster_N: Tensor, strength: float, listed_BN: Tensor | None = None) -> Tensor:
    """[B, N] scores with the r-th best of a cluster, from 0, lowered by strength * spread * log2(1 + r).

    r counts the titles of the cluster that may be listed, all of them if nothing is said. The spread is a request's
    standard deviation. The order within a cluster stays; strength 0 leaves all as it is.
    """
    if strength == 0:
        return score_BN
    lowered_BN = score_BN.clone()
    counted_BN = torch.ones_like(score_BN, dtype=torch.bool) if listed_BN is None else listed_BN
    spread_B1 = score_BN.std(dim=1, keepdim=True)
    for cluster in cluster_N.unique().tolist():
        member_X = torch.nonzero(cluster_N == cluster).squeeze(-1)
        order_BX = score_BN[:, member_X].argsort(dim=1, descending=True, stable=True)
        counts_BX = counted_BN[:, member_X].gather(1, order_BX).long()
        rank_BX = torch.empty_like(order_BX).scatter_(1, order_BX, counts_BX.cumsum(1) - counts_BX)
        lowered_BN[:, member_X] -= strength * spread_B1 * torch.log2(1.0 + rank_BX)
    return lowered_BN


class SietScorer:
    """Both processes: the trained network's scores, mixed by clusters."""

    name = "siet"

    def __init__(self, network: Siet, data: Data, cluster_N: Tensor, strength: float):
        self.network, self.data, self.cluster_N, self.strength = network.eval(), data, cluster_N, strength
        self.parameters = sum(parameter.numel() for parameter in network.parameters())

    @torch.no_grad()
    def score(self, event_index: np.ndarray) -> Tensor:
        """int64 [B] -> float32 [B, N]."""
        parts = [
            self.network.queries(self.data.sequences(event_index[first : first + 256]))
            for first in range(0, len(event_index), 256)
        ]
        listed_BN = listed(self.data, event_index) if self.strength else None
        return mixed(torch.cat(parts), self.cluster_N, self.strength, listed_BN)


def fit(data: Data, settings: Settings, seed: int, seconds: float) -> SietScorer:
    torch.manual_seed(seed)
    shape = {name: settings[name] for name in ("loss", "width", "blocks", "dropout")}
    network = Siet(data, **shape)
    train_network("siet", network, data, seed=seed, seconds=seconds, lr=settings["lr"], batch_size=16)
    return SietScorer(network, data, genre_clusters(data, CLUSTERS, seed), settings["diversity"])


class RatingTransformer(RatingNetwork):
    """Rates a title from the latest known ratings before it, of one viewer; viewers and titles have a bias."""

    def __init__(self, world: World, *, length: int, width: int, blocks: int, dropout: float):
        super().__init__()
        sizes = (*world.feature_sizes, world.n_users)
        self.encoder = History(world.n_titles, length + 1, sizes, width=width, blocks=blocks, dropout=dropout)
        self.head = Head(world.n_titles, width=width, hidden=width)
        self.dropout = nn.Dropout(dropout)
        self.user_bias = nn.Embedding(world.n_users, 1)
        nn.init.zeros_(self.user_bias.weight)
        self.length, self.n_titles = length, world.n_titles
        self.feature_UF = np.concatenate([world.feature_UF, np.arange(world.n_users)[:, None]], axis=1)
        self.first_time = int(world.ratings.time_R.min())
        self.span = int(world.ratings.time_R.max()) - self.first_time + 1

    def read(self, known: Ratings) -> None:
        order = np.lexsort((known.time_R, known.user_R))
        self.known = known.take(order)
        self.key_R = self._key(self.known)
        self.mean = float(known.value_R.mean())

    def _key(self, pairs: Ratings) -> np.ndarray:
        """int64 [R] that sorts by viewer, then time."""
        return pairs.user_R * self.span + pairs.time_R - self.first_time

    def examples(self) -> int:
        return len(self.known.user_R)

    def predict(self, pairs: Ratings) -> Tensor:
        # Strictly earlier: what has the pair's own time may be the pair itself.
        end_R = np.searchsorted(self.key_R, self._key(pairs), side="left")
        begin_R = np.maximum(end_R - self.length, np.searchsorted(self.known.user_R, pairs.user_R, side="left"))
        count_R = end_R - begin_R
        column_L = np.arange(int(count_R.max()) + 1)
        behaviour_RL = (column_L > 0) & (column_L <= count_R[:, None])
        place_RL = np.where(behaviour_RL, begin_R[:, None] + column_L - 1, 0)
        pad_L = np.where(column_L == 0, self.n_titles, self.n_titles + 1)
        title_RL = torch.from_numpy(np.where(behaviour_RL, self.known.title_R[place_RL], pad_L))
        value_RL = np.where(behaviour_RL, self.known.value_R[place_RL] - self.mean, 0).astype(np.float32)
        feature_RLF = np.repeat(self.feature_UF[pairs.user_R][:, None], len(column_L), axis=1)
        hidden_RLD = self.encoder(title_RL, torch.from_numpy(value_RL), torch.from_numpy(feature_RLF))
        u_RD = hidden_RLD[torch.arange(len(count_R)), torch.from_numpy(count_R)]
        title_R = torch.from_numpy(pairs.title_R)
        rating_R = self.head.pairs(self.dropout(u_RD), self.dropout(self.encoder.title(title_R)), title_R)
        return rating_R + self.user_bias(torch.from_numpy(pairs.user_R)).squeeze(-1) + self.mean

    def loss(self, example_B: np.ndarray) -> Tensor:
        pairs = self.known.take(example_B)
        return functional.mse_loss(self.predict(pairs), torch.from_numpy(pairs.value_R))


def fit_predict(train: Ratings, test: Ratings, world: World, seed: int, seconds: float) -> np.ndarray:
    torch.manual_seed(seed)
    network = RatingTransformer(world, length=10, width=32, blocks=1, dropout=0.2)
    return train_ratings(network, train, test, seed=seed, seconds=seconds, lr=1e-3, batch_size=256, weight_decay=0.1)


SYSTEM = System(
    name="siet",
    title="Siet et al. transformer and K-means",
    source=SOURCE,
    built_on="own, on torch's TransformerEncoder; K-means of scikit-learn",
    departures=(
        "The candidate does not stand in the transformer's sequence but meets its outcome in the MLP, so that all "
        "titles can be scored. Clusters lower the scores of a cluster's second, third, ... title instead of filling "
        'a list in turns; "diversity" 0 leaves this out. With loss "softmax" the head tells the next title from '
        "others; the publication predicts ratings."
    ),
    settings=(
        {"loss": "softmax", "width": 32, "blocks": 1, "dropout": 0.1, "lr": 5e-3, "diversity": 0.0},
        {"loss": "rating", "width": 32, "blocks": 1, "dropout": 0.1, "lr": 3e-3, "diversity": 0.05},
        {"loss": "softmax", "width": 32, "blocks": 1, "dropout": 0.1, "lr": 1e-2, "diversity": 0.01},
        {"loss": "softmax", "width": 48, "blocks": 2, "dropout": 0.1, "lr": 3e-3, "diversity": 0.0},
    ),
    fit=fit,
)
RATING_SYSTEM = RatingSystem(
    name="siet",
    title="Siet et al. transformer",
    source=SOURCE,
    fit_predict=fit_predict,
    claimed={"ml-100k": (1.0756, None)},
    protocol="Published: sequences of its own making. Here: 5 folds, earlier ratings of the training folds.",
)
