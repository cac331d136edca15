"""Collaborative filtering refined by reinforcement learning: DDPG over the titles' factors.

    state   pooled factors of what the viewer has watched, see `peng_environment`
    action  a vector among the factors; a title's score is its product with the title's factors
    reward  cosine of the action and the factors of what the viewer watched next

Dimension legend of `peng_environment`, and P parts of a state.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import numpy as np
import torch
from stable_baselines3 import DDPG
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import NormalActionNoise, VectorizedActionNoise
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.preprocessing import get_flattened_obs_dim
from stable_baselines3.td3.policies import Actor, TD3Policy
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.literature.data import Data
from benchmarks.literature.network import PATIENCE, VALIDATIONS, validate
from benchmarks.literature.peng_environment import PARTS, LoggedViewers, States, title_factors
from benchmarks.literature.system import CannotFeed, Settings, System

VIEWERS = 256  # acted for at a time
REMEMBERED = 60_000  # steps that the critic learns from
BATCH = 256
CHUNK = 1024  # requests scored at a time: their watched titles' factors are held


class Gates(nn.Module):
    """A vector among the factors from a state: its parts at unit length, each factor of each with a weight, and a bias.

    Args:
        width: S.
        start: of the weights of the recency-weighted mean; all others start at zero.
    """

    def __init__(self, width: int, start: float):
        super().__init__()
        D = width // PARTS
        self.weight = nn.Parameter(torch.cat([torch.full((1, D), start), torch.zeros(PARTS - 1, D)]))
        self.bias = nn.Parameter(torch.zeros(D))

    def forward(self, state_BS: Tensor) -> Tensor:
        """float32 [B, S] -> [B, D]."""
        part_BPD = functional.normalize(state_BS.unflatten(-1, self.weight.shape), dim=-1)
        return torch.einsum("bpd,pd->bd", part_BPD, self.weight) + self.bias


class GatedActor(Actor):
    """Action = unit vector of the gated state, which starts as the collaborative filter: pooled factors as they are."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.mu = nn.Sequential(Gates(self.features_dim, 1.0))

    def forward(self, obs: Tensor) -> Tensor:
        """float32 [B, S] -> [B, D], unit rows."""
        return functional.normalize(self.mu(obs), dim=-1)


class GatedCritic(ContinuousCritic):
    """Q(s, a) = MLP(s, a) + a . gates(s): a reward that is a cosine is linear in the action, so it learns it fast."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.direction = Gates(get_flattened_obs_dim(self.observation_space), 0.5)
        *_, weight, bias = self.q_networks[0].parameters()
        nn.init.zeros_(weight)
        nn.init.zeros_(bias)

    def forward(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, ...]:
        """float32 [B, S], [B, D] -> one [B, 1]."""
        rest_B1 = self.q_networks[0](torch.cat([obs, actions], dim=1))
        return (rest_B1 + (self.direction(obs) * actions).sum(-1, keepdim=True),)

    def q1_forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        """What the actor climbs."""
        return self(obs, actions)[0]


class RefiningPolicy(TD3Policy):
    """DDPG's policy with the actor and the critic above."""

    def make_actor(self, features_extractor: Any = None) -> Actor:
        return GatedActor(**self._update_features_extractor(self.actor_kwargs, features_extractor))

    def make_critic(self, features_extractor: Any = None) -> ContinuousCritic:
        return GatedCritic(**self._update_features_extractor(self.critic_kwargs, features_extractor))


class ActorScorer:
    """An actor as a `Scorer`: a title's score is the action times its factors, so 0 for a cold title."""

    def __init__(self, actor: nn.Module, states: States):
        self.name, self.actor, self.states = "peng", actor.eval(), states
        self.factor_ND = torch.from_numpy(states.factor_ND[:-1])
        self.parameters = self.factor_ND.numel() + sum(parameter.numel() for parameter in actor.parameters())

    @torch.no_grad()
    def score(self, event_index: np.ndarray) -> Tensor:
        """int64 [B] -> float32 [B, N]."""
        parts = (event_index[first : first + CHUNK] for first in range(0, len(event_index), CHUNK))
        return torch.cat([self.actor(torch.from_numpy(self.states.before(part))) @ self.factor_ND.T for part in parts])


