"""Plots of a comparison as SVG without scripts: bars with a level, and points with labels that keep off each other.

Colours are classes of the page's style, so that plots follow a light or a dark screen. M5 is told apart by weight as
well as by colour.
"""

from __future__ import annotations

import html
import itertools
import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

CHARACTER, LINE = 6.2, 13.0  # width and height of a character of 11 px, about
ROW = 17.0  # of a bar


@dataclass(frozen=True)
class Bar:
    """`shown` is the text at its end."""

    label: str
    value: float
    shown: str
    own: bool = False


@dataclass(frozen=True)
class Point:
    label: str
    x: float
    y: float
    own: bool = False


@dataclass(frozen=True)
class Box:
    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """Area in common."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, width) * max(0.0, height)


def _svg(width: float, height: float, title: str, description: str, parts: Iterable[str]) -> str:
    # An identifier may stand once on a page, and is the same each time that the page is made.
    name = f"p{zlib.crc32(f'{title} {width:.0f} {description}'.encode()):08x}"
    inside = "\n".join(parts)
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-labelledby="{name}t {name}d">'
        f'<title id="{name}t">{html.escape(title)}</title><desc id="{name}d">{html.escape(description)}</desc>\n'
        f"{inside}\n</svg>"
    )


def _text(x: float, y: float, text: str, *, kind: str = "", anchor: str = "start") -> str:
    style = f' class="{kind}"' if kind else ""
    side = f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{style}{side}>{html.escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def bars(
    title: str,
    entries: Sequence[Bar],
    *,
    level: tuple[float, str] | None = None,
    longest: float | None = None,
    width: float = 330,
) -> str:
    """Horizontal bars from 0, in the order given.

    Args:
        title: stands above.
        entries: values of at least 0; NaN has no bar.
        level: value and name of a dashed line across all bars.
        longest: what the full width stands for; by default the largest value.
        width: of the drawing, in pixels where it is not scaled.
    """
    values = [entry.value for entry in entries if not math.isnan(entry.value)]
    longest = longest or max([*values, level[0] if level else 0.0]) or 1.0
    start = 8 + CHARACTER * max((len(entry.label) for entry in entries), default=0)
    reach = width - start - CHARACTER * max((len(entry.shown) for entry in entries), default=0) - 8
    top = 22.0 if level is None else 22.0 + LINE
    height = top + ROW * len(entries) + 4
    drawn, said = [], [_text(0, 12, title)]  # text comes last: it stands above bars and level
    for index, entry in enumerate(entries):
        y = top + ROW * index
        length = 0.0 if math.isnan(entry.value) else reach * min(1.0, max(0.0, entry.value / longest))
        strong = "strong" if entry.own else ""
        said.append(_text(start - 6, y + 12, entry.label, kind=strong, anchor="end"))
        kind = "bar own" if entry.own else "bar"
        drawn.append(f'<rect x="{start:.1f}" y="{y + 2:.1f}" width="{length:.1f}" height="12" class="{kind}"/>')
        said.append(_text(start + length + 5, y + 12, entry.shown, kind=strong))
    if level is not None:
        x = start + reach * min(1.0, level[0] / longest)
        drawn.append(_line(x, top - 2, x, height - 4, "level"))
        room = CHARACTER * len(level[1]) / 2
        said.append(_text(min(max(x, room), width - room), top - 6, level[1], kind="pale", anchor="middle"))
    described = "; ".join(f"{entry.label} {entry.shown}" for entry in entries)
    if level is not None:
        described += f"; {level[1]}"
    return _svg(width, height, title, described, [*drawn, *said])


def scatter(
    title: str,
    points: Sequence[Point],
    x_name: str,
    y_name: str,
    *,
    width: float,
    height: float,
    level: tuple[float, str] | None = None,
) -> str:
    """Points with labels; x is logarithmic, y begins at 0; `level` is the x and the name of a dashed upright line."""
    left, right, top, bottom = 46.0, 12.0, 30.0, 40.0
    low = math.floor(math.log10(min(point.x for point in points)))
    high = math.ceil(math.log10(max(point.x for point in points)) + 1e-9)
    step = _step(max(point.y for point in points))
    highest = step * (math.floor(max(point.y for point in points) / step) + 1)

    def x_of(value: float) -> float:
        return left + (width - left - right) * (math.log10(value) - low) / max(1, high - low)

    def y_of(value: float) -> float:
        return height - bottom - (height - top - bottom) * value / highest

    parts = [_text(0, 12, y_name, kind="pale"), _text(width - right, height - 6, x_name, kind="pale", anchor="end")]
    for power in range(low, high + 1):
        x = x_of(10.0**power)
        parts.append(_line(x, top, x, height - bottom, "grid"))
        parts.append(_text(x, height - bottom + 15, f"{10.0**power:g}", kind="pale", anchor="middle"))
    digits = max(0, -math.floor(math.log10(step)))
    for index in range(round(highest / step) + 1):
        y = y_of(index * step)
        parts.append(_line(left, y, width - right, y, "grid"))
        parts.append(_text(left - 6, y + 4, f"{index * step:.{digits}f}", kind="pale", anchor="end"))
    if level is not None and low <= math.log10(level[0]) <= high:
        x = x_of(level[0])
        parts.append(_line(x, top, x, height - bottom, "level"))
        parts.append(_text(x, top - 6, level[1], kind="pale", anchor="middle" if x < width * 0.8 else "end"))
    places = [(x_of(point.x), y_of(point.y)) for point in points]
    boxes = place([point.label for point in points], places, Box(left, top, width, height - bottom))
    for (x, y), box in zip(places, boxes, strict=True):
        nearest = min(max(x, box.left), box.right), min(max(y, box.top + 3), box.bottom - 3)
        if math.dist((x, y), nearest) > 12:
            parts.append(_line(x, y, *nearest, "leader"))
    for point, (x, y), box in zip(points, places, boxes, strict=True):
        radius, kind = (6, "point own") if point.own else (4, "point")
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" class="{kind}"/>')
        # Against the point's side, since the width of the label is an estimate.
        at, anchor = (box.left, "start") if box.left > x else (box.right, "end")
        parts.append(_text(at, box.bottom - 3, point.label, kind="strong" if point.own else "", anchor=anchor))
    described = "; ".join(f"{point.label}: {point.x:.3g}, {point.y:.4f}" for point in points)
    return _svg(width, height, title, f"{x_name}, {y_name}. {described}", parts)


def _step(most: float) -> float:
    """Of an axis: 1, 2 or 5 times a power of ten, four to ten of them up to `most`."""
    power = 10.0 ** math.floor(math.log10(most)) if most > 0 else 0.1
    return next(power * part for part in (0.1, 0.2, 0.5, 1.0) if power * part * 7 >= most or part == 1.0)


def place(labels: Sequence[str], places: Sequence[tuple[float, float]], frame: Box) -> list[Box]:
    """Where labels go: one after the other, each at the nearest place that covers no point and no earlier label.

    Args:
        labels: of the points.
        places: of the points.
        frame: that labels stay within.
    """
    points = [Box(x - 5, y - 5, x + 5, y + 5) for x, y in places]
    taken: list[Box] = []
    for label, (x, y) in zip(labels, places, strict=True):
        width = CHARACTER * len(label)
        choices = []
        for away in range(12):
            for side, up in itertools.product((1, -1), (0, 1, -1)):
                if bool(away) != bool(up):
                    continue
                left = x + 8 + 4 * (away > 0) if side > 0 else x - 8 - 4 * (away > 0) - width
                middle = y + up * away * LINE * 0.75
                choices.append(Box(left, middle - LINE / 2, left + width, middle + LINE / 2))
        taken.append(min(choices, key=lambda box: _badness(box, (x, y), [*points, *taken], frame)))
    return taken


def _badness(box: Box, point: tuple[float, float], others: Sequence[Box], frame: Box) -> float:
    """Area that a label covers or that leaves the frame weighs most, then its distance."""
    area = (box.right - box.left) * (box.bottom - box.top)
    covered = sum(box.overlap(other) for other in others) + area - box.overlap(frame)
    return 10 * covered + math.dist(point, ((box.left + box.right) / 2, (box.top + box.bottom) / 2))
