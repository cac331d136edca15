"""Answers of an artifact: the best playable titles of viewers, titles like a title, and why a title was found."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from m5.serving.artifact import PROGRAM, Artifact
from m5.serving.index import Index, IndexKind, build_index, restored_index
from m5.serving.top import eligible_counts, ranked, rule_out
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

    @cached_property
    def unwanted(self) -> np.ndarray:
        """int64 titles that must not be in the answer, rights aside; ascending, each once."""
        return np.union1d(self.exclude, self.viewer.title) if self.filter_seen else np.unique(self.exclude)


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
    """A loaded artifact: in memory but for the posters, whose file is held open, so the folder may be replaced.

    Threads may share one.

    Args:
        artifact: verified.
        kind: of the index: exact, int8, hnsw or ivfpq.
        compiled: run the user tower as machine code; where that cannot be had, a warning is logged.

    Raises:
        DataError: another artifact took this one's place while it was read, or its files do not fit together.
    """

    def __init__(self, artifact: Artifact, kind: IndexKind = "exact", *, compiled: bool = False):
        self.artifact, self.manifest = artifact, artifact.manifest
        self.tower: Callable[..., tuple[Tensor, Tensor]] = artifact.user_tower()
        self.encoder = ViewerEncoder(artifact)
        self.rights, self.posters, self.viewers = artifact.rights, artifact.posters, artifact.viewers
        self.key_NQ = artifact.key_NQ
        self._learn_titles(artifact)
        state = artifact.index_state if kind == self.manifest.index else None
        program = self._program() if compiled else None
        artifact.refuse_replaced()  # all is read: what takes long comes behind
        keys = self.key_NQ.numpy()
        self.index: Index = build_index(keys, kind) if state is None else restored_index(keys, kind, state)
        self.width = self.key_NQ.shape[1] // (2 if self.manifest.content_width else 1)
        self._unit_NQ = functional.normalize(self.key_NQ, dim=-1)
        if program is not None:
            self._compile(program)

    def _learn_titles(self, artifact: Artifact) -> None:
        """Plain lists: a row of a data frame takes longer to look up than a title takes to be found."""
        titles, categories = artifact.titles, ("", *self.manifest.categories.values)
        self.title_ids: list[str] = titles["title_id"].tolist()
        self.place = {title_id: place for place, title_id in enumerate(self.title_ids)}
        self.names: list[str] = titles["title"].fillna("").tolist()
        self.categories = [categories[index] for index in titles["category"].tolist()]
        self.cold_N = titles["cold"].to_numpy(bool)
        self._folded = [name.casefold() for name in self.names]

    def _program(self) -> torch.export.ExportedProgram | None:
        try:
            return torch.export.load(self.artifact.folder / PROGRAM)
        except (RuntimeError, OSError) as error:
            self._warn(error)
            return None

    def _compile(self, program: torch.export.ExportedProgram) -> None:
        watched = np.arange(min(2, self.manifest.n_titles))
        example = tuple(self.encoder([Viewer(watched, np.zeros(len(watched), dtype=np.int64), 0)] * 2))
        try:
            self.tower = compile_tower(program, example)
        except RuntimeError as error:
            self._warn(error)

    @staticmethod
    def _warn(error: Exception) -> None:
        log.warning("the user tower could not be compiled (%s); it runs uncompiled, which is slower", error)

    @torch.inference_mode()
    def queries(self, viewers: Sequence[Viewer]) -> tuple[Tensor, Tensor]:
        """float32 [B, Q] queries and the ID branch's weights [B]."""
        parts = [self.tower(*self.encoder(viewers[b : b + SEQUENCES])) for b in range(0, len(viewers), SEQUENCES)]
        query_BQ, gate_B = (torch.cat(part) for part in zip(*parts, strict=True))
        return query_BQ, gate_B

    def recommend(self, asks: Sequence[Ask]) -> list[Answer]:
        """An answer to each; B requests are one pass of the tower, and those of one k are one search.

        Where an index looks at more titles for a larger k, that of others would change an answer.
        """
        if not asks:
            return []
        queries_BQ = self.queries([ask.viewer for ask in asks])[0].numpy()
        allowed_BY = self._allowed([ask.viewer for ask in asks])
        answers: dict[int, Answer] = {}
        for k in {ask.k for ask in asks}:
            rows = [b for b, ask in enumerate(asks) if ask.k == k]
            allowed_RY = None if allowed_BY is None else allowed_BY[rows]
            found = self.index.search(queries_BQ[rows], k, allowed_RY, [asks[b].unwanted for b in rows])
            for b, title_R, score_R in zip(rows, found.title_BR, found.score_BR, strict=True):
                exists = title_R >= 0
                title, score = title_R[exists], score_R[exists]
                id_score = self.key_NQ.numpy()[title, : self.width] @ queries_BQ[b, : self.width]
                eligible = self._eligible(None if allowed_BY is None else allowed_BY[b], asks[b].unwanted)
                answers[b] = Answer(title, score, id_score, score - id_score, eligible)
        return [answers[b] for b in range(len(asks))]

    def _allowed(self, viewers: Sequence[Viewer]) -> np.ndarray | None:
        if self.rights is None:
            return None
        return np.stack([self.rights.bits(self._scenario(viewer.scenario), viewer.at) for viewer in viewers])

    def _scenario(self, scenario: dict[str, int]) -> np.ndarray:
        return np.array([scenario.get(v.name, 0) for v in self.manifest.scenarios], dtype=np.int64)

    def _eligible(self, bits_Y: np.ndarray | None, unwanted: np.ndarray) -> int:
        if bits_Y is None:
            return self.manifest.n_titles - len(unwanted)
        return int(eligible_counts(bits_Y)) - int((bits_Y[unwanted >> 3] >> (unwanted & 7) & 1).sum())

    def find(self, words: str, count: int) -> list[int]:
        """The first titles whose name holds the words, in whatever case; milliseconds where few do."""
        wanted = words.casefold()
        return list(islice((title for title, name in enumerate(self._folded) if wanted in name), count))

    def similar(self, title: int, k: int, scenario: dict[str, int], at: int) -> tuple[np.ndarray, np.ndarray]:
        """The k playable titles whose keys have the largest cosine with a title's, itself aside, and the cosines."""
        cosine_N = (self._unit_NQ @ self._unit_NQ[title]).numpy()
        cosine_N[title] = -np.inf
        if self.rights is not None:
            rule_out(cosine_N, self.rights.bits(self._scenario(scenario), at))
        return ranked(cosine_N, k)

    def taken_away(self, ask: Ask, worst: float, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Titles that would have been among the answer's, but for the rights: score above `worst`, best first."""
        if self.rights is None:
            return NOTHING, np.zeros(0, dtype=np.float32)
        query_BQ, _ = self.queries([ask.viewer])
        score_N = (self.key_NQ @ query_BQ[0]).numpy()
        rule_out(score_N, ~self.rights.bits(self._scenario(ask.viewer.scenario), ask.viewer.at))
        score_N[ask.unwanted] = -np.inf
        title, score = ranked(score_N, count)
        return title[score > worst], score[score > worst]

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
