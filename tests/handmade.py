"""Prepared datasets written event by event, for tests whose expectations are worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from m5.schema import ALWAYS, TEST, TRAIN, VALID, Manifest, PreparedDataset, Split, Vocabulary

SCENARIO = {"region": ("US", "BR"), "plan": ("ads", "premium")}
Event = tuple[int, int, int]  # title, timestamp, split


def write_handmade(
    folder: Path,
    histories: Sequence[Sequence[Event]],
    *,
    titles: int,
    scenario: Sequence[Sequence[tuple[int, int]]] | None = None,
    released: Sequence[int] | None = None,
    rights: pd.DataFrame | None = None,
) -> PreparedDataset:
    """One history a user, in time order; `scenario` gives every event's (region, plan), none: no scenarios."""
    flat = np.array([event for history in histories for event in history], dtype=np.int64).reshape(-1, 3)
    title, timestamp, split = flat.T
    train_count = np.bincount(title[split == TRAIN], minlength=titles)
    columns = {"title": title.astype(np.int32), "timestamp": timestamp, "split": split.astype(np.uint8)}
    if scenario is not None:
        values = np.array([value for history in scenario for value in history], dtype=np.int32)
        columns |= {f"scenario_{name}": values[:, column] for column, name in enumerate(SCENARIO)}
    (folder / "events").mkdir(parents=True)
    np.save(folder / "events" / "offsets.npy", np.cumsum([0, *map(len, histories)], dtype=np.int64))
    for name, array in columns.items():
        np.save(folder / "events" / f"{name}.npy", array)
    pd.DataFrame(
        {
            "title_id": [f"t{index}" for index in range(titles)],
            "title": [f"Title {index}" for index in range(titles)],
            "description": "",
            "category": np.zeros(titles, np.int32),
            "artwork": "",
            "released": np.full(titles, ALWAYS) if released is None else np.array(released, dtype=np.int64),
            "train_count": train_count,
            "cold": train_count == 0,
        }
    ).to_parquet(folder / "titles.parquet")
    pd.DataFrame({"user_id": [f"u{index}" for index in range(len(histories))]}).to_parquet(folder / "users.parquet")
    if rights is not None:
        rights.to_parquet(folder / "rights.parquet")
    Manifest(
        source="tests",
        name="handmade",
        n_users=len(histories),
        n_titles=titles,
        n_events=len(title),
        n_cold_titles=int((train_count == 0).sum()),
        split=Split(kind="leave-last-out"),
        split_counts={
            name: int((split == code).sum()) for name, code in (("train", TRAIN), ("valid", VALID), ("test", TEST))
        },
        categories=Vocabulary(name="category", values=()),
        scenarios=tuple(Vocabulary(name=name, values=values) for name, values in SCENARIO.items())
        if scenario is not None
        else (),
        rights_scenarios=tuple(SCENARIO) if rights is not None else None,
        content_hash="handmade",
    ).write(folder)
    return PreparedDataset(folder)


def rights_table(rows: Sequence[tuple[int, int, int, int, int]]) -> pd.DataFrame:
    """Rows of (title, region, plan, start, end); 0 = any region or plan."""
    table = pd.DataFrame(np.array(rows, dtype=np.int64).reshape(-1, 5), columns=["title", *SCENARIO, "start", "end"])
    return table.astype(dict.fromkeys(("title", *SCENARIO), np.int32))
