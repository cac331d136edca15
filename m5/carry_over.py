"""A run's weights on another dataset's vocabularies: every row goes where the same thing stands there.

    titles          by title_id. A title that the run does not know, or knew without watches, and so never gave an ID
                    embedding, starts as the row of titles without one: content carries it.
    feature values  by their text: users, contexts and scenarios, in the tables and in the tables of experts. A value
                    that the run does not know starts as value 0, which stands for unknown values.
    intensities     bucket by bucket. Boundaries are quantiles and move with every new event, so a bucket starts as the
                    mean of the run's buckets, weighed by how much of it lies in each: as itself where none has moved.
    content         GraphSAGE is pre-trained for every dataset, and its axes mean something else each time. The least
                    squares map from the new vectors of shared titles to the old ones goes before the projection's
                    first layer, W_1 (A g + c) + b; where the vectors are the same, nothing does.
    categories      by their text: recency slope, default interest, and the columns of W (mixing) that read it. A new
                    category starts as the unknown one, with a default of 0, so that viewers without a behaviour of it
                    are what they were; what a lost one brought to everybody, its default, stays in W's bias.

All other weights depend on no vocabulary and stay as they are. Dimension legend in `m5.batch`; R, W old and new rows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from m5.assemble import content_vectors
from m5.config import RunConfig
from m5.model.multi_modal_embedding import MASK, SPECIAL_ROWS, START, UNKNOWN
from m5.schema import ContentKind, DataError, Intensity, Manifest, PreparedDataset, Vocabulary

State = dict[str, Tensor]
# Content vectors are unit rows. What an encoder has rounded otherwise lies far below, what it has learnt anew above.
SAME_VECTOR = 0.01
RIDGE = 1e-4  # of the map between content vectors, times titles / numbers of a vector
# Share of the old vectors' variance that the map must find in titles that it was not fitted to. On the synthetic world
# it found 98.4% at least (docs/results/2026-11-27-adapt.md). `m5 bench adapt` measures that, and by how much the known
# values' NDCG@10 moves.
LEAST_FIT = 0.9


class Carried(NamedTuple):
    """Weights, and how much of the content vectors' variance they were carried over with: 1.0 for the same vectors."""

    state: State
    content_fit: float


def carry_over(state: State, source: PreparedDataset, target: PreparedDataset, config: RunConfig) -> Carried:
    """Weights that mean on `target` what `state` means on `source`.

    Args:
        state: weights of the bare model, tables whole.
        source: the dataset that they were trained on.
        target: the dataset that they are to answer for.
        config: of the run; scenario-blind models and MMoE are not for `carry_over`.

    Returns:
        New tensors, of the sizes that `target` asks for, where a vocabulary counts; else those of `state`.

    Raises:
        DataError: `target` has other kinds of features, content vectors that no map makes the run's, or no title in
            common.
    """
    old, new = source.manifest, target.manifest
    refuse_other_columns(old, new, target)
    rows = {"title": title_rows(source, target)}
    for prefix, kind in (("user", "user_features"), ("context", "contexts"), ("scenario", "scenarios")):
        for before, after in zip(getattr(old, kind), getattr(new, kind), strict=True):
            rows[f"{prefix}_{after.name}"] = value_rows(before, after)
    carried, fit = _with_content(state, source, target, config.model.content)
    for table, row_W in rows.items():
        key = table_key(table)
        carried[key] = state[key][torch.from_numpy(row_W)]
    for after in new.scenarios:
        for key in expert_keys(state, after.name):
            of_value_RX = state[key].unflatten(0, (old.scenario(after.name).size, -1))
            carried[key] = of_value_RX[torch.from_numpy(rows[f"scenario_{after.name}"])].flatten(0, 1)
    if config.model.subsidiary:
        for before_i, after_i in zip(old.intensities, new.intensities, strict=True):
            key = table_key(f"intensity_{after_i.name}")
            carried[key] = torch.from_numpy(bucket_shares(before_i, after_i)).to(state[key].dtype) @ state[key]
    if config.model.categories:
        _carry_categories(carried, old.categories, new.categories, width=config.model.width)
    return Carried(carried, fit)


