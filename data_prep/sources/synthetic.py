"""`m5 synth`: a synthetic streaming service as raw tables, with its planted truth beside them.

    OUT/events.parquet   user_id, title_id, ts (int64 seconds UTC), watch_s, completion, region, plan, device
    OUT/users.parquet    user_id, age_band
    OUT/titles.parquet   title_id, name, text, kind, genres, actors, studios, countries (lists), poster, launch_date
    OUT/rights.parquet   title_id, region, plan (null = any), from, to (dates; null = open; `to` is exclusive)
    OUT/posters/*.jpg    drawn artwork, unless posters=False
    OUT/dataset.yaml     the roles of the columns, for `m5 prepare tables`
    OUT/truth.npz        the probabilities that the events follow; arrays as documented in `m5.oracle`

Parts: `synthetic_world` (catalogue, rights, probabilities), `synthetic_viewers` (people and their events),
`synthetic_text` and `synthetic_artwork` (what can be seen of a title).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from data_prep.sources.synthetic_artwork import draw_posters
from data_prep.sources.synthetic_text import (
    GENRES,
    THEMES,
    descriptions,
    people_names,
    title_names,
)
from data_prep.sources.synthetic_viewers import (
    DEVICES,
    MAX_EVENTS,
    Behaviour,
    TitleSampler,
    Viewers,
    draw_viewers,
    event_seconds,
    running_seconds,
    watch,
)
from data_prep.sources.synthetic_world import (
    AGE_BANDS,
    COUNTRIES,
    N_THEMES,
    NEVER,
    REGIONS,
    START,
    THEME_GENRE,
    WEEK,
    World,
    draw_world,
)
from m5.schema import DataError

_BLOCK = 20_000  # viewers simulated together; part of what a seed means
_TRAINING = 0.8  # share of events before the validation period of a time split


def generate(
    out: Path,
    *,
    users: int = 5000,
    titles: int = 1000,
    events: int = 200_000,
    seed: int = 0,
    regions: int = 4,
    plans: tuple[str, ...] = ("ads", "premium"),
    posters: bool = True,
) -> Path:
    """Write a synthetic world; the same arguments give the same world.

    Args:
        out: folder to write; replaced if it exists.
        users: number of viewers.
        titles: size of the catalogue, at least 96 (two a theme).
        events: about how many events; a viewer has at most `titles / 4` and MAX_EVENTS.
        seed: of everything.
        regions: 1 to 8.
        plans: names, from the smallest catalogue to the largest.
        posters: draw artwork.

    Returns:
        The path of dataset.yaml.

    Raises:
        DataError: a size is out of range.
    """
    _check(users, titles, events, regions, plans)
    if seed < 0:
        raise DataError(f"--seed {seed}: a seed is zero or more.")
    out = Path(out)
    _refuse_foreign_folder(out)
    work = out.with_name(out.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        world_seed, length_seed, title_seed, viewer_seed = np.random.SeedSequence(seed).spawn(4)
        length = _lengths(np.random.default_rng(length_seed), users, titles, events)
        training_end = _training_end(np.random.default_rng(length_seed), length)
        rng = np.random.default_rng(world_seed)
        world = draw_world(rng, titles, REGIONS[:regions], tuple(plans), training_end)
        title_ids = _ids("t", titles)
        _write_titles(work, world, title_ids, np.random.default_rng(title_seed), posters, seed)
        _write_rights(work, world, title_ids)
        _write_viewers(work, world, title_ids, length, viewer_seed)
        (work / "dataset.yaml").write_text(yaml.safe_dump(_dataset(posters), sort_keys=False))
        shutil.rmtree(out, ignore_errors=True)
        work.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return out / "dataset.yaml"


def _refuse_foreign_folder(out: Path) -> None:
    """Raises DataError where `out` holds something else than a synthetic world: it would be replaced."""
    world = (out / "truth.npz").is_file() and (out / "dataset.yaml").is_file()
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not world):
        raise DataError(
            f"{out} exists and is not a synthetic world (it has no truth.npz), so it is not overwritten. Choose "
            "another folder for --out, or remove it."
        )


def _check(users: int, titles: int, events: int, regions: int, plans: tuple[str, ...]) -> None:
    problem = None
    if users < 1 or events < users:
        problem = f"{events} events for {users} users; give at least one event a user"
    elif titles < 2 * N_THEMES:
        problem = f"{titles} titles; give at least {2 * N_THEMES}, two for each of the {N_THEMES} themes"
    elif events / users > _cap(titles) / 2:
        problem = (
            f"{events / users:.0f} events a user over {titles} titles, none watched twice; give more titles or users"
        )
    elif not 1 <= regions <= len(REGIONS) or not plans:
        problem = f"{regions} regions and {len(plans)} plans; give 1 to {len(REGIONS)} regions and at least one plan"
    if problem:
        raise DataError(f"the synthetic world cannot have {problem}.")


def _cap(titles: int) -> int:
    return min(titles // 4, MAX_EVENTS)


def _lengths(rng: np.random.Generator, users: int, titles: int, events: int) -> np.ndarray:
    """int [users]: how many events each viewer has; long-tailed, at least 1, `events` in all but for the cap."""
    activity = rng.gamma(2.5, 1.0, users)
    return np.minimum(1 + rng.multinomial(events - users, activity / activity.sum()), _cap(titles))


def _training_end(rng: np.random.Generator, length: np.ndarray) -> int:
    """First week that begins after the training period, from the times of a sample of viewers."""
    sample = length[:_BLOCK]
    seconds = event_seconds(rng, sample)
    valid = np.arange(seconds.shape[1]) < sample[:, None]
    return int(np.ceil(np.quantile(seconds[valid], _TRAINING) / WEEK))


def _ids(letter: str, count: int) -> np.ndarray:
    return np.char.add(letter, np.char.zfill(np.arange(count).astype(str), len(str(count - 1))))


def _dataset(posters: bool) -> dict:
    titles = {
        "path": "titles.parquet",
        "id": "title_id",
        "title": "name",
        "description": "text",
        "category": "kind",
        "metadata": ["genres", "actors", "studios", "countries"],
        "artwork": "poster",
        "released": "launch_date",
    }
    if not posters:
        del titles["artwork"]
    return {
        "name": "synthetic",
        "events": {
            "path": "events.parquet",
            "user": "user_id",
            "title": "title_id",
            "timestamp": "ts",
            "intensity": {"seconds": "watch_s", "completion": "completion"},
            "scenario": ["region", "plan"],
            "context": ["device"],
        },
        "users": {"path": "users.parquet", "id": "user_id", "features": ["age_band"]},
        "titles": titles,
        "rights": {
            "path": "rights.parquet",
            "title": "title_id",
            "region": "region",
            "plan": "plan",
            "start": "from",
            "end": "to",
        },
        "truth": "truth.npz",
    }


def _dates(weeks: np.ndarray) -> pd.Series:
    """Mondays; NaT for NEVER."""
    seconds = START + np.where(weeks == NEVER, 0, weeks).astype(np.int64) * WEEK
    dates = pd.Series(seconds.astype("datetime64[s]"))
    return dates.mask(weeks == NEVER)


def _write_titles(
    work: Path,
    world: World,
    title_ids: np.ndarray,
    rng: np.random.Generator,
    posters: bool,
    seed: int,
) -> None:
    catalogue = world.catalogue
    people = np.array(people_names(int(catalogue.actors.max()) + 1))
    studios = [
        f"{name.split()[-1]} Studios {number}" for number, name in enumerate(people[: catalogue.studio.max() + 1])
    ]
    countries = [COUNTRIES[index] for index in catalogue.country]
    genre = THEME_GENRE[catalogue.theme]
    second = catalogue.second_genre
    frame = pd.DataFrame(
        {
            "title_id": title_ids,
            "name": title_names(catalogue.theme, rng),
            "text": descriptions(catalogue.theme, catalogue.tone, countries, rng),
            "kind": [THEMES[theme].kind for theme in catalogue.theme],
            "genres": [
                [GENRES[a]] + ([GENRES[b]] if b not in (-1, a) else []) for a, b in zip(genre, second, strict=True)
            ],
            "actors": [sorted({str(people[person]) for person in row if person >= 0}) for row in catalogue.actors],
            "studios": [[studios[index]] for index in catalogue.studio],
            "countries": [[country] for country in countries],
            "launch_date": _dates(catalogue.launch).dt.date,
        }
    )
    if posters:
        names = [f"{title}.jpg" for title in title_ids]
        frame["poster"] = [f"posters/{name}" for name in names]
        theme_in_genre = np.array([[t.genre for t in THEMES[:i]].count(theme.genre) for i, theme in enumerate(THEMES)])
        draw_posters(work / "posters", names, genre, theme_in_genre[catalogue.theme], seed)
    frame.to_parquet(work / "titles.parquet", index=False)


def _write_rights(work: Path, world: World, title_ids: np.ndarray) -> None:
    """One row a title and region; two or more plans become a row each unless all plans are covered (null = any)."""
    catalogue = world.catalogue
    every = np.asarray(catalogue.licensed.all(2))
    title, region = np.nonzero(every)
    some_title, some_region, some_plan = np.nonzero(catalogue.licensed & ~every[:, :, None])
    plan = np.concatenate([np.full(len(title), None), np.array(world.plans, dtype=object)[some_plan]])
    title, region = (
        np.concatenate([title, some_title]),
        np.concatenate([region, some_region]),
    )
    opened = np.where(catalogue.launch <= 0, NEVER, catalogue.launch)
    frame = pd.DataFrame(
        {
            "title_id": title_ids[title],
            "region": np.array(world.regions, dtype=object)[region],
            "plan": plan,
            "from": _dates(opened[title]).dt.date,
            "to": _dates(catalogue.leave[title]).dt.date,
        }
    )
    order = np.argsort(title, kind="stable")
    frame.iloc[order].to_parquet(work / "rights.parquet", index=False)


def _write_viewers(
    work: Path,
    world: World,
    title_ids: np.ndarray,
    length: np.ndarray,
    seed: np.random.SeedSequence,
) -> None:
    """Simulate block by block; events and users are streamed, the truth's small columns are kept."""
    user_ids = _ids("u", len(length))
    sampler = TitleSampler.of(world)
    starts = range(0, len(length), _BLOCK)
    kept: dict[str, list[np.ndarray]] = {
        "interest_theme": [],
        "interest_weight": [],
        "previous": [],
        "count": [],
        "age": [],
    }
    writer = None
    try:
        for first, block_seed in zip(starts, seed.spawn(len(starts)), strict=True):
            rng = np.random.default_rng(block_seed)
            block = length[first : first + _BLOCK]
            by_length = np.argsort(-block, kind="stable")
            viewers = draw_viewers(rng, world, block[by_length])
            behaviour = watch(rng, world, sampler, viewers)
            back = np.argsort(by_length)
            table = _event_table(
                world,
                user_ids[first : first + _BLOCK],
                title_ids,
                viewers,
                behaviour,
                back,
            )
            writer = writer or pq.ParquetWriter(work / "events.parquet", table.schema, compression="zstd")
            writer.write_table(table)
            kept["interest_theme"].append(viewers.theme[back])
            kept["interest_weight"].append(viewers.weight[back])
            kept["age"].append(viewers.age[back])
            kept["count"].append(behaviour.kept[back].sum(1))
            kept["previous"].append(behaviour.previous[back][behaviour.kept[back]])
    finally:
        if writer:
            writer.close()
    truth = {name: np.concatenate(parts) for name, parts in kept.items()}
    age_band = np.array(AGE_BANDS)[truth.pop("age")]
    pd.DataFrame({"user_id": user_ids, "age_band": age_band}).to_parquet(work / "users.parquet", index=False)
    _write_truth(work, world, user_ids, title_ids, truth)


