"""Tiny prepared datasets, written by hand after `m5.schema`, and configurations small enough for one core."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from m5.config import RunConfig, load_config
from m5.schema import (
    ALWAYS,
    TEST,
    TRAIN,
    VALID,
    Intensity,
    Manifest,
    PreparedDataset,
    Split,
    Vocabulary,
)

DAY = 86_400
REGIONAL = 4  # titles 0 .. 3 may be played in region 1 alone, where rights are asked for
CONTENT_WIDTH = 6
TINY = (
    "model.width=16",
    "model.blocks=1",
    "model.expert_hidden=8",
    "model.mixing_width=12",
    "model.dropout=0",
    "model.id_dropout=0",
    "model.scenario_dropout=0",
    "sequences.history=6",
    "sequences.requests=6",
    "sequences.sequences=8",
    "sequences.prefetch=2",
    "model.score=cosine",
    "candidates.precision=float32",
    "optimizer.table_lr=0.05",
    "optimizer.warmup_steps=0",
    "optimizer.schedule=constant",
    "training.threads=1",
    "training.device=cpu",
)


def tiny_config(data: Path, out: Path, *overrides: str) -> RunConfig:
    """The default preset in miniature, without any dropout and with tuned settings held still; `overrides` win."""
    return load_config("default", [*TINY, *overrides], data, out)


def write_world(
    folder: Path,
    *,
    users: int = 12,
    titles: int = 30,
    regions: int = 3,
    split: str = "time",
    rights: bool = False,
    seed: int = 0,
    longest: int = 16,
) -> PreparedDataset:
    """A dataset of random watches: user 0 has none, user 1 has one, the others three to `longest`.

    The last title is never watched; it and the three before it are cold (watched after the training period only).
    With `rights`, titles 0 .. REGIONAL - 1 belong to region 1 and the last title's window has passed.
    """
    generator = np.random.default_rng(seed)
    counts = generator.integers(3, longest + 1, users)
    counts[:2] = 0, 1
    offsets = np.concatenate([[0], np.cumsum(counts)])
    user = np.repeat(np.arange(users), counts)
    # Quarter days, so that some events share a timestamp.
    timestamp = generator.integers(0, 400, len(user)) * (DAY // 4)
    order = np.lexsort((timestamp, user))
    timestamp = timestamp[order]
    part, valid_start, test_start = _split(split, timestamp, offsets)
    title = np.where(
        part == TRAIN,
        generator.integers(0, titles - 4, len(user)),
        generator.integers(0, titles - 1, len(user)),
    )
    region = generator.integers(0, regions + 1, len(user))
    if rights:
        region[title < REGIONAL] = 1
    train_count = np.bincount(title[part == TRAIN], minlength=titles)
    arrays = {
        "title": title.astype(np.int32),
        "timestamp": timestamp.astype(np.int64),
        "split": part.astype(np.uint8),
        "intensity_seconds": np.where(
            generator.random(len(user)) < 0.2,
            np.nan,
            generator.gamma(2, 900, len(user)),
        ).astype(np.float32),
        "scenario_region": region.astype(np.int32),
        "scenario_plan": generator.integers(0, 3, len(user)).astype(np.int32),
        "context_device": generator.integers(0, 3, len(user)).astype(np.int32),
    }
    (folder / "events").mkdir(parents=True)
    (folder / "content").mkdir()
    np.save(folder / "events" / "offsets.npy", offsets.astype(np.int64))
    for name, values in arrays.items():
        np.save(folder / "events" / f"{name}.npy", values)
    for kind in ("text", "image", "graph"):
        vectors = generator.standard_normal((titles, CONTENT_WIDTH)).astype(np.float32)
        np.save(
            folder / "content" / f"{kind}.npy",
            vectors / np.linalg.norm(vectors, axis=1, keepdims=True),
        )
    _tables(folder, titles=titles, users=users, train_count=train_count, generator=generator)
    if rights:
        _rights(folder, titles=titles)
    Manifest(
        source="tests",
        name="tiny",
        n_users=users,
        n_titles=titles,
        n_events=len(user),
        n_cold_titles=int((train_count == 0).sum()),
        split=Split(kind=split, valid_start=valid_start, test_start=test_start),
        split_counts={name: int((part == code).sum()) for name, code in (("train", 0), ("valid", 1), ("test", 2))},
        categories=Vocabulary(name="category", values=("series", "movie")),
        scenarios=(
            Vocabulary(name="region", values=tuple(f"r{i}" for i in range(1, regions + 1))),
            Vocabulary(name="plan", values=("ads", "premium")),
        ),
        contexts=(Vocabulary(name="device", values=("tv", "phone")),),
        user_features=(Vocabulary(name="profile", values=tuple(f"p{i}" for i in range(users))),),
        intensities=(Intensity(name="seconds", boundaries=(600.0, 1800.0, 3600.0)),),
        rights_scenarios=("region", "plan") if rights else None,
        content_hash=f"tiny-{split}-{users}-{titles}-{regions}-{rights}-{seed}",
    ).write(folder)
    return PreparedDataset(folder)


def _split(kind: str, timestamp: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, int | None, int | None]:
    part = np.full(len(timestamp), TRAIN)
    if kind == "time":
        valid_start, test_start = (int(np.quantile(timestamp, share)) for share in (0.7, 0.85))
        part[timestamp >= valid_start] = VALID
        part[timestamp >= test_start] = TEST
        return part, valid_start, test_start
    enough = np.flatnonzero(np.diff(offsets) >= 3)
    part[offsets[1:][enough] - 1] = TEST
    part[offsets[1:][enough] - 2] = VALID
    return part, None, None


def _tables(
    folder: Path,
    *,
    titles: int,
    users: int,
    train_count: np.ndarray,
    generator: np.random.Generator,
) -> None:
    pd.DataFrame(
        {
            "title_id": [f"t{i}" for i in range(titles)],
            "title": [f"Title {i}" for i in range(titles)],
            "description": "",
            "category": generator.integers(0, 3, titles).astype(np.int32),
            "artwork": "",
            "released": np.full(titles, ALWAYS),
            "train_count": train_count.astype(np.int64),
            "cold": train_count == 0,
        }
    ).to_parquet(folder / "titles.parquet")
    pd.DataFrame(
        {
            "user_id": [f"u{i}" for i in range(users)],
            "profile": (np.arange(users) + 1).astype(np.int32),
        }
    ).to_parquet(folder / "users.parquet")


def _rights(folder: Path, *, titles: int) -> None:
    rows = np.arange(titles)
    pd.DataFrame(
        {
            "title": rows.astype(np.int32),
            "region": np.where(rows < REGIONAL, 1, 0).astype(np.int32),
            "plan": np.zeros(titles, dtype=np.int32),
            "start": np.full(titles, ALWAYS),
            "end": np.where(rows == titles - 1, 1, -ALWAYS),
        }
    ).to_parquet(folder / "rights.parquet")
