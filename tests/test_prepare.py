"""Preparation: every rule of the prepared dataset on tables small enough to work out by hand, and every error."""

from __future__ import annotations

import errno
import os
import sys
import types
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.prepare import prepare_all, prepare_dataset
from data_prep.raw_table import disk_full_as_oserror
from data_prep.sources import tables
from data_prep.training_period import intensity_boundaries, keep_trained, split_events
from m5.schema import (
    ALWAYS,
    TEST,
    TITLE_COLUMNS,
    TRAIN,
    VALID,
    DataError,
    Intensity,
    Manifest,
    PreparedDataset,
)
    ALWAYS,
    TEST,
    TRAIN,
    VALID,
    DataError,
    Intensity,
    Manifest,
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


# --- what is written ---------------------------------------------------------------------------------------------


def test_time_split_by_hand(tmp_path: Path) -> None:
    dataset = prepare(write_world(tmp_path / "raw"), tmp_path / "data")
    manifest = dataset.manifest
    # Ten events: the ninth of the ten in time begins validation, the tenth test.
    assert (manifest.split.valid_start, manifest.split.test_start) == (900, 1000)
    assert manifest.split_counts == {"train": 8, "valid": 1, "test": 1}
    assert dataset.users["user_id"].tolist() == ["a", "b"]
    assert dataset.offsets.tolist() == [0, 5, 10]
    assert dataset.event_array("title").tolist() == [2, 1, 3, 4, 0, 1, 3, 2, 4, 0]
    assert dataset.event_array("timestamp").tolist() == [200, 400, 600, 800, 1000, 100, 300, 500, 700, 900]
    assert dataset.event_array("split").tolist() == [TRAIN] * 4 + [TEST] + [TRAIN] * 4 + [VALID]
    np.testing.assert_array_equal(
        dataset.event_array("intensity_seconds"), np.float32([20, 40, 60, 80, 100, 10, np.nan, 50, 70, 90])
    )


def test_leave_last_out_by_hand(tmp_path: Path) -> None:
    events = pd.DataFrame(
        {"user_id": ["a"] * 4 + ["b"] * 2 + ["c"] * 3, "title_id": list("wxyzwxwxy"), "ts": [1, 2, 3, 4, 1, 2, 3, 2, 1]}
    )
    dataset = prepare(minimal(tmp_path / "raw", events), tmp_path / "data", split="leave-last-out")
    # b has only two events: all of them train. c's are given backwards in time.
    assert dataset.event_array("split").tolist() == [TRAIN, TRAIN, VALID, TEST, TRAIN, TRAIN, TRAIN, VALID, TEST]
    assert events_frame(dataset)["title_id"].tolist() == list("wxyzwxyxw")
    assert dataset.titles["train_count"].tolist() == [2, 2, 1, 0]  # w: a, b; x: a, b; y: c; z: none
    assert dataset.titles["cold"].tolist() == [False, False, False, True]


def test_vocabularies_come_from_training_events_only(tmp_path: Path) -> None:
    dataset = prepare(write_world(tmp_path / "raw"), tmp_path / "data")
    region, plan = dataset.manifest.scenarios
    assert (region.name, region.values) == ("region", ("BR", "US"))  # JP occurs in validation only
    assert (plan.name, plan.values) == ("plan", ("ads", "premium"))  # spread from the users table
    assert dataset.event_array("scenario_region").tolist() == [2, 2, 2, 2, 2, 1, 1, 1, 1, 0]
    assert dataset.event_array("scenario_plan").tolist() == [1] * 5 + [2] * 5
    assert dataset.manifest.contexts[0].values == ("phone", "tv")
    assert dataset.event_array("context_device").tolist() == [2, 2, 2, 2, 2, 2, 1, 2, 2, 0]
    assert dataset.manifest.user_features[0].values == ("old",)
    assert dataset.users["age"].tolist() == [1, 0]
    assert any("region" in note and "unknown" in note for note in dataset.manifest.notes)


