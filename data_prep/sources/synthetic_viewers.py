"""The synthetic world's viewers: who they are, and what they watch, drawn block by block without a loop over events.

At every event a viewer follows one of a few interests (themes): the last one again with probability `persistence`,
else one by its weight times the appeal of its theme in that region, plan and week. The title is drawn
within the theme or, sometimes, another theme of its genre.
With probability `noise` the event is an accidental click, drawn from what is popular, watched briefly, and of no
consequence for the next event. A title that the viewer has seen is rejected and the whole draw made again, which makes
the law of an event exactly the mixture restricted to unseen titles and scaled to 1 (`m5.oracle` states it).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_prep.sources.synthetic_text import KINDS
from data_prep.sources.synthetic_world import (
    AGE_BANDS,
    N_THEMES,
    THEME_KIND,
    WEEK,
    WEEKS,
    World,
)

SPAN = WEEKS * WEEK  # seconds
DEVICES = ("tv", "mobile", "tablet", "web")
SLOTS = (2, 2, 1)  # interests of a viewer in series, movies, live events
RUNTIME = np.array([2700.0, 6300.0, 5400.0])  # seconds, by category
MAX_EVENTS = 400  # of one viewer
_ROUNDS = 100  # attempts at an unseen title; an event that fails them all is left out


@dataclass(frozen=True)
class TitleSampler:
    """Draws titles within a theme by inverting cumulative sums: O(log) a draw, whatever the catalogue.

    order: int [N], titles sorted by theme. total: float64 [cells * N], running sum of their probabilities.
    low, mass: float64 [cells, G], where a theme begins in the sum, and how much it has (1, or 0 = nothing playable).
    """

    order: np.ndarray
    total: np.ndarray
    low: np.ndarray
    mass: np.ndarray

    @classmethod
    def of(cls, world: World) -> TitleSampler:
        theme = world.catalogue.theme
        order = np.argsort(theme, kind="stable")
        start = np.searchsorted(theme[order], np.arange(N_THEMES + 1))
        table = world.title_probability.reshape(-1, len(theme))[:, order]
        total = np.cumsum(table, dtype=np.float64)
        edges = np.concatenate([[0.0], total])[np.arange(len(table))[:, None] * len(theme) + start]
        return cls(order, total, edges[:, :-1], np.diff(edges))

    def draw(self, rng: np.random.Generator, cell: np.ndarray, theme: np.ndarray) -> np.ndarray:
        """int64 [n] titles; -1 where the theme has nothing playable in that cell (region, plan, week)."""
        low, mass = self.low[cell, theme], self.mass[cell, theme]
        place = np.searchsorted(self.total, low + mass * rng.random(len(cell)), side="right")
        place = np.minimum(place, len(self.total) - 1) - cell * len(self.order)
        return np.where(mass > 0.5, self.order[np.clip(place, 0, len(self.order) - 1)], -1)


@dataclass(frozen=True)
class Viewers:
    """n viewers. age, home, device: int [n]. plan: int [n, 2] before and after `plan_change` (seconds, int [n]).

    theme: int8 [n, S], weight: float32 [n, S] (0 = interest not held). seconds: int32 [n, L] times of their events
    since START, ascending, the first `length` of a row are valid.
    """

    age: np.ndarray
    home: np.ndarray
    device: np.ndarray
    plan: np.ndarray
    plan_change: np.ndarray
    theme: np.ndarray
    weight: np.ndarray
    seconds: np.ndarray
    length: np.ndarray


def draw_viewers(rng: np.random.Generator, world: World, length: np.ndarray) -> Viewers:
    """Viewers with `length` events each (int [n])."""
    n, regions, plans = len(length), len(world.regions), len(world.plans)
    age = rng.integers(len(AGE_BANDS), size=n)
    taste = world.age_taste[age] + rng.gumbel(size=(n, N_THEMES))
    theme = np.empty((n, sum(SLOTS)), dtype=np.int8)
    first = 0
    for kind, slots in enumerate(SLOTS):  # Gumbel top-k: distinct themes, drawn by taste
        themes = np.flatnonzero(kind == THEME_KIND)
        theme[:, first : first + slots] = themes[np.argsort(-taste[:, themes], axis=1)[:, :slots]]
        first += slots
    weight = rng.gamma(2.0, 1.0, theme.shape) + 0.1
    weight[:, 1:] *= rng.random((n, theme.shape[1] - 1)) < 0.75
    region_share = 0.75 ** np.arange(regions)
    plan = rng.integers(plans, size=n)
    switches = rng.random(n) < 0.4
    other = (plan + rng.integers(1, max(plans, 2), size=n)) % plans
    seconds = event_seconds(rng, length)
    return Viewers(
        age=age,
        home=rng.choice(regions, size=n, p=region_share / region_share.sum()),
        device=rng.integers(len(DEVICES), size=n),
        plan=np.stack([plan, np.where(switches, other, plan)], axis=1),
        plan_change=rng.integers(SPAN, size=n),
        theme=theme,
        weight=(weight / weight.sum(1, keepdims=True)).astype(np.float32),
        seconds=seconds,
        length=length,
    )


def event_seconds(rng: np.random.Generator, length: np.ndarray) -> np.ndarray:
    """int32 [n, max(length)], strictly ascending within a row: uniform over the viewer's time as a subscriber."""
    n, width = len(length), int(length.max(initial=0))
    joined = np.where(rng.random(n) < 0.6, 0.0, rng.uniform(0, 0.85, n))
    left = np.where(rng.random(n) < 0.8, 1.0, joined + (1 - joined) * rng.uniform(0.1, 1, n))
    moment = joined[:, None] + rng.random((n, width)) * (left - joined)[:, None]
    moment[np.arange(width) >= length[:, None]] = np.inf
    moment.sort(axis=1)
    room = SPAN - width - 1  # the added place keeps times of a row distinct
    return np.where(np.isinf(moment), 0, moment * room).astype(np.int32) + np.arange(width, dtype=np.int32)


