"""Indices that look at a part of the titles, on Faiss: a graph (HNSW), and coded titles in cells (IVF-PQ).

Rights and exclusions: the search asks for so many of the best titles that k eligible ones should be among them, and
keeps these. What is excluded, watched titles mostly, may be among the best, so as many more are asked for. That
there are k proves that rights have taken nothing from the quality: they are the best eligible ones, as surely as what
was found are the best. Where there are fewer, because rights take away what is near the query, the titles are scanned;
and so they are from the start where so few are eligible that a scan costs less: the eligible ones in float32 where they
are few, else all in int8, the best of them again in float32. Faiss's own selector fills the k places with whatever
eligible titles the search comes past: on the half of a catalogue that a viewer likes least (5,000 clustered keys of the
tests, efSearch 600) it returned 200 with a recall of .63, and nothing told.

Dimension legend in `m5.serving.top`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import faiss as untyped_faiss
import numpy as np

from m5.schema import DataError
from m5.serving.scan import Exact, Int8
from m5.serving.top import Found, checked_query, eligible_counts, narrowed, nothing_found

faiss: Any = untyped_faiss  # its stubs lack half of what it has
STATE = "faiss"
GATHERED = 0.05  # up to this share of eligible titles, their float32 keys are scanned; above it, all int8 ones


class _Approximate:
    """What both have in common: when to search, when to scan, and the exact scores of what was found.

    Args:
        exact: of the same titles.
        inner: Faiss's index of them.
    """

    kind = ""
    inner_class: Any
    worth = 0  # a scan of so many titles takes as long as a search takes for one title more
    reranked = 1  # candidates a result, of which exact scores choose

    def __init__(self, exact: Exact, inner: Any):
        self.exact, self.inner = exact, inner
        self._int8 = Int8.built(exact.key_NQ)

    @classmethod
    def built(cls, key_NQ: np.ndarray) -> Self:
        """Of float32 keys [N, Q]; on one thread, so that it is the same again."""
        exact = Exact(key_NQ)
        faiss.omp_set_num_threads(1)
        return cls(exact, cls._build(exact.key_NQ))

    @classmethod
    def restored(cls, key_NQ: np.ndarray, state: Mapping[str, np.ndarray]) -> Self:
        """What `state` gave. Faiss's reader can be made to end the process: compare a checksum before.

        Raises:
            DataError: it does not fit the keys.
        """
        exact = Exact(key_NQ)
        try:
            inner: Any = faiss.deserialize_index(state[STATE])
        except (KeyError, RuntimeError, AssertionError) as error:
            raise DataError(f"the {cls.kind} index is damaged: {str(error).splitlines()[0]}.") from None
        if not isinstance(inner, cls.inner_class) or (inner.ntotal, inner.d) != exact.key_NQ.shape:
            raise DataError(f"the {cls.kind} index is of other keys than these {exact.titles:,}: build it again.")
        cls._complete(inner, exact.key_NQ)
        return cls(exact, inner)

    @property
    def titles(self) -> int:
        return self.exact.titles

    def search(
        self,
        query_BQ: np.ndarray,
        k: int,
        allowed_BY: np.ndarray | None = None,
        excluded: Sequence[np.ndarray] | None = None,
    ) -> Found:
        """See `m5.serving.index.Index`."""
        query_BQ = checked_query(query_BQ, self.exact.key_NQ.shape[1])
        bits_BY = narrowed(allowed_BY, excluded, len(query_BQ), self.titles)
        found = nothing_found(len(query_BQ), k)
        # Of this thread, in Faiss's own OpenMP: requests run side by side, and a single query cannot be divided.
        faiss.omp_set_num_threads(1)
        for row, query_Q in enumerate(query_BQ):
            bits_Y = None if bits_BY is None else bits_BY[row]
            count = self.titles if bits_Y is None else int(eligible_counts(bits_Y))
            share = 1.0 if allowed_BY is None else int(eligible_counts(allowed_BY[row])) / self.titles
            asked = self._asked(k, count, share, 0 if excluded is None else len(excluded[row]))
            title_C = None if asked is None else self._searched(query_Q, asked, bits_Y)
            if title_C is not None and len(title_C) >= min(self.reranked * k, count):
                found.put(row, self.exact.rescored(query_Q, title_C), title_C)
            else:
                scan = self.exact if count <= GATHERED * self.titles else self._int8
                scanned = scan.search(query_Q[None], k, None if bits_Y is None else bits_Y[None])
                found.score_BR[row], found.title_BR[row] = scanned.score_BR[0], scanned.title_BR[0]
        return found

    def _asked(self, k: int, count: int, share: float, excluded: int) -> int | None:
        """How many titles to search for, that the best k of `count` eligible ones be among them; None: scan.

        Args:
            share: of the titles that rights leave.
            excluded: titles, which are added as if all of them were among the best.
        """
        if count == 0:
            return None
        wanted = self.reranked * k + excluded
        if share < 1:
            # Of so many titles, `wanted` are eligible at this share, three standard deviations below the mean.
            wanted = math.ceil((wanted + 3 * math.sqrt(wanted)) / share)
        asked = min(self.titles, wanted)
        # An index that was chosen is searched, exclusions and all, as long as they do not more than double the work.
        plain = share == 1 and excluded <= self.reranked * k
        return asked if plain or asked * self.worth < self.titles else None

    def _searched(self, query_Q: np.ndarray, asked: int, bits_Y: np.ndarray | None) -> np.ndarray:
        """int64 [C] eligible titles among the `asked` best that the search finds."""
        _, title_1C = self.inner.search(query_Q[None], asked, params=self._parameters(asked))
        title_C = title_1C[0, title_1C[0] >= 0]
        return title_C if bits_Y is None else title_C[(bits_Y[title_C >> 3] >> (title_C & 7) & 1).astype(bool)]

    def with_titles(self, key_XQ: np.ndarray) -> Self:
        """See `m5.serving.index.Index`."""
        exact, inner = self.exact.with_titles(key_XQ), faiss.clone_index(self.inner)
        faiss.omp_set_num_threads(1)
        inner.add(exact.key_NQ[self.titles :])
        return type(self)(exact, inner)

    def state(self) -> dict[str, np.ndarray]:
        """uint8 bytes of Faiss's format."""
        return {STATE: faiss.serialize_index(self.inner, faiss.IO_FLAG_SKIP_STORAGE)}

    # ---- what the two differ in --------------------------------------------------------------------------

    @classmethod
    def _build(cls, key_NQ: np.ndarray) -> Any:
        raise NotImplementedError

    @classmethod
    def _complete(cls, inner: Any, key_NQ: np.ndarray) -> None:
        """Put back what `state` leaves out."""

    def _parameters(self, asked: int) -> Any:
        """Of a search for so many titles."""
        raise NotImplementedError


