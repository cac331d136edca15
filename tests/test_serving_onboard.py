"""A title that joins an artifact: its key is what a cold title of the same content has, and rights hold for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from m5.schema import DataError, PreparedDataset
from m5.serving.artifact import Artifact
from m5.serving.export import Options, export
from m5.serving.onboard import LaunchedTitle, add_titles, refuse_other_dataset
from m5.serving.retriever import Ask, Retriever
from m5.serving.rights import Grant
from m5.viewer import Viewer
from tests.serving import write_run
from tests.world import write_world

COLD = 27  # of the tiny world: watched after the training period only


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onboard")
    export(write_run(folder), folder / "artifact", Options(program=False))
    return folder


@pytest.fixture
def artifact(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder / "artifact", tmp_path / "artifact")
    return tmp_path / "artifact"


def launched(folder: Path, title_id: str = "new", **changes) -> LaunchedTitle:
    """A title with the content of a cold one."""
    content = np.load(folder / "data" / "content" / "graph.npy")[COLD]
    known = {"title": "New", "description": "", "category": 1, "content_G": content, "grants": [Grant()]}
    return LaunchedTitle(title_id, **(known | changes))


def test_it_scores_as_a_cold_title_of_its_content_does(folder: Path, artifact: Path) -> None:
    before = Retriever(Artifact(artifact))
    after = Retriever(add_titles(artifact, [launched(folder)]))
    assert after.manifest.n_titles == 31 and after.place["new"] == 30
    torch.testing.assert_close(after.key_NQ[30], before.key_NQ[COLD], atol=1e-6, rtol=0)
    torch.testing.assert_close(after.key_NQ[:30], before.key_NQ, atol=0, rtol=0)
    viewer = Viewer(np.array([3, 8]), np.array([0, 9]), 10**7, scenario={"region": 1})
    torch.testing.assert_close(after.queries([viewer])[0], before.queries([viewer])[0], atol=0, rtol=0)
    (answer,) = after.recommend([Ask(viewer, 100)])
    scores = dict(zip(answer.title.tolist(), answer.score.tolist(), strict=True))
    assert scores[30] == pytest.approx(scores[COLD], abs=1e-5)
    # It may be watched, too.
    assert np.isfinite(after.queries([Viewer(np.array([30]), np.array([5]), 9)])[0].numpy()).all()


def test_rights_hold_for_it(folder: Path, artifact: Path) -> None:
    grants = {"a": [Grant(start=1000, scenario={0: 2})], "b": [], "c": [Grant(end=500)]}
    titles = [launched(folder, name, grants=rows) for name, rows in grants.items()]
    retriever = Retriever(add_titles(artifact, titles))

    def playable(region: int, at: int) -> set[str]:
        (answer,) = retriever.recommend(
            [Ask(Viewer(np.zeros(0, int), np.zeros(0, int), at, scenario={"region": region}), 99)]
        )
        return {retriever.title_ids[title] for title in answer.title} & set(grants)

    assert playable(2, 999) == set() and playable(2, 1000) == {"a"} and playable(1, 1000) == set()
    assert playable(0, 499) == {"c"} and playable(0, 500) == set()


def test_posters_and_titles_follow(folder: Path, artifact: Path) -> None:
    grown = add_titles(artifact, [launched(folder, poster=folder / "blue.png"), launched(folder, "plain")])
    assert grown.posters is not None
    assert grown.posters[30] == grown.posters[1] != b"" and grown.posters[31] == b""
    assert grown.titles["title_id"].tolist()[30:] == ["new", "plain"]
    assert grown.titles["cold"].tolist()[30:] == [True, True]
    assert "2 of them added after training" in (artifact / "card.md").read_text()
    assert sorted(path.name for path in artifact.parent.iterdir()) == ["artifact"]


@pytest.mark.parametrize("options", [Options(int8=True, program=False), Options(index="int8", program=False)])
def test_keys_in_int8_and_kept_indexes_grow(folder: Path, tmp_path: Path, options: Options) -> None:
    export(folder / "run", tmp_path / "artifact", options)
    exact = Retriever(Artifact(folder / "artifact"))
    grown = Retriever(add_titles(tmp_path / "artifact", [launched(folder)]), "int8")
    viewer = Viewer(np.array([3, 8]), np.array([0, 9]), 10**7, scenario={"region": 1})
    (answer,) = grown.recommend([Ask(viewer, 100)])
    assert 30 in answer.title
    step = float(exact.key_NQ.abs().max()) / 127
    assert float((grown.key_NQ[30] - exact.key_NQ[COLD]).abs().max()) <= step


def test_what_cannot_join_is_refused_and_changes_nothing(folder: Path, artifact: Path, tmp_path: Path) -> None:
    digest = Artifact(artifact).digest
    with pytest.raises(DataError, match="has a title 't3' already"):
        add_titles(artifact, [launched(folder, "t3")])
    with pytest.raises(DataError, match="a title is added once"):
        add_titles(artifact, [launched(folder, "x"), launched(folder, "x")])
    with pytest.raises(DataError, match=r"of shape \(5,\), where the model reads 6"):
        add_titles(artifact, [launched(folder, content_G=np.zeros(5, dtype=np.float32))])
    assert Artifact(artifact).digest == digest
    other = write_world(tmp_path / "other", users=9)
    with pytest.raises(DataError, match="belongs to the dataset 'tiny', not to"):
        refuse_other_dataset(Artifact(artifact), other)
    moved = tmp_path / "moved"
    shutil.copytree(folder / "data", moved)
    np.save(moved / "content" / "graph.npy", np.load(moved / "content" / "graph.npy")[::-1])
    with pytest.raises(DataError, match="other vectors"):
        refuse_other_dataset(Artifact(artifact), PreparedDataset(moved))
    assert json.loads((artifact / "artifact.json").read_text())["n_titles"] == 30
