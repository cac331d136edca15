"""Answers of an artifact: the best playable titles of viewers, titles like a title, and why a title was found."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from m5.serving.artifact import PROGRAM, Artifact
from m5.serving.index import Index, IndexKind, build_index, restored_index
from m5.serving.tower import compiled as compile_tower
from m5.serving.viewer import ViewerEncoder
from m5.viewer import Viewer

log = logging.getLogger("m5.serve")
SEQUENCES = 64  # in one pass of the tower; on a CPU its caches hold no more
NOTHING = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        viewer: who asks.
        k: how many titles.
        exclude: int64 titles that are not wanted.
        filter_seen: whether watched titles are left out too.
    """

    viewer: Viewer
    k: int
    exclude: np.ndarray = field(default_factory=lambda: NOTHING)
    filter_seen: bool = True


class Answer(NamedTuple):
    """int64 titles, best first; float32 scores and their parts that came by the ID and by the content-graph branch.

    Fewer than k where the viewer may not play as many. `eligible` counts the titles that it was chosen from.
    """

    title: np.ndarray
    score: np.ndarray
    id_score: np.ndarray
    cg_score: np.ndarray
    eligible: int


class Carrier(NamedTuple):
    """A watched title (its place in the history) and by how much a recommended title's score falls without it, by the
    ID and by the content-graph branch."""

    place: int
    id_drop: float
    cg_drop: float


