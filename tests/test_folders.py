"""Folders that are replaced as a whole: a kill leaves a whole one, a link stays a link, one writes at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest

from data_prep.write import temporary_sibling
from m5 import folders
from m5.config import ConfigError
from m5.folders import holding, put_in_place, recover, replacing


@pytest.fixture(params=["in one step", "in two steps"])
def swap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also as where the file system cannot exchange folders."""
    if request.param == "in two steps":
        monkeypatch.setattr(folders, "_exchanged", lambda one, other: False)


def write(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "file").write_text(text)
    return folder


def replace(target: Path, text: str) -> None:
    with replacing(target) as folder:
        write(folder, text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_new_folder_takes_the_old_ones_place(tmp_path: Path, swap: None) -> None:
    for text in ("first", "second", "third"):
        replace(tmp_path / "a", text)
        assert (tmp_path / "a" / "file").read_text() == text
        assert names(tmp_path) == ["a"]


def test_an_exception_changes_nothing(tmp_path: Path, swap: None) -> None:
    replace(tmp_path / "a", "old")
    with pytest.raises(OSError, match="disk"), replacing(tmp_path / "a") as folder:
        write(folder, "new")
        raise OSError("the disk is full")
    assert (tmp_path / "a" / "file").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_a_link_stays_a_link(tmp_path: Path, swap: None) -> None:
    write(tmp_path / "disk" / "a", "old")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "a")
    for text in ("first", "second"):
        replace(tmp_path / "link", text)
        assert (tmp_path / "disk" / "a" / "file").read_text() == text
    assert (tmp_path / "link").is_symlink()
    assert (names(tmp_path), names(tmp_path / "disk")) == (["disk", "link"], ["a"])


def test_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swap: None) -> None:
    monkeypatch.chdir(tmp_path)
    for text in ("first", "second"):
        replace(Path("a"), text)
    assert (tmp_path / "a" / "file").read_text() == "second"
    assert names(tmp_path) == ["a"]


def killed(folder: Path) -> Path:
    """As a kill between the two steps leaves it."""
    write(folder / "a", "old").rename(folder / ".a.previous")
    write(folder / ".a.writing", "whole, but not in its place")
    return folder / "a"


def test_a_kill_between_the_steps_is_recovered(tmp_path: Path) -> None:
    target = killed(tmp_path)
    recover(target)
    assert (target / "file").read_text() == "old"
    write(tmp_path / ".a.previous", "older")
    recover(target)  # it is there: nothing is brought back
    assert (target / "file").read_text() == "old"
    recover(tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_what_a_kill_has_left_does_not_stay(tmp_path: Path, swap: None) -> None:
    replace(killed(tmp_path), "new")
    assert (tmp_path / "a" / "file").read_text() == "new"
    assert names(tmp_path) == ["a"]


def test_a_reader_may_bring_the_old_one_back_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "_exchanged", lambda one, other: False)
    target, rename, times = write(tmp_path / "a", "old"), Path.rename, []

    def with_a_reader(self: Path, to: Path) -> Path:
        moved = rename(self, to)
        if to.name == ".a.previous" and not times:
            times.append(1)
            recover(target)
        return moved

    monkeypatch.setattr(Path, "rename", with_a_reader)
    put_in_place(write(tmp_path / ".a.writing", "new"), target)
    assert times == [1]
    assert (target / "file").read_text() == "new"
    assert names(tmp_path) == ["a"]


def test_a_lock_has_one_holder(tmp_path: Path) -> None:
    with (
        holding(tmp_path / "lock", "somebody else has it"),
        pytest.raises(ConfigError, match="somebody else has it"),
        holding(tmp_path / "lock", "somebody else has it"),
    ):
        pass
    with holding(tmp_path / "lock", "somebody else has it"):
        pass


def test_a_lock_may_be_waited_for(tmp_path: Path) -> None:
    def wait() -> str:
        with holding(tmp_path / "lock", "somebody else has it", 60):
            return "held"

    with ThreadPoolExecutor(1) as pool:
        with holding(tmp_path / "lock", "somebody else has it"):
            waiting = pool.submit(wait)
            time.sleep(0.3)  # it finds the lock held
        assert waiting.result() == "held"


def test_a_link_to_a_prepared_dataset_stays_one(tmp_path: Path) -> None:
    write(tmp_path / "disk" / "data", "old")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "data")
    for text in ("first", "second"):
        with temporary_sibling(tmp_path / "link", "preparing") as folder:
            put_in_place(write(folder / "dataset", text), tmp_path / "link")
        assert (tmp_path / "disk" / "data" / "file").read_text() == text
    assert (tmp_path / "link").is_symlink()
    assert (names(tmp_path), names(tmp_path / "disk")) == (["disk", "link"], ["data"])


@pytest.mark.parametrize(("number", "held"), [(errno.ENOLCK, True), (errno.EIO, False)])
def test_a_file_system_without_locks_is_told_from_a_broken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, held: bool
) -> None:
    def fail(file: object, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    reached = False
    refused = nullcontext() if held else pytest.raises(OSError, match=os.strerror(number))
    with refused, holding(tmp_path / "lock", "in use"):
        reached = True
    assert reached is held
