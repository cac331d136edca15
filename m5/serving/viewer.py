"""Viewers who ask a service -> the user tower's input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from m5.data.sequences import age_bucket
from m5.model.multi_modal_embedding import START
from m5.serving.artifact import Artifact
from m5.viewer import Viewer


class TowerInput(NamedTuple):
    """What `m5.serving.tower.UserTower` takes; see there."""

    id_BLD: Tensor
    cg_BLD: Tensor | None
    category_BL: Tensor
    subsidiary_BLX: Tensor
    length_B: Tensor
    feature_BX: Tensor


class ViewerEncoder:
    """Looks up what the tower reads.

    Args:
        artifact: whose titles and vocabularies are meant.
    """

    def __init__(self, artifact: Artifact):
        manifest = artifact.manifest
        self.manifest = manifest
        self.history, self.n_titles = manifest.history, manifest.n_titles
        self.causal = manifest.model.attention == "causal"
        self.id_ND, self.cg_ND = artifact.rows_ND
        category = artifact.titles["category"].to_numpy(np.int64)
        category = category if manifest.model.categories else np.zeros_like(category)
        self.category = np.append(category, -1)
        self.subsidiary = manifest.model.subsidiary
        # The tables' order is the tower's: user features and contexts, then the scenarios that the model sees.
        names = [key.partition("_") for key in manifest.tables if key.startswith(("user_", "context_", "scenario_"))]
        self.features = [(kind, name) for kind, _, name in names if kind != "scenario"]
        self.features += [(kind, name) for kind, _, name in names if kind == "scenario"]

    def __call__(self, viewers: Sequence[Viewer]) -> TowerInput:
        """[B] viewers -> input of B sequences, as long as the longest history, at most as the model reads."""
        recent = [slice(max(0, len(viewer.title) - self.history), None) for viewer in viewers]
        length_B = np.array([1 + len(viewer.title[part]) for viewer, part in zip(viewers, recent, strict=True)])
        B, L = len(viewers), int(length_B.max(initial=1))
        title_BL = np.full((B, L), self.n_titles + START)
        kinds = self.manifest.intensities if self.subsidiary else ()
        subsidiary_BLX = np.zeros((B, L, 1 + len(kinds) if self.subsidiary else 0), dtype=np.int64)
        for b, (viewer, part) in enumerate(zip(viewers, recent, strict=True)):
            inside = slice(1, int(length_B[b]))
            title_BL[b, inside] = viewer.title[part]
            if self.subsidiary:
                subsidiary_BLX[b, inside, 0] = self._age(viewer.timestamp[part], viewer.at)
                for x, kind in enumerate(kinds, start=1):
                    if kind.name in viewer.intensity:
                        subsidiary_BLX[b, inside, x] = kind.bucket(viewer.intensity[kind.name][part])
        feature_BX = np.array(
            [[getattr(viewer, kind).get(name, 0) for kind, name in self.features] for viewer in viewers], dtype=np.int64
        ).reshape(B, len(self.features))
        rows_BL = torch.from_numpy(title_BL)
        return TowerInput(
            id_BLD=self.id_ND[rows_BL],
            cg_BLD=self.cg_ND[rows_BL] if self.cg_ND is not None else None,
            category_BL=torch.from_numpy(self.category[np.minimum(title_BL, self.n_titles)]),
            subsidiary_BLX=torch.from_numpy(subsidiary_BLX),
            length_B=torch.from_numpy(length_B),
            feature_BX=torch.from_numpy(feature_BX),
        )

    def _age(self, timestamp: np.ndarray, at: int) -> np.ndarray:
        """Buckets of the time that passes from a behaviour to the next one (causal), or to the request."""
        until = np.append(timestamp[1:], at) if self.causal else at
        return age_bucket(until - timestamp)
