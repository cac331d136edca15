"""Raw tables small enough to work out by hand, shared by the tests of the preparation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from data_prep.prepare import prepare_dataset
from data_prep.sources import tables
from m5.schema import (
    PreparedDataset,
)

DAY = 86_400


def write_world(folder: Path, events: pd.DataFrame | None = None, **changes: object) -> Path:
    """Two viewers, five titles, ten events; `changes` replace sections of dataset.yaml (None removes one)."""
    folder.mkdir(parents=True, exist_ok=True)
    if events is None:
        events = pd.DataFrame(
            {
                "user_id": ["b", "a", "b", "a", "b", "a", "b", "a", "b", "a"],
                "title_id": ["t1", "t2", "t3", "t1", "t2", "t3", "t4", "t4", "t5", "t5"],
                "ts": [100, 200, 300, 400, 500, 600, 700, 800, 900, 1000],
                "watch_s": [10.0, 20.0, None, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 100.0],
                "region": ["BR", "US", "BR", "US", "BR", "US", "BR", "US", "JP", "US"],
                "device": ["tv", "tv", "phone", "tv", "tv", "tv", "tv", "tv", "watch", "tv"],
            }
        )
    events.to_csv(folder / "events.csv", index=False)
    pd.DataFrame(
        {"user_id": ["a", "b", "idle"], "age": ["old", None, "old"], "plan": ["ads", "premium", "ads"]}
    ).to_parquet(folder / "users.parquet", index=False)
    pd.DataFrame(
        {
            "title_id": ["t5", "t1", "t2", "t3", "t4"],
            "name": ["Five", "One", "Two", None, "Four"],
            "text": ["five", None, "two", "three", "four"],
            "kind": ["movie", "series", "movie", None, "live"],
            "genres": ["drama|noir", "comedy", "drama | drama|", None, ""],
            "actors": [["X", "Y"], ["X"], [], None, ["Z"]],
            "poster": ["p5.jpg", None, None, None, None],
            "launch": [None, "1970-01-01", None, None, "1970-01-01 00:11:41"],
        }
    ).to_parquet(folder / "titles.parquet", index=False)
    (folder / "p5.jpg").write_bytes(b"poster")
    record: dict[str, object] = {
        "events": {
            "path": "events.csv",
            "user": "user_id",
            "title": "title_id",
            "timestamp": "ts",
            "intensity": {"seconds": "watch_s"},
            "scenario": ["region", "plan"],
            "context": ["device"],
        },
        "users": {"path": "users.parquet", "id": "user_id", "features": ["age"]},
        "titles": {
            "path": "titles.parquet",
            "id": "title_id",
            "title": "name",
            "description": "text",
            "category": "kind",
            "metadata": ["genres", "actors"],
            "artwork": "poster",
            "released": "launch",
        },
    }
    record.update(changes)
    (folder / "dataset.yaml").write_text(
        yaml.safe_dump({key: value for key, value in record.items() if value is not None}, sort_keys=False)
    )
    return folder / "dataset.yaml"


def prepare(path: Path, out: Path, **settings_of: object) -> PreparedDataset:
    prepare_dataset(tables.load(path), out, **settings_of)
    return PreparedDataset(out)


def events_frame(dataset: PreparedDataset) -> pd.DataFrame:
    """The events with raw ids again."""
    users = np.repeat(dataset.users["user_id"].to_numpy(), np.diff(dataset.offsets))
    titles = dataset.titles["title_id"].to_numpy()[dataset.event_array("title")]
    return pd.DataFrame({"user_id": users, "title_id": titles, "ts": dataset.event_array("timestamp")})


def minimal(folder: Path, events: pd.DataFrame, **extra: object) -> Path:
    """Only events and a titles table with ids."""
    folder.mkdir(parents=True, exist_ok=True)
    events.to_parquet(folder / "events.parquet", index=False)
    pd.DataFrame({"title_id": sorted(set(events["title_id"].dropna().astype(str)))}).to_csv(
        folder / "titles.csv", index=False
    )
    section = {"path": "events.parquet", "user": "user_id", "title": "title_id", "timestamp": "ts", **extra}
    (folder / "dataset.yaml").write_text(
        yaml.safe_dump({"events": section, "titles": {"path": "titles.csv", "id": "title_id"}})
    )
    return folder / "dataset.yaml"


def spoil(**columns: object) -> pd.DataFrame:
    """Ten good events, then `columns` replaced."""
    good = {
        "user_id": ["a", "b"] * 5,
        "title_id": [f"t{1 + i % 5}" for i in range(10)],
        "ts": list(range(100, 1100, 100)),
    }
    good |= {"watch_s": [1.0] * 10, "region": ["US"] * 10, "device": ["tv"] * 10}
    return pd.DataFrame({**good, **columns})


def rights_world(folder: Path, rights: pd.DataFrame) -> Path:
    """`write_world` with a rights table."""
    section = {
        "path": "rights.csv",
        "title": "title_id",
        "region": "where",
        "plan": "tier",
        "start": "from",
        "end": "to",
    }
    path = write_world(folder, rights=section)
    rights.to_csv(folder / "rights.csv", index=False)
    return path
