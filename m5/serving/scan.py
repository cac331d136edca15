"""Indices that look at every title: in float32, and in int8 with the best of it looked at again.

Dimension legend in `m5.serving.top`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import torch

from m5.schema import DataError
from m5.serving.top import (
    Found,
    best,
    checked_key,
    checked_query,
    eligible,
    eligible_counts,
    narrowed,
    nothing_found,
    rule_out,
)

# Up to this share of eligible titles, to gather their keys costs less than to score all titles.
GATHERED = 0.15


class Exact:
    """All titles in float32.

    Args:
        key_NQ: float32 [N, Q].

    Raises:
        ValueError: as `checked_key`.
    """

    kind = "exact"

    def __init__(self, key_NQ: np.ndarray):
        self.key_NQ = checked_key(key_NQ)
        self._title_NQ = torch.from_numpy(self.key_NQ)

    @property
    def titles(self) -> int:
        return len(self.key_NQ)

    @cached_property
    def _column_QN(self) -> torch.Tensor:
        """The keys once more: a query against columns is three times as fast as against rows (torch 2.13, AVX-512)."""
        return self._title_NQ.T.contiguous()

    def search(
        self,
        query_BQ: np.ndarray,
        k: int,
        allowed_BY: np.ndarray | None = None,
        excluded: Sequence[np.ndarray] | None = None,
    ) -> Found:
        """See `m5.serving.index.Index`."""
        query_BQ = checked_query(query_BQ, self.key_NQ.shape[1])
        bits_BY = narrowed(allowed_BY, excluded, len(query_BQ), self.titles)
        found = nothing_found(len(query_BQ), k)
        rest = np.arange(len(query_BQ))
        if bits_BY is not None:
            few_B = eligible_counts(bits_BY) <= GATHERED * self.titles
            for row in np.flatnonzero(few_B).tolist():
                found.put(row, *self.best_eligible(query_BQ[row], bits_BY[row], k))
            rest = np.flatnonzero(~few_B)
        score_BN = (torch.from_numpy(query_BQ[rest]) @ self._column_QN).numpy()
        for row, score_N in zip(rest.tolist(), score_BN, strict=True):
            if bits_BY is not None:
                rule_out(score_N, bits_BY[row])
            title_C = best(score_N, k)
            found.put(row, score_N[title_C], title_C)
        return found

    def best_eligible(self, query_Q: np.ndarray, bits_Y: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """float32 [C] scores and int64 [C] titles, at most k, found by looking at the eligible titles alone."""
        title_E = eligible(bits_Y, self.titles)
        score_E = self.rescored(query_Q, title_E)
        place = best(score_E, k)
        return score_E[place], title_E[place]

    def rescored(self, query_Q: np.ndarray, title_C: np.ndarray) -> np.ndarray:
        """float32 [C] scores of int64 [C] titles."""
        return (self._title_NQ.index_select(0, torch.from_numpy(title_C)) @ torch.from_numpy(query_Q)).numpy()

    def with_titles(self, key_XQ: np.ndarray) -> Exact:
        """See `m5.serving.index.Index`."""
        return Exact(np.concatenate([self.key_NQ, checked_key(key_XQ)]))

    def state(self) -> dict[str, np.ndarray]:
        """Nothing beside the keys."""
        return {}


class Int8:
    """All titles in int8, each with a scale of its own; queries are quantised the same way.

    The best `reranked` times k are scored again: by float32 keys where they are given, else by the int8 ones and the
    unquantised query, which needs a quarter of the memory.

    Args:
        key8_NQ: int8 [N, Q].
        scale_N: float32 [N]; a key is about key8 * scale.
        key_NQ: float32 [N, Q], or None.

    Raises:
        ValueError: arrays that do not fit together, or a scale that is not finite.
    """

    kind = "int8"
    reranked = 2  # candidates a result

    def __init__(self, key8_NQ: np.ndarray, scale_N: np.ndarray, key_NQ: np.ndarray | None = None):
        if key8_NQ.dtype != np.int8 or key8_NQ.ndim != 2 or not key8_NQ.size or scale_N.shape != key8_NQ.shape[:1]:
            raise ValueError(f"int8 keys of shape {key8_NQ.shape}, {key8_NQ.dtype}, with scales of {scale_N.shape}")
        if not np.isfinite(scale_N).all():
            raise ValueError("a scale is not finite")
        if key_NQ is not None and key_NQ.shape != key8_NQ.shape:
            raise ValueError(f"int8 keys of shape {key8_NQ.shape} for float32 keys of shape {key_NQ.shape}")
        self.key8_NQ = np.ascontiguousarray(key8_NQ)
        self.scale_N = np.ascontiguousarray(scale_N, dtype=np.float32)
        self.key_NQ = None if key_NQ is None else checked_key(key_NQ)
        self._key8_QN = torch.from_numpy(self.key8_NQ).T

    @classmethod
    def built(cls, key_NQ: np.ndarray) -> Int8:
        """From float32 keys [N, Q], which are kept to score again."""
        key_NQ = checked_key(key_NQ)
        return cls(*quantised(key_NQ), key_NQ)

    @classmethod
    def restored(cls, state: Mapping[str, np.ndarray], key_NQ: np.ndarray | None) -> Int8:
        """What `state` gave, with float32 keys or without.

        Raises:
            DataError: arrays are missing or do not fit together.
        """
        try:
            return cls(state["key8"], state["scale"], key_NQ)
        except (KeyError, ValueError) as error:
            raise DataError(f"the int8 index is damaged: {error}.") from None

    @property
    def titles(self) -> int:
        return len(self.key8_NQ)

    def search(
        self,
        query_BQ: np.ndarray,
        k: int,
        allowed_BY: np.ndarray | None = None,
        excluded: Sequence[np.ndarray] | None = None,
    ) -> Found:
        """See `m5.serving.index.Index`."""
        query_BQ = checked_query(query_BQ, self.key8_NQ.shape[1])
        bits_BY = narrowed(allowed_BY, excluded, len(query_BQ), self.titles)
        found = nothing_found(len(query_BQ), k)
        query8_BQ, _ = quantised(query_BQ)  # its scale changes no order
        product_BN = torch._int_mm(torch.from_numpy(query8_BQ), self._key8_QN)
        for row, product_N in enumerate(product_BN):
            score_N = product_N.numpy() * self.scale_N
            if bits_BY is not None:
                rule_out(score_N, bits_BY[row])
            title_C = best(score_N, self.reranked * k)
            title_C = title_C[score_N[title_C] > -np.inf]
            found.put(row, self.rescored(query_BQ[row], title_C), title_C)
        return found

    def rescored(self, query_Q: np.ndarray, title_C: np.ndarray) -> np.ndarray:
        """float32 [C] scores of int64 [C] titles."""
        if self.key_NQ is not None:
            return self.key_NQ[title_C] @ query_Q
        return (self.key8_NQ[title_C].astype(np.float32) @ query_Q) * self.scale_N[title_C]

    def with_titles(self, key_XQ: np.ndarray) -> Int8:
        """See `m5.serving.index.Index`."""
        key_XQ = checked_key(key_XQ)
        key8_XQ, scale_X = quantised(key_XQ)
        return Int8(
            np.concatenate([self.key8_NQ, key8_XQ]),
            np.concatenate([self.scale_N, scale_X]),
            None if self.key_NQ is None else np.concatenate([self.key_NQ, key_XQ]),
        )

    def state(self) -> dict[str, np.ndarray]:
        """key8 int8 [N, Q], scale float32 [N]."""
        return {"key8": self.key8_NQ, "scale": self.scale_N}


def quantised(vector_XQ: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [X, Q] -> int8 [X, Q] in -127 .. 127 and float32 [X] scales; a vector is about the product of both."""
    scale_X = np.abs(vector_XQ).max(axis=1) / np.float32(127)
    divisor_X = np.where(scale_X > 0, scale_X, np.float32(1))  # a vector of zeros stays one
    return np.rint(vector_XQ / divisor_X[:, None]).astype(np.int8), scale_X.astype(np.float32)
