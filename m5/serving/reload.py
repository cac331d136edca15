"""The artifact that answers, and how a new one takes its place without a request lost."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from m5.schema import DataError
from m5.serving.artifact import MANIFEST_DIGEST, Artifact
from m5.serving.index import IndexKind
from m5.serving.retriever import Ask, Retriever
from m5.viewer import Viewer

log = logging.getLogger("m5.serve")


class Current:
    """Holds the retriever that answers; a request keeps the one that it began with.

    Args:
        folder: of the artifact, watched.
        kind: of the index.
        compiled: as of `Retriever`.
        observe: told "ok" or "refused" of every new artifact.

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
        self.seen = self._stamp()
        self.retriever = self._load()
        self.loaded_at = time.time()
        self.refused: str | None = None

    def _stamp(self) -> bytes:
        """What changes with the artifact; empty while one takes the other's place."""
        try:
            return (self.folder / MANIFEST_DIGEST).read_bytes()
        except OSError:
            return b""

    def _load(self) -> Retriever:
        retriever = Retriever(Artifact(self.folder), self.kind, compiled=self.compiled)
        warm_up(retriever)
        return retriever

    def look(self) -> bool:
        """Take a changed artifact over, if it is whole; whether one was. Meant for a thread of its own."""
        stamp = self._stamp()
        if not stamp or stamp == self.seen:
            return False
        self.seen = stamp
        try:
            retriever = self._load()
        except Exception as error:  # whatever is wrong with it: the one that answers goes on
            reason = str(error) if isinstance(error, DataError) else type(error).__name__
            log.error("a new artifact was refused, the present one goes on: %s", reason)
            self.refused = "the newest artifact is damaged, or of another version"
            self.observe("refused")
            if self._stamp() != stamp:
                self.seen = b""  # it was replaced while it was read: look again
            return False
        self.retriever, self.loaded_at, self.refused = retriever, time.time(), None
        log.info("now answering: artifact %s", retriever.artifact.digest[:12])
        self.observe("ok")
        return True

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