def test_titles_keep_their_order_and_metadata(tmp_path: Path) -> None:
    dataset = prepare(write_world(tmp_path / "raw"), tmp_path / "data")
    titles = dataset.titles
    assert titles["title_id"].tolist() == ["t5", "t1", "t2", "t3", "t4"]
    assert titles["title"].tolist() == ["Five", "One", "Two", "t3", "Four"]
    assert titles["description"].tolist() == ["five", "", "two", "three", "four"]
    assert dataset.manifest.categories.values == ("live", "movie", "series")
    assert titles["category"].tolist() == [2, 3, 2, 0, 1]
    assert [list(v) for v in titles["genres"]] == [["drama", "noir"], ["comedy"], ["drama"], [], []]
    assert [list(v) for v in titles["actors"]] == [["X", "Y"], ["X"], [], [], ["Z"]]
    assert titles["artwork"].tolist() == [str((tmp_path / "raw" / "p5.jpg").absolute()), "", "", "", ""]
    assert titles["released"].tolist() == [ALWAYS, 0, ALWAYS, ALWAYS, 701]
    assert titles["train_count"].tolist() == [0, 2, 2, 2, 2]
    assert titles["cold"].tolist() == [True, False, False, False, False]
    # t4's event at 700 lies one second before its launch.
    assert any(note.startswith("1 events of 1 titles lie before") for note in dataset.manifest.notes)
    assert tuple(titles.columns)[:8] == TITLE_COLUMNS


def test_only_ids_and_timestamps_are_required(tmp_path: Path) -> None:
    events = pd.DataFrame({"user_id": [1, 1, 2, 10, 10], "title_id": [7, 8, 7, 8, 7], "ts": [1, 2, 3, 4, 5]})
    dataset = prepare(minimal(tmp_path / "raw", events), tmp_path / "data", valid_fraction=0.2, test_fraction=0.2)
    manifest = dataset.manifest
    assert dataset.users["user_id"].tolist() == ["1", "2", "10"]  # numbers in the order of numbers
    assert (manifest.scenarios, manifest.contexts, manifest.intensities, manifest.user_features) == ((), (), (), ())
    assert manifest.categories.size == 1
    assert dataset.titles["category"].tolist() == [0, 0]
    assert dataset.titles["title"].tolist() == ["7", "8"]
    assert manifest.rights_scenarios is None
    assert dataset.rights is None
    assert manifest.split_counts == {"train": 3, "valid": 1, "test": 1}


def test_ties_of_time_keep_the_row_order(tmp_path: Path) -> None:
    titles = [f"t{i}" for i in np.random.default_rng(0).permutation(500)]
    events = pd.DataFrame({"user_id": ["a", "b"] * 250, "title_id": titles, "ts": np.arange(500) // 100})
    dataset = prepare(minimal(tmp_path / "raw", events), tmp_path / "data", split="leave-last-out")
    assert events_frame(dataset)["title_id"].tolist() == titles[0::2] + titles[1::2]


def test_users_with_few_events_are_left_out_and_noted(tmp_path: Path) -> None:
    events = pd.DataFrame({"user_id": ["a"] * 5 + ["b"], "title_id": list("vwxyzv"), "ts": range(6)})
    dataset = prepare(
        minimal(tmp_path / "raw", events), tmp_path / "data", split="leave-last-out", min_events_per_user=2
    )
    assert dataset.users["user_id"].tolist() == ["a"]
    assert any(note.startswith("1 users with fewer than 2 events") for note in dataset.manifest.notes)


@pytest.mark.parametrize("unit", [1_000, 1_000_000, 1_000_000_000])
def test_other_units_of_time_are_told_apart_and_noted(tmp_path: Path, unit: int) -> None:
    seconds = 1_600_000_000 + np.arange(10) * DAY
    events = pd.DataFrame({"user_id": "a", "title_id": [f"t{i}" for i in range(10)], "ts": seconds * unit})
    dataset = prepare(minimal(tmp_path / "raw", events), tmp_path / "data")
    assert dataset.event_array("timestamp").tolist() == seconds.tolist()
    assert any("not in seconds" in note for note in dataset.manifest.notes)


@pytest.mark.parametrize("form", ["datetime", "zoned", "text", "text with zone"])
def test_dates_are_read_as_utc(tmp_path: Path, form: str) -> None:
    moments = pd.date_range("2024-05-01 20:00", periods=10, freq="h", tz="UTC")
    columns = {
        "datetime": moments.tz_localize(None),
        "zoned": moments.tz_convert("America/Sao_Paulo"),
        "text": moments.strftime("%Y-%m-%d %H:%M:%S"),
        "text with zone": moments.tz_convert("Asia/Tokyo").strftime("%Y-%m-%dT%H:%M:%S+09:00"),
    }
    events = pd.DataFrame({"user_id": "a", "title_id": [f"t{i}" for i in range(10)], "ts": columns[form]})
    dataset = prepare(minimal(tmp_path / "raw", events), tmp_path / "data")
    first = int(datetime(2024, 5, 1, 20, tzinfo=UTC).timestamp())
    assert dataset.event_array("timestamp").tolist() == [first + 3600 * i for i in range(10)]


def test_duplicates_are_dropped_where_asked(tmp_path: Path) -> None:
    events = pd.DataFrame(
        {
            "user_id": "a",
            "title_id": list("uvwwwxyz"),
            "ts": [1, 2, 3, 3, 4, 5, 6, 7],
            "rating": [1, 2, 3, 4, 5, 1, 2, 3],
        }
    )
    path = minimal(tmp_path / "raw", events, duplicates="drop", intensity={"rating": "rating"})
    dataset = prepare(path, tmp_path / "data", split="leave-last-out")
    assert dataset.event_array("intensity_rating").tolist() == [1, 2, 3, 5, 1, 2, 3]  # the first of the two stays
    assert any(note.startswith("1 duplicate events") for note in dataset.manifest.notes)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.tuples(st.sampled_from("abcd"), st.sampled_from("vwxyz"), st.integers(0, 30)),
        min_size=5,
        max_size=60,
        unique=True,
    ),
    kind=st.sampled_from(["time", "leave-last-out"]),
)
def test_no_event_is_lost_or_invented(tmp_path: Path, rows: list[tuple[str, str, int]], kind: str) -> None:
    events = pd.DataFrame(rows, columns=["user_id", "title_id", "ts"])
    path = minimal(tmp_path / "raw", events)
    try:
        dataset = prepare(path, tmp_path / "data", split=kind)
    except DataError as error:
        assert "split" in str(error)
        return
    prepared = events_frame(dataset)
    expected = events.sort_values(["user_id", "ts"], kind="stable", ignore_index=True)
    pd.testing.assert_frame_equal(prepared, expected, check_dtype=False)
    if kind == "time":
        marks, times = dataset.event_array("split"), dataset.event_array("timestamp")
        assert times[marks == TRAIN].max() < times[marks == VALID].min()
        assert times[marks == VALID].max() < times[marks == TEST].min()


