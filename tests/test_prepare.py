"""Preparation: what is written, worked out by hand, rights, and running again."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.training_period import intensity_boundaries, keep_trained, split_events
from m5.schema import (
    ALWAYS,
    TEST,
    TITLE_COLUMNS,
    TRAIN,
    VALID,
    DataError,
    Intensity,
)
from tests.raw_world import DAY, events_frame, minimal, prepare, rights_world, write_world

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


def test_columns_of_numbers_and_of_text_are_read_alike(tmp_path: Path) -> None:
    events = pd.DataFrame(
        {
            "user_id": "a",
            "title_id": [f"t{i}" for i in range(6)],
            "ts": [1.7e9, 1_700_000_001_500, 1.700000003e15, 1.7000000045e18, 1_700_000_005.25, 1_700_000_006],
            "watch_s": [0.1, np.nan, 3, 1e20, 2 / 3, 0],
        }
    )
    found = []
    for form, columns in (("numbers", events), ("text", events.astype({"ts": str, "watch_s": str}))):
        path = minimal(tmp_path / form, columns, intensity={"seconds": "watch_s"})
        dataset = prepare(path, tmp_path / f"{form}-data", split="leave-last-out")
        found.append((dataset.manifest.content_hash, dataset.event_array("timestamp").tolist()))
    assert found[0] == found[1]
    assert found[0][1] == [1_700_000_000 + second for second in (0, 1, 3, 4, 5, 6)]


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