class Hnsw(_Approximate):
    """A hierarchical navigable small world graph (Malkov and Yashunin, TPAMI 2020) for the inner product.

    On keys [E^ID ; E^CG] of a trained run, 70,000 titles, recall@200 by milliseconds of a core: the inner product
    reaches .985 in 1.2; L2, with one more coordinate that gives all keys the same norm, .979 in 1.0 and .986 in 1.4.
    So the plain product stays, and titles may come later with any norm. `construction` has to be well above 2 `links`,
    which the lowest level has: with 64 links, 100 gives .92 and 200 gives .989 at the same breadth. These are at
    breadth 3.5; on keys made by `m5 bench waterfall` that gave .973, hence 5: .985.
    """

    kind = "hnsw"
    inner_class = faiss.IndexHNSWFlat
    worth = 1_400
    links, construction, breadth = 32, 200, 5.0

    @classmethod
    def _build(cls, key_NQ: np.ndarray) -> Any:
        graph = faiss.IndexHNSWFlat(key_NQ.shape[1], cls.links, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction = cls.construction
        graph.add(key_NQ)
        return graph

    @classmethod
    def _complete(cls, inner: Any, key_NQ: np.ndarray) -> None:
        storage = faiss.IndexFlatIP(key_NQ.shape[1])
        storage.add(key_NQ)
        storage.this.disown()  # the graph frees it
        inner.storage, inner.own_fields = storage, True

    def _parameters(self, asked: int) -> Any:
        return faiss.SearchParametersHNSW(efSearch=max(64, math.ceil(self.breadth * asked)))


class IvfPq(_Approximate):
    """Cells around centroids, and in them product-quantised residuals (Jégou et al., TPAMI 2011)."""

    kind = "ivfpq"
    inner_class = faiss.IndexIVFPQ
    worth = 40
    reranked = 8
    cells, probed, subvector = 1024, 0.04, 4

    @classmethod
    def _build(cls, key_NQ: np.ndarray) -> Any:
        titles, width = key_NQ.shape
        # Faiss wants 39 training points a centroid; a catalogue that has not even 78 titles is shown several times.
        shown_NQ = np.tile(key_NQ, (math.ceil(78 / titles), 1))
        cells = max(1, min(cls.cells, titles // 39))
        bits = min(8, int(math.log2(len(shown_NQ) / 39)))
        parts = max(parts for parts in range(1, max(1, width // cls.subvector) + 1) if width % parts == 0)
        quantizer = faiss.IndexFlatIP(width)
        index = faiss.IndexIVFPQ(quantizer, width, cells, parts, bits, faiss.METRIC_INNER_PRODUCT)
        index.own_fields = True
        quantizer.this.disown()
        index.train(shown_NQ)
        index.add(key_NQ)
        return index

    def _parameters(self, asked: int) -> Any:
        return faiss.SearchParametersIVF(nprobe=min(self.inner.nlist, math.ceil(self.probed * asked)))
