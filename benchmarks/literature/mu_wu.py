"""Mu & Wu's multi-modal recommender: a viewer's tower, a title's tower with a text CNN and poster, an inner product.

Dimension legend of `data`, and D width, W words of a title, G values of its metadata.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.literature.data import Data, Sequences
from benchmarks.literature.network import Network, NetworkScorer, train_network
from benchmarks.literature.rating_data import Ratings, World
from benchmarks.literature.rating_network import RatingNetwork, RatingSystem, train_ratings
from benchmarks.literature.system import Settings, System

SOURCE = (
    "Mu and Wu, Multimodal movie recommendation system using deep learning, Mathematics 11(4):895, 2023, "
    "doi 10.3390/math11040895"
)
NEGATIVES = 512
WORDS = 40  # of a title's text
CONVOLUTIONS = (3, 4, 5)  # words that a filter sees
METADATA = ("genres", "actors", "directors", "studios", "countries", "languages", "decade")


def numbered(values: Iterable[Sequence[str]], *, at_least: int = 2, at_most: int | None = None) -> tuple[Tensor, int]:
    """Lists of strings -> int64 [N, longest], numbers from 1 with 0 as padding, and the number of numbers, 0 included.

    Strings of fewer than `at_least` lists are left out, and so is what lies beyond `at_most` in a list.
    """
    lists = [list(dict.fromkeys(row)) if at_most is None else list(row) for row in values]
    count = Counter(value for row in lists for value in set(row))
    number = {v: place for place, v in enumerate(sorted(v for v, c in count.items() if c >= at_least), start=1)}
    rows = [[number[value] for value in row if value in number][:at_most] for row in lists]
    table_NX = np.zeros((len(rows), max(1, *map(len, rows))), dtype=np.int64)
    for row, kept in zip(table_NX, rows, strict=True):
        row[: len(kept)] = kept
    return torch.from_numpy(table_NX), len(number) + 1


def words_of(texts: Iterable[str]) -> list[list[str]]:
    """Lower-case words of every text."""
    return [re.findall(r"[^\W_]+", text.lower()) for text in texts]


class TitleTower(nn.Module):
    """A title's number, its words by convolutions and max-pooling, its poster's vector and its metadata, merged to one.

    Args:
        texts: of every title.
        metadata: lists of strings of every title, e.g. "genre: drama".
        image_Nd: posters' vectors, or None.
        width, channels, dropout: D; of a word and of a convolution's output; of the merged vector.
    """

    def __init__(
        self,
        texts: Sequence[str],
        metadata: Sequence[Sequence[str]],
        image_Nd: np.ndarray | None,
        *,
        width: int,
        channels: int,
        dropout: float,
    ):
        super().__init__()
        words_NW, words = numbered(words_of(texts), at_most=WORDS)
        tags_NG, tags = numbered(metadata, at_least=3)
        self.words_NW: Tensor
        self.tags_NG: Tensor
        self.image_Nd: Tensor
        # The longest filter must fit into the shortest text.
        self.register_buffer("words_NW", functional.pad(words_NW, (0, max(0, max(CONVOLUTIONS) - words_NW.shape[1]))))
        self.register_buffer("tags_NG", tags_NG)
        found = image_Nd if image_Nd is not None else np.zeros((len(texts), 0))
        self.register_buffer("image_Nd", torch.from_numpy(np.asarray(found, dtype=np.float32)))
        self.number = nn.Embedding(len(texts), width)
        self.word = nn.Embedding(words, channels, padding_idx=0)
        self.tag = nn.EmbeddingBag(tags, width, mode="sum", padding_idx=0)
        for part in (self.number, self.word, self.tag):
            nn.init.normal_(part.weight, std=0.1)
        self.convolutions = nn.ModuleList(nn.Linear(size * channels, channels) for size in CONVOLUTIONS)
        self.image = nn.Linear(self.image_Nd.shape[1], width) if self.image_Nd.shape[1] else None
        parts = 2 * width + len(CONVOLUTIONS) * channels + (width if self.image is not None else 0)
        self.merge = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(parts, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)
        )

    def text(self, words_XW: Tensor) -> Tensor:
        """int64 [X, W] -> [X, channels of all filter sizes]: the largest output of each anywhere in the text."""
        word_XWC = self.word(words_XW)
        pooled = []
        for size, part in zip(CONVOLUTIONS, self.convolutions, strict=True):
            seen_XWC = word_XWC.unfold(1, size, 1).flatten(2)
            pooled.append(part(seen_XWC).amax(1).relu())
        return torch.cat(pooled, dim=-1)

    def forward(self, title_X: Tensor) -> Tensor:
        """int64 [X] -> [X, D]."""
        parts = [self.number(title_X), self.tag(self.tags_NG[title_X]), self.text(self.words_NW[title_X])]
        if self.image is not None:
            parts.append(self.image(self.image_Nd[title_X]).tanh())
        return self.merge(torch.cat(parts, dim=-1))


class ViewerTower(nn.Module):
    """Features as embeddings, beside what else is known of the viewer, through two layers.

    Args:
        sizes: of the features' vocabularies.
        known: width of what else is given.
        width: D, of the output and of a feature's embedding.
    """

    def __init__(self, sizes: Sequence[int], known: int, *, width: int, dropout: float):
        super().__init__()
        self.features = nn.ModuleList(nn.Embedding(size, width) for size in sizes)
        for part in self.features.parameters():
            nn.init.normal_(part, std=0.1)
        self.merge = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(known + len(sizes) * width, 2 * width),
            nn.ReLU(),
            nn.Linear(2 * width, width),
        )

    def forward(self, known_XK: Tensor, feature_XF: Tensor) -> Tensor:
        """[..., K] and int64 [..., F] -> [..., D]."""
        parts = [part(feature_XF[..., f]) for f, part in enumerate(self.features)]
        return self.merge(torch.cat([known_XK, *parts], dim=-1))


class MuWu(Network):
    """The two towers as a matcher. A viewer is the mean of the titles watched so far, once plain and once by value.

    `loss` "rating" is the publication's, the squared error of the value of what was watched; "softmax" tells the title
    that follows from others, drawn evenly.
    """

    windows = "every"

    def __init__(self, data: Data, *, loss: str, width: int, channels: int, dropout: float):
        super().__init__()
        titles = data.dataset.titles
        texts = (titles["title"].fillna("") + " " + titles["description"].fillna("")).tolist()
        kinds = [kind for kind in METADATA if kind in data.metadata]
        metadata = [
            [f"{kind}: {value}" for kind in kinds for value in data.metadata[kind][n]] for n in range(len(texts))
        ]
        self.title = TitleTower(
            texts, metadata, data.dataset.content("image"), width=width, channels=channels, dropout=dropout
        )
        self.viewer = ViewerTower(data.feature_sizes, 2 * width, width=width, dropout=dropout)
        self.bias = nn.Embedding(data.n_titles, 1)
        nn.init.zeros_(self.bias.weight)
        self.kind, self.n_titles = loss, data.n_titles
        self.mean = float(data.value[data.train].mean())
        self.warm = torch.from_numpy(np.flatnonzero(~data.cold))
        self._key_ND: Tensor | None = None

    def train(self, mode: bool = True) -> MuWu:
        """Forget the titles' keys that scoring keeps: weights change between one mode and the next."""
        self._key_ND = None
        return super().train(mode)

    def keys(self) -> Tensor:
        """[N, D + 1]; while scoring, the titles' tower runs once."""
        if self.training:
            return self._keys(torch.arange(self.n_titles))
        if self._key_ND is None:
            self._key_ND = self._keys(torch.arange(self.n_titles))
        return self._key_ND

    def _keys(self, title_X: Tensor) -> Tensor:
        """int64 [X] -> [X, D + 1], the bias last."""
        return torch.cat([self.title(title_X), self.bias(title_X)], dim=-1)

    def _viewers(self, batch: Sequences, key_ND: Tensor) -> Tensor:
        """[B, L, D] after each column."""
        watched_BL = (batch.title_BL < self.n_titles).float()
        title_BLD = key_ND[batch.title_BL.clamp(max=self.n_titles - 1), :-1]
        weight_BL2 = torch.stack([watched_BL, watched_BL * (batch.value_BL - self.mean)], dim=-1)
        sum_BL2D = (weight_BL2.unsqueeze(-1) * title_BLD.unsqueeze(2)).cumsum(1)
        count_BL = watched_BL.cumsum(1).clamp(min=1)
        viewer_BLD = self.viewer((sum_BL2D / count_BL[..., None, None]).flatten(2), batch.feature_BLF)
        return functional.pad(viewer_BLD, (0, 1), value=1.0)

    def queries(self, batch: Sequences) -> Tensor:
        return batch.last(self._viewers(batch, self.keys()))

    def loss(self, batch: Sequences) -> Tensor:
        # The title's tower is the dear one: it runs for the titles of this batch and what is drawn against them.
        asked_BL, drawn_C = batch.asked_BL, self.warm[torch.randperm(len(self.warm))[:NEGATIVES]]
        target_P, watched_X = batch.next_BL[asked_BL], batch.title_BL[batch.title_BL < self.n_titles]
        own_X = torch.cat([target_P, watched_X, *([drawn_C] if self.kind == "softmax" else [])]).unique()
        key_XD = self._keys(own_X)
        key_ND = key_XD.new_zeros(self.n_titles, key_XD.shape[1]).index_copy(0, own_X, key_XD)
        query_PD = self._viewers(batch, key_ND)[asked_BL]
        own_P = (query_PD * key_ND[target_P]).sum(-1)
        if self.kind == "rating":
            return functional.mse_loss(own_P + self.mean, batch.next_value_BL[asked_BL])
        # Each as likely as any other: the correction by log Q is the same for all, and left out.
        logit_PC = (query_PD @ key_ND[drawn_C].T).masked_fill(drawn_C == target_P.unsqueeze(-1), -torch.inf)
        return (torch.logsumexp(torch.cat([own_P.unsqueeze(-1), logit_PC], dim=-1), dim=-1) - own_P).mean()