def table_key(table: str) -> str:
    """Name of an embedding table's weights."""
    return f"tables.embeddings.{table}.weight"


def expert_keys(state: State, name: str) -> list[str]:
    """Names of the tables, one a branch, of the experts that the values of a scenario own."""
    keys = (f"experts.embeddings.experts_{branch}_{name}.weight" for branch in ("id", "cg"))
    return [key for key in keys if key in state]


def value_rows(before: Vocabulary, after: Vocabulary) -> np.ndarray:
    """int64 [W]: the old index of every new index, 0 where the value was not known."""
    index = {value: place for place, value in enumerate(before.values, start=1)}
    return np.array([0, *(index.get(value, 0) for value in after.values)], dtype=np.int64)


def title_rows(source: PreparedDataset, target: PreparedDataset) -> np.ndarray:
    """int64 [N + SPECIAL_ROWS]: row of the old title table for every row of the new one."""
    old_titles, n_old = source.titles, source.manifest.n_titles
    trained = np.where(old_titles["cold"].to_numpy(bool), n_old + UNKNOWN, np.arange(n_old))
    index = dict(zip(old_titles["title_id"].astype(str), trained.tolist(), strict=True))
    rows = [index.get(title, n_old + UNKNOWN) for title in target.titles["title_id"].astype(str)]
    special = np.empty(SPECIAL_ROWS, dtype=np.int64)
    special[[START, UNKNOWN, MASK]] = n_old + START, n_old + UNKNOWN, n_old + MASK
    return np.concatenate([np.array(rows, dtype=np.int64), special])


def bucket_shares(before: Intensity, after: Intensity) -> np.ndarray:
    """float64 [W, R], rows sum to 1: which of the old buckets a new bucket is made of.

    Within an old bucket values count as spread evenly; beyond the outermost old boundary a boundary is half-way out.
    """
    last = len(before.boundaries) + 1
    place = np.interp(
        after.boundaries,
        np.asarray(before.boundaries or [0.0]),
        np.arange(1, last) if before.boundaries else [0.5],
        left=0.5,
        right=last - 0.5,
    )
    low, high = np.concatenate([[0.0], place]), np.concatenate([place, [float(last)]])
    high = np.maximum(high, low + 1e-6)  # two boundaries at one place: a narrow part of the bucket that is there
    old = np.arange(last)
    inside = np.minimum(high[:, None], old + 1) - np.maximum(low[:, None], old)
    shares = np.zeros((after.size, before.size))
    shares[0, 0] = 1.0  # missing
    shares[1:, 1:] = np.maximum(inside, 0.0) / (high - low)[:, None]
    return shares


def _carry_categories(state: State, before: Vocabulary, after: Vocabulary, *, width: int) -> None:
    """In place, both branches; see the module."""
    row_K = torch.from_numpy(value_rows(before, after))
    is_new_K = row_K == 0
    is_new_K[0] = False
    lost = [index for index, value in enumerate(before.values, start=1) if value not in after.values]
    for branch in ("id", "cg"):
        extraction, bottom = f"towers.{branch}.extraction.aggregation", f"towers.{branch}.mixing.bottom"
        if f"{bottom}.weight" not in state:
            continue
        default_KD, weight_IZ = state[f"{extraction}.default"], state[f"{bottom}.weight"]
        of_interest_IKD = weight_IZ[:, : before.size * width].unflatten(1, (before.size, width))
        for category in lost:
            brought_I = of_interest_IKD[:, category] @ default_KD[category]
            state[f"{bottom}.bias"] = state[f"{bottom}.bias"] + brought_I
        state[f"{extraction}.slope"] = state[f"{extraction}.slope"][row_K]
        state[f"{extraction}.default"] = default_KD[row_K].masked_fill(is_new_K.unsqueeze(-1), 0.0)
        parts = [of_interest_IKD[:, row_K].flatten(1), weight_IZ[:, before.size * width :]]
        state[f"{bottom}.weight"] = torch.cat(parts, dim=1)