@dataclass(frozen=True)
class Behaviour:
    """Matrices [n, L] of n viewers; `kept` marks the events that happened.

    title: int32. region, plan, device, previous: int8. completion: float32, share of the running time.
    """

    title: np.ndarray
    region: np.ndarray
    plan: np.ndarray
    device: np.ndarray
    previous: np.ndarray
    completion: np.ndarray
    kept: np.ndarray


def watch(rng: np.random.Generator, world: World, sampler: TitleSampler, viewers: Viewers) -> Behaviour:
    """Let the viewers watch. The loop is over places in the histories; viewers come longest history first."""
    if (np.diff(viewers.length) > 0).any():
        raise ValueError("viewers must be sorted by descending length")
    n, width = viewers.seconds.shape
    region, plan = _region(rng, viewers, len(world.regions)), _plan(viewers)
    week = viewers.seconds // WEEK
    title = np.full((n, width), -1, dtype=np.int32)
    previous = np.full((n, width), -1, dtype=np.int8)
    appeal = np.full((n, width), -np.inf, dtype=np.float32)
    state = np.full(n, -1, dtype=np.int8)
    for step in range(width):
        active = int(np.searchsorted(-viewers.length, -step, side="left"))  # length > step
        previous[:active, step] = state[:active]
        where = (region[:active, step], plan[:active, step], week[:active, step])
        _watch_one(rng, world, sampler, viewers, where, title, appeal, state, step)
    usual = rng.random((n, width)) < 0.75
    device = np.where(usual, viewers.device[:, None], rng.integers(len(DEVICES), size=(n, width))).astype(np.int8)
    return Behaviour(title, region, plan, device, previous, _completion(rng, appeal), title >= 0)


