"""Raw Parquet tables of a streaming service of any size, made in seconds: what `benchmarks.prepare` prepares."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.spec import DatasetSpec

START, DAYS = 1_700_000_000, 365  # of the log
ROWS_PER_CHUNK = 1_000_000
REGIONS, PLANS, DEVICES, AGES = 12, 4, 6, 7
GENRES, ACTORS = 30, 8_000
REPEATED = 1e-4  # share of rows that the log has twice


class Size(NamedTuple):
    """Of a service."""

    events: int
    users: int
    titles: int

    @classmethod
    def of(cls, events: int) -> Size:
        """Fifty events a viewer, and up to 20,000 titles."""
        return cls(events, max(10, events // 50), max(20, min(20_000, events // 50)))


def names(prefix: str, count: int, digits: int) -> pa.Array:
    """Text ids: u0000000, u0000001, ..."""
    return pa.array(np.char.add(prefix, np.char.zfill(np.arange(count).astype(np.str_), digits)).tolist())


def chosen(values: pa.Array, codes: np.ndarray) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int32)), values)


def write_events(path: Path, size: Size, generator: np.random.Generator) -> None:
    """In chunks, each of which follows the one before in time."""
    users, titles = names("u", size.users, 7), names("t", size.titles, 5)
    regions, devices = names("region-", REGIONS, 2), names("device-", DEVICES, 1)
    home = generator.integers(REGIONS, size=size.users)
    writer, made = None, 0
    while made < size.events:
        count = min(ROWS_PER_CHUNK, size.events - made)
        # Powers of uniform numbers: some watch much more than others, and some titles are watched much more.
        user = (size.users * generator.random(count) ** 1.5).astype(np.int64)
        title = (size.titles * generator.random(count) ** 3).astype(np.int64)
        moment = np.sort(generator.integers(made, made + count, count)) * (86_400 * DAYS) // size.events + START
        again = np.flatnonzero(generator.random(count - 1) < REPEATED)
        for column in (user, title, moment):
            column[again + 1] = column[again]
        watched = generator.integers(10, 7_200, count).astype(np.float64)
        region = np.where(generator.random(count) < 0.02, generator.integers(REGIONS, size=count), home[user])
        table = pa.table(
            {
                "user_id": chosen(users, user),
                "title_id": chosen(titles, title),
                "ts": moment,
                "watch_s": pa.array(watched, mask=generator.random(count) < 0.05),
                "region": chosen(regions, region),
                "device": chosen(devices, generator.integers(DEVICES, size=count)),
            }
        )
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
        made += count
    if writer is not None:
        writer.close()


def write_tables(folder: Path, size: Size, seed: int = 0) -> None:
    """The four tables that `described` names."""
    generator = np.random.default_rng(seed)
    write_events(folder / "events.parquet", size, generator)
    users = {
        "user_id": names("u", size.users, 7),
        "plan": chosen(names("plan-", PLANS, 1), generator.integers(PLANS, size=size.users)),
        "age_band": chosen(names("age-", AGES, 1), generator.integers(AGES, size=size.users)),
    }
    pq.write_table(pa.table(users), folder / "users.parquet")
    titles = names("t", size.titles, 5)
    genres, actors = names("genre-", GENRES, 2), names("actor-", ACTORS, 4)

    def lists(values: pa.Array, each: int) -> pa.Array:
        codes = generator.integers(len(values), size=size.titles * each)
        return pa.ListArray.from_arrays(
            np.arange(0, len(codes) + 1, each, dtype=np.int32), values.take(pa.array(codes))
        )

    catalogue = {
        "title_id": titles,
        "name": pa.array([f"Title {number}" for number in range(size.titles)]),
        "text": pa.array([f"What title {number} is about, in a sentence or two." for number in range(size.titles)]),
        "kind": chosen(names("kind-", 4, 1), generator.integers(4, size=size.titles)),
        "genres": lists(genres, 3),
        "actors": lists(actors, 5),
    }
    pq.write_table(pa.table(catalogue), folder / "titles.parquet")
    which = np.repeat(np.arange(size.titles), 4)
    rights = {
        "title_id": chosen(titles, which),
        "region": chosen(names("region-", REGIONS, 2), generator.integers(REGIONS, size=len(which))),
        "plan": chosen(names("plan-", PLANS, 1), generator.integers(PLANS, size=len(which))),
        "start": np.full(len(which), START),
        "end": START + 86_400 * generator.integers(30, 2 * DAYS, len(which)),
    }
    pq.write_table(pa.table(rights), folder / "rights.parquet")


def described(folder: Path) -> DatasetSpec:
    """What a user's dataset.yaml would say of them."""
    return DatasetSpec.model_validate(
        {
            "folder": folder,
            "events": {
                "path": "events.parquet",
                "user": "user_id",
                "title": "title_id",
                "timestamp": "ts",
                "intensity": {"seconds": "watch_s"},
                "scenario": ["region", "plan"],
                "context": ["device"],
                "duplicates": "drop",
            },
            "users": {"path": "users.parquet", "id": "user_id", "features": ["age_band"]},
            "titles": {
                "path": "titles.parquet",
                "id": "title_id",
                "title": "name",
                "description": "text",
                "category": "kind",
                "metadata": ["genres", "actors"],
            },
            "rights": {
                "path": "rights.parquet",
                "title": "title_id",
                "region": "region",
                "plan": "plan",
                "start": "start",
                "end": "end",
            },
        }
    )