def refuse_other_columns(old: Manifest, new: Manifest, target: PreparedDataset) -> None:
    """Raises DataError where a dataset has other features than the run has weights for."""
    for kind in ("scenarios", "contexts", "user_features", "intensities"):
        before, after = ([column.name for column in getattr(manifest, kind)] for manifest in (old, new))
        if before != after:
            raise DataError(
                f"{target.folder} has the {kind.replace('_', ' ')} {', '.join(after) or 'none'}, but the run was "
                f"trained with {', '.join(before) or 'none'}. Prepare it with a dataset.yaml that names the same "
                "columns in the same order."
            )


def _with_content(
    state: State, source: PreparedDataset, target: PreparedDataset, kinds: tuple[ContentKind, ...]
) -> Carried:
    """A new state in which the projection reads `target`'s content vectors as it read `source`'s.

    Raises:
        DataError: no shared title, another width, or vectors that no linear map makes the old ones.
    """
    known = dict(zip(source.titles["title_id"].astype(str), range(source.manifest.n_titles), strict=True))
    row_N = np.array([known.get(title, -1) for title in target.titles["title_id"].astype(str)])
    shared = np.flatnonzero(row_N >= 0)
    if not len(shared):
        raise DataError(
            f"no title of {target.folder} has a title_id that the run's dataset {source.folder} has: these are two "
            "services. Train a model for each."
        )
    before_NG, after_NG = content_vectors(source, kinds), content_vectors(target, kinds)
    if before_NG is None or after_NG is None:
        return Carried(dict(state), 1.0)
    if before_NG.shape[1] != after_NG.shape[1]:
        raise DataError(
            f"{target.folder}/content has vectors of {after_NG.shape[1]} numbers ({', '.join(kinds)}), the run was "
            f"trained on {before_NG.shape[1]}. Encode both datasets with the same models."
        )
    old_SG, new_SG = before_NG[row_N[shared]].double(), after_NG[shared].double()
    if float((new_SG - old_SG).norm(dim=1).median()) <= SAME_VECTOR:
        return Carried(dict(state), 1.0)
    last = torch.from_numpy(np.random.default_rng(0).random(len(shared)) < 0.2)
    turn_GG, shift_G = linear_map(new_SG[~last], old_SG[~last])
    missed = (new_SG[last] @ turn_GG + shift_G - old_SG[last]).square().sum()
    fit = 1 - float(missed / (old_SG[last] - old_SG.mean(0)).square().sum())
    if not fit >= LEAST_FIT:
        raise DataError(
            f"{target.folder}/content has other vectors ({', '.join(kinds)}) for the titles that the run knows than it "
            f"was trained on, and no linear map turns one into the other (it finds {max(fit, 0):.0%} of the variance "
            f"of {int(last.sum())} titles, {LEAST_FIT:.0%} are needed). Where both datasets have the same titles in "
            f"the same order, copy {source.folder}/content over; else train anew."
        )
    turn_GG, shift_G = linear_map(new_SG, old_SG)
    weight, bias = (state[f"embedding.content.hidden.{name}"].double() for name in ("weight", "bias"))
    return Carried(
        state
        | {
            "embedding.content.hidden.weight": (weight @ turn_GG.T).float(),
            "embedding.content.hidden.bias": (bias + weight @ shift_G).float(),
        },
        fit,
    )


def linear_map(from_SG: Tensor, to_SG: Tensor) -> tuple[Tensor, Tensor]:
    """float64 A [G, G] and c [G] of the least squares x A + c = y, with a little ridge on A."""
    titles, width = from_SG.shape
    from_mean_G, to_mean_G = from_SG.mean(0), to_SG.mean(0)
    x_SG, y_SG = from_SG - from_mean_G, to_SG - to_mean_G
    ridge_GG = RIDGE * titles / width * torch.eye(width, dtype=from_SG.dtype)
    turn_GG = torch.linalg.solve(x_SG.T @ x_SG + ridge_GG, x_SG.T @ y_SG)
    return turn_GG, to_mean_G - from_mean_G @ turn_GG
