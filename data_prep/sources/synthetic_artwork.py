"""Drawn posters of the synthetic world: genre gives the palette and the shape, theme the texture and its place."""

from __future__ import annotations

import colorsys
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

WIDTH, HEIGHT = 96, 128
_CHUNK = 2000  # posters per task of the process pool


def draw_posters(folder: Path, names: list[str], genre: np.ndarray, theme: np.ndarray, seed: int) -> None:
    """Draw one JPEG (96 x 128 pixels) a title into `folder`, over all cores when there are many.

    Args:
        folder: made if missing.
        names: N file names.
        genre: int [N]; sets hue, background and shape.
        theme: int [N], 0 .. 3 within the genre; sets texture and brightness.
        seed: of the jitter; a poster depends on the seed and its own row only.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chunks = [slice(first, first + _CHUNK) for first in range(0, len(names), _CHUNK)]
    arguments = [(folder, names[c], genre[c], theme[c], seed, c.start) for c in chunks]
    if len(chunks) == 1:
        _draw_chunk(*arguments[0])
        return
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for task in [pool.submit(_draw_chunk, *argument) for argument in arguments]:
            task.result()


def _draw_chunk(
    folder: Path,
    names: list[str],
    genre: np.ndarray,
    theme: np.ndarray,
    seed: int,
    first: int,
) -> None:
    for row, name in enumerate(names):
        rng = np.random.default_rng((seed, first + row))
        draw_poster(int(genre[row]), int(theme[row]), rng).save(folder / name, quality=80)


def draw_poster(genre: int, theme: int, rng: np.random.Generator) -> Image.Image:
    """One RGB poster; the generator jitters hue, place and size a little."""
    hue = (genre / 12 + rng.normal(0, 0.012)) % 1.0
    ground = _colour(hue, 0.55, 0.45 + 0.12 * theme)
    ink = _colour((hue + 0.45) % 1.0, 0.75, 0.95 - 0.12 * theme)
    image = Image.new("RGB", (WIDTH, HEIGHT), ground)
    draw = ImageDraw.Draw(image)
    _texture(draw, theme, _colour(hue, 0.35, 0.60 + 0.12 * theme), int(rng.integers(0, 8)))
    centre = (WIDTH / 2 + rng.normal(0, 5), HEIGHT * 0.45 + rng.normal(0, 6))
    _shape(draw, genre, centre, 26 + rng.normal(0, 3), ink)
    draw.rectangle(
        (10, HEIGHT - 22, WIDTH - 10 - int(rng.integers(0, 30)), HEIGHT - 14),
        fill=(240, 240, 235),
    )
    return image


def _colour(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, min(value, 1.0))
    return int(255 * red), int(255 * green), int(255 * blue)


def _texture(draw: ImageDraw.ImageDraw, theme: int, colour: tuple[int, int, int], shift: int) -> None:
    if theme == 0:
        for y in range(shift, HEIGHT, 10):
            draw.line((0, y, WIDTH, y), fill=colour, width=3)
    elif theme == 1:
        for x in range(shift - HEIGHT, WIDTH, 12):
            draw.line((x, 0, x + HEIGHT, HEIGHT), fill=colour, width=3)
    elif theme == 2:
        for y in range(shift, HEIGHT, 14):
            for x in range(shift, WIDTH, 14):
                draw.ellipse((x, y, x + 6, y + 6), fill=colour)
    else:
        for y in range(0, HEIGHT, 16):
            for x in range((y // 16 % 2) * 16, WIDTH, 32):
                draw.rectangle((x, y, x + 15, y + 15), fill=colour)


def _shape(
    draw: ImageDraw.ImageDraw,
    genre: int,
    centre: tuple[float, float],
    radius: float,
    ink: tuple,
) -> None:
    x, y = centre
    box = (x - radius, y - radius, x + radius, y + radius)
    family, filled = genre % 6, genre < 6
    style = {"fill": ink} if filled else {"outline": ink, "width": 5}
    if family == 0:
        draw.ellipse(box, **style)
    elif family == 1:
        draw.rectangle(box, **style)
    elif family < 5:  # triangle, diamond, pentagon
        draw.polygon(_corners(x, y, (3, 4, 5)[family - 2], [radius * 1.15]), **style)
    else:  # star
        draw.polygon(_corners(x, y, 10, [radius * 1.2, radius * 0.5]), **style)


def _corners(x: float, y: float, count: int, radii: list[float]) -> list[tuple[float, float]]:
    angles = 2 * np.pi * np.arange(count) / count - np.pi / 2
    spread = np.resize(radii, count)
    return [(float(x + r * np.cos(a)), float(y + r * np.sin(a))) for r, a in zip(spread, angles, strict=True)]
