"""The artifact that answers, and how a new one takes its place without a request lost."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from m5.schema import DataError
from m5.serving.artifact import MANIFEST_DIGEST, Artifact
from m5.serving.index import IndexKind
from m5.serving.retriever import Ask, Retriever
from m5.viewer import Viewer

log = logging.getLogger("m5.serve")
FIRST_WAIT, LONGEST_WAIT = 2.0, 60.0  # seconds until a refused artifact is looked at again; each wait is twice the last
ATTEMPTS = 3  # to begin with an artifact that is being replaced


class _Refusal(NamedTuple):
    """Of what artifact, why, and when it is looked at again: it may have been copied halfway."""

    stamp: str
    reason: str
    wait: float
    again: float


class Current:
    """Holds the retriever that answers; a request keeps the one that it began with.

    Args:
        folder: of the artifact, watched.
        kind: of the index.
        compiled: as of `Retriever`.
        observe: told "ok" or "refused" of every new artifact, the latter again where the reason changes.

    Raises:
        DataError: there is no whole artifact to begin with.
    """

    def __init__(
        self,
        folder: Path,
        kind: IndexKind,
        observe: Callable[[str], None] = lambda outcome: None,
        *,
        compiled: bool = False,
    ):
        self.folder, self.kind, self.observe, self.compiled = folder, kind, observe, compiled
        self._refusal: _Refusal | None = None
        self.retriever = self._first()
        self.loaded_at = time.time()

    @property
    def refused(self) -> str | None:
        """What is wrong with the artifact that lies there; None where it is the one that answers."""
        return "the newest artifact is damaged, or of another version" if self._refusal else None

    def _stamp(self) -> str:
        """Digest of the artifact that lies there; empty while one takes the other's place."""
        try:
            return (self.folder / MANIFEST_DIGEST).read_bytes().strip().decode("latin-1")
        except OSError:
            return ""

    def _load(self) -> Retriever:
        retriever = Retriever(Artifact(self.folder), self.kind, compiled=self.compiled)
        warm_up(retriever)
        return retriever

    def _first(self) -> Retriever:
        for _ in range(ATTEMPTS - 1):
            stamp = self._stamp()
            try:
                return self._load()
            except Exception:
                if self._stamp() == stamp:
                    raise
        return self._load()

    def look(self) -> bool:
        """Take a changed artifact over, if it is whole; whether one was. Meant for a thread of its own."""
        stamp, refusal = self._stamp(), self._refusal
        if not stamp:
            return False
        if stamp == self.retriever.artifact.digest:
            self._refusal = None
            return False
        if refusal is not None and refusal.stamp == stamp and time.monotonic() < refusal.again:
            return False
        try:
            retriever = self._load()
        except Exception as error:  # whatever is wrong with it: the one that answers goes on
            if self._stamp() == stamp:  # else it was replaced while it was read: the next look is at another one
                self._refuse(stamp, str(error) if isinstance(error, DataError) else type(error).__name__)
            return False
        self.retriever, self.loaded_at, self._refusal = retriever, time.time(), None
        log.info("now answering: artifact %s", retriever.artifact.digest[:12])
        self.observe("ok")
        return True

    def _refuse(self, stamp: str, reason: str) -> None:
        before = self._refusal if self._refusal is not None and self._refusal.stamp == stamp else None
        if before is None or before.reason != reason:
            log.error("a new artifact was refused, the present one goes on: %s", reason)
            self.observe("refused")
        wait = FIRST_WAIT if before is None else min(2 * before.wait, LONGEST_WAIT)
        self._refusal = _Refusal(stamp, reason, wait, time.monotonic() + wait)

    async def watch(self, seconds: float) -> None:
        """Look again and again."""
        while True:
            await asyncio.sleep(seconds)
            await asyncio.to_thread(self.look)


def warm_up(retriever: Retriever) -> None:
    """A few requests, so that the first real one finds everything in memory."""
    nothing = np.zeros(0, dtype=np.int64)
    watched = np.arange(min(4, retriever.manifest.n_titles))
    for title in (nothing, watched):
        viewer = Viewer(title, np.zeros(len(title), dtype=np.int64), retriever.manifest.now)
        retriever.recommend([Ask(viewer, 10)] * 2)
