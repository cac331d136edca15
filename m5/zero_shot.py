"""What a value of a scenario starts with that a run has never seen: a blend of the rows of those it is nearest to.

    q(i)    = (n(i) + 1) / (n + N)                              title i's share of all watches of the training period
    p_v(i)  = (n_v(i) + SMOOTHING q(i)) / (n_v + SMOOTHING)     its share of those in value v, drawn towards q
    s_v     = sum_i sqrt(p_x(i) p_v(i))                         nearness of v to the new value x
    w_v     = softmax(s_v / TEMPERATURE) over the values v that the run knows
    E(x)    = sum_v w_v E(v),    expert_x = sum_v w_v (expert_v, its hidden units in the order of the nearest value's)

s is the cosine of sqrt(p_x) and sqrt(p_v), the Bhattacharyya coefficient: 1 for equal shares, 0 for no title in common;
the root keeps the few titles that everybody watches from deciding alone. Where x has no event in the training period,
all w_v are equal.

Experts grow from different random starts, and the order of a perceptron's hidden units means nothing: the mean of two,
unit by unit, is neither. So every expert's units are brought into the order in which they resemble those of the nearest
value most, all weights of a unit taken together (an assignment problem; Ainsworth et al., "Git Re-Basin", ICLR 2023,
arXiv 2209.04836). That leaves its function as it is; then they are blended.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from m5.carry_over import expert_keys, table_key
from m5.schema import TRAIN, PreparedDataset

# Neither was tuned; `blend` in the JSON of `m5 bench adapt` tells what they make of a dataset.
SMOOTHING = 100.0  # watches: what a value with as many of its own is drawn towards the service as a whole by half
TEMPERATURE = 0.05  # nearness that differs by so much differs by a factor of e in weight


def nearness(dataset: PreparedDataset, name: str, value: int, others: np.ndarray) -> np.ndarray | None:
    """s of the module's text.

    Args:
        dataset: prepared dataset.
        name: of the scenario, e.g. region.
        value: vocabulary index of the new value.
        others: int64 [V] those of the values to compare it with.

    Returns:
        float64 [V], or None where the value has no event in the training period.
    """
    trained = np.flatnonzero(np.asarray(dataset.event_array("split")) == TRAIN)
    of_event = np.asarray(dataset.event_array(f"scenario_{name}")[trained])
    title, titles = np.asarray(dataset.event_array("title")[trained]), dataset.manifest.n_titles
    order = np.argsort(of_event, kind="stable")
    title, ends = title[order], np.cumsum(np.bincount(of_event, minlength=max(value, *others, 0) + 1))
    everybody_N = np.bincount(title, minlength=titles) + 1.0
    prior_N = SMOOTHING * everybody_N / everybody_N.sum()

    def share(of: int) -> np.ndarray:
        watched = title[ends[of - 1] : ends[of]]
        return (np.bincount(watched, minlength=titles) + prior_N) / (len(watched) + SMOOTHING)

    if ends[value] == ends[value - 1]:
        return None
    own_N = share(value)
    return np.array([np.sqrt(own_N * share(other)).sum() for other in others])


def blend_weights(near: np.ndarray | None, values: int, temperature: float = TEMPERATURE) -> np.ndarray:
    """float64 [V], sums to 1: softmax of the nearness, or even where there is none."""
    if near is None:
        return np.full(values, 1 / values)
    weight = np.exp((near - near.max()) / temperature)
    return weight / weight.sum()


def with_row(
    state: dict[str, Tensor], name: str, value: int, others: np.ndarray, weight: np.ndarray, *, hidden: int
) -> None:
    """Give a value's embedding and experts the blend of those of others, in place of the state's entries.

    Args:
        state: weights of the bare model; the entries that change are replaced, their tensors left alone.
        name, value, others: as for `nearness`.
        weight: float64 [V].
        hidden: H, width of an expert.
    """
    table, nearest = state[table_key(f"scenario_{name}")].clone(), int(weight.argmax())
    factor_V = torch.from_numpy(weight).to(table.dtype)
    values = len(table)
    table[value] = factor_V @ table[torch.from_numpy(others)]
    state[table_key(f"scenario_{name}")] = table
    for key in expert_keys(state, name):
        expert_VRH = state[key].clone().view(values, -1, hidden)
        like_RH, blend_RH = expert_VRH[others[nearest]], torch.zeros_like(expert_VRH[0])
        for other, factor in zip(others, factor_V, strict=True):
            blend_RH += factor * aligned(expert_VRH[other], like_RH)
        expert_VRH[value] = blend_RH
        state[key] = expert_VRH.view_as(state[key])


def aligned(expert_RH: Tensor, like_RH: Tensor) -> Tensor:
    """An expert with its hidden units in the order that is most like another's: float32 [R, H], the same function."""
    likeness_HH = like_RH.T.double() @ expert_RH.double()
    _, order = linear_sum_assignment(likeness_HH.numpy(), maximize=True)
    return expert_RH[:, torch.from_numpy(order)]
