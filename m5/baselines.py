"""Reference rows: recent popularity, item-kNN and EASE, fitted on training events, settings chosen on validation.

They are a few lines of SciPy each, because no library fits beside the pinned set: RecTools 0.19 installs NumPy 1.26 and
pandas 2.3, LensKit 2025.8 pandas 2.3, and both rank users as they were fitted, while a request here is any history.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Protocol

import numpy as np
import scipy.sparse as sp
import torch
from rich.console import Console

from m5.evaluate import Scorer, evaluate
from m5.schema import TRAIN, PreparedDataset

DAY = 86_400
CHOICE_TARGETS = 2_000  # validation requests that settings are chosen on
MAX_EASE_TITLES = 12_000  # EASE inverts a dense float32 N x N matrix: here a minute a setting on one core, and 2.3 GB
GRAM_ROWS = 512  # rows of the N x N co-occurrence matrix made at a time
NEIGHBOURS = (10, 20, 50, 100, 200)
CHOICE_METRIC = "ndcg@10"


class Interactions:
    """Training matrix and histories of a dataset, shared by the rows."""

    def __init__(self, dataset: PreparedDataset):
        self.dataset = dataset
        self.title = np.asarray(dataset.event_array("title"), dtype=np.int64)
        self.timestamp = np.asarray(dataset.event_array("timestamp"))
        self.train = np.flatnonzero(np.asarray(dataset.event_array("split")) == TRAIN)
        user = dataset.user_of(self.train)
        shape = (dataset.manifest.n_users, dataset.manifest.n_titles)
        matrix = sp.coo_matrix((np.ones(len(user), np.float32), (user, self.title[self.train])), shape).tocsr()
        matrix.data[:] = 1.0  # a repeated watch counts once
        self.matrix_UN = matrix

    @cached_property
    def gram_NN(self) -> np.ndarray:
        """float32 [N, N], users who watched both titles."""
        titles = self.matrix_UN.shape[1]
        by_title, gram_NN = self.matrix_UN.T.tocsr(), np.empty((titles, titles), dtype=np.float32)
        for first in range(0, titles, GRAM_ROWS):
            gram_NN[first : first + GRAM_ROWS] = (by_title[first : first + GRAM_ROWS] @ self.matrix_UN).toarray()
        return gram_NN

    @cached_property
    def neighbours(self) -> tuple[np.ndarray, np.ndarray]:
        """float32 [N, K] cosine similarity of each title to its K nearest others, and int64 [N, K] which; 0 = none."""
        norm_N = np.sqrt(np.maximum(np.asarray(self.matrix_UN.sum(axis=0)).ravel(), 1))
        unit_UN = (self.matrix_UN @ sp.diags(1 / norm_N)).astype(np.float32).tocsr()
        by_title, titles = unit_UN.T.tocsr(), unit_UN.shape[1]
        values, indices = [], []
        for first in range(0, titles, GRAM_ROWS):
            block = (by_title[first : first + GRAM_ROWS] @ unit_UN).toarray()
            row = np.arange(len(block))
            block[row, first + row] = 0.0
            best = torch.topk(torch.from_numpy(block), min(max(NEIGHBOURS), titles))
            values.append(best.values.numpy())
            indices.append(best.indices.numpy())
        return np.concatenate(values), np.concatenate(indices)

    def histories(self, event_index: np.ndarray) -> sp.csr_matrix:
        """float32 [B, N], 1 where the user of a target event had watched the title before it."""
        row, title = self.dataset.watched_before(event_index)
        shape = (len(event_index), self.dataset.manifest.n_titles)
        matrix = sp.coo_matrix((np.ones(len(row), np.float32), (row, title)), shape).tocsr()
        matrix.data[:] = 1.0
        return matrix


class Popularity:
    """Watches in the last `days` of the training period."""

    def __init__(self, data: Interactions, days: float):
        self.name, self.setting = "popularity", {"days": days}
        timestamp = data.timestamp[data.train]
        recent = data.train[timestamp >= timestamp.max() - days * DAY]
        self.count_N = np.bincount(data.title[recent], minlength=data.dataset.manifest.n_titles).astype(np.float32)

    def score(self, event_index: np.ndarray) -> np.ndarray:
        """int64 [B] -> float32 [B, N]."""
        return np.tile(self.count_N, (len(event_index), 1))


class ItemKNN:
    """Sum of cosine similarities to the watched titles, each title keeping its nearest `neighbours`.

    Source: Sarwar et al., WWW 2001, doi 10.1145/371920.372071.
    """

    def __init__(self, data: Interactions, neighbours: int):
        self.name, self.setting, self.data = "item-knn", {"neighbours": neighbours}, data
        value, index = (array[:, :neighbours] for array in data.neighbours)
        row = np.broadcast_to(np.arange(len(value))[:, None], value.shape)
        similarity = sp.csr_matrix((value.ravel(), (index.ravel(), row.ravel())), (len(value), len(value)))
        similarity.eliminate_zeros()
        self.similarity_NN = similarity

    def score(self, event_index: np.ndarray) -> np.ndarray:
        """int64 [B] -> float32 [B, N]."""
        return (self.data.histories(event_index) @ self.similarity_NN).toarray()


class EASE:
    """Linear autoencoder with zero diagonal in closed form.

    Source: Steck, "Embarrassingly shallow autoencoders for sparse data", WWW 2019, doi 10.1145/3308558.3313710.
    """

    def __init__(self, data: Interactions, regularisation: float):
        self.name, self.setting, self.data = "ease", {"regularisation": regularisation}, data
        gram_NN = torch.from_numpy(data.gram_NN.copy())
        gram_NN.diagonal().add_(regularisation)
        inverse_NN = torch.cholesky_inverse(torch.linalg.cholesky(gram_NN)).numpy()
        inverse_NN /= -np.diag(inverse_NN)
        np.fill_diagonal(inverse_NN, 0.0)
        self.weight_NN = inverse_NN

    def score(self, event_index: np.ndarray) -> np.ndarray:
        """int64 [B] -> float32 [B, N]."""
        return self.data.histories(event_index) @ self.weight_NN


class Reference(Scorer, Protocol):
    """A row that was fitted with one setting of a grid."""

    @property
    def setting(self) -> Mapping[str, float]: ...


def _chosen(
    dataset: PreparedDataset, make: Callable[[float], Reference], settings: Sequence[float], *, filter_seen: bool
) -> Reference:
    """The row whose setting ranks validation targets best."""
    best, best_value = None, -1.0
    for setting in settings:
        scorer = make(setting)
        report = evaluate(
            dataset, [scorer], split="valid", filter_seen=filter_seen, max_targets=CHOICE_TARGETS, bootstrap=0
        )
        value = report["models"][scorer.name]["overall"][CHOICE_METRIC]
        if value > best_value:
            best, best_value = scorer, value
    assert best is not None
    return best


def reference_scorers(dataset: PreparedDataset, *, filter_seen: bool) -> tuple[list[Scorer], list[str]]:
    """Popularity, item-kNN, EASE, and the oracle where the dataset carries the truth of a synthetic world.

    Returns:
        The rows, and notes: which setting validation chose, and what was left out.
    """
    data = Interactions(dataset)
    grids: list[tuple[Callable[[float], Reference], Sequence[float]]] = [
        (lambda days: Popularity(data, days), (7, 30, 90, 100_000)),
        (lambda neighbours: ItemKNN(data, int(neighbours)), NEIGHBOURS),
    ]
    notes: list[str] = []
    if dataset.manifest.n_titles <= MAX_EASE_TITLES:
        grids.append((lambda regularisation: EASE(data, regularisation), (50, 200, 500, 1000)))
    else:
        notes.append(f"ease: left out, its {dataset.manifest.n_titles:,} x N matrix would not fit in memory.")
    scorers: list[Scorer] = []
    with Console(stderr=True).status("fitting reference rows"):
        for make, settings in grids:
            scorer = _chosen(dataset, make, settings, filter_seen=filter_seen)
            notes.append(f"{scorer.name}: validation chose {scorer.setting}.")
            scorers.append(scorer)
    if (dataset.folder / "truth.npz").is_file():
        from m5.oracle import OracleScorer

        scorers.append(OracleScorer(dataset))
    return scorers, notes
