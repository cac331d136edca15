"""Which k titles have the largest inner product with a query, among those that a viewer may play.

| kind   | looks at                                         | found in |
|--------|--------------------------------------------------|----------|
| exact  | all titles in float32                            | `m5.serving.scan` |
| int8   | all titles in int8, the best of them again       | `m5.serving.scan` |
| hnsw   | a graph's neighbourhood of the query             | `m5.serving.approximate` |
| ivfpq  | the nearest cells, coded; the best of them again | `m5.serving.approximate` |

`benchmarks/waterfall.py` compares them. Dimension legend in `m5.serving.top`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, get_args

import numpy as np

from m5.serving.scan import Exact, Int8
from m5.serving.top import Found

IndexKind = Literal["exact", "int8", "hnsw", "ivfpq"]
KINDS: tuple[IndexKind, ...] = get_args(IndexKind)


class Index(Protocol):
    """Titles by their keys. Never written to after it was made: threads may share one."""

    @property
    def kind(self) -> str: ...

    @property
    def titles(self) -> int:
        """N."""

    def search(
        self,
        query_BQ: np.ndarray,
        k: int,
        allowed_BY: np.ndarray | None = None,
        excluded: Sequence[np.ndarray] | None = None,
    ) -> Found:
        """The k best titles of each query.

        Args:
            query_BQ: float32 [B, Q].
            k: R, at least 1; may be more than there are titles.
            allowed_BY: uint8 [B, Y] as `m5.serving.rights` gives it, or None: all titles.
            excluded: int64 titles that a query is not to get, one array a query, or None.

        Returns:
            Only allowed titles, k wherever as many are left; in a fixed order.

        Raises:
            ValueError: shapes that do not fit, k below 1, an excluded title that does not exist, or a query that is
                not finite.
        """

    def with_titles(self, key_XQ: np.ndarray) -> Index:
        """Another index, with X titles behind the last one, not built anew; this one stays as it is."""

    def state(self) -> dict[str, np.ndarray]:
        """What a file has to keep beside the keys: arrays for `restored_index`."""


def build_index(key_NQ: np.ndarray, kind: IndexKind) -> Index:
    """An index over float32 keys [N, Q].

    Raises:
        ValueError: no titles, or a key that is not finite.
    """
    if kind == "exact":
        return Exact(key_NQ)
    if kind == "int8":
        return Int8.built(key_NQ)
    from m5.serving.approximate import Hnsw, IvfPq  # Faiss only where it is used

    return (Hnsw if kind == "hnsw" else IvfPq).built(key_NQ)


def restored_index(key_NQ: np.ndarray | None, kind: IndexKind, state: Mapping[str, np.ndarray]) -> Index:
    """What `Index.state` gave, with the keys beside it; only int8 can do without them.

    The caller has compared the files' checksums before: Faiss's reader trusts what it reads, and a damaged graph can
    end the process.

    Raises:
        DataError: arrays are missing or do not fit the keys.
    """
    if kind == "int8":
        return Int8.restored(state, key_NQ)
    if key_NQ is None:
        raise ValueError(f"an index of kind {kind} needs float32 keys")
    if kind == "exact":
        return Exact(key_NQ)
    from m5.serving.approximate import Hnsw, IvfPq

    return (Hnsw if kind == "hnsw" else IvfPq).restored(key_NQ, state)