# --- the training period -----------------------------------------------------------------------------------------


def test_few_distinct_values_get_a_bucket_each() -> None:
    intensity = intensity_boundaries("rating", np.float32([3, 1, 5, np.nan, 4, 2, 5]))
    assert intensity.boundaries == (1.5, 2.5, 3.5, 4.5)
    assert intensity.bucket(np.float32([1, 2, 3, 4, 5, np.nan])).tolist() == [1, 2, 3, 4, 5, 0]


def test_many_values_get_quantile_buckets_of_equal_size() -> None:
    values = np.random.default_rng(0).permutation(1600).astype(np.float32)
    intensity = intensity_boundaries("seconds", values)
    assert intensity.boundaries == tuple(100.0 * i for i in range(1, 16))
    assert np.bincount(intensity.bucket(values)).tolist() == [0] + [100] * 16


def test_intensity_never_given() -> None:
    assert intensity_boundaries("seconds", np.float32([np.nan])) == Intensity(name="seconds", boundaries=())


def test_heavy_value_leaves_no_empty_bucket() -> None:
    values = np.concatenate([np.zeros(900), np.arange(1, 101)]).astype(np.float32)
    intensity = intensity_boundaries("seconds", values)
    assert (np.bincount(intensity.bucket(values))[1:] > 0).all()


def test_keep_trained_renumbers() -> None:
    vocabulary, codes = keep_trained(
        "region", ["BR", "JP", "US"], np.array([1, 2, 3, 0, 3]), np.array([True, False, True, True, True])
    )
    assert vocabulary.values == ("BR", "US")
    assert codes.tolist() == [1, 0, 2, 0, 2]


def test_time_split_refuses_fractions_out_of_range() -> None:
    with pytest.raises(DataError, match="sum below 1"):
        split_events("time", np.arange(10), np.array([0, 10]), valid_fraction=0.5, test_fraction=0.5)


# --- rights ------------------------------------------------------------------------------------------------------


def rights_world(folder: Path, rights: pd.DataFrame) -> Path:
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


