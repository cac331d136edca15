"""Around a new artifact: it is taken over when it is whole, no request is lost, and no answer is of two artifacts."""

from __future__ import annotations

import gc
import json
import logging
import shutil
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m5.schema import DataError
from m5.serving import reload
from m5.serving.artifact import MANIFEST, MANIFEST_DIGEST, Artifact, file_digest, seal
from m5.serving.export import Options, export
from m5.serving.reload import Current
from m5.serving.retriever import Ask, Retriever
from m5.viewer import Viewer
from tests.serving import BODY, NOW, client_of, recommend, served, until, write_artifact

PLAIN = Options(program=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reload")
    write_artifact(folder)
    return folder


def ask_for(k: int) -> Ask:
    return Ask(Viewer(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), 0), k)


def test_a_new_artifact_is_taken_over_and_a_damaged_one_refused(folder: Path, tmp_path: Path) -> None:
    artifact = tmp_path / "artifact"
    export(folder / "run", artifact, PLAIN)
    outcomes: list[str] = []
    current = Current(artifact, "exact", outcomes.append)
    old = current.retriever
    assert not current.look() and current.retriever is old
    # Damaged: the old one goes on, and says so.
    export(folder / "run", artifact, Options(int8=True, program=False))
    content = bytearray((artifact / "titles.safetensors").read_bytes())
    content[-1] ^= 1
    (artifact / "titles.safetensors").write_bytes(content)
    assert not current.look() and current.retriever is old
    assert current.refused and str(tmp_path) not in current.refused
    assert not current.look() and outcomes == ["refused"]
    # Whole: it answers from now on; who holds the old one still has all of it, posters too.
    export(folder / "run", artifact, Options(posters=False, program=False))
    assert current.look() and current.retriever is not old and current.refused is None
    assert outcomes == ["refused", "ok"]
    assert old.posters is not None and old.posters[0].startswith(b"\xff\xd8")
    shutil.rmtree(artifact)
    assert not current.look()
    assert current.retriever.recommend([ask_for(3)])[0].title.tolist()


