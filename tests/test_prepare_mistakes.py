"""Preparation: every mistake of a user gets its message, and never leaves half a dataset."""

from __future__ import annotations

import errno
import os
import sys
import types
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pytest
import yaml

from data_prep.prepare import prepare_all
from data_prep.raw_table import disk_full_as_oserror
from data_prep.sources import tables
from m5.schema import (
    DataError,
    Manifest,
    PreparedDataset,
)
from tests.raw_world import minimal, prepare, rights_world, spoil, write_world

# --- errors ------------------------------------------------------------------------------------------------------


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
    ],
)
def test_bad_events_are_refused(tmp_path: Path, columns: dict, message: str) -> None:
    path = write_world(tmp_path / "raw", events=spoil(**columns))
    with pytest.raises(DataError, match=message):
        prepare(path, tmp_path / "data")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["raw"]  # nothing half-written


@pytest.mark.parametrize(("last", "message"), [(-3.5, r"are negative.*-3\.5"), (np.inf, "hold no number.*inf")])
def test_bad_numbers_in_columns_of_numbers_are_refused(tmp_path: Path, last: float, message: str) -> None:
    events = spoil(watch_s=[1.0] * 8 + [np.nan, last])
    path = minimal(tmp_path / "raw", events, intensity={"seconds": "watch_s"})
    with pytest.raises(DataError, match=rf"events\.parquet, column 'watch_s': 1 of 10 rows {message}"):
        prepare(path, tmp_path / "data")


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
    with pytest.raises(DataError, match=r"neither Parquet .* nor CSV"):
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
