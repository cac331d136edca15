"""The planted truth of the synthetic world: its catalogue, its rights and the probabilities that viewers follow.

A title belongs to one *theme* (48 themes: a genre, a kind of story and one category). Given a viewer's place (region),
plan and week, the titles of a theme are chosen with probability

    c(i | theme, region, plan, week) = softmax over the theme's playable titles of
        quality_i + regional_{i, region} + novelty_i(week) + drift_i(week)

quality comes mostly from cast, studio and tone, regional appeal mostly from country and studio: both can be read from
the metadata and the description, so that a title nobody watched yet can be placed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_prep.sources.synthetic_text import GENRES, KINDS, THEMES, TONES

START = 1736121600  # 2025-01-06 00:00 UTC, a Monday
DAY = 86400
WEEK = 7 * DAY
WEEKS = 52
COUNTRIES = (
    "United States",
    "Brazil",
    "Japan",
    "Germany",
    "India",
    "Mexico",
    "France",
    "Korea",
)
REGIONS = (
    "US",
    "BR",
    "JP",
    "DE",
    "IN",
    "MX",
    "FR",
    "KR",
)  # region r's home country is COUNTRIES[r]
AGE_BANDS = ("under 18", "18-29", "30-44", "45-59", "60 and over")
COLD_SHARE = 0.08  # of the titles
OWN_THEME = 0.65  # how often an interest leads to its own theme
NEVER = 10_000  # a week that does not come

THEME_GENRE = np.array([GENRES.index(theme.genre) for theme in THEMES])
THEME_KIND = np.array([KINDS.index(theme.kind) for theme in THEMES])
N_THEMES = len(THEMES)


@dataclass(frozen=True)
class Catalogue:
    """N titles; all arrays have one row a title.

    theme, tone, studio, country: int [N]. actors: int [N, 4], -1 = none. second_genre: int [N], -1 = none.
    launch, leave: int [N] weeks; playable for launch <= week < leave. licensed: bool [N, R, P].
    quality: float [N]; regional: float [N, R].
    """

    theme: np.ndarray
    tone: np.ndarray
    studio: np.ndarray
    country: np.ndarray
    actors: np.ndarray
    second_genre: np.ndarray
    launch: np.ndarray
    leave: np.ndarray
    licensed: np.ndarray
    quality: np.ndarray
    regional: np.ndarray


def draw_catalogue(rng: np.random.Generator, titles: int, regions: int, plans: int, training_end: int) -> Catalogue:
    """Draw the titles; `training_end` is the first week that lies wholly behind the training period."""
    theme = rng.permutation(np.arange(titles) % N_THEMES)
    tone = rng.integers(len(TONES), size=titles)
    country = rng.integers(min(len(COUNTRIES), regions + 1), size=titles)
    studios = max(12, titles // 60)
    studio = rng.integers(studios, size=titles)
    actors = _cast(rng, theme, n_actors=max(96, titles // 6))

    star = rng.normal(0, 0.7, actors.max() + 1)
    cast_quality = np.where(actors >= 0, star[actors], 0).sum(1) / np.sqrt((actors >= 0).sum(1))
    quality = cast_quality + rng.normal(0, 0.4, studios)[studio] + 0.7 * (tone - 1) + rng.normal(0, 0.25, titles)

    country_appeal = rng.normal(0, 0.7, (len(COUNTRIES), regions))
    country_appeal[np.arange(regions), np.arange(regions)] += 2.0
    regional = country_appeal[country] + rng.normal(0, 0.6, (studios, regions))[studio]
    regional += rng.normal(0, 0.3, (titles, regions))

    launch, leave = _windows(rng, titles, training_end)
    return Catalogue(
        theme=theme,
        tone=tone,
        studio=studio,
        country=country,
        actors=actors,
        second_genre=np.where(rng.random(titles) < 0.25, rng.integers(len(GENRES), size=titles), -1),
        launch=launch,
        leave=leave,
        licensed=_licences(rng, country, regions, plans),
        quality=quality,
        regional=regional,
    )


def _cast(rng: np.random.Generator, theme: np.ndarray, n_actors: int) -> np.ndarray:
    """int [N, 4]: two to four distinct people, mostly of the title's genre (person a belongs to genre a mod 12)."""
    titles, genres = len(theme), len(GENRES)
    per_genre = n_actors // genres
    pick = np.argsort(rng.random((titles, per_genre)), axis=1)[:, :4] if per_genre < 64 else None
    if pick is None:  # many people: four draws with an offset each are distinct and need no sort
        pick = (rng.integers(per_genre // 4, size=(titles, 4)) * 4 + np.arange(4)) % per_genre
    genre = np.where(
        rng.random((titles, 4)) < 0.8,
        THEME_GENRE[theme][:, None],
        rng.integers(genres, size=(titles, 4)),
    )
    actors = pick * genres + genre
    actors[:, 2:][rng.random((titles, 2)) < 0.4] = -1
    return actors


def _windows(rng: np.random.Generator, titles: int, training_end: int) -> tuple[np.ndarray, np.ndarray]:
    """Launch weeks (negative = before the log begins) and leaving weeks (NEVER for most)."""
    kind = rng.random(titles)
    launch = -rng.integers(4, 500, size=titles)
    during = kind < 0.40
    launch[during] = rng.integers(1, training_end, size=during.sum())
    cold = kind < COLD_SHARE
    launch[cold] = rng.integers(training_end, WEEKS - 2, size=cold.sum())
    leaves = (rng.random(titles) < 0.12) & ~cold
    leave = np.where(leaves, np.maximum(launch, 0) + rng.integers(8, 40, size=titles), NEVER)
    return launch, leave


def _licences(rng: np.random.Generator, country: np.ndarray, regions: int, plans: int) -> np.ndarray:
    """bool [N, R, P]: sold in most regions, always at home; the first plan has the smallest catalogue."""
    titles = len(country)
    regional = (rng.random((titles, regions)) < 0.8) | (country[:, None] == np.arange(regions))
    regional[~regional.any(1), 0] = True
    share = np.linspace(0.7, 0.95, plans)
    plan = rng.random((titles, plans)) < share
    plan[~plan.any(1), -1] = True
    return regional[:, :, None] & plan[:, None, :]


@dataclass(frozen=True)
class World:
    """Catalogue and probabilities. R regions, P plans, W weeks, N titles, G themes.

    title_probability: float32 [R, P, W, N], c(i | its theme, region, plan, week); 0 where not playable.
    theme_appeal: float32 [R, P, W, G], log factor on a viewer's theme weights.
    spill: float64 [G, G], rows sum to 1; the themes of the titles that a viewer with an interest in a theme watches:
    mostly that theme, else another one of its genre.
    noise_theme: float64 [G], the theme shares of accidental clicks. persistence, noise: probabilities.
    age_taste: float [A, G], log factor of an age band on which themes a viewer takes up.
    """

    regions: tuple[str, ...]
    plans: tuple[str, ...]
    catalogue: Catalogue
    title_probability: np.ndarray
    theme_appeal: np.ndarray
    spill: np.ndarray
    noise_theme: np.ndarray
    age_taste: np.ndarray
    persistence: float = 0.5
    noise: float = 0.03


def draw_world(
    rng: np.random.Generator,
    titles: int,
    regions: tuple[str, ...],
    plans: tuple[str, ...],
    training_end: int,
) -> World:
    """Draw catalogue, tastes and the probability tables."""
    catalogue = draw_catalogue(rng, titles, len(regions), len(plans), training_end)
    theme_share = np.exp(rng.normal(0, 0.5, N_THEMES))
    return World(
        regions=regions,
        plans=plans,
        catalogue=catalogue,
        title_probability=_title_probability(rng, catalogue),
        theme_appeal=_theme_appeal(rng, len(regions), len(plans)),
        spill=OWN_THEME * np.eye(N_THEMES) + (1 - OWN_THEME) * _siblings(),
        noise_theme=theme_share / theme_share.sum(),
        age_taste=(rng.normal(0, 0.8, (len(AGE_BANDS), len(GENRES))))[:, THEME_GENRE] + np.log(theme_share),
    )


def _siblings() -> np.ndarray:
    """float64 [G, G]: uniform over the other themes of the same genre."""
    same = (THEME_GENRE[:, None] == THEME_GENRE) & ~np.eye(N_THEMES, dtype=bool)
    return same / same.sum(1, keepdims=True)


def _theme_appeal(rng: np.random.Generator, regions: int, plans: int) -> np.ndarray:
    """float32 [R, P, W, G]: a region's genres, a plan's categories, and a slow seasonal drift of the genres."""
    region = rng.normal(0, 1.0, (regions, len(GENRES)))[:, THEME_GENRE]
    plan = rng.normal(0, 0.8, (plans, len(KINDS)))[:, THEME_KIND]
    phase = rng.random(len(GENRES))
    season = 0.3 * np.sin(2 * np.pi * (np.arange(WEEKS)[:, None] / WEEKS + phase))[:, THEME_GENRE]
    return (region[:, None, None] + plan[None, :, None] + season).astype(np.float32)


def _title_probability(rng: np.random.Generator, catalogue: Catalogue) -> np.ndarray:
    """float32 [R, P, W, N], the table of c; built a region and plan at a time to bound memory."""
    titles, regions, plans = catalogue.licensed.shape
    week = np.arange(WEEKS)[:, None]
    period, phase = rng.uniform(16, 52, titles), rng.random(titles)
    drift = 0.25 * np.sin(2 * np.pi * (week / period + phase))
    novelty = 0.25 * np.exp(-np.maximum(week - catalogue.launch, 0) / 5.0)
    base = np.exp(np.clip(catalogue.quality + novelty + drift, -8, 8)).astype(np.float32)
    base *= (week >= catalogue.launch) & (week < catalogue.leave)
    order = np.argsort(catalogue.theme, kind="stable")
    theme_start = np.searchsorted(catalogue.theme[order], np.arange(N_THEMES))
    table = np.empty((regions, plans, WEEKS, titles), dtype=np.float32)
    for region in range(regions):
        weight = base * np.exp(np.clip(catalogue.regional[:, region], -8, 8)).astype(np.float32)
        for plan in range(plans):
            allowed = weight * catalogue.licensed[:, region, plan]
            total = np.add.reduceat(allowed[:, order], theme_start, axis=1)[:, catalogue.theme]
            table[region, plan] = np.divide(allowed, total, out=np.zeros_like(allowed), where=total > 0)
    return table