def _watch_one(
    rng: np.random.Generator,
    world: World,
    sampler: TitleSampler,
    viewers: Viewers,
    where: tuple[np.ndarray, np.ndarray, np.ndarray],
    title: np.ndarray,
    appeal: np.ndarray,
    state: np.ndarray,
    step: int,
) -> None:
    """Fill column `step` of title and appeal for the first len(where) viewers, and move their interest `state`."""
    region, plan, week = (part.astype(np.int64) for part in where)
    active = len(region)
    theme = viewers.theme[:active].astype(np.int64)
    weight = viewers.weight[:active] * np.exp(world.theme_appeal[region[:, None], plan[:, None], week[:, None], theme])
    cumulative = np.cumsum(weight, axis=1, dtype=np.float64)
    cell = (region * len(world.plans) + plan) * WEEKS + week
    noise_total, spill_total = (
        np.cumsum(world.noise_theme),
        np.cumsum(world.spill, axis=1),
    )
    open_rows = np.arange(active)
    for _ in range(_ROUNDS):
        if not len(open_rows):
            return
        rows, u = open_rows, rng.random((5, len(open_rows)))
        fresh = (cumulative[rows] <= (u[0] * cumulative[rows, -1])[:, None]).sum(1)
        stays = (u[1] < world.persistence) & (state[rows] >= 0)
        slot = np.where(stays, state[rows], np.minimum(fresh, theme.shape[1] - 1))
        accident = u[2] < world.noise
        clicked = np.searchsorted(noise_total, u[3] * noise_total[-1], side="right")
        led = (spill_total[theme[rows, slot]] <= u[4][:, None]).sum(1)
        drawn_theme = np.minimum(np.where(accident, clicked, led), N_THEMES - 1)
        drawn = sampler.draw(rng, cell[rows], drawn_theme)
        good = (drawn >= 0) & ~(title[rows, :step] == drawn[:, None]).any(1)
        chosen, picked = rows[good], drawn[good]
        title[chosen, step] = picked
        state[chosen] = np.where(accident[good], state[chosen], slot[good])
        share = world.title_probability[region[chosen], plan[chosen], week[chosen], picked]
        liking = 0.6 * np.log(5 * weight[chosen, slot[good]] + 0.05) + 0.5 * np.log(
            share * len(sampler.order) / N_THEMES
        )
        appeal[chosen, step] = np.where(accident[good], -np.inf, np.clip(liking, -3, 3))
        open_rows = rows[~good]


def _region(rng: np.random.Generator, viewers: Viewers, regions: int) -> np.ndarray:
    """int8 [n, L]: home, but for journeys (about one event in five) that last some events."""
    n, width = viewers.seconds.shape
    region = np.empty((n, width), dtype=np.int8)
    away = np.zeros(n, dtype=np.int64)  # distance from home, modulo the number of regions
    for step in range(width):
        u = rng.random((2, n))
        abroad = 1 + (u[1] * max(regions - 1, 1)).astype(np.int64)
        away = np.where(away > 0, np.where(u[0] < 0.3, 0, away), np.where(u[0] < 0.08, abroad, 0))
        region[:, step] = (viewers.home + away) % regions
    return region


def _plan(viewers: Viewers) -> np.ndarray:
    after = viewers.seconds >= viewers.plan_change[:, None]
    return np.where(after, viewers.plan[:, 1:], viewers.plan[:, :1]).astype(np.int8)


def _completion(rng: np.random.Generator, appeal: np.ndarray) -> np.ndarray:
    """float32 [n, L] in (0, 1): rises with the title's appeal to the viewer; accidental clicks stop early."""
    noise = rng.standard_normal(appeal.shape, dtype=np.float32)
    liked = 1 / (1 + np.exp(-(1.1 + 0.6 * np.where(np.isinf(appeal), 0, appeal) + 0.5 * noise)))
    accident = 0.06 * np.exp(0.6 * noise)
    return np.clip(np.where(np.isinf(appeal), accident, liked), 0.005, 1.0).astype(np.float32)


def running_seconds(theme: np.ndarray) -> np.ndarray:
    """Running time by theme: that of its category; KINDS gives the categories' order."""
    assert len(RUNTIME) == len(KINDS)
    return RUNTIME[THEME_KIND[theme]]
