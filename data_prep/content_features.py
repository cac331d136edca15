"""Text and image vectors as node features of the metagraph, fitted on the titles of the training period."""

from __future__ import annotations

import numpy as np
from scipy.linalg import eigh

from data_prep.content_arrays import unit_rows
from data_prep.metagraph import Relation
from m5.schema import PreparedDataset

RANDOM_IMAGE_WEIGHT = (
    0.25  # against text; untrained filters tell colour and texture, and would drown the text's meaning
)
NEIGHBOURS = 10
TITLES_COMPARED = 2000


def principal_components(features: np.ndarray, fit_on: np.ndarray, width: int) -> np.ndarray:
    """float32 [n, min(width, d)]: features centred and turned onto their main axes, without scaling.

    Args:
        features: float32 [n, d]; a zero row, which means missing, stays zero.
        fit_on: bool [n], the rows that mean and axes are taken of, as far as they are not zero.
        width: number of axes.
    """
    present = (features != 0).any(axis=1)
    rows = features[present & fit_on] if (present & fit_on).any() else features[present]
    mean = rows.mean(axis=0) if len(rows) else np.zeros(features.shape[1])
    centred = (rows - mean).astype(np.float64)
    d = features.shape[1]
    width = min(width, d)
    if not width:
        return features.astype(np.float32)
    _, axes = eigh(centred.T @ centred, subset_by_index=(d - width, d - 1))
    turned = (features - mean) @ axes[:, ::-1]
    return np.where(present[:, None], turned, 0).astype(np.float32)


def content_features(dataset: PreparedDataset, warm: np.ndarray, width: int) -> np.ndarray:
    """float32 [N, F]: text and image components, each of unit rows (zero where missing); F = 0 without either.

    Args:
        dataset: its text.npy and image.npy are read as far as they exist.
        warm: bool [N], titles of the training period.
        width: most components of the image.
    """
    parts = []
    text, image = dataset.content("text"), dataset.content("image")
    if text is not None:
        parts.append(unit_rows(principal_components(text, warm, text.shape[1])))
    if image is not None:
        untrained = dataset.manifest.encoders["image"].weights == "random"
        weight = RANDOM_IMAGE_WEIGHT if untrained and text is not None else 1.0
        parts.append(unit_rows(principal_components(image, warm, width)) * np.float32(weight))
    return np.concatenate(parts, axis=1) if parts else np.zeros((len(warm), 0), dtype=np.float32)


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