def test_rights_are_mapped(tmp_path: Path) -> None:
    rights = pd.DataFrame(
        [
            ("t1", "US", "ads", "1970-01-02", None),
            ("t1", "*", "premium", None, "9999-12-31"),
            ("t2", None, None, 86400, 2 * DAY),
            ("t5", "JP", "*", None, None),  # JP has no training event: left out, not widened to any
            ("elsewhere", "US", "*", None, None),
        ],
        columns=["title_id", "where", "tier", "from", "to"],
    )
    dataset = prepare(rights_world(tmp_path / "raw", rights), tmp_path / "data")
    assert dataset.manifest.rights_scenarios == ("region", "plan")
    frame = dataset.rights
    assert list(frame.columns) == ["title", "region", "plan", "start", "end"]
    assert frame.dtypes.astype(str).tolist() == ["int32"] * 3 + ["int64"] * 2
    for_ever = int(datetime(9999, 12, 31, tzinfo=UTC).timestamp())
    assert frame.to_numpy().tolist() == [
        [1, 0, 2, ALWAYS, for_ever],
        [1, 2, 1, DAY, -ALWAYS],
        [2, 0, 0, DAY, 2 * DAY],
    ]
    notes = " ".join(dataset.manifest.notes)
    assert "1 rights rows of titles outside the catalogue" in notes
    assert "1 rights rows of a region without training events" in notes
    assert "3 of 5 titles have no rights row" in notes


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("t1", "UK", "*", None, None), r"rights\.csv, column 'where': 1 of 2 rows have a region.*'UK'.*BR, JP, US"),
        (("t1", "US", "*", 200, 100), r"1 of 2 rows end before they start, for example title t1"),
        (("t1", "US", "*", "soon", None), r"column 'from': 1 of 2 rows hold no date.*soon"),
    ],
)
def test_bad_rights_are_refused(tmp_path: Path, row: tuple, message: str) -> None:
    rights = pd.DataFrame([("t2", "US", "ads", None, None), row], columns=["title_id", "where", "tier", "from", "to"])
    with pytest.raises(DataError, match=message):
        prepare(rights_world(tmp_path / "raw", rights), tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_rights_of_other_ids_are_refused(tmp_path: Path) -> None:
    rights = pd.DataFrame([("One", "US", "ads", None, None)], columns=["title_id", "where", "tier", "from", "to"])
    with pytest.raises(DataError, match="none of its 1 rows names a title"):
        prepare(rights_world(tmp_path / "raw", rights), tmp_path / "data")


# --- errors ------------------------------------------------------------------------------------------------------


def spoil(**columns: object) -> pd.DataFrame:
    """Ten good events, then `columns` replaced."""
    good = {
        "user_id": ["a", "b"] * 5,
        "title_id": [f"t{1 + i % 5}" for i in range(10)],
        "ts": list(range(100, 1100, 100)),
    }
    good |= {"watch_s": [1.0] * 10, "region": ["US"] * 10, "device": ["tv"] * 10}
    return pd.DataFrame({**good, **columns})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"user_id": ["a", None] * 5}, r"events\.csv, column 'user_id': 5 of 10 rows have no user id"),
        ({"title_id": ["t1", np.nan] * 5}, r"column 'title_id': 5 of 10 rows have no title id"),
        ({"ts": [*range(9), "yesterday"]}, r"column 'ts': 1 of 10 rows hold no timestamp.*for example yesterday"),
        ({"ts": [*range(9), None]}, r"column 'ts': 1 of 10 rows hold no timestamp.*an empty cell"),
        ({"ts": [*range(9), "2200-01-01"]}, r"1 of 10 rows lie in the future, for example 2200-01-01.*UTC"),
        ({"ts": [*range(9), 7258118400000]}, r"1 of 10 rows lie in the future, for example 7258118400000 .*2200"),
        ({"watch_s": [1.0] * 9 + [-3.5]}, r"column 'watch_s': 1 of 10 rows are negative.*-3\.5"),
        ({"watch_s": ["1"] * 9 + ["long"]}, r"column 'watch_s': 1 of 10 rows hold no number.*long"),
        ({"title_id": ["t1"] * 9 + ["t99"]}, r"1 of 10 rows are events of 1 titles .*titles\.parquet.*t99"),
        ({"ts": [5] * 10}, r"repeat another row's user, title and timestamp|none falls into"),
    ],
)
def test_bad_events_are_refused(tmp_path: Path, columns: dict, message: str) -> None:
    path = write_world(tmp_path / "raw", events=spoil(**columns))
    with pytest.raises(DataError, match=message):
        prepare(path, tmp_path / "data")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["raw"]  # nothing half-written


def test_duplicate_events_are_refused_with_the_remedy(tmp_path: Path) -> None:
    events = pd.concat([spoil(), spoil().iloc[[3]]])
    with pytest.raises(
        DataError, match=r"1 rows repeat another row's.*user b, title t4, timestamp 400.*duplicates: drop"
    ):
        prepare(write_world(tmp_path / "raw", events=events), tmp_path / "data")