def fit(data: Data, settings: Settings, seed: int, seconds: float) -> NetworkScorer:
    torch.manual_seed(seed)
    shape = {name: settings[name] for name in ("loss", "width", "channels", "dropout")}
    network = MuWu(data, **shape)
    return train_network("mu-wu", network, data, seed=seed, seconds=seconds, lr=settings["lr"], batch_size=32)


class RatingTowers(RatingNetwork):
    """The two towers as a predictor: their inner product and a bias of either side, around the mean rating."""

    def __init__(self, world: World, *, width: int, channels: int, dropout: float):
        super().__init__()
        genres = [[f"genres: {value}" for value in row] for row in world.genres]
        self.title = TitleTower(world.text, genres, None, width=width, channels=channels, dropout=dropout)
        self.viewer = ViewerTower(world.feature_sizes, width, width=width, dropout=dropout)
        self.number = nn.Embedding(world.n_users, width)
        self.bias = nn.ModuleList(nn.Embedding(size, 1) for size in (world.n_users, world.n_titles))
        nn.init.normal_(self.number.weight, std=0.1)
        for part in self.bias.parameters():
            nn.init.zeros_(part)
        self.feature_UF = torch.from_numpy(world.feature_UF)

    def read(self, known: Ratings) -> None:
        self.known, self.mean = known, float(known.value_R.mean())

    def examples(self) -> int:
        return len(self.known.user_R)

    def predict(self, pairs: Ratings) -> Tensor:
        user_R, title_R = torch.from_numpy(pairs.user_R), torch.from_numpy(pairs.title_R)
        own_X, place_R = title_R.unique(return_inverse=True)
        viewer_RD = self.viewer(self.number(user_R), self.feature_UF[user_R])
        product_R = (viewer_RD * self.title(own_X)[place_R]).sum(-1)
        return product_R + self.bias[0](user_R).squeeze(-1) + self.bias[1](title_R).squeeze(-1) + self.mean

    def loss(self, example_B: np.ndarray) -> Tensor:
        pairs = self.known.take(example_B)
        return functional.mse_loss(self.predict(pairs), torch.from_numpy(pairs.value_R))


