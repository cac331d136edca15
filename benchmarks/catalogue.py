"""Prepared datasets of titles alone, of any size: names, descriptions, posters and metadata of the synthetic world."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from data_prep.sources.synthetic_text import GENRES, THEMES, TONES, descriptions, people_names, title_names
from data_prep.sources.synthetic_world import COUNTRIES, THEME_GENRE, Catalogue, draw_catalogue
from m5.schema import ALWAYS, Manifest, Split, Vocabulary

MOST_SENTENCES = 3  # groups of three sentences in a description: 30 to 130 tokens with the name
COLD = 0.1  # share of titles without training events
POSTER = (128, 192)  # pixels
METADATA = ("genres", "actors", "studio", "country")


def write_titles(folder: Path, titles: int, *, posters: bool = False, text_width: int = 0, seed: int = 0) -> Path:
    """A prepared dataset without events.

    Args:
        folder: made.
        titles: how many, at least 96.
        posters: make an artwork file for each.
        text_width: of random vectors in content/text.npy, alike within a theme; none where 0.
        seed: of everything.

    Returns:
        `folder`.
    """
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    drawn = draw_catalogue(generator, titles, len(COUNTRIES) - 1, 2, training_end=40)
    cold = generator.random(titles) < COLD
    frame = pd.DataFrame(
        {
            "title_id": [f"t{row}" for row in range(titles)],
            "title": title_names(drawn.theme, generator),
            "description": _long_descriptions(drawn, generator),
            "category": np.zeros(titles, dtype=np.int32),
            "artwork": _draw_posters(folder / "posters", titles, generator) if posters else "",
            "released": ALWAYS,
            "train_count": np.where(cold, 0, 100),
            "cold": cold,
            **_metadata(drawn),
        }
    )
    frame.to_parquet(folder / "titles.parquet")
    if text_width:
        vectors = generator.normal(size=(len(THEMES), text_width))[drawn.theme]
        vectors += 2 * generator.normal(size=vectors.shape)
        (folder / "content").mkdir()
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        np.save(folder / "content" / "text.npy", vectors.astype(np.float32))
    Manifest(
        source="tables",
        name=f"{titles} titles",
        n_users=0,
        n_titles=titles,
        n_events=0,
        n_cold_titles=int(cold.sum()),
        split=Split(kind="time"),
        split_counts={},
        categories=Vocabulary(name="category", values=()),
        metadata=METADATA,
    ).write(folder)
    return folder


def _long_descriptions(drawn: Catalogue, generator: np.random.Generator) -> list[str]:
    titles = len(drawn.theme)
    countries = [COUNTRIES[code] for code in drawn.country]
    parts = [
        descriptions(drawn.theme, generator.integers(len(TONES), size=titles), countries, generator)
        for _ in range(MOST_SENTENCES)
    ]
    many = generator.integers(1, MOST_SENTENCES + 1, size=titles)
    return [" ".join(texts[:count]) for count, *texts in zip(many, *parts, strict=True)]


def _metadata(drawn: Catalogue) -> dict[str, list[list[str]]]:
    people = people_names(int(drawn.actors.max()) + 1)
    pairs = zip(THEME_GENRE[drawn.theme], drawn.second_genre, strict=True)
    return {
        "genres": [[GENRES[first], *([GENRES[second]] if second >= 0 else [])] for first, second in pairs],
        "actors": [[people[actor] for actor in cast if actor >= 0] for cast in drawn.actors],
        "studio": [[f"studio {code}"] for code in drawn.studio],
        "country": [[COUNTRIES[code]] for code in drawn.country],
    }


def _draw_posters(folder: Path, count: int, generator: np.random.Generator) -> list[str]:
    """JPEGs of coloured clouds with some grain, which have the size of posters also as files; their paths."""
    folder.mkdir()
    paths = [folder / f"{row}.jpg" for row in range(count)]
    for path in paths:
        clouds = Image.fromarray(generator.integers(0, 256, (12, 8, 3), dtype=np.uint8)).resize(
            POSTER, Image.Resampling.BICUBIC
        )
        grain = generator.integers(-12, 13, (POSTER[1], POSTER[0], 3))
        Image.fromarray((np.asarray(clouds) + grain).clip(0, 255).astype(np.uint8)).save(path, quality=85)
    return [str(path) for path in paths]
