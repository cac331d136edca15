"""Checkpoints of one process: whole or not at all, whatever is damaged, full or asked for twice."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem

import m5.checkpoint
from m5.checkpoint import Checkpoints
from m5.checkpoint_files import checkpoints_in, newest
from m5.mistakes import explain
from m5.parallel import World, world
from m5.schema import DataError


@pytest.fixture(scope="module")
def place() -> Iterator[World]:
    with world("cpu") as place:
        yield place


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def state_of(number: float) -> dict[str, Tensor]:
    """A state whose every element tells which save it came from."""
    return {
        "table": torch.full((50, 4), float(number)),
        "half": torch.full((3,), number, dtype=torch.bfloat16),
        "step": torch.tensor(float(number)),
        "counts": torch.full((2, 2), int(number)),
        "nothing": torch.empty(0, 4),
    }


def number_in(state: dict[str, Tensor]) -> float:
    """The number that all elements have in common."""
    values = torch.cat([value.flatten().double() for value in state.values()]).unique()
    assert len(values) == 1
    return float(values)


def save_steps(folder: Path, place: World, steps: list[int], keep: int = 2) -> None:
    with Checkpoints(folder, keep=keep, place=place) as checkpoints:
        for step in steps:
            checkpoints.save(state_of(step), {"step": step})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_state_and_record_come_back(folder: Path, place: World) -> None:
    record = {"step": 7, "epoch": 1, "best": {"ndcg@10": 0.1 + 0.2}, "config": {"lr": 1e-3, "names": ["ü", None]}}
    with Checkpoints(folder, keep=1, place=place) as checkpoints:
        assert checkpoints.load(state_of(0)) is None
        checkpoints.save(state_of(7), record)
    state = state_of(0)
    tensors = dict(state)
    with Checkpoints(folder, keep=1, place=place) as checkpoints:
        assert checkpoints.load(state) == record
    assert number_in(state) == 7
    assert all(state[key] is tensors[key] for key in state)  # in place
    assert newest(folder) == record


def test_what_changes_after_save_is_not_written(folder: Path, place: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training changes tensors in place at once: here before the background may write its first byte."""
    changed = threading.Event()
    write = m5.checkpoint.save_tensors
    monkeypatch.setattr(m5.checkpoint, "save_tensors", lambda *arguments: (changed.wait(60), write(*arguments)))
    state, record = state_of(1), {"step": 1, "best": {"hr": 1}}
    with Checkpoints(folder, keep=2, place=place) as checkpoints:
        for number in (1, 2):  # the second time in buffers that have been used
            changed.clear()
            checkpoints.save(state, record)
            for value in state.values():
                value.add_(1)
            record["best"]["hr"] = record["step"] = number + 1
            changed.set()
            checkpoints.wait()
            loaded = state_of(0)
            assert checkpoints.load(loaded) == {"step": number, "best": {"hr": number}}
            assert number_in(loaded) == number


def test_last_k_are_kept(folder: Path, place: World) -> None:
    save_steps(folder, place, [10, 20, 30, 40], keep=3)
    assert names(folder) == ["step-00000020", "step-00000030", "step-00000040"]
    save_steps(folder, place, [40, 50], keep=2)
    assert names(folder) == ["step-00000040.1", "step-00000050"]
    save_steps(folder, place, [50, 50], keep=1)
    assert names(folder) == ["step-00000050.2"]
    save_steps(folder, place, [50], keep=1)
    assert names(folder) == ["step-00000050.3"]


def test_second_save_waits_for_the_first(folder: Path, place: World, monkeypatch: pytest.MonkeyPatch) -> None:
    publish, running = m5.checkpoint.publish, []

    def slow(*arguments) -> Path:
        running.append(1)
        assert len(running) == 1
        time.sleep(0.3)
        running.pop()
        return publish(*arguments)

    monkeypatch.setattr(m5.checkpoint, "publish", slow)
    with Checkpoints(folder, keep=3, place=place) as checkpoints:
        first = checkpoints.save(state_of(1), {"step": 1})
        second = checkpoints.save(state_of(2), {"step": 2})
        assert "step-00000001" in names(folder)
        assert first.waited < 0.1 < 0.25 < second.waited
    assert names(folder) == ["step-00000001", "step-00000002"]
    assert checkpoints.seconds >= 0.3


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def other_number(path: Path) -> None:
    """checkpoint.json stays JSON of the right form."""
    text = path.read_text()
    assert '"step": 20' in text
    path.write_text(text.replace('"step": 20', '"step": 21'))


DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "truncated data": ("__0_0.distcp", truncate, "bytes, and"),
    "flipped data": ("__0_0.distcp", flip, "sha256"),
    "deleted data": ("__0_0.distcp", Path.unlink, "is missing"),
    "truncated contents": (".metadata", truncate, "bytes, and"),
    "flipped contents": (".metadata", flip, "sha256"),
    "deleted contents": (".metadata", Path.unlink, "is missing"),
    "truncated description": ("checkpoint.json", truncate, "no JSON"),
    "flipped description": ("checkpoint.json", flip, "checkpoint.json"),
    "other description": ("checkpoint.json", other_number, "has changed"),
    "deleted description": ("checkpoint.json", Path.unlink, "is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_reported_and_the_previous_used(
    damage: str, folder: Path, place: World, capsys: pytest.CaptureFixture[str]
) -> None:
    file, hurt, words = DAMAGES[damage]
    save_steps(folder, place, [10, 20])
    hurt(folder / "step-00000020" / file)
    state = state_of(0)
    with Checkpoints(folder, keep=2, place=place) as checkpoints:
        record = checkpoints.load(state)
        assert (record, number_in(state)) == ({"step": 10}, 10)
        (warning,) = capsys.readouterr().err.splitlines()
        assert "step-00000020" in warning and file in warning and words in warning
        assert names(folder) == ["damaged-step-00000020", "step-00000010"]
        # The damaged one does not count among the last k, and the same step can be written again.
        checkpoints.save(state_of(20), {"step": 20})
        checkpoints.wait()
        assert names(folder) == ["damaged-step-00000020", "step-00000010", "step-00000020"]
        assert checkpoints.load(state) == {"step": 20}
    assert capsys.readouterr().err == ""