def test_an_artifact_that_is_copied_file_by_file_is_taken_over_once_it_is_whole(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    artifact, other = tmp_path / "artifact", tmp_path / "other"
    export(folder / "run", artifact, PLAIN)
    whole = export(folder / "run", other, Options(int8=True, program=False))
    outcomes: list[str] = []
    loads: list[Path] = []
    monkeypatch.setattr(reload, "FIRST_WAIT", 1e9)
    current = Current(artifact, "exact", outcomes.append)
    monkeypatch.setattr(reload, "Artifact", lambda path: loads.append(path) or Artifact(path))
    for name in (MANIFEST, MANIFEST_DIGEST):
        shutil.copy(other / name, artifact / name)
    with caplog.at_level(logging.ERROR, logger="m5.serve"):
        assert [current.look() for _ in range(3)] == [False] * 3
        assert len(loads) == 1  # it waits before it looks again
        monkeypatch.setattr(reload, "FIRST_WAIT", 0.0)
        current._refusal = None
        assert [current.look() for _ in range(3)] == [False] * 3
        assert len(loads) == 4 and current.refused
        assert len(caplog.records) == 2 and outcomes == ["refused"] * 2  # the same reason is told once
    for path in other.iterdir():
        shutil.copy(path, artifact / path.name)
    assert current.look() and current.refused is None
    assert current.retriever.artifact.digest == whole.digest and outcomes[-1] == "ok"


def test_the_artifact_that_answers_may_come_back(folder: Path, tmp_path: Path) -> None:
    artifact = tmp_path / "artifact"
    export(folder / "run", artifact, PLAIN)
    current = Current(artifact, "exact")
    good = (artifact / MANIFEST_DIGEST).read_bytes()
    (artifact / MANIFEST_DIGEST).write_text("of another one")
    assert not current.look() and current.refused
    (artifact / MANIFEST_DIGEST).write_bytes(good)
    assert not current.look() and current.refused is None


def test_files_of_two_artifacts_are_never_mixed(folder: Path, tmp_path: Path) -> None:
    """Also where one is swapped in between the comparison of checksums and the reading."""
    artifact, other = tmp_path / "artifact", tmp_path / "other"
    export(folder / "run", other, Options(int8=True, program=False))
    for swap in (
        lambda: export(folder / "run", artifact, Options(int8=True, program=False)),
        lambda: shutil.copytree(other, artifact, dirs_exist_ok=True),
        lambda: (artifact / "viewers.json").unlink(),
        lambda: shutil.rmtree(artifact),
    ):
        export(folder / "run", artifact, Options(viewers=1, program=False))
        verified = Artifact(artifact)
        swap()
        with pytest.raises((DataError, OSError)):
            Retriever(verified)


def test_an_artifact_that_is_replaced_while_it_is_read_is_no_damaged_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = tmp_path / "artifact"
    export(folder / "run", artifact, PLAIN)
    outcomes: list[str] = []
    waiting = [Options(int8=True, program=False)]

    def swapping(read: Artifact, *arguments: Any, **how: Any) -> Retriever:
        if waiting:
            export(folder / "run", artifact, waiting.pop())
        return Retriever(read, *arguments, **how)

    monkeypatch.setattr(reload, "Retriever", swapping)
    current = Current(artifact, "exact", outcomes.append)  # already when it begins
    assert current.retriever.artifact.digest == Artifact(artifact).digest
    export(folder / "run", artifact, Options(posters=False, program=False))
    waiting.append(Options(viewers=2, program=False))
    assert not current.look() and current.refused is None and outcomes == []
    assert current.look() and outcomes == ["ok"]
    assert current.retriever.artifact.digest == Artifact(artifact).digest and len(current.retriever.viewers) == 2


def test_files_that_are_overwritten_where_they_lie_do_not_end_the_service(folder: Path, tmp_path: Path) -> None:
    artifact = tmp_path / "artifact"
    export(folder / "run", artifact, PLAIN)
    retriever = Retriever(Artifact(artifact), "int8")
    before = retriever.recommend([ask_for(5)])[0].title.tolist()
    for path in artifact.iterdir():
        path.write_bytes(b"")
    assert retriever.recommend([ask_for(5)])[0].title.tolist() == before


def test_an_artifact_of_another_version_is_told(folder: Path, tmp_path: Path) -> None:
    artifact = tmp_path / "artifact"
    export(folder / "run", artifact, PLAIN)
    record = json.loads((artifact / MANIFEST).read_text())
    for change in ({"invented_later": 1}, {"n_titles": "many"}):
        (artifact / MANIFEST).write_text(json.dumps(record | change))
        (artifact / MANIFEST_DIGEST).write_text(file_digest(artifact / MANIFEST))
        with pytest.raises(DataError, match=f"another version of this program.*{next(iter(change))}.*Export"):
            Artifact(artifact)


def test_the_datasets_time_is_that_of_the_artifact_that_answers(folder: Path, tmp_path: Path) -> None:
    artifact, other = tmp_path / "artifact", tmp_path / "other"
    manifest = export(folder / "run", artifact, PLAIN).manifest
    export(folder / "run", other, PLAIN)
    with client_of(artifact, clock=None, look_every=0.02) as client:
        assert client.get("/v1/info").json()["now"] == manifest.now
        seal(other, manifest.model_copy(update={"now": manifest.now + 86_400}))
        shutil.rmtree(artifact)
        other.rename(artifact)
        until(lambda: client.get("/v1/info").json()["now"] == manifest.now + 86_400)


def test_a_replaced_artifact_leaves_memory_without_the_garbage_collector(folder: Path, tmp_path: Path) -> None:
    """Which does not look at what was there when the service began."""
    artifact = tmp_path / "artifact"
    export(folder / "run", artifact, PLAIN)
    current = Current(artifact, "exact")
    old = [weakref.ref(part) for part in (current.retriever, current.retriever.key_NQ, current.retriever.tower)]
    export(folder / "run", artifact, Options(int8=True, program=False))
    gc.disable()
    try:
        assert current.look()
        assert [part() for part in old] == [None] * 3
    finally:
        gc.enable()


def test_no_answer_is_lost_or_mixed_while_folders_are_swapped(folder: Path, tmp_path: Path) -> None:
    """Several clients ask all the time, while one artifact after the other takes the place of the last."""
    artifact = tmp_path / "artifact"
    digests = [export(folder / "run", artifact, PLAIN).digest[:12]]
    scores: dict[str, list[float]] = {}
    lost: list[Exception] = []
    enough = threading.Event()

    def asking() -> None:
        while not enough.is_set():
            try:
                answer = recommend(site, BODY)
                scores.setdefault(answer["artifact"], []).append(answer["titles"][0]["score"])
            except Exception as error:
                lost.append(error)

    with served(artifact, look_every=0.02, clock=lambda: float(NOW)) as site:
        clients = [threading.Thread(target=asking) for _ in range(4)]
        for client in clients:
            client.start()
        for number in range(4):
            until(lambda: digests[-1] in scores)
            options = Options(int8=number % 2 == 0, viewers=number, program=False)
            digests.append(export(folder / "run", artifact, options).digest[:12])
        until(lambda: digests[-1] in scores)
        enough.set()
        for client in clients:
            client.join()
    assert lost == []
    assert list(scores) == digests and len(set(digests)) == 5
    for found in scores.values():
        assert max(found) - min(found) < 1e-4
