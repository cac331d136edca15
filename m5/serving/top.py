"""The k best of some scores, always in the same order, and which titles may be among them.

Dimension legend, besides `m5.batch`'s: B queries, Q key width, N titles, Y = ceil(N / 8) bytes of a mask (bit
order as in `m5.serving.rights`), R results asked for, C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

# What to add to the scores of eight titles, by their byte of a mask: ten times faster than a selection by bools.
PENALTY = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"),
    np.float32(0),
    -np.float32(np.inf),
)


class Found(NamedTuple):
    """Results, best first.

    Attributes:
        score_BR: float32 [B, R], descending; -inf behind the last one where fewer than R exist.
        title_BR: int64 [B, R], ascending where scores are equal; -1 behind the last one.
    """

    score_BR: np.ndarray
    title_BR: np.ndarray

    def put(self, row: int, score_C: np.ndarray, title_C: np.ndarray) -> None:
        """Write the best of float32 [C] scores of int64 [C] titles into one row; what is -inf is left out."""
        order = descending(score_C, title_C)[: self.title_BR.shape[1]]
        self.score_BR[row, : len(order)] = score_C[order]
        self.title_BR[row, : len(order)] = title_C[order]


def nothing_found(queries: int, k: int) -> Found:
    """To be filled.

    Raises:
        ValueError: k is below 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    return Found(np.full((queries, k), -np.inf, dtype=np.float32), np.full((queries, k), -1, dtype=np.int64))


def checked_query(query_BQ: np.ndarray, width: int) -> np.ndarray:
    """float32 [B, Q], contiguous.

    Raises:
        ValueError: another shape, or a number that is not finite: no order could be promised.
    """
    query_BQ = np.ascontiguousarray(query_BQ, dtype=np.float32)
    if query_BQ.ndim != 2 or query_BQ.shape[1] != width:
        raise ValueError(f"queries of shape {query_BQ.shape} for keys of width {width}")
    if not np.isfinite(query_BQ).all():
        raise ValueError("a query holds a number that is not finite")
    return query_BQ


def checked_key(key_NQ: np.ndarray) -> np.ndarray:
    """float32 [N, Q], contiguous.

    Raises:
        ValueError: no titles, no width, or a number that is not finite.
    """
    key_NQ = np.ascontiguousarray(key_NQ, dtype=np.float32)
    if key_NQ.ndim != 2 or not key_NQ.size:
        raise ValueError(f"keys of shape {key_NQ.shape}: an index needs at least one title")
    if not np.isfinite(key_NQ).all():
        raise ValueError("a key holds a number that is not finite")
    return key_NQ


def narrowed(
    allowed_BY: np.ndarray | None, excluded: Sequence[np.ndarray] | None, queries: int, titles: int
) -> np.ndarray | None:
    """The allowed titles without the excluded ones.

    Args:
        allowed_BY: uint8 [B, Y], or None: all.
        excluded: int64 titles of each query, or None.
        queries: B.
        titles: N.

    Returns:
        uint8 [B, Y], or None where nothing is ruled out.

    Raises:
        ValueError: shapes that do not fit, or a title that does not exist.
    """
    shape = queries, -(-titles // 8)
    if allowed_BY is not None and (allowed_BY.shape != shape or allowed_BY.dtype != np.uint8):
        raise ValueError(f"masks of shape {allowed_BY.shape}, {allowed_BY.dtype}, where {shape}, uint8 is needed")
    if excluded is not None and len(excluded) != queries:
        raise ValueError(f"exclusions of {len(excluded)} queries for {queries} queries")
    if excluded is None or not any(map(len, excluded)):
        return allowed_BY
    if allowed_BY is None:
        bits_BY = np.tile(np.packbits(np.ones(titles, dtype=bool), bitorder="little"), (queries, 1))
    else:
        bits_BY = allowed_BY.copy()
    for bits_Y, titles_of_one in zip(bits_BY, excluded, strict=True):
        title = np.asarray(titles_of_one, dtype=np.int64)
        if len(title) and not 0 <= title.min() <= title.max() < titles:
            raise ValueError(f"an excluded title is none of the {titles} titles")
        np.bitwise_and.at(bits_Y, title >> 3, ~(1 << (title & 7)).astype(np.uint8))
    return bits_BY


def eligible(bits_Y: np.ndarray, titles: int) -> np.ndarray:
    """uint8 [Y] -> int64 [C], the titles whose bit is set, ascending."""
    return np.flatnonzero(np.unpackbits(bits_Y, count=titles, bitorder="little"))


def eligible_counts(bits_BY: np.ndarray) -> np.ndarray:
    """uint8 [B, Y] -> int64 [B]."""
    return np.bitwise_count(bits_BY).sum(axis=-1, dtype=np.int64)


def rule_out(score_N: np.ndarray, bits_Y: np.ndarray) -> None:
    """Let float32 [N] scores be -inf where uint8 [Y] says so."""
    score_N += PENALTY[bits_Y].reshape(-1)[: len(score_N)]


def best(score_N: np.ndarray, count: int) -> np.ndarray:
    """int64 [count] places of the best scores, in no order; of equal ones at the end the first.

    `torch.topk`, four times as fast as numpy's partition, leaves open which of several equal scores it takes.
    """
    if count >= len(score_N):
        return np.arange(len(score_N))
    value, place = torch.topk(torch.from_numpy(score_N), count, sorted=False)
    last = value.min().item()
    if last == -np.inf or np.count_nonzero(score_N >= last) == count:
        return place.numpy()
    above = np.flatnonzero(score_N > last)
    return np.concatenate([above, np.flatnonzero(score_N == last)[: count - len(above)]])


def descending(score_C: np.ndarray, title_C: np.ndarray) -> np.ndarray:
    """int64 places of float32 [C] scores, the best first, of equal ones the first title; what is -inf is left out."""
    order = np.lexsort((title_C, -score_C))
    return order[score_C[order] > -np.inf]


def ranked(score_N: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 titles of the best float32 [N] scores and their scores, in order; at most `count`, none that is -inf."""
    title_C = best(score_N, count)
    title_C = title_C[descending(score_N[title_C], title_C)]
    return title_C, score_N[title_C]