def test_nothing_is_unpickled_that_has_changed(
    folder: Path, place: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """.metadata is a pickle, and a pickle runs code."""
    save_steps(folder, place, [10])
    (folder / "step-00000010" / ".metadata").write_bytes(b"cos\nsystem\n(S'touch " + bytes(folder / "ran") + b"'\ntR.")
    with Checkpoints(folder, keep=1, place=place) as checkpoints, pytest.raises(DataError):
        checkpoints.load(state_of(0))
    assert not (folder / "ran").exists()


def test_no_whole_checkpoint_is_the_end(folder: Path, place: World, capsys: pytest.CaptureFixture[str]) -> None:
    save_steps(folder, place, [10, 20])
    for checkpoint in checkpoints_in(folder):
        truncate(checkpoint / "__0_0.distcp")
    state = state_of(5)
    with Checkpoints(folder, keep=2, place=place) as checkpoints:
        with pytest.raises(DataError, match=r"no checkpoint is whole .*step-00000020.*step-00000010.*--restart"):
            checkpoints.load(state)
        assert number_in(state) == 5
        assert names(folder) == ["step-00000010", "step-00000020"]  # its owner may still mend them
        assert len(capsys.readouterr().err.splitlines()) == 2
        assert newest(folder) is None


def test_another_model_is_refused(folder: Path, place: World) -> None:
    save_steps(folder, place, [10])
    wider = {**state_of(0), "table": torch.zeros(50, 8)}
    wider["extra.weight"] = wider.pop("half")
    with Checkpoints(folder, keep=2, place=place) as checkpoints:
        with pytest.raises(DataError, match=r"another model: 3 tensors differ .*extra.weight: none there, 3 bfloat16"):
            checkpoints.load(wider)
        with pytest.raises(DataError, match=r"table: 50x4 float32 there, 50x4 float16 here"):
            checkpoints.load({**state_of(0), "table": torch.zeros(50, 4, dtype=torch.float16)})
        assert checkpoints.load(state_of(0)) == {"step": 10}
    assert names(folder) == ["step-00000010"]


def test_steps_of_another_training_are_not_mixed(folder: Path, place: World) -> None:
    save_steps(folder, place, [10])
    with pytest.raises(DataError, match=r"later step than 5.*--restart"):
        save_steps(folder, place, [5])
    assert names(folder) == ["step-00000010"]


def test_leftovers_are_removed_and_other_files_are_not(folder: Path, place: World) -> None:
    save_steps(folder, place, [10])
    for name in (".step-00000020.writing", ".step-00000005.removing", "notes"):
        (folder / name).mkdir()
        (folder / name / "file").touch()
    Checkpoints(folder, keep=1, place=place)
    assert names(folder) == ["notes", "step-00000010"]


def test_wrong_arguments(folder: Path, place: World) -> None:
    with pytest.raises(ValueError, match="keep=0"):
        Checkpoints(folder, keep=0, place=place)
    with Checkpoints(folder, keep=1, place=place) as checkpoints:
        with pytest.raises(TypeError, match="seconds: only tensors"):
            checkpoints.save({"seconds": 3.0}, {"step": 1})  # type: ignore[dict-item]
        with pytest.raises(TypeError, match="not JSON serializable"):
            checkpoints.save(state_of(1), {"step": 1, "path": folder})
    assert names(folder) == []


@contextmanager
def full_disk(patch: pytest.MonkeyPatch, allowed: int) -> Iterator[None]:
    """Every file that torch writes takes `allowed` bytes."""

    class Stream:
        def __init__(self, stream):
            self.stream, self.left = stream, allowed

        def __getattr__(self, name):
            return getattr(self.stream, name)

        def write(self, data) -> int:
            self.left -= len(memoryview(data).cast("B"))
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.stream.write(data)

    create = FileSystem.create_stream

    @contextmanager
    def create_stream(self, path, mode):
        with create(self, path, mode) as stream:
            yield stream if mode == "rb" else Stream(stream)

    with patch.context() as inner:
        inner.setattr(FileSystem, "create_stream", create_stream)
        yield


@pytest.mark.parametrize("allowed", [0, 1000, 2200])
def test_a_full_disk_leaves_the_previous_checkpoint(
    allowed: int, folder: Path, place: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Checkpoints(folder, keep=1, place=place) as checkpoints:
        checkpoints.save(state_of(10), {"step": 10})
        checkpoints.wait()
        with full_disk(monkeypatch, allowed):
            checkpoints.save(state_of(20), {"step": 20})
            with pytest.raises(OSError) as caught:
                checkpoints.save(state_of(21), {"step": 21})
        assert "The disk is full" in (explain(caught.value) or "")
        assert names(folder) == ["step-00000010"]
        checkpoints.wait()  # what was raised once is over
        state = state_of(0)
        assert checkpoints.load(state) == {"step": 10} and number_in(state) == 10
        checkpoints.save(state_of(22), {"step": 22})
    assert names(folder) == ["step-00000022"]


def test_a_failure_while_describing_leaves_the_previous_checkpoint(
    folder: Path, place: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_steps(folder, place, [10])

    def fail(*arguments) -> Path:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(m5.checkpoint, "publish", fail)
    with pytest.raises(OSError) as caught:
        save_steps(folder, place, [20])
    assert "quota" in (explain(caught.value) or "")
    assert names(folder) == ["step-00000010"]


def test_the_error_of_training_is_the_one_that_is_seen(
    folder: Path, place: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ZeroDivisionError) as caught, Checkpoints(folder, keep=1, place=place) as checkpoints:
        with full_disk(monkeypatch, 0):
            checkpoints.save(state_of(20), {"step": 20})
            assert checkpoints._thread is not None
            checkpoints._thread.join()
        _ = 1 / 0
    assert "No space left" in caught.value.__notes__[0]
    assert names(folder) == []


def test_the_description_can_be_read_by_people(folder: Path, place: World) -> None:
    save_steps(folder, place, [10])
    body = json.loads((folder / "step-00000010" / "checkpoint.json").read_text())
    assert body["record"] == {"step": 10}
    assert body["tensors"]["half"] == {"shape": [3], "dtype": "bfloat16"}
    assert body["files"].keys() == {"__0_0.distcp", ".metadata"}