def test_empty_splits_are_refused(tmp_path: Path) -> None:
    events = spoil(user_id=[f"u{i}" for i in range(10)], ts=[100] * 10)
    with pytest.raises(DataError, match="none falls into train, valid"):
        prepare(write_world(tmp_path / "raw", events=events), tmp_path / "data")
    with pytest.raises(DataError, match="no user has 3 events"):
        prepare(tmp_path / "raw" / "dataset.yaml", tmp_path / "data", split="leave-last-out")


def test_empty_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the events table has no rows"):
        prepare(write_world(tmp_path / "raw", events=spoil().head(0)), tmp_path / "data")


def test_repeated_title_and_user_ids_are_refused(tmp_path: Path) -> None:
    path = write_world(tmp_path / "raw")
    titles = pd.read_parquet(tmp_path / "raw" / "titles.parquet")
    pd.concat([titles, titles.iloc[[1, 2]]]).to_parquet(tmp_path / "raw" / "titles.parquet")
    with pytest.raises(
        DataError, match=r"titles\.parquet, column 'title_id': 2 ids have more than one row.*t1 \(2 rows\)"
    ):
        prepare(path, tmp_path / "data")
    path = write_world(tmp_path / "raw")
    users = pd.read_parquet(tmp_path / "raw" / "users.parquet")
    pd.concat([users, users]).to_parquet(tmp_path / "raw" / "users.parquet")
    with pytest.raises(DataError, match=r"users\.parquet, column 'user_id': 3 ids have more than one row"):
        prepare(path, tmp_path / "data")


def test_missing_files_and_columns_name_close_ones(tmp_path: Path) -> None:
    path = write_world(tmp_path / "raw")
    record = yaml.safe_load(path.read_text())

    def with_change(section: str, key: str, value: object) -> Path:
        path.write_text(yaml.safe_dump({**record, section: {**record[section], key: value}}))
        return path

    with pytest.raises(DataError, match=r"event\.csv does not exist\. Did you mean events\.csv\?"):
        prepare(with_change("events", "path", "event.csv"), tmp_path / "data")
    with pytest.raises(DataError, match=r"events\.user names the column 'userid'.*Did you mean user_id"):
        prepare(with_change("events", "user", "userid"), tmp_path / "data")
    with pytest.raises(DataError, match=r"titles\.metadata names the column 'genre'.*Did you mean genres"):
        prepare(with_change("titles", "metadata", ["genre"]), tmp_path / "data")
    with pytest.raises(
        DataError, match=r"events\.scenario names the column 'regoin'.*Did you mean region.*users table"
    ):
        prepare(with_change("events", "scenario", ["regoin"]), tmp_path / "data")
    with pytest.raises(DataError, match="neither Parquet .* nor CSV"):
        (tmp_path / "raw" / "events.xlsx").write_bytes(b"")
        prepare(with_change("events", "path", "events.xlsx"), tmp_path / "data")
    with pytest.raises(DataError, match=r"broken\.parquet cannot be read"):
        (tmp_path / "raw" / "broken.parquet").write_bytes(b"not parquet at all")
        prepare(with_change("events", "path", "broken.parquet"), tmp_path / "data")
    assert not (tmp_path / "data").exists()


MINIMAL = "events: {path: e, user: u, title: t, timestamp: s, scenario: [region]}\ntitles: {path: t, id: i}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("events: {path: e.csv, user: u, titel: t, timestamp: ts}\ntitles: {path: t.csv, id: i}", "did you mean title"),
        ("titles: {path: t.csv, id: i}", "events is missing"),
        ("events: [unclosed", "not valid YAML"),
        ("", "empty or not a mapping"),
        ("source: x\nevents: {}\ntitles: {}", "unknown key source"),
        (f"{MINIMAL}\nrights: {{path: r, title: t, plan: p}}", "'plan' must be one of events.scenario"),
        (f"{MINIMAL}\nusers: {{path: u, id: i, features: [age, age]}}", "users.features names age twice"),
        (
            MINIMAL.replace("id: i", "id: i, metadata: [title]"),
            "titles.metadata: title is the name of a column of ours",
        ),
    ],
)
def test_bad_dataset_yaml_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "dataset.yaml").write_text(text)
    with pytest.raises(DataError, match=message):
        tables.load(tmp_path / "dataset.yaml")