class ViewersNoise(VectorizedActionNoise):
    """Normal noise for all viewers by one draw; stable-baselines3 draws for one after the other.

    Args:
        factors: D.
        length: of the noise, about; an action has length 1.
        seed: of the draws.
    """

    def __init__(self, factors: int, length: float, seed: int):
        self.sigma, self.shape = length / factors**0.5, (VIEWERS, factors)
        self.generator = np.random.default_rng(seed)
        super().__init__(NormalActionNoise(np.zeros(factors), np.full(factors, self.sigma)), VIEWERS)

    def __call__(self) -> np.ndarray:
        """float32 [V, D]."""
        return self.generator.normal(scale=self.sigma, size=self.shape).astype(np.float32)


class UntilTheClock(BaseCallback):
    """Ends the training with the clock or when validation no longer improves; keeps the best actor, the first included.

    Args:
        data: to validate on.
        states: what the actor reads.
        began: `time.monotonic()` when the fitting began.
        seconds: from then on.
    """

    def __init__(self, data: Data, states: States, began: float, seconds: float):
        super().__init__()
        self.data, self.states, self.began, self.seconds = data, states, began, seconds
        self.best_value, self.stale, self.due = -1.0, 0, 0.0
        self.best: ActorScorer | None = None

    def _on_step(self) -> bool:
        elapsed = time.monotonic() - self.began
        if elapsed >= self.due:
            policy: Any = self.model.policy
            scorer: Any = ActorScorer(copy.deepcopy(policy.actor), self.states)
            value = validate(scorer, self.data)
            self.stale = 0 if value > self.best_value else self.stale + 1
            if value > self.best_value:
                self.best, self.best_value = scorer, value
            self.due = min(self.seconds, time.monotonic() - self.began + self.seconds / VALIDATIONS)
        return self.stale < PATIENCE and elapsed < self.seconds


def make_agent(data: Data, states: States, settings: Settings, seed: int) -> DDPG:
    """DDPG before its first step, in the log of the training period."""
    return DDPG(
        RefiningPolicy,
        LoggedViewers(data, states, viewers=VIEWERS, seed=seed),
        learning_rate=settings["lr"],
        buffer_size=REMEMBERED,
        learning_starts=0,  # before, actions would be uniform and far from any that a state calls for
        batch_size=BATCH,
        gamma=settings["gamma"],
        train_freq=1,
        gradient_steps=1,
        action_noise=ViewersNoise(states.factor_ND.shape[1], settings["noise"], seed),
        policy_kwargs={"net_arch": [64], "n_critics": 1},
        seed=seed,
        device="cpu",
    )


def fit(data: Data, settings: Settings, seed: int, seconds: float) -> ActorScorer:
    if min(data.n_users, data.n_titles) < 2:
        raise CannotFeed("the titles' factors need at least two viewers and two titles")
    began = time.monotonic()
    states = States(data, title_factors(data, settings["factors"], seed))
    clock = UntilTheClock(data, states, began, seconds)
    make_agent(data, states, settings, seed).learn(10**12, callback=clock)
    assert clock.best is not None
    return clock.best


SYSTEM = System(
    name="peng",
    title="DDPG over collaborative filtering",
    source=(
        "Peng, Siet, Ilkhomjon, Kim and Park, Integration of deep reinforcement learning with collaborative filtering "
        "for movie recommendation systems, Applied Sciences 14(3), 2024, doi 10.3390/app14031155"
    ),
    built_on="stable-baselines3 (DDPG), scikit-learn (TruncatedSVD)",
    departures=(
        "The log goes on whatever the action is; the reward is the cosine of the action and the factors of what was "
        "watched next. Actor and critic weigh the state's factors and start as the collaborative filter, because a "
        "network from scratch loses the filter before it has learned. Beside the pooled maximum the state has means "
        "and the last title."
    ),
    settings=(
        {"factors": 64, "noise": 2.0, "gamma": 0.0, "lr": 5e-3},
        {"factors": 64, "noise": 1.0, "gamma": 0.0, "lr": 1e-2},
        {"factors": 64, "noise": 2.0, "gamma": 0.5, "lr": 5e-3},
        {"factors": 128, "noise": 1.0, "gamma": 0.0, "lr": 1e-2},
    ),
    fit=fit,
)
