"""Text and image vectors as node features of the metagraph, fitted on the titles of the training period."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigh

from data_prep.content_arrays import unit_rows
from data_prep.metagraph import Relation
from m5.schema import ContentKind, PreparedDataset

RANDOM_IMAGE_WEIGHT = (
    0.25  # against text; untrained filters tell colour and texture, and would drown the text's meaning
)
NEIGHBOURS = 10
TITLES_COMPARED = 2000
KINDS: tuple[ContentKind, ...] = ("text", "image")


@dataclass(frozen=True)
class Components:
    """Features centred and turned onto their main axes, without scaling.

    Args:
        mean: float32 [d].
        axes: float64 [d, w], one a column, the main one first.
    """

    mean: np.ndarray
    axes: np.ndarray

    @classmethod
    def fit(cls, features: np.ndarray, fit_on: np.ndarray, width: int) -> Components:
        """At most `width` axes of float32 [n, d] features.

        Args:
            features: a zero row means missing.
            fit_on: bool [n], the rows that mean and axes are taken of, as far as they are not zero.
            width: number of axes.
        """
        present = (features != 0).any(axis=1)
        rows = features[present & fit_on] if (present & fit_on).any() else features[present]
        d = features.shape[1]
        mean = rows.mean(axis=0) if len(rows) else np.zeros(d, dtype=features.dtype)
        centred = (rows - mean).astype(np.float64)
        width = min(width, d)
        if not width:
            return cls(mean, np.zeros((d, 0)))
        _, axes = eigh(centred.T @ centred, subset_by_index=(d - width, d - 1))
        return cls(mean, np.ascontiguousarray(axes[:, ::-1]))

    def apply(self, features: np.ndarray) -> np.ndarray:
        """float32 [n, d] -> float32 [n, w]; a zero row stays zero."""
        present = (features != 0).any(axis=1)
        return np.where(present[:, None], (features - self.mean) @ self.axes, 0).astype(np.float32)


@dataclass(frozen=True)
class FeatureMap:
    """Text and image vectors -> node features: the components of either, side by side, and the components of that.

    Args:
        parts: of text and of image, as far as the dataset has them.
        image_weight: of the image's part against the text's.
        joint: of both.
    """

    parts: dict[ContentKind, Components]
    image_weight: float
    joint: Components

    @classmethod
    def of(cls, dataset: PreparedDataset, warm: np.ndarray, width: int) -> tuple[FeatureMap, np.ndarray]:
        """The map of a dataset's text.npy and image.npy, as far as they exist, and float32 [N, F] of all titles.

        Args:
            dataset: prepared dataset.
            warm: bool [N], titles of the training period.
            width: most components of the image, and of the result.

        Returns:
            The map, and unit rows (zero where a title has neither); F = 0 in a dataset without either.
        """
        vectors = {kind: array for kind in KINDS if (array := dataset.content(kind)) is not None}
        untrained = "image" in vectors and dataset.manifest.encoders["image"].weights == "random"
        parts = {
            kind: Components.fit(array, warm, array.shape[1] if kind == "text" else width)
            for kind, array in vectors.items()
        }
        weight = RANDOM_IMAGE_WEIGHT if untrained and "text" in vectors else 1.0
        nothing = Components(np.zeros(0, dtype=np.float32), np.zeros((0, 0)))
        joined = cls(parts, weight, nothing)._side_by_side(vectors, len(warm))
        fitted = cls(parts, weight, Components.fit(joined, warm, width))
        return fitted, unit_rows(fitted.joint.apply(joined))

    def _side_by_side(self, vectors: Mapping[ContentKind, np.ndarray], n: int) -> np.ndarray:
        sides = []
        for kind, components in self.parts.items():
            weight = np.float32(self.image_weight if kind == "image" else 1)
            sides.append(unit_rows(components.apply(vectors[kind])) * weight)
        return np.concatenate(sides, axis=1) if sides else np.zeros((n, 0), dtype=np.float32)

    def apply(self, vectors: Mapping[ContentKind, np.ndarray], n: int) -> np.ndarray:
        """float32 [n, F] unit rows of n titles, zero where a title has neither.

        Args:
            vectors: float32 [n, d] of every kind that the map has, unit rows, zero where missing.
            n: number of titles.
        """
        return unit_rows(self.joint.apply(self._side_by_side(vectors, n)))

    def tensors(self) -> dict[str, np.ndarray]:
        """Everything as arrays by name."""
        found = {"image_weight": np.array([self.image_weight])}
        for name, components in (*self.parts.items(), ("joint", self.joint)):
            found |= {f"{name}.mean": components.mean, f"{name}.axes": components.axes}
        return found

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray]) -> FeatureMap:
        """Of what `tensors` gave; other names are not looked at."""

        def components(name: str) -> Components:
            return Components(tensors[f"{name}.mean"], tensors[f"{name}.axes"])

        parts = {kind: components(kind) for kind in KINDS if f"{kind}.mean" in tensors}
        return cls(parts, float(tensors["image_weight"][0]), components("joint"))


def neighbour_overlap(vectors: np.ndarray, relation: Relation) -> float:
    """Mean Jaccard index of a title's values and those of its 10 nearest neighbours by inner product.

    Titles without values take no part; of more than 2,000 others an even selection is compared.

    Args:
        vectors: float32 [N, d], unit rows.
        relation: whose values count.
    """
    titles, values = relation.title_links()
    linked = np.unique(titles)
    chosen = linked[:: max(1, len(linked) // TITLES_COMPARED)]
    if len(chosen) <= NEIGHBOURS:
        return float("nan")
    row = np.full(len(vectors), -1)
    row[chosen] = np.arange(len(chosen))
    kept = row[titles] >= 0
    hot = np.zeros((len(chosen), len(relation.values)), dtype=np.float32)
    hot[row[titles[kept]], values[kept]] = 1
    scores = vectors[chosen] @ vectors[chosen].T
    np.fill_diagonal(scores, -np.inf)
    nearest = np.argpartition(-scores, NEIGHBOURS, axis=1)[:, :NEIGHBOURS]
    shared, sizes = hot @ hot.T, hot.sum(axis=1)
    jaccard = shared / (sizes[:, None] + sizes[None, :] - shared)
    return float(np.take_along_axis(jaccard, nearest, axis=1).mean())