class Retriever:
    """A loaded artifact; all of it is in memory or mapped, so the folder may be replaced. Threads may share one.

    Args:
        artifact: verified.
        kind: of the index: exact, int8, hnsw or ivfpq.
        compiled: run the user tower as machine code; where that cannot be had, a warning is logged.
    """

    def __init__(self, artifact: Artifact, kind: IndexKind = "exact", *, compiled: bool = False):
        self.artifact, self.manifest = artifact, artifact.manifest
        self.tower: Callable[..., tuple[Tensor, Tensor]] = artifact.user_tower()
        self.encoder = ViewerEncoder(artifact)
        if compiled:
            self._compile()
        self.rights, self.posters, self.titles = artifact.rights, artifact.posters, artifact.titles
        self.key_NQ = artifact.key_NQ
        keys = self.key_NQ.numpy()
        kept = kind == self.manifest.index
        self.index: Index = restored_index(keys, kind, artifact.index_state) if kept else build_index(keys, kind)
        self.width = self.key_NQ.shape[1] // (2 if self.manifest.content_width else 1)
        self.title_ids = self.titles["title_id"].tolist()
        self.place = {title_id: place for place, title_id in enumerate(self.title_ids)}
        self.viewers = artifact.viewers
        self._unit_NQ = functional.normalize(self.key_NQ, dim=-1)

    def _compile(self) -> None:
        watched = np.arange(min(2, self.manifest.n_titles))
        example = tuple(self.encoder([Viewer(watched, np.zeros(len(watched), dtype=np.int64), 0)] * 2))
        try:
            self.tower = compile_tower(torch.export.load(self.artifact.folder / PROGRAM), example)
        except (RuntimeError, OSError) as error:
            log.warning("the user tower could not be compiled (%s); it runs uncompiled, which is slower", error)

    @torch.inference_mode()
    def queries(self, viewers: Sequence[Viewer]) -> tuple[Tensor, Tensor]:
        """float32 [B, Q] queries and the ID branch's weights [B]."""
        parts = [self.tower(*self.encoder(viewers[b : b + SEQUENCES])) for b in range(0, len(viewers), SEQUENCES)]
        query_BQ, gate_B = (torch.cat(part) for part in zip(*parts, strict=True))
        return query_BQ, gate_B

    def recommend(self, asks: Sequence[Ask]) -> list[Answer]:
        """An answer to each; B requests are one pass of the tower and one search."""
        if not asks:
            return []
        query_BQ, _ = self.queries([ask.viewer for ask in asks])
        allowed_BY = self._allowed([ask.viewer for ask in asks])
        excluded = [np.union1d(ask.exclude, ask.viewer.title) if ask.filter_seen else ask.exclude for ask in asks]
        queries = query_BQ.numpy()
        found = self.index.search(queries, max(ask.k for ask in asks), allowed_BY, excluded)
        answers = []
        for b, ask in enumerate(asks):
            exists = found.title_BR[b, : ask.k] >= 0
            title, score = found.title_BR[b, : ask.k][exists], found.score_BR[b, : ask.k][exists]
            id_score = self.key_NQ.numpy()[title, : self.width] @ queries[b, : self.width]
            eligible = self._eligible(None if allowed_BY is None else allowed_BY[b], excluded[b])
            answers.append(Answer(title, score, id_score, score - id_score, eligible))
        return answers

    def _allowed(self, viewers: Sequence[Viewer]) -> np.ndarray | None:
        if self.rights is None:
            return None
        return np.stack([self.rights.bits(self._scenario(viewer.scenario), viewer.at) for viewer in viewers])

    def _scenario(self, scenario: dict[str, int]) -> np.ndarray:
        return np.array([scenario.get(v.name, 0) for v in self.manifest.scenarios], dtype=np.int64)

    def _eligible(self, bits_Y: np.ndarray | None, excluded: np.ndarray) -> int:
        if bits_Y is None:
            return self.manifest.n_titles - len(np.unique(excluded))
        lost = np.unique(excluded)
        return int(np.bitwise_count(bits_Y).sum()) - int(((bits_Y[lost >> 3] >> (lost & 7)) & 1).sum())

    def similar(self, title: int, k: int, scenario: dict[str, int], at: int) -> tuple[np.ndarray, np.ndarray]:
        """The k playable titles whose keys have the largest cosine with a title's, itself aside, and the cosines."""
        cosine_N = (self._unit_NQ @ self._unit_NQ[title]).numpy().copy()
        cosine_N[title] = -np.inf
        if self.rights is not None:
            bits_Y = self.rights.bits(self._scenario(scenario), at)
            cosine_N[np.unpackbits(bits_Y, count=len(cosine_N), bitorder="little") == 0] = -np.inf
        best = np.lexsort((np.arange(len(cosine_N)), -cosine_N))[:k]
        best = best[np.isfinite(cosine_N[best])]
        return best, cosine_N[best]

    def taken_away(self, ask: Ask, worst: float, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Titles that would have been among the answer's, but for the rights: score above `worst`, best first."""
        if self.rights is None:
            return NOTHING, np.zeros(0, dtype=np.float32)
        query_BQ, _ = self.queries([ask.viewer])
        score_N = (self.key_NQ @ query_BQ[0]).numpy().copy()
        bits_Y = self.rights.bits(self._scenario(ask.viewer.scenario), ask.viewer.at)
        score_N[np.unpackbits(bits_Y, count=len(score_N), bitorder="little") == 1] = -np.inf
        score_N[np.union1d(ask.exclude, ask.viewer.title) if ask.filter_seen else ask.exclude] = -np.inf
        best = np.lexsort((np.arange(len(score_N)), -score_N))[:count]
        best = best[score_N[best] > worst]
        return best, score_N[best]

    def carriers(self, viewer: Viewer, title: np.ndarray, *, behaviours: int, count: int) -> list[list[Carrier]]:
        """Which of a viewer's latest behaviours carried each title: by how much its score falls without them.

        Args:
            viewer: who was recommended to.
            title: int64 titles.
            behaviours: how many of the latest are tried, each by a pass of the tower.
            count: of the largest falls that are kept for a title.
        """
        first = max(0, len(viewer.title) - min(behaviours, self.manifest.history))
        places = range(first, len(viewer.title))
        query_BQ, _ = self.queries([viewer, *(viewer.without(place) for place in places)])
        drop_JQ = query_BQ[:1] - query_BQ[1:]
        key_TQ = self.key_NQ[torch.from_numpy(title)]
        id_JT = (drop_JQ[:, : self.width] @ key_TQ[:, : self.width].T).numpy()
        cg_JT = (drop_JQ[:, self.width :] @ key_TQ[:, self.width :].T).numpy()
        falls = id_JT + cg_JT
        return [
            [
                Carrier(places[int(j)], float(id_JT[j, t]), float(cg_JT[j, t]))
                for j in np.argsort(-falls[:, t], kind="stable")[:count]
                if falls[j, t] > 0
            ]
            for t in range(len(title))
        ]