def fit_predict(train: Ratings, test: Ratings, world: World, seed: int, seconds: float) -> np.ndarray:
    torch.manual_seed(seed)
    network = RatingTowers(world, width=32, channels=16, dropout=0.3)
    return train_ratings(network, train, test, seed=seed, seconds=seconds, lr=1e-3, batch_size=256, weight_decay=0.1)


SYSTEM = System(
    name="mu-wu",
    title="Mu & Wu multi-modal CNN",
    source=SOURCE,
    built_on="own, on torch; posters' vectors of `m5 encode` (ResNet-50)",
    departures=(
        "A viewer is the mean of the history's title vectors beside the request's features, not a number alone: a "
        "request may come from anyone. Posters go through ResNet-50 that is not trained further. With loss "
        '"softmax" the towers tell what was watched from what was not; the publication predicts ratings.'
    ),
    settings=(
        {"loss": "softmax", "width": 32, "channels": 8, "dropout": 0.1, "lr": 1e-2},
        {"loss": "rating", "width": 32, "channels": 8, "dropout": 0.1, "lr": 3e-3},
        {"loss": "softmax", "width": 64, "channels": 16, "dropout": 0.1, "lr": 5e-3},
        {"loss": "softmax", "width": 64, "channels": 8, "dropout": 0.2, "lr": 5e-3},
    ),
    fit=fit,
)
RATING_SYSTEM = RatingSystem(
    name="mu-wu",
    title="Mu & Wu multi-modal CNN",
    source=SOURCE,
    fit_predict=fit_predict,
    claimed={"ml-100k": (0.9908, None), "ml-1m": (0.9096, None)},
    protocol="Published: a test set of its own, with posters. Here: 5 folds, titles' words and genres, no posters.",
)