def _event_table(
    world: World,
    user_ids: np.ndarray,
    title_ids: np.ndarray,
    viewers: Viewers,
    behaviour: Behaviour,
    back: np.ndarray,
) -> pa.Table:
    """The block's events by user and time; strings are dictionary-encoded."""
    kept = behaviour.kept[back]
    user = np.repeat(np.arange(len(kept), dtype=np.int32), kept.sum(1))

    def column(matrix: np.ndarray) -> np.ndarray:
        return matrix[back][kept]

    title = column(behaviour.title)
    completion = column(behaviour.completion)
    runtime = running_seconds(world.catalogue.theme)[title]

    def coded(index: np.ndarray, values: Iterable[str]) -> pa.DictionaryArray:
        return pa.DictionaryArray.from_arrays(pa.array(index.astype(np.int32)), pa.array(list(values)))

    return pa.table(
        {
            "user_id": coded(user, user_ids),
            "title_id": coded(title, title_ids),
            "ts": START + column(viewers.seconds).astype(np.int64),
            "watch_s": np.rint(completion * runtime).astype(np.int32),
            "completion": np.round(completion, 3),
            "region": coded(column(behaviour.region), world.regions),
            "plan": coded(column(behaviour.plan), world.plans),
            "device": coded(column(behaviour.device), DEVICES),
        }
    )


def _write_truth(
    work: Path,
    world: World,
    user_ids: np.ndarray,
    title_ids: np.ndarray,
    viewers: dict[str, np.ndarray],
) -> None:
    np.savez(
        work / "truth.npz",
        user_id=user_ids,
        title_id=title_ids,
        region=np.array(world.regions),
        plan=np.array(world.plans),
        start=np.int64(START),
        week=np.int64(WEEK),
        title_theme=world.catalogue.theme.astype(np.int16),
        title_probability=world.title_probability,
        theme_appeal=world.theme_appeal,
        spill=world.spill,
        noise_theme=world.noise_theme,
        noise=np.float64(world.noise),
        persistence=np.float64(world.persistence),
        interest_theme=viewers["interest_theme"],
        interest_weight=viewers["interest_weight"],
        offset=np.concatenate([[0], np.cumsum(viewers["count"])]),
        previous=viewers["previous"],
    )
