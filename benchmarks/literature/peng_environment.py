"""What the agent of `peng` acts in: viewers who watch, one after the other, what the log says that they watched.

An episode is one viewer's training events. Before each event the agent sees the state, made of what the viewer had
watched until then, and answers with an action: a vector among the titles' factors. The reward is the cosine of the
action and the factors of the title that the viewer then watched; the log goes on whatever the action was.

Dimension legend of `data`, and D factors, S what a state holds, V viewers acted for at a time.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from sklearn.decomposition import TruncatedSVD
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn

from benchmarks.literature.data import Data

RECENT = 10  # titles whose factors are pooled by their maximum
DECAY = 0.9  # weight of a watch for each watch after it, in the recency-weighted mean
PARTS = 4  # of a state, each of width D
POPULARITY = 0.25  # power of its watches that a title's column is divided by, so that hits do not take all factors


def title_factors(data: Data, factors: int, seed: int) -> np.ndarray:
    """Truncated singular value decomposition of who watched what in the training period.

    Args:
        data: with the training matrix.
        factors: D; fewer where there are fewer viewers or titles.
        seed: of the randomised solver.

    Returns:
        float32 [N + 1, D]: titles' factors of unit mean square, zero where cold; the last row stands for a viewer who
        has watched nothing: the titles' mean, by watches.
    """
    matrix_UN = data.interactions.matrix_UN
    watches_N = np.maximum(np.asarray(matrix_UN.sum(axis=0)).ravel(), 1)
    factors = min(factors, min(matrix_UN.shape) - 1)
    solver = TruncatedSVD(factors, random_state=seed).fit(matrix_UN.multiply(watches_N**-POPULARITY).tocsr())
    factor_ND = solver.components_.T
    factor_ND = factor_ND / np.sqrt(np.mean(factor_ND[~data.cold] ** 2))
    nothing_D = np.average(factor_ND, axis=0, weights=data.train_count)
    return np.concatenate([factor_ND, nothing_D[None]]).astype(np.float32)


class States:
    """States before events, from factors of what was watched: [recency-weighted mean, mean, maximum, last title].

    Args:
        data: whose `history` most recent behaviours are read.
        factor_ND: [N + 1, D] of `title_factors`.
    """

    def __init__(self, data: Data, factor_ND: np.ndarray):
        self.data, self.history = data, data.history
        self.factor_ND = factor_ND
        self.size = PARTS * factor_ND.shape[1]

    def before(self, event: np.ndarray) -> np.ndarray:
        """int64 [B] events -> float32 [B, S]; only what lies before each event is read."""
        dataset = self.data.dataset
        watched_B = np.minimum(event - dataset.offsets[dataset.user_of(event)], self.history)
        columns = int(max(1, watched_B.max()))
        ago_L = np.arange(1, columns + 1)
        inside_BL = ago_L <= watched_B[:, None]
        title_BL = np.where(inside_BL, self.data.title[np.maximum(event[:, None] - ago_L, 0)], len(self.factor_ND) - 1)
        inside_BL[:, 0] = True  # of a viewer who has watched nothing: that row of the factors
        factor_BLD = self.factor_ND[title_BL]
        weight_BL = inside_BL * (DECAY ** (ago_L - 1)).astype(np.float32)
        recency_BD = _mean(factor_BLD, weight_BL)
        mean_BD = _mean(factor_BLD, inside_BL.astype(np.float32))
        recent_BLD = np.where(inside_BL[:, :RECENT, None], factor_BLD[:, :RECENT], -np.inf)
        return np.concatenate([recency_BD, mean_BD, recent_BLD.max(axis=1), factor_BLD[:, 0]], axis=1)


def _mean(factor_BLD: np.ndarray, weight_BL: np.ndarray) -> np.ndarray:
    """Weighted mean over L."""
    return (weight_BL[:, None] @ factor_BLD)[:, 0] / weight_BL.sum(axis=1, keepdims=True)


class LoggedViewers(VecEnv):
    """Many viewers at a time as one vectorised environment; a viewer whose log has ended gives way to the next.

    Args:
        data: whose training events are the log.
        states: what the agent sees.
        viewers: V, acted for at a time.
        seed: of the viewers' order.
    """

    def __init__(self, data: Data, states: States, *, viewers: int, seed: int):
        self.data, self.states = data, states
        self.generator = np.random.default_rng(seed)
        user = data.dataset.user_of(data.train)
        changes = np.flatnonzero(np.diff(user))
        self.first = data.train[np.append(0, changes + 1)]  # of each viewer with a training event
        self.last = data.train[np.append(changes, len(user) - 1)]
        norm_N1 = np.linalg.norm(states.factor_ND, axis=1, keepdims=True)
        self.unit_ND = states.factor_ND / np.maximum(norm_N1, 1e-6)
        self.queue: list[int] = []
        self.event_V = np.zeros(viewers, dtype=np.int64)
        self.last_V = np.zeros(viewers, dtype=np.int64)
        D = states.factor_ND.shape[1]
        self.action_VD = np.zeros((viewers, D), dtype=np.float32)
        self.render_mode = None
        super().__init__(
            viewers,
            gym.spaces.Box(-np.inf, np.inf, (states.size,), np.float32),
            gym.spaces.Box(-1.0, 1.0, (D,), np.float32),
        )

    def _next_viewers(self, which: np.ndarray) -> None:
        """Put the next of the shuffled viewers in these places."""
        for place in which:
            if not self.queue:
                self.queue = self.generator.permutation(len(self.first)).tolist()
            user = self.queue.pop()
            self.event_V[place], self.last_V[place] = self.first[user], self.last[user]

    def reset(self) -> np.ndarray:
        self._next_viewers(np.arange(self.num_envs))
        return self.states.before(self.event_V)

    def step_async(self, actions: np.ndarray) -> None:
        self.action_VD = actions

    def reward(self, action_VD: np.ndarray, title_V: np.ndarray) -> np.ndarray:
        """float32 [V, D], int64 [V] -> float32 [V]."""
        return (action_VD * self.unit_ND[title_V]).sum(axis=1)

    def step_wait(self) -> VecEnvStepReturn:
        reward_V = self.reward(self.action_VD, self.data.title[self.event_V])
        done_V = self.event_V == self.last_V
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        ended = np.flatnonzero(done_V)
        if len(ended):
            # What is watched after the training period is not shown, not even in the state that nothing follows.
            terminal = self.states.before(self.event_V[ended])
            for place, state in zip(ended, terminal, strict=True):
                infos[place]["terminal_observation"] = state
        self.event_V += 1
        self._next_viewers(ended)
        return self.states.before(self.event_V), reward_V, done_V, infos

    def close(self) -> None:
        """Nothing is open."""

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        return [getattr(self, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        raise NotImplementedError("the viewers share one environment")

    def env_method(self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any) -> list[Any]:
        raise NotImplementedError("the viewers share one environment")

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        return [False] * len(list(self._get_indices(indices)))