# --- running again -----------------------------------------------------------------------------------------------


def test_same_data_keep_their_vectors_and_other_data_do_not(tmp_path: Path) -> None:
    path, out = write_world(tmp_path / "raw"), tmp_path / "data"
    first = prepare(path, out).manifest
    (out / "content").mkdir()
    np.save(out / "content" / "text.npy", np.ones((5, 2), np.float32))
    again = prepare(path, out)
    assert again.manifest.content_hash == first.content_hash
    assert again.content("text") is not None
    other = prepare(write_world(tmp_path / "raw", events=spoil()), out)
    assert other.manifest.content_hash != first.content_hash
    assert other.content("text") is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "raw"]


def test_a_failure_leaves_the_earlier_dataset(tmp_path: Path) -> None:
    path, out = write_world(tmp_path / "raw"), tmp_path / "data"
    first = prepare(path, out).manifest
    write_world(tmp_path / "raw", events=spoil(watch_s=[-1.0] * 10))
    with pytest.raises(DataError, match="negative"):
        prepare(path, out)
    assert Manifest.read(out) == first


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match="not a prepared dataset"):
        prepare(write_world(tmp_path / "raw"), tmp_path / "data")
    assert os.listdir(tmp_path / "data") == ["thesis.txt"]


def test_truth_travels_with_the_dataset(tmp_path: Path) -> None:
    path = write_world(tmp_path / "raw", truth="planted.npz", name="small")
    with pytest.raises(DataError, match=r"planted\.npz does not exist"):
        prepare(path, tmp_path / "data")
    np.savez(tmp_path / "raw" / "planted.npz", answer=np.array([42]))
    dataset = prepare(path, tmp_path / "data")
    assert dataset.manifest.name == "small"
    assert np.load(tmp_path / "data" / "truth.npz")["answer"].tolist() == [42]


def test_disk_full_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught, disk_full_as_oserror(tmp_path):
        raise duckdb.IOException("Could not write file: No space left on device")
    assert caught.value.errno == errno.ENOSPC


# --- all stages --------------------------------------------------------------------------------------------------


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls of the three encoders, which are replaced: their own tests are elsewhere."""
    calls: list[str] = []

    def encode_text(data: Path, *, model: str | None) -> None:
        calls.append(f"text {model}")
        if model == "absent":
            raise DataError("no such encoder")
        (data / "content").mkdir(exist_ok=True)
        np.save(data / "content" / "text.npy", np.ones((5, 2), np.float32))

    for module, function in {
        "text_encoder": types.SimpleNamespace(encode_text=encode_text),
        "image_encoder": types.SimpleNamespace(
            encode_images=lambda data, *, model, weights: calls.append(f"{model} {weights}")
        ),
        "graphsage": types.SimpleNamespace(build_graph=lambda data: calls.append("graph")),
    }.items():
        monkeypatch.setitem(sys.modules, f"data_prep.{module}", function)
    return calls


def test_all_stages_run_in_order(tmp_path: Path, stages: list[str]) -> None:
    said: list[str] = []
    prepare_all(
        tables.load(write_world(tmp_path / "raw")), tmp_path / "data", image_weights="random", progress=said.append
    )
    assert stages == ["text None", "resnet50 random", "graph"]
    assert PreparedDataset(tmp_path / "data").content("text").shape == (5, 2)
    assert any(line.startswith("note: ") for line in said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "raw"]


def test_stages_without_content_are_skipped_aloud(tmp_path: Path, stages: list[str]) -> None:
    said: list[str] = []
    events = pd.DataFrame({"user_id": "a", "title_id": [f"t{i}" for i in range(10)], "ts": range(10)})
    prepare_all(tables.load(minimal(tmp_path / "raw", events)), tmp_path / "data", progress=said.append)
    assert stages == ["graph"]
    assert sum("skipped" in line for line in said) == 2


def test_a_missing_encoder_leaves_what_was_there(tmp_path: Path, stages: list[str]) -> None:
    spec = tables.load(write_world(tmp_path / "raw"))
    with pytest.raises(DataError, match="no such encoder"):
        prepare_all(spec, tmp_path / "data", text="absent")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]
    before = prepare_all(spec, tmp_path / "data")
    with pytest.raises(DataError, match="no such encoder"):
        prepare_all(spec, tmp_path / "data", text="absent")
    assert Manifest.read(tmp_path / "data") == before
    assert PreparedDataset(tmp_path / "data").content("text") is not None
